"""The owner's acts on files: draw a key, train or embed into a folder, release it.

What the command line does, for programs: every function reads and writes model folders.
"""

import secrets
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import final

import torch
from torch import Tensor, nn

from nnpassport import __version__
from nnpassport.catalog import scheme_named, settings_of, with_settings
from nnpassport.data.images import Images, ImageSet, Normalisation
from nnpassport.data.triggers import read_triggers
from nnpassport.embedding import anchoring
from nnpassport.embedding.axes import noise_for
from nnpassport.embedding.checkpoint import load_model, save_model
from nnpassport.embedding.measured import verify_model
from nnpassport.embedding.network import surgery
from nnpassport.embedding.network.tensors import tensors_digest
from nnpassport.embedding.schemes.drawn import (
    image_passports,
    random_passports,
    shuffled_passports,
    with_passports,
)
from nnpassport.embedding.schemes.order import Order
from nnpassport.embedding.schemes.passport import GRAFTED_ON, Passport
from nnpassport.embedding.schemes.protocol import Scheme
from nnpassport.embedding.schemes.triggered import with_published_triggers
from nnpassport.embedding.schemes.triggers import answers_to
from nnpassport.embedding.train.fidelity import plain_evaluation
from nnpassport.embedding.train.keeping import Diary
from nnpassport.embedding.train.loop import Evaluation, Journal, Recipe, classification, fit
from nnpassport.embedding.train.team import sharing, together
from nnpassport.files.config import ModelConfig, other_classes
from nnpassport.keys.key import Key
from nnpassport.scheme import (
    BadRecipeError,
    UnmarkedWarning,
    UnreadableDataError,
    UnreadableKeyError,
    UnsuitableModelError,
    Verdict,
)
from nnpassport.verification.anchor import needs_anchor

MEASURED_ON = 2_048
"""Images of a stream whose mean and deviation stand for those of all."""
# How many images each of γ and β is made of, in the paper's modes.
PUBLISHED_PASSPORTS: Mapping[str, int] = {"random": 0, "image": 1, "shuffle": 20}


@final
@dataclass(frozen=True, slots=True, eq=False)
class Sets:
    """The images of a run, and how they become numbers.

    Attributes:
        train: what the weights see.
        validation: held out from training data; checkpoints are chosen on it.
        test: only ever reported on; None where there is none.
    """

    train: Images
    validation: Images
    test: Images | None
    normalise: Normalisation


def divide(data: Images, test: Images | None, *, validation: float, seed: int) -> Sets:
    """Hold a share of the training images out for validation, and measure mean and deviation."""
    if test is not None and (differ := other_classes(test.classes, data.classes)) is not None:
        raise UnreadableDataError(
            f"the test images are of other classes than the training images ({differ}); needed: "
            "two parts of one data set, with the same classes in the same order"
        )
    train, held_out = data.split(validation, seed=seed)
    seen = train if isinstance(train, ImageSet) else train.sample(MEASURED_ON, seed=seed)
    return Sets(train, held_out, test, Normalisation.measured(seen))


def draw_key(
    config: ModelConfig,
    scheme: str,
    *,
    owner: str = "unnamed",
    layers: Sequence[str] | None = None,
    text: str | None = None,
    passports: str | None = None,
    trained: Path | None = None,
    seen: ImageSet | None = None,
    public: Sequence[Path] = (),
    settings: Mapping[str, float | str] | None = None,
) -> Key:
    """A key, all of it derived from one seed, for networks that `config` describes.

    `passports` is "channel" or "derived" (see `Passport.draw_key`), by default the former, but for
    PAN. Those of channels are for the network in the folder `trained`, and in the directions of
    what its layers receive from the images `seen`, where both are given. Otherwise `embed` binds
    them to the network before the mark. `settings` are those of the scheme, see `with_settings`.
    """
    chosen = with_settings(scheme_named(scheme), **settings or {})
    model = config.build(trusted_factory=config.architecture)
    if trained is not None:
        model = load_model(trained, trusted_factory=config.architecture).model
    example = torch.zeros(1, *config.input_size)
    if isinstance(chosen, Passport):
        watched = None
        if seen is not None and trained is not None:
            pictures = seen.sample(GRAFTED_ON, seed=0).images
            watched = Normalisation(config.mean, config.std)(pictures)
            anchoring.check_secret(model.state_dict(), public)
        key = chosen.draw_key(
            model,
            example,
            owner=owner,
            layers=layers,
            text=text,
            passports=None if chosen.encoded else passports or "channel",
            seen=watched,
        )
    elif isinstance(chosen, Order):
        if trained is None:
            raise UnsuitableModelError(
                f"a key of {chosen.name} is drawn for one network as it is, and no weights were "
                "given; needed: --model FOLDER, the network that is trained already"
            )
        key = chosen.draw_key(model, noise_for(config), owner=owner, layers=layers, text=text)
    else:
        key = chosen.draw_key(model, example, owner=owner, layers=layers, text=text)
    return with_classes(key, config.classes)


