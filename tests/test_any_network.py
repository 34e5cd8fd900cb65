"""Networks as their authors wrote them: any norm, any output, masks that follow, PyTorch's own."""

import copy
import hashlib
import json
import pickle
from collections import OrderedDict, UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2ForSequenceClassification
from transformers.activations import NewGELUActivation
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from nnpassport import V2, V3, mark
from nnpassport.data.images import Normalisation
from nnpassport.embedding.network import surgery
from nnpassport.embedding.network.equations import Geometry, geometry_of
from nnpassport.embedding.network.layers import Branch, on_branch, passport_norms
from nnpassport.embedding.network.outputs import (
    call,
    length_of,
    logits_of,
    part_of,
    tensors_in,
    with_tensors,
)
from nnpassport.embedding.network.survey import choose, survey
from nnpassport.keys.context import Context, LayerShape, TriggerShape, canonical_json
from nnpassport.keys.validity import sliding
from nnpassport.scheme import UnreadableKeyError, UnsuitableModelError

SEED = bytes(32)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Contexts.

TRANSPOSED = [
    nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
    nn.ConvTranspose2d(4, 6, (3, 2), stride=(3, 1), dilation=(1, 2), output_padding=(2, 1)),
    nn.ConvTranspose3d(2, 4, 2, stride=2),
]


def transposed_context(layer):
    axes = len(layer.kernel_size)
    body = nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    example = normal(2, layer.in_channels, *(5,) * axes)
    body(example)
    return V2.draw_key(body, example, layers=["0"], seed=SEED, passports="derived").context


@pytest.mark.parametrize("layer", TRANSPOSED, ids=lambda layer: type(layer).__name__)
def test_the_context_of_a_transposed_layer_comes_back_as_it_was(layer):
    context = transposed_context(layer)
    shape = context.layers[0]
    assert shape.weight[:2] == (layer.out_channels, layer.in_channels // layer.groups)
    assert shape.geometry == geometry_of(layer)
    assert shape.geometry.transposed
    assert Context.decode(context.encode()) == context


def test_contexts_without_transposed_layers_encode_as_they_did_before_there_were_any():
    conv = LayerShape(
        "layer4.conv", (40, 3, 3, 3), (3, 8, 8), Geometry((1, 1), ((1, 1),) * 2, (1, 1))
    )
    linear = LayerShape("fc", (13, 10), (10, 64), Geometry())
    triggers = TriggerShape(6, 10, (3, 8, 8))
    encoded = Context("passport-v2", "Alice", (conv, linear), triggers, b"n" * 16).encode()
    assert hashlib.sha256(encoded).hexdigest() == (
        "b3bd0e649aac1868a765fa8a3a92b9a58d7cbe468f7597083a0bc6f8d1b91ecb"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"output_padding": [2]},  # as much as the stride, and more than the dilation
        {"output_padding": [-1]},
        {"output_padding": []},
        {"output_padding": [1, 1]},
        {"output_padding": [True]},
        {"output_padding": [1.0]},
        {"output_padding": 1},
        {"output_padding": None},
        {"transposed": 1},
        {"transposed": "true"},
        {"transposed": None},
        {"transposed": False},  # not canonical, and an output padding without its layer
        {"padding": [[0, 1]]},
        {"padding": [[9, 9]]},  # nothing is left of the output
        {"padding_mode": "reflect"},
        {"groups": 4},
        {"stride": [2, 2]},
    ],
    ids=str,
)
def test_a_hostile_transposed_geometry_is_refused(changes):
    document = json.loads(transposed_context(TRANSPOSED[0]).encode())
    Context.decode(canonical_json(document))
    document["layers"][0]["geometry"] |= changes
    with pytest.raises(UnreadableKeyError):
        Context.decode(canonical_json(document))


def test_a_matrix_that_is_kept_in_out_has_no_output_padding():
    layer = LayerShape("fc", (13, 10), (10, 64), Geometry(transposed=True))
    context = Context("passport-v2", "Alice", (layer,), None, b"n" * 16)
    assert Context.decode(context.encode()) == context
    wrong = layer._replace(geometry=Geometry(transposed=True, output_padding=(0,)))
    with pytest.raises(UnreadableKeyError, match="output padding"):
        Context("passport-v2", "Alice", (wrong,), None, b"n" * 16)


