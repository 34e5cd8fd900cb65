import json
import stat
import sys

import numpy
import pytest
import torch
from constructed import embed
from safetensors.torch import load_file, save_file

from nnpassport.cli import app as cli
from nnpassport.embedding.checkpoint import load_model
from nnpassport.embedding.schemes.passport import Passport
from nnpassport.keys.keyfile import load_key

SHAPE = ["--model", "alexnet", "--set", "width=0.125"]
DATA = ["--data", "digits", "--split", "train"]
SHORT = ["--epochs", "1", "--batch", "32", "--no-augment", "--triggers-per-step", "20"]


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A folder with a key, a network that carries it, its release, and another's network."""
    folder = tmp_path_factory.mktemp("house")
    for words in (
        ["key", "new", "--scheme", "passport-v3", *SHAPE, "--owner", "Alice", "-o", "alice.key"],
        ["embed", *DATA, *SHAPE, *SHORT, "--key", "alice.key", "-o", "alice"],
        ["release", "alice", "--key", "alice.key", "-o", "released"],
        ["train", *DATA, *SHAPE, "--epochs", "1", "-o", "other"],
    ):
        placed = [str(folder / w) if w in PLACES else w for w in words]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["nnpassport", *placed])
            patch.setattr(Passport, "embed", embed)  # nobody here asks how it is learnt
            with pytest.raises(SystemExit) as exit_:
                cli.main()
        assert exit_.value.code == 0, words
    return folder


PLACES = {"alice.key", "alice", "released", "other"}


def test_accepts_the_release_with_its_key(call, house):
    code, out, _ = call("verify", house / "released", "--key", house / "alice.key", "--json")
    verdict = json.loads(out)
    assert code == 0
    assert verdict["accepted"] is True
    assert verdict["matches"] == verdict["bits"] == 112
    assert verdict["p_value"] <= verdict["alpha"]
    assert {"scheme", "match_rate", "fidelity", "alignment", "reason", "digests"} <= set(verdict)


def test_refuses_a_network_that_does_not_carry_the_key(call, house):
    code, out, _ = call("verify", house / "other", "--key", house / "alice.key")
    assert code == 1
    assert "REFUSED" in out


def test_refuses_another_key(call, house, tmp_path):
    call("key", "new", "--scheme", "passport-v3", *SHAPE, "-o", tmp_path / "bob.key")
    code, out, _ = call("verify", house / "released", "--key", tmp_path / "bob.key", "--json")
    assert code == 1
    assert json.loads(out)["match_rate"] < 0.8


def test_measures_fidelity_on_data(call, house):
    words = ["--data", "digits", "--split", "test", "--tolerance", "0.2", "--json"]
    code, out, _ = call("verify", house / "released", "--key", house / "alice.key", *words)
    fidelity = json.loads(out)["fidelity"]
    assert code == (0 if fidelity["passed"] else 1)
    assert fidelity["accuracy"] > 0.5
    assert fidelity["target"] > 0.5


def test_a_size_that_the_architecture_does_not_take_is_an_error_that_says_so(call, tmp_path):
    code, _, said = call("key", "new", "--size", "8", "-o", tmp_path / "owner.key")
    assert code == 2
    assert "AlexNet does not run on inputs of shape (1, 3, 8, 8)" in " ".join(said.split())


def test_verifies_in_black_box_through_predictions(call, house):
    words = ["--key", house / "alice.key", "--black-box", "--json"]
    _, mine, _ = call("verify", house / "released", *words)
    code, other, _ = call("verify", house / "other", *words)
    assert code == 1
    assert json.loads(mine)["bits"] == 100
    assert json.loads(mine)["matches"] > 2 * json.loads(other)["matches"]


def test_the_published_rule_needs_every_bit_and_gives_no_p_value(call, house):
    words = ["--key", house / "alice.key", "--as-published", "--json"]
    code, out, _ = call("verify", house / "released", *words)
    assert code == 0
    assert json.loads(out)["p_value"] is None
    assert call("verify", house / "other", *words)[0] == 1


