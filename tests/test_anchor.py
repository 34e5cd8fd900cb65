"""The network before the mark: suspects are aligned to it, exactly, and it is nobody else's."""

import json
import shutil
import stat
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from constructed import reader, small_alexnet
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.torch import load_file, save_file

from nnpassport.alignment.rate import ANCHOR as TO_ANCHOR
from nnpassport.alignment.table import AXES_FILE, read_table
from nnpassport.attacks.obfuscation import combine, flip_signs, insert_dummies, permute
from nnpassport.claims.claim import claim_of, sign_claim
from nnpassport.claims.claimfile import write_signed
from nnpassport.claims.standing import standing_of
from nnpassport.data.images import ImageSet, Normalisation
from nnpassport.embedding import anchoring
from nnpassport.embedding.axes import axes_of_folder
from nnpassport.embedding.checkpoint import load_model, save_model
from nnpassport.embedding.owner import Sets, bind_key, draw_key, embed
from nnpassport.embedding.schemes.graft import graft_channels
from nnpassport.embedding.schemes.passport import V2, Passport
from nnpassport.embedding.train.loop import Journal, Recipe
from nnpassport.files.arrays import arrays_digest
from nnpassport.files.config import ModelConfig, read_config
from nnpassport.files.weights import read_arrays
from nnpassport.keys.keyfile import save_key
from nnpassport.scheme import (
    UnreadableClaimError,
    UnsuitableModelError,
    UnwritableOutputError,
)
from nnpassport.verification.anchor import (
    ALIKE,
    ANCHOR,
    distance,
    needs_anchor,
    read_anchor,
    require_secret,
)
from nnpassport.verification.hearing import Bench, disclose, hear, read_exhibit
from nnpassport.verification.verdicts import Alignment, Options, verify

SIGNING = Ed25519PrivateKey.from_private_bytes(bytes([9] * 32))


@pytest.fixture(scope="module", params=["batch", "group"])
def house(request, tmp_path_factory):
    """An owner's folder: marked network, anchor with its table, turned copy, stranger; the key."""
    folder = tmp_path_factory.mktemp("anchor")
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (128, 1, 32, 32), generator=rng).to(torch.uint8)
    data = ImageSet(pixels, torch.arange(128) % 10, tuple("0123456789"), "noise")
    normalise = Normalisation((0.5,), (0.5,))
    config = ModelConfig(
        architecture="alexnet",
        arguments={"classes": 10, "norm": request.param, "width": 0.25, "channels": 1},
        classes=tuple("0123456789"),
        input_size=(1, 32, 32),
        mean=(0.5,),
        std=(0.5,),
    )
    before, inputs = reader(small_alexnet(request.param), data, normalise), normalise(pixels)
    key = V2.draw_key(before, inputs[:2], seed=bytes([3] * 32), seen=inputs)
    model = deepcopy(before)
    V2.insert(model, key, inputs[:2])
    graft_channels(model, inputs)
    released = V2.released(model).eval()
    save_model(folder / "marked", released, config)
    save_model(folder / "marked" / ANCHOR, before, config)
    turned = combine(released, torch.Generator().manual_seed(4)).model
    save_model(folder / "turned", turned, config)
    save_model(folder / "strange", small_alexnet(request.param, seed=5), config)
    anchor = folder / "marked" / ANCHOR
    (anchor / AXES_FILE).write_bytes(axes_of_folder(anchor).to_bytes())
    save_key(key, folder / "alice.key")
    return folder, key


def claimed(house, **changes):
    folder, key = house
    table = read_table(folder / "marked" / ANCHOR / AXES_FILE)
    digest = arrays_digest(read_arrays(folder / "marked").arrays)
    given = {"reference": digest, "axes": table.digest, **changes}
    return claim_of(key, SIGNING.public_key(), **given)


def standing(house, **changes):
    signed = sign_claim(claimed(house, **changes), SIGNING)
    return standing_of(signed, SIGNING.public_key(), house[1])


# What is aligned to it reads exactly


