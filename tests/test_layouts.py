"""Kernels kept in another form compute the same, and are read."""

import numpy as np
import pytest
import torch
from test_moves import anchor, marked, rng
from test_naming import arrays, matched, read, renamed
from torch import nn
from torch.nn import functional as F

from nnpassport.alignment.layouts import laid_out
from nnpassport.attacks.moves import move

FORMS = {
    "zeros around each kernel": lambda k: np.pad(k, [(0, 0)] * 2 + [(1, 1)] * (k.ndim - 2)),
    "zeros on one side": lambda k: np.pad(k, [(0, 0)] * 2 + [(0, 2)] * (k.ndim - 2)),
    "positions first, as TensorFlow has them": lambda k: k.transpose(2, 3, 1, 0),
    "positions before channels": lambda k: k.transpose(0, 2, 3, 1),
    "the matrix that multiplies patches": lambda k: k.reshape(len(k), -1),
    "half precision": lambda k: k.astype(np.float16),
}


def in_form(state, form):
    return {n: FORMS[form](t) if t.ndim == 4 else t for n, t in state.items()}


def test_zeros_around_a_kernel_or_between_its_numbers_change_nothing():
    draw = torch.Generator().manual_seed(0)
    kernel = torch.randn(4, 3, 3, 3, generator=draw, dtype=torch.float64)
    pictures = torch.randn(2, 3, 9, 9, generator=draw, dtype=torch.float64)
    wide = nn.functional.pad(kernel, (1, 1, 1, 1))
    assert torch.allclose(
        F.conv2d(pictures, wide, padding=2), F.conv2d(pictures, kernel, padding=1)
    )
    apart = torch.zeros(4, 3, 5, 5, dtype=torch.float64)
    apart[:, :, ::2, ::2] = kernel
    assert torch.allclose(F.conv2d(pictures, apart), F.conv2d(pictures, kernel, dilation=2))
    there = {"k": kernel.numpy()}
    for form in (wide, apart):
        assert np.array_equal(laid_out({"k": form.numpy()}, there)["k"], kernel.numpy())
        assert np.array_equal(laid_out({"other": form.numpy()}, there)["other"], kernel.numpy())
    loud = apart + 0.1 * torch.randn(apart.shape, generator=draw)
    assert laid_out({"k": loud.numpy()}, there)["k"].shape == loud.shape


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["ResNet", "ConvNeXt"])
def test_a_mark_in_kernels_of_another_form_is_read(name, form):
    """Once, a layer with zeros around its kernel matched no bit, or nothing fitted at all."""
    key, released = marked(name)
    state = arrays(move(released, anchor(name)[1], rng(1), kinds=["reorder"]).model.state_dict())
    for thief in (in_form(state, form), renamed(in_form(state, form))):
        found = read(thief, name)
        assert matched(found, key) > 0.95
        assert found.marked