def test_a_suspect_that_cannot_be_checked_is_neither_accepted_nor_refused(call, house, tmp_path):
    weights = load_file(house / "released" / "model.safetensors")
    damaged = {
        "missing.safetensors": {n: w for n, w in weights.items() if n != "features.8.weight"},
        "reshaped.safetensors": weights | {"features.8.weight": torch.zeros(3, 3)},
        "nan.safetensors": weights | {"features.8.weight": torch.full((48, 32, 3, 3), torch.nan)},
    }
    for name, tensors in damaged.items():
        save_file(tensors, tmp_path / name)
        code, out, err = call("verify", tmp_path / name, "--key", house / "alice.key")
        assert (code, out) == (2, "")
        assert "features.8.weight" in err
    whole = (house / "released" / "model.safetensors").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(whole[: len(whole) // 2])
    assert call("verify", tmp_path / "short.safetensors", "--key", house / "alice.key")[0] == 2
    assert call("verify", tmp_path / "nowhere", "--key", house / "alice.key")[0] == 2


def test_a_key_for_another_model_cannot_be_checked(call, house, tmp_path):
    call("key", "new", "--model", "resnet18", "--set", "width=0.25", "-o", tmp_path / "k")
    code, _, err = call("verify", house / "released", "--key", tmp_path / "k")
    assert code == 2
    assert "layer4" in err


def test_a_passphrase_is_needed_and_must_be_right(call, house, tmp_path, monkeypatch):
    monkeypatch.setenv("NNPASSPORT_PASSPHRASE", "correct horse")
    path = tmp_path / "locked.key"
    assert call("key", "new", *SHAPE, "--passphrase", "-o", path)[0] == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert call("key", "show", path)[0] == 0
    monkeypatch.setenv("NNPASSPORT_PASSPHRASE", "battery staple")
    code, _, err = call("key", "show", path)
    assert code == 2
    assert "battery" not in err


def test_key_show_tells_nothing_that_is_secret(call, house):
    _, text, _ = call("key", "show", house / "alice.key")
    _, facts, _ = call("key", "show", house / "alice.key", "--json")
    seed = load_key(house / "alice.key").seed
    assert "Alice" in text
    assert seed.hex() not in text + facts
    assert json.loads(facts)["fingerprint"] == load_key(house / "alice.key").fingerprint


def test_a_key_is_never_overwritten(call, house):
    before = (house / "alice.key").read_bytes()
    assert call("key", "new", *SHAPE, "-o", house / "alice.key")[0] == 2
    assert (house / "alice.key").read_bytes() == before


def test_a_signature_text_longer_than_the_channels_is_refused(call, tmp_path):
    code, _, err = call("key", "new", *SHAPE, "--text", "x" * 15, "-o", tmp_path / "k")
    assert code == 2
    assert "14" in err
    assert call("key", "new", *SHAPE, "--text", "x" * 14, "-o", tmp_path / "k")[0] == 0


def test_does_not_release_a_network_without_the_mark(call, house, tmp_path):
    words = ["release", house / "other", "--key", house / "alice.key", "-o", tmp_path / "out"]
    assert call(*words)[0] == 2
    assert not (tmp_path / "out").exists()


def test_a_release_says_nothing_of_its_mark(house):
    config = json.loads((house / "released" / "config.json").read_text())
    assert "passport" not in json.dumps(config)
    assert set(config["metrics"]) <= {"accuracy"}


@pytest.mark.parametrize("mode", ["random", "image", "shuffle"])
def test_passports_of_the_paper_have_no_p_value(call, house, tmp_path, mode):
    key = tmp_path / "k"
    extra = ["--plain", house / "other", "--images", "digits", "--images-split", "train"]
    assert call("key", "new", *SHAPE, "--passports", mode, *extra, "-o", key)[0] == 0
    code, out, _ = call("verify", house / "released", "--key", key, "--json")
    assert code == 1
    assert json.loads(out)["p_value"] is None
    assert not load_key(key).derived


def test_an_output_that_cannot_be_written_is_an_error(call, house, tmp_path):
    (tmp_path / "file").write_text("in the way")
    words = [
        "release",
        house / "alice",
        "--key",
        house / "alice.key",
        "-o",
        tmp_path / "file" / "x",
    ]
    assert call(*words)[0] == 2
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("size", ["16", "48"])
def test_images_that_a_network_does_not_take_are_refused_before_it_is_trained(call, tmp_path, size):
    asked = ("train", "--data", "digits", "--size", size, "--epochs", "1", "-o", tmp_path / "a")
    code, _, err = call(*asked)
    said = " ".join(err.split())
    assert code == 2
    assert f"alexnet does not take images of {size} by {size} pixels and 3 channels" in said
    assert "try: --size 32 for AlexNet" in said
    assert not (tmp_path / "a").exists()


def test_a_bug_is_never_taken_for_a_refusal(call, house, monkeypatch):
    def broken(*_args, **_more):
        raise RuntimeError("a bug")

    monkeypatch.setattr("nnpassport.verification.verdicts.verify", broken)
    code, _, err = call("verify", house / "released", "--key", house / "alice.key")
    assert code == 2
    assert "a bug" in err


def test_bad_options_say_what_would_work(call, tmp_path):
    code, _, err = call("train", *DATA, "--recipe", "long", "-o", tmp_path / "x")
    assert code == 2
    assert "short" in err
    assert call("train", *DATA, "--set", "width", "-o", tmp_path / "x")[0] == 2
    assert call("train", *DATA, "--epochs", "0", "-o", tmp_path / "x")[0] == 2
    assert call("train", "--data", tmp_path / "none", "-o", tmp_path / "x")[0] == 2
    for words in (["nonsense"], ["verify", "x", "--no-such-option", "y"], ["verify"]):
        code, _, err = call(*words)
        assert code == 2
        assert "Traceback" not in err


def test_every_command_explains_itself(call):
    for words in ([], ["key"], *([c] for c in ("demo", "train", "embed", "release", "verify"))):
        code, out, _ = call(*words, "--help")
        assert code == 0
        assert "Usage" in out
    assert call("--version")[:2] == (0, f"nnpassport {cli.__version__}\n")


def test_training_again_in_the_same_folder_resumes_to_the_same_network(call, house, tmp_path):
    words = ["train", *DATA, *SHAPE, "--epochs", "1", "--resume", "-o", tmp_path / "again"]
    assert call(*words)[0] == 0
    first = load_file(tmp_path / "again" / "model.safetensors")
    assert call(*words)[0] == 0
    again = load_file(tmp_path / "again" / "model.safetensors")
    other = load_file(house / "other" / "model.safetensors")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(first[name], other[name]) for name in first)


def test_layers_says_what_can_carry_a_passport_and_what_it_costs(call):
    code, out, _ = call("layers", "--model", "alexnet", "--norm", "batch", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["chosen"] == ["features.8", "features.11", "features.14"]
    assert found["layers"]["features.8"]["before"] == "BatchNorm2d features.9"
    assert found["refused"] == {"classifier": "its output is the network's own"}
    assert 1.3 < found["step_cost"] < 1.6
    assert found["bits"] == 896
    code, out, err = call("layers", "--model", "resnet18", "--layer", "layer4.1.conv2")
    assert code == 0
    assert "→ layer4.1.conv2" in out
    assert "V2 and V3 fork the batch at layer4.1 then: a step" in " ".join(err.split())


def test_layers_of_a_pattern_that_names_none_lists_what_there_is(call):
    code, out, err = call("layers", "--layer", "classifier")
    assert code == 2
    assert "layer 'classifier' cannot carry a passport" in " ".join(err.split())
    assert "features.8" in out


def test_a_new_network_has_an_output_for_each_class_of_the_images(call, tmp_path):
    pixels = numpy.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), dtype=numpy.uint8)
    numpy.savez(tmp_path / "data.npz", images=pixels, labels=numpy.arange(60) % 12)
    words = ("--epochs", 1, "--set", "width=0.1", "--data", tmp_path / "data.npz")
    code, _, err = call("train", *words, "-o", tmp_path / "plain")
    assert code == 0, err
    assert load_model(tmp_path / "plain").model.classifier.out_features == 12