@pytest.mark.parametrize("where", ["marked", f"marked/{ANCHOR}"])
def test_a_turned_copy_is_read_once_it_is_aligned_to_the_anchor(house, where):
    folder, key = house
    assert not verify(folder / "turned", key).marked
    found = verify(folder / "turned", key, options=Options(alignment=Alignment(folder / where)))
    assert found.accepted
    assert found.matches == found.bits
    assert found.alignment["to"] == TO_ANCHOR
    assert found.alignment["related"]
    assert found.alignment["null"]["matches"] == []  # none is taken, and none is needed
    assert "your word" not in found.reason
    strange = verify(folder / "strange", key, options=Options(alignment=Alignment(folder / where)))
    assert not strange.marked
    assert not strange.alignment["related"]


def test_channels_that_cancel_each_other_hide_it_at_no_width(house, tmp_path):
    """Put in again and again: five times as wide, and then everything moved."""
    folder, key = house
    wide = load_model(folder / "marked").model
    for share in (1.0, 1.0, 0.3):
        wide = insert_dummies(wide, torch.Generator().manual_seed(1), share=share).model
    thief = combine(wide, torch.Generator().manual_seed(2), attacks=(permute, flip_signs)).model
    save_file(thief.state_dict(), tmp_path / "wide.safetensors")
    options = Options(alignment=Alignment(folder / "marked"))
    found = verify(tmp_path / "wide.safetensors", key, options=options)
    assert found.accepted
    assert found.matches == found.bits
    under = Options(alignment=Alignment(folder / "marked"), standing=standing(house))
    read = verify(tmp_path / "wide.safetensors", key, options=under)  # over the table, no torch
    assert read.matches == read.bits


def test_the_table_of_its_axes_reads_it_without_running_a_network(house):
    folder, key = house
    under = Options(alignment=Alignment(folder / "marked"), standing=standing(house))
    found = verify(folder / "turned", key, options=under)
    assert found.matches >= 0.99 * found.bits  # a table knows no scales behind a ReLU
    assert found.alignment["to"] == TO_ANCHOR
    assert not found.marked  # a table may be fitted: it counts once the claim is older
    strange = verify(folder / "strange", key, options=under)
    assert abs(strange.matches - strange.bits / 2) < 4 * strange.bits**0.5 / 2
    assert not strange.alignment["related"]


def test_an_undated_claim_counts_where_nothing_but_the_anchor_was_chosen(house):
    """Its digest is in every bit; the table, which could be fitted, was left out."""
    folder, key = house
    under = Options(alignment=Alignment(folder / "marked"), standing=standing(house, axes=None))
    found = verify(folder / "turned", key, options=under)
    assert found.accepted
    assert found.log10_alpha < -30


def test_tensors_without_names_are_read_by_their_shapes(house, tmp_path):
    folder, key = house
    tensors = load_file(folder / "turned" / "model.safetensors")
    renamed = {f"x{number}": tensor for number, tensor in enumerate(tensors.values())}
    save_file(renamed, tmp_path / "renamed.safetensors")
    options = Options(alignment=Alignment(folder / "marked"))
    found = verify(tmp_path / "renamed.safetensors", key, options=options)
    assert found.accepted
    assert found.candidates["read"] == "by shape"
    assert found.candidates["log10_choices"] > 3
    assert found.matches >= 0.99 * found.bits


def test_bits_of_channels_are_read_off_tensors_under_any_names(house, tmp_path):
    folder, key = house
    tensors = load_file(folder / "marked" / "model.safetensors")
    renamed = {f"x{number}": tensor for number, tensor in enumerate(tensors.values())}
    save_file(renamed, tmp_path / "renamed.safetensors")
    found = verify(tmp_path / "renamed.safetensors", key)
    assert found.accepted
    assert found.matches == found.bits
    unpaid = -found.bits * np.log10(2)
    assert found.log10_p_value > unpaid + found.candidates["log10_choices"] - 0.1
    strangers = load_file(folder / "strange" / "model.safetensors")
    renamed = {f"x{number}": tensor for number, tensor in enumerate(strangers.values())}
    save_file(renamed, tmp_path / "strange.safetensors")
    with pytest.raises(UnsuitableModelError, match="none has the mark"):
        verify(tmp_path / "strange.safetensors", key)


# What may be one


