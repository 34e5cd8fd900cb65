"""V on a suspect that is first aligned to the owner's network over a table of its axes.

Nothing here runs a network. The table says which dimensions may be reordered, rotated or mixed
(`solve`), the canonical form which scales may be moved. After alignment every tensor goes back into
the reference's own form, in which the key reads it.

*Blind*: what a bit is read with is projected out of the reference's filters before anything is
compared, so no inner product sees it. What preference is left is measured: the same table is used
on networks that have nothing to do with the reference, and the p-value is taken at the best rate
that any of them reaches. A table with more freedom than the network has fits those as well, so it
gains nothing; one by which they match far more than half is refused.

Aligned to a key's anchor, the network before the mark, nothing is projected out and no null taken:
what knows nothing of the bits cannot prefer any.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nnpassport.alignment.axes import Axes
from nnpassport.alignment.canonical import Weights, canonical, restored
from nnpassport.alignment.directions import Free, free_in, spanned
from nnpassport.alignment.part import needed, only
from nnpassport.alignment.rate import MIXTURES, Other, against, beside
from nnpassport.alignment.solve import Aligner, aligner
from nnpassport.alignment.table import LONGEST, check_table
from nnpassport.files.arrays import Array, arrays_digest, is_floating
from nnpassport.keys.chance import log10_binomial_tail
from nnpassport.keys.counts import Counts, Reading
from nnpassport.keys.key import Key
from nnpassport.keys.patches import filters, mean_patch
from nnpassport.keys.reading import (
    READERS,
    read_passports,
    read_projection,
    read_words,
)
from nnpassport.scheme import UnsuitableModelError

MOST_TIMES_WIDER = 64
"""A suspect's tensor that is longer than so many times the reference's is left out."""
MOST_TIMES_LARGER, MOST_NUMBERS = 16, 2**28
"""All together may be so many times as large as the reference, or have so many numbers."""

LARGE = 2**28
"""A network of more numbers is aligned in what its marked layers need alone."""

BLIND = 0.55
"""Share of bits that unrelated networks may match, all together; chance has a half."""
LOG10_NOT_BLIND = -4.0
"""And how unlikely chance has to be as the reason, before more of them are a refusal."""

Matrix = NDArray[np.float64]


class Placed(NamedTuple):
    """A suspect in the reference's order and form.

    Attributes:
        arrays: the tensors that both have.
        cosines: by matrix, the mean |cosine| of its rows to the blind reference's.
        dropped: always 0: of a longer axis the best are taken, and the others are not counted.
        missing: rows of the reference's matrices for which the suspect has none.
    """

    arrays: Mapping[str, Array]
    cosines: Mapping[str, float]
    dropped: int
    missing: int


class Reference(NamedTuple):
    """The owner's network, ready for any number of suspects.

    Attributes:
        means: what layer norms take away of its tensors. A suspect's own cannot be known; those of
            a network that knows nothing of the bits stand in for it.
        layers: names of the weights that the key reads.
    """

    axes: Axes
    tensors: Weights
    to: Aligner
    means: Weights = {}  # noqa: RUF012 - never changed
    layers: frozenset[str] = frozenset()

    def place(self, suspect: Mapping[str, Array], loose: Collection[str] = ()) -> Placed:
        """Align one network; rows of `loose` tensors are of any sign and scale.

        Raises:
            UnsuitableModelError: its tensors are not those of such a network.
        """
        try:
            found = dict(self.to.align(alike(suspect, self.tensors), loose).weights)
        except (ValueError, IndexError, np.linalg.LinAlgError) as error:
            raise UnsuitableModelError(
                f"the suspect cannot be aligned over these axes ({type(error).__name__}); needed: "
                "a network of the reference's kind"
            ) from error
        cosines, missing = dict[str, float](), 0
        for name in sorted({p.tensor for axis in self.axes.axes for p in axis.places}):
            theirs = self.to.reference[name]
            if theirs.ndim > 1:
                mine = found.get(name)
                fits = mine is not None and mine.shape == theirs.shape
                cosines[name] = _cosine(mine, theirs) if mine is not None and fits else 0.0
                missing += 0 if fits else len(theirs)
        for name, mean in self.means.items():
            if name in found and found[name].shape == mean.shape:
                found[name] = found[name] + mean
        arrays = {name: restored(self.axes, self.tensors, name, t) for name, t in found.items()}
        return Placed(arrays, cosines, 0, missing)

    def with_own_scales(self, placed: Mapping[str, Array]) -> Mapping[str, Array]:
        """Such arrays, and this network's norms where they were folded: filters are for these."""
        norms, gains = self.axes.batch_norms, self.axes.gains
        names = {norms[name].weight for name in placed if name in norms}
        names |= {gains[name] for name in placed if name in gains} | self.axes.norms.keys()
        return {**placed, **{n: self.tensors[n] for n in names if n in self.tensors}}


