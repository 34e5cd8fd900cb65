"""V and F on files from anybody: what `verify`, `release` and the judge ask of a suspect.

Every function here either gives a verdict or raises, and then nothing was decided.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, final

from nnpassport.alignment.folders import network_in
from nnpassport.alignment.null import AlignedCounts
from nnpassport.catalog import entry_named
from nnpassport.claims.claim import MILLION, Claim
from nnpassport.claims.facts import Facts
from nnpassport.claims.rules import DATED_ONLY
from nnpassport.claims.standing import Standing
from nnpassport.files.arrays import Array
from nnpassport.files.config import ModelConfig
from nnpassport.files.suspect import Suspect
from nnpassport.files.weights import read_arrays, within, without_prefixes
from nnpassport.keys.adapters import added
from nnpassport.keys.chance import LOG10_ALPHA_UNCOMMITTED
from nnpassport.keys.counts import Counts, Reading
from nnpassport.keys.key import Key
from nnpassport.keys.order import tensors_read
from nnpassport.keys.reading import (
    READERS,
    check_host,
    forms_of,
    is_adapter,
    read_product,
)
from nnpassport.scheme import (
    OtherAnchorError,
    UnreadableModelError,
    UnsuitableModelError,
    Verdict,
)
from nnpassport.verification import candidates
from nnpassport.verification.aligned import (
    check_committed,
    given,
    read_by_layers,
    with_files,
)
from nnpassport.verification.aligning import aligned_by_axes, committed_claim
from nnpassport.verification.anchor import anchor_in
from nnpassport.verification.bridge import ANSWERING, MEASURED, running
from nnpassport.verification.folding import folded_layers, refuse_folded

if TYPE_CHECKING:
    from nnpassport.data.images import ImageSet

TOLERANCE = 0.03
"""ε_f where none is declared: the paper's for AlexNet."""

ALIGNING_ERASES = (
    "a key of scheme order is read from the order in which hidden units stand, and alignment puts "
    "them into another; needed: no network to align to; if somebody has permuted the units, the "
    "order is gone, and a passport is what can be read aligned"
)

BASE_DATED_ONLY = (
    "what was added to a base counts only under a claim that is proved older than the suspect: "
    "whoever has the suspect can make a base, and draw a key for it, that read as any bits"
)


@final
@dataclass(frozen=True, slots=True)
class Alignment:
    """What to align a suspect to.

    Attributes:
        reference: the owner's released model folder; for a key that has one, its anchor, or a
            folder that holds it.
        unrelated: models that have nothing to do with it, of the same architecture: the null.
    """

    reference: Path
    unrelated: tuple[Path, ...] = ()


@final
@dataclass(frozen=True, slots=True)
class Options:
    """How to look at a suspect.

    Attributes:
        reference: config of the owner's network, for suspects that bring none of ours.
        trusted_factory: the caller's own "package.module:factory"; see `checkpoint.load_suspect`.
        log10_alpha: threshold on log₁₀ p; None is that of `standing`, or 2⁻¹⁰⁰ without one. Under
            a claim none is laxer than that of `standing`.
        alignment: bring the suspect's channels into the owner's order before they are read.
        base: what a merged adapter was made for; its weights are taken off the suspect's.
        standing: a claim that was checked. The verdict is no better than it.
        every_reading: of answers, look also at those in another order of the classes, and at those
            to images that became numbers as the suspect's own config says; each way is paid for.
    """

    reference: ModelConfig | None = None
    trusted_factory: str | None = None
    log10_alpha: float | None = None
    alignment: Alignment | None = None
    base: Path | None = None
    standing: Standing | None = None
    every_reading: bool = False

    @property
    def threshold(self) -> float:
        """log₁₀ α."""
        if self.standing is None:
            return LOG10_ALPHA_UNCOMMITTED if self.log10_alpha is None else self.log10_alpha
        claimed = self.standing.log10_alpha
        return claimed if self.log10_alpha is None else min(self.log10_alpha, claimed)

    @property
    def facts(self) -> Facts | None:
        """What the claim commits to of the owner's network, where it does."""
        claim = None if self.standing is None else self.standing.claim
        return None if claim is None else claim.network


@final
@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """Images on which F is measured, and the accuracy that is expected.

    Attributes:
        data: labelled images of the network's task.
        target: accuracy in [0, 1] that the owner declared; None is the suspect's own, as it is. If
            the suspect's own is lower, it replaces the declared one: a passport is not at fault for
            what the suspect does without it, such as classes that a thief moved.
        tolerance: ε_f, in [0, 1]; the paper takes 0.03 for AlexNet and 0.2 for ResNet-18.
    """

    data: "ImageSet"
    target: float | None = None
    tolerance: float = TOLERANCE


