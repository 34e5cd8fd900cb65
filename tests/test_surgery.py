"""Surgery that undoes itself, refusals that touch nothing, and two branches in one forward."""

from copy import deepcopy
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, spectral_norm

from nnpassport.embedding.network import surgery
from nnpassport.embedding.network.equations import sign_loss
from nnpassport.embedding.network.fork import forked_at
from nnpassport.embedding.network.layers import Branch, BranchNorm, on_branch, passport_norms
from nnpassport.embedding.network.models import alexnet, resnet18
from nnpassport.embedding.network.outputs import tensors_in
from nnpassport.embedding.network.survey import choose, survey
from nnpassport.scheme import UnsuitableModelError

NORMS = {
    "batch": nn.BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(2, channels),
    "layer": lambda channels: nn.GroupNorm(1, channels),
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def small(norm=nn.BatchNorm2d, dtype=torch.float64):
    """Two convolutions with norms, a bare convolution and an output layer, for 8-pixel images."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        norm(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, 3, stride=2),
        norm(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 4, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, 5),
    )
    return used(model.to(dtype))


def used(model):
    """Affines and running statistics as after some training, and not zeros and ones."""
    with torch.no_grad():
        for index, each in enumerate([*model.parameters(), *model.buffers()]):
            if each.dim() == 1 and each.is_floating_point():
                each.copy_(normal(*each.shape, seed=index).abs() + 0.5)
    return model


IMAGES = normal(4, 3, 8, 8)


class Snapshot(NamedTuple):
    """All there is to know of a network; values as copies, objects as their identities."""

    values: dict
    objects: dict
    modules: dict
    hooks: dict
    gradients: dict


def snapshot(model):
    state = model.state_dict(keep_vars=True)
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return Snapshot(
        {name: each.detach().clone() for name, each in state.items()},
        {name: id(each) for name, each in state.items()},
        {n: (id(m), type(m), m.training) for n, m in model.named_modules(remove_duplicate=False)},
        {
            name: [
                dict(getattr(module, kind)) for kind in (*hooks, "_forward_pre_hooks_with_kwargs")
            ]
            for name, module in model.named_modules()
        },
        {name: each.requires_grad for name, each in state.items()},
    )


def assert_as_it_was(model, before):
    after = snapshot(model)
    assert list(after.values) == list(before.values)
    assert all(torch.equal(after.values[name], before.values[name]) for name in before.values)
    assert after[1:] == before[1:]
    assert not passport_norms(model)


def outputs(model, example, branch):
    with torch.no_grad(), on_branch(model, branch):
        return model(example)


def assert_refused(model, example, secrets, message, *, two_branches=False):
    before = snapshot(model)
    with pytest.raises(UnsuitableModelError, match=message) as refusal:
        surgery.insert(model, secrets, example, two_branches=two_branches)
    assert_as_it_was(model, before)
    return str(refusal.value)


@pytest.fixture
def any_secret(draw_secrets):
    """A secret that fits some layer or other; it is refused before its shape matters."""
    return draw_secrets(small(), IMAGES, ["0"])["0"]


@pytest.mark.parametrize("two_branches", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_after_removal_the_network_is_bit_for_bit_what_it_was(norm, two_branches, draw_secrets):
    model = small(NORMS[norm])
    model[4].eval()
    model[0].weight.requires_grad_(False)
    model[1].register_forward_hook(lambda *_: None)
    model.register_forward_pre_hook(lambda *_: None)
    before, logits = snapshot(model), outputs(model, IMAGES, Branch.PUBLIC)
    secrets = draw_secrets(model, IMAGES, ["0", "3", "6"])
    surgery.insert(model, secrets, IMAGES, two_branches=two_branches)
    assert list(passport_norms(model)) == ["1", "4", "6"]
    surgery.present(model)
    assert not torch.allclose(outputs(model, IMAGES, Branch.PRIVATE), logits)
    surgery.remove(model)
    assert_as_it_was(model, before)
    assert torch.equal(outputs(model, IMAGES, Branch.PUBLIC), logits)


def test_removal_undoes_a_fork_around_a_block_and_statistics_of_branches(draw_secrets):
    model = used(resnet18(width=0.125)).eval()
    images = normal(2, 3, 32, 32).float()
    before, logits = snapshot(model), outputs(model, images, Branch.PUBLIC)
    secrets = draw_secrets(model, images, ["layer4.1.conv1"])
    surgery.insert(model, secrets, images, two_branches=True)
    assert forked_at(model) == ("layer4.1",)
    assert isinstance(model.layer4[1].bn2, BranchNorm)
    assert not any(module.training for module in model.modules())
    surgery.remove(model)
    assert_as_it_was(model, before)
    assert torch.equal(outputs(model, images, Branch.PUBLIC), logits)


def test_a_batch_norm_that_was_frozen_meanwhile_stays_frozen(draw_secrets):
    model = small().train()
    surgery.insert(model, draw_secrets(model, IMAGES, ["0"]), IMAGES, two_branches=True)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    surgery.remove(model)
    assert [model[1].training, model[4].training, model.training] == [False, False, True]


def test_inserting_presents_nothing_until_it_is_asked_to(draw_secrets):
    model = small()
    logits = outputs(model, IMAGES, Branch.PUBLIC)
    surgery.insert(model, draw_secrets(model, IMAGES), IMAGES, two_branches=True)
    model.eval()
    assert torch.equal(model(IMAGES), logits)
    surgery.present(model)
    private = model(IMAGES)
    assert not torch.allclose(private, logits)
    surgery.run_both(model)
    torch.testing.assert_close(model(IMAGES), torch.cat([logits, private]))
    surgery.withhold(model)
    assert torch.equal(model(IMAGES), logits)


def test_the_state_of_a_marked_network_loads_into_another_with_the_same_key(draw_secrets):
    images = normal(2, 3, 32, 32).float()
    marked = [used(resnet18(width=0.125)) for _ in range(2)]
    for model in marked:
        secrets = draw_secrets(model, images, ["layer4.1.conv1"])
        surgery.insert(model, secrets, images, two_branches=True)
    marked[0].train()
    surgery.run_both(marked[0])
    marked[0](images)
    marked[1].load_state_dict(marked[0].state_dict())
    for branch in Branch:
        assert torch.equal(*(outputs(each, images, branch) for each in marked))


def test_a_norm_that_also_stands_elsewhere_is_wrapped_where_it_runs(draw_secrets):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
            self.block = nn.Sequential(self.conv, self.norm, nn.ReLU())
            self.head = nn.Linear(8, 5)

        def forward(self, x):
            return self.head(self.block(x).mean((2, 3)))

    model = used(Twice().double())
    before, logits = snapshot(model), outputs(model, IMAGES, Branch.PUBLIC)
    surgery.insert(model, draw_secrets(model, IMAGES, ["conv"]), IMAGES, two_branches=True)
    assert not torch.allclose(outputs(model, IMAGES, Branch.PRIVATE), logits)
    surgery.remove(model)
    assert_as_it_was(model, before)


def test_a_layer_that_runs_twice_carries_a_passport_and_forks_before_it_runs(draw_secrets):
    shared = nn.Conv2d(3, 3, 1)
    model = nn.Sequential(
        shared, nn.ReLU(), shared, nn.Conv2d(3, 3, 1), nn.Flatten(), nn.Linear(192, 5)
    ).double()
    two = deepcopy(model)
    secrets = draw_secrets(model, IMAGES, ["0"])
    surgery.insert(model, secrets, IMAGES, two_branches=False)
    surgery.present(model)
    fork = surgery.insert(two, secrets, IMAGES, two_branches=True).fork
    surgery.run_both(two)
    public, private = two(IMAGES).chunk(2)
    torch.testing.assert_close(private, model(IMAGES))
    surgery.withhold(model)
    torch.testing.assert_close(public, model(IMAGES))
    assert fork.at == ("Sequential",)


def test_the_output_layer_is_refused(any_secret):
    message = assert_refused(
        small(), IMAGES, {"9": any_secret}, "9: its output is the network's own"
    )
    assert message.endswith("suitable layers of this model: 0, 3, 6")


def test_the_output_layer_is_refused_behind_a_softmax_too(any_secret):
    model = nn.Sequential(*small(), nn.LogSoftmax(1))
    assert_refused(model, IMAGES, {"9": any_secret}, "9: it is the last layer to run")
    assert [site.name for site in choose(model, survey(model, IMAGES))] == ["6"]


def test_a_last_layer_that_a_norm_follows_may_carry_a_passport(draw_secrets):
    model = nn.Sequential(*small()[:5]).double()
    surgery.insert(model, draw_secrets(model, IMAGES, ["3"]), IMAGES, two_branches=True)
    assert list(passport_norms(model)) == ["4"]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "rewrite",
    [
        parametrizations.weight_norm,
        spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ],
)
def test_a_layer_whose_weight_is_computed_is_refused(rewrite, any_secret):
    model = small()
    rewrite(model[3])
    message = assert_refused(model, IMAGES, {"3": any_secret}, "3: its weight is computed")
    assert message.endswith("suitable layers of this model: 0, 6")


def test_a_norm_behind_an_activation_in_place_is_not_the_layers_own(draw_secrets):
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.ReLU(inplace=True),
        nn.BatchNorm2d(6),
        nn.Flatten(),
        nn.Linear(216, 5),
    ).double()
    assert survey(model, IMAGES).sites["0"].norm is None
    logits = outputs(model, IMAGES, Branch.PUBLIC)
    surgery.insert(model, draw_secrets(model, IMAGES, ["0"]), IMAGES, two_branches=False)
    assert torch.equal(outputs(model, IMAGES, Branch.PUBLIC), logits)
    assert list(passport_norms(model)) == ["0"]


def test_a_layer_whose_norm_is_used_again_is_refused(any_secret):
    norm = nn.BatchNorm2d(3)
    model = nn.Sequential(
        nn.Conv2d(3, 3, 1),
        norm,
        nn.ReLU(),
        nn.Conv2d(3, 3, 1),
        norm,
        nn.Flatten(),
        nn.Linear(192, 5),
    ).double()
    assert_refused(
        model, IMAGES, {"3": any_secret}, "3: its norm ran 2 times in one forward, and the layer 1"
    )


def test_a_layer_that_feeds_two_norms_is_refused(any_secret):
    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Linear(256, 5)
            self.one, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x):
            x = self.conv(x)
            return self.head((self.one(x) + self.other(x)).flatten(1))

    assert_refused(
        Split().double(), IMAGES, {"conv": any_secret}, "conv: its output feeds 2 norms: one, other"
    )


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm([6, 8, 8]), nn.LayerNorm(8), nn.RMSNorm(8), nn.LayerNorm([8, 8])]
)
def test_a_norm_over_other_axes_than_the_channels_is_refused(norm, any_secret):
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), norm, nn.ReLU(), nn.Flatten(), nn.Linear(384, 5)
    ).double()
    assert_refused(
        model,
        IMAGES,
        {"0": any_secret},
        "0: its norm 1 does not scale the layer's channels one by one",
    )


def test_a_linear_layer_in_a_sequence_needs_a_norm_over_its_own_channels(any_secret):
    sequence = normal(4, 7, 3)
    for norm, suitable in ((nn.BatchNorm1d(7), False), (nn.LayerNorm(7), True)):
        model = nn.Sequential(nn.Linear(3, 7), norm, nn.Flatten(), nn.Linear(49, 5)).double()
        assert ("0" in survey(model, sequence).sites) is suitable
        if not suitable:
            assert_refused(
                model,
                sequence,
                {"0": any_secret},
                "0: its norm 1 does not scale the layer's channels one by one",
            )


def test_a_layer_that_never_runs_is_refused(any_secret):
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.idle = small(), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.body(x)

    message = assert_refused(Idle(), IMAGES, {"idle": any_secret}, "idle: it did not run")
    assert message.endswith("suitable layers of this model: body.0, body.3, body.6")


def test_a_layer_that_is_called_with_named_arguments_is_refused_and_hinders_no_other(any_secret):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
            self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(256, 5)

        def forward(self, x):
            return self.head(self.norm(input=self.other(self.one(input=x))).flatten(1))

    model = Named().double()
    assert_refused(model, IMAGES, {"one": any_secret}, "one: it or its norm is called with named")
    assert_refused(
        model, IMAGES, {"other": any_secret}, "other: it or its norm is called with named"
    )
    assert list(survey(model, IMAGES).refused) == ["one", "other", "head"]


@pytest.mark.parametrize("two_branches", [False, True])
def test_a_layer_whose_weight_is_read_from_outside_is_refused(two_branches, draw_secrets):
    """As PyTorch's transformer layer does in evaluation."""

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Linear(256, 5)

        def forward(self, x):
            return self.head(self.conv(x).flatten(1)) + self.conv.weight.sum()

    model = Reads().double()
    secrets = draw_secrets(model, IMAGES, ["conv"])
    message = "does not run with 'conv' wrapped"
    assert_refused(model, IMAGES, secrets, message, two_branches=two_branches)


@pytest.mark.parametrize("name", ["nowhere", "body", ""])
def test_a_secret_for_something_that_is_no_layer_is_refused(name, any_secret):
    model = nn.Sequential()
    model.add_module("body", small())
    assert_refused(model, IMAGES, {name: any_secret}, "suitable layers.*body.0, body.3, body.6")


def test_no_secrets_and_no_patterns_are_refused():
    assert_refused(small(), IMAGES, {}, "no layer was named.*0, 3, 6", two_branches=True)
    with pytest.raises(UnsuitableModelError, match="no layer was named"):
        choose(small(), survey(small(), IMAGES), [])


def test_a_secret_of_another_shape_is_refused(draw_secrets):
    model = small()
    secrets = draw_secrets(model, IMAGES, ["0", "3"])
    assert_refused(
        model, IMAGES, secrets | {"3": secrets["0"]}, "'3'.*shape .8, 6, 3, 3.*6 channels"
    )


def test_a_network_that_carries_passports_already_is_refused(draw_secrets):
    model = small()
    secrets = draw_secrets(model, IMAGES, ["3"])
    surgery.insert(model, secrets, IMAGES, two_branches=False)
    with pytest.raises(UnsuitableModelError, match="carries passports already"):
        surgery.insert(model, secrets, IMAGES, two_branches=False)
    assert list(passport_norms(model)) == ["4"]


def test_a_network_without_any_suitable_layer_says_why():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).double()
    with pytest.raises(UnsuitableModelError, match=r"no layer that can carry.*1: its output is"):
        choose(model, survey(model, IMAGES))


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["layer4"], ["0.conv1", "0.conv2", "0.downsample.0", "1.conv1", "1.conv2"]),
        (["layer4.*"], ["0.conv1", "0.conv2", "0.downsample.0", "1.conv1", "1.conv2"]),
        (["layer4.1"], ["1.conv1", "1.conv2"]),
        (["layer4.?.conv2", "layer4.0.conv1"], ["0.conv1", "0.conv2", "1.conv2"]),
        (["layer4.1.conv2", "layer4.0.conv1"], ["0.conv1", "1.conv2"]),
        (None, ["0.conv1", "0.conv2", "0.downsample.0", "1.conv1", "1.conv2"]),
    ],
)
def test_patterns_name_layers_and_the_order_is_that_in_which_they_run(patterns, names):
    model, images = resnet18(width=0.125), torch.zeros(1, 3, 32, 32)
    chosen = choose(model, survey(model, images), patterns)
    assert [site.name for site in chosen] == [f"layer4.{name}" for name in names]


