"""A judge who trusts nobody's code reaches our verdict with his own."""

import ast
import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.torch import load_file, save_file
from test_claim import KEY, OWNER
from test_seed import load_example
from torch import nn

from nnpassport.catalog import CATALOG, scheme_named
from nnpassport.claims.claim import PAYLOAD_TYPE as CLAIM_TYPE
from nnpassport.claims.claim import check_claim, claim_of, sign_statement
from nnpassport.claims.claimfile import document_of, read_signed, write_signed
from nnpassport.claims.signing import load_signing_key, public_hex, sign
from nnpassport.claims.timestamp import load_roots
from nnpassport.cli import app as cli
from nnpassport.embedding.network.equations import collapsed_affine, mean_patch
from nnpassport.embedding.network.models import build
from nnpassport.embedding.schemes.channels import ANY
from nnpassport.embedding.schemes.graft import graft
from nnpassport.embedding.schemes.signature import read_signature
from nnpassport.keys.context import canonical_json
from nnpassport.keys.key import Key
from nnpassport.keys.keyfile import load_key, save_key

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "examples" / "check_claim_independently.py"
GOLDEN = ROOT / "tests" / "golden"
FILES = ("claim.json", "owner.pub.pem", "owner.key", "suspect.safetensors")


def mark(model, key, *, wrong=0):
    """Turn each host filter round that reads the wrong bit; leave the first `wrong` bits wrong."""
    for layer in key.context.layers:
        weight = model.get_parameter(f"{layer.name}.weight")
        patch = mean_patch(key.layer_passport(layer.name), layer.weight, layer.geometry)
        gamma, _ = collapsed_affine(weight.detach().double(), patch)
        signs = key.layer_signs(layer.name)
        signs[:wrong] *= -1
        wrong = max(0, wrong - len(signs))
        with torch.no_grad():
            weight[gamma.sign() != signs] *= -1


def network():
    torch.manual_seed(0)
    return build("alexnet", classes=10, norm="group", width=0.25)


