"""The network before the mark as an act: taken, kept as a secret folder, and bound into the key.

A key with a passport for each channel is for one network: the *anchor*, what is there before the
mark goes in. A network that is trained already is its own anchor. One that is trained from scratch
gets one on the way: after the first part of its training, without any mark, a snapshot is kept, the
key is bound to it, and from there on the training is with the mark.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from nnpassport.data.images import Images, Normalisation
from nnpassport.embedding.checkpoint import load_model, save_model
from nnpassport.embedding.network.tensors import tensors_digest
from nnpassport.embedding.schemes.channels import ANY
from nnpassport.embedding.schemes.passport import GRAFTED_ON, Passport, bound_to
from nnpassport.embedding.schemes.protocol import Scheme
from nnpassport.embedding.train.loop import Journal, Recipe, classification, fit
from nnpassport.embedding.train.team import together
from nnpassport.files.config import CONFIG_FILE, ModelConfig
from nnpassport.files.disk import make_folder, writing
from nnpassport.files.weights import read_arrays
from nnpassport.keys.key import Key
from nnpassport.scheme import UnsuitableModelError, UnwritableOutputError
from nnpassport.verification.anchor import ANCHOR, of_channels, require_secret

BEFORE = 0.13
"""Share of a training from scratch that comes before the mark, at least one epoch."""

NEVER_RELEASED = "the network before a mark: whoever has it can subtract the mark; never release it"
"""What the config of an anchor says about it."""

PARTLY = "trained in part"
"""Title of a note in the config of an anchor that was taken on the way of a training."""


def is_trained_in_part(config: ModelConfig) -> bool:
    """Whether a network is such a snapshot: training is to go on, and not to keep its answers."""
    return PARTLY in config.notes


def is_taken_on_the_way(key: Key, initial: Mapping[str, Tensor] | None) -> bool:
    """Whether the key's anchor is a snapshot of the training itself."""
    return of_channels(key) and initial is None


def before(recipe: Recipe) -> Recipe:
    """The part of a training from scratch that comes before the mark."""
    epochs, of = _parts(recipe)
    return replace(recipe, epochs=epochs, keep_best=False, ends=epochs / of)


def after(recipe: Recipe) -> Recipe:
    """The part that comes with it: together they are the recipe, or an epoch more.

    The rate goes on where it was: a schedule of its own for each part would cost a short training
    up to two points of accuracy.
    """
    epochs, of = _parts(recipe)
    return replace(recipe, epochs=of - epochs, begins=epochs / of)


def _parts(recipe: Recipe) -> tuple[int, int]:
    """Epochs before the mark, and of both parts."""
    epochs = max(1, round(BEFORE * recipe.epochs))
    return epochs, max(epochs + 1, recipe.epochs)


def gently(scheme: Scheme) -> Scheme:
    """The scheme for a snapshot, which training goes on to change: nobody is taught its answers."""
    if not isinstance(scheme, Passport):
        return scheme
    return replace(scheme, teaching=0.0, harm=ANY.answers, harm_error=ANY.error)


def bind(
    folder: Path,
    config: ModelConfig,
    key: Key,
    train: Images,
    recipe: Recipe,
    *,
    normalise: Normalisation,
    initial: Mapping[str, Tensor] | None = None,
    public: Sequence[Path] = (),
    journal: Journal | None = None,
) -> Key:
    """The key bound to the network before the mark, which is kept in `folder`/anchor (mode 0700).

    `initial` are the weights of a trained network, which is the anchor; without them the first part
    of the recipe is trained here, and what comes of it is. Seed, name and layers stay; all that is
    derived is new, so save the key before the mark goes in. A run that is resumed finds its anchor.

    Raises:
        UnsuitableModelError: the anchor is one of the `public` networks, or next to one.
        UnwritableOutputError: there is another key's anchor in the folder.
    """
    journal = journal or Journal()
    path = folder / ANCHOR
    there = together().from_leader((path / CONFIG_FILE).exists)
    if there and not journal.resume:
        raise UnwritableOutputError(
            f"{path} is there already, and a key may be bound to it; needed: a folder without one, "
            "or --resume if this run was interrupted"
        )
    if not there:
        model = beginning(config, recipe, initial)
        if initial is None:
            own = replace(journal, folder=None if journal.folder is None else path / "training")
            together().from_leader(lambda: _make_private(path))  # checkpoints are near the anchor
            part = before(recipe)
            fit(model, classification, train, part, normalise=normalise, journal=own)
        model = model.cpu().eval()
        check_secret(model.state_dict(), public)
        keep(folder, model, config, partly=initial is None)
    # As it was written: so a run that is resumed has the same key.
    model = load_model(path, trusted_factory=config.architecture).model
    inputs = normalise(train.sample(GRAFTED_ON, seed=recipe.seed).images)
    return together().from_leader(lambda: bound_to(key, model, inputs))