def verify(
    suspect: Suspect | Path | str,
    key: Key,
    *,
    trial: Trial | None = None,
    options: Options | None = None,
) -> Verdict:
    """Does the network in `suspect`, a folder or file from anybody, carry `key`?

    Bits are read from the weights alone. Those of safetensors are read one layer at a time, so a
    network may be larger than the memory. With a `trial` the network is also built (from its own
    config if that names an architecture of ours, else from the reference) and F is measured: does
    the passport sustain the accuracy? With alignment both are of the aligned network.

    Raises:
        OwnershipError: it could not be checked; which kind says why.
    """
    options = options or Options()
    verdict = _verdict(Suspect.of(suspect), key, trial, options)
    return verdict if options.standing is None else under_claim(verdict, options.standing)


def _verdict(suspect: Suspect, key: Key, trial: Trial | None, options: Options) -> Verdict:
    """V, and F if there is a trial, whether or not a claim holds."""
    found: Verdict
    if key.context.answers is not None and options.alignment is not None and trial is not None:
        found = running(f"{ANSWERING}:on_images", "asking a network")(suspect, key, options, trial)
        measure = running(f"{MEASURED}:with_fidelity", "F")
        measured: Verdict = measure(found, suspect, key, trial, options)
        return measured
    if options.alignment is not None and key.context.order is not None:
        raise UnsuitableModelError(ALIGNING_ERASES)
    if options.alignment is not None and options.base is None:
        try:
            return _aligned(suspect, key, trial, options, options.alignment)
        except OtherAnchorError:
            # What the suspect's bits are as they stand does not depend on that network.
            found = _as_given(suspect, key, trial, replace(options, alignment=None))
            if not found.marked:
                raise
            return found.remarked(
                "read as it stands, as the network given to align to is not the key's anchor"
            )
    return _as_given(suspect, key, trial, options)


def _as_given(suspect: Suspect, key: Key, trial: Trial | None, options: Options) -> Verdict:
    """Without alignment."""
    found: Verdict = _unaligned(suspect, key, options)
    if trial is not None:
        measure = running(f"{MEASURED}:with_fidelity", "F")
        found = measure(found, suspect, key, trial, options)
    return found


def _aligned(
    suspect: Suspect, key: Key, trial: Trial | None, options: Options, alignment: Alignment
) -> Verdict:
    """By the axes that a claim commits to, or by the layers of a network whose channels are known.

    Any other network is one that runs, and its axes are traced.
    """
    claim = committed_claim(key, options.standing)
    layers = by_layers(suspect, key, options) if claim is None else None
    if claim is not None:
        read = reading_of(key, options.threshold)
        found = read.verdict(_over_axes(read, suspect, options, alignment, claim))
    elif layers is not None:
        found = reading_of(key, options.threshold).verdict(layers.counts)
    else:
        purpose = (
            "alignment to a network whose axes no claim commits to (`claim axes`, then `claim new`)"
        )
        run: Verdict = running(f"{MEASURED}:aligned", purpose)(suspect, key, options, trial)
        return run
    if trial is not None:
        measure = running(f"{MEASURED}:with_aligned_fidelity", "F")
        found = measure(found, suspect, key, trial, options, layers)
    return found


def by_layers(suspect: Suspect, key: Key, options: Options) -> AlignedCounts | None:
    """What the key reads, aligned by layers to a network whose channels are known; else None.

    Raises:
        OwnershipError: it could not be checked; which kind says why.
    """
    alignment = options.alignment
    if alignment is None or key.context.scheme not in READERS:
        return None
    anchored, folder = key.context.anchor is not None, alignment.reference
    folder = anchor_in(folder) if anchored else folder
    owners = network_in(folder)
    if owners is None:
        return None
    weights = suspect.arrays.under(weights_of(key))
    if not anchored:
        check_committed(folder, options.standing)
    unrelated = {str(path): read_arrays(path) for path in alignment.unrelated}
    read = reading_of(key, options.threshold)
    found = read_by_layers(
        read, weights.arrays, owners.network, lambda: forms_of(key), given(unrelated)
    )
    counts = without(weights.left_out, found.counts)
    counts = with_files(counts, key, weights.digests, owners.digests, unrelated, options.standing)
    return found._replace(counts=counts)