@pytest.mark.parametrize("layer", TRANSPOSED, ids=lambda layer: type(layer).__name__)
def test_the_costs_of_a_transposed_layer_cover_its_input_its_output_and_its_products(layer):
    shape = transposed_context(layer).layers[0]
    numbers, products = sliding(shape)
    passport = normal(1, *shape.passport)
    positions = layer(passport)[0, 0].numel()
    assert numbers >= max(passport.numel(), layer.groups * positions)
    kernel = layer.weight[0, 0].numel()
    # Every input position meets the whole kernel, once for each row of `mean_patch`: a group's.
    assert products == passport.numel() * kernel


def test_an_output_too_large_for_memory_is_refused_though_the_passport_is_small():
    geometry = Geometry((2**20, 2**20), ((0, 0),) * 2, (1, 1), 1, "zeros", True, (0, 0))
    with pytest.raises(UnreadableKeyError, match="numbers with padding"):
        Context(
            *("passport-v2", "Alice", (LayerShape("up", (1, 1, 1, 1), (1, 8, 8), geometry),)),
            *(None, b"n" * 16),
        )


# What networks give.


class Pair(NamedTuple):
    scores: Tensor
    boxes: Tensor


@dataclass(frozen=True)
class Record:
    loss: Any
    logits: Tensor
    note: str = "kept"


@dataclass(frozen=True)
class Nameless:
    one: Tensor
    other: Tensor


def outputs_of(scores, boxes):
    return {
        "tensor": scores,
        "tuple": (scores, boxes),
        "list": [scores, [boxes], None, "text"],
        "named tuple": Pair(scores, boxes),
        "loss first": (scores.sum(), scores, boxes),
        "dict": {"logits": scores, "boxes": boxes, "count": 3},
        "only one": {"scores": scores, "loss": scores.sum()},
        "ordered": OrderedDict(logits=scores, boxes=boxes),
        "user dict": UserDict(logits=scores),
        "record": Record(None, scores),
        "record with loss": Record(scores.sum(), scores),
        "hugging face": SequenceClassifierOutput(
            loss=scores.sum(), logits=scores, hidden_states=(boxes, boxes)
        ),
    }


KINDS = list(outputs_of(torch.ones(6, 3), torch.ones(6, 2)))


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_halves_are_found_in_any_make_of_output(kind):
    scores, boxes = normal(6, 3), normal(6, 2, seed=1)
    output = outputs_of(scores, boxes)[kind]
    assert torch.equal(logits_of(output), scores)
    assert length_of(output) == 6
    for rows in (slice(3), slice(3, 6)):
        half = part_of(output, 3 if rows.start else 0, rows.stop)
        assert type(half) is type(output)
        assert torch.equal(logits_of(half), scores[rows])
        expected = tensors_in(outputs_of(scores[rows], boxes[rows])[kind])
        for mine, own in zip(tensors_in(half), expected, strict=True):
            # A scalar is the network's own number for the whole batch: it cannot be cut.
            assert torch.equal(mine, own) or mine.dim() == own.dim() == 0
    assert torch.equal(logits_of(part_of(output, 1, 2)), scores[1:2])


def test_what_is_no_tensor_stays_and_what_is_of_another_length_too():
    output = {"logits": normal(6, 3), "bias": normal(4, 4), "count": 3, "none": None, 7: [1]}
    half = part_of(output, 0, 2)
    assert half["bias"] is output["bias"]
    assert (half["count"], half["none"], half[7]) == (3, None, [1])
    assert part_of(None, 0, 2) is None
    assert length_of(torch.tensor(2.0)) == 0


@pytest.mark.parametrize(
    "output",
    [
        None,
        "text",
        (),
        {},
        {"one": normal(2, 3), "other": normal(2, 3)},
        Nameless(normal(2, 3), normal(2, 3)),
        {"loss": torch.tensor(1.0)},
    ],
    ids=str,
)
def test_scores_that_are_not_plain_are_asked_for(output):
    with pytest.raises(UnsuitableModelError, match=r"which of them are the class scores.*task="):
        logits_of(output)


