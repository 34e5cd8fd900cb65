"""Where results are kept, and the networks that they were measured on."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from nnpassport.lab.cells import Cell
from nnpassport.lab.results import Results
from nnpassport.scheme import UnreadableDataError

FORMAT = "nnpassport-cell"
VERSION = 1


@final
@dataclass(frozen=True, slots=True)
class Store:
    """Two folders and the data.

    Attributes:
        results: one JSON a cell, by plan; no secrets, to be kept and published.
        networks: trained networks with the keys of their owners, which are secret; only needed
            where further cells are to be run on them.
        data: folder of the images; None where all are embedded.
    """

    results: Path
    networks: Path
    data: Path | None

    def of(self, cell: Cell) -> Results:
        """The results of the cell's plan."""
        return Results(self.results / cell.plan.name)

    def path(self, cell: Cell) -> Path:
        """The cell's file."""
        return self.of(cell).path(cell.name)

    def folder(self, cell: Cell) -> Path:
        """Where the network of this cell is, or will be."""
        return self.networks / cell.trains.name

    def checkpoints(self, cell: Cell) -> Path:
        """Where what trains on the network of this cell keeps checkpoints, until it is done."""
        return self.folder(cell) / "going-on" / cell.name

    def done(self, cell: Cell) -> bool:
        """Whether the cell was run."""
        return self.of(cell).has(cell.name)

    def ready(self, cell: Cell) -> bool:
        """Whether the network of this cell is there, trained to its end and released."""
        folder = self.folder(cell)
        last = folder / "released" if cell.network.scheme else folder
        return (last / "config.json").exists()

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """What is known of the cell, or None where it was not run.

        Raises:
            UnreadableDataError: the file is no result, or one of other inputs.
        """
        entry = self.of(cell).read(cell.name)
        if entry is None:
            return None
        if entry.get("format") != FORMAT or entry.get("inputs") != cell.inputs:
            raise UnreadableDataError(
                f"{self.path(cell)} is not the result of this cell: format or inputs are others; "
                "remove it, and it will be run again"
            )
        return entry

    def keep(self, cell: Cell, result: Mapping[str, Any], begun: float) -> dict[str, Any]:
        """Write the cell's file; `begun` is the `time.monotonic()` at which it was begun."""
        facts = {
            "format": FORMAT,
            "version": VERSION,
            "cell": cell.slug,
            "plan": cell.plan.name,
            "inputs": cell.inputs,
            "result": dict(result),
            "seconds": round(time.monotonic() - begun, 1),
        }
        return self.of(cell).keep(cell.name, facts)
