"""V and F where they take a network that runs, or one that is aligned to the owner's: torch's side.

Every function here either gives a verdict or raises, and then nothing was decided.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nnpassport.alignment.null import AlignedCounts as ByLayers
from nnpassport.alignment.null import Unrelated
from nnpassport.catalog import scheme_named
from nnpassport.data.images import Normalisation
from nnpassport.embedding.aligning import Aligned, AlignedVerdict, as_models
from nnpassport.embedding.answering import by_labels
from nnpassport.embedding.axes import axes_of, noise_for
from nnpassport.embedding.checkpoint import Loaded, load_model, load_suspect, own_config
from nnpassport.embedding.network.channels import channels_of, network_of, with_arrays
from nnpassport.embedding.network.outputs import Example, logits_of
from nnpassport.embedding.network.tensors import (
    ArraysOf,
    as_array,
    as_tensors,
    tensors_digest,
)
from nnpassport.embedding.schemes.deepmarks import Trace, trace
from nnpassport.embedding.schemes.triggers import answers_to
from nnpassport.embedding.train.fidelity import accuracy
from nnpassport.files.arrays import Array
from nnpassport.files.config import ModelConfig, other_classes
from nnpassport.files.suspect import Suspect
from nnpassport.files.weights import read_arrays
from nnpassport.keys.chance import LOG10_ALPHA_UNCOMMITTED
from nnpassport.keys.counts import Counts, Reading
from nnpassport.keys.derive import triggers_of
from nnpassport.keys.key import Key
from nnpassport.scheme import Fidelity, UnreadableDataError, UnsuitableModelError, Verdict
from nnpassport.verification.aligned import (
    check_committed,
    given,
    over_axes,
    read_by_layers,
    with_files,
)
from nnpassport.verification.anchor import anchor_in, require_anchor
from nnpassport.verification.relabelling import best_map, corrected, log10_injections
from nnpassport.verification.verdicts import (
    Options,
    Trial,
    by_layers,
    reading_of,
    under_claim,
    weights_of,
    without,
)


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
    weights: Mapping[str, Any],
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
    read = reading_of(key, log10_alpha)
    found = _read_aligned(read, weights, reference, unrelated, example)
    return AlignedVerdict(read.verdict(found.counts), found.aligned)


class _Aligned(NamedTuple):
    """What an aligned network has, and that network; None if only its filters were read."""

    counts: Counts
    aligned: Aligned | None


def _read_aligned(
    read: Reading,
    weights: Mapping[str, Any],
    reference: nn.Module,
    unrelated: Unrelated | None,
    example: Example | None,
) -> _Aligned:
    key = read.key
    scheme = scheme_named(key.context.scheme)
    if not scheme.reads_weights:
        why = "is not in the weights, and only these can be aligned"
        if scheme.triggers:
            why = "is in the answers, which moved channels do not change"
        raise UnsuitableModelError(f"a mark of {scheme.name} {why}; verify it without alignment")
    anchored, arrays = key.context.anchor is not None, dict(ArraysOf(weights))
    if anchored:
        require_anchor(tensors_digest(reference.state_dict()), key)
    if anchored and example is not None and not _is_known(reference):
        axes, state = axes_of(reference, example), dict(ArraysOf(reference.state_dict()))
        origin = "its trace shows, proved by reordering"
        return _Aligned(over_axes(read, arrays, state, axes, origin), None)

    def forms() -> Mapping[str, Array]:
        return {name: as_array(form) for name, form in scheme.forms(key).items()}

    if unrelated is not None:
        networks = [dict(ArraysOf(each)) for each in unrelated.networks]
        unrelated = unrelated._replace(networks=networks)
    found = read_by_layers(read, arrays, network_of(reference), forms, unrelated)
    aligned = None if found.aligned is None else as_models(found.aligned, reference)
    return _Aligned(found.counts, aligned)


def _is_known(reference: nn.Module) -> bool:
    try:
        return bool(channels_of(reference))
    except UnsuitableModelError:
        return False


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
    return verdict.beside(digests=loaded.digests)


def aligned(suspect: Suspect, key: Key, options: Options, trial: Trial | None) -> Verdict:
    """V, and F if there is a trial, of the suspect aligned to the owner's network."""
    verdict, network = _aligned(suspect, key, options)
    if trial is None:
        return verdict
    if network is None:
        return verdict.remarked("F was not measured: what was aligned builds no network")
    return with_fidelity(verdict, suspect, key, trial, options, network)


