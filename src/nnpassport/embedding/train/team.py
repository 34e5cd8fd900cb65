"""Training in several processes: what each of them does of it, and what they tell one another.

`torchrun` and `accelerate launch` start the same program several times; `together` says which of
them this is. Each process has its part of every batch, the network is wrapped so that gradients are
averaged (`wrapped`), batch norms see the whole batch, and whatever is counted is summed: the
weights are those that one process with the same batches would have reached.

Only the leader, process 0, writes and prints.

[Iof15] Ioffe, Szegedy: Batch Normalization, ICML 2015.
"""

import atexit
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import dataclass
from datetime import timedelta
from inspect import signature
from types import MethodType
from typing import Any, NamedTuple, TypeVar, cast, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from nnpassport.embedding.network.layers import Branch, passport_norms
from nnpassport.embedding.network.outputs import with_tensors
from nnpassport.embedding.train.processes import rank as own_rank
from nnpassport.embedding.train.processes import world
from nnpassport.scheme import (
    BadRecipeError,
    LostProcessError,
    OwnershipError,
    Part,
    UnsuitableModelError,
)

T = TypeVar("T")

_CPU = torch.device("cpu")
_SEVERED = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|timed? ?out|socket|peer|heartbeat", re.I
)


@final
@dataclass(frozen=True, slots=True)
class Team:
    """The processes that train together, seen from one of them.

    Attributes:
        rank: which of them this is, from 0.
        size: how many there are.
        device: where this one computes.
        sharded: weights, gradients and momentum are dealt out among them (FSDP) and not copied
            to each (DDP).
    """

    rank: int = 0
    size: int = 1
    device: torch.device = _CPU
    sharded: bool = False

    @property
    def leads(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    @property
    def part(self) -> Part:
        """The part of every batch that this process has."""
        return Part(self.rank, self.size)

    def total(self, value: Tensor) -> Tensor:
        """The sum of all processes' values, exactly the value itself where there is one."""
        if self.size == 1:
            return value
        value = value.detach().to(self.device, copy=True)
        dist.all_reduce(value)
        return value

    def any_of(self, *flags: bool) -> tuple[bool, ...]:
        """Each flag: whether any process has it set."""
        if self.size == 1:
            return flags
        counts = self.total(torch.tensor(flags, dtype=torch.int64, device=self.device))
        return tuple(count > 0 for count in counts.tolist())

    def from_leader(self, make: Callable[[], T]) -> T:
        """What the leader makes, in every process; an error of the leader's is everybody's."""
        if self.size == 1:
            return make()
        box: list[Any] = [None, None]
        if self.leads:
            try:
                box[0] = make()
            except OwnershipError as error:
                box[1] = error
        dist.broadcast_object_list(box, device=_of_objects(self.device))
        if box[1] is not None:
            raise box[1]
        return cast(T, box[0])

    def require_same(self, what: str, identity: str) -> None:
        """Refuse to go on if processes differ in something; its identity is told to no one else.

        Raises:
            BadRecipeError: they do; it names the processes that differ from the leader.
        """
        if self.size == 1:
            return
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, hashlib.sha256(identity.encode()).hexdigest())
        others = [rank for rank, each in enumerate(found) if each != found[0]]
        if others:
            raise BadRecipeError(
                f"process {', '.join(map(str, others))} of {self.size} has another {what} than "
                "process 0; needed: the same program, files and options in all of them, and a key "
                "that is drawn once, saved, and loaded by each"
            )


_at_work: ContextVar[Team | None] = ContextVar("team", default=None)


def at_work() -> Team:
    """The processes that share the present measurement; this one alone, unless in `sharing`."""
    return _at_work.get() or Team()


@contextmanager
def sharing(team: Team) -> Iterator[None]:
    """Share what is measured inside among the processes: all of them have to be here."""
    token = _at_work.set(team)
    try:
        yield
    finally:
        _at_work.reset(token)


