"""Bring data and missing packages to a machine with an accelerator, in few and small calls.

    python benchmarks/accelerator/stage.py pack --data FOLDER   here, into runs/accelerator/pieces
    python benchmarks/accelerator/stage.py look                 there: what it has and lacks
    python benchmarks/accelerator/stage.py unpack               there: data, and packages it lacks

Needs nothing but Python on the other side. A piece is a folder with one file of bytes and a copy of
the manifest; all pieces one after the other are the files that the manifest names.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]
ROOT = CHECKOUT / "runs" / "accelerator"
MANIFEST, BYTES = "manifest.json", "bytes"
MEBIBYTE = 2**20
SLACK = MEBIBYTE // 4  # of a call: names, and what is packed around the files
SETS = ("cifar10", "cifar100", "caltech101")
NEEDED = SETS[:1]
LIGHT = (
    *("cryptography", "cffi", "pycparser", "rfc3161-client", "accelerate", "jaxtyping"),
    *("wadler-lindig", "jinja2", "markupsafe", "safetensors", "huggingface-hub", "hf-xet", "httpx"),
    *("httpcore", "h11", "anyio", "certifi", "idna", "typer", "click", "rich", "pygments"),
    *("markdown-it-py", "mdurl", "shellingham", "tqdm", "pyyaml", "psutil", "packaging"),
    *("filelock", "fsspec", "typing-extensions", "annotated-doc", "joblib"),
)
"""What a machine with PyTorch may lack and is small: 17 MiB in all."""
HEAVY = ("numpy", "scipy", "pillow", "pyarrow")
"""What must be there, or be named with --wheels: 15, 34, 7 and 53 MiB."""
PLATFORMS = ("2_34", "2_31", "2_28", "2_27", "2_17")


class TooLargeError(Exception):
    """What has to be brought does not fit into the calls."""


class Piece(NamedTuple):
    """One file to be brought, by its place under `ROOT` on the other side."""

    name: str
    path: Path

    @property
    def size(self) -> int:
        """Bytes."""
        return self.path.stat().st_size


def files_of(data: Path, tasks: Iterable[str]) -> dict[str, list[Piece]]:
    """The files of each set of images that the folder has."""
    from nnpassport.lab.tasks import TASKS, missing  # noqa: PLC0415 - not on the other side

    found = {}
    for task in tasks:
        if not missing(data, task):
            paths = [path for name in TASKS[task][:2] for path in sorted(data.glob(name))]
            found[task] = [Piece(f"data/{path.name}", path) for path in paths]
    return found


def chosen(
    wheels: list[Piece], sets: Mapping[str, list[Piece]], room: int
) -> tuple[list[Piece], list[str]]:
    """Wheels, then as many of the sets as there is room for, in their order; and what is left out.

    Raises:
        TooLargeError: the first set does not fit.
    """
    taken, left_out = [*wheels], []
    for task, pieces in sets.items():
        if left_out or sum(each.size for each in [*taken, *pieces]) > room:
            left_out.append(task)
        else:
            taken += pieces
    if lost := [task for task in NEEDED if task in left_out]:
        size = sum(each.size for each in [*wheels, *sets[lost[0]]])
        raise TooLargeError(
            f"{', '.join(lost)} does not fit: {size / MEBIBYTE:.1f} MiB with the wheels, and the "
            f"calls have room for {room / MEBIBYTE:.1f}; allow more --calls, or fewer --wheels"
        )
    return taken, left_out


def pack(pieces: list[Piece], into: Path, *, most: int, commit: str | None) -> list[Path]:
    """Write the pieces' bytes into folders of at most `most` bytes each; returns the folders."""
    total = sum(each.size for each in pieces)
    count = max(1, -(-total // most))
    manifest = {
        "commit": commit,
        "pieces": count,
        "files": [
            {"name": each.name, "size": each.size, "sha256": _sha256(each.path)} for each in pieces
        ],
    }
    stream = _read_all(each.path for each in pieces)
    folders, rest = [], b""
    for number in range(1, count + 1):
        folder = into / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        left = -(-total // count) if number < count else total
        with (folder / BYTES).open("wb") as out:
            while left and (block := rest or next(stream, b"")):
                out.write(block[:left])
                rest, left = block[left:], max(0, left - len(block))
        folders.append(folder)
    return folders


def unpack(pieces: Path, into: Path) -> dict[str, Any]:
    """Put the files together again, each checked against its digest; returns the manifest.

    Raises:
        FileNotFoundError: a piece is not there.
        ValueError: a file is not what was packed.
    """
    there = sorted((p.parent for p in pieces.glob(f"*/{MANIFEST}")), key=lambda p: int(p.name))
    if not there:
        raise FileNotFoundError(f"{pieces} has no piece; needed: the folders that pack has written")
    manifest: dict[str, Any] = json.loads((there[0] / MANIFEST).read_text())
    paths = [pieces / str(number) / BYTES for number in range(1, manifest["pieces"] + 1)]
    if lacking := [str(path.parent) for path in paths if not path.exists()]:
        raise FileNotFoundError(f"not there: {', '.join(lacking)}; bring them with calls before")
    stream, rest = _read_all(paths), b""
    for entry in manifest["files"]:
        target = _inside(into, entry["name"])
        target.parent.mkdir(parents=True, exist_ok=True)
        left, hashed = entry["size"], hashlib.sha256()
        with target.open("wb") as out:
            while left and (block := rest or next(stream, b"")):
                out.write(block[:left])
                hashed.update(block[:left])
                rest, left = block[left:], max(0, left - len(block))
        if hashed.hexdigest() != entry["sha256"]:
            target.unlink()
            raise ValueError(
                f"{entry['name']} is not what was packed: pieces of different packings?"
            )
    (into / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def install_missing(wheels: Path, site: Path) -> list[str]:
    """Unzip those wheels into `site` whose packages this Python lacks; no installer is needed."""
    done = []
    for wheel in sorted(wheels.glob("*.whl")):
        name = wheel.name.split("-")[0]
        if version_of(name) is None:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
            done.append(name)
    return done


def version_of(name: str) -> str | None:
    """The version that is installed, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def look() -> dict[str, Any]:
    """What this machine has, and what the kit would miss on it."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "missing": [name for name in (*LIGHT, *HEAVY, "torch") if version_of(name) is None],
    }
    try:
        import torch  # noqa: PLC0415 - may be missing
    except ImportError as error:
        return found | {"torch": f"cannot be imported: {error}"}
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return found | {"torch": torch.__version__, "cuda": torch.version.cuda, "devices": devices}


def fetch_wheels(names: Iterable[str], folder: Path, python: str) -> list[Piece]:
    """Download wheels for another machine: x86-64 Linux, and that Python."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [*names]
    if names:
        tags = [word for tag in PLATFORMS for word in ("--platform", f"manylinux_{tag}_x86_64")]
        options = ["--no-deps", "--only-binary=:all:", "--implementation", "cp", *tags]
        options += ["--platform", "manylinux2014_x86_64", "--python-version", python]
        constraints = ["-c", str(CHECKOUT / "constraints.txt")]
        command = [sys.executable, "-m", "pip", "download", "-q", *options, *constraints]
        subprocess.run([*command, "-d", str(folder), *names], check=True)
    wanted = {_plain(name) for name in names}
    wheels = [path for path in sorted(folder.glob("*.whl")) if _plain(path.name) in wanted]
    return [Piece(f"wheels/{path.name}", path) for path in wheels]


def lacking(names: Iterable[str], there: str) -> list[str]:
    """Of these packages, those that a list of what is there (as pip prints it) does not name."""
    known = {_plain(word) for word in re.split(r"[\s,;=]+", there) if word}
    return [name for name in names if _plain(name) not in known]


def tree_size() -> int:
    """Bytes of the checkout that travel with every call: all but what git ignores."""
    options = ["--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(
        ["git", "ls-files", *options], cwd=CHECKOUT, capture_output=True, check=True
    ).stdout
    paths = [CHECKOUT / os.fsdecode(name) for name in set(listed.split(b"\0")) if name]
    return sum(path.stat().st_size for path in paths if path.is_file())


def commit() -> str | None:
    """The checkout's commit, with a plus where files differ from it."""

    def said(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=CHECKOUT, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    return said("rev-parse", "HEAD") + ("+" if said("status", "--porcelain") else "") or None


def main(arguments: list[str] | None = None) -> int:
    """The commands of this script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("pack", "look", "unpack"))
    parser.add_argument("--root", type=Path, default=ROOT)
    parser.add_argument("--data", type=Path, help="folder of the Parquet files")
    parser.add_argument("--wheels", nargs="*", default=[], help="packages beside the usual ones")
    parser.add_argument("--there", type=Path, help="a list of packages that are there already")
    parser.add_argument("--no-wheels", action="store_true", help="bring data alone")
    parser.add_argument("--python", default="3.12", help="of the other side")
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--mebibytes", type=float, default=64.0, help="that may go in with a call")
    options = parser.parse_args(arguments)
    if options.what == "look":
        print(json.dumps(look(), indent=1))
        return 0
    if options.what == "unpack":
        manifest = unpack(options.root / "pieces", options.root)
        done = install_missing(options.root / "wheels", options.root / "site")
        print(
            f"unpacked {len(manifest['files'])} files; packages added: {', '.join(done) or 'none'}"
        )
        return 0
    return _packed(options)


def _packed(options: argparse.Namespace) -> int:
    there = options.there.read_text() if options.there else ""
    names = [] if options.no_wheels else lacking([*LIGHT, *options.wheels], there)
    wheels = fetch_wheels(names, options.root / "fetched", options.python)
    tree = tree_size()
    most = int(options.mebibytes * MEBIBYTE) - tree - SLACK
    try:
        sets = files_of(options.data, SETS) if options.data else {}
        pieces, left_out = chosen(wheels, sets, options.calls * most)
    except TooLargeError as error:
        print(error, file=sys.stderr)
        return 2
    for folder in pack(pieces, options.root / "pieces", most=most, commit=commit()):
        print(f"{(folder / BYTES).stat().st_size / MEBIBYTE:6.1f} MiB  {folder}")
    there_too = [task for task in sets if task not in left_out]
    print(f"{tree / MEBIBYTE:6.1f} MiB  the checkout, with every call")
    print(f"packed: {len(wheels)} wheels; {', '.join(there_too) or 'no images'}")
    if left_out:
        print(f"left out, no room: {', '.join(left_out)}")
    return 0


def _inside(folder: Path, name: str) -> Path:
    target = (folder / name).resolve()
    if not target.is_relative_to(folder.resolve()):
        raise ValueError(f"{name!r} leads out of {folder}")
    return target


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.split("-", 1)[0] if name.endswith(".whl") else name).lower()


def _sha256(path: Path) -> str:
    hashed = hashlib.sha256()
    for block in _read_all([path]):
        hashed.update(block)
    return hashed.hexdigest()


def _read_all(paths: Iterable[Path]) -> Iterator[bytes]:
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(MEBIBYTE):
                yield block


if __name__ == "__main__":
    sys.exit(main())