def test_no_other_network_is_taken_for_it(house, tmp_path):
    folder, key = house
    with pytest.raises(UnsuitableModelError, match="not the key's anchor"):
        verify(folder / "turned", key, options=Options(alignment=Alignment(folder / "turned")))
    with pytest.raises(UnsuitableModelError, match="not the key's anchor"):
        read_anchor(folder / "strange", key)
    assert len(read_anchor(folder / "marked", key).arrays) > 5
    under = Options(alignment=Alignment(folder / "turned"), standing=standing(house))
    with pytest.raises(UnsuitableModelError, match="claim new --anchor"):
        verify(folder / "turned", key, options=under)


def test_a_network_that_others_have_is_refused_also_a_rounded_copy_of_it(house):
    folder, _ = house
    anchor = read_arrays(folder / "marked" / ANCHOR).arrays
    strange = read_arrays(folder / "strange").arrays
    marked = read_arrays(folder / "marked").arrays
    require_secret(anchor, {"a stranger's": strange, "the marked one": marked})
    rounded = {name: each.astype(np.float16) for name, each in anchor.items()}
    for theirs in (anchor, rounded, {**rounded, "more": np.ones((3, 3))}):
        with pytest.raises(UnsuitableModelError, match="subtracts it"):
            require_secret(anchor, {"strange": strange, "base": theirs})
    assert distance(anchor, marked) > 2 * ALIKE
    assert distance(anchor, {}) == 1


def test_a_claim_never_has_its_anchor_released(house):
    _, key = house
    assert claimed(house).as_dict()["anchor"] == key.context.anchor
    with pytest.raises(UnreadableClaimError, match="subtract the mark"):
        claimed(house, reference=key.context.anchor)


def test_a_chosen_anchor_draws_new_coins(house):
    """The suspect itself, what is left of it without the mark, or any that fits: all are tries."""
    folder, key = house
    weights = read_arrays(folder / "marked").arrays
    anchor = read_arrays(folder / "marked" / ANCHOR).arrays
    half = {name: (each + anchor[name]) / 2 for name, each in weights.items()}
    matches = []
    for network in (weights, half, *({"w": np.full((2, 2), n)} for n in range(60))):
        bound = replace(key, context=replace(key.context, anchor=arrays_digest(network)))
        matches.append(V2.verify({n: torch.from_numpy(a) for n, a in weights.items()}, bound))
    assert not any(found.marked for found in matches)
    shares = [found.matches / found.bits for found in matches]
    assert abs(np.mean(shares) - 0.5) < 4 * (0.25 / found_bits(matches)) ** 0.5


def found_bits(verdicts):
    return sum(each.bits for each in verdicts)


# Before a judge


def exhibit(house, tmp_path, **given):
    _, key = house
    write_signed(sign_claim(claimed(house), SIGNING), tmp_path / "claim.json")
    disclose(tmp_path / "claim.json", key, tmp_path / "alice", **given)
    return tmp_path / "alice"


def test_the_anchor_is_handed_to_the_judge_who_aligns_to_it(house, tmp_path):
    folder, _ = house
    handed = exhibit(house, tmp_path, reference=folder / "marked", anchor=folder / "marked")
    assert (handed / ANCHOR / AXES_FILE).exists()
    assert not (handed / "reference" / AXES_FILE).exists()
    assert not (handed / "reference" / ANCHOR).exists()
    found = hear(folder / "turned", [handed], Bench())
    (claimant,) = found.claimants
    aligned = claimant.readings["aligned"]
    assert aligned.matches >= 0.99 * aligned.bits
    assert aligned.alignment["to"] == TO_ANCHOR
    assert any(name.startswith(f"{ANCHOR}/") for name in aligned.digests)


def test_a_suspect_that_needs_no_alignment_is_read_whatever_is_given_to_align_to(house):
    folder, key = house
    options = Options(alignment=Alignment(folder / "strange"))
    found = verify(folder / "marked", key, options=options)
    assert found.accepted
    assert found.alignment is None
    assert "the network given to align to is not the key's anchor" in found.reason
    assert found.log10_p_value == verify(folder / "marked", key).log10_p_value
    with pytest.raises(UnsuitableModelError, match="not the key's anchor"):
        verify(folder / "strange", key, options=options)


