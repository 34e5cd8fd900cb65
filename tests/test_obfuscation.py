"""Networks that compute the same: what stays equal, what of a mark is lost, and what is not."""

from copy import deepcopy
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from nnpassport.alignment.channels import Channels, Producer
from nnpassport.attacks.obfuscation import (
    combine,
    flip_signs,
    insert_dummies,
    permute,
    rescale,
    split_channels,
)
from nnpassport.embedding.network.channels import channels_of
from nnpassport.embedding.network.equations import read_bits
from nnpassport.embedding.network.models import build
from nnpassport.embedding.schemes.passport import V2
from nnpassport.embedding.schemes.signature import secrets_of
from nnpassport.scheme import BadRecipeError, UnsuitableModelError

NORMS = ("batch", "group", "layer", "instance", "none")
ATTACKS = {
    "flip_signs": (flip_signs, ("batch", "group", "layer", "instance")),
    "permute": (permute, NORMS),
    "rescale": (rescale, NORMS),
    "insert_dummies": (insert_dummies, ("batch", "group", "instance", "none")),
    "split_channels": (split_channels, ("batch", "group", "instance", "none")),
    "combine": (combine, NORMS),
}
GROWING = ("insert_dummies", "split_channels")
EVERYTHING = partial(
    combine, attacks=(insert_dummies, split_channels, flip_signs, permute, rescale)
)
CASES = [
    (name, architecture, norm)
    for name, (_, norms) in ATTACKS.items()
    for norm in norms
    for architecture in ("alexnet", "resnet18")
]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def network(architecture="alexnet", norm="batch", *, width=0.25, seed=0, **arguments):
    """A small one in evaluation mode; no scale is 1, no shift 0, no statistic the initial one."""
    torch.manual_seed(seed)
    model = build(architecture, norm=norm, width=width, **arguments).eval()
    draw = rng(seed + 1)
    for module in model.modules():
        for name, values in (*module._parameters.items(), *module._buffers.items()):
            if values is not None and values.dim() == 1 and not isinstance(module, nn.Linear):
                values.data.normal_(0, 0.3, generator=draw)
            if values is not None and (name == "running_var" or is_scale(module, name)):
                values.data.uniform_(0.5, 1.5, generator=draw)
            if is_scale(module, name):
                values.data.mul_(torch.randn(len(values), generator=draw).sign())
    return model


def is_scale(module, name):
    return name == "weight" and module.weight.dim() == 1


def images(size=32, dtype=torch.float64):
    return torch.randn(3, 3, size, size, generator=rng(9), dtype=dtype)


@torch.no_grad()
def error(before, after, size=32):
    """Largest difference of outputs, over how much the outputs of different images differ."""
    x = images(size, next(before.parameters()).dtype)
    outputs = before(x)
    spread = (outputs - outputs.roll(1, 0)).abs().max()
    assert spread > 1e-3  # else equal outputs would prove nothing
    return float((after(x) - outputs).abs().max() / spread)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before, after):
    """Names of what is not equal bit for bit."""
    return {
        name
        for name, value in before.items()
        if value.shape != after[name].shape or not torch.equal(value, after[name])
    }