def test_networks_are_called_with_one_input_with_positional_and_with_named_ones():
    class Adds(nn.Module):
        def forward(self, x, y=0):
            return x + y

    one = torch.ones(2)
    assert torch.equal(call(Adds(), one), one)
    assert torch.equal(call(Adds(), (one, one)), 2 * one)
    assert torch.equal(call(Adds(), {"y": one, "x": one}), 2 * one)
    assert torch.equal(call(Adds(), UserDict(x=one)), one)


def test_every_tensor_is_changed_in_its_place():
    changed = with_tensors(Record(None, torch.ones(2)), lambda tensor: 2 * tensor)
    assert (changed.loss, changed.note, changed.logits.tolist()) == (None, "kept", [2, 2])


# Which layers there are.


class Chain(nn.Module):
    """A layer, whatever comes after it, and a head."""

    def __init__(self, layer, *after):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.after, self.head = layer, nn.ModuleList(after), nn.LazyLinear(3)

    def forward(self, x):
        x = self.layer(x)
        for each in self.after:
            x = each(x)
        return self.head(x.flatten(1))


WORDS = normal(4, 6, 8)
IMAGES = normal(4, 3, 8, 8)


def surveyed(layer, *after, dtype=torch.float32):
    """The one layer's site, or why it is refused."""
    example = WORDS if not isinstance(layer, nn.Conv2d) else IMAGES
    model = Chain(layer, *after)
    model(example)
    found = survey(model.to(dtype), example.to(dtype))
    return found.sites.get("layer") or found.refused["layer"]


class Signless(nn.Module):
    """A norm that scales by the size of its weight: a negative γ would be lost."""

    def __init__(self, power):
        super().__init__()
        self.weight, self.power = nn.Parameter(torch.ones(16)), power

    def forward(self, x):
        return F.rms_norm(x, (16,)) * self.power(self.weight)


class SignlessNorm(Signless):
    """The same by a name that tells what it is."""


class ConditionedNorm(nn.Module):
    """A norm that takes a second input."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, x, scale):
        return F.rms_norm(x, (16,)) * self.weight * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("layer", "norm"),
    [
        (lambda: nn.Linear(8, 16), lambda: LlamaRMSNorm(16)),
        (lambda: nn.Linear(8, 16), lambda: nn.LayerNorm(16)),
        (lambda: nn.Conv2d(3, 16, 3), lambda: ConvNextLayerNorm(16, data_format="channels_first")),
        (lambda: nn.Conv2d(3, 16, 3), lambda: nn.BatchNorm2d(16)),
        (lambda: nn.Conv2d(3, 16, 3), lambda: nn.GroupNorm(4, 16)),
    ],
    ids=["llama", "layer", "convnext", "batch", "group"],
)
def test_norms_that_scale_channels_are_found_in_any_precision(layer, norm, dtype):
    site = surveyed(layer(), norm(), dtype=dtype)
    assert site.norm == "after.0"


@pytest.mark.parametrize(
    "norm",
    [
        GemmaRMSNorm(16),  # scales by 1 + w
        SignlessNorm(torch.abs),
        SignlessNorm(torch.square),
        SignlessNorm(torch.exp),
    ],
    ids=["one-plus", "absolute", "square", "exponential"],
)
def test_a_norm_that_does_something_else_with_its_weight_is_refused(norm):
    assert "does not scale the layer's channels one by one" in surveyed(nn.Linear(8, 16), norm)


def test_a_norm_whose_name_says_nothing_is_not_looked_at():
    assert surveyed(nn.Linear(8, 16), Signless(torch.abs)).norm is None


@pytest.mark.parametrize("named", [False, True])
def test_a_norm_with_a_second_input_is_refused_and_hinders_no_other(named):
    class Conditioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.layer = nn.Linear(8, 8), nn.Linear(8, 16)
            self.norm, self.head = ConditionedNorm(), nn.Linear(96, 3)

        def forward(self, x):
            y = self.layer(self.first(x).relu())
            y = self.norm(y, scale=y.mean()) if named else self.norm(y, y.mean())
            return self.head(y.flatten(1))

    found = survey(Conditioned(), WORDS)
    assert list(found.sites) == ["first"]
    assert "layer" in found.refused


def test_a_layer_that_gives_more_than_a_tensor_is_refused():
    class WithBias(nn.Linear):
        def forward(self, x):
            return super().forward(x), self.bias

    class First(nn.Module):
        def forward(self, pair):
            return pair[0]

    assert surveyed(WithBias(8, 16), First()) == "its output is not one tensor"


class AsFunction(nn.Module):
    """An activation that is no module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (nn.ReLU(), "relu"),
        (nn.ReLU(inplace=True), "relu"),
        (nn.GELU(), "gelu"),
        (nn.Hardswish(), "hardswish"),
        (nn.PReLU(), "prelu"),
        (NewGELUActivation(), "newgelu"),
        (AsFunction(F.silu), "silu"),
        (AsFunction(torch.tanh), "tanh"),
        (AsFunction(Tensor.sigmoid), "sigmoid"),
        (AsFunction(lambda x: x.relu_()), "relu"),
        (AsFunction(lambda x: F.relu(x + 1)), None),
        (nn.Softmax(-1), None),
        (nn.Identity(), None),
        (nn.Dropout(), None),
    ],
    ids=str,
)
def test_activations_are_seen_as_modules_and_as_functions(activation, name):
    assert surveyed(nn.Linear(8, 16), activation).activation == name


