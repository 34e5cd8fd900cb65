"""Diaries of training: the chain, its dates, what is kept, run again, and before the judge."""

import json
import shutil
import threading
from copy import deepcopy
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
import torch
from authority import Signer, Website, certificate, new_key, pem
from constructed import marked, reader, small_alexnet, solve_head, write_over
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import nnpassport
from nnpassport.claims import claim as claims
from nnpassport.claims import diary as diaries
from nnpassport.claims.claim import claim_of, sign_claim
from nnpassport.claims.claimfile import write_signed
from nnpassport.claims.diary import add, begin, check, check_chain, kept_in
from nnpassport.claims.entries import PAYLOAD_TYPE, Entry, Facts, chained, opened, written
from nnpassport.claims.rules import AS_IT_STANDS, Claimant
from nnpassport.claims.signing import document_of, public_hex, save_signing_key, sign
from nnpassport.claims.standing import Standing
from nnpassport.claims.timestamp import Timestamp
from nnpassport.data.images import Normalisation, read_images
from nnpassport.embedding import owner
from nnpassport.embedding.axes import axes_of
from nnpassport.embedding.checkpoint import load_training, save_model, save_training
from nnpassport.embedding.network.layers import Branch
from nnpassport.embedding.network.tensors import read_weights, tensors_digest
from nnpassport.embedding.replaying import (
    Replayed,
    Stretch,
    _ReachedError,
    _rounded,
    _Watch,
    documented,
    replay,
    stretches,
)
from nnpassport.embedding.train.keeping import (
    Authority,
    Diary,
    Pace,
    lightning_callback,
    trainer_callback,
)
from nnpassport.embedding.train.loop import Journal, Recipe
from nnpassport.files.config import ModelConfig
from nnpassport.files.disk import sha256_of
from nnpassport.keys.context import Context, LayerShape, canonical_json
from nnpassport.keys.geometry import Geometry
from nnpassport.keys.key import Key
from nnpassport.scheme import (
    BadSignatureError,
    NoTimestampError,
    UnreadableClaimError,
    Verdict,
)
from nnpassport.verification.continuity import Continuity, continuity
from nnpassport.verification.hearing import Bench, Exhibit, _with_diary, disclose, hear
from nnpassport.verification.trained import _by_axes, trained_by

SIGNING = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OWNER = SIGNING.public_key()
STRANGER = Ed25519PrivateKey.from_private_bytes(bytes(32))
DAY = datetime(2026, 1, 1, tzinfo=UTC)
REFUSALS = (BadSignatureError, UnreadableClaimError)


def chain(count, signing=SIGNING):
    """Lines of a diary, each after the one before."""
    lines = [written(Facts(0, note="begun"), signing, None, date=DAY)]
    for number in range(1, count):
        before = opened(lines[-1], signing.public_key())
        facts = Facts(10 * number, checkpoint=f"{number:064x}", metrics={"loss": 1 / number})
        lines.append(written(facts, signing, before, date=DAY + timedelta(hours=number)))
    return lines


LINES = chain(6)


# The chain


def test_a_chain_opens_to_what_was_entered():
    entries = [line.entry for line in chained(LINES, OWNER)]
    assert [each.number for each in entries] == list(range(6))
    assert entries[3].facts == Facts(30, checkpoint=f"{3:064x}", metrics={"loss": 1 / 3})
    assert entries[3].date == "2026-01-01T03:00:00Z"
    assert entries[0].owner_key == public_hex(OWNER)


@given(st.data())
def test_any_other_bytes_of_a_diary_are_refused(data):
    text = b"\n".join(LINES)
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 20)))
    other = data.draw(st.binary(max_size=20).filter(lambda new: new != text[start:end]))
    changed = text[:start] + other + text[end:]
    if changed == text or text.startswith(changed + b"\n"):  # a shorter diary is a diary
        return
    with pytest.raises(REFUSALS):
        list(chained(changed.split(b"\n"), OWNER))


@pytest.mark.parametrize(
    "lines",
    [
        [*LINES[:2], *LINES[3:]],
        [LINES[0], LINES[2], LINES[1], *LINES[3:]],
        LINES[1:],
        [*LINES, LINES[5]],
        [*LINES[:3], *chain(6, STRANGER)[3:]],
        [LINES[0], *LINES],
    ],
    ids=["taken out", "exchanged", "without a beginning", "twice", "another's", "begun twice"],
)
def test_a_chain_with_another_entry_is_refused(lines):
    with pytest.raises(BadSignatureError):
        list(chained(lines, OWNER))


def test_an_entry_that_its_owner_signed_again_breaks_what_follows():
    """To change one he has to write all that follows again, and no token is over that."""
    before = opened(LINES[1], OWNER)
    other = written(Facts(20, checkpoint="ab" * 32), SIGNING, before, date=DAY)
    with pytest.raises(BadSignatureError, match="line 4 does not name"):
        list(chained([*LINES[:2], other, *LINES[3:]], OWNER))


@pytest.mark.parametrize(
    "facts",
    [
        Facts(-1),
        Facts(2**53),
        Facts(0, checkpoint="ab"),
        Facts(0, configuration="AB" * 32),
        Facts(0, metrics={"loss": float("nan")}),
        Facts(0, metrics={str(n): 0.0 for n in range(40)}),
        Facts(0, metrics={"\x1b": 0.0}),
        Facts(0, note="x" * 300),
        Facts(0, note="\n"),
    ],
)
def test_what_cannot_be_written_is_said(facts):
    with pytest.raises(UnreadableClaimError, match="needs"):
        written(facts, SIGNING, None)


