"""What starts at once: commands and modules that need no torch, and a package that loads lazily."""

import ast
import hashlib
import importlib
import inspect
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

import nnpassport
from nnpassport.attacks import moves, perturbation, removal, table
from nnpassport.attacks.acts import ACTS
from nnpassport.catalog import ADAPTERS, CATALOG, Entry
from nnpassport.claims.claim import claim_of, sign_claim
from nnpassport.claims.claimfile import write_signed
from nnpassport.claims.signing import save_signing_key
from nnpassport.embedding.schemes.uchida import UCHIDA
from nnpassport.files.config import ModelConfig, config_bytes
from nnpassport.ground import lazy
from nnpassport.keys.context import Context, LayerShape, TriggerShape
from nnpassport.keys.geometry import Geometry
from nnpassport.keys.key import Key
from nnpassport.keys.keyfile import save_key
from nnpassport.keys.patches import mean_patch
from nnpassport.lab import audit

ROOT = Path(__file__).parent.parent
SLOW = (
    *("torch", "scipy", "sklearn", "pyarrow", "accelerate", "matplotlib", "jaxtyping", "PIL"),
    *("httpx", "joblib", "jinja2", "transformers", "onnx", "datasets", "tensorboard"),
)
"""Packages that take a noticeable part of a second, or far more, to import."""

GROUND = (
    *(
        "scheme",
        "keys.geometry",
        "ground.lazy",
        "embedding.train.processes",
        "files.disk",
        "keys.chance",
        "catalog",
    ),
    *("attacks.table", "keys.context", "keys.pictures", "keys.derive", "keys.key"),
    *("keys.keyfile", "claims.claim", "claims.claimfile", "claims.signing"),
    *("claims.timestamp", "claims.standing", "claims.rules", "report.page"),
    *("report.tracks", "report.words", "report.charts", "report.verdict"),
    *("files.arrays", "files.weights", "files.config", "files.pickles.torchfile"),
    *("keys.reading", "keys.patches", "keys.adapters", "claims.facts"),
    *("report.comparison", "keys.order", "files.suspect"),
    *(
        f"{home}.{path.stem}"
        for home in ("alignment", "verification")
        for path in sorted((ROOT / "src" / "nnpassport" / home).glob("[!_]*.py"))
    ),
    *("verification.remote.probe", "verification.remote.finding", "verification.remote.labels"),
)
"""What a judge's side is made of: it does without torch, also where none is installed."""

COMMANDS = tuple(
    f"cli.{path.stem}"
    for path in sorted((ROOT / "src" / "nnpassport" / "cli").glob("*.py"))
    if "import typer" in path.read_text(encoding="utf-8")
)

WITHOUT_TORCH = """
import sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch" or name.startswith("torch."):
            raise ModuleNotFoundError("No module named 'torch'", name="torch")

sys.meta_path.insert(0, NoTorch())
"""

WATCHED = """
import sys
from nnpassport.cli.app import main
sys.argv[0] = "nnpassport"
try:
    main()
finally:
    loaded = {name.partition(".")[0] for name in sys.modules}
    print("loaded:", *sorted(loaded & set(SLOW)), file=sys.stderr)
"""


