"""The demo's stages, one after the other; they hand on files, as owner and judge do in life."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import NamedTuple, cast, final

import torch
from torch import nn

from nnpassport.data.images import ImageSet, Normalisation, read_images
from nnpassport.embedding.checkpoint import load_suspect
from nnpassport.embedding.network import surgery
from nnpassport.embedding.network.models import AlexNet
from nnpassport.embedding.owner import Sets, bind_key, divide, embed, release, train
from nnpassport.embedding.schemes.passport import V2
from nnpassport.embedding.schemes.signature import secrets_of
from nnpassport.embedding.train.loop import Recipe
from nnpassport.files.config import ModelConfig, read_config
from nnpassport.files.disk import write_atomically
from nnpassport.ground.progress import Listener
from nnpassport.keys.key import Key
from nnpassport.keys.keyfile import load_key, save_key
from nnpassport.lab.demo.copied import copied
from nnpassport.lab.demo.page import KEY_FILE, html, panels
from nnpassport.lab.demo.result import OWNER, DemoResult, outcome, p_value
from nnpassport.lab.demo.stages import Clock
from nnpassport.report.page import percent, png
from nnpassport.report.provenance import provenance
from nnpassport.scheme import UnwritableOutputError
from nnpassport.verification.verdicts import TOLERANCE, Trial, verify

SIZE = 32
"""Pixels a side, which AlexNet's form for small images needs; the digits are scaled up to it."""

_FIRST = 8  # AlexNet's features from the first passport on; before it there is only the trunk


@final
@dataclass(frozen=True, slots=True)
class Budget:
    """How much work the demo does; the defaults take about 30 seconds of one core.

    Attributes:
        width: factor on the channels of AlexNet's hidden layers.
        epochs: passes over the training images, for each of the two networks.
        batch: images a step.
        rate: learning rate at its highest.
        random_keys: how many keys a rival draws.
        test_images: accuracies are measured on so many images of the test split at most.
        copied_epochs: as `epochs`, for each of the four small networks of the copied answers.
    """

    width: float = 0.1875
    epochs: int = 2
    batch: int = 16
    rate: float = 0.03
    random_keys: int = 50
    test_images: int = 10_000
    copied_epochs: int = 6

    def recipe(self, seed: int) -> Recipe:
        """How both networks are trained."""
        return Recipe(
            epochs=self.epochs,
            batch=self.batch,
            rate=self.rate,
            schedule="one-cycle",
            augment=False,  # a mirrored digit is not a digit
            seed=seed,
        )


def demo(
    folder: Path,
    *,
    show: Listener = lambda *_: None,
    seed: int = 0,
    budget: Budget | None = None,
    key_seeds: Sequence[bytes] | None = None,
    overwrite: bool = False,
) -> DemoResult:
    """Run the whole story and leave `FILES` in `folder`.

    Everything but the keys, and what they bring about, is a function of `seed`. `key_seeds` (32
    bytes each: the owner's, then a rival's) repeats those too; by default the operating system
    draws them.

    Raises:
        UnwritableOutputError: the folder cannot be written, or holds a key and `overwrite` is
            False; nothing has been computed or changed then.
    """
    _require_room(folder, overwrite)
    with _one_thread():
        return _tell(folder, Clock(show), seed, budget or Budget(), key_seeds, overwrite)


class _Prepared(NamedTuple):
    """What the owner leaves on disk, and what everybody measures with."""

    folder: Path
    sets: Sets
    test: ImageSet
    plain_accuracy: float


def _tell(
    folder: Path,
    clock: Clock,
    seed: int,
    budget: Budget,
    key_seeds: Sequence[bytes] | None,
    overwrite: bool,
) -> DemoResult:
    prepared = _prepared(folder, clock, seed, budget, key_seeds, overwrite)
    result = _judged(prepared, clock, seed, budget, key_seeds)
    with clock.stage(8):
        write_atomically(folder / "demo.png", png(panels(result)))
        write_atomically(folder / "demo.html", html(result).encode())
    return replace(result, seconds=dict(clock.seconds))


def _prepared(
    folder: Path,
    clock: Clock,
    seed: int,
    budget: Budget,
    key_seeds: Sequence[bytes] | None,
    overwrite: bool,
) -> _Prepared:
    """The owner's part: two networks, one of them marked, and a key."""
    with clock.stage(0) as stage:
        sets, test = _digits(budget, seed)
        config = _config(sets, budget)
        # Not the same weights at the start as the marked network's: it is to be unrelated.
        recipe, other = budget.recipe(2 * seed), budget.recipe(2 * seed + 1)
        plain = train(folder / "plain", config, sets, other, journal=stage.journal).metrics
        stage.note = f"{percent(plain['accuracy'])} right"
    with clock.stage(1) as stage:
        (drawn,) = _draw_keys(config.build(), OWNER, key_seeds and key_seeds[:1], 1)
        bound = bind_key(folder / "owner", config, drawn, sets, recipe, journal=stage.journal)
        save_key(bound, folder / KEY_FILE, overwrite=overwrite)
        marked = embed(folder / "owner", config, bound, sets, recipe, journal=stage.journal).metrics
        stage.note = f"{percent(marked['accuracy'])} right"
    with clock.stage(2) as stage:
        release(folder / "owner", load_key(folder / KEY_FILE), folder / "released")
        stage.note = "no secret in it"
    return _Prepared(folder, sets, test, plain["accuracy"])


