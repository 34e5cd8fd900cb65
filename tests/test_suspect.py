"""A suspect is opened once, whoever looks at it and however often."""

import shutil
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import nnpassport
from nnpassport.files.arrays import arrays_digest
from nnpassport.files.suspect import Suspect
from nnpassport.files.weights import read_suspect
from nnpassport.keys.keyfile import load_key
from nnpassport.scheme import UnreadableModelError
from nnpassport.verification.hearing import Bench, hear

GOLDEN = Path(__file__).parent / "golden"
NETWORK = GOLDEN / "network-v1"
WEIGHTS = "model.safetensors"
KEY = GOLDEN / "key-v1-network.key"

_watched: list[Counter] = []


def _note(event, arguments):
    if _watched and event == "open":
        _watched[-1][str(arguments[0])] += 1


@contextmanager
def openings():
    """How often each file is opened meanwhile, by the operating system's count."""
    if not hasattr(openings, "listens"):
        sys.addaudithook(_note)  # it cannot be taken off again
        openings.listens = True
    _watched.append(Counter())
    try:
        yield _watched[-1]
    finally:
        _watched.pop()


@pytest.fixture
def case(tmp_path):
    """A suspect, and claimants' folders."""
    shutil.copytree(NETWORK, tmp_path / "suspect")
    folders = [tmp_path / f"claimant{number}" for number in range(3)]
    for folder in folders:
        shutil.copytree(GOLDEN / "exhibit-v1", folder)
    return tmp_path / "suspect", folders


@pytest.mark.parametrize("claimants", [1, 3])
def test_a_hearing_opens_the_suspect_three_times_however_many_claim_it(case, claimants):
    """For its kind, for its header, and for all of its tensors."""
    suspect, folders = case
    with openings() as opened:
        heard = hear(suspect, folders[:claimants], Bench())
    assert all(each.readings["as it stands"].accepted for each in heard.claimants)
    assert opened[str(suspect / WEIGHTS)] == 3


def test_a_second_key_opens_it_for_its_own_layers_alone():
    suspect, key = Suspect(NETWORK), load_key(KEY)
    nnpassport.verify(suspect, key)
    with openings() as opened:
        assert nnpassport.verify(suspect, key).accepted
    assert opened[str(NETWORK / WEIGHTS)] == len(key.context.layers)


def test_what_is_in_memory_is_not_read_again():
    suspect, key = Suspect(NETWORK), load_key(KEY)
    assert suspect.arrays.arrays
    with openings() as opened:
        assert nnpassport.verify(suspect, key).accepted
    assert not opened[str(NETWORK / WEIGHTS)]


def test_nothing_is_read_before_it_is_asked_for(tmp_path):
    assert Suspect.of(str(tmp_path / "missing")).path == tmp_path / "missing"
    with pytest.raises(UnreadableModelError):
        Suspect(tmp_path / "missing").digests  # noqa: B018


@pytest.mark.parametrize("whole", [False, True])
def test_it_is_what_is_read_of_its_file(whole):
    suspect, read = Suspect(NETWORK), read_suspect(NETWORK)
    if whole:
        assert suspect.arrays.arrays
    assert suspect.digests == read.digests
    assert arrays_digest(dict(suspect.tensors)) == arrays_digest(read.arrays)
    shapes = {name: each.shape for name, each in read.arrays.items()}
    assert {name: each.shape for name, each in suspect.described.items()} == shapes


def test_a_hearing_changes_nothing_of_what_it_shares(case):
    suspect, folders = case
    there = Suspect(suspect)
    before = arrays_digest(there.arrays.arrays)
    hear(there, folders, Bench())
    assert arrays_digest(there.arrays.arrays) == before


def test_a_file_that_changes_between_two_keys_is_refused(tmp_path):
    shutil.copytree(NETWORK, tmp_path / "suspect")
    suspect, key = Suspect(tmp_path / "suspect"), load_key(KEY)
    nnpassport.verify(suspect, key)
    weights = load_file(NETWORK / WEIGHTS)
    save_file({n: np.zeros_like(each) for n, each in weights.items()}, suspect.path / WEIGHTS)
    with pytest.raises(UnreadableModelError, match="changed"):
        nnpassport.verify(suspect, key)
