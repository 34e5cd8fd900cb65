"""What a training step asks of a network: no second look through it, and nothing that waits."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import nnpassport
from nnpassport.catalog import scheme_named, with_settings
from nnpassport.data.images import Normalisation
from nnpassport.embedding.network import surgery
from nnpassport.embedding.network.inserted import Inserted, found_once
from nnpassport.embedding.network.layers import Branch, branched, passport_norms
from nnpassport.embedding.schemes.triggered import with_pictures

SMALL = {"uchida": {"bits": 32}, "deepsigns": {"groups": 2, "bits": 8}}
NORMALISE = Normalisation((0.5,), (0.5,))
EXAMPLE = torch.zeros(2, 1, 8, 8)
SCHEMES = ["passport-v1", "passport-v2", "passport-v3", "pan", "uchida", "adi", "deepsigns"]


def network(*, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(16 * 64, 4)),
    )


def marked(name, model):
    scheme = scheme_named(name)
    scheme = with_settings(scheme, **SMALL.get(name, {}))
    layers = None if name == "adi" else ["3"]
    key = scheme.draw_key(model, EXAMPLE, layers=layers, seed=bytes(32))
    if name == "deepsigns":
        key = with_pictures(key, torch.randint(256, (32, 1, 8, 8), dtype=torch.uint8))
    return nnpassport.mark(model, key, EXAMPLE, normalise=NORMALISE)


def batch(count=6):
    torch.manual_seed(1)
    return torch.randn(count, 1, 8, 8), torch.arange(count) % 4


@pytest.mark.parametrize("name", SCHEMES)
def test_a_step_looks_through_the_network_no_more(name, monkeypatch):
    owned, looked = marked(name, network()), []
    owned.loss(*batch()).backward()
    whole = owned.model
    plain = nn.Module.named_modules

    def noted(module, *args, **kwargs):
        looked.extend([module] * (module is whole))
        return plain(module, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "named_modules", noted)
    for _ in range(3):
        owned.loss(*batch()).backward()
    assert not looked
    dict(whole.named_modules())
    assert looked  # what is counted can be


@pytest.mark.parametrize("name", SCHEMES)
def test_a_step_waits_for_no_device_until_its_measures_are_read(name):
    """It runs on tensors without numbers, which can only be told what shape they have."""
    owned, shown = marked(name, network()), batch()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for _ in range(2):
            assert owned.loss(*shown).shape == ()
        with pytest.raises(DataDependentOutputException):
            owned.measures  # noqa: B018


def test_one_object_says_what_all_modules_of_a_network_run():
    owned = marked("passport-v2", network())
    inserted = Inserted(owned.model)
    parts = branched(owned.model)
    assert len({id(each.running) for each in parts}) == 1
    inserted.run(Branch.BOTH, 0.5)
    assert {each.running.branch for each in parts} == {Branch.BOTH}
    assert parts[0].running.private_share == 0.5
    copy = deepcopy(owned.model)
    surgery.present(copy)
    assert parts[0].running.branch is Branch.BOTH
    assert {each.running.branch for each in branched(copy)} == {Branch.PRIVATE}


def test_gammas_of_a_forward_are_those_of_the_layers_and_are_not_kept():
    owned = marked("passport-v2", network())
    inserted = Inserted(owned.model)
    (norm,) = inserted.norms.values()
    inserted.run(Branch.BOTH)
    with inserted.keeping():
        owned.model(batch()[0])
        kept = inserted.gammas()
        assert norm.gamma is norm.running.kept[norm]
    assert norm.running.kept is None
    assert torch.equal(kept, inserted.gammas())
    assert torch.equal(inserted.signs(), norm.signs)


def test_what_was_found_once_is_looked_for_again_in_another_network_only():
    first, second, find = network(), network(seed=1), found_once()
    owned = marked("passport-v2", first)
    marked("passport-v2", second)
    found = find(first)
    assert find(first) is found
    assert find(torch.compile(first, backend="eager")) is found
    assert find(second) is not found
    found = find(first)
    surgery.remove(first)
    assert not found.there
    assert not find(first).norms
    owned = marked("passport-v1", first)
    assert find(first).norms == passport_norms(owned.model)