def test_a_key_of_too_few_bits_is_noted(call, tmp_path):
    narrow = ("--set", "width=0.1", "--layer", "features.0")
    code, _, err = call("key", "new", *narrow, "-o", tmp_path / "few.key")
    assert code == 0
    assert "name more layers" in " ".join(err.split())
    _, _, err = call("key", "new", "-o", tmp_path / "many.key")
    assert "name more layers" not in " ".join(err.split())


FACTORY = """
from transformers import ViTConfig, ViTForImageClassification


def vit(classes=10):
    return ViTForImageClassification(
        ViTConfig(
            image_size=16, patch_size=4, num_channels=1, hidden_size=32, num_hidden_layers=2,
            num_attention_heads=2, intermediate_size=112, num_labels=classes,
        )
    )
"""


def test_a_network_of_somebody_else_s_library_goes_all_the_way(call, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    (tmp_path / "their_networks.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    own = ("--factory", "their_networks:vit")
    size = ("--size", 16, "--channels", 1, "--data", "digits", "--rate", 0.02)
    plain, key, marked = tmp_path / "plain", tmp_path / "a.key", tmp_path / "marked"
    assert call("train", *own, *size, "--epochs", 1, "-o", plain)[0] == 0
    assert (
        call("key", "new", *own, "--model", plain, "--layer", "vit.layers.*.fc1", "-o", key)[0] == 0
    )
    words = (*own, *size, "--init", plain, "--epochs", 0, "--key", key, "-o", marked)
    told = call("embed", *words, "--harm-error", 1)  # a vector of 16 numbers is changed by much
    assert told[0] == 0, told[2]
    released = tmp_path / "released"
    assert call("release", marked, *own, "--key", key, "-o", released)[0] == 0
    assert call("verify", released, "--key", key)[0] == 0
    words = ("--key", key, "--like", plain, *own, "--data", "digits")
    code, out, err = call("verify", released, *words, "--json")
    assert code in {0, 1}, err  # F may fail: one epoch teaches it little
    assert json.loads(out)["matches"] == 224
    assert 0 <= json.loads(out)["fidelity"]["accuracy"] <= 1


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        ("adi", "100 pictures"),
        ("uchida", "1 layers, 256 bits"),
        ("passport-v3", "bits; 100 pictures"),
    ],
)
def test_a_key_of_every_kind_is_drawn(call, scheme, said, tmp_path):
    code, out, err = call("key", "new", "--scheme", scheme, "-o", tmp_path / "k")
    assert code == 0
    assert said in " ".join((out + err).split())
    assert (tmp_path / "k").exists()