def test_a_judge_says_where_the_anchor_is_missing_or_another(house, tmp_path):
    folder, key = house
    handed = exhibit(house, tmp_path, reference=folder / "marked")
    assert any(
        "before the mark is not there" in note for note in read_exhibit(handed, Bench()).notes
    )
    shutil.copytree(folder / "strange", handed / ANCHOR)
    other = read_exhibit(handed, Bench())
    assert other.anchor is None
    assert any("not the key's, so it is not used" in note for note in other.notes)
    found = hear(folder / "turned", [handed], Bench())
    assert list(found.claimants[0].readings) == ["as it stands"]
    with pytest.raises(UnsuitableModelError, match="not the key's anchor"):
        disclose(tmp_path / "claim.json", key, tmp_path / "b", anchor=folder / "strange")


# Embedding takes it, keeps it, and binds the key to it


@pytest.fixture(scope="module")
def digit_sets(digits):
    train, test, normalise = digits
    part = train.resized(32).subset(torch.arange(96))
    return Sets(part, test.resized(32).subset(torch.arange(32)), None, normalise)


SMALL = ModelConfig(
    architecture="alexnet",
    arguments={"classes": 10, "norm": "batch", "width": 0.125, "channels": 1},
    classes=tuple("0123456789"),
    input_size=(1, 32, 32),
    mean=(0.5,),
    std=(0.5,),
)
BRIEF = Recipe(epochs=2, batch=32, rate=0.01, augment=False)


@pytest.fixture(scope="module")
def from_scratch(digit_sets, tmp_path_factory):
    """A key that was drawn before there was a network, bound; and the folder."""
    folder = tmp_path_factory.mktemp("scratch") / "alice"
    drawn = draw_key(SMALL, "passport-v2")
    journal = Journal(folder / "training")
    bound = bind_key(folder, SMALL, drawn, digit_sets, BRIEF, journal=journal)
    embed(folder, SMALL, bound, digit_sets, BRIEF, journal=journal)
    return folder, drawn, bound


def test_a_training_from_scratch_leaves_its_anchor_beside_the_marked_network(from_scratch):
    folder, drawn, bound = from_scratch
    assert needs_anchor(drawn)
    assert (bound.seed, bound.context.nonce) == (drawn.seed, drawn.context.nonce)
    assert read_anchor(folder, bound).digests
    assert stat.S_IMODE((folder / ANCHOR).stat().st_mode) == 0o700
    assert {path.name for path in (folder / "training").iterdir()} == {
        "metrics.jsonl",
        "training.pt",
    }
    found = verify(folder, bound)
    assert found.matches == found.bits
    turned = combine(load_model(folder).model, torch.Generator().manual_seed(1)).model
    save_model(folder.parent / "turned", turned, SMALL)
    aligned = verify(folder.parent / "turned", bound, options=Options(alignment=Alignment(folder)))
    assert aligned.accepted
    assert abs(verify(folder, drawn).match_rate - 0.5) < 0.25


def test_a_run_that_is_resumed_finds_its_anchor_and_another_leaves_it_alone(
    from_scratch, digit_sets
):
    folder, drawn, bound = from_scratch
    resumed = Journal(folder / "training", resume=True)
    again = bind_key(folder, SMALL, drawn, digit_sets, BRIEF, journal=resumed)
    assert again.fingerprint == bound.fingerprint
    other = draw_key(SMALL, "passport-v2")
    with pytest.raises(UnwritableOutputError, match="a key may be bound to it"):
        bind_key(folder, SMALL, other, digit_sets, BRIEF)
    strange = replace(bound, context=replace(bound.context, anchor="0" * 64))
    with pytest.raises(UnwritableOutputError, match="is another key's"):
        embed(folder, SMALL, strange, digit_sets, BRIEF)


def test_from_an_anchor_that_was_taken_on_the_way_the_training_goes_on(
    from_scratch, digit_sets, tmp_path, monkeypatch
):
    """As in the first run: no harm is too much, and nobody is taught a beginner's answers."""
    folder, _, bound = from_scratch
    begun, used = load_model(folder / ANCHOR), []
    embedded = Passport.embed

    def noted(scheme, *given, **options):
        used.append(scheme)
        return embedded(scheme, *given, **options)

    monkeypatch.setattr(Passport, "embed", noted)
    given = {"initial": begun.model.state_dict()}
    embed(tmp_path, begun.config, bound, digit_sets, replace(BRIEF, epochs=1), **given)
    (scheme,) = used
    assert (scheme.teaching, scheme.harm) == (0.0, 1.0)
    assert verify(tmp_path, bound).accepted
    assert load_model(tmp_path / ANCHOR).config.notes == begun.config.notes
    assert not anchoring.is_trained_in_part(read_config(tmp_path))