def together() -> Team:
    """The processes that were started together, connected; one by itself is a team of one.

    They are found by what `torchrun` and `accelerate launch` put into the environment, FSDP too
    (`accelerate launch --use_fsdp --fsdp_version 2`, or NNPASSPORT_SHARDED=1 with `torchrun`).
    """
    if dist.is_available() and dist.is_initialized():
        size, rank = dist.get_world_size(), dist.get_rank()
    elif world() == 1:
        return _alone()
    else:
        size, rank = world(), own_rank()
        if _device().type == "cuda":
            torch.cuda.set_device(_device())
        backend = "cpu:gloo,cuda:nccl" if _device().type == "cuda" else "gloo"
        dist.init_process_group(backend)
        atexit.register(_leave)
    if size == 1:
        return _alone()
    return Team(rank, size, _device(), _is_asked_to_shard())


def _alone() -> Team:
    # Slow to import, and V, which reads weights only, asks for no device.
    from accelerate import Accelerator  # noqa: PLC0415

    return Team(device=Accelerator().device)


def _device() -> torch.device:
    if torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() != "true":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def _of_objects(device: torch.device) -> torch.device | None:
    return device if dist.get_backend() == "nccl" else None


def _leave() -> None:
    with suppress(Exception):  # a process that is gone cannot be waited for
        dist.destroy_process_group()


def _is_asked_to_shard() -> bool:
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise BadRecipeError(
                "FSDP 1 flattens the weights that passports are multiplied with; needed: "
                "--fsdp_version 2 of `accelerate launch`, or no FSDP"
            )
        return True
    return os.environ.get("NNPASSPORT_SHARDED", "").lower() in {"1", "true"}


class Wrapped(NamedTuple):
    """The network whose weights are trained, and what its forward is called through."""

    network: nn.Module
    running: nn.Module


@contextmanager
def wrapped(model: nn.Module, team: Team) -> Iterator[Wrapped]:
    """The network made ready for all processes; afterwards `model` has what was trained.

    Copied (DDP), the model itself is trained; sharded (FSDP), a copy of it, whose weights come back
    at the end. Batch norms take mean and variance over the batch of all processes meanwhile.

    Raises:
        BadRecipeError: the processes do not have the same network and passports.
        UnsuitableModelError: the network cannot be sharded.
    """
    if team.size == 1:
        yield Wrapped(model, model)
        return
    team.require_same("network or key", _identity(model))
    if not team.sharded:
        with _synced_norms(model):
            yield Wrapped(model, _copied(model, team))
        return
    plain: Any = deepcopy(model)
    network = _dealt_out(plain.to(memory_format=torch.contiguous_format), team)  # FSDP needs it
    with _synced_norms(network):
        yield Wrapped(network, network)
    model.load_state_dict(whole(network.state_dict()))


def _copied(model: nn.Module, team: Team) -> nn.Module:
    # While a passport is all that a norm has (V1), the norm's own scale and shift are idle; and its
    # small network is in steps that run the public branch alone.
    norms = passport_norms(model).values()
    idle = any(norm.running.branch is Branch.PRIVATE or norm.encoder is not None for norm in norms)
    wrapper = nn.parallel.DistributedDataParallel
    # Synced norms have the same statistics everywhere. Newer versions of torch call it otherwise.
    new, old = "forward_sync_buffers", "broadcast_buffers"
    settings: dict[str, Any] = {new if new in signature(wrapper).parameters else old: False}
    return wrapper(
        model,
        device_ids=[team.device] if team.device.type == "cuda" else None,
        find_unused_parameters=idle,
        **settings,
    )


