import pytest
import torch
from torch import nn

from nnpassport.embedding.network.models import build
from nnpassport.embedding.schemes.drawn import (
    image_passports,
    layer_inputs,
    random_passports,
    shuffled_passports,
    with_passports,
)
from nnpassport.embedding.schemes.passport import V2
from nnpassport.scheme import UnsuitableModelError

LAYERS = ["features.8", "features.11"]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def plain():
    torch.manual_seed(0)
    return build("alexnet", norm="batch", width=0.125)


@pytest.fixture
def images():
    return torch.randn(10, 3, 32, 32, generator=rng())


def test_layer_inputs_are_what_the_layers_receive(plain, images):
    plain.eval()
    expected = plain.features[:8](images)
    torch.testing.assert_close(layer_inputs(plain, ["features.8"], images)["features.8"], expected)


def test_the_plain_network_is_left_as_it_was(plain, images):
    plain.train()
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    layer_inputs(plain, LAYERS, images, batch_statistics=True)
    assert all(torch.equal(before[name], value) for name, value in plain.state_dict().items())
    assert plain.training
    assert not any(module._forward_pre_hooks for module in plain.modules())


def test_batch_statistics_are_those_of_the_images_alone(plain, images):
    own = layer_inputs(plain, LAYERS, images, batch_statistics=True)["features.8"]
    running = layer_inputs(plain, LAYERS, images)["features.8"]
    assert not torch.allclose(own, running)
    torch.testing.assert_close(own, plain.train().features[:8](images))


def test_an_image_passport_is_one_image_for_gamma_and_one_for_beta(plain, images):
    passports = image_passports(plain, LAYERS, images[:1], images[1:2])
    alone = layer_inputs(plain, LAYERS, images[1:2])
    assert passports["features.8"].shape == (2, 32, 8, 8)
    torch.testing.assert_close(passports["features.8"][1], alone["features.8"][0])


def test_a_shuffled_passport_takes_each_slot_from_the_next_image_and_repeats_no_channel(
    plain, images
):
    passport = shuffled_passports(plain, LAYERS, images[:4], images[4:8], rng())["features.8"]
    sources = layer_inputs(plain, LAYERS, images[:4])["features.8"]
    taken = []
    for slot in range(32):
        candidates = [
            channel
            for channel in range(32)
            if torch.equal(sources[slot % 4, channel], passport[0, slot])
        ]
        assert candidates, f"slot {slot} is no channel of image {slot % 4}"
        taken.append((slot % 4, candidates[0]))
    alive = [t for t in taken if sources[t].any()]  # silent channels are all alike
    assert len(set(alive)) == len(alive)


def test_shuffling_is_repeated_by_its_generator(plain, images):
    first, again, other = (
        shuffled_passports(plain, LAYERS, images[:4], images[4:8], rng(seed))["features.11"]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_linear_layer_gets_its_inputs_as_positions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))
    images = torch.randn(2, 6, generator=rng())
    passports = image_passports(model, ["0"], images[:1], images[1:])
    assert passports["0"].shape == (2, 6, 1)
    key = V2.draw_key(model, images, layers=["0"], seed=bytes(32), passports="derived")
    drawn = with_passports(key, passports, rng())
    V2.insert(model, drawn, images)
    gamma, _ = model[1].affine()
    torch.testing.assert_close(gamma, model[0].weight @ images[0])


def test_a_key_on_chosen_passports_is_not_derived(plain, images):
    key = V2.draw_key(plain, images[:1], seed=bytes(32), passports="derived")
    passports = random_passports(key, rng())
    drawn = with_passports(key, passports, rng())
    assert not drawn.derived
    assert torch.equal(drawn.layer_passport("features.8"), passports["features.8"])
    kept = with_passports(key, passports, rng(), keep_bits=True)
    assert torch.equal(kept.layer_signs("features.8"), key.layer_signs("features.8"))


def test_a_layer_that_is_not_there_is_named(plain, images):
    with pytest.raises(UnsuitableModelError, match=r"features\.99"):
        layer_inputs(plain, ["features.99"], images)