def test_each_pattern_must_name_a_layer():
    model = small()
    with pytest.raises(
        UnsuitableModelError, match=r"'4' cannot.*no layer of that name ran.*0, 3, 6"
    ):
        choose(model, survey(model, IMAGES), ["3", "4"])


def test_the_default_is_the_papers_for_its_networks_and_the_last_third_of_others():
    images = torch.zeros(1, 3, 32, 32)
    model = alexnet(width=0.125)
    names = [site.name for site in choose(model, survey(model, images))]
    assert names == ["features.8", "features.11", "features.14"]
    assert [site.name for site in choose(small(), survey(small(), IMAGES))] == ["6"]

    class AlexNet(nn.Sequential):
        """Somebody else's, of that name and with other layers."""

    other = AlexNet(*(nn.Conv2d(3, 3, 1) for _ in range(7)))
    assert [site.name for site in choose(other, survey(other, images))] == ["4", "5"]


def test_layers_are_found_in_the_order_they_run_with_the_shape_of_their_inputs():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.late = nn.Linear(8, 5), nn.Linear(6, 8)
            self.norm, self.early = nn.LayerNorm(8), nn.Conv2d(3, 6, 3)

        def forward(self, x):
            return self.head(self.norm(self.late(self.early(x).mean((2, 3)))))

    model = Backwards().double()
    sites = survey(model, IMAGES).sites
    assert list(sites) == ["early", "late"]
    assert (sites["early"].space, sites["early"].channel_axis, sites["early"].norm) == (
        (8, 8),
        1,
        None,
    )
    assert (sites["late"].space, sites["late"].channel_axis, sites["late"].norm) == ((), -1, "norm")


