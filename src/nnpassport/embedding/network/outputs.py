"""What goes into a network and what comes out of it, whatever its author makes them of."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
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


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside what DDP and `torch.compile` wrap around it, or itself."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if type(model).__name__ == "DistributedDataParallel":
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def tensors_in(output: Any) -> list[Tensor]:
    """All tensors in a network's output, whatever it is made of, in a fixed order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        parts: Sequence[Any] = list(output.values())
    elif _is_record(output):
        parts = [getattr(output, field.name) for field in fields(output)]
    else:
        parts = output if isinstance(output, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


def with_tensors(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same make of output with every tensor in it changed; everything else stays as it is."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, Mapping):
        values = {name: with_tensors(value, change) for name, value in output.items()}
        try:
            return type(output)(**values)  # plain dicts, and Hugging Face's outputs
        except TypeError:
            return values
    if _is_record(output):
        names = [field.name for field in fields(output)]
        return replace(output, **{n: with_tensors(getattr(output, n), change) for n in names})
    if isinstance(output, list | tuple):
        parts = [with_tensors(part, change) for part in output]
        return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
    return output


def logits_of(output: Any) -> Tensor:
    """The class scores (batch classes …) in a network's output.

    They are the output itself, what it calls "logits", its only tensor, or the first of a tuple.
    Scalars do not count: they are a loss of the network's own.

    Raises:
        UnsuitableModelError: none of these is there.
    """
    if isinstance(output, Tensor):
        return output
    named = output.get("logits") if isinstance(output, Mapping) else None
    named = getattr(output, "logits", None) if named is None else named
    if isinstance(named, Tensor):
        return named
    tensors = [tensor for tensor in tensors_in(output) if tensor.dim()]
    if len(tensors) == 1 or (tensors and isinstance(output, list | tuple)):
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
    batch = len(tensors[0]) if tensors else 0

    def cut(tensor: Tensor) -> Tensor:
        return tensor[start:stop] if tensor.dim() and len(tensor) == batch else tensor

    return with_tensors(output, cut)


def length_of(output: Any) -> int:
    """How many images an output is for: the length of its first tensor that has one, or 0."""
    return next((len(tensor) for tensor in tensors_in(output) if tensor.dim()), 0)


def _is_record(output: Any) -> bool:
    return is_dataclass(output) and not isinstance(output, type)


def parts(inputs: Example, size: int) -> Iterator[Example]:
    """The inputs, so many at a time."""
    for start in range(0, length_of(inputs), size):
        yield part_of(inputs, start, start + size)
