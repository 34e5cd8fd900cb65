"""Which of a suspect's tensors is which of the anchor's, whatever they are called.

Names are free, blocks can be put in and left out. So a tensor is told by what is in it: it is
brought into place along those of its axes that are known already, the last one that is not is
solved by it alone, and what is left says how well it fits. It begins where a network is anchored,
at what reads pictures or letters and at what writes classes, and goes on from there.

Vectors are not told apart, there is nothing to tell them by. Norms' weights that a reader was
multiplied with are tried; rows in front of a norm may then be of either sign, which the anchor
gives back. Nothing here looks at bits: what is found is one reading, however much was tried.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from nnpassport.alignment.canonical import Weights, canonical
from nnpassport.alignment.match import assigned
from nnpassport.alignment.mixed import column_scales, own_scales
from nnpassport.alignment.solve import Aligner, Unit, Work
from nnpassport.alignment.spots import Spot, spots_of
from nnpassport.files.arrays import Array, is_floating

Matrix = NDArray[np.float64]
FITS, FITS_MARKED = 0.3, 0.1
"""How far from what does not fit to 1 a tensor's fit must be, and that of one that has a mark."""
CLEAR = 0.95
"""From here on no other norm's weight is tried in front of a tensor."""
MOST_PRODUCTS = 2**41
"""Products of all that is compared in one suspect: some ten minutes of one processor."""
SAME_NORM = 0.97
"""How near a norm must be to what is left of a layer's scales, to be the one behind it."""
_TELLING = 32  # numbers of a row, from which on more of them are no better
BRANCH = 0.5
"""A second tensor belongs to a layer if less than this of what did not fit is left with it."""
_MOST_JOINED = 256  # pairs of tensors that are looked at for one
_MOST_VECTORS = 64  # of one length, of which any two may be a norm's
_ROWS = 64  # of a tensor's, that are compared
_PARTS = (2, 3)  # of which fused projections are made
_LONGER = 4
_TINY = 1e-300


class Candidate(NamedTuple):
    """A suspect's tensor that may be one of the anchor's.

    Attributes:
        name: what it is called.
        turned: whether its two axes change places first.
        part: which rows it is of the tensor: of how many parts, and which; (1, 0) is all.
        joined: how it is made of this tensor and of `other`, one of `JOINED`; "" is of one alone.
        third: another one, of three.
    """

    name: str
    turned: bool = False
    part: tuple[int, int] = (1, 0)
    joined: str = ""
    other: str = ""
    third: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tensors that it is made of."""
        return tuple(each for each in (self.name, self.other, self.third) if each)

    @property
    def said(self) -> str:
        """For people."""
        names = " and ".join(repr(each[:60]) for each in self.names)
        return f"the {self.joined} of {names}" if self.joined else names


@final
@dataclass(slots=True, repr=False)
class Naming:
    """What was found of one suspect.

    Attributes:
        taken: by the anchor's name, the tensor that is it.
        gains: by the name of a norm's weight of the anchor, the suspect's; "" where it was folded.
        fits: how well each fits, in [0, 1].
        choices: by the anchor's name, among how many it was chosen.
        scales: by a layer's name, what a batch norm behind it multiplies each channel by, up to one
            factor for all; of those in front of a bottleneck that may be mixed.
        tried: how many were compared.
    """

    taken: dict[str, Candidate] = field(default_factory=dict)
    gains: dict[str, str] = field(default_factory=dict)
    fits: dict[str, float] = field(default_factory=dict)
    choices: dict[str, int] = field(default_factory=dict)
    scales: dict[str, Matrix] = field(default_factory=dict)
    tried: int = 0

    def tensors(self, suspect: Mapping[str, Array], reference: Weights) -> Weights:
        """The suspect's tensors under the anchor's names, and the norms' weights."""
        found = {n: shown(suspect, each, reference[n]) for n, each in self.taken.items()}
        vectors = {n: np.asarray(suspect[g], np.float64) for n, g in self.gains.items() if g}
        for name, scale in self.scales.items():
            found[name] = _by_row(found[name], scale)
        return {**found, **vectors}


