"""What owners and attackers do with keys and networks, beside training: all on the processor."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from nnpassport.attacks.ambiguity import solve_passport
from nnpassport.embedding.aligning import align
from nnpassport.embedding.network import surgery
from nnpassport.embedding.network.equations import filters, mean_patch, read_bits
from nnpassport.embedding.schemes.passport import V1, V2, draw_by_layer
from nnpassport.embedding.schemes.signature import read_signature
from nnpassport.keys.context import LayerShape
from nnpassport.keys.key import Key
from nnpassport.lab.bench.cases import Case
from nnpassport.lab.bench.networks import example, network

Act = Callable[[], object]


def act(case: Case) -> Act:
    """A function that does it once: `case.network` names it, `case.layers` what carries passports.

    Networks have the weights that they begin with, which costs what trained ones cost.
    """
    model = network(case).eval()
    return _ACTS[case.network](model, case)


def _fold(model: nn.Module, case: Case) -> Act:
    V1.insert(model, draw_by_layer(V1, model, example(), layers=_named(case)), example())
    return lambda: surgery.fold(model)


def _release(model: nn.Module, case: Case) -> Act:
    V1.insert(model, draw_by_layer(V1, model, example(), layers=_named(case)), example())
    return lambda: V1.released(model)


def _draw(model: nn.Module, case: Case) -> Act:
    return lambda: draw_by_layer(V2, model, example(), layers=_named(case))


def _derive(model: nn.Module, case: Case) -> Act:
    keys = _keys(model, case)

    def derive() -> None:
        key = keys()
        for layer in key.context.layers:
            key.layer_passport(layer.name)
            key.layer_signs(layer.name)

    return derive


def _collapse(model: nn.Module, case: Case) -> Act:
    passports = _passports(_keys(model, case)())
    return lambda: [mean_patch(p, s.weight, s.geometry) for s, p in passports]


def _read_bits(model: nn.Module, case: Case) -> Act:
    passports, weights = _passports(_keys(model, case)()), model.state_dict()
    patches = {s.name: mean_patch(p, s.weight, s.geometry) for s, p in passports}
    hosts = {s.name: filters(weights[f"{s.name}.weight"], s.geometry) for s, _ in passports}
    return lambda: [read_bits(hosts[name], patch) for name, patch in patches.items()]


def _verify(model: nn.Module, case: Case) -> Act:
    keys, weights = _keys(model, case), model.state_dict()
    return lambda: read_signature(weights, keys())


def _align(model: nn.Module, case: Case) -> Act:
    forms, weights = V2.forms(_keys(model, case)()), model.state_dict()
    return lambda: align(weights, model, forms)


def _solve(model: nn.Module, case: Case) -> Act:
    rng = torch.Generator().manual_seed(0)
    return lambda: solve_passport(model, V2, example(), rng)


_ACTS: Mapping[str, Callable[[nn.Module, Case], Act]] = {
    "V1 fold": _fold,
    "V1 release": _release,
    "draw a key": _draw,
    "derive": _derive,
    "collapse": _collapse,
    "read bits": _read_bits,
    "verify": _verify,
    "align": _align,
    "solve": _solve,
}


def _named(case: Case) -> list[str] | None:
    return None if case.layers is None else [case.layers]


def _keys(model: nn.Module, case: Case) -> Callable[[], Key]:
    """Makes another key each time, of one shape: nothing that a key may keep is measured."""
    drawn = draw_by_layer(V2, model, example(), layers=_named(case), seed=bytes(32))
    numbers = itertools.count()

    def key() -> Key:
        nonce = next(numbers).to_bytes(16, "big")
        return replace(drawn, context=replace(drawn.context, nonce=nonce))

    return key


def _passports(key: Key) -> list[tuple[LayerShape, Tensor]]:
    return [(layer, key.layer_passport(layer.name)) for layer in key.context.layers]
