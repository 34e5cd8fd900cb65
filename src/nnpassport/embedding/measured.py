"""V and F where they take a network that runs, or one that is aligned to the owner's: torch's side.

Every function here either gives a verdict or raises, and then nothing was decided.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nnpassport.alignment.anchored import verify_anchored
from nnpassport.alignment.byaxes import anchor_of
from nnpassport.alignment.channels import channels_of
from nnpassport.alignment.null import (
    AlignedVerdict,
    Read,
    ShapedVerdict,
    Unrelated,
    aligned_verdict,
    anchored_by_shape,
    anchored_verdict,
    mixtures,
    verdict_by_shape,
)
from nnpassport.alignment.rate import MIXTURES
from nnpassport.catalog import scheme_named
from nnpassport.claims.facts import check_config
from nnpassport.claims.standing import Standing
from nnpassport.data.images import Normalisation
from nnpassport.embedding.answering import by_labels
from nnpassport.embedding.axes import axes_of, noise_for
from nnpassport.embedding.checkpoint import Loaded, load_model, load_suspect, own_config
from nnpassport.embedding.network.outputs import Example, logits_of
from nnpassport.embedding.network.tensors import (
    ArraysOf,
    Weights,
    as_array,
    as_tensors,
    read_weights,
    tensors_digest,
)
from nnpassport.embedding.schemes.deepmarks import Trace, trace
from nnpassport.embedding.schemes.protocol import Scheme
from nnpassport.embedding.schemes.triggers import answers_to
from nnpassport.embedding.train.fidelity import accuracy
from nnpassport.files.arrays import Array
from nnpassport.files.config import ModelConfig, other_classes
from nnpassport.files.disk import brief
from nnpassport.files.suspect import Suspect
from nnpassport.files.weights import within
from nnpassport.keys.chance import LOG10_ALPHA_UNCOMMITTED, LOG10_BY_NAME, LOG10_BY_SHAPE, TENSORS
from nnpassport.keys.derive import triggers_of
from nnpassport.keys.key import Key
from nnpassport.keys.reading import READERS, verdict_on
from nnpassport.scheme import Fidelity, UnreadableDataError, UnsuitableModelError, Verdict
from nnpassport.verification import candidates
from nnpassport.verification.anchor import ANCHOR, anchor_in, require_alignable, require_anchor
from nnpassport.verification.relabelling import best_map, corrected, log10_injections
from nnpassport.verification.verdicts import Options, Trial, under_claim, weights_of, without


def verify_model(
    model: nn.Module,
    normalise: Normalisation,
    key: Key,
    *,
    log10_alpha: float = LOG10_ALPHA_UNCOMMITTED,
) -> Verdict:
    """The same question about a network in memory: by its weights, or else by its answers."""
    scheme = scheme_named(key.context.scheme)
    return scheme.verify_network(model, key, normalise, log10_alpha=log10_alpha)


def verify_answers(
    suspect: Suspect | Path | str, key: Key, *, options: Options | None = None
) -> Verdict:
    """The same question in black box: only the suspect's predictions on the triggers are used.

    Raises:
        OwnershipError: it could not be checked; the key has no triggers, say.
    """
    options = options or Options()
    scheme = scheme_named(key.context.scheme)
    if key.context.answers is not None:
        found = by_labels(Suspect.of(suspect), key, options)
        return found if options.standing is None else under_claim(found, options.standing)
    if not scheme.triggers:
        raise UnsuitableModelError(
            f"a key of {scheme.name} has no triggers; needed for a black-box test: a key of a "
            "scheme that has; verify this one by the weights"
        )
    verdict = _answered(Suspect.of(suspect), key, options)
    return verdict if options.standing is None else under_claim(verdict, options.standing)


def trace_file(suspect: Suspect | Path, key: Key) -> Trace:
    """Whose copies the network in `suspect` was made of, as `schemes.deepmarks.trace` finds it.

    Raises:
        OwnershipError: it could not be checked; the key is not one of deepmarks, say.
    """
    weights = as_tensors(Suspect.of(suspect).arrays).under(weights_of(key))
    return trace(weights.tensors, key)


def verify_aligned(
    weights: Mapping[str, Tensor],
    key: Key,
    reference: nn.Module,
    *,
    log10_alpha: float = LOG10_ALPHA_UNCOMMITTED,
    unrelated: Unrelated | None = None,
    example: Example | None = None,
) -> AlignedVerdict:
    """V on weights that are first brought into the order of `reference`.

    That is a released network, and alignment is then blind to what the key reads of it; or the
    key's anchor, which knows nothing of the bits.

    Aligned to the anchor, bits are coins and `unrelated` networks are not looked at. To another,
    without `unrelated` networks the null is `MIXTURES` of the suspect's own filters, drawn from the
    digest of its weights: whoever repeats it finds the same.

    `example` is what the anchor takes, one or two of it, if its architecture is not one whose
    channels are known: its axes are traced on it.

    Raises:
        UnsuitableModelError: the mark is not one of weights, or the two cannot be aligned.
    """
    scheme = scheme_named(key.context.scheme)
    if not scheme.reads_weights:
        why = "is not in the weights, and only these can be aligned"
        if scheme.triggers:
            why = "is in the answers, which moved channels do not change"
        raise UnsuitableModelError(f"a mark of {scheme.name} {why}; verify it without alignment")
    others = None if unrelated is None else unrelated._replace(networks=list(unrelated.networks))

    def read(tensors: Mapping[str, Tensor]) -> Verdict:
        return scheme.verify(tensors, key, log10_alpha=log10_alpha)

    ways = _ways(scheme, key, read, weights, reference, others)
    inputs = None if key.context.anchor is None else example
    if inputs is not None and not _is_known(reference):
        return AlignedVerdict(_over_axes(weights, key, reference, inputs, log10_alpha), None)
    try:
        found = _over_layers(ways, weights)
    except UnsuitableModelError:
        if inputs is None:
            raise
        # A block that was left out: what is there has no choice of layers that fits together.
        return AlignedVerdict(_over_axes(weights, key, reference, inputs, log10_alpha), None)
    if inputs is not None and not found.verdict.marked:
        # What its layers alone do not show: kernels that are turned, blocks that were put in.
        with suppress(UnsuitableModelError):
            again = _over_axes(weights, key, reference, inputs, log10_alpha)
            return AlignedVerdict(again, None) if again.marked else found
    return found


def _over_layers(ways: "_Ways", weights: Mapping[str, Tensor]) -> AlignedVerdict:
    """Aligned by the names of layers that are known, or else by their shapes."""
    named = None
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


def _is_known(reference: nn.Module) -> bool:
    try:
        return bool(channels_of(reference))
    except UnsuitableModelError:
        return False


def _over_axes(
    weights: Mapping[str, Tensor],
    key: Key,
    anchor: nn.Module,
    example: Example,
    log10_alpha: float,
) -> Verdict:
    """V on the suspect aligned over the axes of the anchor, which are traced for it."""

    def read(arrays: Mapping[str, Array]) -> Verdict:
        reader = READERS[key.context.scheme]
        return verdict_on(reader({**own, **arrays}, key), key, log10_alpha=log10_alpha)

    state = {name: as_array(tensor) for name, tensor in anchor.state_dict().items()}
    own = {name: state[name] for name in _scales(key) if name in state}
    found = axes_of(anchor, example)
    verdict = verify_anchored(read, dict(ArraysOf(weights)), anchor_of(found, state, key))
    traits = f"over {len(found.axes)} axes that its trace shows, proved by reordering"
    return verdict.remarked(traits)


class _Ways(NamedTuple):
    """How a suspect is aligned: its tensors known by their names, or by their shapes."""

    by_name: Callable[[], AlignedVerdict]
    by_shape: Callable[[], ShapedVerdict]


def _ways(
    scheme: Scheme,
    key: Key,
    read: Read,
    weights: Mapping[str, Tensor],
    reference: nn.Module,
    unrelated: Unrelated | None,
) -> _Ways:
    """To the key's anchor, exactly; to a released network blind, beside a null.

    Raises:
        UnsuitableModelError: the key has passports of channels and this is not its anchor.
    """
    if key.context.anchor is None:
        require_alignable(key)
        forms = scheme.forms(key)
        null = unrelated or of_its_own(weights, reference)
        return _Ways(
            lambda: aligned_verdict(read, weights, reference, forms, null),
            lambda: verdict_by_shape(read, weights, reference, forms, unrelated, _seeded(weights)),
        )
    require_anchor(tensors_digest(reference.state_dict()), key)
    own = {name: tensor for name, tensor in reference.state_dict().items() if name in _scales(key)}
    return _Ways(
        lambda: anchored_verdict(read, weights, reference, _stranger(weights, reference)),
        # Filters have the anchor's signs there, so its own scales are what they are read with.
        lambda: anchored_by_shape(
            lambda found: read({**own, **found}), weights, reference, _seeded(weights)
        ),
    )


def _scales(key: Key) -> set[str]:
    """Names of the norms' scales that bits are read together with."""
    forms = (layer.channels for layer in key.context.layers)
    return {f"{form.norm}.weight" for form in forms if form is not None}


