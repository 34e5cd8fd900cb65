"""`compare` on networks that nobody here wrote: by their shapes alone, names aside."""

import numpy as np
import pytest
import torch
from zoo import ZOO

from nnpassport.verification.compare import compare
from nnpassport.verification.lineage import Network, Outcome

pytestmark = pytest.mark.slow

UNTRAINED = sorted(name for name, each in ZOO.items() if not each.trained)


def built(name, seed):
    torch.manual_seed(seed)
    state = ZOO[name].build().state_dict()
    return {each: tensor.numpy().copy() for each, tensor in state.items()}


def shaken(tensors):
    """With noise of a fifth of each tensor's size, under names that say nothing."""
    rng = np.random.default_rng(0)
    found = {}
    for number, each in enumerate(tensors.values()):
        noise = 0.2 * each.std() * rng.standard_normal(each.shape)
        floating = each.dtype.kind == "f"
        found[f"t{number}"] = (each + noise).astype(each.dtype) if floating else each
    return found


@pytest.mark.parametrize("name", UNTRAINED)
def test_an_independent_network_shows_no_sign_and_a_noisy_copy_does(name):
    owner = Network("owner", built(name, 0), {"owner": "1"})
    other = compare(Network("other", built(name, 1), {"other": "2"}), owner)
    assert other.outcome is Outcome.NONE, other.reasons
    copy = compare(Network("copy", shaken(owner.tensors), {"copy": "3"}), owner)
    assert copy.outcome is Outcome.RELATED, copy.reasons
    assert copy.order.log10_p < -12
    assert next(iter(copy.kinds())) == "noise"
