"""V on a suspect aligned to the owner's network by its layers: known by their names, or by shape.

For networks whose channels are known (`alignment.channels`), where no claim commits to a table of
axes. Nothing runs here.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from nnpassport.alignment.anchored import verify_anchored
from nnpassport.alignment.axes import Axes
from nnpassport.alignment.byaxes import anchor_of
from nnpassport.alignment.channels import Network
from nnpassport.alignment.layered import table_of
from nnpassport.alignment.names import Forms
from nnpassport.alignment.null import (
    AlignedVerdict,
    ShapedVerdict,
    Unrelated,
    aligned_verdict,
    anchored_by_shape,
    anchored_verdict,
    of_its_own,
    seeded,
    verdict_by_shape,
)
from nnpassport.alignment.rate import Read
from nnpassport.claims.claim import Claim
from nnpassport.claims.facts import check_config
from nnpassport.claims.standing import Standing
from nnpassport.files.arrays import Array, arrays_digest
from nnpassport.files.weights import Arrays, digest_of, within
from nnpassport.keys.chance import LOG10_BY_NAME, LOG10_BY_SHAPE, TENSORS
from nnpassport.keys.key import Key
from nnpassport.scheme import OtherAnchorError, UnsuitableModelError, Verdict
from nnpassport.verification import candidates
from nnpassport.verification.anchor import ANCHOR, require_alignable, require_anchor


def verify_by_layers(
    read: Read,
    weights: Mapping[str, Array],
    key: Key,
    reference: Network,
    forms: Callable[[], Forms],
    unrelated: Unrelated | None = None,
) -> AlignedVerdict:
    """V on the suspect aligned by the names of its layers, or else by their shapes.

    To the key's anchor exactly; to a released network blind to `forms`, which the key reads,
    beside a null. Without `unrelated` networks these are mixtures of the suspect's own filters.

    Raises:
        UnsuitableModelError: the two cannot be aligned, or this is not the key's anchor.
    """

    def along_axes() -> Verdict:
        table, told = table_of(reference), "its layers show"
        return over_axes(read, weights, key, reference.arrays, table, told)

    anchored = key.context.anchor is not None
    try:
        found = _by_layers(_ways(read, weights, key, reference, forms, unrelated), weights)
    except OtherAnchorError:
        raise
    except UnsuitableModelError:
        if not anchored:
            raise
        # A block that was left out: what is there has no choice of layers that fits together.
        return AlignedVerdict(along_axes(), None)
    if anchored and not found.verdict.marked:
        # What its layers alone do not show: kernels that are turned, blocks that were put in.
        with suppress(UnsuitableModelError):
            reason = "aligned over axes, after its layers alone did not show the mark"
            again = along_axes().paid(LOG10_BY_SHAPE, reason, of=TENSORS)
            return AlignedVerdict(again, None) if again.marked else found
    return found


def over_axes(
    read: Read,
    weights: Mapping[str, Array],
    key: Key,
    anchor: Mapping[str, Array],
    axes: Axes,
    origin: str,
) -> Verdict:
    """V on the suspect aligned over the axes of the key's anchor; `origin` says who shows them.

    Raises:
        UnsuitableModelError: nothing of the suspect can be aligned.
    """
    own = {name: anchor[name] for name in _scales_of(key) if name in anchor}

    def with_own_scales(found: Mapping[str, Array]) -> Verdict:
        return read({**own, **found})

    verdict = verify_anchored(with_own_scales, weights, anchor_of(axes, anchor, key))
    return verdict.remarked(f"over {len(axes.axes)} axes that {origin}")


def _by_layers(ways: "_Ways", weights: Mapping[str, Array]) -> AlignedVerdict:
    named, refused = None, None
    try:
        named = ways.by_name()
    except UnsuitableModelError as error:
        refused = error
    else:
        reason = "aligned by the tensors' names"
        paid = named.verdict.paid(LOG10_BY_NAME, reason, of=TENSORS)
        named = named._replace(verdict=paid)
        if named.verdict.marked:
            return named
    try:
        shaped = ways.by_shape()
    except UnsuitableModelError as error:
        if named is not None:
            return named
        raise UnsuitableModelError(f"{refused}; by shape: {error}") from None
    paid = _shaped(shaped, weights)
    return AlignedVerdict(paid, None) if named is None or paid.marked else named


def _scales_of(key: Key) -> set[str]:
    """Names of the norms' scales that bits are read together with."""
    forms = (layer.channels for layer in key.context.layers)
    return {f"{form.norm}.weight" for form in forms if form is not None}


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
    verdict: Verdict,
    key: Key,
    suspect: Mapping[str, str],
    owners: Mapping[str, str],
    unrelated: Mapping[str, Arrays],
    under: Standing | Claim | None,
) -> Verdict:
    """The verdict, which names the files that it rests on, and what of it is somebody's word.

    `suspect` and `owners` are digests, the latter of the network that was aligned to; `under` is
    the claim that says how old that is, if there is one.
    """
    anchored = key.context.anchor is not None
    digests = {**suspect, **within(ANCHOR if anchored else "reference", owners)}
    for name, each in unrelated.items():
        digests |= within(name, each.digests)
    if under is None and not anchored:
        verdict = verdict.remarked(
            "that the network it was aligned to is older than the suspect is your word"
        )
    return replace(verdict, digests=digests)


class _Ways(NamedTuple):
    """How a suspect is aligned: its tensors known by their names, or by their shapes."""

    by_name: Callable[[], AlignedVerdict]
    by_shape: Callable[[], ShapedVerdict]


def _ways(
    read: Read,
    weights: Mapping[str, Array],
    key: Key,
    reference: Network,
    forms: Callable[[], Forms],
    unrelated: Unrelated | None,
) -> _Ways:
    """To the key's anchor, exactly; to a released network blind, beside a null.

    Raises:
        UnsuitableModelError: the key has passports of channels and this is not its anchor.
    """
    if key.context.anchor is None:
        require_alignable(key)
        blind, null = forms(), unrelated or of_its_own(weights, reference)
        return _Ways(
            lambda: aligned_verdict(read, weights, reference, blind, null),
            lambda: verdict_by_shape(read, weights, reference, blind, unrelated, seeded(weights)),
        )
    require_anchor(arrays_digest(reference.arrays), key)
    scales = _scales_of(key)
    own = {name: array for name, array in reference.arrays.items() if name in scales}

    def with_own_scales(found: Mapping[str, Array]) -> Verdict:
        # Filters have the anchor's signs there, so its own scales are what they are read with.
        return read({**own, **found})

    def stranger() -> Mapping[str, Array]:
        return next(iter(of_its_own(weights, reference).networks))

    return _Ways(
        lambda: anchored_verdict(read, weights, reference, stranger()),
        lambda: anchored_by_shape(with_own_scales, weights, reference, seeded(weights)),
    )


def _shaped(found: ShapedVerdict, weights: Mapping[str, Array]) -> Verdict:
    """The verdict by shape, once every choice of tensors is paid for."""
    reason = f"aligned by the tensors' shapes, of 10^{found.log10_choices:.1f} choices"
    log10_choices = LOG10_BY_SHAPE + found.log10_choices
    paid = found.verdict.paid(log10_choices, reason, of=TENSORS)
    facts = candidates.by_shape(found.taken, weights, found.log10_choices)
    return replace(paid, candidates=facts)
