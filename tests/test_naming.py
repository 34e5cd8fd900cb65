"""Aligned to the anchor under any names: turned kernels, empty blocks, blocks left out."""

from contextlib import suppress

import numpy as np
import pytest
import torch
import zoo
from test_moves import anchor, axes, marked, rng
from torch import nn

from nnpassport.alignment.anchored import verify_anchored
from nnpassport.alignment.axes import Axes
from nnpassport.alignment.byaxes import anchor_of
from nnpassport.alignment.mirrors import ORIENTATIONS, possible, turned
from nnpassport.alignment.naming import candidates_of
from nnpassport.attacks.blocks import drop_block, insert_block, rename
from nnpassport.attacks.moves import KEEPING, move
from nnpassport.embedding.network.outputs import call, logits_of
from nnpassport.keys.chance import LOG10_BY_SHAPE
from nnpassport.keys.counts import Reading
from nnpassport.keys.reading import READERS
from nnpassport.scheme import UnsuitableModelError


def arrays(state):
    return {name: tensor.detach().numpy() for name, tensor in state.items()}


def read(weights, name):
    """The verdict on arrays aligned to the network before the mark: nothing else is known."""
    key, _ = marked(name)
    model, _ = anchor(name)

    v = Reading.by(READERS[key.context.scheme], key, log10_alpha=-9)
    anchored = anchor_of(axes(name), arrays(model.state_dict()), key)
    return v.verdict(verify_anchored(v, weights, anchored))


def renamed(state, seed=0):
    """The tensors under numbers, in an order by lot; counters of batches are gone."""
    names = sorted(n for n, t in state.items() if t.ndim or n.endswith("scale"))
    order = np.random.default_rng(seed).permutation(len(names))
    return {f"t{number}": state[names[n]] for number, n in enumerate(order)}


def matched(found, key):
    return found.matches / key.context.bits


# Orientations


def test_eight_orientations_are_all_and_have_their_inverses():
    picture = np.arange(12.0).reshape(1, 1, 3, 4)
    seen = {np.ascontiguousarray(each.of(picture)).tobytes() + bytes(each.of(picture).shape)
            for each in ORIENTATIONS}  # fmt: skip
    assert len(seen) == len(ORIENTATIONS) == 8
    for each in ORIENTATIONS:
        assert np.array_equal(each.inverse.of(each.of(picture)), picture)


@pytest.mark.parametrize("name", ["ConvNeXt", "ViT", "U-Net", "ResNet"])
def test_kernels_and_pictures_are_turned_and_the_answers_stay(name):
    model, example = anchor(name)
    moved = move(model, example, rng(1), kinds=["mirror"])
    assert moved.done["mirror"] == 1
    with torch.no_grad():
        mine, theirs = (logits_of(call(each, example)) for each in (model, moved.model))
    assert (mine - theirs).abs().max() < 1e-3 * mine.abs().max()
    moved.model._forward_pre_hooks.clear()  # what its weights compute of pictures as they come
    with torch.no_grad():
        assert (logits_of(call(moved.model, example)) - mine).abs().max() > 1e-2 * mine.abs().max()


@pytest.mark.parametrize("name", ["ResNet", "U-Net"])
@pytest.mark.parametrize("number", [1, 3, 5])
def test_kernels_in_any_orientation_are_read_and_all_orientations_are_paid_for(name, number):
    key, released = marked(name)
    way = ORIENTATIONS[number]
    thief = turned(axes(name), arrays(released.state_dict()), way)
    found = read(thief, name)
    assert matched(found, key) > 0.97
    assert f"kernels were {way.name}, of 8 orientations" in found.reason
    assert found.alignment["orientation"] == way.name
    plain = read(arrays(released.state_dict()), name)
    assert found.log10_p_value > plain.log10_p_value + 0.8 * (LOG10_BY_SHAPE + np.log10(8))


def test_signals_and_kernels_that_are_not_square_have_fewer_orientations():
    table = Axes((), {"signal": (1, None)}, {}, {}, {})
    assert [way.flipped for way in possible(table, {"signal": (8, 4, 5)})] == [(-1,)]
    assert len(list(possible(table, {"kernel": (8, 4, 3, 5)}))) == 3
    assert not list(possible(table, {"kernel": (8, 4, 1, 1), "matrix": (8, 4)}))


# Names


@pytest.mark.parametrize(
    "name", ["ResNet", "ConvNeXt", "GPT-2", "Llama", pytest.param("ViT", marks=pytest.mark.slow)]
)
def test_a_moved_network_under_no_names_is_read(name):
    key, released = marked(name)
    _, example = anchor(name)
    for kinds in ([], KEEPING):
        thief = renamed(arrays(move(released, example, rng(1), kinds=kinds).model.state_dict()))
        found = read(thief, name)
        assert matched(found, key) > 0.9
        assert found.marked
        assert "fit best under any name" in found.reason
        assert found.candidates["log10_choices"] > LOG10_BY_SHAPE
        assert set(found.candidates["taken"].values()) <= set(thief)


