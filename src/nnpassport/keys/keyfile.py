"""The file that holds a key: private from its first byte, and encrypted if its owner wants it."""

import hashlib
import os
import secrets
import unicodedata
from contextlib import suppress
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from nnpassport.files.disk import refuse_special
from nnpassport.keys.context import (
    Context,
    base64_bytes,
    base64_text,
    canonical_json,
    parse_canonical,
)
from nnpassport.keys.key import Key
from nnpassport.scheme import OwnershipError, UnreadableKeyError, UnwritableOutputError

MAX_FILE_BYTES = 2**28
"""The largest key file that is read."""

_FORMAT = "nnpassport-key"
_VERSION = 1
_SCRYPT = {"n": 2**15, "r": 8, "p": 1}
_SCRYPT_N_ALLOWED = tuple(2**power for power in range(14, 19))
"""Costs that are accepted from a file: at most 256 MiB of memory."""
_PARTS = {"seed", "context", "text", "tensors", "fingerprint"}


def save_key(
    key: Key, path: str | Path, *, passphrase: str | None = None, overwrite: bool = False
) -> None:
    """Write `key` to a file that only its owner may read (mode 0600 from the first byte).

    With a passphrase everything is encrypted: scrypt, then AES-256-GCM. The file appears complete
    or not at all.

    Raises:
        UnwritableOutputError: the file exists and `overwrite` is False, the folder cannot be
            written to, the disk is full, or the key is larger than what is read back.
        UnreadableKeyError: the passphrase is empty.
    """
    path = Path(path)
    if not overwrite and os.path.lexists(path):
        raise UnwritableOutputError(
            f"{path} exists already; a key that is overwritten is lost for good: choose another "
            "name, or ask for overwriting"
        )
    payload = _payload(key)
    header: dict[str, Any] = {"format": _FORMAT, "version": _VERSION, "protection": None}
    if passphrase is None:
        data = canonical_json({**header, "secret": payload})
    else:
        salt, nonce = secrets.token_bytes(16), secrets.token_bytes(12)
        protection = {"kdf": "scrypt", **_SCRYPT, "cipher": "AES-256-GCM"}
        header["protection"] = {**protection, "salt": salt.hex(), "nonce": nonce.hex()}
        cipher = AESGCM(_stretch(passphrase, salt, _SCRYPT["n"]))
        sealed = cipher.encrypt(nonce, canonical_json(payload), canonical_json(header))
        data = canonical_json({**header, "secret": base64_text(sealed)})
    if len(data) > MAX_FILE_BYTES:
        raise UnwritableOutputError(
            f"the key takes {len(data)} bytes, but at most {MAX_FILE_BYTES} are read back; use "
            "derived passports or fewer layers"
        )
    _write_private(path, data)


def load_key(path: str | Path, *, passphrase: str | None = None) -> Key:
    """Read a key that `save_key` wrote.

    Raises:
        UnreadableKeyError: the file is missing, too large, corrupt, altered, of another version,
            or protected by another passphrase than the one given.
    """
    path = Path(path)
    document = parse_canonical(_read(path), f"key file {path}", limit=MAX_FILE_BYTES)
    header = {name: value for name, value in document.items() if name != "secret"}
    known = set(header) == {"format", "version", "protection"} and "secret" in document
    if not known or (header["format"], header["version"]) != (_FORMAT, _VERSION):
        raise UnreadableKeyError(
            f"{path} is not a key file of version {_VERSION}; needed: a file that `save_key` "
            "wrote; use the original file, or the release that wrote it"
        )
    if header["protection"] is None:
        if passphrase is not None:
            raise UnreadableKeyError(
                f"{path} is not protected, but a passphrase was given; load it without one"
            )
        return _key_from(path, document["secret"])
    if passphrase is None:
        raise UnreadableKeyError(
            f"{path} is protected by a passphrase, but none was given; give it"
        )
    opened = _unseal(path, header, document["secret"], passphrase)
    payload = parse_canonical(opened, f"secret part of {path}", limit=MAX_FILE_BYTES)
    return _key_from(path, payload)


def _payload(key: Key) -> dict[str, Any]:
    tensors = key.explicit_tensors()
    return {
        "seed": key.seed.hex(),
        "context": key.context.encode().decode("ascii"),
        "text": key.text,
        "tensors": base64_text(save_tensors(tensors)) if tensors else None,
        "fingerprint": key.fingerprint,
    }