def test_the_default_is_the_last_third_of_the_layers_that_a_norm_or_an_activation_follows():
    body = []
    for _ in range(4):
        body += [nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.Dropout()]
    model = nn.Sequential(*body, nn.Linear(8, 3))
    found = survey(model, WORDS)
    assert list(found.sites) == ["0", "2", "4", "6", "8", "10", "12", "14"]
    assert [site.name for site in choose(model, found)] == ["12"]


# Layers that run several times.


class Turns(nn.Module):
    """A layer and a norm that run so often, in step or not."""

    def __init__(self, layer_turns, norm_turns):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.norm, self.head = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.turns = layer_turns, norm_turns

    def forward(self, x):
        layers, norms = self.turns
        for turn in range(max(layers, norms)):
            x = self.layer(x) if turn < layers else x
            x = self.norm(x) if turn < norms else x
        return self.head(x.mean(1))


@pytest.mark.parametrize(("turns", "suitable"), [((2, 2), True), ((3, 2), False), ((2, 3), False)])
def test_a_layer_that_runs_often_needs_a_norm_that_runs_with_it(turns, suitable):
    model = Turns(*turns)
    found = survey(model, WORDS)
    assert ("layer" in found.sites) is suitable
    if not suitable:
        assert (
            f"ran {turns[1]} times in one forward, and the layer {turns[0]}"
            in (found.refused["layer"])
        )
        return
    fork = inserted(model, WORDS, ["layer"])
    assert fork.at == ("Turns",)
    assert_two_branches_are_two_passes(model, WORDS)


# Two branches in one forward.


def inserted(model, example, layers, scheme=V2):
    key = scheme.draw_key(model, example, layers=layers, seed=SEED)
    return mark(model, key, example).fork


def assert_two_branches_are_two_passes(model, example):
    found = []
    for branch in Branch:
        with torch.no_grad(), on_branch(model, branch):
            found.append(logits_of(call(model, example)))
    public, private, both = found
    torch.testing.assert_close(both, torch.cat([public, private]), rtol=1e-4, atol=1e-5)
    assert (public - private).abs().max() > 1e-3


class Masked(nn.Module):
    """Multiplies by what it is given beside x, in one make or another."""

    def __init__(self, give):
        super().__init__()
        self.layer, self.give = nn.Linear(8, 8), give

    def forward(self, x, mask=None, pair=None, table=None):
        mask = pair[0] * pair[1] if pair is not None else mask
        x = self.layer(x * mask[..., None])
        return x if table is None else x @ table