JOINED: Mapping[str, Callable[..., Matrix]] = {
    "rows": lambda *parts: np.concatenate(parts),
    "columns": lambda *parts: np.concatenate(parts, axis=1),
    "sum": lambda a, b: a + b,
    "product": lambda a, b: a.reshape(len(a), -1) @ b.reshape(len(b), -1),
}
"""How one tensor may be kept as two: cut, in two branches, or as one layer behind another.

Cut, as queries, keys and values are, it may be kept as three."""


def shown(suspect: Mapping[str, Array], candidate: Candidate, like: Matrix) -> Matrix:
    """A candidate as the anchor's tensor is laid out."""
    tensor = np.asarray(suspect[candidate.name], np.float64)
    if candidate.joined:
        others = (np.asarray(suspect[name], np.float64) for name in candidate.names[1:])
        return JOINED[candidate.joined](tensor, *others).reshape(like.shape)
    if candidate.turned:
        tensor = tensor.T
    count, which = candidate.part
    if count > 1:
        rows = len(tensor) // count
        tensor = tensor[which * rows : (which + 1) * rows]
    if tensor.ndim == 2 and like.ndim > 2:
        return tensor.reshape(*tensor.shape, *[1] * (like.ndim - 2))
    if tensor.ndim > 2 and like.ndim == 2:
        return tensor.reshape(len(tensor), -1)
    return tensor


def candidates_of(
    shapes: Mapping[str, tuple[int, ...]], like: tuple[int, ...], grows: Sequence[bool]
) -> list[Candidate]:
    """All that could be a tensor of this shape; `grows`: where it may be longer."""

    def fits(shape: tuple[int, ...]) -> bool:
        if len(shape) == 2 and len(like) > 2:
            shape = (*shape, *[1] * (len(like) - 2))
        if len(shape) > 2 and len(like) == 2 and math.prod(shape[2:]) == 1:
            shape = shape[:2]
        return len(shape) == len(like) and all(
            mine == theirs or (grow and theirs < mine <= _LONGER * theirs)
            for mine, theirs, grow in zip(shape, like, grows, strict=True)
        )

    matrices = {name: shape for name, shape in shapes.items() if len(shape) > 1}
    found = [Candidate(name) for name, shape in matrices.items() if fits(shape)]
    if len(like) > 2:
        return found
    flat = {name: shape for name, shape in matrices.items() if len(shape) == 2}
    found += [Candidate(name, turned=True) for name, shape in flat.items() if fits(shape[::-1])]
    return found + [
        Candidate(name, turned, (count, part))
        for name, shape in flat.items()
        for turned in (False, True)
        for count in _PARTS
        if (shape[::-1] if turned else shape) == (count * like[0], like[1])
        for part in range(count)
    ]


def joined_of(
    shapes: Mapping[str, tuple[int, ...]], like: tuple[int, ...], more: Collection[tuple[int, ...]]
) -> list[Candidate]:
    """All that two tensors together could be of this shape.

    One of them at least is of a shape of which there are `more` than the anchor has: whoever keeps
    a tensor as two adds one.
    """
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == len(like)}
    plain = math.prod(like[2:]) == 1
    found = []
    for name, a in matrices.items():
        for other, b in matrices.items():
            if name == other or not a[2:] == b[2:] == like[2:] or not {a, b} & set(more):
                continue
            fits = {
                "rows": a[1] == b[1] == like[1] and a[0] + b[0] == like[0],
                "columns": a[0] == b[0] == like[0] and a[1] + b[1] == like[1],
                "sum": a == b == like and name < other,
                "product": plain and (a[0], b[1]) == like[:2] and a[1] == b[0],
            }
            found += [Candidate(name, joined=w, other=other) for w, fit in fits.items() if fit]
    return sorted(found, key=lambda each: list(JOINED).index(each.joined))


