"""Functions that mind mirror images, and functions that do not: what copies carry of both.

python benchmarks/answers_mirrors.py --data FOLDER adds a table to results/answers.json, which
`python benchmarks/answers.py --render` shows. FOLDER has CIFAR-10's test images as Parquet. Every
network here is solved and not trained: ridge regression on a bank of random filters of its own, so
that a minute of one core is enough. The owner's has the key's function on top of its scores.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nnpassport.data.images import read_images
from nnpassport.embedding.schemes.answers import bound_to
from nnpassport.files.disk import write_atomically
from nnpassport.keys.answers import (
    Functions,
    Read,
    coins_of,
    features,
    functions_of,
    key_function,
    read_answers,
)
from nnpassport.keys.context import AnswersForm, Context, TriggerShape
from nnpassport.keys.key import Key
from nnpassport.report.provenance import provenance

ROOT = Path(__file__).parent.parent
KINDS = ("filters", "mirrored")
MINE, THEIRS, ASKED = slice(0, 2_500), slice(2_500, 6_500), slice(6_500, 8_500)
SIZE, CLASSES, COINS, STRENGTH, SHARP, RIDGE = 16, 10, 160, 0.6, 8.0, 3e-3
SEEDS = (1, 2, 3)

Pixels = NDArray[np.uint8]


class Views(NamedTuple):
    """Numbers of all images, and of their mirror images."""

    plain: Any
    mirror: Any


def key_of(seed: int, kind: str, shown: Pixels, before: Read | None = None) -> Key:
    """Of this seed; bound to the inputs where the baseline's scores of them are given."""
    shape = TriggerShape(len(shown), CLASSES, shown.shape[1:])
    form = AnswersForm(kind, COINS, round(1000 * STRENGTH))
    key = Key(bytes([seed] * 32), Context("answers", "owner", (), shape, bytes(16), answers=form))
    return key if before is None else bound_to(key, shown, before, None)


def seen_by(seed: int, images: Views) -> Views:
    """What the filters of a network of its own see of all images."""
    few = images.plain[:64]
    bank = functions_of(key_of(seed, "filters", few, np.eye(CLASSES)[np.arange(64) % 10])).bank
    return Views(*(features("filters", each, bank) for each in images))


class Solved:
    """Ridge regression of targets (inputs classes) on features (inputs features)."""

    def __init__(self, inputs: Read, targets: Read) -> None:
        self._mean, self._scale = inputs.mean(0), inputs.std(0) + 1e-9
        known = self._whole(inputs)
        moments = known.T @ known + RIDGE * len(known) * np.eye(known.shape[1])
        self._weights = np.linalg.solve(moments, known.T @ targets)

    def _whole(self, inputs: Read) -> Read:
        scaled = (inputs - self._mean) / self._scale
        return np.concatenate([scaled, np.ones((len(inputs), 1))], axis=1)

    def __call__(self, inputs: Read) -> Read:
        """Scores (inputs classes)."""
        return np.asarray(self._whole(inputs) @ self._weights)


def copies(seen: Views, labels: Views) -> dict[str, Solved]:
    """Of answers to other images: without mirror images, with them, and with them asked as well."""
    mine, mirror = (each[THEIRS] for each in seen)
    said, other = (np.eye(CLASSES)[each[THEIRS]] for each in labels)
    both = np.concatenate([mine, mirror])
    return {
        "copy by labels": Solved(mine, said),
        "copy by labels, mirror images under the same": Solved(both, np.concatenate([said, said])),
        "copy by labels, mirror images asked as well": Solved(both, np.concatenate([said, other])),
    }


def rows_of(seed: int, kind: str, images: Views, true: Any, base: Views, seen: Views) -> list[Any]:
    """A row for the marked network and for each copy, each also averaged over mirror images."""
    key = key_of(seed, kind, images.plain[ASKED], base.plain[ASKED])
    functions, coins = functions_of(key), coins_of(key)
    marked = Views(
        *(
            scores + key_function(functions, coins, pixels, CLASSES)
            for scores, pixels in zip(base, images, strict=True)
        )
    )
    labels = Views(*(each.argmax(1) for each in marked))
    said = {"marked": Views(*(each[ASKED] for each in marked))}
    for name, copy in copies(seen, labels).items():
        said[name] = Views(*(copy(each[ASKED]) for each in seen))
    found = []
    for name, (plain, mirror) in said.items():
        for averaged, scores in ((False, plain), (True, (plain + mirror) / 2)):
            row = {"seed": seed, "kind": kind, "network": name, "averaged": averaged}
            right = float((scores.argmax(1) == true[ASKED]).mean())
            found.append({**row, "accuracy": right, **read(scores, key, functions)})
    return found


def read(scores: Read, key: Key, functions: Functions) -> dict[str, float | None]:
    """The p-values by scores and by labels, as log10."""
    verdicts = {
        "scores": read_answers(scores, key, functions=functions),
        "labels": read_answers(scores.argmax(1), key, labels=True, functions=functions),
    }
    return {way: verdict.log10_p_value for way, verdict in verdicts.items()}


def main() -> None:
    """Read, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "answers.json")
    given = parser.parse_args()
    data = read_images(str(given.data / "cifar10-test*.parquet"), size=SIZE)
    pixels, true = data.images.numpy()[: ASKED.stop], data.labels.numpy()[: ASKED.stop]
    images = Views(pixels, pixels[..., ::-1])
    own, seen = seen_by(77, images), seen_by(78, images)
    plain = Solved(own.plain[MINE], np.eye(CLASSES)[true[MINE]])
    base = Views(*(SHARP * plain(each) for each in own))
    before = float((base.plain[ASKED].argmax(1) == true[ASKED]).mean())
    rows = []
    for seed in SEEDS:
        for kind in KINDS:
            rows += rows_of(seed, kind, images, true, base, seen)
            print(json.dumps(rows[-8:]), flush=True)
    facts = json.loads(given.out.read_text()) if given.out.exists() else {}
    sizes = {"a_class": COINS // CLASSES, "strength": STRENGTH, "asked": ASKED.stop - ASKED.start}
    made = {**sizes, "before": before, "rows": rows, "provenance": provenance()}
    write_atomically(given.out, (json.dumps({**facts, "mirrors": made}, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
