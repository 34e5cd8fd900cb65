"""Greedy residuals: what is read, that it is exact, and what alignment can do for it."""

from dataclasses import replace

import constructed
import pytest
import torch
from constructed import reader
from torch import nn

from nnpassport.attacks.forging import forge_uchida
from nnpassport.attacks.obfuscation import combine
from nnpassport.embedding.measured import verify_aligned
from nnpassport.embedding.network.models import build
from nnpassport.embedding.schemes.residuals import GREEDY_RESIDUALS, residuals
from nnpassport.embedding.train.loop import Recipe, classification, fit
from nnpassport.keys.chance import log10_binomial_tail
from nnpassport.scheme import UnsuitableModelError

EXAMPLE = torch.zeros(2, 1, 32, 32)
SCHEME = replace(GREEDY_RESIDUALS, bits=64)  # a row for each filter
RECIPE = Recipe(epochs=8, batch=32, rate=0.05, schedule="one-cycle", augment=False)
TUNE = Recipe(epochs=4, batch=32, rate=0.01, schedule="constant", augment=False)


def network(seed=0):
    torch.manual_seed(seed)
    return build("alexnet", classes=10, norm="batch", width=0.25, channels=1)


@pytest.fixture(scope="module")
def plain(digits):
    train, _, normalise = digits
    data = train.resized(32).subset(torch.arange(320))
    return reader(network(), data, normalise), data, normalise


@pytest.fixture(scope="module")
def marked(plain):
    """The same with a key's bits written into it, and the key."""
    model, data, normalise = plain
    key = SCHEME.draw_key(model, EXAMPLE, seed=bytes(32))
    return constructed.marked(SCHEME, model, key, data, normalise), key


def oracle(weight, bits, columns):
    """The same in loops: cut, pool, drop a tenth, average."""
    flat = weight.flatten().tolist()
    length = len(flat) // bits
    found = []
    for bit in range(bits):
        row = flat[bit * length : (bit + 1) * length]
        pooled = []
        for place in range(columns):
            first, last = place * length // columns, -(-(place + 1) * length // columns)
            pooled.append(sum(row[first:last]) / (last - first))
        kept = sorted(pooled, key=abs)[round(columns / 10) :]
        found.append(sum(kept) / columns)
    return torch.tensor(found)


@pytest.mark.parametrize(
    ("shape", "bits", "columns"),
    [((6, 5, 3, 3), 10, 27), ((4, 7, 3, 3), 5, 50), ((40, 40), 2, 253), ((9, 31, 3), 1, 253)],
)
def test_residuals_are_means_of_rows_without_their_smallest_tenth(shape, bits, columns):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = residuals(weight, bits)
    torch.testing.assert_close(found, oracle(weight, bits, columns))


def test_gradients_reach_only_what_is_kept():
    weight = torch.tensor([[5.0, -4.0, 0.1, 3.0, -2.0, 6.0, 7.0, -8.0, 9.0, 1.0]])
    weight.requires_grad_()
    residuals(weight, 1).sum().backward()
    assert weight.grad.flatten().tolist() == pytest.approx([0.1, 0.1, 0] + [0.1] * 7)


@pytest.mark.slow
@pytest.mark.trains
def test_a_mark_that_is_tuned_in_is_found_and_leaves_the_network_as_good(plain):
    _, data, normalise = plain
    model, key = network(), SCHEME.draw_key(plain[0], EXAMPLE, seed=bytes(32))
    fit(model, classification, data, RECIPE, normalise=normalise)
    before = SCHEME.fidelity(model, key, data, normalise)
    SCHEME.embed(model, key, data, TUNE, normalise=normalise, trained=True)
    found = SCHEME.verify(model.state_dict(), key, log10_alpha=-9.0)
    assert found.matches == found.bits == 64
    assert found.accepted
    assert SCHEME.verify_as_published(found).accepted
    assert SCHEME.fidelity(model, key, data, normalise) > before - 0.02


def test_the_p_value_is_binomial_in_a_network_without_the_mark(plain):
    small = 0
    for number in range(100):
        key = GREEDY_RESIDUALS.draw_key(plain[0], EXAMPLE, seed=bytes([number]) * 32)
        found = GREEDY_RESIDUALS.verify(plain[0].state_dict(), key)
        assert found.log10_p_value == log10_binomial_tail(found.matches, 256)
        small += found.log10_p_value <= -1
        assert not found.accepted
    assert small <= 20  # of 100, of which 10 are expected


def test_bits_that_were_read_off_a_network_are_no_evidence(plain):
    model = plain[0]
    key = SCHEME.draw_key(model, EXAMPLE)
    (layer,) = key.context.layers
    read = residuals(model.get_parameter(f"{layer.name}.weight").detach(), 64).sign()
    chosen = replace(key, signs={layer.name: read})
    found = SCHEME.verify(model.state_dict(), chosen)
    assert (found.matches, found.log10_p_value, found.accepted) == (64, None, False)
    assert SCHEME.verify_as_published(found).accepted
    with pytest.raises(UnsuitableModelError, match="reads no bits through a projection"):
        forge_uchida(model, SCHEME, EXAMPLE, torch.Generator())


def test_alignment_brings_the_bits_back_and_gives_none_to_a_stranger(plain, marked):
    model, key = marked
    suspect = combine(model, torch.Generator().manual_seed(3)).model
    found = verify_aligned(suspect.state_dict(), key, model, log10_alpha=-6.0)
    assert found.verdict.matches > 60
    assert found.verdict.accepted
    stranger = network(5).eval()
    found = verify_aligned(stranger.state_dict(), key, model, log10_alpha=-6.0)
    assert not found.verdict.accepted
    assert found.verdict.log10_p_value > -3


@pytest.mark.parametrize(("bits", "rows"), [(64, 1), (128, 2), (32, 1), (100, 2)])
def test_forms_are_the_stretches_of_a_filter(bits, rows):
    key = replace(GREEDY_RESIDUALS, bits=bits).draw_key(network(), EXAMPLE)
    (form,) = GREEDY_RESIDUALS.forms(key).values()
    assert form.shape == (rows, 576)
    assert torch.equal(form.sum(0), torch.ones(576))


def test_refuses_a_layer_that_is_too_small():
    tiny = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3600, 2))
    with pytest.raises(UnsuitableModelError, match="layer '0' has 36 numbers"):
        GREEDY_RESIDUALS.draw_key(tiny, EXAMPLE)
    assert replace(GREEDY_RESIDUALS, bits=2).draw_key(tiny, EXAMPLE).context.bits == 2
