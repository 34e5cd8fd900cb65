"""Results in one file, on their way from an accelerator to where they are kept.

    python benchmarks/accelerator/packed.py merge FILE

into results/reproduction and results/accelerator.

Cells go where `nnpassport reproduce` finds them; the checks, speeds and the bench beside them. What
is there already is kept as it is.
"""

import argparse
import io
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from nnpassport.files.disk import write_atomically
from nnpassport.lab.cells import digest
from nnpassport.lab.store import FORMAT

CHECKOUT = Path(__file__).resolve().parents[2]
CELLS, FACTS = "cells", "facts"
MOST = 16 * 2**20
"""Bytes of the packed file, and of anything in it."""


class Merged(NamedTuple):
    """Files that were new, that were there already, and that are no results, with the reason."""

    new: list[Path]
    kept: list[Path]
    refused: dict[str, str]


def pack(cells: Path, facts: Path, out: Path) -> int:
    """All results of the two folders into one file, whole or not at all; returns how many.

    Of `facts` the small files alone, logs last, so that the file stays small enough to travel.
    """
    held = io.BytesIO()
    named = [
        (f"{CELLS}/{p.relative_to(cells).as_posix()}", p) for p in sorted(cells.glob("*/*.json"))
    ]
    named += [(f"{FACTS}/{p.name}", p) for p in sorted(facts.glob("*.json"))]
    with tarfile.open(fileobj=held, mode="w:gz") as archive:
        for name, path in named:
            archive.add(path, name)
        for path in sorted(facts.glob("*.log")):
            tail = path.read_bytes()[-200_000:]
            entry = tarfile.TarInfo(f"{FACTS}/{path.name}")
            entry.size = len(tail)
            archive.addfile(entry, io.BytesIO(tail))
    if len(held.getvalue()) > MOST:
        raise ValueError(f"{len(held.getvalue())} bytes of results; a file that travels has {MOST}")
    write_atomically(out, held.getvalue())
    return len(named)


def merge(packed: Path, results: Path, facts: Path) -> Merged:
    """Put what is in the packed file where it belongs; nothing that is there is changed."""
    done = Merged([], [], {})
    for name, content in _files(packed):
        parts = PurePosixPath(name).parts
        if parts[0] == CELLS and len(parts) == 3 and ".." not in parts:
            reason, target = _refusal(parts[1], parts[2], content), results / parts[1] / parts[2]
        elif parts[0] == FACTS and len(parts) == 2 and ".." not in parts:
            reason, target = "", facts / packed.name.split(".")[0] / parts[1]
        else:
            reason, target = "it belongs nowhere", results
        if reason:
            done.refused[name] = reason
        elif target.exists():
            done.kept.append(target)
        else:
            write_atomically(target, content)
            done.new.append(target)
    return done


def _refusal(plan: str, name: str, content: bytes) -> str:
    """Why this is no result of the name that it has, or nothing."""
    try:
        entry: dict[str, Any] = json.loads(content)
        if entry["format"] != FORMAT or entry["plan"] != plan:
            return "another format or plan"
        expected = f"{entry['cell']}-{digest(entry['inputs'])[:8]}.json"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"no result: {error}"
    return "" if name == expected else f"its inputs belong to {expected}"


def _files(packed: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(packed, "r:gz") as archive:
        for entry in archive:
            content = archive.extractfile(entry) if entry.isfile() and entry.size <= MOST else None
            if content is not None:
                yield entry.name, content.read()


def main(arguments: list[str] | None = None) -> int:
    """The command of this script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("merge",))
    parser.add_argument("packed", type=Path)
    parser.add_argument("--results", type=Path, default=CHECKOUT / "results" / "reproduction")
    parser.add_argument("--facts", type=Path, default=CHECKOUT / "results" / "accelerator")
    options = parser.parse_args(arguments)
    done = merge(options.packed, options.results, options.facts)
    print(f"{len(done.new)} new, {len(done.kept)} there already, {len(done.refused)} refused")
    for name, reason in done.refused.items():
        print(f"refused: {name}: {reason}")
    return 2 if done.refused else 0


if __name__ == "__main__":
    sys.exit(main())
