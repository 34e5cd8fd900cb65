"""The equations against nested loops that say the same in the plainest way."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from nnpassport.embedding.network.equations import (
    Geometry,
    apply_affine,
    collapsed_affine,
    convolve,
    filters,
    geometry_of,
    mean_patch,
    passport_affine,
    passport_space,
    read_bits,
    sign_loss,
)

TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SHAPES = settings(max_examples=30, deadline=None, derandomize=True, database=None)
MODES = ("zeros", "reflect", "replicate", "circular")


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def source(index, size, mode):
    """Which pixel padding shows at `index`, which may lie outside; None is a zero."""
    if 0 <= index < size:
        return index
    if mode == "zeros":
        return None
    if mode == "replicate":
        return min(max(index, 0), size - 1)
    if mode == "circular":
        return index % size
    return -index if index < 0 else 2 * (size - 1) - index


def before_and_output(layer, space):
    """Padding before the first pixel and length of the output, axis by axis."""
    for axis, size in enumerate(space):
        reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
        if layer.padding == "same":
            yield reach // 2, size
            continue
        pad = 0 if layer.padding == "valid" else layer.padding[axis]
        yield pad, (size + 2 * pad - reach - 1) // layer.stride[axis] + 1


def patches_by_loops(layer, passport):
    """Every input patch that a kernel meets: (positions, in, *kernel), an entry at a time."""
    passport = passport.numpy()
    inputs, *space = passport.shape
    befores, outputs = zip(*before_and_output(layer, space), strict=True)
    found = []
    for place in itertools.product(*map(range, outputs)):
        patch = np.zeros((inputs, *layer.kernel_size))
        for tap in itertools.product(*map(range, layer.kernel_size)):
            pixel = tuple(
                source(p * s + t * d - before, size, layer.padding_mode)
                for p, s, t, d, before, size in zip(
                    place, layer.stride, tap, layer.dilation, befores, space, strict=True
                )
            )
            if None not in pixel:
                for channel in range(inputs):
                    patch[(channel, *tap)] = passport[(channel, *pixel)]
        found.append(patch)
    return np.stack(found)


def average_by_loops(layer, passport):
    """Avg(W ∗ P), channel by channel, group by group, tap by tap."""
    weight, patches = layer.weight.detach().numpy(), patches_by_loops(layer, passport)
    outputs, fan_in = weight.shape[:2]
    averages = []
    for out in range(outputs):
        first = out // (outputs // layer.groups) * fan_in
        total = 0.0
        for patch in patches:
            for channel in range(fan_in):
                total += (weight[out, channel] * patch[first + channel]).sum()
        averages.append(total / len(patches))
    return torch.tensor(averages)


@st.composite
def hosts(draw):
    """A convolution of any geometry, and a passport (2 in *space) that fits it."""
    axes = draw(st.integers(1, 3))

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(axes))

    groups = draw(st.integers(1, 3))
    kernel, dilation = each(1, 3), each(1, 2)
    mode = draw(st.sampled_from(MODES))
    kinds = [draw(st.integers(0, 2)), each(0, 2), "same", "valid"]
    padding = kinds[draw(st.integers(0, 3))]
    stride = (1,) * axes if padding == "same" else each(1, 3)
    layer = CONVOLUTIONS[axes](
        draw(st.integers(1, 2)) * groups,
        draw(st.integers(1, 2)) * groups,
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=mode,
        dtype=torch.float64,
    )
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    space = [r + extra for r, extra in zip(reach, each(0, 3), strict=True)]
    widest = {"same": [r // 2 for r in reach], "valid": [0] * axes}.get(padding, layer.padding)
    # What PyTorch itself cannot pad: a reflection or a circle longer than the map.
    needed = {"reflect": 1, "circular": 0}.get(mode)
    assume(needed is None or all(p + needed <= s for p, s in zip(widest, space, strict=True)))
    seed = draw(st.integers(0, 99))
    with torch.no_grad():
        layer.weight.copy_(normal(*layer.weight.shape, seed=seed))
    return layer, normal(2, layer.in_channels, *space, seed=seed + 100)


@st.composite
def transposed_hosts(draw):
    """A transposed convolution of any geometry, and a passport (2 in *space) that fits it."""
    axes = draw(st.integers(1, 3))

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(axes))

    groups, kernel, stride = draw(st.integers(1, 3)), each(1, 3), each(1, 3)
    padding, dilation, space = each(0, 2), each(1, 2), each(1, 3)
    extra = tuple(
        draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
    )
    layer = TRANSPOSED[axes](
        draw(st.integers(1, 2)) * groups,
        draw(st.integers(1, 2)) * groups,
        kernel,
        stride=stride,
        padding=padding,
        output_padding=extra,
        dilation=dilation,
        groups=groups,
        dtype=torch.float64,
    )
    assume(all(side >= 1 for side in transposed_output(layer, space)))
    seed = draw(st.integers(0, 99))
    with torch.no_grad():
        layer.weight.copy_(normal(*layer.weight.shape, seed=seed))
    return layer, normal(2, layer.in_channels, *space, seed=seed + 100)


def transposed_output(layer, space):
    """Sides of the output: the kernel spreads over it from every input position."""
    return [
        (size - 1) * layer.stride[a]
        + layer.dilation[a] * (layer.kernel_size[a] - 1)
        + 1
        + layer.output_padding[a]
        - 2 * layer.padding[a]
        for a, size in enumerate(space)
    ]


def transposed_average_by_loops(layer, passport):
    """Each input position adds its kernel to the output; what falls outside is cut off."""
    weight, passport = layer.weight.detach().numpy(), passport.numpy()
    inputs, *space = passport.shape
    sides = transposed_output(layer, space)
    totals = np.zeros(layer.out_channels)
    of_group = layer.out_channels // layer.groups
    for place in itertools.product(*map(range, space)):
        for tap in itertools.product(*map(range, layer.kernel_size)):
            target = [
                p * s + t * d - pad
                for p, s, t, d, pad in zip(
                    place, layer.stride, tap, layer.dilation, layer.padding, strict=True
                )
            ]
            if not all(0 <= t < side for t, side in zip(target, sides, strict=True)):
                continue
            for channel in range(inputs):
                first = channel // (inputs // layer.groups) * of_group
                for out in range(of_group):
                    added = weight[(channel, out, *tap)] * passport[(channel, *place)]
                    totals[first + out] += added
    return torch.from_numpy(totals / math.prod(sides))


@SHAPES
@given(transposed_hosts())
def test_direct_collapsed_and_looped_passport_functions_agree_through_transposed_layers(host):
    layer, passport = host
    geometry = geometry_of(layer)
    rows = filters(layer.weight, geometry)
    oracle = tuple(transposed_average_by_loops(layer, each) for each in passport)
    patch = mean_patch(passport, tuple(rows.shape), geometry)
    for found in (passport_affine(rows, passport, geometry), collapsed_affine(rows, patch)):
        torch.testing.assert_close(found, oracle, rtol=1e-11, atol=1e-11)


@SHAPES
@given(transposed_hosts())
def test_the_passport_goes_through_a_transposed_layer_as_an_image_would(host):
    layer, passport = host
    bias = layer.bias.view(1, -1, *[1] * len(layer.kernel_size))
    geometry = geometry_of(layer)
    features = convolve(passport, filters(layer.weight, geometry), geometry)
    torch.testing.assert_close(features + bias, layer(passport), rtol=1e-12, atol=1e-12)


@SHAPES
@given(transposed_hosts())
def test_gradients_reach_the_weight_of_a_transposed_layer_as_through_the_layer_itself(host):
    layer, passport = host
    geometry = geometry_of(layer)
    rows = filters(layer.weight, geometry)
    patch = mean_patch(passport, tuple(rows.shape), geometry)
    factors = normal(2, layer.out_channels, seed=3)
    bias = layer.bias.detach().view(1, -1, *[1] * len(layer.kernel_size))

    def gradient(affine):
        return torch.autograd.grad((torch.stack(tuple(affine)) * factors).sum(), layer.weight)[0]

    direct = (layer(passport) - bias).flatten(2).mean(2)
    torch.testing.assert_close(
        gradient(collapsed_affine(rows, patch)), gradient(direct), rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize("groups", [1, 3])
def test_filters_are_a_view_with_the_output_channels_first(groups):
    layer = nn.ConvTranspose2d(6, 9, (2, 3), groups=groups)
    rows = filters(layer.weight, geometry_of(layer))
    assert rows.shape == (9, 6 // groups, 2, 3)
    for out in range(9):
        group, column = divmod(out, 9 // groups)
        inputs = slice(group * 6 // groups, (group + 1) * 6 // groups)
        assert torch.equal(rows[out], layer.weight[inputs, column])
    with torch.no_grad():
        layer.weight.zero_()
    if groups == 1:  # with several, the rows of a group lie apart and are copied
        assert rows.abs().max() == 0


def test_gpt2s_matrices_are_read_as_the_linear_layers_that_they_are():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    matrix, linear = conv1d(5, 7).double(), nn.Linear(7, 5, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(matrix.weight.T)
    passport = normal(2, 7, 6)
    geometry = geometry_of(matrix)
    rows = filters(matrix.weight, geometry)
    patch = mean_patch(passport, tuple(rows.shape), geometry)
    expected = passport_affine(linear.weight, passport, geometry_of(linear))
    torch.testing.assert_close(passport_affine(rows, passport, geometry), expected)
    torch.testing.assert_close(collapsed_affine(rows, patch), expected)
    torch.testing.assert_close(
        convolve(passport, rows, geometry).mT + matrix.bias, matrix(passport.mT.contiguous())
    )


@SHAPES
@given(hosts())
def test_direct_collapsed_and_looped_passport_functions_agree(host):
    layer, passport = host
    geometry = geometry_of(layer)
    oracle = tuple(average_by_loops(layer, each) for each in passport)
    direct = passport_affine(layer.weight, passport, geometry)
    patch = mean_patch(passport, tuple(layer.weight.shape), geometry)
    torch.testing.assert_close(direct, oracle, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        collapsed_affine(layer.weight, patch), oracle, rtol=1e-12, atol=1e-12
    )


@SHAPES
@given(hosts())
def test_the_passport_goes_through_the_layer_as_an_image_would(host):
    layer, passport = host
    bias = layer.bias.view(1, -1, *[1] * len(layer.kernel_size))
    features = convolve(passport, layer.weight, geometry_of(layer))
    torch.testing.assert_close(features + bias, layer(passport), rtol=1e-12, atol=1e-12)


@SHAPES
@given(hosts())
def test_the_mean_patch_is_the_mean_of_the_patches_the_kernel_meets(host):
    layer, passport = host
    patch = mean_patch(passport, tuple(layer.weight.shape), geometry_of(layer))
    oracle = np.stack([patches_by_loops(layer, each).mean(0) for each in passport])
    oracle = torch.from_numpy(oracle).view(2, layer.groups, -1)
    torch.testing.assert_close(patch, oracle, rtol=1e-12, atol=1e-12)


@SHAPES
@given(hosts())
def test_gradients_to_the_weight_are_those_of_the_direct_convolution(host):
    layer, passport = host
    geometry = geometry_of(layer)
    patch = mean_patch(passport, tuple(layer.weight.shape), geometry)
    # A different factor on every channel of γ and β, so that no two may be swapped.
    factors = normal(2, layer.out_channels, seed=3)

    def gradient(affine):
        return torch.autograd.grad((torch.stack(affine) * factors).sum(), layer.weight)[0]

    torch.testing.assert_close(
        gradient(collapsed_affine(layer.weight, patch)),
        gradient(passport_affine(layer.weight, passport, geometry)),
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("positions", [1, 64])
def test_a_linear_layer_averages_over_the_positions_of_its_passport(positions):
    weight, passport = normal(5, 7).requires_grad_(), normal(2, 7, positions, seed=1)
    oracle = torch.zeros(2, 5, dtype=torch.float64)
    for which, out, position, column in itertools.product(
        range(2), range(5), range(positions), range(7)
    ):
        oracle[which, out] += weight[out, column].item() * passport[which, column, position]
    oracle /= positions
    patch = mean_patch(passport, (5, 7), Geometry())
    direct = torch.stack(passport_affine(weight, passport, Geometry()))
    collapsed = torch.stack(collapsed_affine(weight, patch))
    torch.testing.assert_close(direct, oracle)
    torch.testing.assert_close(collapsed, oracle)
    factors = normal(2, 5, seed=2)
    gradients = [torch.autograd.grad((a * factors).sum(), weight)[0] for a in (direct, collapsed)]
    torch.testing.assert_close(*gradients)


def test_a_passport_goes_through_a_linear_layer_position_by_position():
    layer, passport = nn.Linear(7, 5, dtype=torch.float64), normal(2, 7, 6)
    features = convolve(passport, layer.weight, geometry_of(layer))
    torch.testing.assert_close(features.mT + layer.bias, layer(passport.mT))


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_the_collapsed_form_reads_weights_in_channels_last_memory(groups):
    weight = normal(8, 8 // groups, 3, 3)
    patch = normal(2, groups, weight[0].numel(), seed=1)
    turned = weight.to(memory_format=torch.channels_last)
    torch.testing.assert_close(collapsed_affine(turned, patch), collapsed_affine(weight, patch))


def test_the_mean_patch_is_float64_whatever_the_passport_is():
    passport, geometry = normal(2, 3, 6, 6, dtype=torch.float32), geometry_of(nn.Conv2d(3, 4, 3))
    patch = mean_patch(passport, (4, 3, 3, 3), geometry)
    assert patch.dtype == torch.float64
    assert torch.equal(patch, mean_patch(passport.double(), (4, 3, 3, 3), geometry))


def test_the_mean_patch_is_a_constant_wherever_it_is_computed():
    geometry = geometry_of(nn.Conv2d(3, 4, 3))
    assert not mean_patch(normal(2, 3, 6, 6), (4, 3, 3, 3), geometry).requires_grad
    with torch.no_grad():
        assert mean_patch(normal(2, 3, 6, 6), (4, 3, 3, 3), geometry).abs().min() > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_mean_patch_is_computed_on_the_device_of_the_passport():
    passport, geometry = normal(2, 3, 6, 6), geometry_of(nn.Conv2d(3, 4, 3))
    patch = mean_patch(passport.cuda(), (4, 3, 3, 3), geometry)
    assert patch.is_cuda
    torch.testing.assert_close(patch.cpu(), mean_patch(passport, (4, 3, 3, 3), geometry))


def test_gradients_flow_to_the_passport_through_the_direct_form():
    passport = normal(2, 3, 6, 6).requires_grad_()
    gamma, _ = passport_affine(normal(4, 3, 3, 3), passport, geometry_of(nn.Conv2d(3, 4, 3)))
    gamma.sum().backward()
    assert passport.grad[0].abs().min() > 0
    assert passport.grad[1].abs().max() == 0


@pytest.mark.parametrize(("shape", "axis"), [((2, 3, 4, 5), 1), ((2, 4, 3), -1), ((2, 3), 1)])
def test_equation_2_scales_and_shifts_each_channel(shape, axis):
    features, gamma, beta = normal(*shape), normal(3, seed=1), normal(3, seed=2)
    result = apply_affine(features, gamma, beta, channel_axis=axis)
    for place in itertools.product(*map(range, shape)):
        channel = place[axis]
        expected = gamma[channel] * features[place] + beta[channel]
        assert math.isclose(result[place], expected, rel_tol=1e-12, abs_tol=1e-12)


@pytest.mark.parametrize("margin", [0.1, 0.0, 1.5])
def test_equation_5_is_the_sum_of_the_hinges(margin):
    gamma = normal(50).requires_grad_()
    signs = normal(50, seed=1).sign()
    oracle = sum(
        max(margin - g * b, 0) for g, b in zip(gamma.tolist(), signs.tolist(), strict=True)
    )
    loss = sign_loss(gamma, signs, margin=margin)
    assert math.isclose(loss.item(), oracle, rel_tol=1e-12)
    loss.backward()
    violated = gamma * signs < margin
    assert torch.equal(gamma.grad, torch.where(violated, -signs, torch.zeros(())))


def test_the_sign_loss_is_zero_exactly_when_every_scale_clears_the_margin():
    signs = torch.tensor([1.0, -1.0, 1.0])
    assert sign_loss(0.125 * signs, signs, margin=0.125) == 0
    assert sign_loss(torch.tensor([0.125, -0.125, 0.12]), signs, margin=0.125) > 0
    assert sign_loss(torch.zeros(3), signs) == pytest.approx(0.3)


def test_bits_are_the_signs_of_the_scale():
    weight, patch = normal(40, 3, 2, 2), normal(2, 1, 12, seed=1)
    gamma, _ = collapsed_affine(weight, patch)
    assert torch.equal(read_bits(weight, patch), gamma.sign())
    assert {-1.0, 1.0} == set(read_bits(weight, patch).tolist())


def test_a_scale_of_exactly_zero_matches_neither_bit():
    weight, patch = normal(4, 3, 2, 2), normal(2, 1, 12, seed=1)
    weight[2] = 0
    bits = read_bits(weight, patch)
    assert bits[2] == 0
    assert int((bits == 1).sum() + (bits == -1).sum()) == 3


def test_a_scale_that_is_no_number_matches_neither_bit():
    weight, patch = normal(4, 3, 2, 2), normal(2, 1, 12, seed=1)
    weight[2, 0, 0, 0] = math.nan
    bits = read_bits(weight, patch)
    assert int((bits == 1).sum() + (bits == -1).sum()) == 3


def test_bits_are_read_in_float64_from_weights_of_any_precision():
    # Single precision loses the one, and half precision had lost it before.
    weight = torch.tensor([[2.0**30, 1.0, -(2.0**30)], [1.0, 2.0**30, -(2.0**30)]])
    assert read_bits(weight, torch.ones(2, 1, 3)).tolist() == [1.0, 1.0]
    half = torch.tensor([[2048.0, 1.0, -2048.0]], dtype=torch.float16)
    assert read_bits(half, torch.ones(2, 1, 3)).tolist() == [1.0]


@pytest.mark.parametrize(
    ("layer", "geometry"),
    [
        (nn.Linear(3, 4), Geometry()),
        (nn.Conv1d(2, 2, 3, stride=2, padding=1), Geometry((2,), ((1, 1),), (1,))),
        (
            nn.Conv2d(4, 4, (2, 4), padding="same", groups=2, padding_mode="circular"),
            Geometry((1, 1), ((0, 1), (1, 2)), (1, 1), 2, "circular"),
        ),
        (
            nn.Conv2d(4, 4, 3, stride=(2, 1), padding="valid", dilation=2),
            Geometry((2, 1), ((0, 0), (0, 0)), (2, 2)),
        ),
        (
            nn.ConvTranspose2d(4, 6, 3, stride=2, padding=(0, 1), output_padding=1, groups=2),
            Geometry((2, 2), ((0, 0), (1, 1)), (1, 1), 2, "zeros", True, (1, 1)),
        ),
        (
            nn.Conv3d(2, 2, 3, padding=(0, 1, 2)),
            Geometry((1, 1, 1), ((0, 0), (1, 1), (2, 2)), (1, 1, 1)),
        ),
    ],
)
def test_geometry_is_the_layers_own_with_its_padding_spelled_out(layer, geometry):
    assert geometry_of(layer) == geometry
    assert geometry_of(layer).axes == len(geometry.stride)


@pytest.mark.parametrize("layer", [nn.Bilinear(3, 4, 3), nn.BatchNorm2d(3)])
def test_other_layers_have_no_passport_function(layer):
    with pytest.raises(TypeError, match=f"{type(layer).__name__}.*needed: Conv1d/2d/3d"):
        geometry_of(layer)


@pytest.mark.parametrize(
    ("layer", "space", "expected"),
    [
        (nn.Conv2d(3, 4, 3), (4, 6), (4, 6)),
        (nn.Conv2d(3, 4, 3), (224, 8), (8, 8)),
        (nn.Conv2d(3, 4, 11), (224, 224), (11, 11)),
        (nn.Conv2d(3, 4, 5, dilation=(2, 3)), (32, 32), (9, 13)),
        (nn.Conv2d(3, 4, 11, padding=5), (7, 7), (7, 7)),
        (nn.Conv1d(3, 4, 3), (100,), (8,)),
        (nn.Conv3d(3, 4, 3), (2, 9, 5), (2, 8, 5)),
        (nn.ConvTranspose2d(3, 4, 5, dilation=3), (4, 32), (4, 8)),
        (nn.Linear(3, 4), (), (64,)),
    ],
)
def test_a_derived_passport_is_as_large_as_the_map_but_small_enough_to_be_heard(
    layer, space, expected
):
    kernel = tuple(layer.weight.shape[2:])
    assert passport_space(space, kernel, geometry_of(layer)) == expected