def _over_axes(
    read: Reading, suspect: Suspect, options: Options, alignment: Alignment, claim: Claim
) -> Counts:
    """What the key reads over the axes that the claim commits to, of arrays alone."""
    weights = suspect.arrays.under(weights_of(read.key))
    unrelated = {str(path): read_arrays(path) for path in alignment.unrelated}
    found = aligned_by_axes(read, weights, alignment.reference, claim, unrelated)
    return without(weights.left_out, found)


def _unaligned(suspect: Suspect, key: Key, options: Options) -> Verdict:
    """By the weights alone if the scheme can: then nothing of the suspect is even built."""
    if options.base is not None:
        return _added(suspect, options.base, key, options)
    if not reads_weights(key):
        found: Verdict = running(f"{MEASURED}:asked", "asking a network")(suspect, key, options)
        return found
    opened, read = _opened(suspect, key), reading_of(key, options.threshold)
    counts = _as_it_stands(opened, read)
    if not read.marked(counts):
        refuse_folded(opened.described, key, read.verdict(counts).reason)
    elif any(layer.channels for layer in key.context.layers) and (
        folded := folded_layers(opened.described, key)
    ):
        counts = counts.remarked(
            f"norms are folded into {len(folded)} of the layers, and were read with them"
        )
    return read.verdict(opened.told(counts))


def declared_trial(
    data: "ImageSet",
    target: float | None = None,
    tolerance: float | None = None,
    standing: Standing | None = None,
) -> Trial:
    """What F is measured against: what is given, else what the claim declares, else the default."""
    claim = None if standing is None else standing.claim
    if claim is not None and claim.fidelity is not None:
        target = claim.fidelity.target_ppm / MILLION if target is None else target
        tolerance = claim.fidelity.tolerance_ppm / MILLION if tolerance is None else tolerance
    return Trial(data, target, TOLERANCE if tolerance is None else tolerance)


def verify_as_published(
    suspect: Suspect | Path | str, key: Key, *, options: Options | None = None
) -> Verdict:
    """The rule of the scheme's own paper on a file from anybody; it knows no p-value."""
    options, entry = options or Options(), entry_named(key.context.scheme)
    if not reads_weights(key) or options.base is not None or options.alignment is not None:
        verdict = _verdict(Suspect.of(suspect), key, None, options)
    else:  # a rule without p-value cannot pay for a choice of tensors: by the names alone
        opened = _opened(Suspect.of(suspect), key)
        if not _in_pairs(key):
            _check_names(opened.described, key)
        read = reading_of(key, options.threshold)
        counts = read(opened.weights)
        verdict = read.verdict(opened.told(counts))
        if not entry.scheme.verify_as_published(verdict).marked:
            refuse_folded(opened.described, key, read.verdict(counts).reason)
    return entry.scheme.verify_as_published(verdict)


def under_claim(verdict: Verdict, standing: Standing) -> Verdict:
    """The verdict, and whether the claim that it rests on holds; if not, nothing is marked.

    Nor is it after alignment, unless the claim, and with it the reference, is older than the
    suspect: whoever has the suspect can turn a copy of it until it reads as any bits, and call that
    copy his reference. With an anchor he cannot: it is in the key's context, and turning it draws
    every bit anew.
    """
    holds = standing.finding.holds
    reason = standing.age if holds else f"the claim does not hold: {standing.finding.reason}"
    alignment = verdict.alignment
    fitted = alignment is not None and not alignment.get("bound") and not standing.older
    remarks = [reason, DATED_ONLY] if fitted and holds and verdict.marked else [reason]
    found = verdict.remarked(*remarks)
    return found.beside(barred=not holds or fitted, claim=standing.as_dict())


class _Opened(NamedTuple):
    """The suspect's tensors under the key's names, their shapes, and their files' digests.

    `left_out` are those that no layer can be, by name, and why.
    """

    weights: Mapping[str, Array]
    described: candidates.Headers
    digests: Callable[[], dict[str, str]]
    left_out: Mapping[str, str]

    def told(self, counts: Counts) -> Counts:
        """The counts, which name the files that were read and what of them was not."""
        return without(self.left_out, counts._replace(digests=self.digests()))


def _opened(suspect: Suspect, key: Key) -> _Opened:
    """The suspect, of safetensors none of it read: what is not asked for is not read at all."""
    shards = suspect.shards
    if shards is not None:
        shards = shards.renamed(without_prefixes(shards, weights_of(key)))
        described = shards.described()
        if not is_adapter(described):
            return _Opened(shards, described, lambda: suspect.digests, shards.left_out)
    weights = suspect.arrays.under(weights_of(key))
    return _Opened(weights.arrays, weights.arrays, lambda: weights.digests, weights.left_out)


