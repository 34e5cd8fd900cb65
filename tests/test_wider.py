"""Moves that make a network wider or cut its tensors up, and leave what it computes as it is."""

from copy import deepcopy

import numpy as np
import pytest
import torch
import zoo
from test_moves import anchor, axes, marked, rng
from test_naming import matched, read, renamed
from torch import nn

from nnpassport import V2
from nnpassport.alignment.anchored import verify_anchored
from nnpassport.alignment.byaxes import anchor_of
from nnpassport.alignment.naming import JOINED
from nnpassport.alignment.solve import aligner
from nnpassport.attacks.moves import move
from nnpassport.embedding.axes import axes_of
from nnpassport.embedding.schemes.channels import Limit
from nnpassport.embedding.schemes.graft import graft_channels
from nnpassport.keys.counts import Reading
from nnpassport.keys.reading import READERS

WIDTH, HIDDEN = 12, 20


class Norm(nn.Module):
    """Root mean square, as Llama's models write it."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-12))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = Norm(width)
        self.up, self.down = nn.Linear(width, HIDDEN), nn.Linear(HIDDEN, width, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Stream(nn.Module):
    """Letters, two blocks, and a head."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.embed, self.norm = nn.Embedding(30, width), Norm(width)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.head = nn.Linear(width, 5)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class Bottle(nn.Module):
    """A bottleneck between batch norms."""

    def __init__(self, width=6):
        super().__init__()
        self.enter, self.first = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.narrow, self.second = nn.Conv2d(16, width, 1, bias=False), nn.BatchNorm2d(width)
        self.wide, self.third = nn.Conv2d(width, 24, 1, bias=False), nn.BatchNorm2d(24)
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        x = self.second(self.narrow(self.first(self.enter(x)).relu()))
        return self.head(self.third(self.wide(x)).relu().mean((2, 3)))


def arrays(model):
    return {n: t.detach().double().numpy() for n, t in model.state_dict().items() if t.dim()}


def rotation(size, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=draw, dtype=torch.float64)).Q


@torch.no_grad()
def wider_stream(model, more=4):
    """A copy whose stream has dimensions more, rotated; nobody writes into them."""
    size = WIDTH + more
    wide = Stream(size).double()
    turn = rotation(size)
    state = {n: t.double() for n, t in model.state_dict().items()}
    one = {"blocks.0.up": "blocks.0.norm", "blocks.1.up": "blocks.1.norm", "head": "norm"}
    found = dict(state)
    found["embed.weight"] = nn.functional.pad(state["embed.weight"], (0, more)) @ turn.T
    for number in (0, 1):
        name = f"blocks.{number}.down.weight"
        found[name] = turn @ nn.functional.pad(state[name], (0, 0, 0, more))
    for reader, norm in one.items():
        folded = state[f"{reader}.weight"] * state[f"{norm}.weight"]
        folded = folded * (WIDTH / size) ** 0.5  # the mean is over more of them
        loud = torch.cat([folded, torch.randn(len(folded), more, dtype=torch.float64)], 1)
        found[f"{reader}.weight"] = loud @ turn.T
        found[f"{norm}.weight"] = torch.ones(size, dtype=torch.float64)
    wide.load_state_dict(found)
    return wide


@torch.no_grad()
def wider_bottleneck(model, more=3):
    """A copy whose bottleneck has channels more, which are mixtures of the others."""
    size = 6
    wide = Bottle(size + more).double().eval()
    state = {n: t.double() if t.is_floating_point() else t for n, t in model.state_dict().items()}
    draw = torch.Generator().manual_seed(2)
    mix = torch.randn(size + more, size, generator=draw, dtype=torch.float64)
    scale = state["second.weight"] / (state["second.running_var"] + model.second.eps).sqrt()
    found = dict(state)
    found["narrow.weight"] = (mix @ (scale[:, None] * state["narrow.weight"].flatten(1)))[
        :, :, None, None
    ]
    found["second.weight"] = torch.ones(size + more, dtype=torch.float64)
    found["second.running_var"] = torch.full(
        (size + more,), 1 - model.second.eps, dtype=torch.float64
    )
    found["second.running_mean"] = torch.zeros(size + more, dtype=torch.float64)
    found["second.bias"] = mix @ (state["second.bias"] - scale * state["second.running_mean"])
    back = torch.linalg.pinv(mix)
    beside = torch.randn(24, size + more, generator=draw, dtype=torch.float64)
    beside -= beside @ mix @ back  # reads nothing that there is
    reader = state["wide.weight"].flatten(1) @ back + beside
    found["wide.weight"] = reader[:, :, None, None]
    wide.load_state_dict(found)
    return wide


def settled(model):
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 2)
                module.bias.normal_()
    return model.eval()


@pytest.mark.parametrize("more", [1, 4, 12])
def test_a_wider_stream_is_turned_back_into_the_narrower_one(more):
    torch.manual_seed(0)
    model, tokens = Stream().eval(), torch.randint(30, (2, 7))
    wide = wider_stream(model, more)
    with torch.no_grad():
        torch.testing.assert_close(wide(tokens), model.double()(tokens))
    axes = axes_of(model, tokens)
    assert [axis.kind for axis in axes.axes].count("orthogonal") == 1
    found = aligned(axes, model, wide)
    assert max(found.values()) < 1e-9


@pytest.mark.parametrize("more", [1, 3])
def test_a_wider_bottleneck_is_mixed_back_into_the_narrower_one(more):
    torch.manual_seed(0)
    model, images = settled(Bottle()), torch.randn(2, 3, 8, 8)
    wide = wider_bottleneck(model, more)
    with torch.no_grad():
        torch.testing.assert_close(wide(images.double()), model.double()(images.double()))
    axes = axes_of(model, images.double())
    assert [axis.kind for axis in axes.axes].count("invertible") == 1
    found = aligned(axes, model, wide)
    assert max(found.values()) < 1e-6


