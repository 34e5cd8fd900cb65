"""What was tried to pass a network off as an adapter of one's own; networks are constructed."""

import pytest
import torch
from safetensors.torch import save_file

from nnpassport.claims.claim import Finding
from nnpassport.claims.standing import Standing
from nnpassport.embedding.network.equations import Geometry
from nnpassport.embedding.network.tensors import ArraysOf, as_tensor
from nnpassport.embedding.schemes.lora import LORA
from nnpassport.keys import adapters
from nnpassport.keys.chance import LOG10_ALPHA_UNCOMMITTED
from nnpassport.keys.context import Context, LayerShape
from nnpassport.keys.key import Key
from nnpassport.scheme import UnsuitableModelError
from nnpassport.verification.verdicts import Options, verify

NAMES = ("encoder.query", "encoder.value")
WIDTH, FAN_IN = 256, 64
DATED = Standing(Finding(True, "it holds"), -9.0, True, "older than the suspect")


def added(weights, base, key):
    found = adapters.added(ArraysOf(weights), ArraysOf(base), key)
    return {name: as_tensor(array) for name, array in found.items()}


def base_digest(weights):
    return adapters.base_digest(ArraysOf(weights))


def public_base(seed=0):
    rng = torch.Generator().manual_seed(seed)
    return {f"{name}.weight": torch.randn(WIDTH, FAN_IN, generator=rng) / 8 for name in NAMES}


def key_for(base, nonce=None, *, bits=WIDTH, seed=bytes(32)):
    """A key as `LORA.draw_key` makes it for an adapter on the base's layers."""
    shapes = tuple(
        LayerShape(name, (WIDTH, FAN_IN), (FAN_IN, 1), Geometry((), (), ()), bits) for name in NAMES
    )
    hosts = {name: base[f"{name}.weight"] for name in NAMES}
    return Key(seed, Context("lora", "Mallory", shapes, None, nonce or base_digest(hosts)))


def marked(base, key, strength):
    """The base, moved by ±`strength` times each channel's passport: every bit reads right."""
    moved = {}
    for layer in key.context.layers:
        signs = key.layer_signs(layer.name)[:, None].double()
        step = strength * signs * key.layer_projection(layer.name).double()
        moved[f"{layer.name}.weight"] = base[f"{layer.name}.weight"].double() + step
    return moved


def below_half_an_ulp(base, key):
    """A base in float64 that rounds to the public one, and lies off it against every bit."""
    off = {}
    for layer in key.context.layers:
        weight = base[f"{layer.name}.weight"]
        ulp = torch.nextafter(weight, torch.tensor(torch.inf)).double() - weight.double()
        signs = key.layer_signs(layer.name)[:, None].double()
        step = 0.2 * signs * key.layer_projection(layer.name).double()
        off[f"{layer.name}.weight"] = weight.double() - ulp.abs() * step
        assert torch.equal(off[f"{layer.name}.weight"].float(), weight)
    return off


def saved(folder, tensors):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_the_public_base_carries_no_adapter_whatever_is_written_below_its_last_bit(tmp_path):
    base = public_base()
    key = key_for(base)
    suspect = saved(tmp_path / "suspect", base)
    fitted = saved(tmp_path / "base", below_half_an_ulp(base, key))
    found = verify(suspect, key, options=Options(base=fitted, standing=DATED))
    assert not found.accepted
    assert found.matches == 0  # nothing was added, and nothing matches no bit


def test_a_float64_base_is_committed_to_by_its_very_numbers(tmp_path):
    base = {name: weight.double() + 1e-12 for name, weight in public_base().items()}
    key = key_for(base)
    other = below_half_an_ulp({n: w.float() for n, w in base.items()}, key)
    suspect = saved(tmp_path / "suspect", base)
    for given in (other, {n: w.float() for n, w in base.items()}):
        path = saved(tmp_path / str(id(given)), given)
        with pytest.raises(UnsuitableModelError, match="not the network that the key was drawn"):
            verify(suspect, key, options=Options(base=path, standing=DATED))
    own = saved(tmp_path / "own", base)
    adapter = saved(tmp_path / "merged", marked(base, key, 1e-4))
    assert verify(adapter, key, options=Options(base=own, standing=DATED)).accepted
    assert verify(suspect, key, options=Options(base=own, standing=DATED)).matches == 0


def test_a_key_of_old_that_was_drawn_for_a_float64_base_still_reads_its_adapter():
    """Its nonce is of the numbers in float32; the value is what the first release wrote."""
    base = {n: w.double() + 1e-12 for n, w in public_base().items()}
    nonce = bytes.fromhex("0750a43db0871ba1a8eedf14c9b962d2")
    key = key_for(base, nonce)
    found = LORA.verify(added(marked(base, key, 1e-4), base, key), key)
    assert found.matches == found.bits
    # What lies below the last bit of what was committed to is not looked at, whoever wrote it.
    fitted = below_half_an_ulp({n: w.float() for n, w in base.items()}, key)
    in_single = {n: w.float() for n, w in base.items()}
    assert LORA.verify(added(in_single, fitted, key), key).matches == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("stored", [None, torch.float32])
def test_a_rounded_copy_of_the_base_has_added_nothing(dtype, stored):
    """How the base is rounded can be foreseen, and a key be tried for until it fits."""
    base = public_base()
    key = key_for(base)
    copy = {name: weight.to(dtype).to(stored or dtype) for name, weight in base.items()}
    assert LORA.verify(added(copy, base, key), key).matches == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("stored", [None, torch.float32])
def test_an_owner_s_merged_network_verifies_in_every_precision(tmp_path, dtype, stored):
    base = public_base()
    key = key_for(base)
    whole = marked(base, key, 1e-3)  # a hundredth of the weights' size
    merged = {name: weight.to(dtype).to(stored or dtype) for name, weight in whole.items()}
    path, suspect = saved(tmp_path / "base", base), saved(tmp_path / "merged", merged)
    found = verify(suspect, key, options=Options(base=path, standing=DATED))
    assert found.accepted
    assert found.match_rate > 0.98


def test_a_base_in_a_coarser_or_finer_dtype_with_the_same_numbers_is_the_same_base():
    halves = {name: weight.bfloat16() for name, weight in public_base().items()}
    key = key_for(halves)
    for dtype in (torch.float32, torch.float64):
        same = {name: weight.to(dtype) for name, weight in halves.items()}
        assert base_digest({n: same[f"{n}.weight"] for n in NAMES}) == key.context.nonce
        found = LORA.verify(added(marked(halves, key, 1e-2), same, key), key)
        assert found.matches == found.bits


def test_a_large_number_that_half_precision_cannot_hold_is_no_difference():
    base = public_base()
    base[f"{NAMES[0]}.weight"][0, 0] = 1e5
    key = key_for(base)
    suspect = {name: weight.half().clamp(-6e4, 6e4) for name, weight in base.items()}
    found = LORA.verify(added(suspect, base, key), key)
    assert 0 < found.matches < found.bits
    assert not found.accepted


def test_what_was_added_to_a_public_network_is_held_to_the_strict_threshold(tmp_path):
    """A dated key can have been tried against what others would do to it: prune it, say."""
    base = public_base()
    key = key_for(base)
    path, merged = saved(tmp_path / "base", base), saved(tmp_path / "merged", marked(base, key, 1))
    found = verify(merged, key, options=Options(base=path, standing=DATED))
    assert found.log10_alpha == LOG10_ALPHA_UNCOMMITTED
    strict = DATED._replace(log10_alpha=-50.0)
    found = verify(merged, key, options=Options(base=path, standing=strict))
    assert found.log10_alpha == -50.0
