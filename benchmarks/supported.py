"""Which layers and architectures carry a passport, found by trying: docs/supported.md.

python benchmarks/supported.py writes the page from the networks of tests/zoo.py and from small ones
with one layer and one norm. A test holds the committed page to what this renders now.
"""

import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from nnpassport.alignment.axes import Axes
from nnpassport.embedding.axes import untied
from nnpassport.embedding.marked import mark
from nnpassport.embedding.network.prove import prove
from nnpassport.embedding.network.survey import survey
from nnpassport.embedding.network.trace import trace
from nnpassport.embedding.schemes.passport import V1, V2, Passport
from nnpassport.files.disk import write_atomically
from nnpassport.lab.results import read_json
from nnpassport.lab.tables import table
from nnpassport.scheme import UnsuitableModelError

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "supported.md"
MOVES = ROOT / "results" / "moves.json"
sys.path.insert(0, str(ROOT / "tests"))

import cases  # noqa: E402 - they are beside the tests
import zoo  # noqa: E402

WIDTH = 16  # channels of the layers that are tried
BATCH, LENGTH = 3, 6

# name → the layer, and the shape of its input
LAYERS: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear, of a vector": (partial(nn.Linear, 4, WIDTH), (BATCH, 4)),
    "Linear, of a sequence": (partial(nn.Linear, 4, WIDTH), (BATCH, LENGTH, 4)),
    "GPT-2's Conv1D": (partial(Conv1D, WIDTH, 4), (BATCH, LENGTH, 4)),
    **{
        f"{kind}{axes}d": (
            partial(getattr(nn, f"{kind}{axes}d"), 4, WIDTH, 3),
            (BATCH, 4, *[LENGTH] * axes),
        )
        for kind in ("Conv", "ConvTranspose")
        for axes in (1, 2, 3)
    },
    "Conv2d, depthwise": (
        partial(nn.Conv2d, WIDTH, WIDTH, 3, groups=WIDTH),
        (BATCH, WIDTH, LENGTH, LENGTH),
    ),
}


def _by_axes(kind: str, **settings: bool) -> Callable[[Tensor], nn.Module]:
    """A norm that torch has one class of for each number of axes; it takes axis 1 for channels."""

    def build(features: Tensor) -> nn.Module:
        axes = max(1, features.dim() - 2)
        return getattr(nn, f"{kind}{axes}d")(features.shape[1], **settings)

    return build


def _over_all(kind: type[nn.Module]) -> Callable[[Tensor], nn.Module]:
    """A norm over all axes of an image, or over the last of a sequence."""
    return lambda features: kind(
        features.shape[-1:] if features.shape[-1] == WIDTH else features.shape[1:]
    )


# name → the norm for such features
NORMS: Mapping[str, Callable[[Tensor], nn.Module | None]] = {
    "none": lambda _: None,
    "batch": _by_axes("BatchNorm"),
    "batch, no affine": _by_axes("BatchNorm", affine=False),
    "group": lambda features: nn.GroupNorm(2, features.shape[1]),
    "instance, affine": _by_axes("InstanceNorm", affine=True),
    "layer": _over_all(nn.LayerNorm),
    "RMS": _over_all(nn.RMSNorm),
    "Llama's RMS": lambda features: LlamaRMSNorm(features.shape[-1]),
}


def render() -> str:
    """The page, as Markdown."""
    return "\n".join(
        [
            "# What carries a passport",
            "",
            "Written by `python benchmarks/supported.py`, which tries each: a survey of the",
            "network, then surgery with a key. The architectures are those of `tests/zoo.py`,",
            "where they are trained, released, saved, loaded and verified too. V3 can do what V2",
            "can, for networks that take images.",
            "",
            *_architectures(),
            *_combinations(),
            *_refusals(),
            "",
            cases.render(),
        ]
    )


def _architectures() -> list[str]:
    lines = [
        "## Architectures",
        "",
        "*Layers*: how many of its layers can carry a passport, followed by a norm (V1, V2, V3),",
        "by an activation, or by neither (V2, V3). *Key in*: where the tests put theirs. *Fork*:",
        "from where on a training step of V2 runs twice, and which modules later take what was",
        "doubled beside it; *cost*: its FLOPs over a plain forward's. *Axes*: how many dimensions",
        "a trace finds that may move, and how many are proved by moving them; + pairs that",
        "positions rotate. *Undone*: bits that are read after every free move, aligned to the",
        "network before the mark ([figures](../results/moves.md)).",
        "",
        "| network | class | what it is | layers: norm, activation, neither | refused | key in "
        "| bits | fork | cost | axes found | proved | moves | undone |",
        "| --- " * 13 + "|",
    ]
    return [*lines, *filter(None, map(_architecture, zoo.ZOO))]


def _architecture(name: str) -> str | None:
    """A row of the table; None where its package is not installed."""
    if name == "CREPE" and zoo.pitch_package() is None:
        return None
    network = zoo.ZOO[name]
    torch.manual_seed(0)
    model = network.build()
    example, _ = network.batch(BATCH, 0)
    found = survey(model, example)
    normed = sum(site.norm is not None for site in found.sites.values())
    active = sum(not site.norm and site.activation is not None for site in found.sites.values())
    refused = "; ".join(f"`{layer}`: {reason}" for layer, reason in found.refused.items())
    key = V2.draw_key(model, example, layers=network.layers, seed=bytes(32), passports="derived")
    fork = mark(model, key, example, task=network.task).fork
    at = ", ".join(f"`{place}`" for place in fork.at)
    beside = "".join(f", beside it `{place}`" for place in fork.followers)
    cells = (
        name,
        f"`{type(model).__name__}`",
        network.kind,
        f"{normed}, {active}, {len(found.sites) - normed - active}",
        refused,
        ", ".join(f"`{pattern}`" for pattern in network.layers),
        str(sum(len(key.layer_signs(layer.name)) for layer in key.context.layers)),
        at + beside,
        f"{fork.step_cost:.2f}",
        *_axes(name, network),
    )
    return f"| {' | '.join(cells)} |"