def weights(model):
    return {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


def marked(norm="batch", layers=None):
    """A network whose rows were negated until a key reads all its bits, and that key."""
    model = network(norm=norm)
    key = V2.draw_key(
        model, images(dtype=torch.float32), seed=bytes(32), layers=layers, passports="derived"
    )
    for name, secret in secrets_of(key).items():
        weight = model.get_submodule(name).weight.data
        weight[read_bits(weight, secret.mean_patch) != secret.signs] *= -1
    assert matches(model, key) == 1
    return model, key


def matches(model, key):
    return V2.verify(model.state_dict(), key).match_rate


def about_half(rate):
    return 0.37 < rate < 0.63  # four standard deviations of 224 coins


# Equal outputs.


@pytest.mark.parametrize(("name", "architecture", "norm"), CASES)
def test_an_attacked_network_computes_the_same(name, architecture, norm):
    model = network(architecture, norm)
    attack = ATTACKS[name][0]
    assert error(model, attack(model, rng()).model) < 1e-4
    exact = model.double()
    attacked = attack(exact, rng()).model
    assert error(exact, attacked) < 1e-10
    assert {p.dtype for p in attacked.parameters()} == {torch.float64}


@pytest.mark.parametrize(
    ("architecture", "arguments", "size"),
    [
        ("alexnet", {"stem": "imagenet", "norm": "batch"}, 64),
        ("alexnet", {"stem": "imagenet", "norm": "none"}, 64),
        ("resnet18", {"stem": "imagenet", "residual": "relu-before-addition"}, 64),
        ("resnet50", {"norm": "batch", "width": 0.1}, 32),
        ("resnet50", {"norm": "group", "stem": "imagenet", "residual": "relu-before-addition"}, 64),
    ],
)
def test_every_stem_block_and_residual_form_computes_the_same(architecture, arguments, size):
    model = network(architecture, **arguments).double()
    grown = insert_dummies(model, rng()).model
    assert error(model, grown, size) < 1e-10
    assert error(model, combine(split_channels(grown, rng()).model, rng()).model, size) < 1e-10


@pytest.mark.parametrize("architecture", ["alexnet", "resnet18"])
@pytest.mark.parametrize("norm", ["batch", "group", "instance"])
def test_all_attacks_in_a_row_compute_the_same(architecture, norm):
    model = network(architecture, norm).double()
    assert error(model, EVERYTHING(model, rng()).model) < 1e-10


@pytest.mark.parametrize("name", GROWING)
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_as_many_new_channels_as_there_were_compute_the_same(name, norm):
    model = network(norm=norm).double()
    attacked = ATTACKS[name][0](model, rng(), share=1.0).model
    assert attacked.features[11].out_channels == 2 * 64
    assert error(model, attacked) < 1e-10


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_statistics_may_be_missing_or_kept_where_they_are_usually_not(norm):
    model = network(norm=norm).double()
    for module in model.modules():
        if isinstance(module, nn.InstanceNorm2d):
            module.track_running_stats = True
            module.running_mean = torch.randn(module.num_features, dtype=torch.float64)
            module.running_var = torch.rand(module.num_features, dtype=torch.float64) + 0.5
        elif isinstance(module, nn.BatchNorm2d):
            module.running_mean = module.running_var = None
    assert error(model, EVERYTHING(model, rng()).model) < 1e-10


@pytest.mark.parametrize("name", ["flip_signs", "permute"])
def test_in_training_mode_negated_and_moved_channels_compute_the_same(name):
    model = network().double().train()
    attacked = ATTACKS[name][0](model, rng()).model
    assert error(model, attacked) < 1e-10


# Copies.


@pytest.mark.parametrize("name", list(ATTACKS))
def test_the_network_that_was_given_is_untouched_and_shares_nothing(name):
    model = network("resnet18").train()
    model.layer1.eval()
    model.conv1.requires_grad_(False)
    model.layer1[0].conv1.requires_grad_(False)
    before = state(model)
    attacked = ATTACKS[name][0](model, rng()).model
    assert changed(before, state(model)) == set()
    both = [(*each.parameters(), *each.buffers()) for each in (model, attacked)]
    assert not {v.data_ptr() for v in both[0]} & {v.data_ptr() for v in both[1]}
    for fact in ("training", "_forward_hooks"):
        seen = [[getattr(part, fact) for part in each.modules()] for each in (model, attacked)]
        assert seen[0] == seen[1]
    frozen = [
        [n for n, p in m.named_parameters() if not p.requires_grad] for m in (model, attacked)
    ]
    assert frozen[0] == frozen[1] == ["conv1.weight", "layer1.0.conv1.weight"]


@pytest.mark.parametrize("name", list(ATTACKS))
def test_the_same_generator_gives_the_same_network_and_another_one_another(name):
    model, attack = network(), ATTACKS[name][0]
    first = state(attack(model, rng()).model)
    torch.rand(7)
    assert changed(first, state(attack(model, rng()).model)) == set()
    assert changed(first, state(attack(model, rng(1)).model))


@pytest.mark.parametrize("name", list(ATTACKS))
@pytest.mark.parametrize("architecture", ["alexnet", "resnet18"])
def test_every_weight_changes_that_can(name, architecture):
    model = network(architecture)
    found = channels_of(model)
    if name in GROWING:
        found = [channels for channels in found if len(channels.producers) == 1]
    written = {producer.layer for channels in found for producer in channels.producers}
    read = {consumer for channels in found for consumer in channels.consumers}
    expected = written if name == "flip_signs" else written | read
    after = weights(ATTACKS[name][0](model, rng()).model)
    assert changed(weights(model), after) == expected


@pytest.mark.parametrize("name", list(ATTACKS))
def test_it_needs_the_weights_and_nothing_else(name):
    cost = ATTACKS[name][0](network(), rng()).cost
    assert (cost.had, cost.samples, cost.epochs) == ("W", 0, 0)
    assert 0 <= cost.seconds < 60


@pytest.mark.parametrize("name", list(ATTACKS))
def test_the_result_does_not_depend_on_how_the_weights_lie_in_memory(name):
    model, attack = network(), ATTACKS[name][0]
    expected = state(attack(model, rng()).model)
    last = attack(deepcopy(model).to(memory_format=torch.channels_last), rng()).model
    assert changed(expected, state(last)) == set()
    assert last.features[4].weight.is_contiguous(memory_format=torch.channels_last)
    for weight in weights(model).values():
        weight.data = weight.data.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert not model.features[4].weight.is_contiguous()
    assert changed(expected, state(attack(model, rng()).model)) == set()


# Grown networks.


@pytest.mark.parametrize("norm", ["batch", "group", "instance", "none"])
@pytest.mark.parametrize("architecture", ["alexnet", "resnet18"])
def test_a_grown_network_states_its_shapes(architecture, norm):
    model = network(architecture, norm)
    grown = split_channels(insert_dummies(model, rng()).model, rng()).model
    assert sum(p.numel() for p in grown.parameters()) > sum(p.numel() for p in model.parameters())
    for part in grown.modules():
        match part:
            case nn.Conv2d():
                assert part.weight.shape[:2] == (part.out_channels, part.in_channels)
            case nn.Linear():
                assert part.weight.shape == (part.out_features, part.in_features)
            case nn.GroupNorm():
                assert (len(part.weight), part.num_channels // 16) == (
                    part.num_channels,
                    part.num_groups,
                )
            case nn.BatchNorm2d() | nn.InstanceNorm2d():
                assert len(part.weight) == len(part.bias) == part.num_features


@pytest.mark.parametrize("name", GROWING)
def test_a_grown_network_can_be_copied_saved_loaded_and_trained(name):
    model = network()
    grown = ATTACKS[name][0](model, rng()).model
    other = deepcopy(grown)
    with torch.no_grad():
        for values in other.parameters():
            values.zero_()
    other.load_state_dict(grown.state_dict())
    assert error(model, other) < 1e-4
    assert list(other.state_dict()) == list(model.state_dict())
    other.train()(images(dtype=torch.float32)).sum().backward()
    assert all(p.grad is not None for p in other.parameters())


def test_dummies_come_in_twins_that_are_read_with_opposite_columns_and_not_with_zeros():
    grown = insert_dummies(network(), rng(), share=0.25).model
    rows = grown.features[14].weight.detach().flatten(1)
    columns = grown.classifier.weight.unflatten(1, (len(rows), 16)).transpose(0, 1)
    assert len(rows) == 64 + 16
    twins = [(i, j) for i in range(80) for j in range(i) if torch.equal(rows[i], rows[j])]
    assert len(twins) == 8
    for i, j in twins:
        assert torch.equal(columns[i], -columns[j])
        assert columns[i].abs().min() > 0
    dummies = [i for twin in twins for i in twin]
    others = [i for i in range(80) if i not in dummies]
    for values in (rows, columns.flatten(1)):
        lengths = values.norm(dim=1)
        assert lengths[others].min() < 1.01 * lengths[dummies].min()
        assert lengths[dummies].max() < 1.01 * lengths[others].max()


def test_twins_of_a_split_channel_divide_its_columns():
    model = network()
    grown = split_channels(model, rng(), share=0.25).model
    same = grown.features[15].weight[:, None] == model.features[15].weight  # no two are equal
    assert sorted(same.sum(0).tolist()) == [1] * 48 + [2] * 16
    columns = grown.classifier.weight.unflatten(1, (80, 16))
    merged = torch.einsum("ogp,gi->oip", columns, same.float()).flatten(1)
    torch.testing.assert_close(merged, model.classifier.weight)


@pytest.mark.parametrize("name", GROWING)
def test_a_share_of_zero_adds_nothing_and_any_other_at_least_something(name):
    model, attack = network("resnet18", "group"), ATTACKS[name][0]
    assert changed(state(model), state(attack(model, rng(), share=0.0).model)) == set()
    grown = attack(model, rng(), share=1e-6).model
    more = 32 if name == "insert_dummies" else 16
    assert grown.layer4[1].conv1.out_channels == 128 + more
    assert grown.layer4[1].conv2.out_channels == 128  # a residual stream
    assert grown.layer1[1].conv1.out_channels == 16  # one group for all


# Where they win.


@pytest.mark.parametrize("attack", [flip_signs, permute, combine])
def test_at_equal_outputs_the_bits_of_a_mark_are_lost(attack):
    model, key = marked()
    attacked = attack(model, rng()).model
    assert error(model, attacked) < 1e-4
    assert about_half(matches(attacked, key))


def test_large_factors_lose_bits_of_layers_that_read_other_layers():
    model, key = marked()
    few, many = (rescale(model, rng(), spread=spread).model for spread in (2.0, 100.0))
    assert error(model, many) < 1e-4
    assert 0.8 < matches(few, key) < 0.97
    assert matches(many, key) < 0.75


@pytest.mark.parametrize("name", GROWING)
def test_a_grown_network_cannot_be_read_and_cut_to_size_it_reads_as_chance(name):
    model, key = marked()
    attacked = ATTACKS[name][0](model, rng()).model
    assert error(model, attacked) < 1e-4
    with pytest.raises(UnsuitableModelError, match=r"features\.8"):
        matches(attacked, key)
    cut = {
        name: value[tuple(slice(n) for n in model.state_dict()[name].shape)]
        for name, value in attacked.state_dict().items()
    }
    assert about_half(V2.verify(cut, key).match_rate)


# Where they lose.


def test_half_of_all_rows_are_negated_and_no_magnitude_moves():
    model = network()
    flipped = flip_signs(model, rng()).model
    before, after = state(model), state(flipped)
    assert all(torch.equal(before[name].abs(), after[name].abs()) for name in before)
    turned = [
        (before[f"{name}.weight"] != after[f"{name}.weight"]).flatten(1).all(1)
        for name in weights(model)
        if name != "classifier"
    ]
    assert sum(int(rows.sum()) for rows in turned) == sum(map(len, turned)) // 2
    assert all(0 < rows.sum() < len(rows) for rows in turned)


def test_a_layer_norm_lets_a_layer_be_negated_as_a_whole_only():
    model, key = marked("layer")
    after = weights(flip_signs(model, rng()).model)
    signs = [
        sign
        for name, weight in weights(model).items()
        for sign in (1, -1)
        if torch.equal(weight, sign * after[name])
    ]
    assert sorted(signs) == [-1, -1, 1, 1, 1, 1]  # five convolutions and the classifier
    # All bits wrong are as telling as all bits right: the mark is not hidden.
    assert matches(flip_signs(model, rng(), share=1.0).model, key) == 0


def test_a_group_norm_lets_groups_be_negated_as_wholes_only():
    model = network(norm="group")
    flipped = flip_signs(model, rng()).model
    turned = (model.features[8].weight != flipped.features[8].weight).flatten(1).any(1)
    assert 0 < turned.sum() < 96
    assert all(group.all() or not group.any() for group in turned.view(6, 16))


def test_a_group_norm_keeps_its_groups_together_when_they_are_permuted():
    model = network("resnet18", "group")
    permuted = permute(model, rng()).model
    for name in ("layer4.0.bn2", "layer4.0.downsample.1", "layer4.1.bn2"):
        before, after = (
            each.get_submodule(name).weight.detach().view(8, 16) for each in (model, permuted)
        )
        groups = [{float(value) for value in group} for group in before]
        moved = [groups.index({float(value) for value in group}) for group in after]
        assert sorted(moved) == list(range(8))
        assert moved != list(range(8))
        assert not torch.equal(before[moved], after)


def test_rescaling_cannot_change_a_bit_of_a_layer_that_reads_the_images():
    model, key = marked(layers=["features.0"])
    attacked = rescale(model, rng(), spread=100.0).model
    assert not torch.equal(attacked.features[0].weight, model.features[0].weight)
    assert matches(attacked, key) == 1


@pytest.mark.parametrize("attack", [permute, insert_dummies, split_channels])
def test_filters_that_read_the_images_are_all_still_there(attack):
    model = network()
    rows = attack(model, rng()).model.features[0].weight.flatten(1)
    found = [(rows == row).all(1).any() for row in model.features[0].weight.flatten(1)]
    assert all(found)


def test_all_shape_preserving_attacks_leave_every_filter_up_to_order_sign_and_scale():
    model = network()
    before, after = (
        nn.functional.normalize(each.features[0].weight.flatten(1), dim=1)
        for each in (model, combine(model, rng()).model)
    )
    cosine = (before @ after.T).abs().max(1)
    torch.testing.assert_close(cosine.values, torch.ones(16))
    assert sorted(cosine.indices.tolist()) == list(range(16))


def test_attacks_can_be_chosen_and_are_made_in_the_order_given():
    model = network()
    draw = rng()
    expected = rescale(flip_signs(model, draw).model, draw).model
    chosen = combine(model, rng(), attacks=(flip_signs, rescale)).model
    assert changed(state(expected), state(chosen)) == set()
    assert changed(state(model), state(combine(model, rng(), attacks=()).model)) == set()


# Structure.


def test_the_channels_of_alexnet_are_a_chain():
    names = [f"features.{i}" for i in (0, 4, 8, 11, 14)]
    norms = [f"features.{i}" for i in (1, 5, 9, 12, 15)]
    readers = [*names[1:], "classifier"]
    assert channels_of(network()) == [
        Channels((Producer(name, norm),), (reader,))
        for name, norm, reader in zip(names, norms, readers, strict=True)
    ]
    hidden = channels_of(network(norm="none", stem="imagenet"))
    layers = [*names, "classifier.1", "classifier.4", "classifier.6"]
    assert hidden == [
        Channels((Producer(name, None),), (reader,)) for name, reader in pairwise(layers)
    ]


def test_the_streams_of_a_residual_network_join_all_that_is_added_up():
    found = channels_of(network("resnet18"))
    streams = [channels for channels in found if len(channels.producers) > 1]
    assert len(found) == 8 + 4
    assert streams[0] == Channels(
        (
            Producer("conv1", "bn1"),
            Producer("layer1.0.conv2", "layer1.0.bn2"),
            Producer("layer1.1.conv2", "layer1.1.bn2"),
        ),
        ("layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.0.downsample.0"),
    )
    assert streams[3] == Channels(
        (
            Producer("layer4.0.downsample.0", "layer4.0.downsample.1"),
            Producer("layer4.0.conv2", "layer4.0.bn2"),
            Producer("layer4.1.conv2", "layer4.1.bn2"),
        ),
        ("layer4.1.conv1", "fc"),
    )


@pytest.mark.parametrize("architecture", ["alexnet", "resnet18", "resnet50"])
def test_every_axis_but_images_and_classes_is_listed_exactly_once(architecture):
    model = network(architecture)
    found = channels_of(model)
    written = [producer.layer for channels in found for producer in channels.producers]
    read = [consumer for channels in found for consumer in channels.consumers]
    layers = list(weights(model))
    assert sorted(written) == sorted(layers[:-1])
    assert sorted(read) == sorted(layers[1:])


# Refusals.


def with_attention(model):
    model.layer1[0].attention = nn.Conv2d(16, 16, 1)
    return model


def with_another_activation(model):
    model.layer1[0].relu = nn.GELU()
    return model


def with_a_shared_layer(model):
    model.layer1[1].conv2 = model.layer1[1].conv1
    return model


def with_a_shared_weight(model):
    model.layer1[1].conv2.weight = model.layer1[1].conv1.weight
    return model


def with_a_computed_weight(model):
    parametrizations.weight_norm(model.layer1[0].conv1)
    return model


def with_grouped_convolution(model):
    model.layer1[0].conv1 = nn.Conv2d(16, 16, 3, padding=1, groups=2)
    return model


def with_a_bare_norm(model):
    model.layer1[0].bn1 = nn.BatchNorm2d(16, affine=False)
    return model


def without_its_head(model):
    model.fc = nn.Identity()
    return model


def with_a_wider_head(model):
    model.fc = nn.Linear(129, 10)
    return model


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_attention, r"layer1\.0\.attention is Conv2d"),
        (with_another_activation, r"layer1\.0\.relu is GELU"),
        (with_a_shared_layer, "two places"),
        (with_a_shared_weight, "two places"),
        (with_a_computed_weight, r"layer1\.0\.conv1 is ParametrizedConv2d"),
        (with_grouped_convolution, r"layer1\.0\.conv1 is Conv2d"),
        (with_a_bare_norm, r"layer1\.0\.bn1 is BatchNorm2d"),
        (without_its_head, "fc"),
        (with_a_wider_head, "fc has 129 columns for 128 channels"),
    ],
)
def test_a_network_that_is_not_what_its_class_says_is_refused(change, reason):
    with pytest.raises(UnsuitableModelError, match=reason):
        permute(change(network("resnet18")), rng())


