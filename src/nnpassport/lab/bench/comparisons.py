"""From numbers to ratios, turn by turn, beside what is aimed at and what the paper reports."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from nnpassport.lab.bench.cases import CHEAPER, EVERYWHERE
from nnpassport.lab.bench.networks import step_bound
from nnpassport.lab.timing import ENOUGH, paired, spread

Entry = Mapping[str, Any]


class Facts(NamedTuple):
    """What a target may depend on."""

    architecture: str
    batch: int
    bound: float  # of a step of two branches, as a multiple of a plain step


Number = Callable[[Facts], float | None]


class Comparison(NamedTuple):
    """A ratio of one network to another of the same norm.

    Attributes:
        paper: the range in the paper's Table 4, as a ratio.
        paper_resnet50: what its section 4.3 reports of ResNet-50.
        target: the most that it should be, or None where the row is there for comparison.
        unit: what the lower network's number is multiplied by.
        bound: what the FLOPs alone make of the ratio, where that says anything.
    """

    task: str
    above: str
    below: str
    paper: str = ""
    paper_resnet50: str = ""
    target: Number = lambda _: None
    unit: Callable[[Facts], float] = lambda _: 1.0
    unit_name: str = ""
    bound: Number = lambda _: None

    @property
    def name(self) -> str:
        """As in the table."""
        return f"{self.above} / {self.below}{self.unit_name}"

    def reported(self, architecture: str) -> str:
        """What the paper says of it, for a network that it has."""
        if architecture in {"alexnet", "resnet18"}:
            return self.paper
        return self.paper_resnet50 if architecture == "resnet50" else ""


def bound_of(name: str) -> Callable[[Facts], float]:
    """What a step of this network costs at least, as a multiple of a plain one."""
    return lambda facts: step_bound(name, facts.batch, facts.bound)


_MEMORY = {"alexnet": 1.6, "resnet18": 1.4}
_V1, _V2, _V3 = ("1.15–1.30", "1.10"), ("2.00–2.25", "2.82"), ("2.00–2.50", "2.91")
_TRAIN = (
    Comparison("train", "V1", "plain", *_V1, lambda _: 1.02, bound=lambda _: 1.0),
    Comparison("train", "slow V1", "plain", *_V1),
    Comparison("train", "V2", "plain", *_V2, lambda f: 1.05 * f.bound, bound=bound_of("V2")),
    Comparison(*("train", "V2", "plain", "", "", lambda _: 1.05, bound_of("V2")), " × lower bound"),
    Comparison("train", "forked", "plain", bound=bound_of("V2")),
    Comparison("train", "V2", "forked", bound=lambda _: 1.0),
    Comparison("train", "slow V2", "plain", *_V2),
    Comparison("train", "V3", "plain", *_V3, bound=bound_of("V3")),
    Comparison("train", "V3", "V2", target=lambda _: 1.03, bound=lambda f: 1 + 2 / f.batch),
    Comparison("train", "slow V3", "plain", *_V3),
)
_CHEAPER = tuple(
    each
    for name in CHEAPER
    for each in (
        Comparison("train", name, "plain", bound=bound_of(name)),
        Comparison("train", name, "plain", unit=bound_of(name), unit_name=" × lower bound"),
    )
)
COMPARISONS = (
    *_TRAIN,
    *_CHEAPER,
    Comparison("train", "plain", "eager"),
    Comparison("infer", "V1 presented", "plain", "1.10", "1.10"),
    Comparison("infer", "V1 folded", "plain", target=lambda _: 1.0),
    Comparison("infer", "V2 released", "plain", "1.00", "1.00", target=lambda _: 1.0),
    Comparison("infer", "plain", "eager"),
    Comparison("memory", "V1", "plain"),
    Comparison("memory", "V2", "plain", target=lambda f: _MEMORY.get(f.architecture)),
    Comparison("memory", "V3", "plain"),
    Comparison("memory", "slow V2", "plain"),
    Comparison("memory", "V2 share 1/4", "plain"),
    *(
        Comparison("act", name, "plain")
        for name in (
            *("V1 fold", "V1 release", "draw a key"),
            *("derive", "collapse", "read bits", "verify"),
        )
    ),
    *(Comparison("long act", name, "plain") for name in ("align", "solve")),
    Comparison("loop", "plain fit", "plain step", target=lambda _: 1.05),
    Comparison("loop", "V2 fit", "V2 step", target=lambda _: 1.05),
)


class Limit(NamedTuple):
    """Seconds that one act may take."""

    architecture: str
    layers: str
    network: str
    seconds: float


LIMITS = (Limit("resnet50", EVERYWHERE, "verify", 1.0),)
"""`verify` derives the key, collapses its passports and reads the bits."""

_TOGETHER = ("architecture", "batch", "precision", "compiled", "layers", "task")
_SINCE = {"compiled": False, "layers": None}  # fields that results of before do not have


def ratios(numbers: Sequence[Entry], bounds: Mapping[str, float]) -> list[dict[str, Any]]:
    """Every comparison whose two networks were both measured, turn by turn."""
    groups: dict[tuple[Any, ...], dict[tuple[str, str], Entry]] = {}
    for entry in numbers:
        group = tuple({**_SINCE, **entry}[part] for part in _TOGETHER)
        groups.setdefault(group, {})[entry["network"], entry["norm"]] = entry
    return [
        {
            **dict(zip(_TOGETHER, group, strict=True)),
            **_ratio(
                comparison,
                Facts(group[0], group[1], bounds[group[0]]),
                found[comparison.above, norm],
                found[comparison.below, norm],
            ),
        }
        for group, found in groups.items()
        for comparison in COMPARISONS
        if comparison.task == group[-1]
        for norm in dict.fromkeys(norm for _, norm in found)
        if {(comparison.above, norm), (comparison.below, norm)} <= set(found)
    ]


def limits(numbers: Sequence[Entry]) -> list[dict[str, Any]]:
    """Every limit in seconds on an act that was measured."""
    return [
        {
            **limit._asdict(),
            **spread(entry["values"]),
            "target": limit.seconds,
            "met": _met(entry["values"], limit.seconds),
        }
        for limit in LIMITS
        for entry in numbers
        if tuple(entry.get(part) for part in ("architecture", "layers", "network")) == limit[:3]
        and entry["task"] == "act"
    ]


def _ratio(comparison: Comparison, facts: Facts, above: Entry, below: Entry) -> dict[str, Any]:
    unit = comparison.unit(facts)
    values, processor = (
        paired(above[kind], below[kind], unit) for kind in ("values", "processor_seconds")
    )
    target = comparison.target(facts)
    return {
        "task": comparison.task,
        "norm": above["norm"],
        "ratio": comparison.name,
        **spread(values),
        "by_processor_time": statistics.median(processor) if processor else None,
        "target": target,
        "met": _met(values, target, least=1 if comparison.task == "memory" else ENOUGH),
        "bound": comparison.bound(facts),
        "paper": comparison.reported(facts.architecture),
    }


def _met(values: Sequence[float], target: float | None, *, least: int = ENOUGH) -> str | None:
    """Judged as printed, to two decimals."""
    if target is None:
        return None
    if len(values) < least:
        return "too few turns"
    found = spread(values)
    if round(found["median"], 2) <= round(target, 2):
        return "yes"
    return "within noise" if round(found["lower_quartile"], 2) <= round(target, 2) else "no"
