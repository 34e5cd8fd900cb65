"""Rotations and mixtures fitted to what no mark moves: each step is the least squares it says."""

import numpy as np
import pytest

from nnpassport.alignment import refine
from nnpassport.alignment.directions import Free
from nnpassport.alignment.refine import Fit
from nnpassport.alignment.spots import Spot
from nnpassport.keys.context import Geometry

SIZE = 12
PLAIN = Geometry((1,), ((0, 0),), (1,), 1, "zeros", False, (0,))


def problem(*, orthogonal, spread):
    """A layer that writes an axis, marked, and one that reads it; units of very different sizes."""
    rng = np.random.default_rng(5)
    lengths = np.geomspace(1, spread, SIZE)
    tensors = {
        "write": lengths[:, None] * rng.standard_normal((SIZE, 20)),
        "read": rng.standard_normal((16, SIZE)) / lengths,
    }
    basis = np.linalg.qr(rng.standard_normal((SIZE, 20, 2)))[0].swapaxes(1, 2)
    spots = [
        (Spot("write", 0, np.arange(SIZE)[:, None], reads=False), False),
        (Spot("read", 1, np.arange(SIZE)[:, None], reads=True), True),
    ]
    return Fit(spots, 1, orthogonal), tensors, {"write": Free(basis, PLAIN)}


def one_step(fit, tensors, free, wanted):
    """The step that `refined` takes from here towards `wanted`."""
    rest = {n: refine._outside(tensors[n] - wanted[n], free.get(n)) for n in tensors}
    scale = {n: float(np.square(wanted[n]).sum()) ** -0.5 for n in tensors}
    return refine._step(fit, tensors, rest, scale, free, SIZE)[0], rest, scale


def left_by(step, tensors, free, rest, scale):
    """What is left of both, to first order."""
    moved = {"write": -step @ tensors["write"], "read": (step.T @ tensors["read"].T).T}
    return np.concatenate(
        [scale[n] * (rest[n] + refine._outside(moved[n], free.get(n))).reshape(-1) for n in tensors]
    )


@pytest.mark.parametrize("orthogonal", [False, True])
def test_a_step_is_the_least_squares_of_what_is_left(orthogonal):
    fit, wanted, free = problem(orthogonal=orthogonal, spread=30.0)
    rng = np.random.default_rng(6)
    tensors = {n: each + 0.1 * rng.standard_normal(each.shape) for n, each in wanted.items()}
    step, rest, scale = one_step(fit, tensors, free, wanted)
    units = np.eye(SIZE * SIZE).reshape(-1, SIZE, SIZE)
    if orthogonal:
        upper = np.triu_indices(SIZE, 1)
        units = (units - units.swapaxes(1, 2)).reshape(SIZE, SIZE, SIZE, SIZE)[upper]
    nothing = left_by(np.zeros((SIZE, SIZE)), tensors, free, rest, scale)
    columns = [left_by(each, tensors, free, rest, scale) - nothing for each in units]
    best = np.linalg.lstsq(np.array(columns).T, -nothing, rcond=None)[0]
    expected = np.tensordot(best, units, 1)
    assert np.abs(step - expected).max() < 1e-6 * np.abs(expected).max()


def test_units_of_very_different_sizes_take_few_products(monkeypatch):
    """Without a preconditioner these take hundreds."""
    fit, wanted, free = problem(orthogonal=False, spread=30.0)
    rng = np.random.default_rng(7)
    tensors = {n: each + 0.1 * rng.standard_normal(each.shape) for n, each in wanted.items()}
    whole, *_ = one_step(fit, tensors, free, wanted)
    monkeypatch.setattr(refine, "MOST_PRODUCTS", 25)
    soon, *_ = one_step(fit, tensors, free, wanted)
    assert np.abs(soon - whole).max() < 1e-6 * np.abs(whole).max()


@pytest.mark.parametrize("seed", range(4))
def test_a_mixture_is_found_through_a_mark(seed):
    fit, wanted, free = problem(orthogonal=False, spread=3.0)
    rng = np.random.default_rng(seed)
    mixed = np.eye(SIZE) + 0.1 * rng.standard_normal((SIZE, SIZE))
    moved = np.einsum("od,odn->on", rng.standard_normal((SIZE, 2)), free["write"].basis)
    tensors = {
        "write": mixed @ (wanted["write"] + moved / 2),
        "read": wanted["read"] @ np.linalg.inv(mixed),
    }
    ((by, _),) = refine.refined(fit, tensors, wanted, free)
    assert np.linalg.norm(by @ mixed - np.eye(SIZE)) < 1e-9
