"""The passport layer around every kind of norm, and the norm that keeps the branches apart."""

import subprocess
import sys
from copy import deepcopy
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from nnpassport.embedding.network.equations import geometry_of, mean_patch, passport_affine
from nnpassport.embedding.network.layers import (
    Branch,
    BranchNorm,
    PassportNorm,
    on_branch,
    own_statistics,
    replace_module,
    set_branch,
)

CHANNELS = 8

# Norm, where the channels are in its input, and the axes that share a mean (None: no norm at all).
AFTER_CONVOLUTION = {
    "batch": lambda: nn.BatchNorm2d(CHANNELS),
    "batch-without-affine": lambda: nn.BatchNorm2d(CHANNELS, affine=False),
    "batch-without-statistics": lambda: nn.BatchNorm2d(CHANNELS, track_running_stats=False),
    "group": lambda: nn.GroupNorm(2, CHANNELS),
    "layer": lambda: nn.GroupNorm(1, CHANNELS),
    "instance": lambda: nn.InstanceNorm2d(CHANNELS, affine=True),
    "instance-without-affine": lambda: nn.InstanceNorm2d(CHANNELS),
    "none": lambda: None,
}
AFTER_LINEAR = {
    "layer": lambda: nn.LayerNorm(CHANNELS),
    "layer-without-bias": lambda: nn.LayerNorm(CHANNELS, bias=False),
    "layer-without-affine": lambda: nn.LayerNorm(CHANNELS, elementwise_affine=False),
    "root-mean-square": lambda: nn.RMSNorm(CHANNELS),
    "batch": lambda: nn.BatchNorm1d(CHANNELS),
    "none": lambda: None,
}
CASES = [("convolution", each) for each in AFTER_CONVOLUTION] + [
    ("linear", each) for each in AFTER_LINEAR
]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Case(NamedTuple):
    """A layer, its norm, a passport and the passport layer made of them."""

    layer: nn.Module
    norm: nn.Module
    passport: Tensor
    patch: Tensor
    signs: Tensor
    axis: int
    wrapped: PassportNorm
    x: Tensor


def build(kind, norm, **keywords):
    torch.manual_seed(0)
    convolution = kind == "convolution"
    layer = nn.Conv2d(3, CHANNELS, 3, padding=1) if convolution else nn.Linear(5, CHANNELS)
    layer.double()
    norm = (AFTER_CONVOLUTION if convolution else AFTER_LINEAR)[norm]()
    x = normal(4, 3, 6, 6, seed=3) if convolution else normal(4, 5, seed=3)
    x = x if norm is None else layer(x).detach()
    norm = layer if norm is None else norm.double()
    for index, each in enumerate(norm.parameters()):
        with torch.no_grad():  # not the ones and zeros that norms start with
            each.copy_(normal(*each.shape, seed=index + 10))
    for index, each in enumerate(norm.buffers()):
        if each.dim():
            each.copy_(normal(*each.shape, seed=index + 20).abs() + 0.5)
    passport = normal(2, 3, 4, 4, seed=1) if convolution else normal(2, 5, 6, seed=1)
    patch = mean_patch(passport, tuple(layer.weight.shape), geometry_of(layer))
    signs = normal(CHANNELS, seed=2).sign()
    axis = 1 if convolution else -1
    wrapped = PassportNorm(layer, norm, patch, signs, channel_axis=axis, **keywords)
    return Case(layer, norm, passport, patch, signs, axis, wrapped, x)


def by_hand(case):
    """Normalise, then γ·x + β, from the definitions."""
    gamma, beta = passport_affine(case.layer.weight, case.passport, geometry_of(case.layer))
    bare = case.norm is case.layer
    normalised = case.layer(case.x) if bare else normalised_by_hand(case.norm, case.x)
    shape = [1] * normalised.dim()
    shape[case.axis] = -1
    return gamma.view(shape) * normalised + beta.view(shape)


@pytest.fixture(params=CASES, ids="-".join)
def case(request):
    """Every kind of layer with every kind of norm."""
    return build(*request.param)


