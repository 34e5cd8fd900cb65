"""Each network made ready to run once as often as one likes: a training step, an inference."""

import itertools
import runpy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nnpassport.data.images import CIFAR10
from nnpassport.embedding.network import surgery
from nnpassport.embedding.network.layers import passport_norms
from nnpassport.embedding.schemes.passport import V2, draw_by_layer
from nnpassport.embedding.train.loop import Objective, Recipe, classification
from nnpassport.lab.bench.cases import CHEAPER, SCHEMES, Case
from nnpassport.lab.bench.networks import SLOW_REFERENCE, example, images, network, precision
from nnpassport.lab.descent import descent
from nnpassport.scheme import Batch

_PLAIN = {"plain", "eager"}


def training_step(case: Case, device: str) -> Callable[[], None]:
    """A function that does `case.steps` steps on one batch, as `fit` does them."""
    model = network(case)
    descend = objective(case, model)
    model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    return bare_steps(case, model, descend, device)


def bare_steps(case: Case, model: nn.Module, descend: Objective, device: str) -> Callable[[], None]:
    """The same of a network that is ready to be trained."""
    recipe = Recipe()
    # Within the cycle, where not all steps are alike.
    numbers = itertools.cycle(range(case.steps)) if case.network in CHEAPER else itertools.count()
    step = descent(
        model,
        descend,
        images(case, device),
        numbers,
        running=_compiled(case, model),
        precision=case.precision,
        rate=recipe.rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )

    def run() -> None:
        for _ in range(case.steps):
            step()

    return run


def objective(case: Case, model: nn.Module) -> Objective:
    """What the network's steps descend; its passports are inserted into `model`, in place."""
    if case.network in _PLAIN:
        return classification
    if case.network == "forked":
        return forked(model)
    name = case.network.removeprefix("slow ")
    scheme = CHEAPER.get(name) or SCHEMES[name]
    key = draw_by_layer(scheme, model, example(), seed=bytes(32))
    if case.network.startswith("slow "):
        slow = runpy.run_path(str(SLOW_REFERENCE))["objective"]
        return slow(scheme, model, key, example(), CIFAR10)
    scheme.insert(model, key, example())
    return scheme.objective(key, steps=case.steps, normalise=CIFAR10)


def forked(model: nn.Module) -> Objective:
    """What two branches cost on this device at least: V2's shapes, and nothing else of it."""
    fork = V2.insert(model, draw_by_layer(V2, model, example(), seed=bytes(32)), example()).fork
    behind = {name for name, norm in passport_norms(model).items() if norm.forks}
    surgery.remove(model)
    for name in fork.at if fork else ():
        module = model.get_submodule(name)
        if name in behind:
            module.register_forward_hook(lambda _module, _args, output: _twice(output))
        else:
            module.register_forward_pre_hook(lambda _module, args: (_twice(args[0]), *args[1:]))
    return lambda model, batch: classification(model, Batch(batch.images, _twice(batch.labels)))


def _twice(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor])


def inference(case: Case, device: str) -> Callable[[], Tensor]:
    """A function that runs one batch through the network, in evaluation mode."""
    model = network(case)
    if case.network not in _PLAIN:
        name, state = case.network.split()
        scheme = SCHEMES[name]
        scheme.insert(model, draw_by_layer(scheme, model, example(), seed=bytes(32)), example())
        model = model if state == "presented" else scheme.released(model)
    model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    batch, _ = images(case, device)
    running = _compiled(case, model)

    def infer() -> Tensor:
        with torch.no_grad(), precision(case, device):
            return running(batch)

    return infer


def _compiled(case: Case, model: nn.Module) -> nn.Module:
    if not case.compiled or case.network == "eager":
        return model
    return torch.compile(model)  # type: ignore[return-value]