@pytest.mark.parametrize(
    "change",
    [
        {"more": 1},
        {"number": True},
        {"step": "1"},
        {"metrics": {"loss": "0.50"}},
        {"metrics": []},
        {"date": "2026-01-01"},
        {"before": "0" * 64},
        {"owner_key": public_hex(STRANGER.public_key())},
    ],
)
def test_what_its_owner_signed_has_one_form(change):
    payload = json.loads(Entry(0, None, public_hex(OWNER), "2026-01-01T00:00:00Z").encode())
    signed = sign(canonical_json({**payload, **change}), PAYLOAD_TYPE, SIGNING)
    with pytest.raises(REFUSALS):
        opened(canonical_json(document_of(signed)), OWNER)


def test_a_claim_s_envelope_is_no_entry():
    signed = sign(b"{}", "application/vnd.nnpassport.claim.v1+json", SIGNING)
    with pytest.raises(BadSignatureError, match="claim"):
        opened(canonical_json(document_of(signed)), OWNER)


def test_a_year_of_entries_takes_a_few_megabytes():
    """One every two hours, and a token of the golden claim's size each day."""
    metrics = {"loss": 1 / 3, "accuracy": 2 / 3}
    digests = dict.fromkeys(("checkpoint", "state", "configuration", "data"), "ab" * 32)
    facts = Facts(10**6, **digests, metrics=metrics)
    line = written(facts, SIGNING, opened(LINES[5], OWNER))
    token = canonical_json({"entry": 10_000, "response": "A" * 4 * 1_100})
    year = 365 * 12 * (len(line) + 1) + 365 * (len(token) + 1)
    assert year < 8 * 10**6


# The folder


def test_a_diary_is_gone_on_with_after_a_run_was_killed_in_the_middle_of_a_line(tmp_path):
    begin(tmp_path, SIGNING, "one")
    add(tmp_path, SIGNING, Facts(1))
    with (tmp_path / diaries.DIARY_FILE).open("ab") as file:
        file.write(LINES[1][:100])
    assert add(tmp_path, SIGNING, Facts(2)).entry.number == 2
    assert [each.facts.step for each in check(tmp_path, OWNER).entries] == [0, 1, 2]


def test_a_diary_is_neither_overwritten_nor_gone_on_with_by_another_key(tmp_path):
    begin(tmp_path, SIGNING)
    with pytest.raises(nnpassport.OwnershipError, match="lost for good"):
        begin(tmp_path, SIGNING)
    before = (tmp_path / diaries.DIARY_FILE).read_bytes()
    with pytest.raises(BadSignatureError):
        add(tmp_path, STRANGER, Facts(1))
    assert (tmp_path / diaries.DIARY_FILE).read_bytes() == before
    assert not check_chain(tmp_path, STRANGER.public_key()).holds


def test_limits_of_a_diary(tmp_path, monkeypatch):
    begin(tmp_path, SIGNING)
    with pytest.raises(UnreadableClaimError, match="bytes"):
        opened(b"x" * 2**15, OWNER)
    monkeypatch.setattr("nnpassport.claims.entries.MOST_ENTRIES", 3)
    with pytest.raises(UnreadableClaimError, match="at most 3"):
        list(chained(LINES, OWNER))
    (tmp_path / diaries.STAMPS_FILE).write_bytes(b"{}\n" * 9_000)
    with pytest.raises(UnreadableClaimError, match="at most 8192"):
        check(tmp_path, OWNER)
    monkeypatch.setattr(diaries, "MAX_DIARY_BYTES", 100)
    with pytest.raises(UnreadableClaimError, match="more than 100 bytes"):
        check_chain(tmp_path, OWNER)


# Dates


@pytest.fixture
def dated(monkeypatch):
    """Tokens that say a day of January: who checks one is told what stands in it."""

    def checked(response, line, roots):
        day, _, over = response.partition(b" ")
        if over != line[:40] or not roots:
            raise BadSignatureError("it is over something else")
        return Timestamp(DAY + timedelta(days=int(day)), "CN=A", "1.2", "1")

    monkeypatch.setattr(diaries, "check_timestamp", checked)

    def stamp(folder, number, day):
        line = (folder / diaries.DIARY_FILE).read_bytes().split(b"\n")[number]
        token = {"entry": number, "response": diaries.base64_text(b"%d " % day + line[:40])}
        with (folder / diaries.STAMPS_FILE).open("ab") as file:
            file.write(canonical_json(token) + b"\n")

    return stamp


def diary_of(folder, count=6):
    (folder / diaries.DIARY_FILE).write_bytes(b"".join(line + b"\n" for line in chain(count)))
    return folder


ROOTS = ["a root"]


def test_a_token_dates_its_entry_and_all_before_it(tmp_path, dated):
    folder = diary_of(tmp_path)
    dated(folder, 4, 20)
    dated(folder, 2, 10)
    found = check(folder, OWNER, roots=ROOTS)
    assert [found.dated(n) and found.dated(n).time.day for n in range(6)] == [
        *(11, 11, 11, 21, 21),
        None,
    ]
    assert "entry 2 and all before it were there by 2026-01-11" in found.reason
    assert "nothing dates what is after entry 4" in found.reason
    assert found.spread.days in {9, 10}


