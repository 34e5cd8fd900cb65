"""A passport put into a trained network in closed form: exact where it can be, honest where not."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn

import nnpassport
from nnpassport.fidelity import accuracy
from nnpassport.functional import filters, geometry_of
from nnpassport.layers import Branch, on_branch, passport_norms
from nnpassport.schemes.graft import QUIET, _correction, graft
from nnpassport.schemes.passport import V1, V2
from nnpassport.schemes.patches import input_patches
from nnpassport.training import Recipe, classification, fit

CHANNELS = 16


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class RootMeanSquare(nn.Module):
    """A norm of somebody's own, over the last axis."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class CustomNorm(RootMeanSquare):
    pass


def convolutional(norm):
    return nn.Sequential(
        nn.Conv2d(3, CHANNELS, 3), norm(), nn.ReLU(), nn.Flatten(), nn.Linear(CHANNELS * 36, 5)
    )


def fully_connected(norm):
    return nn.Sequential(nn.Linear(20, CHANNELS), norm(), nn.ReLU(), nn.Linear(CHANNELS, 5))


EXACT = {
    "batch": (convolutional, lambda: nn.BatchNorm2d(CHANNELS)),
    "instance": (convolutional, lambda: nn.InstanceNorm2d(CHANNELS, affine=True)),
    "rms": (fully_connected, lambda: nn.RMSNorm(CHANNELS)),
    "rms of one's own": (fully_connected, lambda: CustomNorm(CHANNELS)),
}
TOGETHER = {
    "group": (convolutional, lambda: nn.GroupNorm(4, CHANNELS)),
    "layer": (fully_connected, lambda: nn.LayerNorm(CHANNELS)),
    "none": (convolutional, nn.Identity),
}


def trained(build, norm):
    """A network with affines and statistics as after training, and inputs of low rank for it.

    Its layer sees a few directions only, as layers do whose inputs are activations; so a correction
    need not be felt at all.
    """
    torch.manual_seed(0)
    model = build(norm)
    for index, each in enumerate([*model.parameters(), *model.buffers()]):
        if each.dim() == 1 and each.is_floating_point():
            each.data.copy_(normal(len(each), seed=index).abs() + 0.5)
    if build is fully_connected:
        return model.eval(), normal(256, 4, seed=1) @ normal(4, 20, seed=2) / 2
    planes = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, 8)] * 2, indexing="ij"))
    slopes = normal(256, 3, 3, seed=1)
    images = torch.einsum("bck,khw->bchw", slopes[..., :2], planes) + slopes[..., 2, None, None]
    return model.eval(), images


def grafted(build, norm, scheme):
    model, images = trained(build, norm)
    before = deepcopy(model)
    key = scheme.draw_key(model, images[:2], seed=bytes(32), layers=["0"])
    marked = nnpassport.mark(model, key, images[:2])
    return before, marked, key, images, graft(model, images, ridge=1e-6)


def outputs(model, images, branch):
    with torch.no_grad(), on_branch(model, branch):
        return model(images)


@torch.no_grad()
def felt(outputs, expected):
    """Share of the outputs' variance that changed."""
    return ((outputs - expected).square().mean() / expected.var()).item()


@pytest.mark.parametrize("kind", EXACT)
def test_every_bit_is_right_and_both_branches_compute_what_the_network_did(kind):
    before, marked, key, images, report = grafted(*EXACT[kind], V2)
    verdict = V2.verify(marked.released().state_dict(), key)
    assert verdict.matches == verdict.bits == CHANNELS
    assert all(each.muted == 0 and each.turned > 0 for each in report.values())
    public, private = (outputs(marked.model, images, b) for b in (Branch.PUBLIC, Branch.PRIVATE))
    assert felt(public, before(images)) < 1e-3
    assert felt(private, public) < 1e-3


@pytest.mark.parametrize("kind", TOGETHER)
def test_channels_that_cannot_turn_alone_are_muted_and_the_public_network_stays(kind):
    before, marked, key, images, report = grafted(*TOGETHER[kind], V2)
    verdict = V2.verify(marked.released().state_dict(), key)
    assert verdict.matches == verdict.bits
    assert sum(each.muted for each in report.values()) > 0
    assert felt(outputs(marked.model, images, Branch.PUBLIC), before(images)) < 1e-3
    for norm in passport_norms(marked.model).values():
        gamma, _ = norm.affine()
        assert (gamma * norm.signs >= QUIET - 1e-3).all()