def _stranger(weights: Mapping[str, Tensor], anchor: nn.Module) -> Mapping[str, Tensor]:
    return next(iter(of_its_own(weights, anchor).networks))


def _shaped(found: ShapedVerdict, weights: Mapping[str, Tensor]) -> Verdict:
    """The verdict by shape, once every choice of tensors is paid for."""
    reason = f"aligned by the tensors' shapes, of 10^{found.log10_choices:.1f} choices"
    log10_choices = LOG10_BY_SHAPE + found.log10_choices
    paid = found.verdict.paid(log10_choices, reason, of=TENSORS)
    facts = candidates.by_shape(found.taken, weights, found.log10_choices)
    return replace(paid, candidates=facts)


def given(unrelated: Mapping[str, Weights]) -> Unrelated:
    """These networks, as the null."""
    origin = f"{len(unrelated)} unrelated networks that were given"
    return Unrelated([each.tensors for each in unrelated.values()], origin)


def of_its_own(weights: Mapping[str, Tensor], reference: nn.Module) -> Unrelated:
    """Mixtures of the filters of the network with these weights, always the same, as the null."""
    layers = [p.layer for axis in channels_of(reference) for p in axis.producers]
    there = [name for name in layers if weights.get(f"{name}.weight", torch.empty(0)).dim() > 1]
    rng = _seeded(weights)
    origin = f"{MIXTURES} mixtures of the suspect's own filters"
    return Unrelated(mixtures(weights, there, rng, MIXTURES), origin)


