"""Two branches, one trunk: find where the public and the private network part.

Before the first passport the two are the same computation. The trunk runs once; at the fork the
batch is doubled, and the rest runs on both halves in one forward. A candidate place counts only if
its outputs equal those of two separate passes.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nnpassport.layers import (
    Branch,
    BranchNorm,
    PassportNorm,
    branched,
    on_branch,
    passport_norms,
    replace_module,
    set_branch,
    twice,
)
from nnpassport.outputs import Example, call, tensors_in
from nnpassport.scheme import UnsuitableModelError


class Fork(NamedTuple):
    """Where the batch is doubled for two branches, and what it costs.

    Attributes:
        at: passport layers, or the one module whose input is doubled.
        followers: modules after it that also take something from before it, such as a mask.
        step_cost: FLOPs of a forward in two branches over those of a plain one, in 1…2; about what
            a training step costs beside the plain network's.
    """

    at: tuple[str, ...]
    followers: tuple[str, ...]
    step_cost: float


def find_fork(model: nn.Module, example: Example) -> Fork:
    """Set the fork, in place, at the narrowest place that works, and prove it.

    Candidates are the first passport layers themselves (the layer and the normalisation before the
    affine are shared too), then the modules around the first one, and at last the whole network.
    Where a later module also takes what did not pass the fork (an attention mask), that is doubled
    there. Norms with running statistics after the fork get a set for each branch.

    `example` must have all the inputs that training has: a mask that is not there is not followed.

    Raises:
        UnsuitableModelError: not even forking the whole network's batch gives both outputs.
    """
    noise = _noise_like(example)
    expected, order = _two_passes(model, noise)
    candidates = [None, *_ancestors(order[0])] if expected else []
    for ancestor in candidates:
        if _forks_well(model, noise, ancestor, expected):
            _split_statistics(model, noise)
            return Fork(forked_at(model), _followers(model), _step_cost(model, noise))
        unhook(model)
    raise UnsuitableModelError(
        f"the two branches of {type(model).__name__} cannot run in one forward: twice the batch "
        "does not give twice the outputs; use scheme V1, or a model whose first axis is the batch"
    )


def _two_passes(model: nn.Module, example: Example) -> tuple[list[Tensor], list[str]]:
    """Each output of the public network joined to the private one's; none if it did not run.

    With them the passport layers in the order in which they ran.
    """
    order: list[str] = []
    norms = passport_norms(model)
    handles = [
        norm.register_forward_pre_hook(lambda *_, name=name: order.append(name))
        for name, norm in norms.items()
    ]
    try:
        with torch.no_grad(), on_branch(model, Branch.PUBLIC):
            public = tensors_in(call(model, example))
            set_branch(model, Branch.PRIVATE)
            private = tensors_in(call(model, example))
        return [torch.cat(pair) for pair in zip(public, private, strict=True)], order
    except Exception:  # the user's own code may raise anything on a batch of three
        return [], order
    finally:
        for handle in handles:
            handle.remove()


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")[:-1]
    return [".".join(parts[:depth]) for depth in range(len(parts), -1, -1)]


def _noise_like(example: Example) -> Example:
    """A batch of three like the example, its floats replaced by noise: zeros would prove little."""
    generator = torch.Generator().manual_seed(0)

    def noise(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        batch = torch.cat([value[:1], value[-1:], value[:1]])
        if not batch.is_floating_point():
            return batch
        return torch.randn(batch.shape, generator=generator).to(batch)

    if isinstance(example, Mapping):
        return {key: noise(value) for key, value in example.items()}
    return noise(example) if isinstance(example, Tensor) else tuple(noise(v) for v in example)


def _forks_well(
    model: nn.Module, example: Example, ancestor: str | None, expected: Sequence[Tensor]
) -> bool:
    """Fork at the passport layers (None) or at this module, and compare with two passes."""
    batch = len(tensors_in(example)[0])
    norms = passport_norms(model)
    if ancestor is not None:
        hook = next(iter(norms.values())).fork_input
        model.get_submodule(ancestor).register_forward_pre_hook(hook, with_kwargs=True)
    found: dict[str, frozenset[int | str]] = {}
    sizes: dict[str, set[int]] = {}
    handles = [
        norm.register_forward_pre_hook(
            _fork_where_the_batch_is(batch, sizes.setdefault(name, set()))
        )
        for name, norm in norms.items()
    ]
    handles += [
        module.register_forward_pre_hook(_follow(name, batch, found), with_kwargs=True)
        for name, module in model.named_modules()
        if name != ancestor
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
    for name, named in found.items():
        follow = partial(next(iter(norms.values())).fork_named, named)
        model.get_submodule(name).register_forward_pre_hook(follow, with_kwargs=True)
    # A layer that runs twice, once on each side of the fork, could not tell which side it is on.
    return (
        all(len(seen) <= 1 for seen in sizes.values())
        and len(outputs) == len(expected)
        and all(
            a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-4)
            for a, b in zip(outputs, expected, strict=True)
        )
    )


def _fork_where_the_batch_is(batch: int, sizes: set[int]) -> Callable[..., None]:
    def hook(norm: nn.Module, args: tuple[Any, ...]) -> None:
        sizes.add(len(args[0]))
        norm.forks = len(args[0]) == batch  # type: ignore[assignment]

    return hook


def _follow(
    name: str, batch: int, found: dict[str, frozenset[int | str]]
) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]] | None]:
    """Doubles, and notes in `found`, what a module takes from before the fork beside the rest."""

    def hook(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        given: dict[int | str, Any] = dict([*enumerate(args), *kwargs.items()])
        lengths = {key: {len(t) for t in tensors_in(v) if t.dim()} for key, v in given.items()}
        behind = frozenset(key for key, there in lengths.items() if there == {batch})
        if not behind or not any(2 * batch in there for there in lengths.values()):
            return None
        found[name] = found.get(name, frozenset()) | behind
        return (
            tuple(twice(v) if index in behind else v for index, v in enumerate(args)),
            {key: twice(v) if key in behind else v for key, v in kwargs.items()},
        )

    return hook


def _split_statistics(model: nn.Module, example: Example) -> None:
    """Give every norm with running statistics that runs after the fork a set for each branch."""
    batch = len(tensors_in(example)[0])
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
        if any(
            _is_ours(h) and not isinstance(h, partial) for h in module._forward_pre_hooks.values()
        ):
            return (name or type(model).__name__,)
    return tuple(name for name, norm in passport_norms(model).items() if norm.forks)


def _followers(model: nn.Module) -> tuple[str, ...]:
    return tuple(
        name
        for name, module in model.named_modules()
        if any(isinstance(h, partial) and _is_ours(h) for h in module._forward_pre_hooks.values())
    )


def _step_cost(model: nn.Module, example: Example) -> float:
    """FLOPs of one forward in both branches over one plain forward's."""
    counts = []
    for branch in (Branch.BOTH, Branch.PUBLIC):
        with torch.no_grad(), on_branch(model, branch), FlopCounterMode(display=False) as counter:
            call(model, example)
        counts.append(counter.get_total_flops())
    return counts[0] / counts[1] if counts[1] else 2.0


def _is_ours(hook: Any) -> bool:
    return isinstance(getattr(getattr(hook, "func", hook), "__self__", None), PassportNorm)


def unhook(model: nn.Module) -> None:
    """Take the fork's hook, if there is one, off every module."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if _is_ours(hook):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