def normalised_by_hand(norm, x):
    """(x − mean) / √(variance + ε), with the mean over whatever this norm shares it."""
    if isinstance(norm, nn.RMSNorm):
        eps = torch.finfo(x.dtype).eps
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    if isinstance(norm, nn.LayerNorm):
        axes = (-1,)
    elif isinstance(norm, nn.InstanceNorm2d):
        axes = (2, 3)
    elif isinstance(norm, nn.GroupNorm):
        grouped = x.unflatten(1, (norm.num_groups, -1))
        mean = grouped.mean((2, 3, 4), keepdim=True)
        spread = (grouped - mean).square().mean((2, 3, 4), keepdim=True)
        return ((grouped - mean) / (spread + norm.eps).sqrt()).view_as(x)
    elif norm.training or norm.running_mean is None:
        axes = (0, *range(2, x.dim()))
    else:
        shape = (1, -1, *[1] * (x.dim() - 2))
        mean, spread = norm.running_mean.view(shape), norm.running_var.view(shape)
        return (x - mean) / (spread + norm.eps).sqrt()
    mean = x.mean(axes, keepdim=True)
    spread = (x - mean).square().mean(axes, keepdim=True)
    return (x - mean) / (spread + norm.eps).sqrt()


@pytest.mark.parametrize("training", [True, False])
def test_presented_is_normalised_then_scaled_and_shifted_by_the_passport(case, training):
    case.wrapped.train(training)
    expected = by_hand(case)
    set_branch(case.wrapped, Branch.PRIVATE)
    torch.testing.assert_close(case.wrapped(case.x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("training", [True, False])
def test_withheld_is_the_wrapped_norm_bit_for_bit(case, training):
    plain = deepcopy(case.norm).train(training)
    case.wrapped.train(training)
    assert torch.equal(case.wrapped(case.x), plain(case.x))
    for mine, own in zip(case.norm.buffers(), plain.buffers(), strict=True):
        assert torch.equal(mine, own)


@pytest.mark.parametrize("forks", [True, False])
def test_both_is_public_then_private_of_each_half_or_of_the_whole_at_a_fork(case, forks):
    x = case.x if forks else torch.cat([case.x, case.x.flip(0)])
    case.wrapped.eval()
    case.wrapped.forks = forks
    public, private = (case.x, case.x) if forks else (case.x, case.x.flip(0))
    set_branch(case.wrapped, Branch.PRIVATE)
    private = case.wrapped(private)
    set_branch(case.wrapped, Branch.BOTH)
    assert torch.equal(case.wrapped(x), torch.cat([case.norm(public), private]))


def test_gradients_reach_the_layer_through_the_passport_and_not_the_norms_own_affine(case):
    set_branch(case.wrapped, Branch.PRIVATE)
    x = case.x.detach().requires_grad_()
    (case.wrapped(x) * normal(*case.wrapped(x).shape, seed=5)).sum().backward()
    assert case.layer.weight.grad.abs().min() > 0
    if case.norm is not case.layer:
        assert [each.grad for each in case.norm.parameters() if each.grad is not None] == []
    gamma, beta = case.wrapped.affine()
    assert gamma.requires_grad
    assert beta.requires_grad


def test_the_affine_of_weights_in_channels_last_memory_is_the_same():
    for groups in (1, 2):
        layer = nn.Conv2d(4, CHANNELS, 3, groups=groups).double()
        patch = mean_patch(normal(2, 4, 5, 5), tuple(layer.weight.shape), geometry_of(layer))
        wrapped = PassportNorm(layer, nn.BatchNorm2d(CHANNELS), patch, torch.ones(CHANNELS))
        before = wrapped.affine()
        layer.to(memory_format=torch.channels_last)
        assert not layer.weight.is_contiguous()
        torch.testing.assert_close(wrapped.affine(), before, rtol=1e-12, atol=1e-12)


def test_a_deep_copy_has_a_life_of_its_own():
    case = build("convolution", "batch", own_statistics=True)
    model = nn.Sequential(case.layer, case.wrapped).eval()
    set_branch(model, Branch.PRIVATE)
    images = normal(4, 3, 6, 6, seed=3)
    before, copy = model(images), deepcopy(model)
    assert torch.equal(copy(images), before)
    assert copy[1].layer is copy[0]
    with torch.no_grad():
        for each in [*copy.parameters(), *copy.buffers()]:
            each.add_(1)
    set_branch(copy, Branch.PUBLIC)
    assert torch.equal(model(images), before)
    set_branch(copy, Branch.PRIVATE)
    assert not torch.allclose(copy(images), before)


def test_nothing_secret_is_in_the_state_dict_or_the_repr(case):
    for model in (case.wrapped, nn.Sequential(case.layer, case.wrapped)):
        state = model.state_dict()
        assert not [name for name in state if "patch" in name or "sign" in name]
        for secret in (case.patch, case.patch.float(), case.signs, case.signs.float()):
            raw = secret.numpy().tobytes()
            assert not [n for n, each in state.items() if raw in each.numpy().tobytes()]
        numbers = [f"{value:.3f}" for value in case.patch.flatten().tolist()]
        assert not [each for each in numbers if each in repr(model)]
        assert "patch" not in repr(model)
        assert "sign" not in repr(model)


def test_each_branch_moves_its_own_running_statistics_only():
    case = build("convolution", "batch", own_statistics=True)
    public, private = case.wrapped.norm, case.wrapped.private_norm
    assert own_statistics(case.wrapped) == [private]
    torch.testing.assert_close(private.state_dict(), public.state_dict(), rtol=0, atol=0)
    for branch, moved, still in (
        (Branch.PUBLIC, public, private),
        (Branch.PRIVATE, private, public),
    ):
        set_branch(case.wrapped, branch)
        before, expected = deepcopy(still), deepcopy(moved)
        expected(case.x)
        case.wrapped(case.x)
        assert all(map(torch.equal, still.buffers(), before.buffers()))
        assert all(map(torch.equal, moved.buffers(), expected.buffers()))


@pytest.mark.parametrize("norm", ["group", "layer", "batch-without-statistics", "none"])
def test_a_norm_without_running_statistics_needs_no_second_set(norm):
    case = build("convolution", norm, own_statistics=True)
    assert case.wrapped.private_norm is None
    assert own_statistics(case.wrapped) == []


def test_the_copy_that_keeps_the_private_statistics_is_not_trained():
    case = build("convolution", "batch", own_statistics=True)
    trained = {id(each) for each in case.wrapped.parameters() if each.requires_grad}
    assert trained == {id(each) for each in case.norm.parameters()}


@pytest.mark.parametrize("training", [True, False])
def test_a_branch_norm_shares_its_affine_and_keeps_statistics_apart(training):
    case = build("convolution", "batch")
    norm, plain = case.norm.train(training), deepcopy(case.norm).train(training)
    branches = BranchNorm(norm).train(training)
    branches.private_norm.running_mean.add_(1)
    apart = deepcopy(plain)
    apart.running_mean.add_(1)
    x, other = case.x, 2 * case.x + 1
    set_branch(branches, Branch.BOTH)
    output = branches(torch.cat([x, other]))
    expected = torch.cat([plain(x), apart(other)])
    assert torch.equal(output, expected)
    factors = normal(*output.shape, seed=4)
    (output * factors).sum().backward()
    (expected * factors).sum().backward()
    torch.testing.assert_close(norm.weight.grad, plain.weight.grad + apart.weight.grad)
    for mine, own in ((norm, plain), (branches.private_norm, apart)):
        assert all(map(torch.equal, mine.buffers(), own.buffers()))
    for branch, own in ((Branch.PUBLIC, plain), (Branch.PRIVATE, apart)):
        set_branch(branches, branch)
        assert torch.equal(branches(x), own(x))


def test_one_branch_for_a_while_and_then_all_is_as_before():
    case = build("convolution", "batch", own_statistics=True)
    model = nn.Sequential(case.layer, case.wrapped, nn.Dropout(), BranchNorm(nn.BatchNorm2d(8)))
    set_branch(model, Branch.BOTH)
    model[3].running.branch = Branch.PUBLIC  # each its own: they are of two networks
    model[2].eval()
    modes = [each.training for each in model.modules()]
    error = RuntimeError("in the middle")

    def use():
        with on_branch(model, Branch.PRIVATE):
            assert model[1].running.branch is model[3].running.branch is Branch.PRIVATE
            assert not any(each.training for each in model.modules())
            raise error

    with pytest.raises(RuntimeError, match="in the middle"):
        use()
    assert (model[1].running.branch, model[3].running.branch) == (Branch.BOTH, Branch.PUBLIC)
    assert modes == [each.training for each in model.modules()]


def test_a_synchronised_batch_norm_can_be_wrapped_and_a_wrapped_one_converted():
    case = build("convolution", "batch", own_statistics=True)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(deepcopy(case.wrapped))
    assert isinstance(converted.norm, nn.SyncBatchNorm)
    assert isinstance(converted.private_norm, nn.SyncBatchNorm)
    norm = nn.SyncBatchNorm(CHANNELS).double()
    wrapped = PassportNorm(case.layer, norm, case.patch, case.signs, own_statistics=True)
    assert isinstance(wrapped.private_norm, nn.SyncBatchNorm)
    set_branch(case.wrapped, Branch.PRIVATE)
    set_branch(converted, Branch.PRIVATE)
    torch.testing.assert_close(converted.eval()(case.x), case.wrapped.eval()(case.x))


# PyTorch says so of a plain RMSNorm too.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_under_autocast_the_passports_scale_stays_in_float32(case):
    expected = by_hand(case)
    case.layer.float()
    case.wrapped.float()
    exact = case.wrapped.affine()
    set_branch(case.wrapped, Branch.PRIVATE)
    # What reaches a norm is the output of an autocast convolution: bfloat16.
    x = case.x.float() if case.norm is case.layer else case.x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        affine, output = case.wrapped.affine(), case.wrapped(x)
    assert all(each.dtype == torch.float32 for each in affine)
    assert all(map(torch.equal, affine, exact))
    eps = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(output.double(), expected, rtol=4 * eps, atol=4 * eps)


def test_under_autocast_a_small_scale_keeps_its_sign():
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.001, -1.0]]))
    patch = torch.ones(2, 1, 2)
    wrapped = PassportNorm(layer, layer, patch, torch.ones(1), channel_axis=-1)
    with torch.autocast("cpu", torch.bfloat16):
        assert (layer.weight @ patch[0].T).item() == 0  # what bfloat16 would say
        assert wrapped.affine()[0].item() > 0