def test_a_chain_that_was_made_afterwards_has_no_dates_and_says_so(tmp_path, dated):
    folder = diary_of(tmp_path)
    assert "made in one go, afterwards" in check(folder, OWNER).reason
    dated(folder, 5, 300)
    late = check(folder, OWNER, roots=ROOTS)
    assert late.dated(0).time == DAY + timedelta(days=300)
    assert "of one moment, so nothing shows that it was not made in one go" in late.reason


def test_a_token_of_another_diary_dates_nothing(tmp_path, dated):
    folder = diary_of(tmp_path)
    token = {"entry": 3, "response": diaries.base64_text(b"1 of another diary")}
    gone = {"entry": 99, "response": diaries.base64_text(b"1 x")}
    path = folder / diaries.STAMPS_FILE
    path.write_bytes(canonical_json(token) + b"\n" + canonical_json(gone) + b"\n")
    found = check(folder, OWNER, roots=ROOTS)
    assert found.holds
    assert found.stamps == ()
    assert len(found.undated) == 2


def test_tokens_without_a_root_are_not_passed_over(tmp_path, dated):
    folder = diary_of(tmp_path)
    dated(folder, 3, 1)
    with pytest.raises(NoTimestampError, match="root"):
        check(folder, OWNER)
    assert check_chain(folder, OWNER).holds


# Training


@pytest.fixture(scope="module")
def task():
    """A config and digits of 8 pixels."""
    data = read_images("digits", split="train", size=16, channels=1).subset(torch.arange(80))
    normalise = Normalisation.measured(data)
    sets = owner.Sets(
        data.subset(torch.arange(64)), data.subset(torch.arange(64, 80)), None, normalise
    )
    arguments = {"classes": 10, "channels": 1, "norm": "batch", "width": 0.125}
    classes, size = data.classes, (1, 16, 16)
    config = ModelConfig("resnet18", arguments, classes, size, normalise.mean, normalise.std)
    return config, sets


RECIPE = Recipe(epochs=3, batch=16, rate=0.02, schedule="one-cycle")


@pytest.fixture(scope="module")
def trained(task, tmp_path_factory):
    """A diary of twelve steps, with every fourth kept, and the network that came of them."""
    config, sets = task
    folder = tmp_path_factory.mktemp("trained")
    begin(folder / "diary", SIGNING, "digits")
    diary = Diary(folder / "diary", SIGNING, Pace(steps=4, keep=1))
    nnpassport.train(folder / "net", config, sets, RECIPE, journal=Journal(diary=diary))
    return folder


@pytest.fixture
def copied(trained, tmp_path):
    shutil.copytree(trained / "diary", tmp_path / "diary")
    return tmp_path / "diary"


def again(task, folder, stretch):
    config, sets = task
    recipe = Recipe(**documented(folder, stretch.start)["recipe"])
    return replay(
        folder, stretch, lambda journal: owner.train("x", config, sets, recipe, journal=journal)
    )


def test_training_enters_where_it_begins_what_is_due_and_what_it_ends_with(trained):
    found = check(trained / "diary", OWNER)
    assert [each.facts.step for each in found.entries] == [0, 0, 4, 8, 12, 12]
    ended, written_ = found.entries[-2:]
    assert ended.facts.checkpoint == written_.facts.checkpoint
    assert ended.facts.metrics.keys() == {"loss", "accuracy"}
    assert ended.facts.data == found.entries[1].facts.data is not None
    assert (kept_in(trained / "diary", 5) / "model.safetensors").read_bytes() == (
        trained / "net" / "model.safetensors"
    ).read_bytes()
    assert (trained / "diary" / "kept").stat().st_mode & 0o077 == 0


def test_a_diary_changes_nothing_of_a_training(trained, task, tmp_path):
    config, sets = task
    nnpassport.train(tmp_path, config, sets, RECIPE)
    one, other = ((f / "model.safetensors").read_bytes() for f in (tmp_path, trained / "net"))
    assert one == other


def test_every_stretch_runs_again_to_the_very_same_numbers(trained, task):
    folder = trained / "diary"
    there = stretches(folder, check(folder, OWNER).entries)
    assert [(s.start.facts.step, s.end.facts.step) for s in there] == [(0, 4), (4, 8), (8, 12)]
    for stretch in there:
        found = again(task, folder, stretch)
        assert found.holds
        assert found.equal, found.reason


def test_another_network_at_the_end_of_a_stretch_is_not_where_it_ends(trained, copied, task):
    """The owner's own next checkpoint, a little off: what rounding on another machine is not."""
    stretch = stretches(copied, check(copied, OWNER).entries)[1]
    moved = forged_end(copied, stretch, lambda weights: shifted(weights, 1.0))
    found = again(task, copied, moved)
    assert found.holds is False
    assert found.weights > 0.6
    shutil.copytree(trained / "diary", copied, dirs_exist_ok=True)
    near = forged_end(copied, stretch, lambda weights: shifted(weights, 1e-4))
    found = again(task, copied, near)
    assert found.holds
    assert not found.equal


def shifted(weights, share):
    """The weights, each tensor moved at random by so much of the steps of a stretch."""
    rng = torch.Generator().manual_seed(0)
    moved = {}
    for name, value in weights.items():
        noise = torch.randn(value.shape, generator=rng) if value.is_floating_point() else 0
        moved[name] = value + share * 0.02 * noise if value.is_floating_point() else value
    return moved


