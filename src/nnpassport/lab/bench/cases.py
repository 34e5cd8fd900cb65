"""What there is to time, and which of it one run of the benchmark takes."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

from nnpassport.embedding.network.models import ARCHITECTURES
from nnpassport.embedding.schemes.passport import V1, V2, V3, Passport
from nnpassport.embedding.train.loop import PRECISIONS
from nnpassport.scheme import BadRecipeError

TRANSFORMER = "vit-tiny"
NETWORKS = (*ARCHITECTURES, TRANSFORMER)
TASKS = ("infer", "train", "memory", "act", "long act", "loop")
EVERYWHERE = "*"
"""Every layer that can carry a passport, as a pattern."""
LOOP_STEPS = 50
"""Steps of one epoch of the loop: its checkpoint weighs more here than in an epoch of CIFAR-10."""

SCHEMES: Mapping[str, Passport] = {"V1": V1, "V2": V2, "V3": V3}
CHEAPER: Mapping[str, Passport] = {
    "V2 share 1/2": replace(V2, private_share=1 / 2),
    "V2 share 1/4": replace(V2, private_share=1 / 4),
    "V3 share 1/4": replace(V3, private_share=1 / 4),
    "V2 every 2": replace(V2, private_every=2),
    "V2 late 3/4": replace(V2, late=3 / 4),
}
"""Training with less of the private branch: on a share of each batch, in every other step, late."""


@final
@dataclass(frozen=True, slots=True)
class Case:
    """One thing to time.

    Attributes:
        architecture: of `models`, or "vit-tiny".
        task: "train", a step of `fit` (forward, backward, SGD); "infer", a forward; "memory", of a
            training step; "act" and "long act", what an owner or an attacker does with a key;
            "loop", steps of a whole `fit` and bare ones.
        network: "plain"; to train also "V1", "V2", "V3", as the published code runs them "slow V1",
            "slow V2", "slow V3", "forked": plain, but for a batch that is doubled where V2's
            is, and those of `CHEAPER`; to infer "V1 presented", "V1 folded", "V2 released"; where
            cases are compiled, "eager" is a plain one that is not. Acts have names of their own.
        norm: as in `build`; the paper's V1 has batch norm, V2 and V3 have group norm. Transformers
            have "layer".
        width: as in `build`; other than 1 only in tests.
        compiled: run through `torch.compile`.
        layers: the pattern of the layers that carry passports; None are the default ones.
    """

    architecture: str
    batch: int
    precision: str
    task: str
    network: str
    norm: str
    width: float = 1.0
    compiled: bool = False
    layers: str | None = None

    @property
    def group(self) -> tuple[str, int, str, str, bool, str]:
        """What cases that can be compared have in common."""
        return (
            *(self.architecture, self.batch, self.precision, self.task),
            *(self.compiled, self.layers or ""),
        )

    @property
    def steps(self) -> int:
        """How many steps one run does: a cycle, where not all steps are alike."""
        if self.task == "loop":
            return LOOP_STEPS
        scheme = CHEAPER.get(self.network, V2)
        return max(scheme.private_every, round(1 / (1 - (scheme.late or 0))))


Rows = tuple[tuple[str, str], ...]
_TABLE4: Mapping[str, Rows] = {
    "infer": (
        ("plain", "batch"),
        ("V1 presented", "batch"),
        ("V1 folded", "batch"),
        ("plain", "group"),
        ("V2 released", "group"),
    ),
    "train": (
        ("plain", "batch"),
        ("V1", "batch"),
        ("slow V1", "batch"),
        ("plain", "group"),
        ("forked", "group"),
        ("V2", "group"),
        ("V3", "group"),
        ("slow V2", "group"),
        ("slow V3", "group"),
    ),
}
_MORE: Mapping[str, Rows] = {
    "train": tuple((network, "group") for network in CHEAPER),
    "memory": (
        ("plain", "batch"),
        ("V1", "batch"),
        ("plain", "group"),
        ("V2", "group"),
        ("V3", "group"),
        ("slow V2", "group"),
        ("V2 share 1/4", "group"),
    ),
    "act": (
        ("plain", "batch"),
        ("V1 fold", "batch"),
        ("V1 release", "batch"),
        ("plain", "group"),
        ("draw a key", "group"),
        ("derive", "group"),
        ("collapse", "group"),
        ("read bits", "group"),
        ("verify", "group"),
    ),
    "long act": (("plain", "group"), ("align", "group"), ("solve", "group")),
    "loop": tuple((f"{n} {what}", "group") for n in ("plain", "V2") for what in ("step", "fit")),
}
# What is slow on purpose is not compiled, nor what has more than one graph.
_COMPILED: Mapping[str, Rows] = {
    "infer": (("eager", "batch"), *_TABLE4["infer"]),
    "train": (
        *(("eager", "batch"), ("plain", "batch"), ("V1", "batch"), ("eager", "group")),
        *(("plain", "group"), ("V2", "group"), ("V3", "group"), ("V2 share 1/4", "group")),
    ),
}


def rows_of(task: str, architecture: str, *, compiled: bool = False) -> Rows:
    """The networks of a task with their norms.

    A transformer's layers that carry passports have no norm behind them, so V1 could not be
    released and refuses them; and the published code is one of convolutions.
    """
    rows = _COMPILED.get(task, ()) if compiled else (*_TABLE4.get(task, ()), *_MORE.get(task, ()))
    if architecture != TRANSFORMER:
        return rows
    if task in {"act", "long act"}:
        return ()
    return tuple((name, "layer") for name, norm in rows if norm == "group" and "slow" not in name)


def check(case: Case) -> None:
    """Refuse what there is no way to run.

    Raises:
        BadRecipeError: the task is unknown, or has no such network.
    """
    if case.task not in TASKS:
        raise BadRecipeError(f"{case.task!r} is no task; there are: {', '.join(TASKS)}")
    known = {
        name for each in (False, True) for name, _ in rows_of(case.task, "alexnet", compiled=each)
    }
    if case.network not in known:
        raise BadRecipeError(
            f"{case.network!r} is no network to {case.task}; there are: {', '.join(sorted(known))}"
        )


def cases(
    architectures: Sequence[str], batches: Sequence[int], precisions: Sequence[str]
) -> tuple[Case, ...]:
    """Every network of the paper's Table 4 and what it is to be compared with; cheap ones first."""
    return tuple(
        Case(architecture, batch, precision, task, network, norm)
        for precision, batch, architecture in itertools.product(precisions, batches, architectures)
        for task in _TABLE4
        for network, norm in rows_of(task, architecture)
        if network not in CHEAPER
    )