def test_a_module_is_replaced_under_every_name_it_has():
    model = nn.Module()
    model.norm = nn.BatchNorm2d(3)
    model.block = nn.Sequential(nn.Conv2d(3, 3, 1), model.norm)
    keys = list(model.state_dict())
    replace_module(model, "norm", nn.GroupNorm(1, 3))
    assert model.block[1] is model.norm
    assert isinstance(model.norm, nn.GroupNorm)
    replace_module(model, "block.1", nn.BatchNorm2d(3))
    assert list(model.state_dict()) == keys


COMPILED = """
import sys
import torch
from torch import nn
from nnpassport.embedding.network import surgery
from nnpassport.embedding.network.fork import forked_at
from nnpassport.embedding.network.equations import geometry_of, mean_patch
from nnpassport.embedding.network.layers import Branch, BranchNorm, passport_norms, set_branch

torch.set_num_threads(1)
torch.manual_seed(0)
torch._inductor.config.compile_threads = 1
backend, size = sys.argv[1:]


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


def secret(layer):
    weight = layer.weight
    space = (4,) * max(1, weight.dim() - 2)
    passport = torch.randn(2, weight.shape[1], *space)
    patch = mean_patch(passport, tuple(weight.shape), geometry_of(layer))
    return surgery.Secret(patch, torch.randn(len(weight)).sign())


def check(layers, hosts, fork, branches=Branch):
    model = nn.Sequential(*layers)
    secrets = {name: secret(model.get_submodule(name)) for name in hosts}
    images = torch.randn(2, 3, 8, 8)
    surgery.insert(model, secrets, images, two_branches=True)
    assert len(passport_norms(model)) == len(hosts) and forked_at(model) == fork
    for branch in branches:
        set_branch(model, branch)
        state = {name: each.clone() for name, each in model.state_dict().items()}
        expected = model(images)
        model.load_state_dict(state)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        outputs = compiled(images)
        assert len(outputs) == 2 * (1 + (branch is Branch.BOTH))
        torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)
        outputs.sum().backward()


forks_around_a_block = (
    [nn.Conv2d(3, 4, 3), Residual(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)),
     nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3)],
    ("1.0",), ("1",), [Branch.BOTH],
)
check(*forks_around_a_block)
if size == "large":
    check(
        [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8),
         nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8, affine=False),
         nn.Flatten(), nn.Linear(128, 3)],
        ("0", "3", "5", "7"), ("1",),
    )
"""


def compile_branches(backend, size):
    # In a process of its own: functions with run-time shape checks do not make a full graph.
    run = subprocess.run(
        [sys.executable, "-c", COMPILED, backend, size],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_every_branch_compiles_into_one_graph():
    compile_branches("eager", "large")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_both_branches_compile_into_machine_code():
    compile_branches("inductor", "small")
