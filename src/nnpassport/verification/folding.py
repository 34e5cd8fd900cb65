"""Norms that were folded into the layers before them, as exporters, compilers and `fuse` do.

    y = γ(Wx − μ)/σ + β    becomes    y = W′x + b′,    W′ = Wγ/σ

What is read of W′ alone then has the sign of γ in it, and a passport's bits are in such signs.
Where a key's form reads bits together with γ, W′ holds both and is read as it is. Where it does
not, bits can be lost, so a mark that is not found there is not one that is not there.
"""

import math
from collections.abc import Mapping
from typing import Any

from nnpassport.keys.context import LayerShape
from nnpassport.keys.key import Key
from nnpassport.keys.reading import READERS, read_product
from nnpassport.scheme import FoldedNormsError

_OF_NORMS = (".weight", ".gamma", ".running_mean", ".running_var")
_MATRIX = 2


def folded_layers(described: Mapping[str, Any], key: Key) -> list[str]:
    """The key's layers behind which a norm seems to be folded in: by headers, `described`, alone.

    A key of channels names the norm: it is gone. Of others, a convolution (with V1, whose bits are
    in a norm, any layer) has a bias, and no norm of as many channels is anywhere in the file.
    """
    if READERS.get(key.context.scheme) is read_product:
        return []
    widths = {
        math.prod(each.shape)
        for name, each in described.items()
        if len(each.shape) == 1 and name.endswith(_OF_NORMS)
    }
    named = [name.rpartition(".")[0] for name in described]
    return [
        layer.name
        for layer in key.context.layers
        if _gone(layer, named) or _suspicious(layer, described, widths, key)
    ]


def refuse_folded(described: Mapping[str, Any], key: Key, found: str) -> None:
    """Refuse to say no of a network whose norms may be folded; `found` is what was read of it.

    Raises:
        FoldedNormsError: they may be.
    """
    layers = folded_layers(described, key)
    if not layers:
        return
    shown = f"{', '.join(layers[:5])}{', …' if len(layers) > 5 else ''}"
    raise FoldedNormsError(
        f"norms seem to be folded into {shown}: they have biases and no norm behind them, as "
        "exporters and fusing leave it, and what was read is not what the mark was put into "
        f"({found}); needed: the owner's network to unfold them against (`verify --align "
        "FOLDER`, in Python Options.alignment; before a judge a claim with a reference, proved "
        "older than the suspect), or the file from before they were folded"
    )


def _gone(layer: LayerShape, named: list[str]) -> bool:
    """Whether the norm that the bits are read with is not there, and nothing of it."""
    form = layer.channels
    return form is not None and bool(form.norm) and form.norm not in named


def _suspicious(
    layer: LayerShape, described: Mapping[str, Any], widths: set[int], key: Key
) -> bool:
    if layer.channels is not None:
        return False
    out, bias = layer.weight[0], described.get(f"{layer.name}.bias")
    normed = key.context.scheme == "passport-v1" or len(layer.weight) > _MATRIX
    return normed and bias is not None and tuple(bias.shape) == (out,) and out not in widths
