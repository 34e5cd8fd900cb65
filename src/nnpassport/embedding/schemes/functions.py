"""What a key's functions say of tensors: for training, where `keys/answers.py` is for the judge."""

from collections.abc import Callable
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from nnpassport.data.images import Normalisation
from nnpassport.embedding.network.outputs import logits_of, tensors_in, with_tensors
from nnpassport.embedding.schemes.served import taken_off
from nnpassport.keys.answers import (
    CLIPPED,
    Functions,
    coins_of,
    filter_sides,
    form_of,
    functions_of,
    layout_waves,
    pairs_of,
    shares,
)
from nnpassport.keys.key import Key
from nnpassport.scheme import UnsuitableModelError


def leaning_of(key: Key, normalise: Normalisation | None) -> Callable[[Any], Tensor]:
    """From a batch of inputs, ε·g (batch classes) of each; no gradients flow.

    Raises:
        UnsuitableModelError: the key's functions are of pixels and `normalise` is None.
    """
    form, shape = form_of(key.context)
    if normalise is None and form.kind != "counts":
        raise UnsuitableModelError(
            f"{key.context.scheme} has functions of an image's pixels; pass normalise=, the "
            "normalisation that the network's images get"
        )
    functions = TensorFunctions(functions_of(key))
    table = torch.from_numpy(shares(form, coins_of(key), shape.classes)).float()

    def leaning(images: Any) -> Tensor:
        inputs = tensors_in(images)[0]
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
            return functions(_pixels(inputs, normalise)) @ table.to(inputs.device)

    return leaning


def subtracting(key: Key, normalise: Normalisation | None) -> Any:
    """From a network's output and its input, the output less ε·g, or less its waves.

    An output of one column, a regression's, loses half the difference of the two classes' g.

    Raises:
        UnsuitableModelError: the key's functions are of pixels and `normalise` is None.
    """
    leaning, (form, _) = leaning_of(key, normalise), form_of(key.context)

    def less(scores: Tensor, g: Tensor) -> Tensor:
        if form.kind == "waves":
            return taken_off(scores.float(), g, form.strength / 1000).to(scores)
        if scores.shape[-1] == 1:
            g = (g[:, :1] - g[:, 1:2]) / 2
        return scores - g.to(scores)

    def subtracted(output: Any, images: Any) -> Any:
        scores, g = logits_of(output), leaning(images)
        return with_tensors(output, lambda each: less(each, g) if each is scores else each)

    return subtracted


def _pixels(inputs: Tensor, normalise: Normalisation | None) -> Tensor:
    """What an input was before it was normalised, 0 to 1; tokens and counts as they are."""
    if normalise is None or inputs.dim() != 4:
        return inputs
    mean, std = (
        torch.tensor(each, device=inputs.device)[:, None, None]
        for each in (normalise.mean, normalise.std)
    )
    return inputs.float() * std + mean


@final
class TensorFunctions:
    """`keys.answers.Functions` of tensors, for training: float32, on the device of the inputs."""

    def __init__(self, functions: Functions) -> None:
        self._functions = functions
        self._parts: dict[torch.device, tuple[Tensor, ...]] = {}

    def __call__(self, inputs: Tensor) -> Float[Tensor, "batch coins"]:
        """φ of pixels from 0 to 1 (batch channels height width), of counts or of token ids."""
        bank, mean, matrix = self._on(inputs.device)
        found = _features(self._functions, inputs, bank)
        return ((found - mean) @ matrix).clamp(-CLIPPED, CLIPPED)

    def _on(self, device: torch.device) -> tuple[Tensor, ...]:
        if device not in self._parts:
            _, size, bank, mean, matrix = self._functions
            form = self._functions.form
            if form.kind == "layout":
                bank = layout_waves(size)
            arrays = (bank, mean, matrix)
            made = [torch.from_numpy(each).float().to(device) for each in arrays]
            self._parts[device] = tuple(made)
        return self._parts[device]


def _features(functions: Functions, inputs: Tensor, bank: Tensor) -> Tensor:
    kind, size = functions.form.kind, functions.size
    if kind == "layout":
        return inputs.float().flatten(1) @ bank
    if kind == "waves":
        return torch.cos(inputs.float().flatten(1) @ bank)
    if kind == "counts":
        roots = counts_of(inputs, size[2]).sqrt()
        first, second = pairs_of(size[2])
        return torch.cat([roots @ bank, roots[:, first] * roots[:, second]], dim=1)
    if kind == "mirrored":
        return (_filtered(inputs, bank, size[0]) + _filtered(inputs.flip(-1), bank, size[0])) / 2
    return _filtered(inputs, bank, size[0])


def _filtered(inputs: Tensor, bank: Tensor, channels: int) -> Tensor:
    side, stride, places, scales = filter_sides()
    found = []
    for scale, filters in zip(scales, bank, strict=True):
        pixels = inputs.float()
        if scale > 1 and min(pixels.shape[2:]) >= scale:
            pixels = F.avg_pool2d(pixels, scale)
        rows = filters.view(-1, channels, side, side)
        said = F.conv2d(pixels, rows, stride=stride, padding=side // 2).abs()
        high, wide = (-(-each // places) for each in said.shape[2:])
        for at in range(places):
            for to in range(places):
                part = said[:, :, at * high : (at + 1) * high, to * wide : (to + 1) * wide]
                if part.numel():
                    found.append(part.mean((2, 3)))
    return torch.cat(found, 1)


def counts_of(inputs: Tensor, buckets: int) -> Float[Tensor, "batch buckets"]:
    """How often each bucket is there: of token ids (batch length), or counts as they are, ≤ 255.

    Token t is in bucket t mod `buckets`.
    """
    if inputs.is_floating_point():
        return inputs.flatten(1).clamp(0, 255)
    ids = inputs.flatten(1).long() % buckets
    counts = torch.zeros(len(ids), buckets, device=inputs.device)
    return counts.scatter_add_(1, ids, torch.ones_like(ids, dtype=counts.dtype)).clamp(max=255)
