"""Every scheme as a row; the one place that names them all."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, cast, get_args

from nnpassport.evidence.key import Key
from nnpassport.scheme import BadRecipeError, UnsuitableModelError
from nnpassport.schemes.adi import ADI
from nnpassport.schemes.deepmarks import DEEPMARKS
from nnpassport.schemes.deepsigns import DEEPSIGNS
from nnpassport.schemes.deepsigns_blackbox import DEEPSIGNS_BLACKBOX
from nnpassport.schemes.frontier import FRONTIER, with_true_classes
from nnpassport.schemes.guo import GUO
from nnpassport.schemes.lora import LORA
from nnpassport.schemes.passport import PAN, V1, V2, V3
from nnpassport.schemes.protocol import Scheme
from nnpassport.schemes.residuals import GREEDY_RESIDUALS
from nnpassport.schemes.uchida import UCHIDA, UCHIDA_MSE
from nnpassport.schemes.zhang import ZHANG_CONTENT, ZHANG_NOISE, ZHANG_UNRELATED


class Entry(NamedTuple):
    """One scheme: what embeds and verifies, where it is from, what an owner gets of it.

    Attributes:
        published_key: the key that its paper would have made of the same pictures, where labels are
            not ours to draw there; None where it is the same key. Strangers are read by its rule.
    """

    scheme: Scheme
    source: str
    summary: str
    published_key: Callable[[Key], Key] | None = None


CATALOG: Mapping[str, Entry] = {
    V1.name: Entry(V1, "Fan19 V1", "runs on its passport; released with the passport folded in"),
    V2.name: Entry(V2, "Fan19 V2", "runs with and without its passport; released without"),
    V3.name: Entry(V3, "Fan19 V3", "as V2, and answers secret trigger images: provable remotely"),
    PAN.name: Entry(PAN, "Zha20", "as V2, through small networks; its fidelity proves nothing"),
    UCHIDA.name: Entry(UCHIDA, "Uch17", "bits in a projected filter; forged by anybody"),
    UCHIDA_MSE.name: Entry(UCHIDA_MSE, "Uch17, Che19", "the same, by squares: Eq. 1's R"),
    DEEPMARKS.name: Entry(DEEPMARKS, "Che19", "a word for each of 31 users; names who colluded"),
    GREEDY_RESIDUALS.name: Entry(
        GREEDY_RESIDUALS, "Liu21", "signs of a layer's larger weights; anybody reads the bits"
    ),
    DEEPSIGNS.name: Entry(DEEPSIGNS, "Rou19", "bits in what a layer makes of secret pictures"),
    ADI.name: Entry(ADI, "Adi18", "trigger images learnt by heart; forged by anybody"),
    ZHANG_CONTENT.name: Entry(ZHANG_CONTENT, "Zha18", "stamped images, learnt by heart"),
    ZHANG_NOISE.name: Entry(ZHANG_NOISE, "Zha18", "images in noise, learnt by heart"),
    ZHANG_UNRELATED.name: Entry(ZHANG_UNRELATED, "Zha18", "images of no class, learnt by heart"),
    GUO.name: Entry(GUO, "Guo18", "images signed in some pixels, learnt by heart"),
    DEEPSIGNS_BLACKBOX.name: Entry(DEEPSIGNS_BLACKBOX, "Rou19", "noise, learnt by heart"),
    FRONTIER.name: Entry(
        FRONTIER,
        "LeM20",
        "adversarial images, on sides that the key decides",
        with_true_classes,
    ),
}

ADAPTERS: Mapping[str, Entry] = {
    LORA.name: Entry(LORA, "", "an adapter's product carries the signature; read from its file"),
}
"""Schemes of networks that carry an adapter: a plain one has nothing for them to mark."""


def scheme_named(name: str) -> Scheme:
    """The scheme that keys and commands call `name`.

    Raises:
        UnsuitableModelError: there is no such scheme.
    """
    schemes = {**CATALOG, **ADAPTERS}
    if name not in schemes:
        raise UnsuitableModelError(
            f"scheme {name!r} is not in the catalog; there are: {', '.join(schemes)}"
        )
    return schemes[name].scheme


def with_settings(scheme: Scheme, **settings: float | None) -> Scheme:
    """The scheme with other values of its fields; None leaves a field as it is.

    Raises:
        BadRecipeError: the scheme has no such number, or a whole one is needed.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    fields = dataclasses.fields(cast(Any, scheme))
    kinds = {f.name: {f.type, *get_args(f.type)} for f in fields}
    numbers = {name: kind for name, kind in kinds.items() if kind & {int, float}}
    for name, value in given.items():
        if name not in numbers:
            raise BadRecipeError(
                f"{scheme.name} has no setting {name!r}; it has: {', '.join(sorted(numbers))}"
            )
        if float not in numbers[name] and value != int(value):
            raise BadRecipeError(f"{name} of {scheme.name} is {value}; needed: a whole number")
    return cast(Scheme, dataclasses.replace(cast(Any, scheme), **given))


def read_settings(words: Iterable[str]) -> dict[str, float]:
    """Settings from the words that name them: "user=3" or "strength=0.05".

    Raises:
        BadRecipeError: a word is not NAME=NUMBER.
    """
    found: dict[str, float] = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            found[name] = int(value) if value.lstrip("-").isdigit() else float(value)
        except ValueError:
            raise BadRecipeError(
                f"setting {word!r:.60} is not NAME=NUMBER; needed: such as strength=0.05"
            ) from None
    return found