@pytest.mark.parametrize("name", list(ATTACKS))
def test_another_network_is_refused_with_what_would_work(name):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(UnsuitableModelError, match=r"Sequential.*needed.*AlexNet, ResNet"):
        ATTACKS[name][0](model, rng())


def test_a_network_that_still_carries_a_passport_is_refused_until_it_is_released():
    model, key = marked()
    V2.insert(model, key, images(dtype=torch.float32))
    with pytest.raises(UnsuitableModelError, match=r"features\.9.*once it is released"):
        permute(model, rng())
    released = V2.released(model)
    assert error(released, permute(released, rng()).model) < 1e-4


def test_a_sign_needs_a_norm_to_turn_it_back():
    with pytest.raises(UnsuitableModelError, match="permute and rescale work"):
        flip_signs(network(norm="none"), rng())


@pytest.mark.parametrize("name", GROWING)
def test_a_layer_norm_lets_no_channel_join(name):
    with pytest.raises(UnsuitableModelError, match="one group for all"):
        ATTACKS[name][0](network("resnet18", "layer"), rng())


@pytest.mark.parametrize("attack", [flip_signs, insert_dummies, split_channels])
@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_outside_0_to_1_is_refused(attack, share):
    with pytest.raises(BadRecipeError, match="share"):
        attack(network(), rng(), share=share)


@pytest.mark.parametrize("spread", [0.5, float("inf"), float("nan")])
def test_a_spread_that_is_no_factor_is_refused(spread):
    with pytest.raises(BadRecipeError, match="spread"):
        rescale(network(), rng(), spread=spread)