def test_without_grafting_the_private_branch_computes_something_else():
    model, images = trained(*EXACT["batch"])
    before = deepcopy(model)
    key = V2.draw_key(model, images[:2], seed=bytes(32), layers=["0"])
    marked = nnpassport.mark(model, key, images[:2])
    assert felt(outputs(marked.model, images, Branch.PRIVATE), before(images)) > 0.2


def test_a_loop_of_one_s_own_grafts_with_the_same_function():
    model, images = trained(*EXACT["batch"])
    key = V2.draw_key(model, images[:2], seed=bytes(32), layers=["0"])
    other = deepcopy(model)
    report = nnpassport.mark(model, key, images[:2]).graft(images)
    marked = nnpassport.mark(other, key, images[:2])
    assert graft(marked.model, images) == report
    assert torch.equal(model[0].weight, other[0].weight)


def test_a_grafted_v1_network_folds_into_a_plain_one_that_computes_the_same():
    before, marked, key, images, _ = grafted(*EXACT["batch"], V1)
    released = marked.released().eval()
    assert felt(released(images), before(images)) < 1e-3
    assert V1.verify(released.state_dict(), key).marked is False  # 16 bits are too few for 2^-100
    assert V1.verify(released.state_dict(), key).matches == CHANNELS


def test_muted_channels_keep_their_mean_in_the_private_branch():
    _, marked, _, images, report = grafted(*TOGETHER["group"], V2)
    norm = next(iter(passport_norms(marked.model).values()))
    seen = {}
    for branch in (Branch.PUBLIC, Branch.PRIVATE):
        handle = norm.register_forward_hook(lambda _m, _a, y, b=branch: seen.setdefault(b, y))
        outputs(marked.model, images, branch)
        handle.remove()
    means = [seen[branch].mean((0, 2, 3)) for branch in (Branch.PUBLIC, Branch.PRIVATE)]
    assert next(iter(report.values())).muted > 0
    assert torch.allclose(*means, atol=0.05)


def test_the_correction_meets_both_demands_and_is_felt_least():
    patches = (normal(500, 6, seed=1) @ normal(6, 30, seed=2)).view(500, 1, 30).double()
    forms, need = normal(2, 1, 30, seed=3).double(), normal(8, 2, seed=4).double()
    change = _correction(patches, forms, need, ridge=0.1)
    torch.testing.assert_close(change @ forms[:, 0].T, need)

    ridge = 0.1 * patches.square().mean()

    def cost(each):
        return (patches[:, 0] @ each.T).square().mean(0).sum() + ridge * each.square().sum()

    span = torch.linalg.qr(forms[:, 0].T)[0]
    for seed in range(20):
        other = normal(8, 30, seed=10 + seed).double() * change.std()
        other = other - other @ span @ span.T  # meets the demands as well
        assert cost(change + 0.1 * other) > cost(change)


@pytest.mark.parametrize("samples", [20, 200])
def test_both_ways_of_solving_agree(samples):
    patches = normal(samples, 1, 40).double()
    forms, need = normal(2, 1, 40, seed=3).double(), normal(8, 2, seed=4).double()
    change = _correction(patches, forms, need, ridge=0.5)
    covariance = patches[:, 0].T @ patches[:, 0] / samples
    covariance += 0.5 * patches.square().mean() * torch.eye(40).double()
    inverse = torch.linalg.inv(covariance)
    m = forms[:, 0]
    expected = need @ torch.linalg.inv(m @ inverse @ m.T) @ m @ inverse
    torch.testing.assert_close(change, expected)


