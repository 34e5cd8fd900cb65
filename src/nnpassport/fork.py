"""Two branches, one trunk: find where the public and the private network part.

Before the first passport the two are the same computation. The trunk runs once; at the fork the
batch is doubled, and the rest runs on both halves in one forward. A candidate place counts only if
its outputs equal those of two separate passes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nnpassport.layers import (
    Branch,
    BranchNorm,
    PassportNorm,
    branched,
    on_branch,
    passport_norms,
    replace_module,
    set_branch,
)
from nnpassport.scheme import UnsuitableModelError
from nnpassport.survey import Example, call, tensors_in


def find_fork(model: nn.Module, example: Example) -> None:
    """Set the fork, in place, at the narrowest place that works, and prove it.

    Candidates are the first passport layers themselves (the layer and the normalisation before the
    affine are shared too), then the modules around the first one, and at last the whole network.
    Norms with running statistics after the fork get a set for each branch.

    Raises:
        UnsuitableModelError: not even forking the whole network's batch gives both outputs.
    """
    norms = passport_norms(model)
    example = _noise_like(example)
    batch = _leading(example)
    expected = _two_passes(model, example)
    first = next(iter(norms.values()))
    candidates = [None, *_ancestors(next(iter(norms)))] if expected else []
    for ancestor in candidates:
        if ancestor is not None:
            model.get_submodule(ancestor).register_forward_pre_hook(
                first.fork_input, with_kwargs=True
            )
        if _forks_well(model, example, batch, expected):
            _split_statistics(model, example, batch)
            return
        unhook(model)
    raise UnsuitableModelError(
        f"the two branches of {type(model).__name__} cannot run in one forward: twice the batch "
        "does not give twice the outputs; use scheme V1, or a model whose first axis is the batch"
    )


def _two_passes(model: nn.Module, example: Example) -> list[Tensor]:
    """Each output of the public network joined to the private one's; none if it did not run."""
    try:
        with torch.no_grad(), on_branch(model, Branch.PUBLIC):
            public = tensors_in(call(model, example))
            set_branch(model, Branch.PRIVATE)
            private = tensors_in(call(model, example))
        return [torch.cat(pair) for pair in zip(public, private, strict=True)]
    except Exception:  # the user's own code may raise anything on a batch of two
        return []


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")[:-1]
    return [".".join(parts[:depth]) for depth in range(len(parts), -1, -1)]


def _noise_like(example: Example) -> Example:
    """A batch of two like the example, its floats replaced by noise: zeros would prove little."""
    generator = torch.Generator().manual_seed(0)

    def noise(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        pair = torch.cat([value[:1], value[-1:]])
        if not pair.is_floating_point():
            return pair
        return torch.randn(pair.shape, generator=generator).to(pair)

    if isinstance(example, Mapping):
        return {key: noise(value) for key, value in example.items()}
    return noise(example) if isinstance(example, Tensor) else tuple(noise(v) for v in example)


def _leading(example: Example) -> int:
    return len(tensors_in(example)[0])


def _forks_well(model: nn.Module, example: Example, batch: int, expected: Sequence[Tensor]) -> bool:
    handles = [
        norm.register_forward_pre_hook(_fork_where_the_batch_is(batch))
        for norm in passport_norms(model).values()
    ]
    try:
        with torch.no_grad(), on_branch(model, Branch.BOTH):
            outputs = tensors_in(call(model, example))
    except Exception:
        # Shapes that do not meet, or an assertion of the user's own: this place is too narrow.
        return False
    finally:
        for handle in handles:
            handle.remove()
    return len(outputs) == len(expected) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-4)
        for a, b in zip(outputs, expected, strict=True)
    )


def _fork_where_the_batch_is(batch: int) -> Callable[..., None]:
    def hook(norm: nn.Module, args: tuple[Any, ...]) -> None:
        norm.forks = len(args[0]) == batch  # type: ignore[assignment]

    return hook


def _split_statistics(model: nn.Module, example: Example, batch: int) -> None:
    """Give every norm with running statistics that runs after the fork a set for each branch."""
    inside = {id(n) for m in branched(model) for n in (m.norm, m.private_norm)}
    after: list[str] = []

    def note(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            if len(args[0]) == 2 * batch:
                after.append(name)

        return hook

    handles = [
        module.register_forward_pre_hook(note(name))
        for name, module in model.named_modules()
        if getattr(module, "running_mean", None) is not None and id(module) not in inside
    ]
    with torch.no_grad(), on_branch(model, Branch.BOTH):
        call(model, example)
    for handle in handles:
        handle.remove()
    for name in dict.fromkeys(after):
        norm = model.get_submodule(name)
        replace_module(model, name, BranchNorm(norm).train(norm.training))


def forked_at(model: nn.Module) -> tuple[str, ...]:
    """Where the batch is forked: names of passport layers, or of the module whose input is."""
    for name, module in model.named_modules():
        if any(_is_fork(hook) for hook in module._forward_pre_hooks.values()):
            return (name or type(model).__name__,)
    return tuple(name for name, norm in passport_norms(model).items() if norm.forks)


def _is_fork(hook: Any) -> bool:
    return isinstance(getattr(hook, "__self__", None), PassportNorm)


def unhook(model: nn.Module) -> None:
    """Take the fork's hook, if there is one, off every module."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if _is_fork(hook):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