def python(program, *words, cwd=None):
    """What a program prints in a process of its own that ends well."""
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A key with layers and triggers, a signed claim to it, and the pair that signed."""
    folder = tmp_path_factory.mktemp("house")
    conv = LayerShape("conv", (40, 3, 3, 3), (3, 8, 8), Geometry((1, 1), ((1, 1),) * 2, (1, 1)))
    triggers = TriggerShape(6, 10, (3, 8, 8))
    key = Key(bytes(32), Context("passport-v3", "Alice", (conv,), triggers, bytes(16)))
    signing = Ed25519PrivateKey.from_private_bytes(bytes(32))
    save_key(key, folder / "alice.key")
    save_key(key, folder / "locked.key", passphrase="open sesame")
    save_signing_key(signing, folder / "signing.pem", folder / "signing.pub.pem")
    claim = claim_of(key, signing.public_key(), reference=None, log10_alpha=-9, fidelity=None)
    write_signed(sign_claim(claim, signing), folder / "alice.claim.json")
    return folder


# Commands


@pytest.mark.parametrize(
    "words",
    [
        "--help",
        "--version",
        "verify --help",
        "leaderboard --help",
        "schemes",
        "schemes --json",
        "attacks",
        "attacks --json",
        "key show alice.key",
        "claim show alice.claim.json",
        "claim verify alice.claim.json --owner signing.pub.pem --key alice.key",
        "claim keygen --out drawn.pem",
        "compare --help",
        "claim new --key alice.key --signing signing.pem --out new.claim.json",
    ],
)
def test_a_command_that_needs_no_network_loads_nothing_slow(house, words):
    out, errors = python(f"SLOW = {SLOW!r}{WATCHED}", *words.split(), cwd=house)
    assert out or errors
    assert errors.splitlines()[-1] == "loaded:"


def test_a_locked_key_is_shown_without_torch_too(house, monkeypatch):
    monkeypatch.setenv("NNPASSPORT_PASSPHRASE", "open sesame")
    out, errors = python(f"SLOW = {SLOW!r}{WATCHED}", "key", "show", "locked.key", cwd=house)
    assert "Alice" in out
    assert errors.splitlines()[-1] == "loaded:"


def test_the_watch_sees_what_a_command_loads(house):
    """Else the tests above would pass whatever is loaded."""
    _, errors = python(f"import jinja2\nSLOW = {SLOW!r}{WATCHED}", "--version", cwd=house)
    assert errors.splitlines()[-1] == "loaded: jinja2"


def test_the_commands_say_the_same_where_torch_is_not_installed(house):
    for words in (["key", "show", "alice.key", "--json"], ["schemes", "--json"]):
        program = "from nnpassport.cli.app import main; main()"
        assert python(program, *words, cwd=house) == python(
            WITHOUT_TORCH + program, *words, cwd=house
        )


@pytest.fixture(scope="module")
def suspects(house):
    """A network of one layer that has all of the key's bits, and one that has none: three kinds."""
    key = nnpassport.load_key(house / "alice.key")
    (layer,) = key.context.layers
    patch = mean_patch(key.passport_array("conv"), layer.weight, layer.geometry)[0]
    weight = (key.signs_array("conv")[:, None] * patch).reshape(layer.weight).astype(np.float32)
    for name, sign in (("owned", 1), ("strange", -1)):
        state = {"conv.weight": torch.from_numpy(sign * weight)}
        save_file(state, house / f"{name}.safetensors")
        save_file({"conv.weight": state["conv.weight"].bfloat16()}, house / f"{name}16.safetensors")
        torch.save(state, house / f"{name}.pt")
        node = helper.make_node("Conv", ["x", "conv.weight"], ["y"])
        ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in "xy"]
        held = [numpy_helper.from_array(sign * weight, "conv.weight")]
        graph = helper.make_graph([node], "network", ends[:1], ends[1:], held)
        onnx.save(helper.make_model(graph), house / f"{name}.onnx")
    return house


@pytest.mark.parametrize("name", ["{}.safetensors", "{}16.safetensors", "{}.pt", "{}.onnx"])
def test_a_mark_is_verified_where_torch_is_not_installed(suspects, name):
    program = "import sys\nfrom nnpassport.cli.app import main\nmain()"
    for which, code, matches in (("owned", 0, 40), ("strange", 1, 0)):
        words = ["verify", name.format(which), "--key", "alice.key", "--alpha", "-9", "--json"]
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT_TORCH + program, *words],
            capture_output=True,
            text=True,
            cwd=suspects,
            check=False,
        )
        assert done.returncode == code, done.stderr
        facts = json.loads(done.stdout)
        assert (facts["matches"], facts["bits"]) == (matches, 40)
        assert facts["made_with"]["torch"] is None