def with_classes(key: Key, names: Sequence[str]) -> Key:
    """The key with its classes' names in its context, where they are names; all else drawn anew.

    Numbers in order say nothing that an index does not. A key without triggers stays as it is.
    """
    shape = key.context.triggers
    numbers = list(map(str, range(len(names))))
    named = shape is not None and len(names) == shape.classes == len(set(names))
    if not named or list(names) == numbers:
        return key
    return replace(key, context=replace(key.context, classes=tuple(names)))


def redraw_as_published(key: Key, mode: str, plain: Path | None, images: ImageSet | None) -> Key:
    """The key with passports as in the paper: "random", "image" or "shuffle" [Fan19, sect. 3.1].

    The last two are activations of `images` in the trained plain network of `plain`: one image for
    γ and one for β, or 20 and 20 with their channels shuffled. Such a key has no p-value.
    """
    if mode not in PUBLISHED_PASSPORTS:
        raise UnreadableKeyError(
            f"passports {mode!r} are unknown; there are: derived, {', '.join(PUBLISHED_PASSPORTS)}"
        )
    rng = torch.Generator().manual_seed(secrets.randbits(63))
    if mode == "random":
        return with_passports(key, random_passports(key, rng), rng)
    if plain is None or images is None:
        raise UnreadableKeyError(
            f"passports of kind {mode!r} are activations of images in a trained plain network; "
            "needed: --plain MODEL_FOLDER and --images DATA"
        )
    loaded = load_model(plain)
    count = PUBLISHED_PASSPORTS[mode]
    picked = torch.randperm(len(images), generator=rng)[: 2 * count]
    inputs = loaded.normalise(images.images[picked])
    names = [layer.name for layer in key.context.layers]
    if mode == "image":
        passports = image_passports(loaded.model, names, inputs[:1], inputs[1:])
    else:
        passports = shuffled_passports(loaded.model, names, inputs[:count], inputs[count:], rng)
    return with_passports(key, passports, rng)


def prepare_key(key: Key, plain: Path, images: ImageSet) -> Key:
    """The key with the pictures that its scheme makes of `images`, in the network of `plain`.

    Keys of most schemes have none and are returned as they are.
    """
    loaded = load_model(plain)
    normalise = loaded.normalise
    return scheme_named(key.context.scheme).prepared(key, loaded.model, images, normalise)


def check_pictures(key: Key, config: ModelConfig) -> None:
    """Refuse a key whose scheme makes pictures, before they were made.

    Raises:
        UnreadableKeyError: the key has none yet.
    """
    scheme = scheme_named(key.context.scheme)
    if not scheme.reads_weights:  # these insert nothing: they check
        model = config.build(trusted_factory=config.architecture)
        scheme.insert(model, key, torch.zeros(1, *config.input_size))


def with_trigger_file(key: Key, path: Path) -> Key:
    """The key with a published trigger set and its labels; such a key has no p-value.

    Raises:
        UnsuitableModelError: nobody answers the pictures of this scheme.
    """
    if not scheme_named(key.context.scheme).triggers:
        raise UnsuitableModelError(
            f"a key of {key.context.scheme} has no triggers, and a set of them was given; needed: "
            "a key of a scheme that has, such as adi; leave the set out"
        )
    shape = key.context.triggers
    images = read_triggers(path, size=32 if shape is None else shape.size[1])
    return with_published_triggers(key, images)