def plan(
    architectures: Sequence[str] = NETWORKS,
    batches: Sequence[int] = (64, 256),
    precisions: Sequence[str] = ("float32", "bfloat16"),
    *,
    compiled: Sequence[bool] = (False, True),
    tasks: Sequence[str] = TASKS,
) -> tuple[Case, ...]:
    """All there is of these, group by group.

    Acts have neither a batch nor a precision, and are set beside an inference of 64 images.

    Raises:
        BadRecipeError: one of them is unknown.
    """
    _check_known("architecture", architectures, NETWORKS)
    _check_known("precision", precisions, tuple(PRECISIONS))
    _check_known("task", tasks, TASKS)
    acts = tuple(
        Case(architecture, 64, "float32", task, network, norm, layers=layers)
        for task in ("act", "long act")
        if task in tasks
        for architecture in architectures
        for layers in ((None, EVERYWHERE) if architecture == "resnet50" else (None,))
        for network, norm in rows_of(task, architecture)
        # The forger chooses his layers himself, and takes the default ones.
        if (network, layers) != ("solve", EVERYWHERE)
    )
    return acts + tuple(
        Case(architecture, batch, precision, task, network, norm, compiled=each)
        for precision, batch, each, architecture, task in itertools.product(
            precisions, batches, compiled, architectures, ("infer", "train", "memory", "loop")
        )
        if task in tasks
        for network, norm in rows_of(task, architecture, compiled=each)
    )


def _check_known(what: str, given: Sequence[str], known: Sequence[str]) -> None:
    for each in given:
        if each not in known:
            raise BadRecipeError(f"{what} {each!r} is unknown; there are: {', '.join(known)}")


QUICK = cases(("alexnet", "resnet18"), (64,), ("float32",))
FULL = plan()