class Stack(nn.Module):
    """Embeds, then two masked layers defined in another order than they run in."""

    def __init__(self, give):
        super().__init__()
        torch.manual_seed(0)
        self.head, self.late = nn.Linear(8, 3), Masked(give)
        self.early, self.embed = Masked(give), nn.Linear(8, 8)
        self.table = nn.Parameter(normal(8, 8))

    def forward(self, x, mask):
        x = self.embed(x)
        for block in (self.early, self.late):
            x = block.give(block, x.relu(), mask, self.table)
        return self.head(x.mean(1))


def positional(block, x, mask, _table):
    return block(x, mask)


def named(block, x, mask, _table):
    return block(x=x, mask=mask)


def in_a_tuple(block, x, mask, _table):
    return block(x, pair=(mask, mask))


def in_a_list(block, x, mask, _table):
    return block(x, pair=[mask, mask])


def beside_a_table(block, x, mask, table):
    return block(x, mask, None, table)


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("give", [positional, named, in_a_tuple, in_a_list, beside_a_table])
def test_masks_follow_the_fork_however_they_are_given(give, by_name):
    model, mask = Stack(give), (normal(4, 6, seed=1) > 0).float()
    example = {"x": WORDS, "mask": mask} if by_name else (WORDS, mask)
    plain = list(dict(model.named_modules()))
    fork = inserted(model, example, ["early.layer"])
    # The block that runs first is forked though it is defined later, and the other one follows.
    assert fork.at == ("early.layer",)
    assert fork.followers == ("late",)
    assert_two_branches_are_two_passes(model, example)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_two_branches_are_two_passes(twin, example)
        surgery.run_both(twin)  # of its own: what the first one does is its own affair
        assert len(model(WORDS, mask)) == 4
        assert len(twin(WORDS, mask)) == 8
        surgery.remove(twin)
        assert_two_branches_are_two_passes(model, example)
    surgery.remove(model)
    assert list(dict(model.named_modules())) == plain
    assert not any(each._forward_pre_hooks for each in model.modules())


