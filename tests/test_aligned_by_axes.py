"""Suspects aligned over a table of axes that a claim commits to: arrays alone, and no torch."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from constructed import marked, small_alexnet
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.torch import load_file, save_file
from test_axes import EXPECTED, moved_off
from test_startup import WITHOUT_TORCH

from nnpassport.alignment.axes import Axes, Axis, Place
from nnpassport.alignment.byaxes import BLIND, reference_of, verify_by_axes
from nnpassport.alignment.table import (
    AXES_FILE,
    LONGEST,
    LONGEST_OF_KIND,
    check_table,
    read_table,
)
from nnpassport.attacks.obfuscation import combine
from nnpassport.claims.claim import check_claim, claim_of, sign_claim
from nnpassport.claims.claimfile import write_signed
from nnpassport.claims.signing import save_signing_key
from nnpassport.claims.standing import standing_of
from nnpassport.embedding.axes import axes_of_folder
from nnpassport.embedding.checkpoint import save_model
from nnpassport.embedding.network.trace import trace
from nnpassport.embedding.schemes.passport import V2
from nnpassport.files.arrays import arrays_digest
from nnpassport.files.config import ModelConfig
from nnpassport.files.weights import read_arrays
from nnpassport.keys.chance import LOG10_ALPHA_UNCOMMITTED
from nnpassport.keys.counts import Reading
from nnpassport.keys.keyfile import save_key
from nnpassport.keys.reading import READERS
from nnpassport.scheme import UnreadableClaimError, UnreadableModelError, UnsuitableModelError
from nnpassport.verification.hearing import disclose
from nnpassport.verification.verdicts import Alignment, Options, verify

SIGNING = Ed25519PrivateKey.from_private_bytes(bytes([7] * 32))
ARGUMENTS = {"classes": 10, "norm": "batch", "width": 0.25, "channels": 1}


@pytest.fixture(scope="module")
def house(tmp_path_factory, digits):
    """A marked network with its table, claim and key, a copy that was turned, and a stranger."""
    folder = tmp_path_factory.mktemp("axes")
    train, _, normalise = digits
    data = train.resized(32).subset(torch.arange(320))
    shape = {"classes": tuple("0123456789"), "input_size": (1, 32, 32)}
    numbers = {"mean": tuple(normalise.mean), "std": tuple(normalise.std)}
    config = ModelConfig(architecture="alexnet", arguments=ARGUMENTS, **shape, **numbers)
    bare = small_alexnet()
    key = V2.draw_key(bare, torch.zeros(2, 1, 32, 32), owner="Alice", seed=bytes([1] * 32))
    model = marked(V2, bare, key, data, normalise)
    save_model(folder / "net", model, config)
    save_model(folder / "turned", combine(model, torch.Generator().manual_seed(4)).model, config)
    save_model(folder / "strange", small_alexnet(seed=5), config)
    (folder / "net" / AXES_FILE).write_bytes(axes_of_folder(folder / "net").to_bytes())
    save_key(key, folder / "alice.key")
    save_signing_key(SIGNING, folder / "signing.pem", folder / "signing.pub.pem")
    write_signed(sign_claim(claimed(key, folder / "net"), SIGNING), folder / "alice.claim.json")
    disclose(folder / "alice.claim.json", key, folder / "alice", reference=folder / "net")
    return folder, key


def claimed(key, reference):
    table = read_table(reference / AXES_FILE)
    digest = arrays_digest(read_arrays(reference).arrays)
    return claim_of(key, SIGNING.public_key(), reference=digest, axes=table.digest)


def options(house, folder=None, **changes):
    """Aligned to the network in the folder, under the claim; as if it were older than all."""
    path, key = house
    signed = sign_claim(replace(claimed(key, path / "net"), **changes), SIGNING)
    standing = standing_of(signed, SIGNING.public_key(), key)
    return Options(alignment=Alignment(folder or path / "net"), standing=standing)


def read_with(key):
    return Reading.by(READERS[key.context.scheme], key, log10_alpha=LOG10_ALPHA_UNCOMMITTED)


# A copy and a stranger


def test_a_turned_copy_is_read_and_a_stranger_is_not(house):
    folder, key = house
    reference = reference_of(
        read_table(folder / "net" / AXES_FILE), read_arrays(folder / "net").arrays, key
    )
    read = read_with(key)
    turned = read_arrays(folder / "turned").arrays
    assert read(turned).matches < 0.7 * key.context.bits
    found = verify_by_axes(read, turned, reference)
    assert found.matches >= 0.99 * found.bits
    assert found.alignment["related"]
    strange = verify_by_axes(read, read_arrays(folder / "strange").arrays, reference)
    assert read.log10_p(strange) > -3
    assert not strange.alignment["related"]


def test_the_owners_own_network_reads_as_it_stands(house):
    folder, key = house
    arrays = read_arrays(folder / "net").arrays
    reference = reference_of(read_table(folder / "net" / AXES_FILE), arrays, key)
    placed = reference.place(arrays)
    assert read_with(key)(placed.arrays).matches == read_with(key)(arrays).matches
    assert placed.missing == 0


# Under a claim


def test_only_the_table_that_the_claim_commits_to_is_used(house, tmp_path):
    folder, key = house
    found = verify(folder / "turned", key, options=options(house))
    assert found.matches >= 0.99 * found.bits
    assert not found.marked  # no date proves that the reference is older
    other = tmp_path / "net"
    other.mkdir()
    for path in (folder / "net").iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    table = read_table(other / AXES_FILE)
    (other / AXES_FILE).write_bytes(replace(table, axes=table.axes[:-1]).to_bytes())
    with pytest.raises(UnsuitableModelError, match="not the table of axes that the claim"):
        verify(folder / "turned", key, options=options(house, other))
    (other / AXES_FILE).unlink()
    with pytest.raises(UnreadableModelError):
        verify(folder / "turned", key, options=options(house, other))


def test_a_claim_says_axes_only_of_a_network_and_as_a_digest(house):
    claim = claimed(house[1], house[0] / "net")
    assert check_claim(sign_claim(claim, SIGNING), SIGNING.public_key()).claim == claim
    assert b"axes" not in replace(claim, axes=None).encode()
    for change in ({"axes": "12"}, {"reference": None}):
        with pytest.raises(UnreadableClaimError):
            replace(claim, **change)


def in_a_process(program, words, cwd):
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
    )


RUN = "from nnpassport.cli.app import main\nmain()"


@pytest.mark.slow
def test_verify_with_alignment_says_the_same_where_torch_is_not_installed(house):
    words = ["verify", "turned", "--key", "alice.key", "--align", "net"]
    words += ["--claim", "alice.claim.json", "--json"]
    answers = []
    for program in (WITHOUT_TORCH + RUN, RUN):
        done = in_a_process(program, words, house[0])
        assert done.returncode == 1, done.stderr  # there is no date
        facts = json.loads(done.stdout)
        assert facts["matches"] >= 0.99 * facts["bits"]
        answers.append({n: facts[n] for n in ("matches", "log10_p_value", "reason", "digests")})
    assert answers[0] == answers[1]


@pytest.mark.slow
def test_judge_reads_and_aligns_where_torch_is_not_installed(house):
    folder, key = house
    for suspect, code in (("net", 0), ("turned", 1), ("strange", 1)):
        words = ["judge", f"{suspect}/model.safetensors", "alice", "--json"]
        done = in_a_process(WITHOUT_TORCH + RUN, words, folder)
        assert done.returncode == code, done.stderr
        (claimant,) = json.loads(done.stdout)["claimants"]
        assert set(claimant["readings"]) == {"as it stands", "aligned"}
        bits = key.context.bits
        matches = claimant["readings"]["aligned"]["matches"]
        assert (matches >= 0.99 * bits) == (suspect != "strange")


def test_without_a_committed_table_layers_that_are_known_are_aligned_without_torch(house):
    words = ["verify", "turned", "--key", "alice.key", "--align", "net", "--json"]
    done = in_a_process(WITHOUT_TORCH + RUN, words, house[0])
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["matches"] == facts["bits"]


# Hostile tables


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_traced_table_is_of_its_network(name):
    model, example = moved_off(name)
    table = trace(model, example)
    check_table(table, {n: tuple(t.shape) for n, t in model.state_dict().items()})
    assert Axes.from_bytes(table.to_bytes()) == table


SHAPES = {"a.weight": (8, 4), "b.weight": (3, 8), "n": (8,)}
AXIS = Axis(8, "permute", (), (Place("a.weight", 0), Place("b.weight", 1)))
TABLE = Axes((AXIS,), {"b.weight": (1, None)}, {}, {}, {})


def with_axes(*axes):
    return replace(TABLE, axes=axes)


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        (with_axes(replace(AXIS, size=9)), "longer than"),
        (with_axes(replace(AXIS, size=LONGEST + 1)), "at most"),
        (with_axes(*[replace(AXIS, kind="invertible", size=512)] * 65), "operations to solve"),
        *(
            (with_axes(replace(AXIS, kind=kind, size=LONGEST_OF_KIND[kind] + 1)), "needed")
            for kind in LONGEST_OF_KIND
        ),
        (with_axes(replace(AXIS, places=())), "nowhere"),
        (with_axes(replace(AXIS, places=(Place("c", 0),))), "no such dimension"),
        (with_axes(replace(AXIS, places=(Place("a.weight", 2),))), "no such dimension"),
        (with_axes(replace(AXIS, places=(Place("a.weight", 0, 1),))), "leaves it"),
        (with_axes(Axis(2, "permute", (), (Place("n", 0, 0, 0),))), "twice"),
        (with_axes(Axis(2, "permute", (), (Place("n", 0, 0, 1, ((2**30, 1),)),))), "longer than"),
        (with_axes(Axis(2, "permute", (), (Place("n", 0), Place("n", 0)))), "twice"),
        (with_axes(AXIS, replace(AXIS, kind="orthogonal")), "without being a grid"),
        (with_axes(AXIS, Axis(5, "permute", (), (Place("a.weight", 0, 2),))), "being a grid"),
        (with_axes(*[AXIS] * 5), "and its axes 40"),
        (replace(TABLE, reads={"c": (0, None)}), "has nothing"),
        (replace(TABLE, reads={"b.weight": (1, "c")}), "has nothing"),
        (replace(TABLE, gains={"a.weight": "b.weight"}), "no vector"),
    ],
)
def test_a_table_that_does_not_fit_its_network_is_refused(table, reason):
    check_table(TABLE, SHAPES)
    with pytest.raises(UnreadableModelError, match=reason):
        check_table(table, SHAPES)


def test_a_million_axes_are_refused_before_they_are_made():
    document = json.loads(TABLE.to_bytes())
    document["axes"] *= 1_000_000
    content = json.dumps(document, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    with pytest.raises(UnreadableModelError, match="at most"):
        Axes.from_bytes(content)


def test_one_table_has_one_form():
    content = TABLE.to_bytes()
    assert Axes.from_bytes(content) == TABLE
    for other in (content + b"\n", content.replace(b",", b", ", 1)):
        with pytest.raises(UnreadableModelError, match="other bytes"):
            Axes.from_bytes(other)


@pytest.mark.parametrize("kind", ["permute", "orthogonal", "invertible"])
def test_freedom_that_the_network_does_not_have_makes_no_stranger_match(house, kind):
    """A forger calls each side of each matrix an axis of its own: alignment then fits anything."""
    folder, key = house
    arrays = read_arrays(folder / "net").arrays
    genuine = read_table(folder / "net" / AXES_FILE)
    free = [
        Axis(array.shape[side], kind, (), (Place(name, side),))
        for name, array in sorted(arrays.items())
        for side in (0, 1)
        if array.ndim > 1 and 1 < array.shape[side] <= 100
    ]
    assert len(free) >= 8
    if kind != "permute":
        with pytest.raises(UnsuitableModelError, match=f"{kind} axes.*the key has no anchor"):
            reference_of(replace(genuine, axes=tuple(free)), arrays, key)
        return
    reference = reference_of(replace(genuine, axes=tuple(free)), arrays, key)
    strange = read_arrays(folder / "strange").arrays
    log10_p, said = 0.0, "fits noise"
    try:
        read = read_with(key)
        log10_p = read.log10_p(verify_by_axes(read, strange, reference))
    except UnsuitableModelError as error:
        said = str(error)
    assert log10_p > -3
    assert "fits noise" in said


def test_without_an_anchor_networks_whose_null_is_not_known_are_refused():
    """MobileNetV2: bottlenecks that mix, and convolutions channel by channel."""
    model, example = moved_off("MobileNetV2")
    key = V2.draw_key(
        model, example, seed=bytes(32), layers=["mobilenet_v2.layer.14.*"], passports="derived"
    )
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    with pytest.raises(UnsuitableModelError, match="invertible axes and grouped ones"):
        reference_of(trace(model, example), arrays, key)


def test_an_alignment_that_makes_strangers_match_is_refused(house):
    """As a reading would be whose preference nothing had taken out: it is refused, not believed."""
    folder, key = house
    arrays = read_arrays(folder / "net").arrays
    reference = reference_of(read_table(folder / "net" / AXES_FILE), arrays, key)
    read = read_with(key)

    def biased(there):
        found = read(there)
        matches = max(found.matches, int((BLIND + 0.05) * found.bits))
        return found._replace(layers={"all": (matches, found.bits)})

    with pytest.raises(UnsuitableModelError, match="fits noise"):
        verify_by_axes(
            replace(read, read=biased), read_arrays(folder / "strange").arrays, reference
        )


@pytest.mark.parametrize("change", ["longer", "shorter", "zero", "huge", "vector"])
def test_hostile_suspects_end_in_an_error_of_ours_or_a_verdict(house, tmp_path, change):
    folder, key = house
    state = load_file(folder / "turned" / "model.safetensors")
    for name, tensor in list(state.items()):
        if not tensor.is_floating_point():
            continue
        if change == "longer" and tensor.dim() > 1:
            state[name] = torch.cat([tensor] * 5)
        elif change == "shorter":
            state[name] = tensor[: max(1, len(tensor) // 2)].clone()
        elif change == "zero":
            state[name] = tensor * 0
        elif change == "huge":
            state[name] = tensor.double().sign() * 1e300
        elif change == "vector" and tensor.dim() == 1:
            state[name] = torch.ones(3, 2)
    save_file(state, tmp_path / "suspect.safetensors")
    with np.errstate(all="ignore"):
        try:
            found = verify(tmp_path / "suspect.safetensors", key, options=options(house))
        except (UnsuitableModelError, UnreadableModelError):
            return
    assert not found.marked