def config_of(suspect: Suspect | Path, options: Options) -> ModelConfig:
    """The config by which a suspect is built: what its images have to look like."""
    if options.alignment is not None:
        return load_model(
            options.alignment.reference, trusted_factory=options.trusted_factory
        ).config
    return _load(suspect, options).config


def asked(suspect: Suspect, key: Key, options: Options) -> Verdict:
    """V of a scheme that reads no weights: by the answers of the suspect, once it is built."""
    scheme = scheme_named(key.context.scheme)
    if scheme.triggers:
        return _answered(suspect, key, options)
    loaded = _load(suspect, options)
    normalise = loaded.normalise
    verdict = verify_model(loaded.model, normalise, key, log10_alpha=options.threshold)
    return replace(verdict, digests=loaded.digests)


def aligned(suspect: Suspect, key: Key, options: Options, trial: Trial | None) -> Verdict:
    """V, and F if there is a trial, of the suspect aligned to the owner's network."""
    verdict, network = _aligned(suspect, key, options)
    if trial is None:
        return verdict
    if network is None:
        return verdict.remarked("F was not measured: what was aligned builds no network")
    return with_fidelity(verdict, suspect, key, trial, options, network)


def with_aligned_fidelity(
    verdict: Verdict, suspect: Suspect, key: Key, trial: Trial, options: Options
) -> Verdict:
    """A verdict on arrays that were aligned, and F of the network aligned by its layers."""
    try:
        _, network = _aligned(suspect, key, options)
    except UnsuitableModelError as error:
        return verdict.remarked(f"F was not measured: {error}")
    if network is None:
        return verdict.remarked("F was not measured: what was aligned builds no network")
    return with_fidelity(verdict, suspect, key, trial, options, network)