def test_settings_of_a_scheme_are_in_its_key(call, house, tmp_path):
    key, other = tmp_path / "k", house / "other"
    drawn = ("key", "new", "--scheme", "answers", "--model", other, "-o", key)
    inputs = ("--plain", other, "--images", "digits", "--images-split", "train")
    settings = ("--setting", "strength=0.8", "--setting", "kind=mirrored", "--setting", "coins=160")
    code, out, err = call(*drawn, *inputs, *settings, "--setting", "teaching=0.4")
    assert code == 0, err
    assert load_key(key).context.answers == ("mirrored", 160, 800)
    assert "160 functions of kind mirrored, ε 0.8" in " ".join((out + err).split())
    idle = [line for line in (out + err).splitlines() if "makes no difference" in line]
    assert [line.split()[1] for line in idle] == ["teaching"]
    _, shown, _ = call("key", "show", key)
    assert "160 functions of kind mirrored, ε 0.8" in shown
    embed = ("embed", "--init", other, "--data", "digits", "--key", key, "-o", tmp_path / "marked")
    code, _, err = call(*embed, "--epochs", "1", "--setting", "kind=layout")
    assert code == 2
    assert "kind=layout was given, and the key was drawn with kind=mirrored" in " ".join(
        err.split()
    )
    assert not (tmp_path / "marked").exists()


@pytest.mark.parametrize(
    ("scheme", "setting", "said"),
    [
        ("answers", "kind=wavy", "answers has: counts, filters, layout, mirrored"),
        ("answers", "kind=waves", "answers has: counts, filters, layout, mirrored"),
        ("cosine", "kind=filters", "cosine has: waves"),
        ("uchida", "late=0.5", "uchida has no setting 'late'"),
        ("adi", "triggers", "'triggers' is not NAME=VALUE"),
    ],
)
def test_a_setting_that_a_scheme_has_not_is_refused(call, scheme, setting, said, tmp_path):
    code, _, err = call(
        "key", "new", "--scheme", scheme, "--setting", setting, "-o", tmp_path / "k"
    )
    assert code == 2
    assert said in " ".join(err.split()).replace(" try: ", " ")
    assert not (tmp_path / "k").exists()


def test_a_key_gets_its_pictures_from_images_and_a_trained_network(call, house, tmp_path):
    key, other = tmp_path / "k", house / "other"
    drawn = ("key", "new", "--scheme", "zhang-content", "--model", other, "-o", key)
    code, _, err = call(*drawn)
    assert code == 2
    assert "no pictures yet" in " ".join(err.split())
    assert not key.exists()
    code, _, _ = call(*drawn, "--plain", other, "--images", "digits", "--images-split", "train")
    assert code == 0
    loaded = load_key(key)
    assert loaded.derived
    assert loaded.trigger_images is not None