def aligned(axes, model, thief):
    """By matrix, one minus the cosine of the thief's and the network's, once it is aligned."""
    to = aligner(axes, arrays(model))
    found = to.align(arrays(thief)).weights
    return {
        name: 1
        - float((found[name] * there).sum() / np.linalg.norm(found[name]) / np.linalg.norm(there))
        if found[name].shape == there.shape
        else 1.0
        for name, there in to.reference.items()
        if there.ndim > 1
    }


def cut(weight, how):
    """A matrix as two, which compute the same one beside or behind the other."""
    draw = np.random.default_rng(3)
    if how == "sum":
        other = draw.standard_normal(weight.shape) * weight.std()
        return weight - other, other
    if how == "product":
        inner = draw.standard_normal((weight.shape[1], weight.shape[1] + 3))
        return weight @ inner, np.linalg.pinv(inner)
    axis = 0 if how == "rows" else 1
    return tuple(np.split(weight, [weight.shape[axis] // 3], axis))


@pytest.mark.parametrize("how", sorted(JOINED))
def test_a_layer_that_is_kept_as_two_tensors_is_read(how):
    """Once, none of the suspect's tensors fitted that layer of a copy that computes the same."""
    key, released = marked("GPT-2")
    thief = {n: t.double().numpy() for n, t in released.state_dict().items()}
    name = "transformer.h.2.mlp.c_fc.weight"
    assert f"{key.context.layers[0].name}.weight" == name
    one, two = cut(thief.pop(name), how)
    whole = JOINED[how](one, two)
    assert np.allclose(whole, released.state_dict()[name].numpy(), atol=1e-6)
    found = read(renamed(thief | {"one": one, "two": two}), "GPT-2")
    assert matched(found, key) > 0.95
    assert f"the {how} of" in found.reason


class Thin(nn.Module):
    """A layer kept as the product of two, of which the second may be read twice."""

    def __init__(self, readers):
        super().__init__()
        self.embed, self.down = nn.Embedding(30, WIDTH), nn.Linear(WIDTH, 4, bias=False)
        self.up = nn.ModuleList([nn.Linear(4, HIDDEN) for _ in range(readers)])
        self.head = nn.Linear(HIDDEN, 5)

    def forward(self, tokens):
        x = self.down(self.embed(tokens).tanh())
        return self.head(sum(up(x).tanh() for up in self.up).mean(1))


@pytest.mark.parametrize("readers", [1, 2])
def test_what_lies_between_two_linear_layers_is_mixed_back(readers):
    torch.manual_seed(0)
    model, tokens = Thin(readers).eval(), torch.randint(30, (2, 7))
    thief, mix = Thin(readers).double(), torch.randn(4, 4, dtype=torch.float64)
    state = {n: t.double() for n, t in model.state_dict().items()}
    state["down.weight"] = mix @ state["down.weight"]
    for number in range(readers):
        state[f"up.{number}.weight"] = state[f"up.{number}.weight"] @ torch.linalg.inv(mix)
    thief.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(thief(tokens), model.double()(tokens))
    assert max(aligned(axes_of(model, tokens), model, thief).values()) < 1e-9


def marked_in(name, layers):
    """A key for these layers of a network of the zoo, and the network with the mark."""
    model, example = anchor(name)
    seen, _ = zoo.ZOO[name].batch(64, 1)
    key = V2.draw_key(model, example, seed=bytes(32), layers=layers, seen=seen)
    owned = deepcopy(model)
    V2.insert(owned, key, example)
    graft_channels(owned, seen, limit=Limit(1.0, 10.0))
    return key, V2.released(owned).eval()


def read_with(key, weights, name):
    v = Reading.by(READERS[key.context.scheme], key, log10_alpha=-9)
    own = arrays(anchor(name)[0])
    return v.verdict(verify_anchored(v, weights, anchor_of(axes(name), own, key)))


def test_a_fused_projection_that_is_kept_as_three_tensors_is_read():
    """Queries, keys and values of GPT-2; two tensors were tried together once, and not three."""
    key, released = marked_in("GPT-2", ["transformer.h.2.attn.c_attn"])
    moved = move(released, anchor("GPT-2")[1], rng(1), kinds=["heads", "rotate", "reorder"])
    for model in (released, moved.model):
        thief = arrays(model)
        for name in [each for each in thief if each.endswith("c_attn.weight")]:
            for part, cut_off in zip("qkv", np.split(thief.pop(name), 3, axis=1), strict=True):
                thief[f"{name}.{part}"] = cut_off
        found = read_with(key, renamed(thief), "GPT-2")
        assert found.marked
        assert matched(found, key) > 0.95
        assert "the columns of" in found.reason


def test_three_projections_that_are_kept_as_one_tensor_are_read():
    layers = [f"bert.encoder.layer.2.attention.self.{each}" for each in ("query", "key", "value")]
    key, released = marked_in("BERT", layers)
    moved = move(released, anchor("BERT")[1], rng(1), kinds=["heads", "reorder"])
    for model in (released, moved.model):
        thief = arrays(model)
        for number in range(3):
            start = f"bert.encoder.layer.{number}.attention.self"
            names = [f"{start}.{each}.weight" for each in ("query", "key", "value")]
            thief[f"{start}.qkv"] = np.concatenate([thief.pop(each) for each in names])
        found = read_with(key, renamed(thief), "BERT")
        assert found.marked
        assert matched(found, key) > 0.95