def start(
    folder: Path, config: ModelConfig, key: Key, initial: Mapping[str, Tensor] | None
) -> Mapping[str, Tensor]:
    """The weights that a key bound to an anchor goes into, which are then in `folder`/anchor.

    Raises:
        UnsuitableModelError: `initial` is another network, or there is none in the folder either.
        UnwritableOutputError: there is another key's anchor in the folder.
    """
    path = folder / ANCHOR
    there = together().from_leader((path / CONFIG_FILE).exists)
    kept = tensors_digest(initial) if initial is not None else None
    if there:
        found = load_model(path, trusted_factory=config.architecture).model.state_dict()
        if tensors_digest(found) != key.context.anchor:
            raise UnwritableOutputError(
                f"{path} is there already, and is another key's; needed: a folder without one"
            )
        if initial is None:
            return found
    if initial is None or kept != key.context.anchor:
        given = "no network to start from" if initial is None else "another network to start from"
        raise UnsuitableModelError(
            f"the key is bound to the network before its mark, and {given} was given; needed: "
            f"--init with that very network (a folder {ANCHOR}/, or the one given to `key new "
            "--images`), or a new key"
        )
    if not there:
        partly = is_trained_in_part(config)
        keep(folder, beginning(config, Recipe(), initial), config, partly=partly)
    return initial


def check_secret(weights: Mapping[str, Tensor], public: Sequence[Path]) -> None:
    """Refuse a network as anchor that others have too.

    Raises:
        UnsuitableModelError: it is one of the `public` ones, or next to one.
    """
    theirs = {str(path): read_arrays(path).arrays for path in public}
    mine = {name: each.detach().cpu().float().numpy() for name, each in weights.items()}
    require_secret(mine, theirs)


def keep(folder: Path, model: nn.Module, config: ModelConfig, *, partly: bool = False) -> None:
    """Write the anchor, for its owner's eyes only; of several processes the leader does.

    `partly` notes that it is a snapshot on the way of a training.
    """
    path = folder / ANCHOR
    notes = {ANCHOR: NEVER_RELEASED, **({PARTLY: "the mark comes with the rest"} if partly else {})}
    described = replace(config, metrics={}, notes=notes)

    def write() -> None:
        _make_private(path)
        save_model(path, model, described)

    together().from_leader(write)


def _make_private(folder: Path) -> None:
    with writing(folder), make_folder(folder.parent):
        folder.mkdir(mode=0o700, exist_ok=True)
        folder.chmod(0o700)  # whatever was there


def beginning(
    config: ModelConfig, recipe: Recipe, weights: Mapping[str, Tensor] | None
) -> nn.Module:
    """The network that a training begins with: these weights, or drawn by the recipe's seed.

    Raises:
        UnsuitableModelError: images of the size in `config` do not fit it.
    """
    torch.manual_seed(recipe.seed)
    model = config.build(trusted_factory=config.architecture)
    if weights is not None:
        model.load_state_dict(weights)
    _check_takes_images(model, config)
    return model


@torch.no_grad()
def _check_takes_images(model: nn.Module, config: ModelConfig) -> None:
    channels, height, width = config.input_size
    training = model.training
    try:
        model.eval()(torch.zeros(2, *config.input_size))
    except RuntimeError as error:  # torch's own, for shapes that do not meet
        raise UnsuitableModelError(
            f"{config.architecture} does not take images of {height} by {width} pixels and "
            f"{channels} channel{'s'[: channels != 1]} ({error!s:.100}); needed: --size 32 for "
            "AlexNet without other settings, or a network for any size, such as --model resnet18"
        ) from error
    finally:
        model.train(training)