def _aligned(suspect: Suspect, key: Key, options: Options) -> tuple[Verdict, Loaded | None]:
    """The verdict, the aligned network if there is one, and the config of the reference."""
    assert options.alignment is not None  # noqa: S101 - the caller has looked
    weights = as_tensors(suspect.arrays).under(weights_of(key))
    anchored, folder = key.context.anchor is not None, options.alignment.reference
    folder = anchor_in(folder) if anchored else folder
    reference = load_model(folder, trusted_factory=options.trusted_factory)
    if not anchored:
        _check_committed(folder, options.standing)
    unrelated = {str(path): read_weights(path) for path in options.alignment.unrelated}
    found = verify_aligned(
        weights.tensors,
        key,
        reference.model,
        log10_alpha=options.threshold,
        unrelated=given(unrelated) if unrelated else None,
        example=noise_for(reference.config),
    )
    what = ANCHOR if anchored else "reference"
    digests = {**weights.digests, **within(what, reference.digests)}
    for name, each in unrelated.items():
        digests |= within(name, each.digests)
    verdict = without(weights.left_out, found.verdict)
    if options.standing is None and not anchored:
        verdict = verdict.remarked(
            "that the network it was aligned to is older than the suspect is your word"
        )
    verdict = replace(verdict, digests=digests)
    if found.aligned is None:
        return verdict, None
    config = reference.config if options.facts is None else options.facts.put_into(reference.config)
    return verdict, Loaded(found.aligned.model, config, reference.digests)


def _answered(suspect: Suspect, key: Key, options: Options) -> Verdict:
    """V by answers, read as the owner's facts say; or by every reading, the best of them paid for.

    Half of the level of each way to show the pictures is for the classes as they are, half for all
    their other orders.
    """
    scheme, loaded = scheme_named(key.context.scheme), _load(suspect, options)
    ways = [loaded.normalise]
    if options.every_reading and (own := own_config(suspect.path)) is not None:
        stated = Normalisation(own.mean, own.std)
        ways += [stated] if stated != ways[0] and len(own.mean) == len(loaded.config.mean) else []
    paid = {"readings": math.log10(2 * len(ways))} if options.every_reading else {}
    found, mapped = [], []
    for normalise in ways:
        answers = _answers(key, loaded.model, normalise)
        verdict = scheme.verify_answers(answers, key, log10_alpha=options.threshold)
        found.append(corrected(verdict, paid))
        mapped += _in_the_best_order(answers, key, options.threshold, len(ways))
    verdict = min([*found, *(mapped if options.every_reading else [])], key=_weight)
    whose = "the owner's" if options.reference is not None else "the suspect's own"
    whose = f"{whose} config says" if options.facts is None else "the claim commits to"
    remarks = [f"images became numbers as {whose}"]
    if not verdict.marked and any(each.marked for each in mapped):
        remarks.append("in another order of the classes it matches: have every reading looked at")
    return replace(verdict.remarked(*remarks), digests=loaded.digests)


def _answers(key: Key, model: nn.Module, normalise: Normalisation) -> Tensor:
    try:
        return answers_to(key, model, normalise)
    except RuntimeError as error:
        raise UnsuitableModelError(
            f"the network does not take the key's pictures ({brief(error)}); needed: one for "
            f"images of {triggers_of(key.context).size}"
        ) from error


def _in_the_best_order(answers: Tensor, key: Key, log10_alpha: float, ways: int) -> list[Verdict]:
    """V with the classes in the order that fits best, paid for; none if there are too many."""
    _, labels = key.trigger_set()
    order = best_map(answers.tolist(), labels.tolist())
    if order is None:
        return []
    classes = triggers_of(key.context).classes
    read = torch.tensor([order.get(answer, classes) for answer in answers.tolist()])
    verdict = scheme_named(key.context.scheme).verify_answers(read, key, log10_alpha=log10_alpha)
    orders = log10_injections(len(set(answers.tolist())), classes)
    choices = {"readings": math.log10(2 * ways), "orders of the classes": orders}
    return [corrected(verdict, choices)]


