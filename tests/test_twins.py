"""Channels that a thief split, or added so that they cancel, are one again and then matched."""

import time

import numpy as np
import pytest
import torch
from torch import nn

from nnpassport.alignment.solve import aligner
from nnpassport.attacks.moves import move
from nnpassport.embedding.axes import axes_of

PICTURES = (3, 2, 8, 8)


def arrays(model):
    return {name: t.detach().double().numpy() for name, t in model.state_dict().items()}


class Gated(nn.Module):
    """A product of a bent factor and a plain one, as in large language models."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 9), nn.Linear(6, 9), nn.Linear(9, 4)

    def forward(self, x):
        return self.down(nn.functional.gelu(self.gate(x)) * self.up(x))


def layers(act):
    return nn.Sequential(nn.Linear(6, 16), act, nn.Linear(16, 4))


def convolutions():
    model = nn.Sequential(
        *(nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(144, 3)),
    )
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    return model


NETWORKS = {
    "ReLU": (lambda: layers(nn.ReLU()), (3, 6)),
    "GELU": (lambda: layers(nn.GELU()), (3, 6)),
    "gated": (Gated, (3, 6)),
    "batch norm": (convolutions, PICTURES),
}


def made(name):
    build, shape = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, example = build().eval(), torch.randn(shape)
    return model, example, axes_of(model, example)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_was_split_or_cancels_is_as_it_was(name, seed):
    """Of a channel that is read in two shares once only one came back, so that its reader lost."""
    model, example, axes = made(name)
    rng = torch.Generator().manual_seed(seed)
    thief = move(model, example, rng, kinds=["reorder", "split", "dummies"])
    assert thief.done["split"]
    assert thief.done["dummies"]
    to = aligner(axes, arrays(model))
    found = to.align(arrays(thief.model)).weights
    for tensor, theirs in to.reference.items():
        if theirs.ndim > 1:
            assert np.abs(found[tensor] - theirs).max() < 1e-4 * np.abs(theirs).max(), tensor


@pytest.mark.parametrize(("name", "factor"), [("ReLU", 3.0), ("gated", -3.0)])
def test_twins_of_other_scales_are_one(name, factor):
    """Behind a ReLU any positive factor of one of them is read as its inverse; of `up` any."""
    model, _, axes = made(name)
    state = arrays(model)
    writers = ("0.weight", "0.bias") if name == "ReLU" else ("up.weight", "up.bias")
    reader = "2.weight" if name == "ReLU" else "down.weight"
    thief = {}
    for tensor, each in state.items():
        if tensor == reader:
            thief[tensor] = np.hstack([each * ([0.25] + [1] * (each.shape[1] - 1)),
                                       0.75 / factor * each[:, :1]])  # fmt: skip
        elif len(each) == state[writers[0]].shape[0]:
            twin = each[:1] * (factor if tensor in writers else 1)
            thief[tensor] = np.concatenate([each, twin])
        else:
            thief[tensor] = each
    found = aligner(axes, state).align(thief).weights
    for tensor in (writers[0], reader):
        assert np.allclose(found[tensor], state[tensor], atol=1e-6), tensor


@pytest.mark.parametrize("copies", [12, 3_000])
def test_any_number_of_twins_takes_a_bounded_time(copies):
    """All pairs of so many rows would be four million; most of them are one all the same."""
    model, _, axes = made("GELU")
    state = arrays(model)
    writer, bias, reader = state["0.weight"], state["0.bias"], state["2.weight"]
    thief = {
        "0.weight": np.vstack([writer, np.repeat(writer[:1], copies, axis=0)]),
        "0.bias": np.append(bias, np.repeat(bias[:1], copies)),
        "2.weight": np.hstack(
            [reader * ([0] + [1] * 15), np.repeat(reader[:, :1], copies, 1) / copies]
        ),
        "2.bias": state["2.bias"],
    }
    begun = time.process_time()
    found = aligner(axes, state).align(thief).weights
    assert time.process_time() - begun < 5
    if copies < 100:
        assert np.allclose(found["2.weight"], reader, atol=1e-6)


def test_rows_alike_that_are_shifted_otherwise_are_no_twins():
    """A dead channel is written like a live one but for its bias; what reads it is for show."""
    model, _, axes = made("ReLU")
    state = arrays(model)
    loud = 100 * np.ones((4, 1))
    thief = {
        "0.weight": np.vstack([state["0.weight"], state["0.weight"][:1]]),
        "0.bias": np.append(state["0.bias"], -1e6),
        "2.weight": np.hstack([state["2.weight"], loud]),
        "2.bias": state["2.bias"],
    }
    found = aligner(axes, state).align(thief).weights
    assert np.allclose(found["2.weight"], state["2.weight"], atol=1e-6)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["ReLU", "batch norm"])
def test_channels_that_are_written_by_zeros_are_left_alone(name):
    """Dead ones, some with a shift: however many there are, they are twins of one another alone."""
    model, _, axes = made(name)
    state = arrays(model)
    dead, count = 5, len(state["0.weight"])
    reader = "2.weight" if name == "ReLU" else "3.weight"
    thief = dict(state)
    for tensor, each in state.items():
        if tensor.split(".")[0] in ("0", "1") and each.ndim and len(each) == count:
            value = 0.0 if tensor == "0.weight" else 1.0
            thief[tensor] = np.concatenate([each, np.full((dead, *each.shape[1:]), value)])
    thief[reader] = np.concatenate(
        [state[reader], np.ones((state[reader].shape[0], dead, *state[reader].shape[2:]))], axis=1
    )
    to = aligner(axes, state)
    found = to.align(thief).weights
    for tensor in ("0.weight", reader):
        assert np.allclose(found[tensor], to.reference[tensor], atol=1e-6), tensor


def test_rows_that_differ_are_all_there_when_the_suspect_is_wider():
    """Of a wider network nothing is made one, and the best rows are taken as they are."""
    model, _, axes = made("GELU")
    state, rng = arrays(model), np.random.default_rng(0)
    wider = {
        "0.weight": np.vstack([rng.standard_normal((5, 6)), state["0.weight"]]),
        "0.bias": np.append(rng.standard_normal(5), state["0.bias"]),
        "2.weight": np.hstack([rng.standard_normal((4, 5)), state["2.weight"]]),
        "2.bias": state["2.bias"],
    }
    found = aligner(axes, state).align(wider).weights
    assert np.allclose(found["2.weight"], state["2.weight"], atol=1e-6)