def _key_from(path: Path, payload: Any) -> Key:
    """The key in a payload; errors say nothing of what the payload holds."""
    key, reason = None, "its parts are of the wrong kind"
    try:
        tensors = load_tensors(base64_bytes(payload["tensors"])) if payload["tensors"] else {}
        kinds = ("passports", "signs", "projections", "metrics", "sketch")
        groups: dict[str, dict[str, Any]] = {kind: {} for kind in kinds}
        for name, tensor in tensors.items():
            group, _, layer = name.partition("/")
            if group in groups:
                groups[group][layer] = tensor
        key = Key(
            seed=bytes.fromhex(payload["seed"]),
            context=Context.decode(payload["context"].encode("ascii")),
            text=payload["text"],
            passports=groups["passports"] or None,
            signs=groups["signs"] or None,
            projections=groups["projections"] or None,
            metrics=groups["metrics"] or None,
            trigger_images=tensors.get("trigger_images"),
            trigger_labels=tensors.get("trigger_labels"),
            trigger_choices=tensors.get("trigger_choices"),
            baseline=tensors.get("baseline"),
            table=tensors.get("table"),
            sketch=groups["sketch"] or None,
        )
        if set(payload) != _PARTS or set(key.explicit_tensors()) != set(tensors):
            key, reason = None, "it has parts that are not known here"
        elif key.fingerprint != payload["fingerprint"]:
            key, reason = None, "its fingerprint does not match its content"
    except OwnershipError as error:
        reason = str(error)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, SafetensorError):
        pass
    # Raised out here so that no error with secret bytes in it is carried along as the context.
    if key is None:
        raise UnreadableKeyError(
            f"the key in {path} cannot be used: {reason}; needed: the file as `save_key` wrote it; "
            "use a backup"
        )
    return key


def _stretch(passphrase: str, salt: bytes, cost: int) -> bytes:
    if not passphrase:
        raise UnreadableKeyError(
            "the passphrase is empty; needed: at least one character; leave it out altogether to "
            "have no protection"
        )
    # NFC: keyboards of different systems compose accents differently.
    secret = unicodedata.normalize("NFC", passphrase).encode("utf-8", "surrogatepass")
    memory = 2 * 128 * _SCRYPT["r"] * cost
    return hashlib.scrypt(
        secret, salt=salt, n=cost, r=_SCRYPT["r"], p=_SCRYPT["p"], maxmem=memory, dklen=32
    )


def _unseal(path: Path, header: dict[str, Any], sealed: Any, passphrase: str) -> bytes:
    protection = header["protection"]
    try:
        cost, salt = protection["n"], bytes.fromhex(protection["salt"])
        nonce, secret = bytes.fromhex(protection["nonce"]), base64_bytes(sealed)
        expected = {"kdf": "scrypt", **_SCRYPT, "n": cost, "cipher": "AES-256-GCM"}
        expected |= {"salt": salt.hex(), "nonce": nonce.hex()}
        known = protection == expected and (len(salt), len(nonce)) == (16, 12)
    except (KeyError, TypeError, ValueError, AttributeError):
        known = False
    # Checked before it is used: scrypt would take all the memory that a hostile file asks for.
    if not known or type(cost) is not int or cost not in _SCRYPT_N_ALLOWED:
        raise UnreadableKeyError(
            f"{path} is protected in a way that is not known here; needed: scrypt with n from "
            f"{_SCRYPT_N_ALLOWED[0]} to {_SCRYPT_N_ALLOWED[-1]}, and AES-256-GCM; use the original "
            "file"
        )
    try:
        cipher = AESGCM(_stretch(passphrase, salt, cost))
        return cipher.decrypt(nonce, secret, canonical_json(header))
    except InvalidTag:
        raise UnreadableKeyError(
            f"{path} does not open: the passphrase is wrong or the file was altered; try the "
            "passphrase again, or a backup of the file"
        ) from None


def _read(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise UnreadableKeyError(
                f"there is no key file at {path}; needed: a file that `save_key` wrote; check the "
                "path"
            )
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UnreadableKeyError(
            f"{path} cannot be read ({error.strerror}); needed: a readable file; check its "
            "permissions"
        ) from error


def _write_private(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    refuse_special(path)
    try:
        # Not `open` and `chmod`: for a moment everybody could read the file.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UnwritableOutputError(
            f"{path} cannot be written ({error.strerror}); needed: a folder that exists, may be "
            "written to and has space; choose another folder"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