@pytest.fixture(scope="module")
def plain(digit_sets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    save_model(folder, reader(build(width=0.125), digit_sets.train, digit_sets.normalise), SMALL)
    return folder


def build(width):
    return small_alexnet("batch", seed=3, width=width)


def test_a_trained_network_is_its_own_anchor(plain, digit_sets, tmp_path):
    weights, graft = load_model(plain).model.state_dict(), replace(BRIEF, epochs=0)
    drawn = draw_key(SMALL, "passport-v2")
    bound = bind_key(tmp_path, SMALL, drawn, digit_sets, graft, initial=weights)
    assert bound.context.anchor == arrays_digest(read_arrays(plain).arrays)
    lenient = replace(V2, harm=1.0)
    embed(tmp_path, SMALL, bound, digit_sets, graft, scheme=lenient, initial=weights)
    assert verify(tmp_path, bound).accepted
    assert read_anchor(tmp_path, bound).digests
    with pytest.raises(UnsuitableModelError, match="others have that"):
        bind_key(tmp_path / "b", SMALL, drawn, digit_sets, graft, initial=weights, public=[plain])
    with pytest.raises(UnsuitableModelError, match="others have that"):
        draw_key(SMALL, "passport-v2", trained=plain, seen=digit_sets.train, public=[plain])
    assert not (tmp_path / "b").exists()


def test_a_bound_key_goes_into_no_other_network(plain, digit_sets, from_scratch, tmp_path):
    _, _, bound = from_scratch
    weights = load_model(plain).model.state_dict()
    for initial in (None, weights):
        with pytest.raises(UnsuitableModelError, match="bound to the network before its mark"):
            embed(tmp_path / "b", SMALL, bound, digit_sets, BRIEF, initial=initial)
    assert not (tmp_path / "b").exists()


def test_a_key_is_claimed_once_it_is_bound(call, from_scratch, tmp_path):
    folder, drawn, bound = from_scratch
    save_key(drawn, tmp_path / "drawn.key")
    save_key(bound, tmp_path / "bound.key")
    call("claim", "keygen", "-o", tmp_path / "me.pem")
    words = ("claim", "new", "--signing", tmp_path / "me.pem", "-o", tmp_path / "claim.json")
    code, _, said = call(*words, "--key", tmp_path / "drawn.key")
    assert code == 2
    assert "embed first" in " ".join(said.split())
    given = ("--key", tmp_path / "bound.key", "--anchor", folder)
    code, out, _ = call(*words, *given, "--reference", folder, "--json")
    assert code == 0
    assert json.loads(out)["anchor"] == bound.context.anchor
    code, _, said = call(*words, *given, "--reference", folder / ANCHOR)
    assert code == 2
    assert "subtract the mark" in " ".join(said.split())
    code, _, said = call(*words, *given, "--public", folder / ANCHOR)
    assert code == 2
    for name, found in (("drawn", "none yet"), ("bound", bound.context.anchor)):
        _, out, _ = call("key", "show", tmp_path / f"{name}.key", "--json")
        assert json.loads(out)["anchor"] == found


def test_nothing_publishes_an_anchor(call, from_scratch, tmp_path):
    folder, _, bound = from_scratch
    save_key(bound, tmp_path / "bound.key")
    call("claim", "keygen", "-o", tmp_path / "me.pem")
    words = ("--key", tmp_path / "bound.key", "-o", tmp_path / "claim.json")
    assert call("claim", "new", "--signing", tmp_path / "me.pem", *words)[0] == 0
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("model.safetensors", "config.json"):
        shutil.copy(folder / ANCHOR / name, alone)
    for source in (alone, folder):
        claim = ("--claim", tmp_path / "claim.json", "-o", tmp_path / "hub")
        code, _, said = call("package", source, *claim)
        assert code == 2
        assert "secret" in said
    assert call("export", folder / ANCHOR, "--onnx", tmp_path / "a.onnx")[0] == 2
    assert not (tmp_path / "a.onnx").exists()
    code, _, said = call("release", folder / ANCHOR, *words[:2], "-o", tmp_path / "released")
    assert code == 2