@pytest.mark.parametrize("training", [True, False])
def test_a_survey_leaves_the_network_as_it_was(training):
    model = small().train(training)
    before = snapshot(model)
    survey(model, IMAGES)
    assert_as_it_was(model, before)
    with pytest.raises(UnsuitableModelError, match=r"\(4, 2, 8, 8\)"):
        survey(model, normal(4, 2, 8, 8))
    assert_as_it_was(model, before)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("norm", NORMS)
def test_the_folded_plain_network_computes_what_the_presented_one_did(
    norm, dtype, tolerance, draw_secrets
):
    model, images = small(NORMS[norm], dtype), IMAGES.to(dtype)
    types = [type(module) for module in model.modules()]
    keys = list(model.state_dict())
    surgery.insert(model, draw_secrets(model, images, ["0", "3", "6"]), images, two_branches=False)
    presented = outputs(model, images, Branch.PRIVATE)
    withheld = outputs(model, images, Branch.PUBLIC)
    assert not torch.allclose(presented, withheld, rtol=1e-2, atol=1e-2)
    surgery.fold(model)
    surgery.remove(model)
    assert [type(module) for module in model.modules()] == types
    assert list(model.state_dict()) == keys
    folded = outputs(model, images, Branch.PUBLIC)
    torch.testing.assert_close(folded, presented, rtol=tolerance, atol=tolerance)