def _weight(verdict: Verdict) -> float:
    """What the best of several readings is the least of; without p-values the first is."""
    return 0.0 if verdict.log10_p_value is None else verdict.log10_p_value


def _check_committed(reference: Path, standing: Standing | None) -> None:
    """Under a claim, only the network that it commits to may be aligned to."""
    claim = None if standing is None else standing.claim
    if claim is None:
        return
    if claim.reference != tensors_digest(read_weights(reference).tensors):
        raise UnsuitableModelError(
            "the network to align to is not the one that the claim commits to; needed: the folder "
            "that `claim new --reference` was given, or no claim"
        )
    check_config(reference, claim.network)


def _seeded(weights: Mapping[str, Tensor]) -> torch.Generator:
    return torch.Generator().manual_seed(int(tensors_digest(weights)[:15], 16))


def with_fidelity(
    verdict: Verdict,
    suspect: Suspect,
    key: Key,
    trial: Trial,
    options: Options,
    aligned: Loaded | None = None,
) -> Verdict:
    """The verdict and F, of the aligned network if there is one."""
    loaded = _load(suspect, options) if aligned is None else aligned
    if (differ := other_classes(trial.data.classes, loaded.config.classes)) is not None:
        raise UnreadableDataError(
            f"the images are of other classes than the suspect ({differ}); needed: images of the "
            "suspect's own task, with its classes in its order; if the suspect's config names them "
            "wrongly, the owner's in its place (--like FOLDER, in Python Options.reference)"
        )
    normalise = loaded.normalise
    answers = logits_of(loaded.model(normalise(trial.data.images[:2]))).shape[-1]
    if answers != len(trial.data.classes):
        raise UnreadableDataError(
            f"the images have {len(trial.data.classes)} classes and the suspect answers with "
            f"{answers}; needed: images of the suspect's own task"
        )
    own = accuracy(loaded.model, trial.data, normalise)
    target = own if trial.target is None else min(own, trial.target)
    if target <= 1 / answers:
        why = (
            f"the network itself is right in {100 * own:.2f} %, and guessing among {answers} "
            f"classes in {100 / answers:.2f} %"
        )
        if trial.target is not None and trial.target > 1 / answers:
            # A thief's moved classes, say: they are no reason not to read the mark.
            return verdict.remarked(f"F was not measured: {why}")
        raise UnreadableDataError(
            f"F has nothing to hold on to with a target of {100 * target:.2f} %: {why}; needed: "
            "images that the network does well on, with their classes in its order, and a target "
            "above chance"
        )
    presented = scheme_named(key.context.scheme).fidelity(loaded.model, key, trial.data, normalise)
    fidelity = Fidelity(presented, target, trial.tolerance)
    images = {"images": trial.data.images, "labels": trial.data.labels}
    told = verdict.remarked(
        f"with the passport presented the accuracy is {presented:.4f}, "
        f"{'within' if fidelity.passed else 'not within'} {trial.tolerance} of {target:.4f}"
        f"{'' if target == trial.target else ', which the network has without it'}"
    )
    return replace(
        told,
        fidelity=fidelity,
        digests={
            **verdict.digests,
            **({} if aligned is not None else loaded.digests),
            "images": tensors_digest(images),
        },
    )


def _load(suspect: Suspect | Path, options: Options) -> Loaded:
    """The suspect, to be read by the facts that the claim commits to, whatever else says."""
    facts, reference = options.facts, options.reference
    if facts is not None and reference is not None and (others := facts.differs_from(reference)):
        raise UnsuitableModelError(
            f"the config given as the owner's has another {' and '.join(others)} than the claim "
            "commits to; needed: the config that `claim new --reference` was given, or none"
        )
    loaded = load_suspect(suspect, reference, trusted_factory=options.trusted_factory)
    return loaded if facts is None else loaded._replace(config=facts.put_into(loaded.config))
