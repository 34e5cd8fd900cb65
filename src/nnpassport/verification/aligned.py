"""V on a suspect aligned to the owner's network by its layers: known by their names, or by shape.

For networks whose channels are known (`alignment.channels`), where no claim commits to a table of
axes. Nothing runs here.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from nnpassport.alignment.anchored import verify_anchored
from nnpassport.alignment.axes import Axes
from nnpassport.alignment.byaxes import anchor_of
from nnpassport.alignment.channels import Network
from nnpassport.alignment.layered import table_of
from nnpassport.alignment.names import Forms
from nnpassport.alignment.null import (
    AlignedCounts,
    ShapedCounts,
    Unrelated,
    aligned_by_name,
    aligned_by_shape,
    anchored_by_name,
    anchored_by_shape,
    of_its_own,
    seeded,
)
from nnpassport.claims.claim import Claim
from nnpassport.claims.facts import check_config
from nnpassport.claims.standing import Standing
from nnpassport.files.arrays import Array, arrays_digest
from nnpassport.files.weights import Arrays, digest_of, within
from nnpassport.keys.chance import LOG10_BY_NAME, LOG10_BY_SHAPE, TENSORS
from nnpassport.keys.counts import Counts, Reading
from nnpassport.keys.key import Key
from nnpassport.scheme import OtherAnchorError, UnsuitableModelError
from nnpassport.verification import candidates
from nnpassport.verification.anchor import ANCHOR, require_alignable, require_anchor


def read_by_layers(
    read: Reading,
    weights: Mapping[str, Array],
    reference: Network,
    forms: Callable[[], Forms],
    unrelated: Unrelated | None = None,
) -> AlignedCounts:
    """What the key reads of the suspect, aligned by its layers' names or else by their shapes.

    To the key's anchor exactly; to a released network blind to `forms`, which the key reads,
    beside a null. Without `unrelated` networks these are mixtures of the suspect's own filters.

    Raises:
        UnsuitableModelError: the two cannot be aligned, or this is not the key's anchor.
    """

    def along_axes() -> Counts:
        table, told = table_of(reference), "its layers show"
        return over_axes(read, weights, reference.arrays, table, told)

    anchored = read.key.context.anchor is not None
    try:
        ways = _ways(read, weights, reference, forms, unrelated)
        found = _by_layers(read, ways, weights)
    except OtherAnchorError:
        raise
    except UnsuitableModelError:
        if not anchored:
            raise
        # A block that was left out: what is there has no choice of layers that fits together.
        return AlignedCounts(along_axes(), None)
    if anchored and not read.marked(found.counts):
        # What its layers alone do not show: kernels that are turned, blocks that were put in.
        with suppress(UnsuitableModelError):
            reason = "aligned over axes, after its layers alone did not show the mark"
            again = along_axes().paid(LOG10_BY_SHAPE, reason, of=TENSORS)
            return AlignedCounts(again, None) if read.marked(again) else found
    return found


def over_axes(
    read: Reading,
    weights: Mapping[str, Array],
    anchor: Mapping[str, Array],
    axes: Axes,
    origin: str,
) -> Counts:
    """What the key reads over the axes of its anchor; `origin` says who shows them.

    Raises:
        UnsuitableModelError: nothing of the suspect can be aligned.
    """
    with_scales = _with_own_scales(read, anchor)
    found = verify_anchored(with_scales, weights, anchor_of(axes, anchor, read.key))
    return found.remarked(f"over {len(axes.axes)} axes that {origin}")


def _by_layers(read: Reading, ways: "_Ways", weights: Mapping[str, Array]) -> AlignedCounts:
    named, refused = None, None
    try:
        named = ways.by_name()
    except UnsuitableModelError as error:
        refused = error
    else:
        reason = "aligned by the tensors' names"
        named = named._replace(counts=named.counts.paid(LOG10_BY_NAME, reason, of=TENSORS))
        if read.marked(named.counts):
            return named
    try:
        shaped = ways.by_shape()
    except UnsuitableModelError as error:
        if named is not None:
            return named
        raise UnsuitableModelError(f"{refused}; by shape: {error}") from None
    paid = _shaped(shaped, weights)
    return AlignedCounts(paid, None) if named is None or read.marked(paid) else named


def _with_own_scales(read: Reading, anchor: Mapping[str, Array]) -> Reading:
    """Of filters alone, which have the anchor's signs: its norms are what they are read with."""
    forms = (layer.channels for layer in read.key.context.layers)
    names = {f"{form.norm}.weight" for form in forms if form is not None}
    own = {name: anchor[name] for name in names if name in anchor}
    return read.through(lambda weights: {**own, **weights})


