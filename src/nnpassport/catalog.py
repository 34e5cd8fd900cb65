"""Every scheme as a row; the one place that names them all."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast, get_args

from nnpassport.ground.lazy import load
from nnpassport.scheme import BadRecipeError, UnsuitableModelError

if TYPE_CHECKING:
    from nnpassport.embedding.schemes.protocol import Scheme
    from nnpassport.keys.key import Key


class Entry(NamedTuple):
    """One scheme: what embeds and verifies, where it is from, what an owner gets of it.

    The table needs no torch: a scheme is loaded when it is first asked for.

    Attributes:
        there: the scheme, or where it is, as "package.module:NAME".
        published: see `published_key`; the same.
    """

    there: "Scheme | str"
    source: str
    summary: str
    published: "Callable[[Key], Key] | str | None" = None

    @property
    def scheme(self) -> "Scheme":
        """What embeds and verifies."""
        return cast("Scheme", load(self.there) if isinstance(self.there, str) else self.there)

    @property
    def published_key(self) -> "Callable[[Key], Key] | None":
        """The key that its paper would have made of the same pictures, where labels are not ours.

        None where it is the same key. Strangers are read by its rule.
        """
        return load(self.published) if isinstance(self.published, str) else self.published


_IN = "nnpassport.embedding.schemes"

CATALOG: Mapping[str, Entry] = {
    "passport-v1": Entry(
        f"{_IN}.passport:V1",
        "Fan19 V1",
        "runs on its passport; released with the passport folded in",
    ),
    "passport-v2": Entry(
        f"{_IN}.passport:V2",
        "Fan19 V2",
        "runs with and without its passport; released without",
    ),
    "passport-v3": Entry(
        f"{_IN}.passport:V3",
        "Fan19 V3",
        "as V2, and answers secret trigger images: provable remotely",
    ),
    "pan": Entry(
        f"{_IN}.passport:PAN",
        "Zha20",
        "as V2, through small networks; its fidelity proves nothing",
    ),
    "uchida": Entry(
        f"{_IN}.uchida:UCHIDA", "Uch17", "bits in a projected filter; forged by anybody"
    ),
    "uchida-mse": Entry(
        f"{_IN}.uchida:UCHIDA_MSE", "Uch17, Che19", "the same, by squares: Eq. 1's R"
    ),
    "deepmarks": Entry(
        f"{_IN}.deepmarks:DEEPMARKS", "Che19", "a word for each of 31 users; names who colluded"
    ),
    "greedy-residuals": Entry(
        f"{_IN}.residuals:GREEDY_RESIDUALS",
        "Liu21",
        "signs of a layer's larger weights; anybody reads the bits",
    ),
    "deepsigns": Entry(
        f"{_IN}.deepsigns:DEEPSIGNS", "Rou19", "bits in what a layer makes of secret pictures"
    ),
    "adi": Entry(f"{_IN}.adi:ADI", "Adi18", "trigger images learnt by heart; forged by anybody"),
    "zhang-content": Entry(
        f"{_IN}.zhang:ZHANG_CONTENT", "Zha18", "stamped images, learnt by heart"
    ),
    "zhang-noise": Entry(f"{_IN}.zhang:ZHANG_NOISE", "Zha18", "images in noise, learnt by heart"),
    "zhang-unrelated": Entry(
        f"{_IN}.zhang:ZHANG_UNRELATED", "Zha18", "images of no class, learnt by heart"
    ),
    "guo": Entry(f"{_IN}.guo:GUO", "Guo18", "images signed in some pixels, learnt by heart"),
    "deepsigns-blackbox": Entry(
        f"{_IN}.deepsigns_blackbox:DEEPSIGNS_BLACKBOX", "Rou19", "noise, learnt by heart"
    ),
    "frontier-stitching": Entry(
        f"{_IN}.frontier:FRONTIER",
        "LeM20",
        "adversarial images, on sides that the key decides",
        f"{_IN}.frontier:with_true_classes",
    ),
    "ewe": Entry(
        f"{_IN}.ewe:EWE",
        "Jia21",
        "stamped images among those of a class; as published, one guess among all classes",
        f"{_IN}.ewe:as_jia",
    ),
    "cosine": Entry(
        f"{_IN}.cosine:COSINE",
        "Cha22",
        "waves along secret projections, on answers to ordinary images; as published, a ratio",
    ),
    "answers": Entry(
        f"{_IN}.answers:ANSWERS",
        "ours",
        "how answers to ordinary images lean; copies trained on answers carry it",
    ),
    "order": Entry(
        f"{_IN}.order:ORDER",
        "ours",
        "hidden units in an order of the key's, free of cost; permuting erases it",
    ),
}

ADAPTERS: Mapping[str, Entry] = {
    "lora": Entry(
        f"{_IN}.lora:LORA", "", "an adapter's product carries the signature; read from its file"
    ),
}
"""Schemes of networks that carry an adapter: a plain one has nothing for them to mark."""


def entry_named(name: str) -> Entry:
    """The row of the scheme that keys and commands call `name`.

    Raises:
        UnsuitableModelError: there is no such scheme.
    """
    schemes = {**CATALOG, **ADAPTERS}
    if name not in schemes:
        raise UnsuitableModelError(
            f"scheme {name!r} is not in the catalog; there are: {', '.join(schemes)}"
        )
    return schemes[name]


def scheme_named(name: str) -> "Scheme":
    """The scheme of that row: torch is loaded for it, if it needs torch.

    Raises:
        UnsuitableModelError: there is no such scheme.
    """
    return entry_named(name).scheme


def with_settings(scheme: "Scheme", **settings: float | str | None) -> "Scheme":
    """The scheme with other values of its fields; None leaves a field as it is.

    Raises:
        BadRecipeError: the scheme has no such setting, or another kind of value is needed.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    fields = dataclasses.fields(cast(Any, scheme))
    kinds = {f.name: {f.type, *get_args(f.type)} & {int, float, str} for f in fields}
    known = {name: kind for name, kind in kinds.items() if kind and name != "name"}
    for name, value in given.items():
        if name not in known:
            raise BadRecipeError(
                f"{scheme.name} has no setting {name!r}; it has: {', '.join(sorted(known))}"
            )
        needed = _needed(known[name], value)
        if needed:
            raise BadRecipeError(f"{name} of {scheme.name} is {value!r:.40}; needed: {needed}")
        if isinstance(value, float) and float not in known[name]:
            given[name] = int(value)
    return cast("Scheme", dataclasses.replace(cast(Any, scheme), **given))