def reference_of(axes: Axes, tensors: Mapping[str, Array], key: Key) -> Reference:
    """The owner's network, checked against its table, with what the key reads projected out.

    Raises:
        UnreadableModelError: the table is not of this network.
        UnsuitableModelError: nothing can be projected out for this key, or what strangers match is
            not known for such a network.
    """
    check_table(axes, {name: array.shape for name, array in tensors.items()})
    _require_known_null(axes)
    known = _floating(tensors)
    return Reference(axes, known, aligner(axes, _blind(known, key)))


def _require_known_null(axes: Axes) -> None:
    """Refuse what no null was found to hold for: more than channels in some order.

    On MobileNetV2 strangers matched 58.6 % of a key's bits, and mixtures of their filters a half.
    """
    mixed = sorted({axis.kind for axis in axes.axes} - {"permute"})
    grouped = any("grouped" in axis.traits for axis in axes.axes)
    if not mixed and not grouped:
        return
    found = " and ".join([*(f"{kind} axes" for kind in mixed), *(["grouped ones"] * grouped)])
    raise UnsuitableModelError(
        f"the network has {found}, over which unrelated networks may match a key's bits more often "
        "than their mixtures show, and the key has no anchor; needed: a key that is bound to the "
        "network before the mark (`embed` binds one), or a reading without alignment"
    )


def anchor_of(axes: Axes, tensors: Mapping[str, Array], key: Key) -> Reference:
    """The network before the mark, checked against its table.

    Raises:
        UnreadableModelError: the table is not of this network.
    """
    check_table(axes, {name: array.shape for name, array in tensors.items()})
    if sum(array.size for array in tensors.values()) > LARGE:
        names = needed(axes, {f"{layer.name}.weight" for layer in key.context.layers})
        axes, tensors = only(axes, names), {n: tensors[n] for n in tensors if n in names}
    known = _floating(tensors)
    marked = {f"{layer.name}.weight" for layer in key.context.layers}
    to = aligner(axes, known, marked, _free(axes, known, key))
    whole = canonical(axes, known, centred=False)
    means = {name: whole[name] - each for name, each in to.reference.items()}
    means = {name: each for name, each in means.items() if each.any()}
    return Reference(axes, known, to, means, frozenset(marked & known.keys()))


def _free(axes: Axes, known: Weights, key: Key) -> dict[str, Free]:
    """By weight of the key's layers, where their mark moves filters in canonical form."""
    vectors = {name: tensor for name, tensor in known.items() if tensor.ndim < 2}
    found = {}
    for layer in key.context.layers:
        name = f"{layer.name}.weight"
        there = spanned(key, layer)
        if name not in known or not len(there):
            continue
        turned = [
            canonical(axes, {**vectors, name: filters(each.reshape(layer.weight), layer.geometry)})[
                name
            ]
            for each in there
        ]
        if turned[0].shape == known[name].shape:
            found[name] = free_in(turned, layer.geometry)
    return found


def can_read(key: Key) -> bool:
    """Whether a key's bits can be read aligned: to its anchor, or once they are projected out.

    For the latter they are linear in each filter, in few enough directions.
    """
    reader = READERS.get(key.context.scheme)
    if reader is not None and key.context.anchor is not None:
        return True
    if reader is read_passports:
        return all(layer.channels is None for layer in key.context.layers)
    if reader not in (read_projection, read_words):
        return False
    (layer,) = key.context.layers
    return 2 * layer.length <= int(np.prod(layer.weight[1:]))


def verify_by_axes(
    read: Reading,
    suspect: Mapping[str, Array],
    reference: Reference,
    unrelated: Iterable[Mapping[str, Array]] | None = None,
) -> Counts:
    """What the key reads of the suspect once it is aligned, at the rate of unrelated networks.

    Without `unrelated` these are `MIXTURES` of the suspect's own filters, drawn from its digest.

    Raises:
        UnsuitableModelError: the suspect cannot be aligned, or alignment is not blind.
    """
    placed = reference.place(suspect)
    origin = f"{MIXTURES} mixtures of the suspect's own filters"
    if unrelated is not None:
        unrelated = list(unrelated)
        origin = f"{len(unrelated)} unrelated networks that were given"
    networks = _mixtures(suspect, reference) if unrelated is None else unrelated
    others, skipped = beside(read, networks, reference.place, origin)
    found = against(read, placed, others, origin, skipped)
    _require_blind(found.bits, others)
    return found


