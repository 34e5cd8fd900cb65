"""Golden files of formats that have none yet: one of each, written once and never again.

    python tests/golden/make.py

A file that is there is left alone, whatever this version would write. What each has to give is in
index.json. The keys are of seeds that stand here, so they are secret to nobody.
"""

import hashlib
import json
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.torch import save_file
from torch import nn

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent)]

from authority import Signer, certificate, new_key, pem  # noqa: E402 - found by the line above
from constructed import marked as constructed  # noqa: E402 - found by the line above
from constructed import small_alexnet  # noqa: E402
from rfc3161_client import HashAlgorithm, TimestampRequestBuilder  # noqa: E402

import nnpassport  # noqa: E402
from nnpassport.alignment.axes import Axes, Axis, Norm, Place  # noqa: E402
from nnpassport.claims.claim import claim_of, sign_claim, sign_statement  # noqa: E402
from nnpassport.claims.claimfile import read_signed, write_signed  # noqa: E402
from nnpassport.claims.diary import DIARY_FILE, STAMPS_FILE, begin, stated  # noqa: E402
from nnpassport.claims.timestamp import _in_order  # noqa: E402
from nnpassport.data.images import Normalisation, read_images  # noqa: E402
from nnpassport.embedding.checkpoint import save_model  # noqa: E402
from nnpassport.embedding.network.tensors import read_weights, tensors_digest  # noqa: E402
from nnpassport.embedding.train.keeping import Diary, Pace  # noqa: E402
from nnpassport.files.arrays import arrays_digest  # noqa: E402
from nnpassport.files.config import ModelConfig  # noqa: E402
from nnpassport.keys.answers import coins_of  # noqa: E402
from nnpassport.keys.context import (  # noqa: E402
    AnswersForm,
    Context,
    LayerShape,
    OrderForm,
    TriggerShape,
    base64_text,
    canonical_json,
)
from nnpassport.keys.geometry import Geometry  # noqa: E402
from nnpassport.keys.key import Key, sketch_digest  # noqa: E402
from nnpassport.keys.order import own_orders  # noqa: E402
from nnpassport.keys.ordered import chosen_axes, sketch_of  # noqa: E402
from nnpassport.verification.hearing import disclose  # noqa: E402

SEED = hashlib.sha256(b"the seed of the claims").digest()
SIGNING_SEED = hashlib.sha256(b"the signing key of the claims").digest()
SIGNING = Ed25519PrivateKey.from_private_bytes(SIGNING_SEED)
NONCE = bytes(range(16))
CONV = LayerShape("layer4.conv", (40, 3, 3, 3), (3, 8, 8), Geometry((1, 1), ((1, 1),) * 2, (1, 1)))
LINEAR = LayerShape("fc", (13, 10), (10, 64), Geometry())
PLAIN = Context("passport-v2", "Zoë", (CONV, LINEAR), None, NONCE)


