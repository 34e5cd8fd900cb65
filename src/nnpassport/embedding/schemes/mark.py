"""Steps that schemes share, be they made by the `engine` or not: new keys, and checks."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from nnpassport.embedding.network.outputs import Example
from nnpassport.embedding.schemes.triggers import trigger_shape
from nnpassport.keys.chance import LOG10_ALPHA_COMMITTED, LOG10_ALPHA_UNCOMMITTED
from nnpassport.keys.context import AnswersForm, Context, LayerShape, TriggerShape
from nnpassport.keys.key import Key
from nnpassport.scheme import UnreadableKeyError, UnsuitableModelError

PROVABLE = math.ceil(-LOG10_ALPHA_UNCOMMITTED / math.log10(2) - 1e-9)
"""Bits that a key needs at least, to be accepted where all of them match."""
PROVABLE_DATED = math.ceil(-LOG10_ALPHA_COMMITTED / math.log10(2) - 1e-9)
"""The same under a dated claim."""


def new_key(
    scheme: str,
    *,
    owner: str,
    layers: tuple[LayerShape, ...] = (),
    triggers: TriggerShape | None = None,
    text: str | None = None,
    seed: bytes | None = None,
    nonce: bytes | None = None,
    metrics: Mapping[str, Any] | None = None,
    anchor: str | None = None,
    answers: AnswersForm | None = None,
) -> Key:
    """A key of `scheme`, all of it derived; the operating system draws the seed if none is given.

    So it does the nonce, unless one is given that binds the key to something else.

    Raises:
        BadSignatureError: `text` does not fit the layers.
    """
    nonce = new_nonce(seed) if nonce is None else nonce
    context = Context(
        scheme=scheme,
        owner=owner,
        layers=layers,
        triggers=triggers,
        nonce=nonce,
        anchor=anchor,
        answers=answers,
    )
    seed = os.urandom(32) if seed is None else seed
    return Key(seed=seed, context=context, text=text, metrics=metrics or None)


def new_nonce(seed: bytes | None) -> bytes:
    """Of the operating system, unless the seed was given: one seed gives one key."""
    return os.urandom(16) if seed is None else bytes(16)


def check_scheme(scheme: str, key: Key) -> None:
    """Refuse a key of another scheme.

    Raises:
        UnsuitableModelError: it is one.
    """
    if key.context.scheme != scheme:
        raise UnsuitableModelError(
            f"the key is for {key.context.scheme}, and this is {scheme}; "
            "draw a key with this scheme's draw_key, or use the key's own scheme"
        )


def check_can_be_proved(scheme: str, layers: Sequence[LayerShape], needed: int) -> None:
    """Refuse a key of fewer than `needed` bits: all of them right could still be chance.

    It is asked of layers that nobody named; who names them has chosen how many bits there are.

    Raises:
        UnsuitableModelError: there are too few.
    """
    bits = sum(layer.length for layer in layers)
    if bits < needed:
        raise UnsuitableModelError(
            f"the layers that a key of {scheme} takes by itself have {bits} bits together, and "
            f"{PROVABLE} are needed to be accepted, {PROVABLE_DATED} under a dated claim; needed: "
            "more of its layers, by name (layers=[…], on the command line --layer), or a network "
            "with more channels"
        )


def check_nothing_chosen(scheme: str, layers: Sequence[str] | None, text: str | None) -> None:
    """Refuse layers and a text, for a scheme that has neither.

    Raises:
        UnsuitableModelError: one of them was given.
    """
    if layers or text:
        raise UnsuitableModelError(
            f"{scheme} has neither layers nor a text signature, and "
            f"{'layers' if layers else 'a text'} were given; leave them out"
        )


def check_has_pictures(key: Key) -> None:
    """Refuse a key that still lacks the pictures that its scheme makes or chooses.

    Raises:
        UnreadableKeyError: it does.
    """
    if key.trigger_images is None:
        raise UnreadableKeyError(
            f"the key of {key.context.scheme} has no pictures yet: they are made of images, in a "
            "trained plain network; needed: `prepared` of the scheme, or `key new --images "
            "DATA --plain MODEL_FOLDER`"
        )


def check_no_pictures(key: Key) -> None:
    """Refuse answers to the pictures of a key whose scheme reads activations and has no labels.

    Raises:
        UnsuitableModelError: the key has pictures.
    """
    if key.context.triggers is not None:
        raise UnsuitableModelError(
            f"a key of {key.context.scheme} has pictures and no labels for them, so it has no "
            "trigger set; give the network itself, whose activations carry the mark, and use "
            "verify_network"
        )


def check_triggers(key: Key, model: nn.Module, example: Example) -> None:
    """Refuse a key whose triggers are for another network, or that has none.

    Raises:
        UnsuitableModelError: they are.
    """
    shape = key.context.triggers
    found = None if shape is None else trigger_shape(shape.count, model, example)
    if shape is None or found is None or found != shape:
        given = "no triggers" if shape is None else f"{shape.size} and {shape.classes} classes"
        needed = "triggers" if found is None else f"{found.size} to {found.classes} classes"
        raise UnsuitableModelError(
            f"the key of {key.context.scheme} was made for {given}, and the network maps {needed}; "
            "draw a key for this network"
        )