def named(aligner: Aligner, suspect: Mapping[str, Array]) -> Naming:
    """Find the anchor's tensors among a suspect's."""
    return _Search(aligner, suspect).run()


@final
class _Search:
    def __init__(self, aligner: Aligner, suspect: Mapping[str, Array]) -> None:
        self.to, self.found = aligner, Naming()
        self.suspect = {n: t for n, t in suspect.items() if is_floating(t) and t.size}
        shapes = {name: tuple(tensor.shape) for name, tensor in self.suspect.items()}
        whole = {
            (spot.tensor, spot.dimension)
            for unit in aligner.units
            if unit.kind == "permute" and unit.groups in {1, unit.size}
            for spot in unit.spots
            if aligner.reference[spot.tensor].shape[spot.dimension] == unit.size
        }
        self.wanted = {
            name: candidates_of(
                shapes, theirs.shape, [(name, n) in whole for n in range(theirs.ndim)]
            )
            for name, theirs in aligner.reference.items()
            if theirs.ndim > 1 and name in aligner.on
        }
        self.vectors: dict[int, list[str]] = {}
        for name, shape in shapes.items():
            if len(shape) == 1:
                self.vectors.setdefault(shape[0], []).append(name)
        self.work: Work = aligner.begun({}, loose_in(aligner))
        self.products = 0
        self.others: dict[str, int] = {}
        self.waiting = {name for name, several in self.wanted.items() if several}

    def run(self) -> Naming:
        self._name_all()
        missing = self.to.marked & self.wanted.keys() - self.found.taken.keys()
        for name in sorted(missing) if self.found.taken else ():
            self._take_three(name)
        missing = missing - self.found.taken.keys()
        if missing and self.found.taken and self._add_joined():
            self._name_all()
        for name in sorted(self.to.marked & self.found.taken.keys()):
            if self.found.fits[name] < CLEAR and not self.found.taken[name].joined:
                self._with_branch(name)
        return self.found

    def _with_branch(self, name: str) -> None:
        """Add to a layer that fits by half what may be its other half: another tensor beside it."""
        own, taken = self.found.taken[name], {n for c in self.found.taken.values() for n in c.names}
        shape = self.suspect[own.name].shape
        whole = own == Candidate(own.name) and shape == self.to.reference[name].shape
        free = {n: each for n, each in self.suspect.items() if n not in taken}
        others = [n for n, each in free.items() if whole and each.shape == shape]
        gain = self.found.gains.get(self.to.axes.reads.get(name, (0, None))[1] or "", "")
        fit = self.found.fits[name]
        for other in others:
            both = Candidate(own.name, joined="sum", other=other)
            reached = self._fit(name, both, [], [gain])[0]
            if 1 - reached < BRANCH * (1 - fit):
                self.found.taken[name], fit = both, reached
        self.found.fits[name] = fit
        self.found.choices[name] *= 1 + len(others)

    def _take_three(self, name: str) -> None:
        """Take for a fused projection those three tensors that fit its parts best, if they do."""
        left, sections = self._open(name), self._sections(name)
        taken = {each for found in self.found.taken.values() for each in found.names}
        theirs = self.to.reference[name]
        if not left or len(sections) != 3:
            return
        along, shapes = sections[0].dimension, list[tuple[int, ...]]()
        for spot in sections:
            shapes.append(tuple(spot.positions.size if n == along else s
                                for n, s in enumerate(theirs.shape)))  # fmt: skip
        free = [n for n, t in self.suspect.items() if n not in taken and t.shape in shapes]
        gains = self._gains(name)
        scores = np.zeros((3, len(free)))
        for row, (spot, shape) in enumerate(zip(sections, shapes, strict=True)):
            for column, each in enumerate(free):
                if self.suspect[each].shape == shape:
                    scores[row, column] = self._section_fit(name, spot, each, gains)
        order = assigned(scores) if len(free) >= 3 else np.full(3, -1)
        if (order < 0).any() or not scores[np.arange(3), order].all():
            return
        one, two, three = (free[column] for column in order)
        how = "rows" if along == 0 else "columns"
        chosen = Candidate(one, joined=how, other=two, third=three)
        self.others[name] = len(free) ** 3
        fit, gain = self._fit(name, chosen, left, gains)
        if self._is_clear(name, [chosen], np.array([fit]), 0, {name: left}):
            self._add(name, chosen, fit, gain)

    def _sections(self, name: str) -> list[Spot]:
        """Where queries, keys and values lie in one tensor, one behind the other; else nothing."""
        axes = self.to.axes
        spots = [
            spot
            for axis in axes.axes
            if "batched" in axis.traits
            for spot in spots_of(axes, axis)
            if spot.tensor == name
        ]
        spots = sorted(spots, key=lambda spot: int(spot.positions.min()))
        at = 0
        for spot in spots:
            if not np.array_equal(
                np.sort(spot.positions, axis=None), at + np.arange(spot.positions.size)
            ):
                return []
            at += spot.positions.size
        return spots

    def _section_fit(self, name: str, spot: Spot, other: str, gains: Sequence[str]) -> float:
        """How well a tensor fits one part of a fused one, with the norm's weight that fits best."""
        tensor = np.zeros(self.to.reference[name].shape)
        moved, rows = (
            np.moveaxis(each, spot.dimension, 0)
            for each in (tensor, np.asarray(self.suspect[other], np.float64))
        )
        moved[np.sort(spot.positions, axis=None)] = rows
        best = 0.0
        for gain in gains:
            self.found.tried += 1
            self.products += tensor.size * _ROWS
            placed = self._placed(name, tensor, gain)
            if placed is not None:
                theirs = self.to.reference[name]
                best = max(best, _overlap(_blocks(spot, placed), _blocks(spot, theirs)))
        return best

    def _add_joined(self) -> bool:
        """What two tensors make is looked at where none by itself fits; whether there is any."""
        taken = {name for each in self.found.taken.values() for name in each.names}
        every = {n: tuple(t.shape) for n, t in self.suspect.items()}
        shapes = {n: shape for n, shape in every.items() if n not in taken}
        there = Counter(every.values())
        there.subtract(tuple(each.shape) for each in self.to.reference.values())
        more = {shape for shape, count in there.items() if count > 0}
        added = False
        for name in self.wanted.keys() - self.found.taken.keys():
            several = joined_of(shapes, self.to.reference[name].shape, more)
            self.others[name] = max(0, len(several) - _MOST_JOINED)  # are paid for all the same
            self.wanted[name] += several[:_MOST_JOINED]
            added |= bool(several)
        self.waiting = {n for n in self.wanted if self.wanted[n] and n not in self.found.taken}
        return added

    def _name_all(self) -> None:
        for _ in range(2 * len(self.wanted) + 1):
            ready = {n: unit for n in sorted(self.waiting) if (unit := self._open(n)) is not None}
            if not ready or self.products > MOST_PRODUCTS:
                break
            taken = any(self._take(part) for part in self._telling_first(ready))
            if not taken and not self._settle() and not self._settle(unmixed=True):
                break

    def _telling_first(self, ready: Mapping[str, list[int]]) -> Iterator[dict[str, list[int]]]:
        """Tensors by how many numbers a row has: a kernel of one channel says little."""
        said = {}
        for name, left in ready.items():
            rows = max((self.to.axes.axes[number].size for number in left), default=1)
            said[name] = min(_TELLING, self.to.reference[name].size // rows)
        for size in sorted(set(said.values()), reverse=True):
            yield {name: ready[name] for name in ready if said[name] == size}

    def _norms_of(self, name: str, size: int) -> Iterator[Matrix]:
        """What a batch norm made of two of the suspect's vectors multiplies by; first, none."""
        yield np.ones(size)
        norm = self.to.axes.batch_norms.get(name)
        names = self.vectors.get(size, [])
        if norm is None or len(names) > _MOST_VECTORS:
            return
        vectors = [np.asarray(self.suspect[each], np.float64) for each in names]
        for variance in vectors:
            scale = 1 / np.sqrt(np.abs(variance) + max(norm.epsilon, 1e-12))
            if np.isfinite(scale).all():
                yield from (scale * weight for weight in vectors if weight is not variance)

    def _open(self, name: str) -> list[int] | None:
        """Numbers of the axes of a tensor that are not in place, if they are of one unit.

        Or of two, of which one is a bottleneck that is written by a layer that is known.
        """
        left = self.to.on[name] - self.work.settled
        if not left or all(self.to.axes.axes[number].kind == "inner" for number in left):
            return sorted(left)
        one = any(left <= set(u.numbers) for u in self.to.units)
        return sorted(left) if one or self._bottleneck(name, left) is not None else None

    def _bottleneck(self, name: str, left: Collection[int]) -> tuple[Spot, Spot] | None:
        """Where a tensor reads a bottleneck that may be mixed, and a layer's that writes it.

        Of that layer all is known but the norm behind it; of the tensor perhaps no order of rows.
        """
        units = [unit for unit in self.to.units if set(unit.numbers) & set(left)]
        mixed = next((unit for unit in units if unit.kind == "invertible"), None)
        if len(units) > 2 or mixed is None or name not in self.work.loose:
            return None
        if not set(left) <= {number for unit in units for number in unit.numbers}:
            return None
        usable = self.to.usable(mixed, self.work)
        writers = [s for s in usable if not s.reads and s.tensor in self.work.loose]
        reader = next((s for s in mixed.spots if s.tensor == name and s.reads), None)
        return None if reader is None or not writers else (reader, writers[0])

    def _take(self, ready: Mapping[str, list[int]]) -> bool:
        """Take what fits, of tensors of one shape together; whether anything did."""
        groups: dict[tuple[Candidate, ...], list[str]] = {}
        for name in ready:
            groups.setdefault(tuple(self.wanted[name]), []).append(name)
        any_taken = False
        for several, names in groups.items():
            taken = {each for found in self.found.taken.values() for each in self._parts_of(found)}
            free = [c for c in several if not taken & set(self._parts_of(c))]
            if not free:
                self.waiting -= set(names)
                continue
            table, gain = self._table(names, free, ready)
            order = assigned(table)
            for row, column in enumerate(order):
                name = names[row]
                if column >= 0 and self._is_clear(name, free, table[row], int(column), ready):
                    self._add(name, free[column], float(table[row, column]), gain[row, column])
                    any_taken = True
        if any_taken:
            self._settle()
        return any_taken

    def _parts_of(self, candidate: Candidate) -> list[tuple[str, tuple[int, int]]]:
        return [(name, candidate.part) for name in candidate.names]

    def _table(
        self, names: Sequence[str], free: Sequence[Candidate], ready: Mapping[str, list[int]]
    ) -> tuple[Matrix, NDArray[np.int64]]:
        """How well each candidate fits each tensor, and with which norm's weight."""
        table, gain = np.zeros((len(names), len(free))), np.full((len(names), len(free)), -1)
        for row, name in enumerate(names):
            gains = self._gains(name)
            for count in (1, None):  # norms' weights are tried where none fits without
                for column, each in enumerate(free):
                    found = self._fit(name, each, ready[name], gains[:count])
                    table[row, column], gain[row, column] = found
                if table[row].max() > CLEAR or len(gains) == 1:
                    break
        return table, gain

    def _is_clear(
        self,
        name: str,
        free: Sequence[Candidate],
        fits: Matrix,
        column: int,
        ready: Mapping[str, list[int]],
    ) -> bool:
        """Whether a fit is far above what a tensor of the same numbers in no order gives."""
        fit = float(fits[column])
        if len(free) == 1 and self._is_square(name, ready[name]):
            return True  # the only one of its shape; what reads it says whether it was
        gains = self._gains(name)
        stranger = self._fit(name, free[column], ready[name], gains, mixed=True)[0]
        enough = FITS_MARKED if name in self.to.marked else FITS
        return fit - stranger >= enough * (1 - stranger)

    def _is_square(self, name: str, left: Collection[int]) -> bool:
        """Whether a layer writes a bottleneck that may be mixed, in no fewer rows than columns."""
        if name not in self.work.loose or len(left) != 1:
            return False
        unit = next((u for u in self.to.units if set(left) <= set(u.numbers)), None)
        if unit is None or unit.kind != "invertible":
            return False
        rows = [
            s.rows(self.to.reference[name]) for s in unit.spots if s.tensor == name and not s.reads
        ]
        return any(len(each) >= each.shape[1] for each in rows)

    def _gains(self, name: str) -> list[str]:
        """Norms' weights that may be in front of a reader; "" for none."""
        before = self.to.axes.reads.get(name, (0, None))[1]
        if before is None or before not in self.to.axes.norms:
            return [""]
        if before in self.found.gains:
            return [self.found.gains[before]]
        return ["", *self.vectors.get(self.to.reference[before].size, [])]

    def _fit(
        self,
        name: str,
        candidate: Candidate,
        left: list[int],
        gains: Sequence[str],
        *,
        mixed: bool = False,
    ) -> tuple[float, int]:
        """How well a tensor fits, with the norm's weight that fits best, and which that is."""
        tensor = shown(self.suspect, candidate, self.to.reference[name])
        if mixed:
            rng = np.random.default_rng(0)
            tensor = rng.permutation(tensor.ravel()).reshape(tensor.shape)
        best = (0.0, -1)
        for number, gain in enumerate(gains):
            self.found.tried += 1
            self.products += tensor.size * _ROWS
            placed = self._placed(name, tensor, gain)
            fit = 0.0 if placed is None else self._alone(name, placed, left)
            best = max(best, (fit, number))
        return best

    def _placed(self, name: str, tensor: Matrix, gain: str) -> Matrix | None:
        found = self._joined(name, tensor, gain)
        return None if found is None else self._in_own_scale(name, found)[0]

    def _joined(self, name: str, tensor: Matrix, gain: str) -> Matrix | None:
        before = self.to.axes.reads.get(name, (0, None))[1]
        vectors = {}
        if before is not None and before in self.to.axes.norms:
            shape = self.to.reference[before].shape
            vectors[before] = (
                np.asarray(self.suspect[gain], np.float64).reshape(shape)
                if gain
                else np.ones(shape) - self.to.axes.norms[before].added
            )
        try:
            whole = canonical(self.to.axes, {name: tensor, **vectors})[name]
            found = self.to.joined(name, whole, self.work)
        except (ValueError, IndexError):
            return None
        return found if np.isfinite(found).all() else None

    def _in_own_scale(self, name: str, placed: Matrix) -> tuple[Matrix, Matrix | None]:
        """A layer that writes a bottleneck whose mixture is known, in its norm's scale; and that.

        Its rows were mixed back as they are, and the norm is in between.
        """
        writes = [
            (unit.last, spot)
            for unit in self.to.units
            for spot in unit.spots
            if unit.last in self.work.mixed and spot.tensor == name and not spot.reads
        ]
        theirs = self.to.reference[name]
        settled = self.to.on[name] <= self.work.settled and placed.shape == theirs.shape
        if not writes or name not in self.work.loose or not settled:
            return placed, None
        number, spot = writes[0]
        back = self.work.mixed[number]
        rows = np.asarray(np.linalg.solve(back, spot.rows(placed)), np.float64)
        scale = own_scales(back, rows, spot.rows(theirs))
        return spot.with_rows(placed, back @ (scale[:, None] * rows)), scale

    def _alone(self, name: str, mine: Matrix, left: list[int]) -> float:
        """The mean cosine once the axes that are left are solved by this tensor alone."""
        theirs = self.to.reference[name]
        loose = name in self.work.loose
        if not left:
            return _by_rows(mine, theirs, loose=loose) if mine.shape == theirs.shape else 0.0
        if all(self.to.axes.axes[number].kind == "inner" for number in left):
            return self._by_heads(name, mine, theirs, left)
        if (between := self._bottleneck(name, left)) is not None:
            return self._through(between, mine)[1] if mine.shape == theirs.shape else 0.0
        unit = next(u for u in self.to.units if set(left) <= set(u.numbers))
        spot = next(each for each in unit.spots if each.tensor == name)
        if unit.kind == "permute":
            either = loose or unit.either_sign or unit.normed
            return _matched(spot, mine, theirs, signed=not either)
        return _turned(unit, spot, mine, theirs) if mine.shape == theirs.shape else 0.0

    def _through(self, between: tuple[Spot, Spot], mine: Matrix) -> tuple[Matrix, float]:
        """What a bottleneck's writer is multiplied by in its norm, and how well its reader fits."""
        reader, writer = between
        rows = writer.rows(self.work.weights[writer.tensor])
        known = writer.rows(self.to.reference[writer.tensor])
        mixed = rows @ np.linalg.pinv(known, rcond=1e-9)
        there = reader.rows(self.to.reference[reader.tensor])
        wanted = np.asarray(np.linalg.lstsq(mixed.T, there, rcond=1e-9)[0], np.float64)
        return column_scales(reader.rows(mine).T, wanted.T)

    def _by_heads(self, name: str, mine: Matrix, theirs: Matrix, left: list[int]) -> float:
        """How much the spaces have in common that the rows of matched heads span."""
        if mine.shape != theirs.shape:
            return 0.0
        axes = [self.to.axes.axes[number] for number in left]
        batched = [axis for axis in axes if "batched" in axis.traits] or axes
        outer = max(batched, key=lambda axis: len(axis.places))
        fits = []
        for spot in spots_of(self.to.axes, outer):
            if spot.tensor == name:
                fits.append(_overlap(_blocks(spot, mine), _blocks(spot, theirs)))
        return float(np.mean(fits)) if fits else 0.0

    def _add(self, name: str, candidate: Candidate, fit: float, gain: int) -> None:
        names = self._gains(name)
        before = self.to.axes.reads.get(name, (0, None))[1]
        chosen = names[gain] if 0 <= gain < len(names) else ""
        choices = len(self.wanted[name]) + self.others.get(name, 0)
        self.found.choices[name] = choices * len(names)
        if before is not None and before in self.to.axes.norms:
            self.found.gains.setdefault(before, chosen)
        self.found.taken[name], self.found.fits[name] = candidate, fit
        between = self._bottleneck(name, self.to.on[name] - self.work.settled)
        placed = self._joined(name, shown(self.suspect, candidate, self.to.reference[name]), chosen)
        if placed is None:
            self.waiting.discard(name)
            return
        if between is not None:
            self._set_scale(between[1].tensor, self._through(between, placed)[0])
        placed, scale = self._in_own_scale(name, placed)
        self.work.weights[name] = placed
        if scale is not None:
            self.found.scales[name] = scale
            self.work.loose -= {name}
        self.waiting.discard(name)

    def _set_scale(self, writer: str, scale: Matrix) -> None:
        """From now on what the norm behind a layer multiplies by is known.

        That is what two of the suspect's vectors make, if they make nearly the same.
        """
        found = max(self._norms_of(writer, len(scale)), key=lambda each: abs(_cosine(each, scale)))
        if abs(_cosine(found, scale)) > SAME_NORM:
            scale = found
        self.work.weights[writer] = _by_row(self.work.weights[writer], scale)
        self.work.loose -= {writer}
        self.found.scales[writer] = scale

    def _settle(self, *, unmixed: bool = False) -> bool:
        """Bring into place one after the other what can be told by now; whether anything was.

        Bottlenecks of which no norm is known wait for a reader; `unmixed` takes them as they are.
        """
        settled = False
        while True:
            units = [
                (len(spots), unit)
                for unit in self.to.units
                if not set(unit.numbers) <= self.work.settled
                and (spots := self.to.usable(unit, self.work))
                and (unmixed or not self._waits(unit, spots))
            ]
            if not units:
                return settled
            self.to.solve(max(units, key=lambda pair: pair[0])[1], self.work)
            settled = True

    def _waits(self, unit: Unit, spots: Sequence[Spot]) -> bool:
        return unit.kind == "invertible" and all(s.tensor in self.work.loose for s in spots)


def loose_in(aligner: Aligner) -> frozenset[str]:
    """Layers in front of a norm or a factor, whose rows are of any sign if that is not known."""
    return frozenset(aligner.axes.batch_norms) | frozenset(aligner.axes.gains)


def _matched(spot: Spot, mine: Matrix, theirs: Matrix, *, signed: bool) -> float:
    """The mean cosine of some rows to the best that there is for each."""
    length = mine.shape[spot.dimension]
    longer = length != theirs.shape[spot.dimension]
    rows = np.moveaxis(mine, spot.dimension, 0).reshape(length, -1) if longer else spot.rows(mine)
    wanted = spot.rows(theirs)
    some = np.linspace(0, len(wanted) - 1, min(len(wanted), _ROWS)).astype(int)
    if rows.shape[1] != wanted.shape[1]:
        return 0.0
    cosines = _unit(wanted[some]) @ _unit(rows).T
    return float((cosines if signed else np.abs(cosines)).max(1).mean())


def _turned(unit: Unit, spot: Spot, mine: Matrix, theirs: Matrix) -> float:
    """The cosine once rows are rotated, or what their spaces have in common."""
    rows, wanted = spot.rows(mine), spot.rows(theirs)
    if unit.kind != "orthogonal":
        return _overlap(rows[None], wanted[None])
    u, _, v = np.linalg.svd(wanted @ rows.T)
    return _cosine(u @ v @ rows, wanted)


def _by_rows(mine: Matrix, theirs: Matrix, *, loose: bool) -> float:
    a, b = (each.reshape(len(each), -1) for each in (mine, theirs))
    cosines = (_unit(a) * _unit(b)).sum(1)
    return float((np.abs(cosines) if loose else cosines).mean())


def _by_row(tensor: Matrix, scale: Matrix) -> Matrix:
    return np.asarray(scale.reshape(-1, *[1] * (tensor.ndim - 1)) * tensor, np.float64)


def _cosine(mine: Matrix, theirs: Matrix) -> float:
    length = np.linalg.norm(mine) * np.linalg.norm(theirs)
    return float((mine * theirs).sum() / max(length, _TINY))


def _blocks(spot: Spot, tensor: Matrix) -> Matrix:
    moved = np.moveaxis(tensor, spot.dimension, 0)
    heads, inside = spot.positions.shape
    return moved[spot.positions.reshape(-1)].reshape(heads, inside, -1)


def _overlap(mine: Matrix, theirs: Matrix) -> float:
    """Of blocks of rows (blocks rows numbers), what spaces of the best matched have in common."""
    if min(mine.shape[1], theirs.shape[1]) >= mine.shape[2]:
        return 0.0  # every such space is all there is
    bases = [np.linalg.qr(each.swapaxes(1, 2))[0] for each in (mine, theirs)]
    common = np.einsum("anj,bnk->abjk", *bases, optimize=True)
    shared = np.square(common).sum((2, 3)) / mine.shape[1]
    order = assigned(shared)
    return float(shared[np.arange(len(order)), order].mean())


def _unit(rows: Matrix) -> Matrix:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), _TINY)
