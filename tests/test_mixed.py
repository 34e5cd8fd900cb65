"""Bottlenecks that were mixed, where nothing says which norm is whose."""

import numpy as np
import pytest
from test_moves import anchor, marked, rng
from test_naming import arrays, matched, read, renamed

from nnpassport.alignment.mixed import column_scales, own_scales
from nnpassport.attacks.moves import move


def factors(draw, count):
    return np.exp(draw.uniform(-1.4, 1.4, count)) * draw.choice([-1.0, 1.0], count)


@pytest.mark.parametrize(("width", "hidden"), [(8, 48), (24, 144), (40, 240)])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_the_norm_in_front_of_a_mixed_bottleneck_is_told_by_what_reads_it(width, hidden, noise):
    for seed in range(20):
        draw = np.random.default_rng(seed)
        known = draw.standard_normal((hidden, width))
        norm = factors(draw, width)
        thief = known[draw.permutation(hidden)] / norm
        thief += noise * thief.std(0) * draw.standard_normal(thief.shape)
        thief *= factors(draw, hidden)[:, None]
        scale, fit = column_scales(thief, known)
        assert abs(scale @ norm) > 0.995 * np.linalg.norm(scale) * np.linalg.norm(norm)
        stranger = draw.permutation(thief.ravel()).reshape(thief.shape)
        assert fit > 0.98 > column_scales(stranger, known)[1] + 0.1


def test_a_second_layer_that_writes_a_bottleneck_has_a_norm_of_its_own():
    draw = np.random.default_rng(0)
    mixture, wanted, norm = (
        draw.standard_normal((6, 6)),
        draw.standard_normal((6, 30)),
        factors(draw, 6),
    )
    rows = (mixture @ wanted) / norm[:, None]
    assert np.allclose(own_scales(np.linalg.inv(mixture), rows, wanted), norm)


@pytest.mark.parametrize("kinds", [["mix"], ["negate", "scale", "mix", "reorder"]])
def test_mixed_bottlenecks_under_no_names_are_read(kinds):
    """EfficientNet, whose layers are all in front of batch norms: 24 of 664 bits were read once."""
    key, released = marked("EfficientNet")
    _, example = anchor("EfficientNet")
    thief = renamed(arrays(move(released, example, rng(1), kinds=kinds).model.state_dict()))
    found = read(thief, "EfficientNet")
    assert matched(found, key) > 0.85  # 643 bits
    assert found.marked
