"""`embedding/schemes/engine.py`: what schemes do alike, on a scheme of two layers made for it."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nnpassport.catalog import CATALOG, with_settings
from nnpassport.data.images import Normalisation
from nnpassport.embedding.network.equations import sign_loss
from nnpassport.embedding.network.layers import Branch
from nnpassport.embedding.schemes.engine import Carriers, Mark
from nnpassport.embedding.schemes.protocol import Scheme
from nnpassport.embedding.schemes.uchida import mean_filter_of
from nnpassport.keys.counts import Counts, matching
from nnpassport.keys.reading import host_filters
from nnpassport.scheme import Batch, UnsuitableModelError

MARKS = sorted(name for name in CATALOG if Mark in type(CATALOG[name].scheme).__mro__)
LAYERS = ["0", "3"]
EXAMPLE = torch.zeros(2, 3, 8, 8)


@dataclass(frozen=True, slots=True)
class FirstFilters(Mark):
    """Bits of the first filter of each layer, through a projection."""

    name: str = "first-filters"
    bits: int = 8
    strength: float = 0.5

    def carriers(self, model, example, layers):
        shapes = [mean_filter_of(self.name, model, example, [n], self.bits) for n in layers]
        return Carriers(tuple(shapes))

    def signals(self, host, secret, /):
        return secret.rows @ host[0].flatten()

    def term(self, signals, signs):
        return self.strength * (signals - signs).square().sum()

    def read(self, weights, key):
        found = {}
        for layer in key.context.layers:
            first = host_filters(weights, layer)[0].reshape(-1)
            read = np.sign(key.projection_array(layer.name) @ first.astype(np.float64))
            found[layer.name] = (matching(read, key.signs_array(layer.name)), layer.length)
        return Counts("bits of first filters", found, listed=True)


class Bare(Mark):
    """A scheme that forgot what it draws keys for."""

    name = "bare"


@dataclass(frozen=True, slots=True)
class Silent(Mark):
    """A scheme that says what carries the bits and not how."""

    name: str = "silent"

    def carriers(self, model, example, layers):
        return Carriers((mean_filter_of(self.name, model, example, layers, 8),))


def network(*, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)),
    )


def drawn(scheme, model):
    return scheme.draw_key(model, EXAMPLE, layers=LAYERS, seed=bytes(32))


def batch():
    return Batch(torch.randn(6, 3, 8, 8), torch.arange(6) % 4)


def by_hand(scheme, model, key, images, labels):
    """The loss of a step, number by number."""
    loss = F.cross_entropy(model(images), labels)
    for name in LAYERS:
        first = model.get_submodule(name).weight[0].flatten()
        pairs = zip(key.layer_projection(name), key.layer_signs(name), strict=True)
        loss = loss + scheme.strength * sum((row @ first - sign) ** 2 for row, sign in pairs)
    return loss


def test_a_step_descends_the_tasks_loss_and_the_term_of_all_layers():
    scheme, model, shown = FirstFilters(), network(), batch()
    key = drawn(scheme, model)
    outcome = scheme.objective(key, steps=1)(model, shown)
    expected = by_hand(scheme, model, key, shown.images, shown.labels)
    torch.testing.assert_close(outcome.loss, expected)
    found = torch.autograd.grad(outcome.loss, [*model.parameters()])
    torch.testing.assert_close(found, torch.autograd.grad(expected, [*model.parameters()]))


def test_what_is_shown_of_a_step_is_what_v_counts():
    scheme, model = FirstFilters(), network()
    key = drawn(scheme, model)
    shown = scheme.objective(key, steps=1)(model, batch()).measures
    found = scheme.verify(model.state_dict(), key)
    assert set(shown) == {"sign_match", "accuracy"}
    assert float(shown["sign_match"]) == pytest.approx(found.match_rate)
    assert found.bits == 16
    assert {*found.layers} == {*LAYERS}
    task = scheme.objective(key, steps=1, task=lambda output, labels: output.square().mean())
    assert set(task(model, batch()).measures) == {"sign_match", "task_loss"}


def test_a_key_follows_from_its_seed_and_from_nothing_else_of_the_network():
    scheme = FirstFilters()
    assert drawn(scheme, network()).context == drawn(scheme, network(seed=1)).context
    fresh = [scheme.draw_key(network(), EXAMPLE, layers=["0"]) for _ in range(2)]
    assert fresh[0].seed != fresh[1].seed
    assert fresh[0].context.nonce != fresh[1].context.nonce


def test_a_dataclass_of_what_differs_is_a_scheme():
    scheme, model = FirstFilters(), network()
    assert isinstance(scheme, Scheme)
    copy = scheme.released(model)
    assert copy is not model
    assert all(
        torch.equal(a, b) for a, b in zip(copy.parameters(), model.parameters(), strict=True)
    )


def test_a_key_for_layers_of_another_shape_is_refused():
    scheme, model = FirstFilters(), network()
    wider = nn.Sequential(nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), *list(model)[2:])
    with pytest.raises(UnsuitableModelError, match=r"0\.weight has shape \(7, 3, 3, 3\)"):
        scheme.insert(wider, drawn(scheme, model), EXAMPLE)


def test_what_a_scheme_left_out_is_named():
    with pytest.raises(TypeError, match="carriers"):
        Bare()
    scheme, model = Silent(), network()
    key = scheme.draw_key(model, EXAMPLE, layers=["0"])
    with pytest.raises(TypeError, match="silent has no signals"):
        scheme.objective(key, steps=1)(model, batch())
    with pytest.raises(UnsuitableModelError, match="silent marks a network's activations"):
        scheme.verify(model.state_dict(), key)


@pytest.mark.parametrize("name", MARKS)
def test_the_key_of_another_scheme_is_refused(name):
    scheme, model = CATALOG[name].scheme, network()
    key = drawn(FirstFilters(), model)
    with pytest.raises(UnsuitableModelError, match="first-filters"):
        scheme.insert(model, key, EXAMPLE)
    with pytest.raises(UnsuitableModelError, match="first-filters"):
        scheme.verify(model.state_dict(), key)
    with pytest.raises(UnsuitableModelError, match="first-filters"):
        scheme.verify_answers(torch.zeros(8, dtype=torch.int64), key)


def test_a_text_goes_only_where_layers_can_have_it():
    model = network()
    key = FirstFilters(bits=24).draw_key(model, EXAMPLE, layers=["0"], text="Bob")
    assert key.text == "Bob"
    with pytest.raises(UnsuitableModelError, match="a text were given"):
        CATALOG["adi"].scheme.draw_key(model, EXAMPLE, text="Bob")


def test_a_step_is_equation_1():
    """Numbers by hand: two branches of V3, triggers of their own weight, and the bits."""
    scheme = with_settings(CATALOG["passport-v3"].scheme, trigger_weight=0.5, sign_weight=0.25)
    model = network()
    key = scheme.draw_key(model, EXAMPLE, layers=["3"], seed=bytes(32))
    inserted = scheme.insert(model, key, EXAMPLE)
    model.eval()  # one branch's statistics do not depend on the other's rows
    shown = batch()
    normalise = Normalisation((0.5,) * 3, (0.5,) * 3)
    loss = scheme.objective(key, steps=1, normalise=normalise)(model, shown).loss
    pictures, marks = key.trigger_set()
    expected = 0.25 * sign_loss(inserted.gammas(), inserted.signs(), margin=scheme.margin)
    for branch in (Branch.PUBLIC, Branch.PRIVATE):
        inserted.run(branch)
        expected = expected + F.cross_entropy(model(shown.images), shown.labels)
        triggers = model(normalise(pictures[: scheme.shown_at_once]))
        expected = expected + 0.5 * F.cross_entropy(triggers, marks[: scheme.shown_at_once])
    torch.testing.assert_close(loss, expected)
