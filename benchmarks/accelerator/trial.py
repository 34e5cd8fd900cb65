"""The whole kit on a processor with the embedded digits: packed, unpacked, run, brought home.

    make accelerator-trial

Nothing in it is met for the first time on the device but the device. Exit code 1 if anything is
wrong.
"""

import argparse
import io
import json
import subprocess
import sys
from pathlib import Path
from shutil import rmtree

import pyarrow as pa
from PIL import Image
from pyarrow import parquet

from nnpassport.data.images import read_images
from nnpassport.lab.plans import TRIAL
from nnpassport.lab.store import Store

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1] / "runs" / "accelerator-trial"


def write_data(folder: Path) -> None:
    """Digits under CIFAR-10's names, which is what `stage.py` packs."""
    folder.mkdir(parents=True)
    for name, split in (("cifar10-train-0.parquet", "train"), ("cifar10-test.parquet", "test")):
        data = read_images("digits", split=split, size=32)
        pictures = []
        for pixels in data.images:
            held = io.BytesIO()
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(held, "PNG")
            pictures.append({"bytes": held.getvalue(), "path": ""})
        table = pa.table({"image": pictures, "label": data.labels.numpy()})
        parquet.write_table(table, folder / name)


def main(arguments: list[str] | None = None) -> int:
    """The command of this script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--root", type=Path, default=ROOT)
    options = parser.parse_args(arguments)
    root: Path = options.root.resolve()
    rmtree(root, ignore_errors=True)
    here, there = root / "here", root / "there"
    write_data(here / "data")
    _python("stage.py", "pack", "--root", here, "--data", here / "data", "--no-wheels")
    (here / "pieces").rename(_made(there) / "pieces")
    _python("stage.py", "look")
    _python("stage.py", "unpack", "--root", there)
    out, known = root / "out", root / "known"
    run = ("--root", there, "--out", out, "--known", known, "--minutes", options.minutes)
    _python("run.py", *run, "--plan", "trial", "--jobs", 2, "--small")
    _python(
        "packed.py", "merge", out / "results.tar.gz", "--results", known, "--facts", root / "facts"
    )
    return _verdict(Store(known, root, None), root / "facts" / "results")


def _verdict(store: Store, facts: Path) -> int:
    """Whether everything came home."""
    run = json.loads((facts / "run.json").read_text())
    check = json.loads((facts / "check.json").read_text())
    found = len(list((store.results / TRIAL.name).glob("*.json")))
    wrong = [*check["wrong"], *run["failures"].values()]
    wrong += [f"{name}: {how}" for name, how in run["stages"].items() if how != "done"]
    wrong += [] if found else ["no cell came home"]
    print(f"{found} of {run['of']} cells came home; wrong: {'; '.join(wrong) or 'nothing'}")
    return 1 if wrong else 0


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _python(*words: object) -> None:
    subprocess.run([sys.executable, str(HERE / str(words[0])), *map(str, words[1:])], check=True)


if __name__ == "__main__":
    sys.exit(main())