def forged_end(folder, stretch, change, optimizer=None):
    """The stretch with another end, whose entry names what is there now."""
    path = kept_in(folder, stretch.end.number)
    state = load_training(path / "training.pt")
    state["model"] = change(state["model"])
    state["optimizer"] = optimizer or state["optimizer"]
    save_training(path / "training.pt", state)
    whole = {name: value.contiguous() for name, value in state["model"].items()}
    save_file(whole, path / "model.safetensors", {"format": "pt"})
    facts = stretch.end.facts._replace(
        checkpoint=tensors_digest(state["model"]), state=sha256_of(path / "training.pt")
    )
    return Stretch(stretch.start, replace(stretch.end, facts=facts))


def test_a_run_that_rounds_otherwise_is_the_same_training(copied, task):
    """As on another processor: from weights that were moved by rounding, to another end."""
    stretch = stretches(copied, check(copied, OWNER).entries)[2]
    path = kept_in(copied, stretch.start.number) / "training.pt"
    original = path.read_bytes()
    save_training(path, _rounded(load_training(path), 7))
    config, sets = task
    ended = _Watch(stretch.start.facts.step, stretch.end.facts.step)
    journal = Journal(path.parent, resume=True, diary=ended)
    with pytest.raises(_ReachedError):
        nnpassport.train("x", config, sets, RECIPE, journal=journal)
    path.write_bytes(original)
    optimizer = ended.found.state["optimizer"]
    other = forged_end(copied, stretch, lambda _: dict(ended.found.weights), optimizer)
    found = again(task, copied, other)
    assert found.holds is True, found.reason
    assert not found.equal
    assert found.rounding[0] > 0


@pytest.mark.parametrize(
    ("weights", "optimiser", "larger", "rounding", "holds"),
    [
        (0.0, 0.0, 1.0, (0.0, 0.0), True),
        (0.04, 0.04, 1.0, (0.0, 0.0), True),
        (0.06, 0.0, 1.0, (0.0, 0.0), False),
        (0.06, 0.0, 1.0, (0.03, 0.0), True),
        (0.0, 0.06, 1.0, (0.0, 0.0), False),
        (0.0, 1.3, 1.1, (0.0, 0.5), True),
        (0.0, 1.3, 9.0, (0.0, 0.3), False),
        (0.4, 1.3, 1.1, (0.3, 0.5), True),
        (0.8, 1.3, 1.1, (0.3, 0.5), None),
        (1.2, 1.3, 9.0, (0.3, 0.3), False),
        (float("inf"), 0.0, 1.0, (0.0, 0.0), False),
    ],
)
def test_what_counts_as_rounding(weights, optimiser, larger, rounding, holds):
    equal = weights == optimiser == 0.0
    found = Replayed(1, 2, 10, equal, weights, optimiser, larger, rounding, 0.05)
    assert found.holds is holds
    assert found.reason
    assert replace(found, fault="it is another's").holds is False


def test_a_momentum_that_carries_one_network_to_another_is_seen(trained, copied, task):
    """Whoever may choose the optimiser's state reaches any network in one stretch."""
    first, second, _ = stretches(copied, check(copied, OWNER).entries)
    used = load_training(kept_in(copied, second.start.number) / "training.pt")["optimizer"]
    begun = forged_end(copied, Stretch(first.start, first.start), lambda w: w, used)
    stretch = Stretch(begun.end, first.end)
    found = again(task, copied, stretch)
    assert not found.holds
    assert "an optimiser that has been used" in found.reason
    shutil.copytree(trained / "diary", copied, dirs_exist_ok=True)
    many = {
        **used,
        "state": {
            n: {"momentum_buffer": 9 * each["momentum_buffer"]} for n, each in used["state"].items()
        },
    }
    found = again(task, copied, forged_end(copied, first, lambda w: w, many))
    assert not found.holds
    assert found.weights == 0.0
    assert found.optimiser > 0.05


def test_a_checkpoint_that_was_exchanged_is_not_the_one_named(copied, task):
    stretch = stretches(copied, check(copied, OWNER).entries)[1]
    shutil.copy(kept_in(copied, 5) / "model.safetensors", kept_in(copied, 3))
    with pytest.raises(UnreadableClaimError, match="not the checkpoint that entry 3 names"):
        again(task, copied, stretch)
    found = continuity(copied, check(copied, OWNER).entries)
    assert found.continued is False
    assert "entry 3" in found.reason


@pytest.mark.parametrize("state", [{"done": 4}, {"done": "4", "optimizer": {}}, b"not a state"])
def test_a_state_that_cannot_be_gone_on_from_is_an_error_of_ours(copied, task, state):
    stretch = stretches(copied, check(copied, OWNER).entries)[1]
    path = kept_in(copied, stretch.start.number) / "training.pt"
    path.write_bytes(state) if isinstance(state, bytes) else save_training(path, state)
    named = stretch.start.facts._replace(state=sha256_of(path))
    stretch = Stretch(replace(stretch.start, facts=named), stretch.end)
    with pytest.raises(UnreadableClaimError):
        again(task, copied, stretch)


