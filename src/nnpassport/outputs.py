"""What goes into a network and what comes out of it, whatever its author makes them of."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from nnpassport.scheme import UnsuitableModelError

Example = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""Inputs of a network: one tensor, positional ones, or named ones."""


def call(model: nn.Module, example: Example) -> Any:
    """The network's output on a tensor, on positional or on named inputs."""
    if isinstance(example, Tensor):
        return model(example)
    return model(**example) if isinstance(example, Mapping) else model(*example)


def tensors_in(output: Any) -> list[Tensor]:
    """All tensors in a network's output, whatever it is made of, in a fixed order."""
    if isinstance(output, Tensor):
        return [output]
    parts = list(output.values()) if isinstance(output, Mapping) else output
    if isinstance(parts, list | tuple):
        return [tensor for part in parts for tensor in tensors_in(part)]
    return []


def logits_of(output: Any) -> Tensor:
    """The class scores (batch classes …) in a network's output.

    They are the output itself, what it calls "logits", its only tensor, or the first of a tuple.

    Raises:
        UnsuitableModelError: none of these is there.
    """
    if isinstance(output, Tensor):
        return output
    named = output.get("logits") if isinstance(output, Mapping) else None
    named = getattr(output, "logits", None) if named is None else named
    if isinstance(named, Tensor):
        return named
    tensors = tensors_in(output)
    if tensors and (len(tensors) == 1 or not isinstance(output, Mapping)):
        return tensors[0]
    raise UnsuitableModelError(
        f"the network's output is a {type(output).__name__} of {len(tensors)} tensors, and which "
        "of them are the class scores is not plain; needed: a tensor, something with `logits`, or "
        "a tuple that begins with them; or a loss of your own (task=)"
    )


def part_of(output: Any, start: int, stop: int) -> Any:
    """The same make of output for the images `start` to `stop` of its batch.

    Tensors are cut along their first axis if it is as long as that of the first tensor; scalars (a
    loss of the network's own) and everything else stay as they are.
    """
    tensors = [tensor for tensor in tensors_in(output) if tensor.dim()]
    return _cut(output, start, stop, len(tensors[0])) if tensors else output


def halves_of(output: Any) -> tuple[Any, Any]:
    """An output of twice the batch as two of the same make: public half, private half."""
    batch = next((len(tensor) for tensor in tensors_in(output) if tensor.dim()), 0)
    return part_of(output, 0, batch // 2), part_of(output, batch // 2, batch)


def _cut(output: Any, start: int, stop: int, batch: int) -> Any:
    if isinstance(output, Tensor):
        return output[start:stop] if output.dim() and len(output) == batch else output
    if isinstance(output, Mapping):
        values = {name: _cut(value, start, stop, batch) for name, value in output.items()}
        try:
            return type(output)(**values)  # plain dicts, and Hugging Face's outputs
        except TypeError:
            return values
    if isinstance(output, list | tuple):
        parts = [_cut(part, start, stop, batch) for part in output]
        return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
    return output