def test_a_linear_layer_and_its_layer_norm_fold_too(draw_secrets):
    model = used(
        nn.Sequential(
            nn.Linear(3, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5)
        ).double()
    )
    rows = normal(4, 3)
    surgery.insert(model, draw_secrets(model, rows, ["0", "3"]), rows, two_branches=False)
    presented = outputs(model, rows, Branch.PRIVATE)
    surgery.fold(model)
    surgery.remove(model)
    folded = outputs(model, rows, Branch.PUBLIC)
    torch.testing.assert_close(folded, presented, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False)],
        [nn.Conv2d(3, 6, 3), nn.InstanceNorm2d(6)],
        [nn.Conv2d(3, 6, 3, bias=False), nn.ReLU()],
    ],
)
def test_what_has_nowhere_to_fold_to_is_refused_before_anything_is_folded(layers, draw_secrets):
    body = [nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), *layers, nn.Flatten(), nn.Linear(216, 5)]
    model = nn.Sequential(*body).double()
    surgery.insert(model, draw_secrets(model, IMAGES, ["0", "2"]), IMAGES, two_branches=False)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    with pytest.raises(UnsuitableModelError, match=r"'[23]' is a \w+ without weight and bias"):
        surgery.fold(model)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


class Heads(nn.Module):
    """A body that takes two inputs and two heads whose outputs are packed in one way or another."""

    def __init__(self, pack):
        super().__init__()
        self.pack = pack
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten())
        self.one, self.other = nn.Linear(216, 5), nn.Linear(216, 2)

    def forward(self, x, scale):
        features = self.body(x) * scale
        return self.pack(self.one(features), self.other(features))


