"""A folder for a model hub: what is in it, what never is, and a signature that others check."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from huggingface_hub import HfApi, ModelCard
from test_readme import commands

from nnpassport.claims.claim import claim_of, sign_claim
from nnpassport.claims.claimfile import write_signed
from nnpassport.claims.signing import public_hex
from nnpassport.embedding.checkpoint import load_model, save_model
from nnpassport.embedding.network.equations import read_bits
from nnpassport.embedding.network.tensors import read_weights, tensors_digest
from nnpassport.embedding.publish.hub import package
from nnpassport.embedding.publish.signed import sign_folder
from nnpassport.embedding.schemes.passport import V2
from nnpassport.embedding.schemes.signature import secrets_of
from nnpassport.files.config import ModelConfig
from nnpassport.files.disk import sha256_of
from nnpassport.keys.keyfile import load_key, save_key
from nnpassport.scheme import (
    UnreadableClaimError,
    UnreadableKeyError,
    UnreadableModelError,
    UnsuitableModelError,
    UnwritableOutputError,
)

ROOT = Path(__file__).parent.parent
OWNER = "Alice | <b>*Liddell*</b> `rm`"
SIGNING = Ed25519PrivateKey.from_private_bytes(bytes(32))
PIXELS = torch.zeros(2, 3, 32, 32)
CONFIG = ModelConfig(
    architecture="alexnet",
    arguments={"classes": 10, "width": 0.25, "norm": "group"},
    classes=tuple("0123456789"),
    input_size=(3, 32, 32),
    mean=(0.5, 0.5, 0.5),
    std=(0.2, 0.2, 0.2),
    metrics={"accuracy": 0.875},
)


def drawn(build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval()


def write_claim(key, released, path):
    digest = tensors_digest(read_weights(released).tensors)
    claim = claim_of(key, SIGNING.public_key(), reference=digest, log10_alpha=-9, fidelity=None)
    write_signed(sign_claim(claim, SIGNING), path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A released folder of ours, its claim and its key."""
    folder = tmp_path_factory.mktemp("made")
    model = drawn(CONFIG.build)
    key = V2.draw_key(model, PIXELS, owner=OWNER, passports="derived")
    save_model(folder / "released", model, CONFIG)
    save_key(key, folder / "alice.key")
    write_claim(key, folder / "released", folder / "alice.claim.json")
    return folder, key


