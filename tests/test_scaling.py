"""The plan beyond this machine: its model against what is known, and the page against the model."""

import importlib.util
import json
from pathlib import Path

import pytest

from nnpassport.embedding.schemes.signature import secret_of
from nnpassport.files.safetensors import INDEX_FILE, open_shards
from nnpassport.keys.key import Key
from nnpassport.verification.verdicts import verify

ROOT = Path(__file__).parent.parent


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


scaling = script("scaling")
large = script("large_checkpoint")


@pytest.mark.slow
def test_the_committed_page_is_what_the_script_writes():
    committed = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert scaling.render(scaling.load()) == committed


def test_the_part_after_the_fork_is_what_surgery_found():
    bounds = json.loads(scaling.MEASURED["costs"].read_text())["lower_bounds"]
    assert len(bounds) == 3
    for architecture, bound in bounds.items():
        found = scaling.network("", architecture, 32, batch=1)
        assert 1 + found.after / found.forward == pytest.approx(bound, rel=1e-12)


def test_networks_have_the_sizes_that_they_are_known_by():
    resnet, everywhere, decoder, whole = scaling.subjects()
    assert resnet.numbers == everywhere.numbers == 25_557_032
    assert resnet.forward == pytest.approx(2 * 4.09e9, rel=0.001)  # 4.09 · 10⁹ products
    assert resnet.bits == 3 * (512 + 512 + 2048) + 2048
    assert decoder.numbers == whole.numbers == 6_738_415_616
    assert len(whole.marked) == 7 * 32
    assert whole.bits == 32 * (5 * 4096 + 2 * 11_008)


def test_steps_cost_what_the_formulas_say():
    host = scaling.Host("a", (8, 4, 3, 3), 8 * 25, False, (4, 5, 5))
    after = scaling.Host("b", (10, 8), 10, True, None)
    subject = scaling.Subject("", (host, after), "image", 6)
    assert host.forward == 2 * 25 * 8 * 4 * 9
    assert subject.step("plain") == 3 * 6 * (host.forward + 2 * 80)
    assert subject.step("V1") - subject.step("plain") == 8 * 8 * 36
    assert subject.step("V2") - subject.step("V1") == 3 * 6 * 2 * 80
    assert subject.step("V3") == pytest.approx(
        (subject.step("V2") - subject.affine) * 8 / 6 + subject.affine
    )
    assert subject.activations("plain") == 2 * 6 * 4 * 210
    assert subject.activations("V2") == 2 * 6 * 4 * 220
    assert subject.passport_numbers == 2 * 100


def test_the_stream_is_a_byte_for_each_number(monkeypatch):
    subject = scaling.network("", "alexnet", 32, batch=1)
    key = Key(bytes(32), scaling.context_of(subject))
    assert sum(key.layer_passport(host.name).numel() for host in subject.marked) == (
        subject.passport_numbers
    )
    assert key.context.bits == subject.bits


def test_memory_of_verification_does_not_grow_with_the_checkpoint():
    found = json.loads(scaling.MEASURED["large"].read_text())
    sizes = [each["bytes"] for each in found["checkpoints"]]
    assert sizes[-1] > 5 * 10**9
    assert sizes[-1] > 5 * sizes[0]
    peaks = [turn["peak_bytes"] for each in found["checkpoints"] for turn in each["turns"]]
    assert max(peaks) - min(peaks) < 64 * 2**20
    start = max(turn["peak_bytes"] for turn in found["start"]["turns"])
    assert max(peaks) - start < 2 * found["checkpoints"][0]["largest_host_bytes"]
    for each in found["checkpoints"]:
        assert all(turn["accepted"] and turn["exit"] == 0 for turn in each["turns"])
        assert all(turn["matches"] == turn["bits"] for turn in each["turns"])
        assert not each["stranger"]["accepted"]
        assert each["stranger"]["exit"] == 1


def test_the_benchmark_s_checkpoints_carry_their_key(tmp_path, monkeypatch):
    monkeypatch.setattr(large, "SHAPES", {"q": (24, 16), "down": (16, 40)})
    monkeypatch.setattr(large, "WIDTH", 16)
    monkeypatch.setattr(large, "WORDS", 9)
    monkeypatch.setattr(large, "SHARD", 2000)
    key = large.key_for(3, seed=1)
    large.write(tmp_path / "made", large.tensors(key, 3))
    shards = open_shards(tmp_path / "made" / INDEX_FILE)
    assert len(shards) == 1 + 3 * (2 + 2)
    assert len(shards.files) > 3
    assert all(source.size < 4000 for source in shards.files[1:])
    verdict = verify(tmp_path / "made", key)
    assert verdict.matches == verdict.bits == 3 * 40
    other = verify(tmp_path / "made", large.key_for(3, seed=2))
    assert not other.accepted


def test_a_row_is_changed_only_along_the_passport_and_only_where_its_bit_is_wrong():
    key = large.key_for(1, seed=1)
    layer = key.context.layers[0]._replace(weight=(32, 4096))
    key = Key(key.seed, scaling.Context("passport-v2", "a", (layer,), None, bytes(16)))
    rows = large.torch.randn(32, 4096, generator=large.torch.Generator().manual_seed(0))
    changed = large.marked(rows.clone(), key, layer)
    mean_patch, signs = secret_of(key, layer)[:2]
    form = mean_patch[0, 0].float()
    wrong = (rows @ form).sign() != signs
    assert 4 < int(wrong.sum()) < 28
    difference = changed - rows
    assert difference[~wrong & ((rows @ form).abs() > large.LEAST)].abs().max() < 1e-5
    along = difference[wrong] @ form / form.norm()
    large.torch.testing.assert_close(along.abs(), difference[wrong].norm(dim=1))
