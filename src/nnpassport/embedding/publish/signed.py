"""Sign a folder as OpenSSF Model Signing does, for the `model_signing` command to verify."""

from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from nnpassport.claims.signing import read_small
from nnpassport.files.disk import brief
from nnpassport.scheme import UnreadableKeyError, UnwritableOutputError

SIGNATURE_FILE = "model.sig"
_CURVES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)
_MAX_PEM = 2**16


def check_signing_key(path: Path, passphrase: str | None = None) -> None:
    """Refuse what `model_signing` could not sign with.

    Raises:
        UnreadableKeyError: missing, locked, or no private key on one of its curves.
    """
    data = read_small(path, "private key", _MAX_PEM, UnreadableKeyError)
    try:
        key = load_pem_private_key(data, None if passphrase is None else passphrase.encode())
    except Exception:
        # Raised out of the except clause, so that nothing of the key is carried along.
        key = None
    if key is None:
        raise UnreadableKeyError(
            f"{path} cannot be opened as a private key in PEM; needed: an elliptic curve key, and "
            "its passphrase if it has one; make one with `openssl ecparam -name prime256v1 "
            "-genkey -noout`"
        )
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, _CURVES):
        raise UnreadableKeyError(
            f"{path} is a key of another kind, and Model Signing knows ECDSA on "
            f"{', '.join(curve.name for curve in _CURVES)} only (no Ed25519, as claims are signed "
            "with); make one with `openssl ecparam -name prime256v1 -genkey -noout`"
        )


def sign_folder(folder: Path, key: Path, passphrase: str | None = None) -> Path:
    """Sign all files of `folder` into `model.sig` in it; returns its path.

    The model card is signed too, so the signature also vouches for the claim's digest in it.

    Raises:
        UnreadableKeyError: the key is not one that Model Signing takes, or the package is missing.
        UnwritableOutputError: the signature could not be made or written.
    """
    check_signing_key(key, passphrase)
    try:
        from model_signing import hashing, signing  # noqa: PLC0415
    except ImportError as error:
        raise UnreadableKeyError(
            f"{error.name} is not installed; needed to sign folders: pip install "
            "nnpassport[signing]"
        ) from error
    signature = folder / SIGNATURE_FILE
    secret: Any = None if passphrase is None else passphrase.encode()  # str is refused further in
    try:
        signer = signing.Config().use_elliptic_key_signer(private_key=key, password=secret)
        ignored = hashing.Config().set_ignored_paths(paths=[signature], ignore_git_paths=True)
        signer.set_hashing_config(ignored).sign(folder, signature)
    except Exception as error:
        raise UnwritableOutputError(
            f"{folder} could not be signed ({brief(error)}); needed: plain files that may be read; "
            "see `model_signing sign key --help`"
        ) from error
    return signature
