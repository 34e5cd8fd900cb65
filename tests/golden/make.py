"""Golden files of formats that have none yet: one of each, written once and never again.

    python tests/golden/make.py

A file that is there is left alone, whatever this version would write. What each has to give is in
index.json. The keys are of seeds that stand here, so they are secret to nobody.
"""

import hashlib
import json
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.torch import save_file
from torch import nn

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent)]

from constructed import marked as constructed  # noqa: E402 - found by the line above
from constructed import small_alexnet  # noqa: E402

import nnpassport  # noqa: E402
from nnpassport.claims.claim import claim_of, sign_claim  # noqa: E402
from nnpassport.claims.claimfile import write_signed  # noqa: E402
from nnpassport.data.images import Normalisation, read_images  # noqa: E402
from nnpassport.embedding.checkpoint import save_model  # noqa: E402
from nnpassport.embedding.network.tensors import read_weights, tensors_digest  # noqa: E402
from nnpassport.files.config import ModelConfig  # noqa: E402
from nnpassport.keys.context import Context, LayerShape, TriggerShape  # noqa: E402
from nnpassport.keys.geometry import Geometry  # noqa: E402
from nnpassport.keys.key import Key  # noqa: E402
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
    channels("channels")
    channels("directions")
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


def given(path):
    """What a key has to give: its fingerprint, and a digest of all bits, pictures and labels."""
    key = nnpassport.load_key(path, passphrase="golden" if "locked" in path.name else None)
    derived = hashlib.sha256()
    for layer in key.context.layers:
        derived.update(key.signs_array(layer.name).tobytes())
    if key.context.triggers is not None:
        for array in key.trigger_arrays():
            derived.update(array.tobytes())
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


if __name__ == "__main__":
    main()