def _judged(
    prepared: _Prepared, clock: Clock, seed: int, budget: Budget, key_seeds: Sequence[bytes] | None
) -> DemoResult:
    """The judge's part: only with what is on disk, as on another day and another machine."""
    released, test = prepared.folder / "released", prepared.test
    key, declared = (
        load_key(prepared.folder / KEY_FILE),
        read_config(prepared.folder / "owner").metrics,
    )
    trial = Trial(test, declared["private_accuracy"], TOLERANCE)
    with clock.stage(3) as stage:
        owner = verify(released, key, trial=trial)
        stage.note = outcome(owner)
    with clock.stage(4) as stage:
        suspect = cast(AlexNet, load_suspect(released).model)
        rivals = _draw_keys(suspect, "a rival", key_seeds and key_seeds[1:], budget.random_keys)
        random_keys = tuple(verify(released, each) for each in rivals)
        stage.note = f"{sum(each.accepted for each in random_keys)} accepted"
    with clock.stage(5) as stage:
        unrelated = verify(prepared.folder / "plain", key, trial=trial)
        stage.note = outcome(unrelated)
    with clock.stage(6) as stage:
        forged = present_each(suspect, rivals, test, prepared.sets.normalise, stage.at)
        stage.note = f"{percent(fmean(forged))} right on average"
    with clock.stage(7) as stage:
        copy = copied(OWNER, budget.copied_epochs, seed)
        stage.note = f"its answers lean as signed, {p_value(copy.by_copy)}"
    return DemoResult(
        seed=seed,
        fingerprint=key.fingerprint,
        test_images=len(test),
        chance=1 / len(test.classes),
        plain_accuracy=prepared.plain_accuracy,
        public_accuracy=declared["accuracy"],
        owner=owner,
        unrelated=unrelated,
        random_keys=random_keys,
        forged_accuracies=forged,
        copied=copy,
        seconds=dict(clock.seconds),
        provenance=provenance(),
    )


def _digits(budget: Budget, seed: int) -> tuple[Sets, ImageSet]:
    data = read_images("digits", split="train", size=SIZE)
    test = read_images("digits", split="test", size=SIZE)
    test = test.subset(torch.arange(min(budget.test_images, len(test))))
    return divide(data, test, validation=0.05, seed=seed), test


def _config(sets: Sets, budget: Budget) -> ModelConfig:
    classes, normalise = sets.train.classes, sets.normalise
    return ModelConfig(
        architecture="alexnet",
        arguments={"classes": len(classes), "norm": "group", "width": budget.width},
        classes=classes,
        input_size=(3, SIZE, SIZE),
        mean=normalise.mean,
        std=normalise.std,
    )


def _draw_keys(
    model: nn.Module, owner: str, seeds: Sequence[bytes] | None, count: int
) -> list[Key]:
    example = torch.zeros(1, 3, SIZE, SIZE)
    drawn: Sequence[bytes | None] = [None] * count if seeds is None else seeds[:count]
    return [
        V2.draw_key(model, example, owner=owner, seed=seed, passports="channel") for seed in drawn
    ]


@torch.no_grad()
def present_each(
    suspect: AlexNet,
    keys: Sequence[Key],
    data: ImageSet,
    normalise: Normalisation,
    show: Callable[[float], None] = lambda _: None,
) -> tuple[float, ...]:
    """Accuracy of a plain network with each key's passport: fake1 of the paper, if they are random.

    As `V2.fidelity` for one key after the other, in half the time: what comes before the first
    passport is the same for all of them and runs once.
    """
    images = normalise(data.images)
    trunk = suspect.features[:_FIRST](images)
    reached: list[float] = []
    for key in keys:
        show(len(reached) / len(keys))
        surgery.wrap(suspect, secrets_of(key), images[:2], two_branches=V2.two_branches)
        surgery.present(suspect)
        logits = suspect.classifier(suspect.features[_FIRST:](trunk).flatten(1))
        surgery.remove(suspect)
        reached.append((logits.argmax(1) == data.labels).float().mean().item())
    return tuple(reached)


@contextmanager
def _one_thread() -> Iterator[None]:
    # A network this small gains nothing from more, and on a busy machine they wait for each other.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _require_room(folder: Path, overwrite: bool) -> None:
    if not overwrite and os.path.lexists(folder / KEY_FILE):
        raise UnwritableOutputError(
            f"{folder} holds a {KEY_FILE} already, and a key that is overwritten is lost for good; "
            "name another folder, or ask for overwriting"
        )
    # Now, and not only after the training that a read-only folder would waste.
    write_atomically(folder / "demo.html", b"<!doctype html><title>nnpassport</title>not finished")
