"""Cells: the smallest runs that experiments are made of, each known by its inputs."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, final

from nnpassport.attacks.subject import Budget
from nnpassport.attacks.table import ATTACKS
from nnpassport.catalog import CATALOG
from nnpassport.embedding.train.loop import Recipe
from nnpassport.lab.plans import Plan

SHORT_NAMES = {"": "plain", "passport-v1": "v1", "passport-v2": "v2", "passport-v3": "v3"}


class Network(NamedTuple):
    """One trained network.

    Attributes:
        scheme: as in the catalog; "" is a plain network.
        norm: "batch" or "group".
        tuned: whether it begins as the plain network, trained to its end, and is trained on.
    """

    architecture: str
    task: str
    scheme: str
    norm: str
    seed: int
    tuned: bool = False

    @property
    def slug(self) -> str:
        """For names of files: alexnet-cifar10-v2-group-0."""
        scheme = SHORT_NAMES.get(self.scheme, self.scheme)
        tuned = "-tuned" if self.tuned else ""
        return f"{self.architecture}-{self.task}-{scheme}-{self.norm}-{self.seed}{tuned}"


@final
@dataclass(frozen=True, slots=True)
class Cell:
    """One run.

    Attributes:
        work: "train"; "transfer", to `target`; "cost", of a training step; "strangers", keys read
            on networks that do not carry them; or an attack of the audit's table, at `strengths`.
    """

    plan: Plan
    network: Network
    work: str = "train"
    target: str = ""
    strengths: tuple[float, ...] = ()

    @property
    def slug(self) -> str:
        """Words for people; `name` is what is unique."""
        parts = [self.network.slug, *([] if self.work == "train" else [self.work])]
        parts += [self.target] if self.target else []
        parts += [f"{self.strengths[0]:g}"] if len(self.strengths) == 1 and self.work_varies else []
        return "-".join(parts)

    @property
    def work_varies(self) -> bool:
        """Whether each strength of this attack is a cell of its own, being minutes of training."""
        return self.work in {"fake3", "substitute-cerb", "substitute-ierb"}

    @property
    def name(self) -> str:
        """Name of its file: the slug, and eight digits of the SHA-256 of all inputs."""
        return _name(self)

    @property
    def trains(self) -> "Cell":
        """The cell that trains its network."""
        return Cell(self.plan, self.network)

    @property
    def needs(self) -> tuple["Cell", ...]:
        """Cells whose networks it starts from."""
        own = () if self.work == "train" else (self.trains,)
        if self.network.tuned:
            return (*own, self.plain, *(self.strangers if self.work == "strangers" else ()))
        drawn = self.network.scheme.startswith("passport") and self.plan.passports != "derived"
        return (*own, self.plain) if drawn and self.work in {"train", "fake1"} else own

    @property
    def tested(self) -> int | None:
        """At most so many test images say what an attack leaves and wins; None is all of them."""
        return self.plan.fake_images if self.work == "fake1" else self.plan.attack_test_images

    @property
    def plain(self) -> "Cell":
        """The cell that trains the plain network beside this one, which passports are drawn in."""
        return Cell(self.plan, self.network._replace(scheme="", tuned=False))

    @property
    def fresh_keys(self) -> int:
        """How many keys are drawn by chance and read on strangers."""
        return self.plan.fewer_keys.get(self.network.scheme, self.plan.fresh_keys)

    @property
    def strangers(self) -> tuple["Cell", ...]:
        """Cells that train networks which do not carry the keys of this one, from other weights."""
        kinds = ("", "passport-v2")
        begun = self.network._replace(norm="group", tuned=False)
        return tuple(Cell(self.plan, begun._replace(scheme=kind)) for kind in kinds)

    @property
    def inputs(self) -> dict[str, Any]:
        """All that its result depends on, as plain JSON values; the same inputs, the same cell."""
        if self.work == "train":
            return _training_inputs(self.plan, self.network)
        shared: dict[str, Any] = {
            "network": _training_inputs(self.plan, self.network),
            "work": self.work,
        }
        if self.work == "transfer":
            return {
                **shared,
                "target": self.target,
                "recipe": _said(transfer_recipe(self)),
                "images": self.plan.transfer_images,
            }
        if self.work == "cost":
            return shared
        if self.work == "strangers":
            others = [_training_inputs(self.plan, each.network) for each in self.strangers]
            shared |= {"strangers": others, "keys": self.fresh_keys}
            published = CATALOG[self.network.scheme].published_key is not None
            return {**shared, "published_key": True} if published else shared
        shared |= {"strengths": list(self.strengths), "test_images": self.tested}
        if "train" not in ATTACKS[self.work].needs:
            return shared
        attackers: dict[str, Any] = attackers_of(self)._asdict()
        if attackers["schedule"] == "constant":  # what it was before there was a choice
            del attackers["schedule"]
        if self.work == "fake3" and self.plan.insider_rate is not None:
            attackers["rate"] = self.plan.insider_rate
        return {**shared, "attackers": attackers, "train_images": self.plan.attack_images}


def transfer_recipe(cell: Cell) -> Recipe:
    """How this transfer is trained."""
    recipe = cell.plan.transfer
    epochs = cell.plan.transfer_epochs.get(cell.target, recipe.epochs)
    return dataclasses.replace(recipe, epochs=epochs, seed=cell.network.seed)


def attackers_of(cell: Cell) -> Budget:
    """What the attackers of this cell may spend."""
    usual = cell.plan.attackers
    return usual._replace(epochs=cell.plan.attack_epochs.get(cell.work, usual.epochs))


def embed_recipe(plan: Plan, network: Network) -> Recipe:
    """How this network is trained."""
    recipe = plan.tuning if network.tuned else plan.embed
    return dataclasses.replace(recipe, seed=network.seed)


def settings_of(plan: Plan, scheme: str) -> Mapping[str, float]:
    """The plan's settings for this scheme, beside the catalog's."""
    return plan.settings.get(scheme, {})


@lru_cache(maxsize=1 << 14)  # a page asks for each of its cells dozens of times
def _name(cell: Cell) -> str:
    return f"{cell.slug}-{digest(cell.inputs)[:8]}"


def digest(inputs: Mapping[str, Any]) -> str:
    """SHA-256 of the inputs as JSON with sorted keys."""
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _training_inputs(plan: Plan, network: Network) -> dict[str, Any]:
    inputs: dict[str, Any] = {
        **{name: value for name, value in network._asdict().items() if name != "tuned"},
        "arguments": dict(plan.architectures[network.architecture]),
        "recipe": _said(embed_recipe(plan, network)),
        "selection": plan.selection,
        "validation": plan.validation if plan.selection != "best-on-test" else 0.0,
        "images": plan.train_images.get(network.architecture),
    }
    if network.tuned:
        plain = network._replace(scheme="", tuned=False)
        inputs |= {"plain": _training_inputs(plan, plain), "tuning_images": plan.tuning_images}
    if not network.scheme:
        return inputs
    inputs |= {"settings": dict(settings_of(plan, network.scheme))}
    if network.scheme.startswith("passport"):
        inputs |= {"passports": plan.passports}
    if network.scheme in {"adi", "passport-v3"}:
        inputs |= {"triggers": plan.triggers}
    return inputs


def _said(recipe: Recipe) -> dict[str, Any]:
    """What differs from the defaults, so that a new field does not make every cell a new one."""
    usual = dataclasses.asdict(Recipe())
    return {n: v for n, v in dataclasses.asdict(recipe).items() if v != usual[n]}
