"""How the experiments are run: named plans, each with every choice that moves a number.

The paper's own choices (test images as passports, the checkpoint that scores best on test images)
are in `paper`; `sound` has its budget without them. [Fan19] and its code of 2019.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, final

from nnpassport.attacks.ambiguity import REVERSE
from nnpassport.attacks.removal import TRANSFER
from nnpassport.attacks.subject import Budget
from nnpassport.catalog import CATALOG
from nnpassport.embedding.schemes.triggered import TriggerSet
from nnpassport.embedding.train.loop import RECIPES, Recipe
from nnpassport.lab.named import named
from nnpassport.scheme import BadRecipeError

PASSPORTS = ("derived", "shuffle-train", "shuffle-test")
SELECTIONS = ("last", "best-on-validation", "best-on-test")


@final
@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """One protocol for all tables and figures.

    Attributes:
        name: as on the command line.
        summary: what it is for, in a line.
        embed: trains every network, plain or marked; its seed is the cell's.
        transfer: the fine-tuning to another task (RTAL); its seed is the cell's.
        transfer_epochs: by target, where it differs from `transfer`.
        attackers: what attackers who train may spend.
        attack_epochs: by attack, where it differs from `attackers`.
        insider_rate: learning rate of fake3. None is the audit's, which is a hundred times the
            published one and meant for a hundredth of its steps.
        tasks: what networks are trained on.
        targets: what they are transferred to, without their own task.
        architectures: names, and the arguments that they are built with.
        seeds: one network each.
        fakes: random passports of fake1.
        passports: "derived" from a seed, one for a whole layer as in the paper; or activations of
            20 and 20 images, shuffled, in the plain network: of training images, or of test images
            as in the paper's code.
        triggers: "derived", or the "published" ones of Adi et al.
        selection: which weights a run ends with.
        validation: share of the training images that is held out; nothing is, if weights are
            selected on test images.
        train_images: at most so many images to train on, by architecture; others have all.
        transfer_images: at most so many images of the other task.
        attack_images: at most so many training images for attackers.
        attack_test_images: at most so many test images to measure what attacks leave and win.
        fake_images: the same for each random passport of fake1.
        settings: other settings than the catalog's, by scheme.
        tuning: how a mark is put into a network that is trained already; its seed is the cell's.
        tuning_images: at most so many images for that.
        skipped: attacks that the leaderboard leaves out, and why.
        fresh_keys: keys drawn by chance that are read on networks which nobody marked with them.
        fewer_keys: the same by scheme, where to make one takes long.
        baselines_on: architectures that Table 1 is run on; the paper's is of AlexNet.
        by_architecture: fields of the plan that are others for an architecture; see `of`.
    """

    name: str
    summary: str
    embed: Recipe
    transfer: Recipe
    attackers: Budget
    insider_rate: float | None = None
    tasks: tuple[str, ...] = ("cifar10", "cifar100")
    targets: tuple[str, ...] = ("cifar10", "cifar100", "caltech101")
    architectures: Mapping[str, Mapping[str, Any]] = field(
        default_factory=lambda: {"alexnet": {}, "resnet18": {}}
    )
    transfer_epochs: Mapping[str, int] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    fakes: int = 50
    passports: str = "derived"
    triggers: str = "derived"
    selection: str = "last"
    validation: float = 0.05
    train_images: Mapping[str, int] = field(default_factory=dict)
    transfer_images: int | None = None
    attack_images: int | None = None
    attack_test_images: int | None = None
    fake_images: int | None = None
    settings: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    tuning: Recipe = Recipe(  # noqa: RUF009 (frozen: it cannot change)
        epochs=1, batch=96, rate=0.02, schedule="one-cycle", precision="bfloat16"
    )
    tuning_images: int | None = 24_000
    skipped: Mapping[str, str] = field(default_factory=dict)
    fresh_keys: int = 20
    fewer_keys: Mapping[str, int] = field(default_factory=dict)
    attack_epochs: Mapping[str, int] = field(default_factory=dict)
    baselines_on: tuple[str, ...] = ("alexnet",)
    by_architecture: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, allowed in (("passports", PASSPORTS), ("selection", SELECTIONS)):
            if getattr(self, name) not in allowed:
                raise BadRecipeError(
                    f"{name} {getattr(self, name)!r} is unknown; it is one of: {', '.join(allowed)}"
                )

    def with_seeds(self, seeds: tuple[int, ...]) -> "Plan":
        """The same plan for other seeds; cells do not depend on what other seeds there are."""
        return dataclasses.replace(self, seeds=seeds) if seeds else self

    def of(self, architecture: str) -> "Plan":
        """The plan as it is for this architecture."""
        return _plan_of(self, architecture) if architecture in self.by_architecture else self


@cache  # one object for each, since plans are told apart by identity
def _plan_of(plan: Plan, architecture: str) -> Plan:
    given = plan.by_architecture[architecture]
    return dataclasses.replace(plan, **given, by_architecture={})


_ANSWERING = tuple(n for n, e in CATALOG.items() if isinstance(e.scheme, TriggerSet))
_PUBLISHED_SETTINGS = {name: {"decay": 1e-5} for name in ("passport-v1", "passport-v2")} | {
    "passport-v3": {"decay": 1e-5, "triggers_per_step": 2}
}
_FOUR_TRIGGERS = {name: {"triggers_per_step": 4} for name in ("adi", "passport-v3")}

PAPER = Plan(
    "paper",
    "the code of 2019: 200 epochs, passports from test images, the best epoch on test images",
    embed=dataclasses.replace(RECIPES["paper"], keep_best=True),
    transfer=TRANSFER,
    attackers=Budget(REVERSE.epochs, REVERSE.batch),
    insider_rate=REVERSE.rate,
    architectures={"alexnet": {}, "resnet18": {"residual": "relu-before-addition"}},
    seeds=(0, 1, 2, 3, 4),
    passports="shuffle-test",
    triggers="published",
    selection="best-on-test",
    settings=_PUBLISHED_SETTINGS,
)
SOUND = dataclasses.replace(
    PAPER,
    name="sound",
    summary="the same budget; keys derived from seeds, a validation split, nothing of the test set",
    architectures={"alexnet": {}, "resnet18": {}},
    passports="derived",
    triggers="derived",
    selection="best-on-validation",
    settings={},
)
SHORT = Plan(
    "short",
    "one cycle of 5 epochs, for two processor cores: minutes to an hour a network",
    embed=dataclasses.replace(RECIPES["short"], epochs=5, precision="bfloat16"),
    transfer=Recipe(epochs=2, rate=0.01, schedule="constant", precision="bfloat16"),
    transfer_epochs={"caltech101": 4},
    attackers=Budget(epochs=2, batch=64, precision="bfloat16"),
    tasks=("cifar10",),
    train_images={"resnet18": 5_000},
    transfer_images=20_000,
    attack_images=5_000,
    attack_test_images=1_000,
    fake_images=500,
    settings=_FOUR_TRIGGERS,
)
GPU_SHORT = Plan(
    "gpu-short",
    "one cycle of 30 epochs in large batches, compiled: meant for minutes a network on an H100",
    embed=Recipe(
        epochs=30,
        batch=512,
        rate=0.2,
        schedule="one-cycle",
        nesterov=True,
        precision="bfloat16",
        compile=True,
    ),
    transfer=Recipe(
        epochs=15, batch=256, rate=0.04, schedule="one-cycle", precision="bfloat16", compile=True
    ),
    attackers=Budget(epochs=20, batch=256, precision="bfloat16"),
    seeds=(0, 1, 2),
    settings={name: {"triggers_per_step": 16} for name in ("adi", "passport-v3")},
)
_LARGE_BATCHES = Recipe(
    batch=512, rate=0.1, schedule="one-cycle", nesterov=True, precision="bfloat16"
)
GPU = Plan(
    "gpu",
    "all images, one cycle of 40 epochs (AlexNet) or 30 (ResNet-18) in large batches: for minutes "
    "on an accelerator, see benchmarks/accelerator",
    embed=dataclasses.replace(_LARGE_BATCHES, epochs=40),
    transfer=Recipe(epochs=15, batch=256, rate=0.04, schedule="one-cycle", precision="bfloat16"),
    transfer_epochs={"caltech101": 30},
    attackers=Budget(epochs=10, batch=256, precision="bfloat16"),
    attack_epochs={"fake2": 30},
    settings={name: {"triggers_per_step": 16} for name in ("adi", "passport-v3")},
    baselines_on=("alexnet", "resnet18"),
    by_architecture={"resnet18": {"embed": dataclasses.replace(_LARGE_BATCHES, epochs=30)}},
)
_ONE_CYCLE = Recipe(rate=0.05, schedule="one-cycle", nesterov=True, precision="bfloat16")
STEADY = Plan(
    "steady",
    "all images, one cycle of 20 epochs (AlexNet) or 8 (ResNet-18): for processors and patience",
    embed=dataclasses.replace(_ONE_CYCLE, epochs=20, batch=128),
    transfer=Recipe(epochs=5, rate=0.02, schedule="one-cycle", precision="bfloat16"),
    transfer_epochs={"caltech101": 15},
    attackers=Budget(epochs=1, batch=64, precision="bfloat16"),
    attack_epochs={"fake2": 10},
    attack_test_images=2_000,
    fake_images=1_000,
    settings=_FOUR_TRIGGERS,
    baselines_on=("alexnet", "resnet18"),
    by_architecture={
        "resnet18": {
            "embed": dataclasses.replace(_ONE_CYCLE, epochs=8, batch=64),
            "transfer": Recipe(epochs=3, rate=0.02, schedule="one-cycle", precision="bfloat16"),
            "transfer_epochs": {"caltech101": 10},
            "attack_epochs": {"fake2": 4},
            "settings": {name: {"triggers_per_step": 2} for name in ("adi", "passport-v3")},
        }
    },
)
TRIAL = Plan(
    "trial",
    "scikit-learn's embedded digits and narrow networks: a few minutes, to see it work",
    embed=Recipe(epochs=12, batch=64, rate=0.05, schedule="one-cycle", augment=False),
    transfer=Recipe(epochs=3, batch=64, rate=0.02, schedule="one-cycle", augment=False),
    attackers=Budget(epochs=2, batch=64),
    tasks=("digits",),
    targets=("digits-halves",),
    architectures={"alexnet": {"width": 0.25}},
    fakes=5,
    attack_images=500,
    settings={name: {"triggers_per_step": 24} for name in ("adi", "passport-v3")}
    | {"uchida": {"strength": 0.05}},
)
_COPIES = "a copy worth having takes more images and epochs than this recipe gives its attackers"
_SAVED = "saves hours on two cores; `nnpassport audit --full` runs it on any network"
LEADERBOARD = dataclasses.replace(
    SHORT,
    name="leaderboard",
    summary="every scheme put into one trained network in one epoch, every attack on each",
    architectures={"alexnet": {}},
    # Annealed: a constant rate alone costs their network more than five points.
    attackers=Budget(epochs=2, batch=64, precision="bfloat16", schedule="one-cycle"),
    attack_images=3_000,
    attack_test_images=500,
    fewer_keys={"frontier-stitching": 4},
    settings={
        **{name: {"triggers_per_step": 8} for name in _ANSWERING},
        "passport-v3": {"triggers_per_step": 8},
    },
    skipped={
        **dict.fromkeys(("distil", "extract", "distil-unrelated"), _COPIES),
        **dict.fromkeys(("ftll", "rtll", "rtal", "flip", "permute", "rescale"), _SAVED),
        **dict.fromkeys(("fake3", "substitute-ierb", "substitute-cerb"), _SAVED),
        **dict.fromkeys(("merge-base", "merge-tuned"), "its attackers have no public network"),
        **dict.fromkeys(
            ("insert-block", "drop-block", "untie"), "AlexNet has no blocks and shares nothing"
        ),
        "free-move": "`free-moves` makes all of them",
        **dict.fromkeys(
            ("transfer-rtal", "transfer-rtll"),
            "ends on another task, so that what is kept of the accuracy cannot be compared",
        ),
    },
)
LEADERBOARD_TRIAL = dataclasses.replace(
    TRIAL,
    name="leaderboard-trial",
    summary="the same on embedded digits and a narrow network: a few minutes, to see it work",
    tuning=Recipe(epochs=6, batch=32, rate=0.05, schedule="one-cycle", augment=False),
    settings={
        **{name: {"triggers_per_step": 24} for name in _ANSWERING},
        "passport-v3": {"triggers_per_step": 24},
    },
    skipped=LEADERBOARD.skipped,
    fresh_keys=3,
)
PLANS: Mapping[str, Plan] = {
    plan.name: plan for plan in (GPU, STEADY, SHORT, PAPER, SOUND, GPU_SHORT, TRIAL)
}
"""The paper's tables and figures can be made by these."""
FIELD_PLANS: Mapping[str, Plan] = {plan.name: plan for plan in (LEADERBOARD, LEADERBOARD_TRIAL)}
"""And the leaderboard by these."""


def plan_named(name: str) -> Plan:
    """The plan of this name.

    Raises:
        BadRecipeError: there is none.
    """
    return named(PLANS, name, "recipe")


def field_plan_named(name: str) -> Plan:
    """The plan of the leaderboard that has this name.

    Raises:
        BadRecipeError: there is none.
    """
    return named(FIELD_PLANS, name, "recipe")
