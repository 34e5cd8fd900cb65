"""Two branches, one trunk: find where the public and the private network part.

Before the first passport the two are the same computation. The trunk runs once; at the fork the
batch is doubled, and the rest runs on both halves in one forward. A candidate place counts only if
its outputs equal those of two separate passes.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nnpassport.embedding.network.layers import (
    Branch,
    BranchNorm,
    PassportNorm,
    branched,
    forked,
    on_branch,
    passport_norms,
    replace_module,
    set_branch,
)
from nnpassport.embedding.network.modes import hooked, plain_attention
from nnpassport.embedding.network.outputs import Example, call, tensors_in, with_tensors
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


def set_fork(model: nn.Module, example: Example) -> None:
    """Set the fork, in place, at the narrowest place that works, and prove it.

    Candidates are the first passport layers themselves (the layer and the normalisation before the
    affine are shared too), then the modules around the first one, and at last the whole network.
    Where a later module also takes what did not pass the fork (an attention mask), that is doubled
    there. Norms with running statistics after the fork get a set for each branch.

    `example` must have all the inputs that training has: a mask that is not there is not followed.
    Inputs with a first axis as long as that of the first one are taken for a part of the batch.

    Raises:
        UnsuitableModelError: not even forking the whole network's batch gives both outputs.
    """
    noise = _noise_like(model, example)
    expected, order = _two_passes(model, noise)
    candidates = [None, *_ancestors(order[0])] if expected else []
    for ancestor in candidates:
        if _forks_well(model, noise, ancestor, expected):
            _split_statistics(model, noise)
            return
        unhook(model)
    raise UnsuitableModelError(
        f"the two branches of {type(model).__name__} cannot run in one forward: twice the batch "
        "does not give twice the outputs; use scheme V1, a model whose first axis is the batch, an "
        "example whose batch is as long as no other axis of its inputs, or one without labels "
        "where the network computes a loss of its own"
    )


def fork_of(model: nn.Module, example: Example) -> Fork:
    """The fork that was set, and what it costs: two more forwards, with every operation counted."""
    followers = _hooked(model, PassportNorm.fork_beside)
    return Fork(forked_at(model), followers, _step_cost(model, _noise_like(model, example)))


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
        with hooked(*handles), torch.no_grad(), on_branch(model, Branch.PUBLIC):
            public = tensors_in(call(model, example))
            set_branch(model, Branch.PRIVATE)
            private = tensors_in(call(model, example))
        return [torch.cat(pair) for pair in zip(public, private, strict=True)], order
    except Exception:  # the user's own code may raise anything on a batch of three
        return [], order


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")[:-1]
    return [".".join(parts[:depth]) for depth in range(len(parts), -1, -1)]


def _noise_like(model: nn.Module, example: Example) -> Example:
    """A small batch like the example, its floats replaced by noise: zeros would prove little.

    Its size is that of nothing else in the network, so that a batch is told by its length.
    """
    given = [tensor for tensor in tensors_in(example) if tensor.dim()]
    length = len(given[0]) if given else 0
    taken = {
        size for each in [*given, *model.parameters(), *model.buffers()] for size in each.shape
    }
    batch = next(n for n in itertools.count(3) if not {n, 2 * n} & taken)
    generator = torch.Generator().manual_seed(0)

    def noise(value: Tensor) -> Tensor:
        if value.dim() == 0 or len(value) != length:
            return value
        rows = value[torch.arange(batch, device=value.device) % length]
        # Not below zero: a root or a logarithm may follow.
        drawn = torch.rand(rows.shape, generator=generator)
        return drawn.to(rows) if rows.is_floating_point() else rows

    return with_tensors(example, noise)


def _batch_of(example: Example) -> int:
    return next(len(tensor) for tensor in tensors_in(example) if tensor.dim())


def _forks_well(
    model: nn.Module, example: Example, ancestor: str | None, expected: Sequence[Tensor]
) -> bool:
    """Fork at the passport layers (None) or at this module, and compare with two passes."""
    found = _explore(model, example, ancestor)
    if found is None or (ancestor is not None and ancestor not in found):
        return False
    norm = next(iter(passport_norms(model).values()))
    for name, named in found.items():
        hook = partial(norm.fork_input if name == ancestor else norm.fork_beside, named)
        model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad(), on_branch(model, Branch.BOTH):
            outputs = tensors_in(call(model, example))
    except Exception:
        # Shapes that do not meet, or an assertion of the user's own: this place is too narrow.
        return False
    return len(outputs) == len(expected) and all(map(_same, outputs, expected))


def _same(output: Tensor, expected: Tensor) -> bool:
    if output.shape != expected.shape or not expected.is_floating_point():
        return torch.equal(output, expected)
    finite = expected[expected.isfinite()].abs()
    eps = torch.finfo(expected.dtype).eps
    scale = finite.max().item() if len(finite) else 1.0
    return torch.allclose(
        output, expected, rtol=max(1e-3, 8 * eps), atol=max(1e-4, 4 * eps) * scale
    )


def _explore(
    model: nn.Module, example: Example, ancestor: str | None
) -> dict[str, frozenset[int | str]] | None:
    """What to double where, by module and argument, to fork here; None if it does not run.

    Also sets which passport layers fork.
    """
    batch = _batch_of(example)
    found: dict[str, frozenset[int | str]] = {}
    sizes: dict[str, set[int]] = {}
    handles = [
        module.register_forward_pre_hook(
            _double(name, batch, name == ancestor, found), with_kwargs=True
        )
        for name, module in model.named_modules()
    ]
    handles += [
        module.register_forward_pre_hook(
            _fork_where_the_batch_is(batch, sizes.setdefault(name, set())), with_kwargs=True
        )
        for name, module in model.named_modules()
        if isinstance(module, PassportNorm) or getattr(module, "running_mean", None) is not None
    ]
    try:
        with hooked(*handles), torch.no_grad(), on_branch(model, Branch.BOTH):
            call(model, example)
    except Exception:
        return None
    # A layer that runs twice, once on each side of the fork, could not tell which side it is on.
    return found if all(len(seen) <= 1 for seen in sizes.values()) else None


def _fork_where_the_batch_is(batch: int, sizes: set[int]) -> Callable[..., None]:
    def hook(norm: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        size = _batch_of((*args, *kwargs.values()))
        sizes.add(size)
        if isinstance(norm, PassportNorm):
            norm.forks = size == batch

    return hook


def _double(
    name: str, batch: int, forks: bool, found: dict[str, frozenset[int | str]]
) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]] | None]:
    """Doubles, and notes in `found`, the batch where it `forks`.

    Elsewhere, what a module takes from before the fork beside something from behind it.
    """

    def hook(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        given: dict[int | str, Any] = dict([*enumerate(args), *kwargs.items()])
        lengths = {key: {len(t) for t in tensors_in(v) if t.dim()} for key, v in given.items()}
        before = frozenset(key for key, there in lengths.items() if there == {batch})
        if not before or not (forks or any(2 * batch in there for there in lengths.values())):
            return None
        found[name] = found.get(name, frozenset()) | before
        return (
            tuple(forked(v) if index in before else v for index, v in enumerate(args)),
            {key: forked(v) if key in before else v for key, v in kwargs.items()},
        )

    return hook


def _split_statistics(model: nn.Module, example: Example) -> None:
    """Give every norm with running statistics that runs after the fork a set for each branch."""
    batch = _batch_of(example)
    inside = {id(n) for m in branched(model) for n in (m.norm, m.private_norm)}
    after: list[str] = []

    def note(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if _batch_of((*args, *kwargs.values())) == 2 * batch:
                after.append(name)

        return hook

    handles = [
        module.register_forward_pre_hook(note(name), with_kwargs=True)
        for name, module in model.named_modules()
        if getattr(module, "running_mean", None) is not None and id(module) not in inside
    ]
    with hooked(*handles), torch.no_grad(), on_branch(model, Branch.BOTH):
        call(model, example)
    running = next(iter(passport_norms(model).values())).running
    for name in dict.fromkeys(after):
        norm = model.get_submodule(name)
        replace_module(model, name, BranchNorm(norm, running).train(norm.training))


def forked_at(model: nn.Module) -> tuple[str, ...]:
    """Where the batch is forked: names of passport layers, or of the module whose input is."""
    around = _hooked(model, PassportNorm.fork_input)
    return around or tuple(name for name, norm in passport_norms(model).items() if norm.forks)


def _hooked(model: nn.Module, method: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(
        name or type(model).__name__
        for name, module in model.named_modules()
        if any(_method_of(hook) is method for hook in module._forward_pre_hooks.values())
    )


def _method_of(hook: Any) -> Any:
    """The method of a passport layer that a hook calls, or None for another's hook."""
    bound = hook.func if isinstance(hook, partial) else None
    ours = isinstance(getattr(bound, "__self__", None), PassportNorm)
    return getattr(bound, "__func__", None) if ours else None


