"""Every scheme as a row; the one place that names them all."""

from collections.abc import Mapping
from typing import NamedTuple

from nnpassport.scheme import UnsuitableModelError
from nnpassport.schemes.passport import V1, V2, V3, Passport


class Entry(NamedTuple):
    """One scheme: what embeds and verifies, where it is from, what an owner gets of it."""

    scheme: Passport
    source: str
    summary: str


CATALOG: Mapping[str, Entry] = {
    V1.name: Entry(V1, "Fan19 V1", "runs on its passport; released with the passport folded in"),
    V2.name: Entry(V2, "Fan19 V2", "runs with and without its passport; released without"),
    V3.name: Entry(V3, "Fan19 V3", "as V2, and answers secret trigger images: provable remotely"),
}


def scheme_named(name: str) -> Passport:
    """The scheme that keys and commands call `name`.

    Raises:
        UnsuitableModelError: there is no such scheme.
    """
    if name not in CATALOG:
        raise UnsuitableModelError(
            f"scheme {name!r} is not in the catalog; there are: {', '.join(CATALOG)}"
        )
    return CATALOG[name].scheme