def train(
    folder: Path | str,
    config: ModelConfig,
    sets: Sets,
    recipe: Recipe,
    *,
    initial: Mapping[str, Tensor] | None = None,
    journal: Journal | None = None,
) -> ModelConfig:
    """Train a plain network, without a mark, into `folder`; return its config with metrics."""
    model = anchoring.beginning(config, recipe, initial)
    journal = _telling(journal, config, sets, initial)
    evaluate = plain_evaluation(sets.validation, sets.normalise)
    fit(
        model,
        classification,
        sets.train,
        recipe,
        normalise=sets.normalise,
        evaluate=evaluate,
        journal=journal,
    )
    metrics = _reported(model, sets, plain_evaluation)
    described = _described(config, sets, metrics, {})
    _write(Path(folder), model, described)
    _enter_result(journal, model)
    return described


def embed(
    folder: Path | str,
    config: ModelConfig,
    key: Key,
    sets: Sets,
    recipe: Recipe,
    *,
    scheme: Scheme | None = None,
    initial: Mapping[str, Tensor] | None = None,
    journal: Journal | None = None,
) -> ModelConfig:
    """Train a network that carries `key` into `folder`; return its config with metrics.

    The folder holds the weights of the plain architecture. It holds no secret except `anchor/`, the
    network before the mark, if the key is bound to one (`bind_key`). V2 and V3 can be used as they
    are; a V1 network needs its passport, or `release`, which folds it in. `scheme` is the key's
    scheme with other settings; None takes those of the catalog. `initial` are the weights of a
    trained network: passports are grafted into it, and a recipe of a few steps, or none, is enough.
    If `config` says that they are an anchor taken on the way, the whole recipe follows.

    Raises:
        BadRecipeError: the recipe has no epochs, and the scheme has something to be learnt.
        UnsuitableModelError: the key is bound to another network than `initial`.
    """
    scheme = scheme or scheme_named(key.context.scheme)
    _check_learns(scheme, recipe, trained=initial is not None)
    journal = _telling(journal, config, sets, initial, scheme, recipe)
    if key.context.anchor is not None:
        if anchoring.is_taken_on_the_way(key, initial):
            scheme, recipe = anchoring.gently(scheme), anchoring.after(recipe)
        elif anchoring.is_trained_in_part(config):
            scheme = anchoring.gently(scheme)
        kept = _described(config, sets, {}, config.notes)
        initial = anchoring.start(Path(folder), kept, key, initial)
    model = anchoring.beginning(config, recipe, initial)
    scheme.embed(
        model,
        key,
        sets.train,
        recipe,
        normalise=sets.normalise,
        validation=sets.validation,
        journal=journal,
        trained=initial is not None,
    )
    metrics = _reported(model, sets, scheme.evaluation)
    surgery.remove(model)
    described = _described(config, sets, metrics, {"scheme": scheme.name})
    _write(Path(folder), model, described)
    _enter_result(journal, model)
    return described


def bind_key(
    folder: Path | str,
    config: ModelConfig,
    key: Key,
    sets: Sets,
    recipe: Recipe,
    *,
    initial: Mapping[str, Tensor] | None = None,
    public: Sequence[Path] = (),
    journal: Journal | None = None,
) -> Key:
    """The key as `embed` needs it, with the same arguments; save it before you call that.

    A key with passports of channels that is bound to no network yet is bound to the one before the
    mark, which is written into `folder`/anchor: `initial`, or what comes of the first part of a
    training from scratch, which is done here. Every other key is returned as it is.

    Raises:
        UnsuitableModelError: that network is one of the `public` ones, which others have too.
        UnwritableOutputError: the folder has an anchor already, and the run is not resumed.
    """
    if key.context.anchor is not None and initial is not None:
        anchoring.check_secret(initial, public)
    if not needs_anchor(key):
        return key
    scheme = scheme_named(key.context.scheme)
    _check_learns(scheme, recipe, trained=initial is not None)
    return anchoring.bind(
        Path(folder),
        _described(config, sets, {}, {}),
        key,
        sets.train,
        recipe,
        normalise=sets.normalise,
        initial=initial,
        public=public,
        journal=_telling(journal, config, sets, initial),
    )