class Positions(nn.Module):
    """Takes a table of as many rows as there are words, and of any batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x, table):
        return self.head((self.layer(x + table) * x).mean(1))


def test_an_input_that_is_no_batch_is_not_doubled_even_where_a_batch_is_as_long():
    model, table = Positions(), normal(6, 8, seed=1)
    assert inserted(model, (WORDS, table), ["layer"]).at == ("Positions",)
    for length in (4, 6, 3):  # six images, and six rows in the table
        assert_two_branches_are_two_passes(model, (normal(length, 6, 8), table))


def test_an_example_that_leaves_open_what_the_batch_is_is_refused_with_what_to_do():
    with pytest.raises(UnsuitableModelError, match="as long as no other axis of its inputs"):
        inserted(Positions(), (normal(6, 6, 8), normal(6, 8)), ["layer"])


@pytest.mark.parametrize("length", [3, 4, 5])
def test_an_argument_inside_that_is_as_long_as_a_batch_by_chance_does_not_mislead(length):
    class Scales(nn.Module):
        def forward(self, x, factors):
            return x * factors

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer, self.scales = nn.Conv2d(3, length, 1), Scales()
            self.factors, self.head = torch.rand(length, 1, 1), nn.Linear(64 * length, 3)

        def forward(self, x):
            return self.head(self.scales(self.layer(x).relu(), self.factors).flatten(1))

    model = Net()
    fork = inserted(model, IMAGES, ["layer"])
    assert (fork.at, fork.followers) == (("layer",), ())
    for batch in (length - 1, length, 2 * length):
        assert_two_branches_are_two_passes(model, normal(batch, 3, 8, 8))


def test_a_network_in_half_precision_is_forked_too():
    model = nn.Sequential(
        *(nn.Linear(8, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 64), nn.GELU()),
        *(nn.Flatten(), nn.Linear(384, 3)),
    ).bfloat16()
    fork = inserted(model, WORDS.bfloat16(), ["0", "3"])
    assert fork.at == ("1",)


def test_a_network_that_only_takes_what_is_not_negative_is_forked_too():
    class Rooted(nn.Sequential):
        def forward(self, x):
            return super().forward(x.sqrt())

    model = Rooted(nn.Linear(8, 8), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))
    assert inserted(model, WORDS.abs(), ["0"]).at == ("0",)


@pytest.mark.parametrize("share", [1.0, 1e-2])
def test_a_network_that_mixes_its_batch_is_refused_however_small_its_outputs(share):
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 3, bias=False)

        def forward(self, x):
            x = self.layer(x)
            return 1e-5 * self.head((x - share * x.mean(0)).relu().mean(1))

    model = Mixing()
    before = list(dict(model.named_modules()))
    with pytest.raises(UnsuitableModelError, match="cannot run in one forward"):
        inserted(model, WORDS, ["layer"])
    assert list(dict(model.named_modules())) == before
    assert not any(each._forward_pre_hooks for each in model.modules())


def test_a_norm_on_both_sides_of_the_fork_moves_the_fork_further_out():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.norm, self.first = nn.BatchNorm1d(8), nn.Linear(8, 8)
            self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            x = self.norm(self.first(x).relu())
            return self.head(self.norm(self.layer(x).relu()))

    assert inserted(Shared(), normal(4, 8), ["layer"]).at == ("Shared",)


def test_a_batch_norm_behind_the_fork_that_is_called_by_name_is_split_as_any():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.norm(input=self.layer(x).relu()))

    model = Named()
    assert inserted(model, normal(4, 8), ["layer"]).at == ("layer",)
    assert_two_branches_are_two_passes(model, normal(4, 8))


def test_what_a_step_costs_is_what_the_layers_behind_the_fork_cost_twice():
    sizes = [(8, 16), (16, 32), (32, 16), (16, 3)]
    layers = [nn.Linear(*size) for size in sizes]
    model = nn.Sequential(*(each for layer in layers for each in (layer, nn.ReLU())))
    products = [a * b for a, b in sizes]
    for index in range(1, 3):
        twin = copy.deepcopy(model)
        cost = inserted(twin, normal(2, 8), [str(2 * index)]).step_cost
        # The layer that carries the passport runs once: the branches part at its scale.
        behind = sum(products[index + 1 :])
        assert cost == pytest.approx((sum(products) + behind) / sum(products))


# PyTorch's own transformer, which runs past its own parts in evaluation.


class Encoder(nn.Module):
    def __init__(self, *, norm_first, activation, nested=True):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(
            *(8, 2, 16), 0.0, activation, norm_first=norm_first, batch_first=True
        )
        nested = nested and not norm_first
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
        self.head = nn.Linear(8, 3)

    def forward(self, x, pad=None, mask=None):
        return self.head(self.body(x, mask, pad).mean(1))


PAD = torch.arange(6).expand(4, 6) >= torch.tensor([6, 3, 5, 4])[:, None]
CAUSAL = torch.ones(6, 6, dtype=torch.bool).triu(1)


@pytest.mark.parametrize("masks", [{}, {"mask": CAUSAL}, {"mask": CAUSAL, "pad": PAD}], ids=len)
@pytest.mark.parametrize("name", ["body.layers.0.linear1", "body.layers.1.linear2"])
@pytest.mark.parametrize(("norm_first", "activation"), [(True, "gelu"), (False, "relu")])
def test_pytorchs_transformer_runs_its_passports_in_evaluation(norm_first, activation, name, masks):
    model = Encoder(norm_first=norm_first, activation=activation)
    example = {"x": WORDS, **masks}
    plain = copy.deepcopy(model).eval()
    fork = inserted(model, example, [name])
    block = name.rpartition(".")[0]
    assert fork.at == (block,)
    assert fork.followers == (("body.layers.1",) if "pad" in masks and block[-1] == "0" else ())
    assert 1.4 < fork.step_cost <= 2
    assert_two_branches_are_two_passes(model, example)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**example), plain(**example), rtol=1e-4, atol=1e-5)
        surgery.present(model)
        presented = model(**example)
    # With gradients PyTorch always takes the long way.
    torch.testing.assert_close(presented, model(**example), rtol=1e-4, atol=1e-5)


def test_the_projection_inside_pytorchs_attention_did_not_run():
    found = survey(Encoder(norm_first=True, activation="relu"), WORDS)
    names = [f"body.layers.{index}.self_attn.out_proj" for index in range(2)]
    assert [found.refused[name] for name in names] == ["it did not run"] * 2


def test_nested_tensors_are_refused_with_what_to_do():
    model = Encoder(norm_first=False, activation="relu")
    example = {"x": WORDS, "pad": PAD}
    for name in ("body.layers.0.linear1", "body.layers.1.linear1"):
        with pytest.raises(UnsuitableModelError, match=r"set_fastpath_enabled\(False\)"):
            inserted(model, example, [name])
    model = Encoder(norm_first=False, activation="relu", nested=False)
    inserted(model, example, ["body.layers.0.linear1"])
    assert_two_branches_are_two_passes(model, example)


# GPT-2, whose layers keep (in, out).


@pytest.fixture(scope="module")
def gpt2():
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 50, "n_positions": 16}
    config = GPT2Config(
        **sizes, num_labels=3, pad_token_id=0, bos_token_id=1, eos_token_id=2, use_cache=False
    )
    return GPT2ForSequenceClassification(config)


def test_gpt2_carries_a_key_to_its_weights_and_back(gpt2):
    model = copy.deepcopy(gpt2)
    tokens = torch.randint(1, 50, (4, 7), generator=torch.Generator().manual_seed(0))
    example = {"input_ids": tokens, "attention_mask": (tokens > 5).long()}
    key = V2.draw_key(model, example, layers=["transformer.h.1.mlp.c_fc"], seed=SEED)
    assert key.context.layers[0].weight == (64, 16)
    marked = mark(model, key, example)
    assert marked.fork.at == ("GPT2ForSequenceClassification",)
    assert marked.fork.step_cost == 2
    assert_two_branches_are_two_passes(model, example)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        loss = marked.loss(example, torch.tensor([0, 1, 2, 0]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert marked.measures["sign_match"] == 1
    plain = marked.released()
    assert {n: p.shape for n, p in plain.state_dict().items()} == {
        n: p.shape for n, p in gpt2.state_dict().items()
    }
    assert V2.verify(plain.state_dict(), key).matches == 64
    assert V2.verify(gpt2.state_dict(), key).matches < 50


# A loss of one's own.


def test_a_loss_of_ones_own_is_called_for_each_branch_and_triggers_keep_the_papers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3))
    key = V3.draw_key(model, IMAGES, layers=["0"], seed=SEED)
    seen = []

    def task(output, labels):
        seen.append((output.detach(), labels))
        return 2 * F.cross_entropy(output, labels)

    normalise = Normalisation((0.5,) * 3, (0.5,) * 3)
    marked = mark(model, key, IMAGES, normalise=normalise, task=task)
    labels = torch.tensor([0, 1, 2, 0])
    loss = marked.loss(IMAGES, labels, model=nn.Sequential(model))  # as it is wrapped by now
    assert [len(output) for output, _ in seen] == [4, 4]
    assert all(torch.equal(given, labels) for _, given in seen)
    images, answers = key.trigger_set()
    batch = torch.cat([IMAGES, normalise(images[:2])])
    expected = 0
    for branch in (Branch.PUBLIC, Branch.PRIVATE):
        with on_branch(model, branch):
            output = model(batch)
        expected += 4 / 6 * 2 * F.cross_entropy(output[:4], labels)
        expected += 2 / 6 * F.cross_entropy(output[4:], answers[:2])
    norm = next(iter(passport_norms(model).values()))
    gamma = norm.affine()[0]
    expected = expected + V3.sign_weight * F.relu(V3.margin - gamma * norm.signs).sum()
    torch.testing.assert_close(loss, expected)
    assert set(marked.measures) == {"sign_match", "task_loss", "private_task_loss"}