def _axes(name: str, network: zoo.Network) -> tuple[str, str, str, str]:
    """How many axes are found and proved, and what `benchmarks/moves.py` measured on them."""
    torch.manual_seed(0)
    model, (example, _) = untied(network.build()).eval(), network.batch(2, 0)
    traced = trace(model, example)
    proved = prove(model, example, traced)
    row = read_json(MOVES)[name]
    found = f"{row['after']['every free move']} of {row['bits']}"
    return (*(_count(each) for each in (traced, proved)), str(sum(row["moves"].values())), found)


def _count(axes: Axes) -> str:
    return f"{len(axes.axes)}" + (f" + {len(axes.pairs)}" if axes.pairs else "")


def _combinations() -> list[str]:
    notes: dict[str, int] = {}
    rows = [(layer, *(_cell(layer, norm, notes) for norm in NORMS)) for layer in LAYERS]
    return [
        "",
        "## Layers and the norms behind them",
        "",
        "Which schemes a layer can carry with such a norm right behind it; · is a pair that torch",
        "does not run. A norm counts if its weight is one factor for each of the layer's channels,",
        "which is tried, not read off its name.",
        "",
        *table(("layer", *NORMS), rows),
        "",
        *[f"{number}. {reason}" for reason, number in notes.items()],
    ]


def _cell(layer: str, norm: str, notes: dict[str, int]) -> str:
    build, shape = LAYERS[layer]
    example = torch.linspace(-1, 1, int(torch.tensor(shape).prod())).view(shape)
    parts = (build, NORMS[norm])
    try:
        _small(*parts, example).eval()(example)
    except (RuntimeError, ValueError):
        return "·"
    outcomes = {scheme: _refusal(scheme, _small(*parts, example), example) for scheme in (V1, V2)}
    names = [scheme.name[-2:].upper() for scheme, refused in outcomes.items() if refused is None]
    marks = [
        f"<sup>{notes.setdefault(reason, len(notes) + 1)}</sup>"
        for reason in dict.fromkeys(outcomes.values())
        if reason is not None
    ]
    return f"{', '.join(names) or 'no'}{''.join(marks)}"


def _small(
    build: Callable[[], nn.Module], norm: Callable[[Tensor], nn.Module | None], example: Tensor
) -> nn.Module:
    """The layer, its norm, an activation, and a head of three classes."""
    torch.manual_seed(0)
    layer = build()
    with torch.no_grad():
        features = layer(example)
    behind = norm(features)
    return nn.Sequential(
        layer,
        *([] if behind is None else [behind]),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(features[0].numel(), 3),
    )


def _refusal(scheme: Passport, model: nn.Module, example: Tensor) -> str | None:
    """Why the network's layer "0" cannot carry a passport of this scheme, or None if it can."""
    try:
        key = scheme.draw_key(model, example, layers=["0"], seed=bytes(32))
        mark(model, key, example)
    except UnsuitableModelError as error:
        return _without_names(survey(model, example).refused.get("0", str(error)))
    return None


def _without_names(reason: str) -> str:
    """The same refusal for every network: that of V1 names the norm's class before it says why."""
    _, found, why = reason.partition(" without ")
    return f"without {why}" if found else reason.replace("its norm 1", "the norm")


class _Attention(nn.Module):
    """Attention of torch's own, which multiplies with its layers' weights itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Scores (batch length 3) of a sequence (batch length width)."""
        return self.head(self.attention(x, x, x, need_weights=False)[0])


def _computed() -> nn.Module:
    layer = parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
    return nn.Sequential(layer, nn.ReLU(), nn.Linear(WIDTH, 3))


class _Reused(nn.Module):
    """Two layers that share one norm."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Scores (batch length 3) of a sequence (batch length width)."""
        return self.head(self.norm(self.two(self.norm(self.one(x)))))


REFUSED: Mapping[str, tuple[Callable[[], nn.Module], str]] = {
    "the head": (_Reused, "head"),
    "a layer that shares its norm with another": (_Reused, "one"),
    "a layer under weight norm": (_computed, "0"),
    "the layer inside torch's MultiheadAttention": (_Attention, "attention.out_proj"),
}


def _refusals() -> list[str]:
    example = torch.linspace(-1, 1, BATCH * LENGTH * WIDTH).view(BATCH, LENGTH, WIDTH)
    reasons = {
        what: survey(build(), example).refused[layer] for what, (build, layer) in REFUSED.items()
    }
    return [
        "",
        "## Layers that no norm helps",
        "",
        *table(("layer", "why it is refused"), reasons.items()),
        "",
        "Weights that are not those of a convolution or a matrix (embeddings, LSTMs, experts kept",
        "in one tensor) are not looked at.",
    ]


if __name__ == "__main__":
    write_atomically(PAGE, render().encode())
    print(PAGE)