def _needed(kinds: set[Any], value: float | str) -> str | None:
    """What a setting of these kinds needs, unless this value is of one of them."""
    if isinstance(value, str):
        return None if str in kinds else "a number"
    if not kinds & {int, float}:
        return "a word"
    if not isinstance(value, int | float):  # a diary is another's file
        return "a number"
    whole = math.isfinite(value) and value == int(value)
    return None if float in kinds or whole else "a whole number"


def require_settings(key: "Key", settings: Mapping[str, float | str]) -> None:
    """Refuse settings that the key has as well, with another value.

    Raises:
        BadRecipeError: one of them is not the key's.
    """
    form, shape = key.context.answers, key.context.triggers
    fixed: dict[str, float | str] = {}
    if form is not None:
        fixed = {"kind": form.kind, "coins": form.coins, "strength": form.strength / 1000}
    elif shape is not None:
        fixed = {"triggers": shape.count}
    for name in settings.keys() & fixed.keys():
        if settings[name] != fixed[name]:
            raise BadRecipeError(
                f"{name}={settings[name]} was given, and the key was drawn with "
                f"{name}={fixed[name]}; needed: that, or a key with the other (`key new --setting`)"
            )


def settings_of(scheme: "Scheme") -> dict[str, float | str]:
    """Those of the scheme's settings that are not as in its row."""
    row = scheme_named(scheme.name)
    values = {f.name: getattr(scheme, f.name) for f in dataclasses.fields(cast(Any, scheme))}
    return {
        name: value
        for name, value in values.items()
        if type(value) in {int, float, str} and value != getattr(row, name)
    }


def read_settings(words: Iterable[str]) -> dict[str, float | str]:
    """Settings from the words that name them: "user=3", "strength=0.05" or "kind=mirrored".

    Raises:
        BadRecipeError: a word is not NAME=VALUE.
    """
    found: dict[str, float | str] = {}
    for word in words:
        name, _, value = word.partition("=")
        if not (name and value):
            raise BadRecipeError(
                f"setting {word!r:.60} is not NAME=VALUE; needed: such as strength=0.05"
            )
        found[name] = _number_or_word(value)
    return found


def _number_or_word(value: str) -> float | str:
    try:
        return int(value) if value.lstrip("-").isdigit() else float(value)
    except ValueError:
        return value