def test_what_needs_torch_says_so_where_it_is_not_installed(suspects):
    strange = ModelConfig("package.module:factory", {}, ("a", "b"), (3, 8, 8), (0.5,) * 3, (1,) * 3)
    (suspects / "net").mkdir()
    (suspects / "net" / "config.json").write_bytes(config_bytes(strange))
    shutil.copy(suspects / "owned.safetensors", suspects / "net" / "model.safetensors")
    words = ["verify", "owned.pt", "--key", "alice.key", "--align", "net"]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{WITHOUT_TORCH}from nnpassport.cli.app import main\nmain()",
            *words,
        ],
        capture_output=True,
        text=True,
        cwd=suspects,
        check=False,
    )
    assert done.returncode == 2
    assert "needs PyTorch" in done.stderr
    assert "claim axes" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


# Modules


def test_the_ground_and_every_command_module_import_where_torch_is_not_installed():
    assert {"cli.app", "cli.options", "cli.verify", "cli.claim"} <= set(COMMANDS)
    lines = "\n".join(f"import nnpassport.{name}" for name in (*GROUND, *COMMANDS))
    python(f"{WITHOUT_TORCH}{lines}\nassert 'torch' not in sys.modules")


def test_without_torch_a_key_derives_the_same_numbers(house):
    program = f"""{WITHOUT_TORCH}
import hashlib
from nnpassport import load_key
key = load_key("alice.key")
numbers = (key.signs_array("conv"), key.passport_array("conv"), *key.trigger_arrays())
print(*(hashlib.sha256(each.tobytes()).hexdigest() for each in numbers), key.fingerprint)
"""
    key = nnpassport.load_key(house / "alice.key")
    tensors = (key.layer_signs("conv"), key.layer_passport("conv"), *key.trigger_set())
    ours = [hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for tensor in tensors]
    assert python(program, cwd=house)[0].split() == [*ours, key.fingerprint]


def test_importing_the_package_loads_what_loads_late_and_nothing_else():
    program = """
import sys
before = set(sys.modules)
import nnpassport
assert nnpassport.__version__ and set(nnpassport.__all__) <= set(dir(nnpassport))
print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))
print(*sorted(name for name in sys.modules if name.startswith("nnpassport")))
"""
    packages, modules = python(program)[0].splitlines()
    assert modules == "nnpassport nnpassport.ground nnpassport.ground.lazy"
    assert set(packages.split()) <= {"nnpassport", *sys.stdlib_module_names}


# Names that are loaded when they are asked for