def test_a_resumed_run_goes_on_in_its_diary(task, tmp_path):
    config, sets = task
    begin(tmp_path / "diary", SIGNING)
    diary = Diary(tmp_path / "diary", SIGNING, Pace(steps=4, keep=0))

    def stop(now):
        raise KeyboardInterrupt

    stopped = Journal(tmp_path / "run", show=stop, diary=diary, checkpoint_every=0.0)
    with pytest.raises(KeyboardInterrupt):
        nnpassport.train(tmp_path / "net", config, sets, RECIPE, journal=stopped)
    going_on = Journal(tmp_path / "run", resume=True, diary=diary)
    nnpassport.train(tmp_path / "net", config, sets, RECIPE, journal=going_on)
    entries = check(tmp_path / "diary", OWNER).entries
    assert [each.facts.step for each in entries] == [0, 0, 4, 8, 9, 12, 12]
    assert not kept_in(tmp_path / "diary", 1).exists()


def test_no_secret_of_a_marked_training_is_in_its_diary(task, tmp_path):
    config, sets = task
    torch.manual_seed(0)
    seed = bytes(range(100, 132))
    key = nnpassport.V2.draw_key(
        config.build(), torch.zeros(2, 1, 16, 16), owner="Alice", seed=seed, passports="derived"
    )
    begin(tmp_path / "diary", SIGNING)
    diary = Diary(tmp_path / "diary", SIGNING, Pace(steps=4, keep=1))
    nnpassport.embed(
        tmp_path / "net", config, key, sets, replace(RECIPE, epochs=1), journal=Journal(diary=diary)
    )
    found = check(tmp_path / "diary", OWNER)
    assert continuity(tmp_path / "diary", found.entries).continued is not False
    passports = [key.layer_passport(layer.name).numpy().tobytes() for layer in key.context.layers]
    for path in (tmp_path / "diary").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not any(each in content for each in (seed, seed.hex().encode(), *passports))
    assert "signing" not in repr(diary)


def test_an_authority_that_does_not_answer_stops_no_training(tmp_path):
    begin(tmp_path, SIGNING)
    nobody = Authority("http://127.0.0.1:9/", [])
    diary = Diary(tmp_path, SIGNING, authority=nobody)
    diary.enter_network(1, {"a": torch.zeros(2)})
    assert "does not answer" in diary.trouble
    assert len(check(tmp_path, OWNER).entries) == 2


