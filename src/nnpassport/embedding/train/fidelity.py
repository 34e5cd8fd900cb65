"""F: what accuracy does a network reach, and is it what its owner says?"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy

import torch
from torch import Tensor, nn

from nnpassport.data.images import Images, Normalisation, evaluation_batches
from nnpassport.embedding.network.modes import evaluated
from nnpassport.embedding.network.outputs import logits_of
from nnpassport.embedding.train.team import at_work
from nnpassport.scheme import Batch

_ELSEWHERE: ContextVar[torch.device | None] = ContextVar("_ELSEWHERE", default=None)


@contextmanager
def measuring_on(device: torch.device) -> Iterator[None]:
    """Within this, `accuracy` copies networks that are in the CPU's memory to `device`.

    Attacks and keys stay on the CPU, where they are reproducible; ten thousand answers to each of
    fifty forged keys need not.
    """
    token = _ELSEWHERE.set(device)
    try:
        yield
    finally:
        _ELSEWHERE.reset(token)


@torch.no_grad()
def accuracy(
    model: Callable[[Tensor], Tensor],
    data: Images,
    normalise: Normalisation,
    *,
    batch: int = 256,
) -> float:
    """Share of `data` that `model` classifies rightly, in [0, 1].

    Counted over images: the mean over batches of the reference code would weigh a last, smaller
    batch too much. The model is used as it stands; put it into evaluation mode first. Processes
    that share the measurement (`distributed.sharing`) have some of the batches each.
    """
    model = _where_it_is_fast(model)
    team, device = at_work(), _device_of(model)
    # Summed where it is computed, and read once: an accelerator does not wait for each batch.
    right, turns = torch.zeros((), dtype=torch.int64, device=device), 0
    for mine in evaluation_batches(data, normalise, size=batch, device=device, part=team.part):
        right += (logits_of(model(mine.images)).argmax(1) == mine.labels).sum()
        turns += 1
    if math.ceil(len(data) / batch / team.size) > turns:
        # Where weights are dealt out, a forward takes all processes: this one has no batch left.
        model(next(evaluation_batches(data, normalise, size=1, device=device)).images)
    return int(team.total(right)) / len(data)


def plain_evaluation(
    data: Images, normalise: Normalisation
) -> Callable[[nn.Module], dict[str, float]]:
    """What to measure of a network with nothing to present: "accuracy", and it is the "score"."""

    def evaluate(model: nn.Module) -> dict[str, float]:
        reached = accuracy(model.eval(), data, normalise)
        return {"accuracy": reached, "score": reached}

    return evaluate


@torch.no_grad()
def recalibrate(model: nn.Module, norms: Iterable[nn.Module], batches: Iterable[Batch]) -> None:
    """Set the running statistics of `norms`, in place, to the mean over `batches`, without labels.

    A private branch's statistics are not in a released network, and a claimant must not be free to
    choose them: so they are measured again from the data that F is given.
    """
    kept = [(norm, getattr(norm, "momentum", None)) for norm in norms]
    with evaluated(model):
        try:
            for norm, _ in kept:
                norm.reset_running_stats()  # type: ignore[operator]
                norm.momentum = None  # type: ignore[assignment]  # a plain mean over all batches
                norm.train()
            for index, part in enumerate(batches):
                # A single image left over may have one value a channel, and that has no variance.
                if index == 0 or len(part.images) > 1:
                    model(part.images)
        finally:
            for norm, momentum in kept:
                norm.momentum = momentum  # type: ignore[assignment]


def _where_it_is_fast(model: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    device = _ELSEWHERE.get()
    here = isinstance(model, nn.Module) and _device_of(model) == torch.device("cpu")
    if device is None or not here or device == torch.device("cpu"):
        return model
    copied: nn.Module = deepcopy(model)  # type: ignore[assignment]  # a module, as was found
    return copied.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _device_of(model: object) -> torch.device:
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    return next((p.device for p in parameters), torch.device("cpu"))