def given(unrelated: Mapping[str, Arrays]) -> Unrelated | None:
    """These networks, as the null; None where there are none."""
    origin = f"{len(unrelated)} unrelated networks that were given"
    return Unrelated([each.arrays for each in unrelated.values()], origin) if unrelated else None


def check_committed(reference: Path, standing: Standing | None) -> None:
    """Under a claim, only the network that it commits to may be aligned to.

    Raises:
        UnsuitableModelError: it is another.
    """
    claim = None if standing is None else standing.claim
    if claim is None:
        return
    if claim.reference != digest_of(reference):
        raise UnsuitableModelError(
            "the network to align to is not the one that the claim commits to; needed: the folder "
            "that `claim new --reference` was given, or no claim"
        )
    check_config(reference, claim.network)


def with_files(
    counts: Counts,
    key: Key,
    suspect: Mapping[str, str],
    owners: Mapping[str, str],
    unrelated: Mapping[str, Arrays],
    under: Standing | Claim | None,
) -> Counts:
    """The counts, which name the files that they rest on, and what of them is somebody's word.

    `suspect` and `owners` are digests, the latter of the network that was aligned to; `under` is
    the claim that says how old that is, if there is one.
    """
    anchored = key.context.anchor is not None
    digests = {**suspect, **within(ANCHOR if anchored else "reference", owners)}
    for name, each in unrelated.items():
        digests |= within(name, each.digests)
    if under is None and not anchored:
        counts = counts.remarked(
            "that the network it was aligned to is older than the suspect is your word"
        )
    return counts._replace(digests=digests)


class _Ways(NamedTuple):
    """How a suspect is aligned: its tensors known by their names, or by their shapes."""

    by_name: Callable[[], AlignedCounts]
    by_shape: Callable[[], ShapedCounts]


def _ways(
    read: Reading,
    weights: Mapping[str, Array],
    reference: Network,
    forms: Callable[[], Forms],
    unrelated: Unrelated | None,
) -> _Ways:
    """To the key's anchor, exactly; to a released network blind, beside a null.

    Raises:
        UnsuitableModelError: the key has passports of channels and this is not its anchor.
    """
    if read.key.context.anchor is None:
        require_alignable(read.key)
        blind, null = forms(), unrelated or of_its_own(weights, reference)
        return _Ways(
            lambda: aligned_by_name(read, weights, reference, blind, null),
            lambda: aligned_by_shape(read, weights, reference, blind, unrelated, seeded(weights)),
        )
    require_anchor(arrays_digest(reference.arrays), read.key)
    with_scales = _with_own_scales(read, reference.arrays)

    def stranger() -> Mapping[str, Array]:
        return next(iter(of_its_own(weights, reference).networks))

    return _Ways(
        lambda: anchored_by_name(read, weights, reference, stranger()),
        lambda: anchored_by_shape(with_scales, weights, reference, seeded(weights)),
    )


def _shaped(found: ShapedCounts, weights: Mapping[str, Array]) -> Counts:
    """The counts by shape, once every choice of tensors is paid for."""
    reason = f"aligned by the tensors' shapes, of 10^{found.log10_choices:.1f} choices"
    log10_choices = LOG10_BY_SHAPE + found.log10_choices
    paid = found.counts.paid(log10_choices, reason, of=TENSORS)
    facts = candidates.by_shape(found.taken, weights, found.log10_choices)
    return paid._replace(candidates=facts)