def release(
    source: Path | str, key: Key, folder: Path | str, *, trusted_factory: str | None = None
) -> Verdict:
    """Write the copy you publish, plain and with no trace of `key`, and verify the mark in it.

    Raises:
        UnsuitableModelError: the network in `source` does not carry the key; nothing is written.

    It warns (`UnmarkedWarning`) of triggers that the network did not learn, even if its bits are
    in.
    """
    loaded = load_model(Path(source), trusted_factory=trusted_factory)
    scheme = scheme_named(key.context.scheme)
    model = loaded.model
    normalise = loaded.normalise
    found = verify_model(model, normalise, key)
    if not (found.marked or found.matches == found.bits):
        raise UnsuitableModelError(
            f"{source} does not carry this key ({found.reason}), so nobody could prove its release "
            "to be yours; embed for longer, or give the key it was made with"
        )
    scheme.insert(model, key, torch.zeros(1, *loaded.config.input_size))
    plain = scheme.released(model)
    kept = {
        name: loaded.config.metrics[name] for name in ("accuracy",) if name in loaded.config.metrics
    }
    save_model(Path(folder), plain, replace(loaded.config, metrics=kept, notes={}))
    written = load_model(Path(folder), trusted_factory=trusted_factory)
    _warn_of_triggers(written.model, normalise, key, scheme)
    return verify_model(written.model, normalise, key)


def _warn_of_triggers(plain: nn.Module, normalise: Normalisation, key: Key, scheme: Scheme) -> None:
    """Warn of triggers that were not learnt, where the bits alone would be accepted."""
    if not (scheme.triggers and scheme.reads_weights):
        return
    found = scheme.verify_answers(answers_to(key, plain, normalise), key)
    if not found.marked:
        warnings.warn(
            f"of the triggers that this network is to be known by where only its answers can be "
            f"asked, {found.matches} of {found.bits} have their label, which proves nothing: "
            "embed for more epochs, or with more of them a step (triggers_per_step)",
            UnmarkedWarning,
            stacklevel=3,
        )


def _telling(
    journal: Journal | None,
    config: ModelConfig,
    sets: Sets,
    initial: Mapping[str, Tensor] | None,
    scheme: Scheme | None = None,
    recipe: Recipe | None = None,
) -> Journal | None:
    """The journal, whose diary, if it has one of ours, knows what is trained, and how."""
    if journal is None or not isinstance(journal.diary, Diary):
        return journal
    marked = {} if scheme is None else {"scheme": scheme.name, "settings": settings_of(scheme)}
    asked = {} if recipe is None else {"asked": asdict(recipe)}
    return replace(
        journal,
        diary=journal.diary.of(
            _described(config, sets, {}, {}),
            **marked,
            **asked,
            initial=None if initial is None else tensors_digest(initial),
            made_with={"nnpassport": __version__, "torch": str(torch.__version__)},
        ),
    )


def _enter_result(journal: Journal | None, model: nn.Module) -> None:
    """The network as it was written, which a claim may commit to, as the last entry."""
    diary = None if journal is None else journal.diary
    if isinstance(diary, Diary) and together().leads:
        diary.enter_result(model.state_dict())


def _check_learns(scheme: Scheme, recipe: Recipe, *, trained: bool) -> None:
    grafts = trained and isinstance(scheme, Passport | Order)
    if recipe.epochs == 0 and (not grafts or scheme.triggers):
        raise BadRecipeError(
            f"the recipe has no epochs, and {scheme.name} puts in by training "
            f"{'its triggers' if grafts else 'its mark'}; needed: at least one epoch, or a key of "
            "passport-v1, passport-v2 or order and a trained network to start from, which needs no "
            "training"
        )


def _write(folder: Path, model: nn.Module, config: ModelConfig) -> None:
    """Save what was trained; of several processes the leader does, and the others wait for it."""
    team = together()
    team.from_leader(lambda: save_model(folder, model.cpu(), config))


def _described(
    config: ModelConfig, sets: Sets, metrics: Mapping[str, float], notes: Mapping[str, str]
) -> ModelConfig:
    return replace(
        config,
        classes=sets.train.classes,
        mean=tuple(sets.normalise.mean),
        std=tuple(sets.normalise.std),
        metrics=metrics,
        notes=notes,
    )


def _reported(
    model: nn.Module, sets: Sets, evaluation: Callable[[Images, Normalisation], Evaluation]
) -> dict[str, float]:
    """Final numbers: on the validation images, and on the test images where there are any."""
    with sharing(together()):
        held_out = evaluation(sets.validation, sets.normalise)(model)
        numbers = {f"validation_{name}": value for name, value in held_out.items()}
        if sets.test is not None:
            numbers |= evaluation(sets.test, sets.normalise)(model)
    return {name: value for name, value in numbers.items() if not name.endswith("score")}