LAYERS = [
    (nn.Linear(6, 4), (5, 3, 6)),
    (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (5, 4, 9)),
    (nn.Conv2d(3, 4, (2, 3), stride=(1, 2), padding=(0, 2), dilation=(2, 1)), (5, 3, 7, 8)),
    (nn.Conv2d(4, 4, 3, padding="same", groups=4, padding_mode="reflect"), (5, 4, 6, 6)),
    (nn.Conv3d(2, 3, 2, padding=1), (3, 2, 4, 4, 4)),
    (nn.ConvTranspose1d(4, 6, 4, stride=3, padding=1, output_padding=2, groups=2), (5, 4, 6)),
    (nn.ConvTranspose2d(3, 4, 3, stride=2, padding=2, dilation=2, output_padding=1), (5, 3, 5, 5)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_patches_times_filters_are_outputs_of_the_layer(layer, shape):
    layer = deepcopy(layer).double()
    nn.init.zeros_(layer.bias)
    x = normal(*shape).double()
    geometry = geometry_of(layer)
    rows = filters(layer.weight, geometry)
    patches = input_patches(
        x, tuple(rows.shape[2:]), geometry, 300, torch.Generator().manual_seed(0)
    )
    parts = rows.flatten(1).unflatten(0, (geometry.groups, -1))
    found = torch.einsum("goi,ngi->ngo", parts, patches).flatten(1)
    there = layer(x)
    there = there.flatten(0, -2) if geometry.axes == 0 else there.movedim(1, -1).flatten(0, -2)
    distances = torch.cdist(found, there).min(1)
    assert distances.values.max() < 1e-6
    different = len(there.unique(dim=0))
    assert len(distances.indices.unique()) > min(different, 300) / 3  # and of many places


@pytest.fixture(scope="module", params=["batch", "group"])
def plain(request, digits):
    """A network that has learnt to read digits, and how well it does."""
    train, test, normalise = digits
    torch.manual_seed(0)

    def block(inputs):
        norm = nn.BatchNorm2d(32) if request.param == "batch" else nn.GroupNorm(4, 32)
        return [nn.Conv2d(inputs, 32, 3, padding=1), norm, nn.ReLU()]

    layers = [*block(1), nn.MaxPool2d(2), *block(32), nn.MaxPool2d(2), *block(32)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10))
    recipe = Recipe(epochs=6, batch=64, rate=0.05, schedule="one-cycle", augment=False)
    fit(model, classification, train, recipe, normalise=normalise)
    return request.param, model, accuracy(model.eval(), test, normalise)


@pytest.mark.parametrize("scheme", [V1, V2], ids=lambda scheme: scheme.name)
def test_a_network_that_reads_digits_is_marked_without_training(plain, digits, scheme):
    norm, model, reached = plain
    train, test, normalise = digits
    model = deepcopy(model)
    key = scheme.draw_key(model, normalise(test.images[:2]), seed=bytes(32), layers=["4", "8"])
    scheme.embed(model, key, train, Recipe(epochs=0), normalise=normalise, trained=True)
    numbers = scheme.evaluation(test, normalise)(model)
    assert reached > 0.93
    assert numbers["sign_match"] == 1
    assert scheme.verify(scheme.released(model).state_dict(), key).matches == 64
    if norm == "batch" or scheme is V2:
        assert numbers["accuracy"] >= reached - 0.01
    if norm == "batch" and scheme is V2:
        assert numbers["private_accuracy"] >= reached - 0.01


def test_a_few_steps_bring_the_muted_channels_back(plain, digits):
    norm, model, reached = plain
    if norm == "batch":
        pytest.skip("no channel is muted under batch norm")
    train, test, normalise = digits
    key = V2.draw_key(model, normalise(test.images[:2]), seed=bytes(32), layers=["4", "8"])
    found = {}
    for epochs in (0, 1):
        own = deepcopy(model)
        recipe = Recipe(epochs=epochs, batch=32, rate=0.02, schedule="one-cycle", augment=False)
        V2.embed(own, key, train, recipe, normalise=normalise, trained=True)
        found[epochs] = V2.evaluation(test, normalise)(own)
    assert found[0]["private_accuracy"] < reached - 0.02
    assert found[1]["private_accuracy"] > found[0]["private_accuracy"] + 0.01
    assert found[1]["sign_match"] == 1
    assert found[1]["accuracy"] >= reached - 0.02


def test_what_the_network_answered_before_is_part_of_the_loss(plain, digits):
    norm, model, _ = plain
    if norm == "group":
        pytest.skip("one network is enough")
    train, _, normalise = digits
    key = V2.draw_key(model, normalise(train.images[:2]), seed=bytes(32), layers=["8"])
    images = normalise(train.images[:64])
    distances = []
    for teaching in (0.0, 1.0):
        own = deepcopy(model)
        scheme = replace(V2, teaching=teaching)
        recipe = Recipe(epochs=2, batch=32, rate=0.05, schedule="constant", augment=False)
        scheme.embed(own, key, train, recipe, normalise=normalise, trained=True)
        with torch.no_grad():
            answers = own.eval()(images).softmax(1)
            distances.append((answers - model(images).softmax(1)).abs().mean())
    assert distances[1] < distances[0]