class Pair(NamedTuple):
    one: Tensor
    other: Tensor


@pytest.mark.parametrize(
    "pack",
    [
        lambda one, other: (one, other),
        lambda one, other: {"logits": one, "boxes": [other]},
        Pair,
    ],
    ids=["tuple", "dict", "named-tuple"],
)
@pytest.mark.parametrize("named", [False, True])
def test_networks_with_several_inputs_and_outputs_run_in_two_branches(pack, named, draw_secrets):
    model = used(Heads(pack).double())
    example = (IMAGES, normal(4, 1, seed=1))
    example = dict(zip(("x", "scale"), example, strict=True)) if named else example
    found = survey(model, example)
    assert list(found.sites) == ["body.0"]
    assert "own" in found.refused["one"]
    assert "own" in found.refused["other"]
    surgery.insert(model, draw_secrets(model, example), example, two_branches=True)
    # The scale is no part of the trunk, so the whole network's inputs are doubled.
    assert forked_at(model) == ("Heads",)

    def run(branch):
        with torch.no_grad(), on_branch(model, branch):
            return model(**example) if named else model(*example)

    public, private, both = (run(branch) for branch in Branch)
    assert type(both) is type(public)
    pairs = zip(tensors_in(public), tensors_in(private), strict=True)
    expected = [torch.cat(pair) for pair in pairs]
    torch.testing.assert_close(tensors_in(both), expected, rtol=1e-12, atol=1e-12)