def main():
    """Write what is missing, and the index of all."""
    keys()
    network()
    diary()
    statement()
    two_tokens()
    channels("channels")
    channels("directions")
    answers()
    cosine()
    order()
    rotated()
    index = HERE / "index.json"
    known = json.loads(index.read_text()) if index.exists() else {}
    for path in sorted(HERE.rglob("*")):
        name = path.relative_to(HERE).as_posix()
        if path.is_file() and path.suffix != ".py" and name not in {"index.json", *known}:
            known[name] = {
                "written": datetime.now(UTC).date().isoformat(),
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
            if name.startswith("key") and name.endswith(".key"):
                known[name] |= given(path)
    index.write_text(json.dumps(known, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def rotated():
    """A table of axes of a block with rotated positions: the fields that few networks need."""
    path = HERE / "axes-v1-rotated.json"
    if path.exists():
        return
    layers = [f"block.{name}.weight" for name in ("q", "k", "v", "o", "up", "down")]
    query, key, value, out, up, down = layers
    norm, readers = "block.norm.weight", (query, key, value, up)
    stream = [*(Place(name, 1) for name in readers), *(Place(n, 0) for n in (norm, out, down))]
    heads = [Place(n, 0, 0, 8, ((8, 1),)) for n in (query, key, value)]
    inside = (Place(value, 0, 0, 1, ((2, 8),)), Place(out, 1, 0, 1, ((2, 8),)))
    axes = (
        Axis(32, "permute", ("product", "rectified"), (Place(up, 0), Place(down, 1))),
        Axis(16, "orthogonal", ("layer norm", "square"), tuple(stream)),
        Axis(8, "inner", ("bilinear",), inside),
        Axis(2, "inner", ("batched",), (*heads, Place(out, 1, 0, 8, ((8, 1),)))),
    )

    def turned(*traits, home):
        names = [f"{home}.{each}.weight" for each in "qk"]
        both = tuple(Place(name, 0, at, 1, ((2, 8),)) for name in names for at in (0, 4))
        return Axis(4, "inner", traits, both)

    table = Axes(
        axes,
        reads=dict.fromkeys(readers, (1, norm)),
        norms={norm: Norm(None, False, 1.0)},
        batch_norms={},
        gains={down: "block.scale"},
        unknown=("cumprod",),
        pairs=(turned("rotated", home="block"), turned("negated", "rotated", home="next")),
    )
    path.write_bytes(table.to_bytes())


def given(path):
    """What a key has to give: its fingerprint, and a digest of all bits, pictures and labels."""
    key = nnpassport.load_key(path, passphrase="golden" if "locked" in path.name else None)
    derived = hashlib.sha256()
    for layer in key.context.layers:
        derived.update(key.signs_array(layer.name).tobytes())
    if key.context.triggers is not None:
        for array in key.trigger_arrays():
            derived.update(array.tobytes())
    if key.context.answers is not None:
        derived.update(coins_of(key).signs.tobytes())
    if key.context.order is not None:
        for _, units in sorted(own_orders(key).items()):
            derived.update(units.astype("<i8").tobytes())
    return {"fingerprint": key.fingerprint, "derived": derived.hexdigest()}


def keep(key, name, **options):
    """The key under this name, unless one is there."""
    if not (HERE / name).exists():
        nnpassport.save_key(key, HERE / name, **options)
        (HERE / name).chmod(0o644)  # it guards nothing


def keys():
    """Each form of a key file."""
    keep(Key(SEED, PLAIN), "key-v1.key")
    keep(Key(SEED, PLAIN), "key-v1-locked.key", passphrase="golden")
    keep(Key(SEED, PLAIN, text="Zoe"), "key-v1-text.key")
    shown = TriggerShape(6, 10, (3, 8, 8))
    triggers = Context("passport-v3", "Zoë", (CONV,), shown, NONCE)
    keep(Key(SEED, triggers), "key-v1-triggers.key")
    rng = np.random.default_rng(0)
    chosen = {
        layer.name: rng.standard_normal((2, *layer.passport)).astype(np.float32)
        for layer in (CONV, LINEAR)
    }
    keep(Key(SEED, PLAIN, passports=chosen), "key-v1-chosen.key")


def network():
    """A model folder that carries a key, the table of its axes is apart, and an exhibit for it."""
    folder = HERE / "network-v1"
    if folder.exists():
        return
    data = read_images("digits", split="test", size=32, channels=1)
    normalise = Normalisation.measured(data)
    plain = small_alexnet(width=0.125)
    example = torch.zeros(2, 1, 32, 32)
    key = nnpassport.V2.draw_key(plain, example, owner="Zoë", seed=SEED, passports="derived")
    keep(key, "key-v1-network.key")
    config = ModelConfig(
        architecture="alexnet",
        arguments={"classes": 10, "channels": 1, "norm": "batch", "width": 0.125},
        classes=data.classes,
        input_size=(1, 32, 32),
        mean=normalise.mean,
        std=normalise.std,
    )
    save_model(folder, constructed(nnpassport.V2, plain, key, data, normalise), config)
    reference = tensors_digest(read_weights(folder).tensors)
    claim = claim_of(key, SIGNING.public_key(), reference=reference, log10_alpha=-9, fidelity=None)
    write_signed(sign_claim(claim, SIGNING), HERE / "claim-v1-of-network.json")
    disclose(HERE / "claim-v1-of-network.json", key, HERE / "exhibit-v1", reference=folder)


def channels(name):
    """A key with a passport for each channel, bound to an anchor, and a network that carries it.

    "channels" is of a version whose passports had something in every direction, "directions" of
    the first whose metric has a row of weights.
    """
    if (HERE / f"key-v1-{name}.key").exists():
        return
    torch.manual_seed(0)
    data = read_images("digits", split="train", size=8, channels=1)
    images = Normalisation.measured(data)(data.images[:256])
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten()),
        nn.Linear(64 * 64, 10),
    ).train()
    model(images)
    model.eval()
    key = nnpassport.V2.draw_key(
        model, images[:2], owner="Zoë", seed=SEED, layers=["3"], seen=images
    )
    keep(key, f"key-v1-{name}.key")
    carrier = nnpassport.mark(model, key, images[:2])
    carrier.graft(images)
    state = carrier.released().state_dict()
    kept = {name: tensor for name, tensor in state.items() if name.startswith(("3.", "4."))}
    save_file(kept, HERE / f"suspect-v1-{name}.safetensors")


def statement():
    """A claim as an in-toto statement of the network's files."""
    path, folder = HERE / "claim-v1-in-toto.json", HERE / "network-v1"
    if path.exists():
        return
    key = nnpassport.load_key(HERE / "key-v1-network.key")
    reference = tensors_digest(read_weights(folder).tensors)
    claim = claim_of(key, SIGNING.public_key(), reference=reference, date="2026-01-31")
    names = ("config.json", "model.safetensors")
    files = {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in names}
    write_signed(sign_statement(claim, files, SIGNING), path)


def two_tokens():
    """A claim with two tokens; both are the golden one's, so the second says the same."""
    path = HERE / "claim-v1-two-tokens.json"
    if not path.exists():
        one = read_signed(HERE / "claim-v1-stamped.json")
        write_signed(one.with_token(one.response), path)


def diary():
    """Three entries, a kept checkpoint, and a token by an authority whose root lies beside it."""
    folder = HERE / "diary-v1"
    if folder.exists():
        return
    begin(folder, SIGNING, "golden")
    kept = Diary(folder, SIGNING, Pace(keep=2))
    weights = {"fc.weight": torch.arange(12.0).view(3, 4)}
    how = stated({"recipe": None})
    kept.enter_network(0, weights, configuration=how, data="ab" * 32)
    kept.enter_network(10, weights, metrics={"loss": 0.25}, note="the last")
    with tempfile.TemporaryDirectory() as temporary:
        root_key, key = new_key(), new_key()
        root = certificate("A golden root", root_key, ca=True)
        (folder / "root.pem").write_bytes(pem(root))
        signed = certificate("A golden authority", key, (root, root_key))
        signer = Signer(Path(temporary) / "tsa", key, signed)
        line = (folder / DIARY_FILE).read_bytes().split(b"\n")[2]
        query = TimestampRequestBuilder(line, HashAlgorithm.SHA256, nonce=True, cert_req=True)
        response = _in_order(signer.answer(query.build().as_bytes()))
    token = canonical_json({"entry": 2, "response": base64_text(response)})
    (folder / STAMPS_FILE).write_bytes(token + b"\n")


def answers():
    """A key of a mark in ordinary answers, bound to inputs and a baseline."""
    form, shape = AnswersForm("filters", 64, 450), TriggerShape(24, 5, (3, 8, 8))
    context = Context("answers", "Zoë", (), shape, NONCE, anchor="ab" * 32, answers=form)
    numbers = np.arange(24 * 3 * 8 * 8) * 7919 % 256
    inputs, said = numbers.astype(np.uint8).reshape(24, 3, 8, 8), np.arange(24 * 5) % 17 * 20 - 160
    baseline = said.astype(np.int16).reshape(24, 5)
    keep(Key(SEED, context, trigger_images=inputs, baseline=baseline), "key-v1-answers.key")


def cosine():
    """A key of waves on probabilities, bound as the one above."""
    form, shape = AnswersForm("waves", 40, 50), TriggerShape(24, 5, (3, 8, 8))
    context = Context("cosine", "Zoë", (), shape, NONCE, anchor="ab" * 32, answers=form)
    numbers = np.arange(24 * 3 * 8 * 8) * 7919 % 256
    inputs, said = numbers.astype(np.uint8).reshape(24, 3, 8, 8), np.arange(24 * 5) % 17 * 20 - 160
    baseline = said.astype(np.int16).reshape(24, 5)
    keep(Key(SEED, context, trigger_images=inputs, baseline=baseline), "key-v1-cosine.key")


def order():
    """A key of a mark in the order of hidden units: a table of axes, and a sketch of the anchor."""
    numbers = np.arange(40 * 30) * 7919 % 256 - 128
    arrays = {
        "0.weight": numbers[: 32 * 20].reshape(32, 20).astype(np.float32),
        "2.weight": numbers[: 16 * 32].reshape(16, 32).astype(np.float32) ** 3,
    }
    places = (Place("0.weight", 0), Place("2.weight", 1))
    axes = Axes((Axis(32, "permute", ("relu",), places),), {}, {}, {}, {})
    anchor, chosen = arrays_digest(arrays), chosen_axes(axes, arrays)
    sketch = sketch_of(axes, chosen, arrays, anchor=anchor, nonce=NONCE)
    form = OrderForm(axes.digest, sketch_digest(sketch), chosen)
    context = Context("order", "Zoë", (), None, NONCE, anchor=anchor, order=form)
    table = np.frombuffer(axes.to_bytes(), np.uint8)
    keep(Key(SEED, context, table=table, sketch=sketch), "key-v1-order.key")


if __name__ == "__main__":
    main()