@pytest.fixture
def house(made, tmp_path):
    shutil.copytree(made[0], tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A network of Hugging Face's, as `save_pretrained` saves it, and a claim to it."""
    folder = tmp_path_factory.mktemp("vit")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.ViTConfig(
        intermediate_size=64, image_size=32, patch_size=8, num_labels=5, **sizes
    )
    model = drawn(lambda: transformers.ViTForImageClassification(config))
    model.save_pretrained(folder / "released")
    key = V2.draw_key(model, {"pixel_values": PIXELS}, owner="Alice", passports="derived")
    write_claim(key, folder / "released", folder / "alice.claim.json")
    return folder


def packaged(house, **options):
    return package(house / "released", house / "alice.claim.json", house / "hub", **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# What is in it


def test_the_folder_is_the_released_one_and_a_card(house):
    done = packaged(house, licence="apache-2.0")
    assert done.files == ("README.md", "bom.cdx.json", "config.json", "model.safetensors")
    found, source = contents(house / "hub"), contents(house / "released")
    assert {name: found[name] for name in source} == source
    assert load_model(house / "hub").config == CONFIG
    assert stat.S_IMODE((house / "hub").stat().st_mode) & 0o077 == 0o055
    assert {path.name for path in house.iterdir()} == {
        *("alice.key", "alice.claim.json", "released", "hub")
    }


def test_the_hub_s_own_parser_reads_the_card(house):
    packaged(house, licence="apache-2.0")
    card = ModelCard.load(house / "hub" / "README.md")
    assert card.data.to_dict() == {
        "license": "apache-2.0",
        "library_name": "nnpassport",
        "pipeline_tag": "image-classification",
        "tags": ["nnpassport", "model-ownership", "watermark"],
        "metrics": ["accuracy"],
    }
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()


def test_the_card_says_what_was_claimed_and_what_is_there(house, made):
    done = packaged(house)
    text = (house / "hub" / "README.md").read_text(encoding="utf-8")
    claim = house / "alice.claim.json"
    weights = house / "released" / "model.safetensors"
    assert done.claim == sha256_of(claim)
    for said in (
        *(sha256_of(claim), sha256_of(weights), done.weights, made[1].fingerprint),
        *(public_hex(SIGNING.public_key()), "passport-v2, 224", "| accuracy | 0.875 |", "# hub"),
    ):
        assert said in text
    assert text.count(done.weights) == 2
    assert "license:" not in text
    rows = [line for line in text.splitlines() if line.startswith("| owner |")]
    assert rows == [r"| owner | Alice \| &lt;b&gt;\*Liddell\*&lt;/b&gt; \`rm\` |"]


def test_the_upload_takes_the_folder_as_it_is(house, monkeypatch):
    packaged(house, licence="mit", publish_claim=True)
    checked = []
    # The only step that asks the hub's server: it validates the card, whose text it is given.
    monkeypatch.setattr(HfApi, "_validate_yaml", lambda _, content, **__: checked.append(content))
    files = HfApi()._prepare_upload_folder_additions(house / "hub", "")
    assert [each.path_in_repo for each in files] == [
        *("README.md", "bom.cdx.json", "config.json", "model.safetensors"),
        "nnpassport.claim.json",
    ]
    assert checked == [(house / "hub" / "README.md").read_text(encoding="utf-8")]
    claim = (house / "hub" / "nnpassport.claim.json").read_bytes()
    assert claim == (house / "alice.claim.json").read_bytes()


def test_a_network_of_hugging_face_loads_from_the_folder(vit, tmp_path):
    done = package(
        vit / "released", vit / "alice.claim.json", tmp_path / "hub", licence="cc-by-nc-4.0"
    )
    assert "config.json" in done.files
    loaded = transformers.ViTForImageClassification.from_pretrained(tmp_path / "hub").eval()
    first = transformers.ViTForImageClassification.from_pretrained(vit / "released").eval()
    with torch.no_grad():
        assert torch.equal(loaded(PIXELS).logits, first(PIXELS).logits)
    card = ModelCard.load(tmp_path / "hub" / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "image-classification"
    assert "ViTForImageClassification" in card.text


# What never is


def test_no_byte_of_the_secret_is_in_any_file(house, made):
    packaged(house, publish_claim=True)
    key = made[1]
    secret = json.loads((house / "alice.key").read_bytes())["secret"]["seed"]
    assert secret == key.seed.hex()
    traces = [key.seed, key.seed.hex().encode()]
    for layer in secrets_of(key).values():
        traces += [layer.mean_patch.numpy().tobytes()[:64], layer.signs.numpy().tobytes()[:64]]
    for name, data in contents(house / "hub").items():
        assert not any(trace in data for trace in traces), name


@pytest.mark.parametrize("name", ["alice.key", "config.json", "notes", "vocab.json"])
def test_a_folder_with_a_key_is_refused(house, name):
    shutil.copy(house / "alice.key", house / "released" / name)
    with pytest.raises(UnsuitableModelError, match="is a secret key"):
        packaged(house)
    document = json.loads((house / "alice.key").read_bytes())
    (house / "released" / name).write_text(
        json.dumps({"before": "x" * 10**6, **document}, indent=1)
    )
    with pytest.raises(UnsuitableModelError, match="is a secret key"):
        packaged(house)
    assert not (house / "hub").exists()


def test_a_folder_with_a_locked_key_or_a_private_one_is_refused(house, made):
    released = house / "released"
    save_key(made[1], released / "locked", passphrase="words")
    with pytest.raises(UnsuitableModelError, match="is a secret key"):
        packaged(house)
    (released / "locked").unlink()
    (released / "LICENSE").write_bytes(pem(SIGNING))
    with pytest.raises(UnsuitableModelError, match="is a private key"):
        packaged(house)


@pytest.mark.parametrize("name", ["training", "run.py", "pytorch_model.bin", ".netrc"])
def test_what_nobody_knows_is_refused(house, name):
    if name == "training":
        (house / "released" / name).mkdir()
    else:
        (house / "released" / name).write_bytes(b"x")
    with pytest.raises(UnsuitableModelError, match=f"also holds '{name}'"):
        packaged(house)


def test_a_claim_to_another_network_is_refused(house, vit):
    with pytest.raises(UnsuitableModelError, match="commits to a network with the digest"):
        package(house / "released", vit / "alice.claim.json", house / "hub")


def test_a_claim_that_was_altered_is_refused(house):
    claim = json.loads((house / "alice.claim.json").read_bytes())
    signature = claim["envelope"]["signatures"][0]["sig"]
    altered = signature[:-4] + ("AA==" if not signature.endswith("AA==") else "AQ==")
    text = (house / "alice.claim.json").read_text().replace(signature, altered)
    (house / "alice.claim.json").write_text(text)
    with pytest.raises(UnreadableClaimError):
        packaged(house)


def test_a_folder_that_is_there_is_left_alone(house):
    (house / "hub").mkdir()
    packaged(house)
    before = contents(house / "hub")
    with pytest.raises(UnwritableOutputError, match="is there already"):
        packaged(house)
    assert contents(house / "hub") == before


def test_a_failure_at_the_end_leaves_nothing(house):
    def fail(_):
        raise UnwritableOutputError("no")

    with pytest.raises(UnwritableOutputError, match="no"):
        packaged(house, finish=fail)
    assert {path.name for path in house.iterdir()} == {"alice.key", "alice.claim.json", "released"}


@pytest.mark.parametrize("licence", ["", "MIT or so", "a\n---", "x" * 65])
def test_a_licence_is_an_identifier(house, licence):
    with pytest.raises(UnsuitableModelError, match="is no identifier"):
        packaged(house, licence=licence)


def test_code_that_a_config_names_is_not_packaged(vit, tmp_path):
    shutil.copytree(vit / "released", tmp_path / "released")
    config = json.loads((vit / "released" / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "evil.Model"}
    (tmp_path / "released" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsuitableModelError, match="auto_map"):
        package(tmp_path / "released", vit / "alice.claim.json", tmp_path / "hub")


def test_weights_that_cannot_be_read_are_refused(house):
    (house / "released" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UnreadableModelError):
        packaged(house)
    (house / "released" / "model.safetensors").unlink()
    with pytest.raises(UnreadableModelError, match=r"has no model\.safetensors"):
        packaged(house)


# Signed


def pem(key, passphrase=None):
    lock = serialization.NoEncryption()
    if passphrase is not None:
        lock = serialization.BestAvailableEncryption(passphrase.encode())
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, lock)


def public_pem(key):
    return key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


@pytest.fixture(scope="module")
def signer():
    return ec.generate_private_key(ec.SECP256R1())


def model_signing(folder, public, *, cwd):
    command = Path(sys.executable).with_name("model_signing")
    words = ["verify", "key", folder, "--signature", folder / "model.sig", "--public_key", public]
    run = subprocess.run([command, *words], cwd=cwd, capture_output=True, text=True, check=False)
    return run.returncode, run.stdout + run.stderr


def test_the_command_signs_what_model_signing_verifies_until_a_byte_changes(call, house, signer):
    (house / "signer.pem").write_bytes(pem(signer))
    (house / "signer.pub.pem").write_bytes(public_pem(signer))
    code, out, err = call(
        *("package", house / "released", "--claim", house / "alice.claim.json"),
        *("-o", house / "hub", "--license", "mit", "--signing", house / "signer.pem", "--json"),
    )
    assert code == 0, err
    assert "model.sig" in json.loads(out)["files"]
    code, said = model_signing(house / "hub", house / "signer.pub.pem", cwd=house)
    assert code == 0, said
    weights = house / "hub" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    code, said = model_signing(house / "hub", house / "signer.pub.pem", cwd=house)
    assert code != 0
    assert "model.safetensors" in said
    assert b"PRIVATE" not in b"".join(contents(house / "hub").values())


def test_another_s_key_does_not_verify_it(house, signer):
    (house / "signer.pem").write_bytes(pem(signer, "words"))
    other = ec.generate_private_key(ec.SECP384R1())
    (house / "other.pub.pem").write_bytes(public_pem(other))
    packaged(
        house, finish=lambda folder: sign_folder(folder, house / "signer.pem", "words") and None
    )
    code, said = model_signing(house / "hub", house / "other.pub.pem", cwd=house)
    assert code != 0
    assert "mismatch" in said.lower()


def test_keys_that_model_signing_does_not_take_are_refused_beforehand(call, house):
    kinds = {
        "claim.pem": pem(SIGNING),
        "koblitz.pem": pem(ec.generate_private_key(ec.SECP256K1())),
        "locked.pem": pem(ec.generate_private_key(ec.SECP256R1()), "words"),
        "no.pem": b"x",
    }
    for name, data in kinds.items():
        (house / name).write_bytes(data)
        with pytest.raises(UnreadableKeyError, match="openssl ecparam"):
            sign_folder(house / "released", house / name)
        code, _, _ = call(
            *("package", house / "released", "--claim", house / "alice.claim.json"),
            *("-o", house / "hub", "--signing", house / name),
        )
        assert code == 2
        assert not (house / "hub").exists()


def test_without_the_package_signing_says_what_to_install(house, signer, monkeypatch):
    (house / "signer.pem").write_bytes(pem(signer))
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(UnreadableKeyError, match=r"pip install nnpassport\[signing\]"):
        sign_folder(house / "released", house / "signer.pem")


def test_a_key_made_by_openssl_as_documented_will_do(house):
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl binary to make a key with")
    made = subprocess.run(
        ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout"],
        capture_output=True,
        check=True,
    )
    (house / "signer.pem").write_bytes(made.stdout)
    assert sign_folder(house / "released", house / "signer.pem").name == "model.sig"
    assert os.path.getsize(house / "released" / "model.sig") > 0


@pytest.mark.slow
def test_the_commands_of_the_document_do_what_they_say(call, made, tmp_path, monkeypatch):
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl binary to make a key with")
    house, _ = made
    model = load_model(house / "released").model
    key = load_key(house / "alice.key")
    with torch.no_grad():
        for layer in key.context.layers:
            weight = model.get_submodule(layer.name).weight
            secret = secrets_of(key)[layer.name]
            weight[read_bits(weight, secret.mean_patch) != secret.signs] *= -1
    save_model(tmp_path / "released", model, CONFIG)
    shutil.copy(house / "alice.key", tmp_path)
    write_claim(key, tmp_path / "released", tmp_path / "alice.claim.json")
    monkeypatch.chdir(tmp_path)
    lines = commands((ROOT / "docs" / "interop.md").read_text(encoding="utf-8"))
    assert [words[:2] for words in lines] == [
        *(["nnpassport", "export"], ["nnpassport", "verify"], ["nnpassport", "verify"]),
        *(["nnpassport", "package"], ["openssl", "ecparam"], ["openssl", "ec"]),
        *(["nnpassport", "package"], ["model_signing", "verify"]),
    ]
    beside = Path(sys.executable).parent
    for words in lines:
        if words[0] == "nnpassport":
            code, _, said = call(*words[1:])
        else:
            path = f"{beside}{os.pathsep}{os.environ['PATH']}"
            run = subprocess.run(
                words, capture_output=True, text=True, check=False, env={**os.environ, "PATH": path}
            )
            code, said = run.returncode, run.stderr
        assert code == 0, (words, said)
    assert call("verify", "hub/", "--key", "alice.key")[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        *("released", "alice.key", "alice.claim.json", "alice.onnx", "hub", "signed"),
        *("signer.pem", "signer.pub.pem"),
    }
