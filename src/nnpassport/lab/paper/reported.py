"""The numbers that were published, to stand beside measured ones; percent and points throughout.

[Fan19] is the paper (NeurIPS 2019, arXiv 1909.07830), [Che23] Chen et al. (CVPR 2023, arXiv
2303.11595). Tasks and columns are called as in `contents`; detection is the share of bits found.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Before(NamedTuple):
    """A percentage after a transfer, and before it."""

    after: float
    before: float


class Baseline(NamedTuple):
    """A row of Table 1."""

    accuracy: Before
    real: Before
    forged: Before


class Removal(NamedTuple):
    """A field of Table 2: accuracy, and bits found; a baseline has no bits."""

    accuracy: float
    detection: float = 100.0


class Cost(NamedTuple):
    """A row of Table 4: more time than the plain network takes, in percent, from and to."""

    training: tuple[float, float]
    inference: float
    resnet50: float


class Substitution(NamedTuple):
    """What [Che23] report: accuracy of the network, of the forgery, and bits that differ."""

    original: float
    forged: float
    differing: float | None


TASKS = ("cifar10", "cifar100")
"""What the paper trains networks on; of other tasks it reports nothing."""

TABLE1: Mapping[tuple[str, str], Baseline] = {
    ("uchida", "cifar100"): Baseline(Before(64.25, 90.97), Before(100, 100), Before(100, 100)),
    ("uchida", "caltech101"): Baseline(Before(74.08, 90.97), Before(100, 100), Before(100, 100)),
    ("adi", "cifar100"): Baseline(Before(65.20, 91.03), Before(25.00, 100), Before(27.80, 100)),
    ("adi", "caltech101"): Baseline(Before(75.06, 91.03), Before(43.60, 100), Before(46.80, 100)),
}
"""[Fan19, Table 1]: AlexNet, CIFAR-10; by scheme and target."""

_COLUMNS = ("baseline BN", "V1 (BN)", "baseline GN", "V2 (GN)", "V3 (GN)")
_ACCURACIES: Mapping[tuple[str, str, str], tuple[float, ...]] = {
    ("alexnet", "cifar10", ""): (91.12, 90.91, 90.88, 89.44, 89.15),
    ("alexnet", "cifar10", "cifar100"): (65.53, 64.64, 62.17, 59.31, 59.41),
    ("alexnet", "cifar10", "caltech101"): (76.33, 73.03, 73.28, 70.87, 71.37),
    ("resnet18", "cifar10", ""): (94.85, 94.62, 93.65, 93.41, 93.26),
    ("resnet18", "cifar10", "cifar100"): (72.62, 69.63, 69.40, 63.84, 63.61),
    ("resnet18", "cifar10", "caltech101"): (78.98, 72.13, 75.08, 71.07, 72.00),
    ("alexnet", "cifar100", ""): (68.26, 68.31, 65.09, 64.09, 63.67),
    ("alexnet", "cifar100", "cifar10"): (89.46, 89.07, 88.30, 87.47, 87.46),
    ("alexnet", "cifar100", "caltech101"): (79.66, 78.83, 78.08, 76.31, 75.89),
    ("resnet18", "cifar100", ""): (76.25, 75.52, 72.06, 72.15, 72.10),
    ("resnet18", "cifar100", "cifar10"): (93.22, 95.28, 91.83, 90.94, 91.30),
    ("resnet18", "cifar100", "caltech101"): (82.88, 79.27, 79.15, 77.34, 77.46),
}
_DETECTIONS: Mapping[tuple[str, str, str, str], float] = {
    ("alexnet", "cifar10", "cifar100", "V2 (GN)"): 99.91,
    ("alexnet", "cifar10", "cifar100", "V3 (GN)"): 99.96,
    ("resnet18", "cifar10", "cifar100", "V3 (GN)"): 99.98,
    ("resnet18", "cifar10", "caltech101", "V3 (GN)"): 99.99,
    ("resnet18", "cifar100", "caltech101", "V1 (BN)"): 99.99,
}
TABLE2: Mapping[tuple[str, str, str, str], Removal] = {
    (*row, column): Removal(accuracy, _DETECTIONS.get((*row, column), 100.0))
    for row, accuracies in _ACCURACIES.items()
    for column, accuracy in zip(_COLUMNS, accuracies, strict=True)
}
"""[Fan19, Table 2]: by architecture, task, target ("" before a transfer) and column."""

LOSS_GOAL: Mapping[tuple[str, str, str, str], float] = {("alexnet", "cifar10", "", "V2 (GN)"): 1.4}
"""Ours, in points, where it is stricter than the paper's own distance to its baseline."""

FIDELITY: Mapping[str, float] = {"alexnet": 3.0, "resnet18": 20.0}
"""[Fan19, section 4.2]: ε_f, how many points of accuracy a presented passport may cost."""

OUTCOMES: Mapping[str, str] = {
    "fake1": "fails, by a large margin",
    "fake2": "fails, by a moderate margin",
    "fake3": "fails, by a moderate to huge margin",
    "fake3 without flips": "passes",
}
"""[Fan19, Table 3]: what F says of a forged passport."""

FAKE1: Mapping[str, float] = {"cifar10": 10.0, "cifar100": 1.0}
"""[Fan19, section 4.2]: accuracy with random passports; the authors' slides: at most 35."""

FAKE2: Mapping[tuple[str, str], float] = {
    ("alexnet", "cifar10"): 84.0,
    ("resnet18", "cifar10"): 70.0,
    ("alexnet", "cifar100"): 44.0,
    ("resnet18", "cifar100"): 35.0,
}
"""[Fan19, section 4.2]: the best accuracy with γ and β trained anew."""

FAKE3: Mapping[float, float] = {0.1: -5.0, 0.5: -50.0}
"""[Fan19, section 4.2], on CIFAR-100: points lost when this share of the signs is flipped."""

PRUNED_SHARE, PRUNED_DETECTION, PRUNED_LOSS = 0.6, 100.0, (5.0, 25.0)
"""[Fan19, section 4.1]: near to 100 % of the bits when 60 % is pruned, for 5 to 25 points."""

TABLE4: Mapping[str, Cost] = {
    "V1": Cost((15.0, 30.0), 10.0, 10.0),
    "V2": Cost((100.0, 125.0), 0.0, 182.0),
    "V3": Cost((100.0, 150.0), 0.0, 191.0),
}
"""[Fan19, Table 4 and section 4.3]; `resnet50` is the training of that network."""

SUBSTITUTION: Mapping[tuple[str, str, float], Substitution] = {
    ("alexnet", "cifar10", 0.1): Substitution(90.08, 88.95, 41.4),
    ("alexnet", "cifar10", 0.02): Substitution(90.20, 84.22, None),
    ("resnet18", "cifar10", 0.1): Substitution(94.39, 93.75, 34.7),
    ("resnet18", "cifar100", 0.1): Substitution(75.05, 73.26, None),
    ("resnet18", "cifar100", 0.02): Substitution(75.05, 70.12, None),
}
"""[Che23], by architecture, task and share of the training images; theirs with three passport
layers for AlexNet at a tenth of the images, with five for ResNet-18."""
