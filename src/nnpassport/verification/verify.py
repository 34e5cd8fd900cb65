"""V and F on files from anybody: what `verify`, `release` and the judge ask of a suspect.

Every function here either gives a verdict or raises, and then nothing was decided.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, final

import torch
from torch import Tensor, nn

from nnpassport.alignment.channels import channels_of
from nnpassport.alignment.null import (
    MIXTURES,
    AlignedVerdict,
    ShapedVerdict,
    Unrelated,
    aligned_verdict,
    mixtures,
    verdict_by_shape,
)
from nnpassport.catalog import scheme_named
from nnpassport.claims.claim import MILLION
from nnpassport.claims.facts import Facts, check_config
from nnpassport.claims.rules import DATED_ONLY
from nnpassport.claims.standing import Standing
from nnpassport.data.images import ImageSet, Normalisation
from nnpassport.embedding.checkpoint import PREFIXES, Loaded, load_model, load_suspect, own_config
from nnpassport.embedding.network.outputs import logits_of
from nnpassport.embedding.schemes.deepmarks import Trace, trace
from nnpassport.embedding.schemes.lora import LORA, added, is_adapter
from nnpassport.embedding.schemes.protocol import Scheme
from nnpassport.embedding.schemes.signature import host_weight
from nnpassport.embedding.schemes.triggers import answers_to
from nnpassport.embedding.train.fidelity import accuracy
from nnpassport.files.config import ModelConfig
from nnpassport.files.disk import brief
from nnpassport.files.weights import (
    Weights,
    read_lazily,
    read_suspect,
    read_weights,
    tensors_digest,
)
from nnpassport.keys.chance import LOG10_ALPHA_UNCOMMITTED, LOG10_BY_NAME, LOG10_BY_SHAPE
from nnpassport.keys.derive import triggers_of
from nnpassport.keys.key import Key
from nnpassport.scheme import (
    Fidelity,
    UnreadableDataError,
    UnreadableModelError,
    UnsuitableModelError,
    Verdict,
)
from nnpassport.verification import candidates
from nnpassport.verification.relabelling import best_map, corrected, log10_injections

TOLERANCE = 0.03
"""ε_f where none is declared: the paper's for AlexNet."""

BASE_DATED_ONLY = (
    "what was added to a base counts only under a claim that is proved older than the suspect: "
    "whoever has the suspect can make a base, and draw a key for it, that read as any bits"
)


@final
@dataclass(frozen=True, slots=True)
class Alignment:
    """What to align a suspect to.

    Attributes:
        reference: the owner's released model folder.
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
        log10_alpha: threshold on log₁₀ p; None is that of `standing`, or 2⁻¹⁰⁰ without one.
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
        if self.log10_alpha is not None:
            return self.log10_alpha
        return LOG10_ALPHA_UNCOMMITTED if self.standing is None else self.standing.log10_alpha

    @property
    def facts(self) -> Facts | None:
        """What the claim commits to of the owner's network, where it does."""
        claim = None if self.standing is None else self.standing.claim
        return None if claim is None else claim.network


@final
@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """What F is measured on.

    Attributes:
        data: labelled images of the network's task.
        target: accuracy in [0, 1] that the owner declared; None is the suspect's own, as it is. If
            that is lower, it takes the declared one's place: what the suspect does by itself, a
            thief's moved classes say, is no fault of the passport.
        tolerance: ε_f, in [0, 1]; the paper takes 0.03 for AlexNet and 0.2 for ResNet-18.
    """

    data: ImageSet
    target: float | None = None
    tolerance: float = TOLERANCE