class Odd(nn.Sequential):
    """Layers of every geometry: stride, dilation, groups, uneven kernels, one axis, none."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 12, (3, 5), stride=(2, 1), padding=(2, 1), dilation=(1, 2)),
            nn.GroupNorm(3, 12),
            nn.ReLU(),
            nn.Conv2d(12, 16, (2, 2), padding=(0, 1), groups=4),
            nn.GroupNorm(4, 16),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(2),
            nn.Conv1d(16, 8, 2),
            nn.BatchNorm1d(8),
            nn.Flatten(),
            nn.Linear(24, 20),
            nn.ReLU(),
            nn.Linear(20, 10),
        )


def case(folder, model, *, text=None, wrong=0, layers=None):
    """A claim made by our commands, its key, and a suspect that carries it."""
    key = scheme_named("passport-v2").draw_key(
        model,
        torch.zeros(2, 3, 32, 32),
        owner="Zoë",
        layers=layers,
        text=text,
        seed=b"s" * 32,
        passports="derived",
    )
    mark(model, key, wrong=wrong)
    save_key(key, folder / "owner.key")
    save_file(model.state_dict(), folder / "suspect.safetensors")
    run_ours("claim", "keygen", "-o", folder / "owner.pem")
    new = ("claim", "new", "--key", folder / "owner.key", "--signing", folder / "owner.pem")
    run_ours(*new, "-o", folder / "claim.json")
    return key


def case_of_channels(folder):
    """The same with a passport for each channel, bound to the network before the mark."""
    torch.manual_seed(0)
    model = build("alexnet", classes=10, norm="batch", width=0.25)
    images = torch.randn(64, 3, 32, 32)
    with torch.no_grad():
        model.features[9].weight[5:9] = 0  # these carry nothing
        model.features[9].weight[::2] *= -1
    scheme = scheme_named("passport-v2")
    key = scheme.draw_key(
        model.eval(), images[:2], owner="Zoë", seed=b"s" * 32, seen=images, text="it is mine"
    )
    scheme.insert(model, key, images[:2])
    graft(model, images, limit=ANY)
    save_key(key, folder / "owner.key")
    save_file(scheme.released(model).state_dict(), folder / "suspect.safetensors")
    run_ours("claim", "keygen", "-o", folder / "owner.pem")
    new = ("claim", "new", "--key", folder / "owner.key", "--signing", folder / "owner.pem")
    run_ours(*new, "-o", folder / "claim.json")
    return key


def test_it_reads_passports_of_channels_as_we_do(tmp_path):
    key = case_of_channels(tmp_path)
    ours = scheme_named("passport-v2").verify(load_file(tmp_path / "suspect.safetensors"), key)
    assert ours.matches == ours.bits == 220
    code, said = check(tmp_path)
    assert code == 0, said
    matches, bits, log10_p = found(said)
    assert (matches, bits) == (ours.matches, ours.bits)
    assert log10_p == pytest.approx(ours.log10_p_value, abs=1e-4)
    document = json.loads((tmp_path / "owner.key").read_bytes())
    tensors = bytearray(base64.b64decode(document["secret"]["tensors"]))
    tensors[-1] ^= 1
    document["secret"]["tensors"] = base64.b64encode(tensors).decode()
    (tmp_path / "owner.key").write_bytes(canonical_json(document))
    code, said = check(tmp_path)
    assert code == 1
    assert "another fingerprint" in said


def run_ours(*words):
    """A command of ours, which must succeed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["nnpassport", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
    assert left.value.code in (None, 0)


def check(folder):
    """Exit code and output of the independent program."""
    command = [sys.executable, "-I", PROGRAM, *FILES]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def check_here(folder):
    """The same without a process of its own, for what is spoiled in many ways."""
    program, said = load_example("check_claim_independently"), io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        try:
            program.main(*(str(folder / name) for name in FILES))
        except SystemExit as left:
            code = left.code
        except Exception:  # as the interpreter does
            traceback.print_exc()
            code = 1
    if isinstance(code, str):
        return 1, said.getvalue() + code
    return code or 0, said.getvalue()


def found(said):
    """Matches, bits and log10 p in the output."""
    matches, bits = map(int, re.search(r"bits: (\d+) of (\d+) match", said).groups())
    return matches, bits, float(re.search(r"p-value: 10\^(\S+)", said)[1])


def ours(folder):
    """The same by our own code."""
    key = load_key(folder / "owner.key")
    verdict = read_signature(load_file(folder / "suspect.safetensors"), key)
    return verdict.matches, verdict.bits, pytest.approx(verdict.log10_p_value, abs=2e-6)


@pytest.mark.parametrize(("make", "layers"), [(network, None), (Odd, ["0", "3", "7", "10"])])
@pytest.mark.parametrize("text", [None, "(c) Z"])
@pytest.mark.parametrize("wrong", [0, 7])
def test_it_reads_what_we_read(tmp_path, make, layers, text, wrong):
    torch.manual_seed(0)
    key = case(tmp_path, make(), text=text, wrong=wrong, layers=layers)
    assert len(key.context.layers) == len(layers or ("8", "11", "14"))
    code, said = check(tmp_path)
    assert found(said) == ours(tmp_path), said
    matches, bits, log10_p = found(said)
    assert matches == bits - wrong
    assert code == (0 if log10_p <= -30.10299 else 1)
    assert ("at most α" in said) == (code == 0)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    case(folder, network())
    assert check(folder)[0] == 0
    return folder


@pytest.fixture
def folder(good, tmp_path):
    """The same files again, to be spoiled."""
    for name in FILES:
        shutil.copy(good / name, tmp_path / name)
    return tmp_path


def edit(path, change):
    document = json.loads(path.read_bytes())
    change(document)
    path.write_bytes(canonical_json(document))


def test_a_weight_of_the_other_sign_is_one_match_less(folder):
    before = found(check_here(folder)[1])
    path, key = folder / "suspect.safetensors", load_key(folder / "owner.key")
    weights = load_file(path)
    weights[f"{key.context.layers[-1].name}.weight"][3] *= -1
    save_file(weights, path)
    after = found(check_here(folder)[1])
    assert after == ours(folder)
    assert after[0] == before[0] - 1


def test_an_unrelated_network_is_refused(folder):
    torch.manual_seed(9)
    other = build("alexnet", classes=10, norm="group", width=0.25)
    save_file(other.state_dict(), folder / "suspect.safetensors")
    code, said = check(folder)
    assert code == 1
    assert found(said) == ours(folder)
    assert found(said)[2] > -5


def test_one_byte_of_the_claim_is_enough_to_refuse_it(folder):
    path = folder / "claim.json"
    data = path.read_bytes()
    for place in range(20, len(data), len(data) // 12):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        code, said = check_here(folder)
        assert code != 0
        assert "bits:" not in said
    assert check(folder)[0] == code  # the last one, by the program itself


def test_one_bit_of_the_seed_is_enough_to_refuse_it(folder):
    def change(document):
        seed = document["secret"]["seed"]
        document["secret"]["seed"] = f"{int(seed[:2], 16) ^ 1:02x}{seed[2:]}"

    edit(folder / "owner.key", change)
    code, said = check_here(folder)
    assert code == 1
    assert "REFUSED: the key has another fingerprint" in said


def test_another_key_another_owner_and_another_context_are_refused(folder):
    key = load_key(folder / "owner.key")
    save_key(Key(bytes(32), key.context), folder / "owner.key", overwrite=True)
    assert "another fingerprint" in check_here(folder)[1]
    other = scheme_named("passport-v2").draw_key(
        network(), torch.zeros(2, 3, 32, 32), passports="derived"
    )
    save_key(other, folder / "owner.key", overwrite=True)
    assert "another context" in check_here(folder)[1]
    shutil.copy(GOLDEN / "claim-v1-owner.pub.pem", folder / "owner.pub.pem")
    code, said = check_here(folder)
    assert code == 1
    assert "REFUSED: the signature does not hold" in said


def test_a_key_that_was_chosen_has_no_p_value(folder):
    key = load_key(folder / "owner.key")
    passports = {layer.name: key.layer_passport(layer.name) for layer in key.context.layers}
    save_key(Key(key.seed, key.context, passports=passports), folder / "owner.key", overwrite=True)
    code, said = check_here(folder)
    assert code == 1
    assert "no p-value" in said


def test_what_it_does_not_read_it_says(tmp_path):
    model = network()
    key = CATALOG["uchida"].scheme.draw_key(model, torch.zeros(2, 3, 32, 32))
    save_key(key, tmp_path / "owner.key")
    save_file(model.state_dict(), tmp_path / "suspect.safetensors")
    run_ours("claim", "keygen", "-o", tmp_path / "owner.pem")
    new = ("claim", "new", "--key", tmp_path / "owner.key", "--signing", tmp_path / "owner.pem")
    run_ours(*new, "-o", tmp_path / "claim.json")
    code, said = check(tmp_path)
    assert code == 2
    assert "NOT CHECKED: a key of scheme 'uchida'" in said
    assert "REFUSED" not in said


def test_a_key_of_a_scheme_that_it_does_not_read_is_not_refused(tmp_path):
    """Its table, sketch, inputs are bound to the seed, and no tensors that were chosen."""
    shutil.copy(GOLDEN / "key-v1-order.key", tmp_path / "owner.key")
    (tmp_path / "owner.key").chmod(0o600)
    save_file(network().state_dict(), tmp_path / "suspect.safetensors")
    run_ours("claim", "keygen", "-o", tmp_path / "owner.pem")
    new = ("claim", "new", "--key", tmp_path / "owner.key", "--signing", tmp_path / "owner.pem")
    run_ours(*new, "-o", tmp_path / "claim.json")
    code, said = check(tmp_path)
    assert code == 2
    assert "NOT CHECKED: a key of scheme 'order'" in said


def test_it_reads_a_claim_in_an_in_toto_statement(folder, good):
    """The form that `claim new --in-toto` writes; its type is signed with it."""
    key, signing = load_key(folder / "owner.key"), load_signing_key(good / "owner.pem")
    claim = claim_of(key, signing.public_key(), reference="ab" * 32)
    digest = hashlib.sha256((folder / "suspect.safetensors").read_bytes()).hexdigest()
    signed = sign_statement(claim, {"model.safetensors": digest}, signing)
    write_signed(signed, folder / "claim.json")
    code, said = check(folder)
    assert code == 0, said
    assert found(said) == ours(folder)
    assert f"statement: of the file 'model.safetensors', {digest}" in said
    assert f"suspect: {digest}" in said
    for change in (
        lambda d: d["envelope"].update(payloadType=CLAIM_TYPE),
        lambda d: d["envelope"].update(payloadType="text/plain"),
    ):
        edit(folder / "claim.json", change)
        code, said = check_here(folder)
        assert code != 0
        assert "bits:" not in said


def test_every_form_of_claim_in_the_golden_files_opens(capsys):
    program = load_example("check_claim_independently")
    pem = (GOLDEN / "claim-v1-owner.pub.pem").read_bytes()
    names = ("claim-v1", "claim-v1-in-toto", "claim-v1-two-tokens", "claim-v1-stamped")
    for name in names:
        file = json.loads((GOLDEN / f"{name}.json").read_bytes())
        claim = program.opened_claim(file, pem)
        assert claim["format"] == "nnpassport-claim"
    assert "statement: of the file" in capsys.readouterr().out


def test_of_several_tokens_it_shows_how_each_is_checked(folder):
    """Not whether they hold: that is openssl's to say."""

    def change(document):
        document["timestamp"] = {"response": "AA==", "also": ["AQ==", "Ag=="]}

    edit(folder / "claim.json", change)
    code, said = check_here(folder)
    assert code == 0
    assert "there are 3, of several authorities" in said
    assert said.count("openssl ts -verify") == 3
    assert "'.timestamp.also[1]'" in said


def test_a_key_that_was_drawn_for_another_public_key_is_refused(good):
    program, key = load_example("check_claim_independently"), load_key(good / "owner.key")
    for owner, holds in ((f"Zoë (ed25519:{'0' * 64})", False), ("Zoë", True)):
        stolen = Key(key.seed, replace(key.context, owner=owner))
        file, pem = signed_by_hand(program, stolen)
        if holds:
            assert program.opened_claim(file, pem)["owner"] == owner
        else:
            with pytest.raises(SystemExit):
                program.opened_claim(file, pem)


def signed_by_hand(program, key):
    """A claim file, and the public key, of a thief who signs another's key without our code."""
    thief = Ed25519PrivateKey.from_private_bytes(bytes(32))
    payload = canonical_json(
        {
            "owner": key.context.owner,
            "owner_key": public_hex(thief.public_key()),
            "context": key.context.encode().decode(),
        }
    )
    pem, spki = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    envelope = document_of(sign(payload, program.PLAIN, thief))
    return {"envelope": envelope}, thief.public_key().public_bytes(pem, spki)


def test_the_command_that_it_prints_checks_the_timestamp(tmp_path):
    if shutil.which("openssl") is None or shutil.which("jq") is None:
        pytest.skip("there is no openssl or jq, which the command uses")
    for name, file in (
        ("claim.json", "claim-v1-stamped.json"),
        ("owner.pub.pem", "claim-v1-owner.pub.pem"),
        ("root.pem", "claim-v1-root.pem"),
    ):
        shutil.copy(GOLDEN / file, tmp_path / name)
    save_key(KEY, tmp_path / "owner.key")
    torch.manual_seed(0)
    weights = {f"{each.name}.weight": torch.randn(each.weight) for each in KEY.context.layers}
    save_file(weights, tmp_path / "suspect.safetensors")
    code, said = check(tmp_path)
    assert code == 1
    assert found(said) == ours(tmp_path)
    script = "\n".join(line for line in said.splitlines() if line.startswith("  "))
    stamp = check_claim(
        read_signed(tmp_path / "claim.json"), OWNER, roots=load_roots(tmp_path / "root.pem")
    ).timestamp
    script = script.replace("-CAfile", f"-attime {int(stamp.time.timestamp())} -CAfile")
    done = subprocess.run(
        ["sh", "-e", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "Verification: OK" in done.stdout + done.stderr, done.stderr


def test_the_vectors_of_a_claims_key_hold_for_both():
    page = (ROOT / "docs" / "claim-format.md").read_text(encoding="utf-8")
    vectors = json.loads(page.split("```json\n")[1].split("```")[0])
    assert vectors["payload_sha256"] == hashlib.sha256(vectors["payload"].encode()).hexdigest()
    claim, seed = json.loads(vectors["payload"]), bytes.fromhex(vectors["key_seed"])
    assert vectors["fingerprint"] == claim["fingerprint"] == KEY.fingerprint
    context, theirs = claim["context"].encode(), load_example("check_claim_independently").stream
    assert context == KEY.context.encode()
    assert set(vectors["signs"]) == set(vectors["passports"]) == {"layer4.conv", "fc"}
    for name, first in vectors["passports"].items():
        drawn = theirs(seed, context, b"passport", name, 64).view(np.int8)
        assert drawn[drawn != -128][:8].tolist() == first
        assert (KEY.layer_passport(name).flatten()[:8] * 127).round().tolist() == first
        packed = theirs(seed, context, b"signs", name, 5)
        signs = "".join("1" if sign > 0 else "0" for sign in KEY.layer_signs(name))
        assert vectors["signs"][name] == signs
        assert "".join(map(str, np.unpackbits(packed)))[: len(signs)] == signs


def test_one_layer_several_times_is_not_counted_as_often():
    """Ten times the same coins: the p-value of thirteen bits would be that of 130."""
    layer = json.loads(KEY.context.encode())["layers"][1]
    document = json.loads(KEY.context.encode()) | {"layers": [layer] * 10}
    secret = {"seed": KEY.seed.hex(), "context": canonical_json(document).decode(), "text": None}
    weights = {"fc.weight": np.ones((13, 10), np.float32)}
    with pytest.raises(SystemExit):
        load_example("check_claim_independently").matches(weights, secret, {})


def test_it_is_short_and_imports_nothing_of_ours():
    source = PROGRAM.read_text(encoding="utf-8")
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module.split(".")[0])
    assert modules - set(sys.stdlib_module_names) == {"numpy", "safetensors", "cryptography"}
    assert (
        len(source.splitlines()) <= 235
    )  # a fifth of it passports of channels, a tenth statements and tokens