@pytest.mark.parametrize("name", ["ResNet", "GPT-2"])
def test_strangers_under_no_names_gain_nothing(name):
    _, example = anchor(name)
    for seed in range(2):
        with torch.random.fork_rng():
            torch.manual_seed(70 + seed)
            stranger = zoo.ZOO[name].build().eval()
        thief = renamed(arrays(move(stranger, example, rng(seed)).model.state_dict()))
        with suppress(UnsuitableModelError):
            found = read(thief, name)
            assert not found.marked
            assert found.log10_p_value > -3


def test_where_nothing_fits_it_is_said_what_was_looked_for():
    with pytest.raises(UnsuitableModelError, match=r"looked for were transformer\.h\.2\.mlp"):
        read({"a": np.ones((3, 5), np.float32), "b": np.ones(4, np.float32)}, "GPT-2")


def test_a_matrix_is_found_turned_as_a_convolution_and_in_a_fused_projection():
    shapes = {"as it is": (8, 4), "turned": (4, 8), "fused": (24, 4), "kernel": (8, 4, 1, 1),
              "other": (8, 5), "vector": (8,)}  # fmt: skip
    found = candidates_of(shapes, (8, 4), (False, False))
    assert {each.name for each in found} == {"as it is", "turned", "fused", "kernel"}
    assert [each.part for each in found if each.name == "fused"] == [(3, 0), (3, 1), (3, 2)]
    assert {each.name for each in candidates_of(shapes, (8, 5), (False, False))} == {"other"}


# Blocks


@pytest.mark.parametrize("name", ["GPT-2", "Llama", pytest.param("ViT", marks=pytest.mark.slow)])
def test_a_block_that_adds_nothing_hides_no_mark(name):
    key, released = marked(name)
    _, example = anchor(name)
    thief = insert_block(released, example, rng(3))
    assert len(thief.state_dict()) > 1.2 * len(released.state_dict())
    with torch.no_grad():
        apart = logits_of(call(thief, example)) - logits_of(call(released, example))
    assert apart.abs().max() < 1e-4
    found = read(arrays(thief.state_dict()), name)
    assert matched(found, key) > 0.97
    assert found.marked
    moved = move(thief, example, rng(1), kinds=["rotate", "reorder"]).model.state_dict()
    assert read(arrays(moved), name).marked


def test_a_network_with_a_block_left_out_is_read():
    key, released = marked("GPT-2")
    _, example = anchor("GPT-2")
    thief = drop_block(released, example, 1)
    assert logits_of(call(thief, example)).shape == logits_of(call(released, example)).shape
    found = read(arrays(rename(thief.state_dict(), rng(2))), "GPT-2")
    assert matched(found, key) > 0.97
    assert found.marked


def test_what_has_no_blocks_is_refused():
    with pytest.raises(UnsuitableModelError, match="no list of blocks alike"):
        insert_block(nn.Linear(3, 3), torch.zeros(2, 3), rng())
    with pytest.raises(UnsuitableModelError, match="no list of blocks alike"):
        drop_block(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)), torch.zeros(2, 3), 0)


@pytest.mark.parametrize(("lost", "matches"), [("c_proj", 128), ("c_fc", 32)])
def test_where_a_layer_of_the_key_is_not_there_there_is_no_no(lost, matches):
    """Of the block with the mark one matrix is gone; once the verdict was a no, at p = 1."""
    state = arrays(marked("GPT-2")[1].state_dict())
    thief = {n: t for n, t in state.items() if n != f"transformer.h.2.mlp.{lost}.weight"}
    with pytest.raises(UnsuitableModelError, match=f"1 of the key's layers .*: {matches} of 160"):
        read(thief, "GPT-2")


def as_three(state, name):
    """The matrix as a product of three, which compute the same one behind the other."""
    weight, draw = state[name].astype(np.float64), np.random.default_rng(0)
    size = max(weight.shape) + 8
    one, two = (draw.standard_normal((n, size)) for n in (len(weight), size))
    three = np.linalg.pinv(one @ two) @ weight
    assert np.allclose(one @ two @ three, weight, atol=1e-12)
    return {n: t for n, t in state.items() if n != name} | {"1": one, "2": two, "3": three}


@pytest.mark.parametrize("decoy", [False, True])
@pytest.mark.parametrize("name", ["GPT-2", "ViT"])
def test_a_layer_in_a_form_that_is_not_known_makes_no_no(name, decoy):
    """Three linear layers in place of one, and noise under its name, which nothing runs."""
    key, released = marked(name)
    state = arrays(released.state_dict())
    for layer in key.context.layers:
        hidden = f"{layer.name}.weight"
        noise = np.random.default_rng(1).standard_normal(state[hidden].shape).astype(np.float32)
        state = {f"_{n}" if n in "123" else n: t for n, t in as_three(state, hidden).items()}
        state |= {hidden: 0.1 * noise} if decoy else {}
        break
    with pytest.raises(UnsuitableModelError, match="cannot be said that the mark is not there"):
        read(state, name)


def test_a_stranger_with_tensors_more_is_told_no():
    with torch.random.fork_rng():
        torch.manual_seed(70)
        stranger = arrays(zoo.ZOO["GPT-2"].build().eval().state_dict())
    found = read(stranger | {"more": np.ones((40, 50), np.float32)}, "GPT-2")
    assert not found.marked