def strangers_of(suspect: Mapping[str, Array], reference: Reference) -> Placed:
    """A network of the suspect's own numbers that has nothing to do with the reference, aligned.

    Raises:
        UnsuitableModelError: it cannot be aligned.
    """
    return reference.place(next(_mixtures(suspect, reference)))


def _require_blind(compared: int, others: list[Other]) -> None:
    matches, bits = sum(each.matches for each in others), compared * len(others)
    unlikely = log10_binomial_tail(matches, bits, 0.5) < LOG10_NOT_BLIND
    if unlikely and matches / bits > BLIND:
        raise UnsuitableModelError(
            f"aligned over these axes, networks that are unrelated match {matches / bits:.3f} of "
            f"the bits, and chance has a half: this alignment fits noise, so it proves nothing; "
            "needed: a table of the axes that the network has, or a reading without alignment"
        )


def _floating(tensors: Mapping[str, Array]) -> Weights:
    names = [name for name in tensors if is_floating(tensors[name])]
    return {name: tensors[name].astype(np.float64) for name in names}


def alike(suspect: Mapping[str, Array], reference: Weights) -> Weights:
    """The suspect's tensors that can be the reference's: of a likely length, under its names.

    Raises:
        UnsuitableModelError: together they are too large.
    """
    found = {n: a for n, a in suspect.items() if n in reference and _near(a, reference[n])}
    total, there = (sum(a.size for a in each.values()) for each in (found, reference))
    if total > max(MOST_TIMES_LARGER * there, MOST_NUMBERS):
        raise UnsuitableModelError(
            f"the suspect has {total} numbers where the reference has {there}; needed for "
            f"alignment: at most {MOST_TIMES_LARGER} times as many, or {MOST_NUMBERS}; verify "
            "without it"
        )
    return _floating(found)


def _near(array: Array, there: Matrix) -> bool:
    """Of the same number of dimensions, and none much longer. A matrix may be wide as a kernel."""
    sides = zip(array.shape, there.shape, strict=False)
    return array.ndim == there.ndim and all(
        0 < mine <= max(theirs, min(LONGEST, MOST_TIMES_WIDER * theirs)) for mine, theirs in sides
    )


def _blind(tensors: Weights, key: Key) -> Weights:
    """The tensors, in whose filters the directions that the key reads are zero."""
    found = dict(tensors)
    for layer in key.context.layers:
        name = f"{layer.name}.weight"
        if name not in found:
            raise UnsuitableModelError(
                f"the reference has no {name}, which the key was made for; needed: the network "
                "that the key was put into"
            )
        rows = filters(found[name], layer.geometry)
        forms = _forms(key, layer)
        groups = len(forms)
        flat = rows.reshape(groups, len(rows) // groups, -1)
        bases = [np.linalg.qr(each.T)[0] for each in forms]
        seen = np.stack([part - part @ b @ b.T for part, b in zip(flat, bases, strict=True)])
        found[name] = filters(seen.reshape(rows.shape), layer.geometry)
    return found


def _forms(key: Key, layer: Any) -> Matrix:
    """What a filter is multiplied with to read bits (groups forms numbers)."""
    if READERS[key.context.scheme] is read_passports:
        patch = mean_patch(key.passport_array(layer.name), layer.weight, layer.geometry)
        return patch[0][:, None]
    return np.asarray(key.projection_array(layer.name), np.float64)[None]


def _cosine(mine: Matrix, theirs: Matrix) -> float:
    a, b = (each.reshape(len(each), -1) for each in (mine, theirs))
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float((np.abs((a * b).sum(1)) / np.maximum(lengths, 1e-300)).mean())


def _mixtures(suspect: Mapping[str, Array], reference: Reference) -> Iterator[Mapping[str, Array]]:
    """The suspect with the rows of every matrix rotated at random among themselves."""
    own = alike(suspect, reference.tensors)
    seed = int(arrays_digest(dict(suspect))[:15], 16)
    rng = np.random.default_rng(seed)
    for _ in range(MIXTURES):
        yield {
            name: _rotated(array, rng) if array.ndim > 1 else array for name, array in own.items()
        }


def _rotated(array: Matrix, rng: np.random.Generator) -> Matrix:
    if len(array) > LONGEST:  # a vocabulary, say: rigid, and the square of it would not fit
        return array[rng.permutation(len(array))]
    flat = array.reshape(len(array), -1)
    turn = np.linalg.qr(rng.standard_normal((len(flat), len(flat))))[0]
    return (turn @ flat).reshape(array.shape)
