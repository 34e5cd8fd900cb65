"""Results: JSON files of what was measured, and on what; no secrets, to be kept and published."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from nnpassport.files.disk import write_atomically
from nnpassport.report.provenance import provenance
from nnpassport.scheme import UnreadableDataError


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a result, whole or not at all.

    Raises:
        UnwritableOutputError: it cannot be written; what was there is as it was.
    """
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, text.encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a result.

    Raises:
        UnreadableDataError: it is none.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnreadableDataError(
            f"{path} is no JSON ({error}); remove it, and it will be run again"
        ) from error
    return found


@final
@dataclass(frozen=True, slots=True)
class Results:
    """Results of one experiment: a JSON for each of its cells, in a folder, known by their names.

    What is there is not run again.
    """

    folder: Path

    def path(self, name: str) -> Path:
        """The file of this name."""
        return self.folder / f"{name}.json"

    def has(self, name: str) -> bool:
        """Whether it was run."""
        return self.path(name).exists()

    def keep(
        self, name: str, facts: Mapping[str, Any], origin: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Write what was found, and where; `origin` is the provenance from when it was begun."""
        entry = {**facts, "provenance": dict(origin or provenance())}
        write_json(self.path(name), entry)
        return entry

    def read(self, name: str) -> dict[str, Any] | None:
        """What is known, or None where it was not run."""
        return read_json(self.path(name)) if self.has(name) else None

    def all(self) -> dict[str, dict[str, Any]]:
        """Everything that was run, by name, in the order of the names."""
        return {path.stem: read_json(path) for path in sorted(self.folder.glob("*.json"))}


def made_with(entry: Mapping[str, Any]) -> str:
    """A result's device and version of torch, in words."""
    made = entry["provenance"]
    return f"{made['device']}, torch {made['torch']}"