def verify(
    suspect: Path, key: Key, *, trial: Trial | None = None, options: Options | None = None
) -> Verdict:
    """Does the network in `suspect`, a folder or file from anybody, carry `key`?

    Bits are read from the weights alone, of safetensors one layer at a time, so that a network may
    be larger than the memory. With a `trial` the network is also built (from its own
    config if that names an architecture of ours, else from the reference) and F is measured: does
    the passport sustain the accuracy? With alignment both are of the aligned network.

    Raises:
        OwnershipError: it could not be checked; which kind says why.
    """
    options = options or Options()
    verdict, aligned = _verdict(Path(suspect), key, options)
    if trial is not None and options.alignment is not None and aligned is None:
        reason = "F was not measured: what was read stands under names that build no network"
        verdict = replace(verdict, reason=f"{verdict.reason}; {reason}")
    elif trial is not None:
        verdict = _with_fidelity(verdict, Path(suspect), key, trial, options, aligned)
    return verdict if options.standing is None else under_claim(verdict, options.standing)


def declared_trial(
    data: ImageSet,
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


def verify_as_published(suspect: Path, key: Key, *, options: Options | None = None) -> Verdict:
    """The rule of the scheme's own paper on a file from anybody; it knows no p-value."""
    scheme, options = scheme_named(key.context.scheme), options or Options()
    if not scheme.reads_weights or options.base is not None or options.alignment is not None:
        verdict, _ = _verdict(Path(suspect), key, options)
    else:  # a rule without p-value cannot pay for a choice of tensors: by the names alone
        opened = _opened(Path(suspect), key)
        if scheme.name != LORA.name:
            _check_names(opened.described, key)
        verdict = scheme.verify(opened.weights, key, log10_alpha=options.threshold)
        verdict = replace(verdict, digests=opened.digests())
    return scheme.verify_as_published(verdict)


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


def verify_answers(suspect: Path, key: Key, *, options: Options | None = None) -> Verdict:
    """The same question in black box: only the suspect's predictions on the triggers are used.

    Raises:
        OwnershipError: it could not be checked; the key has no triggers, say.
    """
    options = options or Options()
    scheme = scheme_named(key.context.scheme)
    if not scheme.triggers:
        raise UnsuitableModelError(
            f"a key of {scheme.name} has no triggers; needed for a black-box test: a key of a "
            "scheme that has; verify this one by the weights"
        )
    verdict = _answered(Path(suspect), key, options)
    return verdict if options.standing is None else under_claim(verdict, options.standing)


def trace_file(suspect: Path, key: Key) -> Trace:
    """Whose copies the network in `suspect` was made of, as `schemes.deepmarks.trace` finds it.

    Raises:
        OwnershipError: it could not be checked; the key is not one of deepmarks, say.
    """
    weights = _without_prefixes(read_suspect(Path(suspect)), key)
    return trace(weights.tensors, key)


def verify_aligned(
    weights: Mapping[str, Tensor],
    key: Key,
    reference: nn.Module,
    *,
    log10_alpha: float = LOG10_ALPHA_UNCOMMITTED,
    unrelated: Unrelated | None = None,
) -> AlignedVerdict:
    """V on weights that are first brought into the order of `reference`, a released network.

    Without `unrelated` networks the null is `MIXTURES` of the suspect's own filters, drawn from the
    digest of its weights: whoever repeats it finds the same.

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

    forms, named = scheme.forms(key), None
    try:
        null = others or of_its_own(weights, reference)
        named = aligned_verdict(read, weights, reference, forms, null)
    except UnsuitableModelError as error:
        refused = error
    else:
        reason = "aligned by the tensors' names"
        named = named._replace(verdict=named.verdict.paid(LOG10_BY_NAME, reason))
        if named.verdict.marked:
            return named
    try:
        shaped = verdict_by_shape(read, weights, reference, forms, others, _seeded(weights))
    except UnsuitableModelError as error:
        if named is not None:
            return named
        raise UnsuitableModelError(f"{refused}; by shape: {error}") from None
    paid = _shaped(shaped, weights)
    return AlignedVerdict(paid, None) if named is None or paid.marked else named


def _shaped(found: ShapedVerdict, weights: Mapping[str, Tensor]) -> Verdict:
    """The verdict by shape, once every choice of tensors is paid for."""
    reason = f"aligned by the tensors' shapes, 10^{found.log10_choices:.1f} choices being paid for"
    paid = found.verdict.paid(LOG10_BY_SHAPE + found.log10_choices, reason)
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


def under_claim(verdict: Verdict, standing: Standing) -> Verdict:
    """The verdict, and whether the claim that it rests on holds; if not, nothing is marked.

    Nor is it after alignment, unless the claim, and with it the reference, is older than the
    suspect: whoever has the suspect can turn a copy of it until it reads as any bits, and call that
    copy his reference.
    """
    holds = standing.finding.holds
    reason = standing.age if holds else f"the claim does not hold: {standing.finding.reason}"
    fitted = verdict.alignment is not None and not standing.older
    if fitted and holds and verdict.marked:
        reason = f"{reason}; {DATED_ONLY}"
    return replace(
        verdict,
        marked=verdict.marked and holds and not fitted,
        reason=f"{verdict.reason}; {reason}",
        claim=standing.as_dict(),
    )


def config_of(suspect: Path, options: Options) -> ModelConfig:
    """The config by which a suspect is built: what its images have to look like."""
    if options.alignment is not None:
        return load_model(
            options.alignment.reference, trusted_factory=options.trusted_factory
        ).config
    return _load(suspect, options).config


def _verdict(suspect: Path, key: Key, options: Options) -> tuple[Verdict, Loaded | None]:
    """By the weights alone if the scheme can: then nothing of the suspect is even built.

    With alignment also the aligned network, and the config of the reference.
    """
    scheme = scheme_named(key.context.scheme)
    if not scheme.reads_weights and options.alignment is None:
        if scheme.triggers:
            return _answered(suspect, key, options), None
        loaded = _load(suspect, options)
        normalise = Normalisation(loaded.config.mean, loaded.config.std)
        verdict = verify_model(loaded.model, normalise, key, log10_alpha=options.threshold)
        return replace(verdict, digests=loaded.digests), None
    if options.base is not None:
        weights = _without_prefixes(read_suspect(suspect), key)
        verdict = _added(weights, options.base, key, options)
        return _without(weights.left_out, verdict), None
    if options.alignment is None:
        opened = _opened(suspect, key)
        verdict = _as_it_stands(scheme, opened, key, options.threshold)
        return replace(_without(opened.left_out, verdict), digests=opened.digests()), None
    weights = _without_prefixes(read_suspect(suspect), key)
    reference = load_model(options.alignment.reference, trusted_factory=options.trusted_factory)
    _check_committed(options.alignment.reference, options.standing)
    unrelated = {str(path): read_weights(path) for path in options.alignment.unrelated}
    found = verify_aligned(
        weights.tensors,
        key,
        reference.model,
        log10_alpha=options.threshold,
        unrelated=given(unrelated) if unrelated else None,
    )
    digests = {**weights.digests, **_named("reference", reference.digests)}
    for name, each in unrelated.items():
        digests |= _named(name, each.digests)
    verdict = _without(weights.left_out, found.verdict)
    if options.standing is None:
        reason = "that the network it was aligned to is older than the suspect is your word"
        verdict = replace(verdict, reason=f"{verdict.reason}; {reason}")
    verdict = replace(verdict, digests=digests)
    if found.aligned is None:
        return verdict, None
    return verdict, reference._replace(model=found.aligned.model)


def _answered(suspect: Path, key: Key, options: Options) -> Verdict:
    """V by answers, read as the owner's facts say; or by every reading, the best of them paid for.

    Half of the level of each way to show the pictures is for the classes as they are, half for all
    their other orders.
    """
    scheme, loaded = scheme_named(key.context.scheme), _load(suspect, options)
    ways = [Normalisation(loaded.config.mean, loaded.config.std)]
    if options.every_reading and (own := own_config(suspect)) is not None:
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
    reason = f"{verdict.reason}; images became numbers as {whose}"
    if not verdict.marked and any(each.marked for each in mapped):
        reason += "; in another order of the classes it matches: have every reading looked at"
    return replace(verdict, reason=reason, digests=loaded.digests)


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


class _Opened(NamedTuple):
    """The suspect's tensors under the key's names, their shapes, and their files' digests.

    `left_out` are those that no layer can be, by name, and why.
    """

    weights: Mapping[str, Tensor]
    described: Mapping[str, Tensor]
    digests: Callable[[], dict[str, str]]
    left_out: Mapping[str, str]


def _opened(suspect: Path, key: Key) -> _Opened:
    """The suspect, of safetensors none of it read: what is not asked for is not read at all."""
    shards = read_lazily(suspect)
    if shards is not None:
        shards = shards.renamed(_prefixed(shards, key))
        described = shards.described()
        if not is_adapter(described):
            return _Opened(shards, described, shards.digests, shards.left_out)
    weights = _without_prefixes(read_suspect(suspect), key)
    return _Opened(weights.tensors, weights.tensors, lambda: weights.digests, weights.left_out)


def _without(left_out: Mapping[str, str], verdict: Verdict) -> Verdict:
    """The verdict, which says that these tensors were not looked at."""
    if not left_out:
        return verdict
    first = next(iter(left_out.values()))
    reason = f"{verdict.reason}; {len(left_out)} tensors that no layer can be are left out: {first}"
    return replace(verdict, reason=reason)


def _as_it_stands(scheme: Scheme, suspect: _Opened, key: Key, log10_alpha: float) -> Verdict:
    """V on the tensors under the key's names, or else on those that have its layers' shapes.

    Raises:
        UnsuitableModelError: the names are not there, and nothing of their shapes has the mark.
        UnreadableModelError: what is there under the names holds NaN, and as above.
    """
    if scheme.name == LORA.name:  # its tensors come in pairs, known by their names
        return scheme.verify(suspect.weights, key, log10_alpha=log10_alpha)
    rivals = candidates.rivals(suspect.described, key)
    try:
        # By the headers: a file that names a tensor of any size makes nobody read it.
        _check_names(suspect.described, key)
        named = scheme.verify(suspect.weights, key, log10_alpha=log10_alpha)
    except (UnsuitableModelError, UnreadableModelError) as error:
        found = None
        if rivals and candidates.enough(suspect.described, key):
            found = _by_shape(scheme, suspect, key, log10_alpha)
        if found is not None and found.marked:
            return found
        tried = (
            ""
            if found is None
            else (
                f"; {len(rivals)} tensors of its layers' shapes are there under other names, and "
                "as they stand none has the mark; --align FOLDER puts channels back in order first"
            )
        )
        raise type(error)(f"{error}{tried}") from None
    if not rivals:
        return named
    named = candidates.by_name(named, rivals)
    if named.marked:
        return named
    found = _by_shape(scheme, suspect, key, log10_alpha)
    return (
        found
        if found.marked
        else replace(
            named,
            reason=f"{named.reason}; and so are not, whichever is taken for which layer, "
            f"{len(rivals)} tensors of the same shapes",
        )
    )


def _by_shape(scheme: Scheme, suspect: _Opened, key: Key, log10_alpha: float) -> Verdict:
    return candidates.verify_by_shape(
        scheme, suspect.weights, suspect.described, key, log10_alpha=log10_alpha
    )


def _check_names(described: Mapping[str, Tensor], key: Key) -> None:
    """Refuse a network without the key's layers."""
    for layer in key.context.layers:
        host_weight(described, layer)


def _added(weights: Weights, path: Path, key: Key, options: Options) -> Verdict:
    """V on what the suspect's weights add to those of the base."""
    base = _without_prefixes(read_weights(path), key)
    tensors = added(weights.tensors, base.tensors, key)
    scheme = scheme_named(key.context.scheme)
    alpha = options.threshold
    if options.log10_alpha is None:  # what will be done to a public network can be foreseen
        alpha = min(alpha, LOG10_ALPHA_UNCOMMITTED)
    verdict = scheme.verify(tensors, key, log10_alpha=alpha)
    reason = f"{verdict.reason}; read from what was added to {path.name}"
    if options.standing is None:
        reason += "; that the base is older than the suspect is your word"
    elif not options.standing.older:
        verdict = replace(verdict, marked=False)
        reason += f"; {BASE_DATED_ONLY}"
    return replace(
        verdict, reason=reason, digests={**weights.digests, **_named("base", base.digests)}
    )


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


def _without_prefixes(weights: Weights, key: Key) -> Weights:
    """Under the names that the key knows."""
    names = _prefixed(weights.tensors, key)
    return weights._replace(tensors={new: weights.tensors[old] for new, old in names.items()})


def _prefixed(there: Iterable[str], key: Key) -> dict[str, str]:
    """The names that the key knows, and those that are there: wrappers for training prefix all."""
    wanted = {f"{layer.name}.weight" for layer in key.context.layers}
    names = {name: name for name in there}
    for prefix in PREFIXES * 2:
        if names.keys() >= wanted:
            continue
        # Not only where all names have it: a stranger's tensor among them changes nothing.
        shorter = {name.removeprefix(prefix): old for name, old in names.items()}
        names = shorter if len(shorter) == len(names) else names
    return names


def _seeded(weights: Mapping[str, Tensor]) -> torch.Generator:
    return torch.Generator().manual_seed(int(tensors_digest(weights)[:15], 16))


def _with_fidelity(
    verdict: Verdict,
    suspect: Path,
    key: Key,
    trial: Trial,
    options: Options,
    aligned: Loaded | None,
) -> Verdict:
    """The verdict and F, of the aligned network if there is one."""
    loaded = _load(suspect, options) if aligned is None else aligned
    if len(trial.data.classes) != len(loaded.config.classes):
        raise UnreadableDataError(
            f"the images have {len(trial.data.classes)} classes and the suspect "
            f"{len(loaded.config.classes)}; needed: images of the suspect's own task"
        )
    normalise = Normalisation(loaded.config.mean, loaded.config.std)
    answers = logits_of(loaded.model(normalise(trial.data.images[:2]))).shape[-1]
    if answers != len(trial.data.classes):
        raise UnreadableDataError(
            f"the images have {len(trial.data.classes)} classes and the suspect answers with "
            f"{answers}; needed: images of the suspect's own task"
        )
    own = accuracy(loaded.model, trial.data, normalise)
    target = own if trial.target is None else min(own, trial.target)
    presented = scheme_named(key.context.scheme).fidelity(loaded.model, key, trial.data, normalise)
    fidelity = Fidelity(presented, target, trial.tolerance)
    images = {"images": trial.data.images, "labels": trial.data.labels}
    return replace(
        verdict,
        fidelity=fidelity,
        digests={
            **verdict.digests,
            **({} if aligned is not None else loaded.digests),
            "images": tensors_digest(images),
        },
        reason=f"{verdict.reason}; with the passport presented the accuracy is {presented:.4f}, "
        f"{'within' if fidelity.passed else 'not within'} {trial.tolerance} of {target:.4f}"
        f"{'' if target == trial.target else ', which the network has without it'}",
    )


def _named(folder: str, digests: Mapping[str, str]) -> dict[str, str]:
    return {f"{folder}/{name}": digest for name, digest in digests.items()}


def _load(suspect: Path, options: Options) -> Loaded:
    """The suspect, to be read by the facts that the claim commits to, whatever else says."""
    facts, reference = options.facts, options.reference
    if facts is not None and reference is not None and (others := facts.differs_from(reference)):
        raise UnsuitableModelError(
            f"the config given as the owner's has another {' and '.join(others)} than the claim "
            "commits to; needed: the config that `claim new --reference` was given, or none"
        )
    loaded = load_suspect(Path(suspect), reference, trusted_factory=options.trusted_factory)
    return loaded if facts is None else loaded._replace(config=facts.put_into(loaded.config))