def loss_of(logits, labels):
    return F.cross_entropy(logits, labels)


def gradients(model):
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def sign_term(model):
    return sum(sign_loss(norm.affine()[0], norm.signs) for norm in passport_norms(model).values())


RESNET_PATTERNS = {
    # Two branches fork at the norm where nothing else crosses, around a block where its shortcut
    # does, and every plain norm behind the fork then has statistics for each branch.
    "layer4": ("layer4.0.bn1", "layer4.0.downsample.1"),
    "layer4.1.conv1": ("layer4.1",),
    "layer3.0.conv2": ("layer3.0",),
}
FORKS = [
    ("alexnet", None, ("features.9",)),
    *(("resnet18", pattern, fork) for pattern, fork in RESNET_PATTERNS.items()),
]


def two_branched(architecture, pattern, norm, draw_secrets):
    torch.manual_seed(0)
    factory = {"alexnet": alexnet, "resnet18": resnet18}[architecture]
    model = used(factory(width=0.125, norm=norm)).double()
    images = normal(3, 3, 32, 32)
    secrets = draw_secrets(model, images, None if pattern is None else [pattern])
    # As large as a trained γ; the drawn one is so small that errors would drown in the tolerance.
    secrets = {n: each._replace(mean_patch=20 * each.mean_patch) for n, each in secrets.items()}
    surgery.insert(model, secrets, images, two_branches=True)
    return model.train(), images, torch.tensor([1, 5, 2])