def reading_of(key: Key, log10_alpha: float) -> Reading:
    """V on arrays under the key's names, by its scheme, which may be one of the caller's own."""
    name = key.context.scheme
    reader = READERS[name] if name in READERS else entry_named(name).scheme.read
    return Reading.by(reader, key, log10_alpha=log10_alpha)


def reads_weights(key: Key) -> bool:
    """Whether the mark is read off weights, and not off answers."""
    name = key.context.scheme
    return name in READERS or entry_named(name).scheme.reads_weights


def can_be_aligned(key: Key) -> bool:
    """Whether the mark is read off weights that may be put into another order first."""
    return reads_weights(key) and key.context.order is None


def _in_pairs(key: Key) -> bool:
    """Whether the tensors come in pairs, known by their names."""
    return READERS.get(key.context.scheme) is read_product


def without(left_out: Mapping[str, str], counts: Counts) -> Counts:
    """The counts, which say that these tensors were not looked at."""
    if not left_out:
        return counts
    first = next(iter(left_out.values()))
    return counts.remarked(f"{len(left_out)} tensors that no layer can be are left out: {first}")


def _as_it_stands(suspect: _Opened, read: Reading) -> Counts:
    """What is read of the tensors under the key's names, or else of those of its layers' shapes.

    Raises:
        UnsuitableModelError: the names are not there, and nothing of their shapes has the mark.
        UnreadableModelError: what is there under the names holds NaN, and as above.
    """
    key = read.key
    if _in_pairs(key):
        return read(suspect.weights)
    rivals = candidates.rivals(suspect.described, key)
    try:
        # By the headers: a file that names a tensor of any size makes nobody read it.
        _check_names(suspect.described, key)
        by_name = read(suspect.weights)
    except (UnsuitableModelError, UnreadableModelError) as error:
        found = None
        if rivals and candidates.enough(suspect.described, key):
            found = candidates.read_by_shape(read, suspect.weights, suspect.described)
        if found is not None and read.marked(found):
            return found
        tried = (
            ""
            if found is None
            else (
                f"; {len(rivals)} tensors of its layers' shapes are there under other names, and "
                "as they stand none has the mark; --align FOLDER puts channels back in order first"
            )
        )
        unread = next(iter(suspect.left_out.values()), None)
        why = "" if unread is None else f"; what was not read: {unread}"
        raise type(error)(f"{error}{tried}{why}") from None
    if not rivals:
        return by_name
    by_name = candidates.by_name(by_name, rivals)
    if read.marked(by_name):
        return by_name
    found = candidates.read_by_shape(read, suspect.weights, suspect.described)
    if read.marked(found):
        return found
    return by_name.remarked(
        f"and so are not, whichever is taken for which layer, {len(rivals)} tensors of the same "
        "shapes"
    )


def _check_names(described: candidates.Headers, key: Key) -> None:
    """Refuse a network without the key's layers."""
    if is_adapter(described) and not weights_of(key) & described.keys():
        raise UnsuitableModelError(
            "this is an adapter (low-rank pairs) and no network, and the key is for the layers of "
            "one; needed: the network that it was made for, with the adapter merged into it"
        )
    for layer in key.context.layers:
        check_host(described, layer)


def _added(suspect: Suspect, path: Path, key: Key, options: Options) -> Verdict:
    """V on what the suspect's weights add to those of the base."""
    weights, base = (each.under(weights_of(key)) for each in (suspect.arrays, read_arrays(path)))
    arrays = added(weights.arrays, base.arrays, key)
    alpha = options.threshold
    if options.log10_alpha is None:  # what will be done to a public network can be foreseen
        alpha = min(alpha, LOG10_ALPHA_UNCOMMITTED)
    read = reading_of(key, alpha)
    counts = read(arrays).remarked(f"read from what was added to {path.name}")
    if options.standing is None:
        counts = counts.remarked("that the base is older than the suspect is your word")
    elif not options.standing.older:
        counts = counts.remarked(BASE_DATED_ONLY)._replace(barred=True)
    digests = {**weights.digests, **within("base", base.digests)}
    return read.verdict(without(weights.left_out, counts._replace(digests=digests)))


def weights_of(key: Key) -> set[str]:
    """The names that the tensors which a key is read from have in the owner's network."""
    return {f"{layer.name}.weight" for layer in key.context.layers} | tensors_read(key.context)
