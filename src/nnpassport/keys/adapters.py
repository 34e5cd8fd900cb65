"""What was added to a base: the difference of a merged network and the base that a key is bound to.

Whoever chooses a base afterwards makes the difference read as anything, so a key's nonce is a
digest of the base's host weights, number for number, and what is taken off is what was committed
to: not even what lies below its last bit can be chosen.
"""

from collections.abc import Callable, Mapping

import numpy as np

from nnpassport.files.arrays import DTYPES, Array, arrays_digest, is_floating
from nnpassport.keys.context import NONCE_BYTES
from nnpassport.keys.counts import Weights
from nnpassport.keys.key import Key
from nnpassport.keys.reading import READERS, check_host, is_adapter, read_product
from nnpassport.scheme import UnsuitableModelError


def added(weights: Weights, base: Weights, key: Key) -> dict[str, Array]:
    """ΔW = W − W0 of a merged network's host layers, by name, in float64.

    W0 is what the key commits to, and never more precise than that; it is taken off as it would be
    stored where W is. A copy of the base that was only rounded has added nothing: how it is rounded
    can be foreseen, and keys could be tried until one fits.

    Raises:
        UnsuitableModelError: `base` is not the network that the key was drawn for, the suspect is
            an adapter or of other shapes, or the key is another scheme's.
    """
    if READERS.get(key.context.scheme) is not read_product or is_adapter(weights):
        raise UnsuitableModelError(
            "a base is taken off merged weights, for a key of scheme lora; verify an adapter's own "
            "file, or a key of another scheme, without it"
        )
    for layer in key.context.layers:
        check_host(weights, layer)
        check_host(base, layer)
    given = {layer.name: base[f"{layer.name}.weight"] for layer in key.context.layers}
    kept = {f"{name}.weight": each for name, each in committed(given, key).items()}
    return {name: _difference(weights[name], each) for name, each in kept.items()}


def base_digest(weights: Weights) -> bytes:
    """What a key's nonce says of the base: the exact numbers of its host weights, by layer.

    The first 16 bytes of `arrays_digest`, in float32, which holds what half precisions do to the
    last bit; in float64 if that loses anything of any of them.
    """
    exact = all(np.array_equal(_double(_single(w)), _double(w)) for w in weights.values())
    return _digest(weights, _single if exact else _double)


def committed(weights: Weights, key: Key) -> Mapping[str, Array]:
    """The base that a key was drawn for, as precisely as its nonce says it.

    Keys were drawn for a base in float64 by its numbers in float32. Such a base is still theirs, in
    float32: whatever anybody writes below the last bit of that is not looked at.

    Raises:
        UnsuitableModelError: the key was drawn for another network.
    """
    if base_digest(weights) == key.context.nonce:
        return dict(weights)
    if _digest(weights, _single) == key.context.nonce:
        return {name: _single(w) for name, w in weights.items()}
    raise UnsuitableModelError(
        "the base is not the network that the key was drawn for; needed: the same weights, in "
        "the same precision; any other could be made to fit, so none is taken"
    )


def _digest(weights: Weights, form: Callable[[Array], Array]) -> bytes:
    formed = {name: form(w) for name, w in weights.items()}
    return bytes.fromhex(arrays_digest(formed))[:NONCE_BYTES]


def _single(weight: Array) -> Array:
    return weight.astype(np.float32) if is_floating(weight) else weight


def _double(weight: Array) -> Array:
    return weight.astype(np.float64) if is_floating(weight) else weight


def _difference(weight: Array, base: Array) -> Array:
    """What was added to `base`, in float64, once it is as coarse as `weight` is."""
    whole, plain = weight.astype(np.float64), base.astype(np.float64)
    # By its numbers and not by its file's dtype, which may be a finer one than they were made in.
    for name in ("bfloat16", "float16", "float32"):
        with np.errstate(over="ignore"):
            rounded = plain.astype(DTYPES[name]).astype(np.float64)
            coarse = whole.astype(DTYPES[name]).astype(np.float64)
        if np.array_equal(coarse, whole) and np.isfinite(rounded).all():
            return whole - rounded
    return whole - plain