def _dealt_out(model: nn.Module, team: Team) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415 - a second
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415 - as above

    mesh = init_device_mesh(team.device.type, (team.size,))
    try:
        for block in _blocks(model):
            fully_shard(block, mesh=mesh)
        return cast(nn.Module, fully_shard(model, mesh=mesh))
    except (RuntimeError, ValueError, AssertionError, NotImplementedError) as error:
        raise UnsuitableModelError(
            f"{type(model).__name__} cannot be sharded ({error!s:.200}); train it without FSDP"
        ) from error


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Parts that are gathered one after the other: children, and those of lists of them."""
    found: list[nn.Module] = []
    for child in model.children():
        listed = isinstance(child, nn.Sequential | nn.ModuleList)
        found += child.children() if listed else [child]
    return [block for block in found if next(block.parameters(), None) is not None]


def whole(state: Any) -> Any:
    """A state with every tensor that is dealt out put together: all processes have to ask."""
    return with_tensors(state, lambda t: t.full_tensor() if hasattr(t, "full_tensor") else t)


def dealt_like(value: Any, model: Any) -> Any:
    """A whole tensor dealt out as `model` is, if it is; anything else as it is."""
    if not isinstance(value, Tensor) or not hasattr(model, "placements") or not value.dim():
        return value
    from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415 - as above

    return distribute_tensor(value.to(model.device), model.device_mesh, model.placements)


def _identity(model: nn.Module) -> str:
    """A digest of weights, statistics and passports, bit for bit."""
    digest = hashlib.sha256()
    named: Mapping[str, Tensor] = dict([*model.named_parameters(), *model.named_buffers()])
    for name, tensor in named.items():
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def _synced_norms(model: nn.Module) -> Iterator[None]:
    # An instance's `forward` in place of another class: names, types and aliases stay as they are.
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    for norm in norms:
        norm.forward = MethodType(_over_all, norm)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


@final
class _Sum(torch.autograd.Function):
    """Σ over processes, whose gradient is the sum of theirs."""

    @staticmethod
    def forward(_ctx: Any, value: Tensor) -> Tensor:
        value = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(value)
        return value

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.forward(None, gradient)


def _summed(value: Tensor) -> Tensor:
    return cast(Tensor, _Sum.apply(value))  # type: ignore[no-untyped-call]


def _over_all(norm: _BatchNorm, x: Tensor) -> Tensor:
    """Batch norm with mean and variance over the images of all processes.   [Iof15, alg. 1]"""
    if not (norm.training or norm.running_mean is None):
        return F.batch_norm(
            x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
        )
    wide = x if x.dtype is torch.float64 else x.float()
    axes, shape = [0, *range(2, x.dim())], [1, -1, *[1] * (x.dim() - 2)]
    own = torch.full_like(wide.detach()[:1].flatten()[0], x.numel() / x.shape[1])
    # Centred before it is squared: E[x²] − E[x]² has no digits left where |E[x]| is large.
    sums = _summed(torch.cat([wide.sum(axes), own[None]]))
    count = sums[-1].detach()
    mean = sums[:-1] / count
    centred = wide - mean.view(shape)
    variance = _summed(centred.square().sum(axes)) / count
    y = centred * torch.rsqrt(variance + norm.eps).view(shape)
    if norm.weight is not None:
        y = y * norm.weight.view(shape) + norm.bias.view(shape)
    _remember(norm, mean.detach(), variance.detach() * count / (count - 1).clamp(min=1))
    return y.to(x.dtype)


@torch.no_grad()
def _remember(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    if norm.running_mean is None or norm.running_var is None or not norm.training:
        return
    factor = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if factor is None:
            factor = 1 / float(norm.num_batches_tracked)
    norm.running_mean.lerp_(mean.to(norm.running_mean), factor or 0.0)
    norm.running_var.lerp_(variance.to(norm.running_var), factor or 0.0)


@contextmanager
def losing_none(team: Team, advice: Callable[[], str]) -> Iterator[None]:
    """Say in one clear error that another process is gone, instead of what its socket says.

    Raises:
        LostProcessError: what the others send did not come; `advice` is what to do now.
    """
    try:
        yield
    except RuntimeError as error:
        if team.size == 1 or not _SEVERED.search(str(error)):
            raise
        raise LostProcessError(
            f"another of the {team.size} processes of this training is gone, and process "
            f"{team.rank} cannot go on without it; {advice()}"
        ) from error


def first_to_say(what: str) -> bool:
    """Whether no other of the processes has said this; True where none can be asked."""
    if world() == 1:
        return True
    with suppress(Exception):  # the store may be gone with the process that kept it
        return bool(_store().add(f"nnpassport/{what}", 1) == 1)
    return True


def _store() -> Any:
    if dist.is_initialized():
        return dist.distributed_c10d._get_default_store()
    return dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=5),
    )