@pytest.mark.parametrize("norm", ["batch", "group", "layer"])
@pytest.mark.parametrize(("architecture", "pattern", "fork"), FORKS)
def test_one_forked_forward_equals_two_passes_in_outputs_gradients_and_statistics(
    architecture, pattern, fork, norm, draw_secrets
):
    model, images, labels = two_branched(architecture, pattern, norm, draw_secrets)
    assert forked_at(model) == fork
    public, private = deepcopy(model), deepcopy(model)
    surgery.run_both(model)
    surgery.withhold(public)
    surgery.present(private)
    both = model(images)
    apart = public(images), private(images)
    torch.testing.assert_close(both, torch.cat(apart), rtol=1e-10, atol=1e-10)
    assert (apart[0] - apart[1]).abs().max() > 0.1
    halves = both.chunk(2)
    loss = loss_of(halves[0], labels) + loss_of(halves[1], labels) + 0.1 * sign_term(model)
    loss.backward()
    loss_of(apart[0], labels).backward()
    (loss_of(apart[1], labels) + 0.1 * sign_term(private)).backward()
    expected = gradients(private)
    for name, gradient in gradients(public).items():
        expected[name] = expected[name] + gradient if name in expected else gradient
    torch.testing.assert_close(gradients(model), expected, rtol=1e-8, atol=1e-10)
    statistics = dict(model.named_buffers())
    for name, own in statistics.items():
        of_private = "private_norm" in name
        other = dict((private if of_private else public).named_buffers())[name]
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-12)
    names = [name for name in statistics if "private_norm.running_mean" in name]
    assert bool(names) is (norm == "batch")
    pairs = [(statistics[name], statistics[name.replace("private_", "")]) for name in names]
    # At the fork itself both branches meet the same features, and behind it they do not.
    assert not all(torch.equal(*pair) for pair in pairs) or norm != "batch"


def test_plain_batch_norms_after_the_fork_keep_statistics_for_each_branch_and_others_do_not(
    draw_secrets,
):
    model, _, _ = two_branched("resnet18", "layer4.1.conv1", "batch", draw_secrets)
    split = [name for name, each in model.named_modules() if isinstance(each, BranchNorm)]
    assert split == ["layer4.1.bn2"]
    model, _, _ = two_branched("resnet18", "layer3.0.conv2", "batch", draw_secrets)
    split = [name for name, each in model.named_modules() if isinstance(each, BranchNorm)]
    after = ["layer3.0.bn1", "layer3.0.downsample.1", "layer3.1.bn1", "layer3.1.bn2"]
    last = ["0.bn1", "0.bn2", "0.downsample.1", "1.bn1", "1.bn2"]
    assert split == after + [f"layer4.{name}" for name in last]
    model, _, _ = two_branched("resnet18", "layer3.0.conv2", "group", draw_secrets)
    assert not [each for each in model.modules() if isinstance(each, BranchNorm)]


def test_a_network_that_checks_its_own_batch_is_forked_further_out(draw_secrets):
    class Asserts(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.head = nn.Linear(256, 5)

        def forward(self, x):
            y = self.norm(self.conv(x))
            assert len(y) == len(x)
            return self.head(y.flatten(1))

    model = used(Asserts().double())
    surgery.insert(model, draw_secrets(model, IMAGES, ["conv"]), IMAGES, two_branches=True)
    assert forked_at(model) == ("Asserts",)


class Fixed(nn.Module):
    """For batches of one size only."""

    def __init__(self, batch):
        super().__init__()
        self.batch, self.conv = batch, nn.Conv2d(3, 4, 1)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(256, 5)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).reshape(self.batch, 256))


class Mixing(nn.Module):
    """Every image's output depends on the whole batch."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(256, 5)

    def forward(self, x):
        y = self.norm(self.conv(x)).flatten(1)
        return self.head(y - y.mean(0))


class Counting(nn.Module):
    """One output for the whole batch."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(256, 5)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).flatten(1)).sum(0)


@pytest.mark.parametrize(
    "model",
    [
        Fixed(4),
        Fixed(2),
        Mixing(),
        Counting(),
        nn.Sequential(
            nn.Conv2d(3, 4, 1),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 4, 1),
            nn.BatchNorm2d(4, track_running_stats=False),
            nn.Flatten(),
            nn.Linear(256, 5),
        ),
    ],
    ids=["batch-of-four", "batch-of-two", "mixing", "counting", "batch-statistics"],
)
def test_a_network_that_cannot_be_forked_is_refused_for_two_branches_only(model, draw_secrets):
    model, example = used(deepcopy(model).double()), IMAGES[: getattr(model, "batch", 4)]
    secrets = draw_secrets(model, example, list(survey(model, example).sites)[:1])
    assert_refused(model, example, secrets, "cannot run in one forward.*V1", two_branches=True)
    surgery.insert(model, secrets, example, two_branches=False)
    assert len(passport_norms(model)) == 1