@pytest.mark.parametrize("package", [nnpassport, audit], ids=["nnpassport", "audit"])
def test_every_public_name_is_there_and_is_what_mypy_is_told(package):
    """The imports that type checkers see are those that are carried out."""
    (seen,) = (
        node
        for node in ast.parse(inspect.getsource(package)).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    told = {alias.name: node.module for node in seen.body for alias in node.names}
    assert told == package._HOMES
    assert set(package.__all__) <= set(told) <= set(dir(package))
    for name, module in told.items():
        assert getattr(package, name) is getattr(importlib.import_module(module), name)


def test_a_star_import_brings_all_names():
    names = {}
    exec("from nnpassport import *", names)  # only legal at the top of a module
    assert {name for name in names if not name.startswith("__")} == set(nnpassport.__all__)
    assert names["V2"] is nnpassport.V2


def test_modules_are_attributes_without_an_import_of_their_own():
    """As they were when the package loaded them all."""
    program = """
import nnpassport
print(nnpassport.scheme.__name__, nnpassport.catalog.CATALOG["pan"].source, nnpassport.cli.app.app)
"""
    assert python(program)[0].startswith("nnpassport.scheme Zha20 ")


def test_an_unknown_name_is_an_attribute_error_and_a_missing_dependency_is_not(tmp_path):
    for name in ("V4", "_private", "__wrapped__"):
        assert not hasattr(nnpassport, name)
    with pytest.raises(AttributeError, match="module 'nnpassport' has no attribute 'V4'"):
        _ = nnpassport.V4
    with pytest.raises(ImportError, match="cannot import name 'V4'"):
        exec("from nnpassport import V4")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "__init__.py").write_text(
        "from nnpassport.ground.lazy import lazily\n__getattr__, __dir__ = lazily(__name__, {})\n"
    )
    (tmp_path / "half" / "broken.py").write_text("import not_installed\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        half = importlib.import_module("half")
        with pytest.raises(ModuleNotFoundError, match="not_installed"):
            _ = half.broken
    sys.modules.pop("half")


# The tables


def test_the_catalog_names_schemes_by_their_own_names():
    for name, entry in {**CATALOG, **ADAPTERS}.items():
        assert entry.scheme.name == name
        assert entry.scheme is entry.scheme
        assert callable(entry.published_key) or entry.published_key is None
    assert [n for n, e in CATALOG.items() if e.published_key] == ["frontier-stitching", "ewe"]


def test_a_row_may_hold_a_scheme_as_well_as_its_place():
    mine = replace(UCHIDA, bits=8)
    entry = Entry(mine, "ours", "bits", lambda key: key)
    assert entry.scheme is mine
    assert entry.published_key("key") == "key"


def test_every_attack_has_an_act_and_every_act_is_an_attack():
    assert list(ACTS) == list(table.ATTACKS)
    assert tuple(perturbation.KINDS) == table.KINDS
    assert tuple(moves.KINDS) == table.MOVES
    assert tuple(removal.FORMS) == table.FORMS
    for name, attack in table.ATTACKS.items():
        acts = {**ACTS, name: lambda subject, strength: (subject, strength)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("nnpassport.attacks.acts.ACTS", acts)
            assert attack.run("subject", 0.5) == ("subject", 0.5)


def test_a_row_of_an_attack_may_hold_what_it_does_as_well():
    attack = table.Attack(table.REMOVAL, "mine", lambda subject, strength: (subject, strength))
    assert attack.run("subject", 0.5) == ("subject", 0.5)


def test_the_tables_print_without_the_schemes_and_the_attacks(call):
    for words, names in ((("schemes",), CATALOG), (("attacks",), table.ATTACKS)):
        code, out, _ = call(*words, "--json")
        assert code == 0
        listed = json.loads(out)
        assert [row if isinstance(row, str) else row["name"] for row in listed] == list(names)


def test_load_finds_what_an_address_names():
    found = lazy.load("nnpassport.embedding.schemes.uchida:UCHIDA")
    assert found is UCHIDA


def test_a_service_is_probed_where_torch_is_not_installed(house, tmp_path):
    shape = TriggerShape(100, 10, (1, 8, 8))
    key = Key(bytes(range(32)), Context("adi", "Alice", (), shape, bytes(16)))
    save_key(key, tmp_path / "asked.key")
    program = f"""{WITHOUT_TORCH}
import json, threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from nnpassport import load_key
from nnpassport.cli.app import main
from nnpassport.verification.remote.services import png

images, labels = load_key("asked.key").trigger_arrays()
known = {{png(image): str(label) for image, label in zip(images, labels)}}

class Service(BaseHTTPRequestHandler):
    def do_POST(self):
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        said = json.dumps([{{"label": known.get(sent, "0"), "score": 0.9}}]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)
    def log_message(self, *_):
        pass

server = HTTPServer(("127.0.0.1", 0), Service)
threading.Thread(target=server.serve_forever, daemon=True).start()
sys.argv += [f"http://127.0.0.1:{{server.server_port}}/"]
main()
"""
    out, _ = python(program, "probe", "--key", "asked.key", "--json", cwd=tmp_path)
    facts = json.loads(out)
    assert (facts["accepted"], facts["matches"], facts["bits"]) == (True, 100, 100)
    assert facts["chance"] == 0.1