# Loops of others


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.filterwarnings("ignore:.*(does not have many workers|exists and is not empty)")
@pytest.mark.filterwarnings("ignore:.*LeafSpec")
def test_lightning_s_trainer_enters_its_steps(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = small()

        def training_step(self, batch, _):
            loss = nn.functional.cross_entropy(self.network(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    begin(tmp_path / "diary", SIGNING)
    diary = Diary(tmp_path / "diary", SIGNING, Pace(steps=2, keep=1))
    rows = torch.utils.data.TensorDataset(torch.randn(16, 4), torch.arange(16) % 3)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        default_root_dir=tmp_path,
        callbacks=[lightning_callback(diary, configuration=b"{}", data="ab" * 32)],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
    )
    module = Module()
    trainer.fit(module, torch.utils.data.DataLoader(rows, 4))
    entries = check(tmp_path / "diary", OWNER).entries
    assert [each.facts.step for each in entries] == [0, 0, 2, 4, 4]
    assert entries[-1].facts.metrics.keys() == {"loss"}
    assert entries[-1].facts.data == "ab" * 32
    kept = load_file(kept_in(tmp_path / "diary", 4) / "model.safetensors")
    assert all(torch.equal(kept[n], v) for n, v in module.state_dict().items())


def test_hugging_face_s_trainer_enters_its_steps(tmp_path):
    transformers = pytest.importorskip("transformers")

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = small()

        def forward(self, x, labels):
            answers = self.network(x)
            return {"loss": nn.functional.cross_entropy(answers, labels), "logits": answers}

    begin(tmp_path / "diary", SIGNING)
    diary = Diary(tmp_path / "diary", SIGNING, Pace(steps=2, keep=0))
    settings = transformers.TrainingArguments(
        str(tmp_path / "out"),
        max_steps=4,
        per_device_train_batch_size=4,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    rows = [{"x": torch.randn(4), "labels": torch.tensor(n % 3)} for n in range(16)]
    trainer = transformers.Trainer(
        Small(), settings, train_dataset=rows, callbacks=[trainer_callback(diary)]
    )
    trainer.train()
    entries = check(tmp_path / "diary", OWNER).entries
    assert [each.facts.step for each in entries] == [0, 0, 2, 4, 4]
    assert "loss" in entries[2].facts.metrics


# Continuity, and forgeries


def drawn_by_hand(folder, networks):
    """A diary whose entries keep these networks."""
    begin(folder, SIGNING)
    diary = Diary(folder, SIGNING, Pace(keep=1))
    for step, each in enumerate(networks):
        diary.enter_network(step, each)
    return check(folder, OWNER).entries


def independent(seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5),
    ).state_dict()  # fmt: skip


def mixed(one, other, share):
    return {name: (1 - share) * one[name] + share * other[name] for name in one}


def walk(start, steps, size=0.02):
    """Networks that each add something drawn by lot, as training does not, but off any line."""
    rng = torch.Generator().manual_seed(1)
    found = [start]
    for _ in range(steps):
        last = found[-1]
        found.append({n: v + size * torch.randn(v.shape, generator=rng) for n, v in last.items()})
    return found


def test_checkpoints_that_come_from_one_another_are_continued(tmp_path):
    found = continuity(tmp_path, drawn_by_hand(tmp_path, walk(independent(0), 4)))
    assert found.continued is True, found.reason


def test_a_chain_that_jumps_to_another_network_is_broken(tmp_path):
    networks = [*walk(independent(0), 2), *walk(independent(1), 2)]
    found = continuity(tmp_path, drawn_by_hand(tmp_path, networks))
    assert found.continued is False
    assert "nothing in common with the checkpoint before" in found.reason


def test_a_chain_that_is_interpolated_between_two_networks_is_broken(tmp_path):
    one, other = independent(0), independent(1)
    networks = [mixed(one, other, share / 8) for share in range(9)]
    found = continuity(tmp_path, drawn_by_hand(tmp_path, networks))
    assert found.continued is False
    assert all(step.before == "related" for step in found.steps[1:])
    assert "nothing in common with the first" in found.reason


def test_a_chain_that_is_interpolated_to_a_descendant_lies_on_a_line(tmp_path):
    networks = walk(independent(0), 4)
    line = [mixed(networks[0], networks[-1], share / 5) for share in range(6)]
    found = continuity(tmp_path, drawn_by_hand(tmp_path, line))
    assert found.continued is False
    assert "straight lines" in found.reason


def test_one_checkpoint_shows_nothing(tmp_path):
    assert continuity(tmp_path, drawn_by_hand(tmp_path, [independent(0)])).continued is None


# The command line


@pytest.fixture
def authority(tmp_path, monkeypatch):
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl binary, which plays the timestamp authority")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    root_key, key = new_key(), new_key()
    root = certificate("A Root", root_key, ca=True)
    signer = Signer(tmp_path / "tsa", key, certificate("An Authority", key, (root, root_key)))
    (tmp_path / "root.pem").write_bytes(pem(root))
    with Website() as server:
        server.answer = lambda query: (200, signer.answer(query))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.url
        server.shutdown()
        thread.join()


def test_the_commands_keep_stamp_and_check_a_diary(tmp_path, authority, trained, call):
    save_signing_key(SIGNING, tmp_path / "a.pem", tmp_path / "a.pub.pem")
    folder, mine = tmp_path / "diary", ("--signing", tmp_path / "a.pem")
    (tmp_path / "how.txt").write_text("as ever")
    assert call("diary", "new", folder, *mine, "--note", "by hand")[0] == 0
    words = ("--step", 7, "--checkpoint", trained / "net", "--keep", "--metric", "loss=0.5")
    configured = ("--configuration", tmp_path / "how.txt", "--data", "ab" * 32)
    code, out, _ = call("diary", "add", folder, *mine, *words, *configured, "--json")
    assert code == 0
    assert json.loads(out)["metrics"] == {"loss": 0.5}
    stamping = ("--authority", authority, "--authority-root", tmp_path / "root.pem")
    assert call("diary", "stamp", folder, *stamping)[0] == 0
    checking = ("diary", "verify", folder, "--owner", tmp_path / "a.pub.pem")
    assert call(*checking)[0] == 2  # tokens, and no root
    rooted = (*checking, "--root", tmp_path / "root.pem")
    code, out, _ = call(*rooted, "--network", trained / "net", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["network"]["entry"] == 1
    assert facts["network"]["latest"] is not None
    assert facts["continuity"]["continued"] is None
    assert call(*rooted)[1].startswith("HOLDS")
    assert call(*rooted, "--network", kept_in(trained / "diary", 2))[0] == 1
    path = folder / diaries.DIARY_FILE
    path.write_bytes(path.read_bytes().split(b"\n")[1] + b"\n")
    assert call(*rooted)[0] == 1
    path.write_bytes(b"{}\n")
    assert call(*rooted)[0] == 2


def test_dates_that_are_asked_for_and_not_there_are_no_yes(tmp_path, authority, call):
    save_signing_key(SIGNING, tmp_path / "a.pem", tmp_path / "a.pub.pem")
    diary_of(tmp_path)
    checking = ("diary", "verify", tmp_path, "--owner", tmp_path / "a.pub.pem")
    assert call(*checking)[0] == 0
    assert call(*checking, "--root", tmp_path / "root.pem")[0] == 1


@pytest.mark.slow
def test_train_keeps_a_diary_and_replay_runs_it_again(tmp_path, call):
    save_signing_key(SIGNING, tmp_path / "a.pem", tmp_path / "a.pub.pem")
    folder, signing = tmp_path / "diary", tmp_path / "a.pem"
    assert call("diary", "new", folder, "--signing", signing)[0] == 0
    shape = ("--model", "resnet18", "--norm", "batch", "--set", "width=0.125", "--size", 16)
    run = ("--channels", 1, "--epochs", 1, "--batch", 64, "-o", tmp_path / "net")
    kept = ("--diary-steps", 10, "--diary-keep", 1)
    given_ = ("--diary", folder, "--diary-signing", signing, *kept)
    assert call("train", "--data", "digits", *shape, *run, "--diary", folder)[0] == 2
    assert call("train", "--data", "digits", *shape, *run, *given_)[0] == 0
    checking = (folder, "--owner", tmp_path / "a.pub.pem")
    assert call("diary", "verify", *checking, "--network", tmp_path / "net")[0] == 0
    code, out, _ = call("diary", "replay", *checking, "--data", "digits", "--json")
    assert (code, json.loads(out)["equal"]) == (0, True)
    other = ("--data", "digits", "--validation", 0.1)
    code, _, said = call("diary", "replay", *checking, *other, "--from", 1)
    assert code == 2
    assert "not those that the diary names" in said


# Before the judge: Bob took her network before it had a mark, and was the first to claim it


def noisy(model, share, seed=0):
    """A state dict with noise added to each matrix, of so many times its standard deviation."""
    rng = torch.Generator().manual_seed(seed)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name, value in state.items():
        if value.dim() > 1:
            state[name] = value + share * value.std() * torch.randn(value.shape, generator=rng)
    return state


class Case:
    """Alice's networks on the way, her marked one, Bob's own with his mark, and the suspect."""

    def __init__(self, folder):
        self.folder = folder
        data = read_images("digits", split="train", size=32, channels=1).subset(torch.arange(640))
        normalise = Normalisation.measured(data)
        arguments = {"classes": 10, "norm": "batch", "width": 0.25, "channels": 1}
        facts = (data.classes, (1, 32, 32), normalise.mean, normalise.std)
        self.config = ModelConfig("alexnet", arguments, *facts)
        example = torch.zeros(2, 1, 32, 32)
        plain = reader(small_alexnet(), data, normalise)
        self.way = [
            noisy(plain, 1.5),
            noisy(plain, 0.3, 1),
            noisy(plain, 0.1, 2),
            plain.state_dict(),
        ]
        draw, form = nnpassport.V2.draw_key, {"passports": "derived"}
        self.keys = {
            name: draw(plain, example, owner=name.title(), seed=bytes([number] * 32), **form)
            for number, name in enumerate(("alice", "bob"), 1)
        }
        alice = marked(nnpassport.V2, plain, self.keys["alice"], data, normalise)
        bob = marked(nnpassport.V2, plain, self.keys["bob"], data, normalise)
        suspect = deepcopy(alice)
        write_over(suspect, self.keys["bob"], normalise(data.images), kept=self.keys["alice"])
        solve_head(suspect, [(Branch.PUBLIC, normalise(data.images), data.labels)])
        stranger = reader(small_alexnet(seed=4), data, normalise)
        others = {"alice": alice, "bob": bob, "suspect": suspect, "stranger": stranger}
        for name, model in others.items():
            save_model(folder / name, model, self.config)
        self.networks = {name: model.state_dict() for name, model in others.items()}

    def exhibit(self, folder, name, day, diary=None):
        reference = tensors_digest(read_weights(self.folder / name).tensors)
        claim = claim_of(self.keys[name], PARTIES[name].public_key(), reference=reference)
        signed = sign_claim(claim, PARTIES[name])._replace(response=b"%d " % day)
        write_signed(signed, folder / f"{name}.json")
        key, reference = self.keys[name], self.folder / name
        disclose(folder / f"{name}.json", key, folder / name, reference=reference, diary=diary)
        return folder / name

    def diary(self, folder, networks, name="alice"):
        begin(folder, PARTIES[name])
        diary = Diary(folder, PARTIES[name], Pace(keep=1), network=self.config)
        for step, each in enumerate(networks):
            diary.enter_network(step, each)
        return folder


PARTIES = {"alice": SIGNING, "bob": STRANGER}
APPEARED = DAY + timedelta(days=60)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("case"))


@pytest.fixture
def days(dated, monkeypatch):
    """The same tokens in claims."""

    def checked(response, covered, roots):
        return Timestamp(DAY + timedelta(days=int(response)), "CN=A", "1.2", "1")

    monkeypatch.setattr(claims, "check_timestamp", checked)
    return dated


def judged(case, *exhibits):
    bench = Bench(ROOTS, APPEARED, (case.folder / "stranger",))
    return hear(case.folder / "suspect", exhibits, bench)


@pytest.mark.slow
def test_who_trained_it_is_before_who_claimed_it_first(case, tmp_path, days):
    diary = case.diary(tmp_path / "hers", [*case.way, case.networks["alice"]])
    days(diary, 3, 5)
    days(diary, 5, 40)
    bob = case.exhibit(tmp_path, "bob", 10)
    without = judged(case, case.exhibit(tmp_path, "alice", 20), bob)
    assert without.ruling.owner == "bob"
    shutil.rmtree(tmp_path / "alice")
    heard = judged(case, case.exhibit(tmp_path, "alice", 20, diary), bob)
    assert heard.ruling.owner == "alice", "\n".join(heard.ruling.reasons)
    (alice, _) = heard.claimants
    assert alice.trained[0].day == 5
    assert any("by its diary" in reason for reason in heard.ruling.reasons)


def dating(case, folder, claimant="bob", suspect="suspect"):
    """What a diary of Bob's dates of the suspect."""
    reference = tensors_digest(read_weights(case.folder / claimant).tensors)
    claim = claim_of(case.keys[claimant], PARTIES[claimant].public_key(), reference=reference)
    at = case.folder / suspect
    return trained_by(folder, claim, at, roots=ROOTS, appeared=APPEARED)


@pytest.mark.slow
def test_a_diary_that_begins_at_another_s_checkpoint_dates_nothing(case, tmp_path, days):
    """Bob's beginning is Alice's network: what the suspect has of it is not his."""
    plain = small_alexnet()
    plain.load_state_dict(case.way[3])
    later = [noisy(plain, share, 5 + n) for n, share in enumerate((0.05, 0.06))]
    folder = case.diary(tmp_path / "his", [case.way[3], *later, case.networks["bob"]], "bob")
    days(folder, 2, 1)
    found = dating(case, folder)
    assert found.between is None
    assert "by more than its beginning explains" in found.note


@pytest.mark.slow
def test_an_old_network_of_one_s_own_before_another_s_dates_nothing(case, tmp_path, days):
    """Bob bends the line from his old network to hers; dated early is his own alone."""
    old = noisy(small_alexnet(seed=4), 0.0)
    plain = small_alexnet()
    near = [noisy(small_alexnet(seed=4), 0.2, 7), noisy(small_alexnet(seed=4), 0.3, 8)]
    plain.load_state_dict(case.way[3])
    networks = [old, *near, noisy(plain, 0.2, 9), case.networks["bob"]]
    folder = case.diary(tmp_path / "his", networks, "bob")
    days(folder, 3, 1)
    days(folder, 5, 50)
    assert "nothing in common" in dating(case, folder).note
    monkey = pytest.MonkeyPatch()
    passed = Continuity(True, "as if he had bent it well")
    monkey.setattr("nnpassport.verification.trained.continuity", lambda *_: passed)
    found = dating(case, folder)
    monkey.undo()
    assert found.between is not None
    assert found.entry == 4  # not before he had hers: the token over entry 5
    assert found.between[1] > DAY + timedelta(days=50)


def mlp():
    return nn.Sequential(
        nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5),
    )  # fmt: skip


def test_over_a_table_of_axes_any_network_is_read_and_none_runs(tmp_path):
    """A copy whose units were moved was made from a checkpoint by more than the beginning says."""
    torch.manual_seed(0)
    model = mlp()
    axes = axes_of(model, torch.randn(4, 32))
    way = [noisy(model, 1.5), noisy(model, 0.3, 1), model.state_dict()]
    order = torch.randperm(64)
    moved = {n: v.clone() for n, v in noisy(model, 0.1, 2).items()}
    moved["0.weight"], moved["0.bias"] = moved["0.weight"][order], moved["0.bias"][order]
    moved["2.weight"] = moved["2.weight"][:, order]
    files = {"moved": moved, "stranger": independent(5), "other": independent(6)}
    files |= {str(number): each for number, each in enumerate(way)}
    for name, each in files.items():
        save_file(each, tmp_path / f"{name}.safetensors")
    at = {name: tmp_path / f"{name}.safetensors" for name in files}
    assert _by_axes(axes, at["moved"], (at["0"],), at["1"])[0]
    related, note = _by_axes(axes, at["moved"], (at["2"],), at["1"])  # begun at what others have
    assert not related
    assert "its beginning and unrelated networks" in note
    assert not _by_axes(axes, at["stranger"], (at["0"],), at["1"])[0]
    assert not _by_axes(axes, at["moved"], (at["0"],), at["other"])[0]


class Tiny:
    """A claim, and a diary that ends in the network which it commits to; no network is compared."""

    def __init__(self, folder):
        self.folder = folder / "diary"
        networks = walk(independent(0), 3)
        drawn_by_hand(self.folder, networks)
        context = Context("passport-v2", "Zoë", (LAYER,), None, bytes(16))
        key = Key(bytes(32), context)
        self.claim = claim_of(key, OWNER, reference=tensors_digest(networks[-1]))

    def found(self, **changes):
        given = {"roots": ROOTS, "appeared": APPEARED, **changes}
        return trained_by(self.folder, given.pop("claim", self.claim), self.folder, **given)


LAYER = LayerShape("fc", (13, 10), (10, 64), Geometry())


def test_a_diary_has_to_be_dated_and_of_the_network_that_is_claimed(tmp_path, days):
    tiny = Tiny(tmp_path)
    assert "afterwards" in tiny.found().note
    days(tiny.folder, 4, 70)
    assert "older than the suspect" in tiny.found().note
    days(tiny.folder, 2, 1)
    assert "was not said" in tiny.found(appeared=None).note
    assert (
        "does not name the network"
        in tiny.found(claim=replace(tiny.claim, reference="ab" * 32)).note
    )
    stranger = replace(tiny.claim, owner_key=public_hex(STRANGER.public_key()))
    assert "does not hold" in tiny.found(claim=stranger).note
    assert "no root certificate" in tiny.found(roots=()).note
    shutil.copytree(kept_in(tiny.folder, 1), kept_in(tiny.folder, 2), dirs_exist_ok=True)
    assert "entry 2: its checkpoint is not the one it names" in tiny.found().note


def test_a_diary_that_cannot_be_read_stops_nobody(tmp_path, days):
    """And it is copied into an exhibit only by whose it is."""
    tiny = Tiny(tmp_path)
    verdict = Verdict("s", 100, 100, -200.0, -30.0)
    standing = Standing(claims.Finding(True, "", tiny.claim), -9.0, False, "")
    exhibit = Exhibit(standing, None, None, None, diary=tiny.folder)
    (tiny.folder / diaries.DIARY_FILE).write_bytes(b"{}\n")
    mine = Claimant("a", readings={AS_IT_STANDS: verdict})
    found = _with_diary(mine, exhibit, tiny.folder, Bench(ROOTS, APPEARED))
    assert found.trained is None
    assert "could not be checked" in found.notes[0]
