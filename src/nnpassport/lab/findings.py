"""What is known of a plan's cells, gathered over seeds; what was not run stays empty."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, final

from nnpassport.embedding.train.loop import Recipe
from nnpassport.lab.cells import Cell, Network
from nnpassport.lab.paper.contents import CONTENTS, cells_of
from nnpassport.lab.plans import Plan
from nnpassport.lab.store import Store

NOT_RUN = "*not run*"
NONE = "–"
"""Where there is nothing to run."""

Entry = Mapping[str, Any]


class Group(NamedTuple):
    """Networks that differ in nothing but their seeds."""

    architecture: str
    task: str
    scheme: str
    norm: str

    def of(self, seed: int) -> Network:
        """The network of this seed."""
        return Network(*self, seed)


class Sample(NamedTuple):
    """A quantity as measured on so many networks."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Of at least one value."""
        return statistics.fmean(self.values)

    @property
    def number(self) -> str:
        """How many values there are, as in a table."""
        return f"n={len(self.values)}"

    def spread(self, digits: int = 2) -> str:
        """Mean, and from two values on the standard deviation of the sample."""
        if not self.values:
            return NOT_RUN
        mean = signed(self.mean, digits)
        if len(self.values) == 1:
            return mean
        return f"{mean} ± {statistics.stdev(self.values):.{digits}f}"

    def said(self, digits: int = 2) -> str:
        """The same with the number of values."""
        return f"{self.spread(digits)} ({self.number})" if self.values else NOT_RUN


class Point(NamedTuple):
    """One attack at one strength on one network.

    Attributes:
        before: what there was before, on the same images: accuracy in [0, 1], and marks.
        genuine: with its owner's passport presented.
        entry: as in an audit.
    """

    seed: int
    strength: float
    before: Entry
    genuine: float | None
    entry: Entry

    @property
    def own(self) -> float:
        """The network's own accuracy."""
        accuracy: float = self.before["accuracy"]
        return accuracy


@final
class Findings:
    """The results there are of one plan.

    Attributes:
        plan: with every seed that it was run for.
    """

    def __init__(self, plan: Plan, results: Path) -> None:
        self.plan = plan
        # Only results are read, so there need be neither networks nor data.
        self._store = Store(results, networks=results, data=None)
        self._read: dict[Cell, Entry | None] = {}
        self._cells: dict[tuple[Network, str, str], list[Cell]] = defaultdict(list)
        for cell in cells_of(plan, tuple(CONTENTS)):
            self._cells[cell.network, cell.work, cell.target].append(cell)

    def __bool__(self) -> bool:
        """Whether anything was run."""
        return any(self._entry(cell) for cells in self._cells.values() for cell in cells)

    def trained(self, group: Group) -> dict[int, Entry]:
        """Results of the trainings, by seed."""
        return self._by_seed(group, "train", "")

    def transferred(self, group: Group, target: str) -> dict[int, Entry]:
        """Results of the transfers to `target`, by seed."""
        return self._by_seed(group, "transfer", target)

    def points(self, group: Group, work: str) -> list[Point]:
        """All that came of an attack, by seed and strength; it may have been impossible."""
        return [
            Point(
                seed,
                entry["strength"] or 0.0,
                found["before"],
                found["genuine"],
                entry,
            )
            for seed in self.plan.seeds
            for found in self._results(group, work, "", seed)
            for entry in found["entries"]
        ]

    def carried_out(self, group: Group, work: str) -> list[Point]:
        """The same without what was impossible."""
        return [point for point in self.points(group, work) if "impossible" not in point.entry]

    def strengths(self, work: str) -> list[float]:
        """The strengths at which the plan has an attack carried out."""
        found = {
            s
            for (_, name, _), cells in self._cells.items()
            if name == work
            for c in cells
            for s in c.strengths
        }
        return sorted(found)

    def part(self, part: str) -> tuple[list[Entry], int]:
        """The files of one table or figure, and how many there would be."""
        cells = cells_of(self.plan, (part,))
        return [entry for cell in cells if (entry := self._entry(cell)) is not None], len(cells)

    def _by_seed(self, group: Group, work: str, target: str) -> dict[int, Entry]:
        return {
            seed: result
            for seed in self.plan.seeds
            for result in self._results(group, work, target, seed)
        }

    def _results(self, group: Group, work: str, target: str, seed: int) -> Iterator[Entry]:
        for cell in self._cells.get((group.of(seed), work, target), []):
            entry = self._entry(cell)
            if entry is not None:
                yield entry["result"]

    def _entry(self, cell: Cell) -> Entry | None:
        if cell not in self._read:
            self._read[cell] = self._store.read(cell)
        return self._read[cell]


def sample(entries: Iterable[Entry], share: Callable[[Entry], float]) -> Sample:
    """One share of each entry, in percent."""
    return Sample(tuple(100 * share(entry) for entry in entries))


def seconds(entry: Entry) -> float:
    """What a cell took.

    A training that was interrupted has only its last sitting on file; it took at least what its
    images take at its speed.
    """
    result, inputs = entry["result"], entry["inputs"]
    if "work" in inputs or "images_per_second" not in result:
        return entry["seconds"]
    epochs = inputs["recipe"].get("epochs", Recipe().epochs)
    return max(entry["seconds"], epochs * result["train_images"] / result["images_per_second"])


def signed(value: float, digits: int = 2) -> str:
    """A number with a minus sign that is one, and no minus before zero."""
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if not float(text) else text.replace("-", "−")
