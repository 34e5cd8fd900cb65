"""What an audit attacks, and what its attackers are given."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from nnpassport.data.images import ImageSet, Normalisation
from nnpassport.data.imageset import generator_for
from nnpassport.embedding.schemes.protocol import Scheme
from nnpassport.embedding.train.loop import Journal, Recipe
from nnpassport.files.config import ModelConfig
from nnpassport.keys.key import Key
from nnpassport.scheme import UnreadableDataError, UnreadableKeyError, UnreadableModelError

UNLABELLED = 1_000
"""Images that a thief looks at who needs no labels."""


class Budget(NamedTuple):
    """How much the attackers may train.

    Attributes:
        epochs: passes over their images for fine-tuning, distilling and forging by training.
        batch: images a step.
        precision: as in a recipe.
        schedule: of the learning rate where they fine-tune, as in a recipe.
    """

    epochs: int = 10
    batch: int = 64
    precision: str = "float32"
    schedule: str = "constant"


class Transfer(NamedTuple):
    """Another task, to fine-tune to."""

    train: ImageSet
    test: ImageSet


@final
@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """A released network and all that an attack on it may need.

    Attributes:
        model: in evaluation mode; no attack changes it.
        scheme: of the owner's key, or the one that forgers are to forge where there is no key.
        key: the owner's; None in an attack by somebody who is not the owner.
        test: images that accuracies are measured on.
        train: images that attackers have; None leaves them without data.
        transfer: another task to fine-tune to, or None.
        anchor: the network before the mark, which suspects are aligned to; of a key that is bound
            to one.
        base: the public network that this one was made from, or None.
        checkpoints: folder in which attackers who train for long keep checkpoints, and go on from
            them; None keeps none.
    """

    model: nn.Module
    config: ModelConfig
    scheme: Scheme
    normalise: Normalisation
    key: Key | None = None
    test: ImageSet | None = None
    train: ImageSet | None = None
    transfer: Transfer | None = None
    budget: Budget = Budget()  # noqa: RUF009 (a tuple: it cannot change)
    seed: int = 0
    checkpoints: Path | None = None
    anchor: nn.Module | None = None
    base: nn.Module | None = None

    @property
    def example(self) -> Tensor:
        """An input that the network runs on."""
        return torch.zeros(2, *self.config.input_size)

    def owner_key(self) -> Key:
        """The owner's key.

        Raises:
            UnreadableKeyError: none was given.
        """
        if self.key is None:
            raise UnreadableKeyError(
                "this attack is an insider's and needs the owner's key, and none was given; "
                "give it with --key"
            )
        return self.key

    def images(self) -> ImageSet:
        """The attacker's images.

        Raises:
            UnreadableDataError: none were given.
        """
        if self.train is None:
            raise UnreadableDataError(
                "this attack trains and needs images, and none were given; give some with --train"
            )
        return self.train

    def tested(self) -> ImageSet:
        """The images on which accuracies are measured.

        Raises:
            UnreadableDataError: none were given.
        """
        if self.test is None:
            raise UnreadableDataError(
                "accuracies are measured, and there are no images to measure on; give some with "
                "--data"
            )
        return self.test

    def public_base(self) -> nn.Module:
        """The public network that this one was made from.

        Raises:
            UnreadableModelError: none was given.
        """
        if self.base is None:
            raise UnreadableModelError(
                "this attack merges the network with the one that it was made from, and none was "
                "given; give it with --base"
            )
        return self.base

    def unlabelled(self) -> Tensor:
        """At most a thousand of the attacker's images, as the network takes them.

        Raises:
            UnreadableDataError: none were given.
        """
        chosen = self.images().sample(UNLABELLED, seed=self.seed)
        return self.normalise(chosen.images).to(self.example)

    def other_task(self) -> Transfer:
        """The task to transfer to.

        Raises:
            UnreadableDataError: none was given.
        """
        if self.transfer is None:
            raise UnreadableDataError(
                "this attack transfers to another task, and none was given; give its images with "
                "--transfer and --transfer-test"
            )
        return self.transfer

    def rng(self, purpose: str) -> torch.Generator:
        """Randomness of one attack: the same whenever and wherever it is run."""
        return generator_for(f"audit {purpose}", self.seed)

    def journal(self, purpose: str) -> Journal | None:
        """Where the training of one attack is kept, to be gone on with."""
        return (
            None if self.checkpoints is None else Journal(self.checkpoints / purpose, resume=True)
        )

    def recipe(self, rate: float, schedule: str | None = None, **others: Any) -> Recipe:
        """A recipe within the budget."""
        epochs, batch, precision, usual = self.budget
        return Recipe(
            **{
                "epochs": epochs,
                "batch": batch,
                "rate": rate,
                "schedule": schedule or usual,
                "precision": precision,
                "seed": self.seed,
                **others,
            }
        )

    def fresh(self) -> nn.Module:
        """A network of the same architecture that knows nothing.

        Raises:
            UnsuitableModelError: the architecture is not one of the package's own.
        """
        torch.manual_seed(self.seed + 1)
        return self.config.build()