def _step_cost(model: nn.Module, example: Example) -> float:
    """FLOPs of one forward in both branches over one plain forward's.

    γ and β are left out: they are computed once a step, however large the batch, and it is small.
    """
    plain, both = (_flops(model, example, branch) for branch in (Branch.PUBLIC, Branch.BOTH))
    return both / plain if plain else 2.0


def step_costs(
    model: nn.Module, example: Example, layers: Mapping[str, nn.Module]
) -> dict[str, float]:
    """By layer, FLOPs of a step of two branches that part right behind it, over a plain one's.

    What a fork costs at least, if this is the first layer with a passport.
    """
    reached: dict[str, int] = {}
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with ExitStack() as stack, _counting(model) as counter:
        stack.callback(torch.backends.mha.set_fastpath_enabled, fused)
        for name, layer in layers.items():

            def note(*_: Any, name: str = name) -> None:
                reached.setdefault(name, counter.get_total_flops())

            stack.callback(layer.register_forward_hook(note).remove)
        call(model, example)
    whole = counter.get_total_flops()
    return {name: 1 + (whole - flops) / whole if whole else 2.0 for name, flops in reached.items()}


@contextmanager
def _counting(model: nn.Module) -> Iterator[FlopCounterMode]:
    """Counts FLOPs without gradients, and without hooks for any.

    The counter follows modules by hooks on what needs a gradient, and fails (an AssertionError)
    where a module is given a parameter, as DeBERTa's attention is.
    """
    needing = [each for each in model.parameters() if each.requires_grad]
    for each in needing:
        each.requires_grad_(False)
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            yield counter
    finally:
        for each in needing:
            each.requires_grad_(True)


def _flops(model: nn.Module, example: Example, branch: Branch) -> int:
    presented: list[PassportNorm] = []

    def note(norm: PassportNorm, *_: Any) -> None:
        if norm.running.branch is not Branch.PUBLIC:
            presented.append(norm)

    handles = [norm.register_forward_pre_hook(note) for norm in passport_norms(model).values()]
    # In training attention is not fused, and what is fused is not counted.
    with hooked(*handles), plain_attention(), on_branch(model, branch), _counting(model) as whole:
        call(model, example)
    with _counting(model) as affines:
        for norm in presented:
            norm.affine()
    return whole.get_total_flops() - affines.get_total_flops()


def unhook(model: nn.Module) -> None:
    """Take the fork's hook, if there is one, off every module."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if _method_of(hook) is not None:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