def with_aligned_fidelity(
    verdict: Verdict,
    suspect: Suspect,
    key: Key,
    trial: Trial,
    options: Options,
    layers: ByLayers | None,
) -> Verdict:
    """A verdict on arrays that were aligned, and F of the network aligned by its `layers`."""
    try:
        layers = layers or by_layers(suspect, key, options)
        if layers is None:
            _, network = _aligned(suspect, key, options)
        else:
            network = _built(layers, key, options)
    except UnsuitableModelError as error:
        return verdict.remarked(f"F was not measured: {error}")
    if network is None:
        return verdict.remarked("F was not measured: what was aligned builds no network")
    return with_fidelity(verdict, suspect, key, trial, options, network)


def _aligned(suspect: Suspect, key: Key, options: Options) -> tuple[Verdict, Loaded | None]:
    """The verdict, and the aligned network if there is one."""
    assert options.alignment is not None  # noqa: S101 - the caller has looked
    weights = suspect.arrays.under(weights_of(key))
    reference = _owners(key, options)
    if key.context.anchor is None:
        check_committed(options.alignment.reference, options.standing)
    unrelated = {str(path): read_arrays(path) for path in options.alignment.unrelated}
    read, example = reading_of(key, options.threshold), noise_for(reference.config)
    found = _read_aligned(read, weights.arrays, reference.model, given(unrelated), example)
    files = weights.digests, reference.digests, unrelated
    counts = with_files(without(weights.left_out, found.counts), key, *files, options.standing)
    aligned = found.aligned
    network = None if aligned is None else _as_owners(aligned.model, reference, options)
    return read.verdict(counts), network


def _built(found: ByLayers, key: Key, options: Options) -> Loaded | None:
    """The network that was aligned by its layers, if it was."""
    if found.aligned is None:
        return None
    reference = _owners(key, options)
    return _as_owners(with_arrays(reference.model, found.aligned.network), reference, options)


def _owners(key: Key, options: Options) -> Loaded:
    """What is aligned to."""
    assert options.alignment is not None  # noqa: S101 - the caller has looked
    folder = options.alignment.reference
    folder = folder if key.context.anchor is None else anchor_in(folder)
    return load_model(folder, trusted_factory=options.trusted_factory)


def _as_owners(model: nn.Module, reference: Loaded, options: Options) -> Loaded:
    """A network with what is known of the owner's."""
    config = reference.config if options.facts is None else options.facts.put_into(reference.config)
    return Loaded(model.eval(), config, reference.digests)


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
        answers = answers_to(key, loaded.model, normalise)
        verdict = scheme.verify_answers(answers, key, log10_alpha=options.threshold)
        found.append(corrected(verdict, paid))
        mapped += _in_the_best_order(answers, key, options.threshold, len(ways))
    verdict = min([*found, *(mapped if options.every_reading else [])], key=_weight)
    whose = "the owner's" if options.reference is not None else "the suspect's own"
    whose = f"{whose} config says" if options.facts is None else "the claim commits to"
    remarks = [f"images became numbers as {whose}"]
    if not verdict.marked and any(each.marked for each in mapped):
        remarks.append("in another order of the classes it matches: have every reading looked at")
    return verdict.remarked(*remarks).beside(digests=loaded.digests)


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
    answers = _classes_of(loaded, trial)
    own = accuracy(loaded.model, trial.data, loaded.normalise)
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
    scheme = scheme_named(key.context.scheme)
    presented = scheme.fidelity(loaded.model, key, trial.data, loaded.normalise)
    fidelity = Fidelity(presented, target, trial.tolerance)
    images = {"images": trial.data.images, "labels": trial.data.labels}
    told = verdict.remarked(
        f"with the passport presented the accuracy is {presented:.4f}, "
        f"{'within' if fidelity.passed else 'not within'} {trial.tolerance} of {target:.4f}"
        f"{'' if target == trial.target else ', which the network has without it'}"
    )
    files = {} if aligned is not None else loaded.digests
    return told.beside(fidelity=fidelity, digests={**files, "images": tensors_digest(images)})


def _classes_of(loaded: Loaded, trial: Trial) -> int:
    """How many classes the network answers with, once they are known to be those of the images.

    Raises:
        UnreadableDataError: they are others.
    """
    if (differ := other_classes(trial.data.classes, loaded.config.classes)) is not None:
        raise UnreadableDataError(
            f"the images are of other classes than the suspect ({differ}); needed: images of the "
            "suspect's own task, with its classes in its order; if the suspect's config names them "
            "wrongly, the owner's in its place (--like FOLDER, in Python Options.reference)"
        )
    shown = loaded.normalise(trial.data.images[:2])
    answers = logits_of(loaded.model(shown)).shape[-1]
    if answers != len(trial.data.classes):
        raise UnreadableDataError(
            f"the images have {len(trial.data.classes)} classes and the suspect answers with "
            f"{answers}; needed: images of the suspect's own task"
        )
    return answers


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
