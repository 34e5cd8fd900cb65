"""What `compare` finds of two networks, as data."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple, final

from nnpassport.alignment.axes import Axes
from nnpassport.alignment.graph import axes_of_graph
from nnpassport.alignment.inside import described
from nnpassport.alignment.order import Order
from nnpassport.alignment.table import AXES_FILE, read_table
from nnpassport.files.arrays import Array, is_floating
from nnpassport.files.disk import refuse_leaving
from nnpassport.files.onnx import ONNX, read_graph
from nnpassport.files.suspect import Suspect
from nnpassport.scheme import UnreadableModelError
from nnpassport.verification.difference import Difference

LOG10_ALPHA = -6.0
"""At or below it an order in common counts."""
LOG10_DOUBT = -3.0
"""Above it nothing is seen; between the two it is undecided."""


class Outcome(StrEnum):
    """What was found."""

    RELATED = "related"
    NONE = "none"
    UNDECIDED = "undecided"


class Network(NamedTuple):
    """One of the networks that are compared.

    Attributes:
        name: how it is called in what is said.
        tensors: by name; those of a large file are read one at a time.
        digests: SHA-256 (hex) of its files.
        axes: the table that was named for it, or lies beside it.
        named: whether the table was named; one that lies there may be anybody's.
        note: why a table that lies there was left out.
    """

    name: str
    tensors: Mapping[str, Array]
    digests: Mapping[str, str]
    axes: Axes | None = None
    named: bool = False
    note: str | None = None

    @property
    def numbers(self) -> int:
        """In all its tensors of numbers with a point."""
        return sum(each.size for each in described(self.tensors).values() if is_floating(each))

    @property
    def matrices(self) -> int:
        """How many of them are in tensors of two dimensions or more."""
        known = described(self.tensors).values()
        return sum(each.size for each in known if is_floating(each) and len(each.shape) > 1)


class Equal(NamedTuple):
    """A tensor that both networks hold, under whichever names.

    Attributes:
        how: "equal", "transposed", or "in another order" if only the set of its numbers is equal.
        telling: whether it is a matrix, or more, of so many different numbers that it is no
            constant.
        elsewhere: whether a network that was given as unrelated holds it too.
    """

    a: str
    b: str
    numbers: int
    how: str
    telling: bool
    elsewhere: bool = False


class InOrder(NamedTuple):
    """What the order test found.

    Attributes:
        how: "axes" of a table, or "shapes" of bare files.
        orders: each axis, or each pair of tensors, that was counted.
        log10_p: of all together; None where nothing could be counted.
        log10_least: bare files: the smallest p-value times the number of pairs.
        reason: what was counted and what not, in words.
    """

    how: str
    orders: tuple[Order, ...]
    log10_p: float | None
    log10_least: float | None
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        each = [{**o._asdict(), "expected": 1.0, "log10_p": o.log10_p} for o in self.orders]
        fixed, units = (sum(getattr(o, what) for o in self.orders) for what in ("fixed", "units"))
        return {**self._asdict(), "orders": each, "fixed": fixed, "units": units}


class AlignedReading(NamedTuple):
    """How alike units are once they were put into the reference's order.

    Attributes:
        likeness: mean cosine of matched units, over the axes.
        strangers: the same of unrelated networks that were given.
        mixtures: the same of networks made of the suspect's own rows.
        log10_p: the more cautious of two p-values, each of Student's t for one more network like
            those; None where there are too few.
    """

    likeness: float
    strangers: tuple[float, ...]
    mixtures: tuple[float, ...]
    log10_p: float | None


class Mixture(NamedTuple):
    """A network as a sum of others.

    Attributes:
        coefficients: by the other's name, with its standard error: an unrelated one gets about 0.
        residual: what is left over, as a share of its size.
    """

    coefficients: Mapping[str, tuple[float, float]]
    residual: float


class Beside(NamedTuple):
    """What a network that has nothing to do with the question has in common with the two."""

    name: str
    a: InOrder
    b: InOrder

    @property
    def explains(self) -> bool:
        """Whether both have its order: then it may be where they have theirs from."""
        return all(
            each.log10_p is not None and each.log10_p <= LOG10_ALPHA for each in (self.a, self.b)
        )


@final
@dataclass(frozen=True, slots=True)
class Lineage:
    """What two networks have in common, and what follows.

    Attributes:
        outcome: whether one may have been made from the other.
        reasons: why, in words, in the order in which they count.
        limits: what this does not say.
        differences: of tensors that stand in one place, by their two names.
    """

    outcome: Outcome
    reasons: tuple[str, ...]
    limits: tuple[str, ...]
    a: Network
    b: Network
    equal: tuple[Equal, ...]
    differences: Mapping[tuple[str, str], Difference]
    order: InOrder
    aligned: AlignedReading | None
    mixture: Mixture | None
    unrelated: tuple[Beside, ...]

    @property
    def related(self) -> bool:
        """Whether the two were not independently initialised, and nothing given explains it."""
        return self.outcome is Outcome.RELATED

    def kinds(self) -> dict[str, float]:
        """By kind of difference, its share of the numbers that were compared."""
        total = sum(each.numbers for each in self.differences.values())
        found = dict[str, float]()
        for each in self.differences.values():
            found[each.kind] = found.get(each.kind, 0.0) + each.numbers / total
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        mixture = None if self.mixture is None else self.mixture._asdict()
        return {
            "outcome": self.outcome.value,
            "related": self.related,
            "reasons": list(self.reasons),
            "limits": list(self.limits),
            "log10_alpha": LOG10_ALPHA,
            "log10_doubt": LOG10_DOUBT,
            "networks": [
                {"file": each.name, "numbers": each.numbers, "digests": dict(each.digests)}
                for each in (self.a, self.b)
            ],
            "equal": [each._asdict() for each in self.equal],
            "kinds": self.kinds(),
            "differences": [
                {"a": a, "b": b, **each._asdict()} for (a, b), each in self.differences.items()
            ],
            "order": self.order.as_dict(),
            "aligned": None if self.aligned is None else self.aligned._asdict(),
            "mixture": mixture,
            "unrelated": [
                {
                    "name": each.name,
                    "explains": each.explains,
                    "a": each.a.as_dict(),
                    "b": each.b.as_dict(),
                }
                for each in self.unrelated
            ],
        }


def open_network(where: Suspect | Path, axes: Path | None = None) -> Network:
    """A network from anybody, and the table of axes that is named or lies beside it.

    Raises:
        UnreadableModelError: it, or a table that is named, cannot be read.
    """
    suspect = Suspect.of(where)
    path = suspect.path
    tensors, digests = suspect.tensors, suspect.digests
    if axes is not None:
        return Network(str(path), tensors, digests, read_table(axes), named=True)
    beside = path / AXES_FILE
    if path.is_file() and path.suffix.lower() == ONNX:
        return Network(str(path), tensors, digests, *_of_graph(path))
    if not path.is_dir() or not beside.is_file():
        return Network(str(path), tensors, digests)
    try:
        refuse_leaving(path, beside)
        return Network(str(path), tensors, digests, read_table(beside))
    except UnreadableModelError as error:
        return Network(str(path), tensors, digests, note=f"its axes were left out: {error}")


def _of_graph(path: Path) -> tuple[Axes | None, bool, str | None]:
    """The axes that the graph of an ONNX file has inside, if any; they were named by nobody."""
    try:
        found = axes_of_graph(read_graph(path))
    except UnreadableModelError as error:  # its tensors were read all the same
        return None, False, f"its graph was left out: {error}"
    return (found if found.axes else None), False, None
