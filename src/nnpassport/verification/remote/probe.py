"""V over a network: ask a service about the key's triggers, hidden among ordinary images.

What is asked is settled before the first query, and there is a verdict only when all of it has
been asked: nobody can stop while the answers happen to look well. Derived labels are independent
of any independent service, whatever it answers or declines, so the p-value is exact over the
triggers that were answered.
"""

import hashlib
import secrets
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nnpassport.ground.progress import Listener
from nnpassport.keys.context import canonical_json
from nnpassport.keys.derive import triggers_of
from nnpassport.keys.key import Key
from nnpassport.scheme import BadRecipeError, UnreachableServiceError
from nnpassport.verification.remote.asking import Answer, Asker, Kind
from nnpassport.verification.remote.finding import Probed, finding, require_power, require_triggers
from nnpassport.verification.remote.journal import Journal, begin
from nnpassport.verification.remote.journal import resume as resumed
from nnpassport.verification.remote.plan import (
    Plan,
    Terms,
    asking_order,
    places,
    query_images,
    settle,
)
from nnpassport.verification.remote.rehearsal import advice, innocent, rehearse

if TYPE_CHECKING:
    from nnpassport.data.images import ImageSet

_FAILURES_IN_A_ROW = 3  # each of them tried several times: the service is down
_NONE_OF_THE_FIRST = 10  # queries answered: a wrong address or token, say


def probe(
    asker: Asker,
    key: Key,
    *,
    cover: "ImageSet | None" = None,
    terms: Terms | None = None,
    journal: Path | None = None,
    resume: bool = False,
    show: Listener | None = None,
) -> Probed:
    """Does the network that `asker` asks carry `key`?

        with asking(HuggingFace(url), Labels(10)) as asker:
            print(probe(asker, key, cover=images).verdict)

    `cover` are ordinary images of the triggers' size, to hide them among. `journal` is a file for
    the answers; with `resume` a run goes on from it, and asks nothing twice that was settled.
    Before the first trigger, one or two innocent pictures are asked about, beyond the budget.

    Raises:
        BadRecipeError: no answers whatever could reach α, or the terms are not the journal's.
        UnsuitableModelError: the key's pictures are not there to be asked about.
        UnreachableServiceError: the service does not answer, or too seldom to reach α.
        OwnershipError: it could not be checked; which kind says why.
    """
    terms, shape = terms or Terms(), triggers_of(key.context)
    require_triggers(key)
    labels = replace(asker.labels, owned=key.context.classes or ())
    asker = asker.reading(labels, any_order=terms.any_order)
    plan = settle(shape, terms, cover)
    require_power(key, np.arange(shape.count) < plan.triggers, terms)
    kept = kept_in(journal, _settled(asker, key, terms, plan, cover), resume=resume)
    available = 0 if cover is None else len(cover)
    order, chosen = asking_order(key, plan, kept.terms["nonce"], available)
    images = query_images(key, plan, cover, chosen)
    if not kept.answers:
        ordinary = None if cover is None else cover.images
        _rehearse(asker, innocent(shape, ordinary, chosen), kept)
    ask_all(asker, [images[query] for query in order], kept, show)
    answers = [kept.answers[place] for place in places(order)]
    used = None
    if cover is not None and chosen:
        used = cover.subset(cover.labels.new_tensor(chosen))
    parts = answers[: plan.triggers], answers[plan.triggers :]
    return finding(asker.service.description, key, terms, parts, used, labels)


def _rehearse(asker: Asker, pictures: NDArray[np.uint8], journal: Journal) -> None:
    try:
        rehearse(asker, pictures)
    except UnreachableServiceError:
        journal.discard()
        raise


def _settled(
    asker: Asker, key: Key, terms: Terms, plan: Plan, cover: "ImageSet | None"
) -> dict[str, Any]:
    """What a run must not change while it goes on."""
    any_order = {"any_order": True} if terms.any_order else {}
    return {
        **any_order,
        "key": key.fingerprint,
        "service": asker.service.description,
        **plan._asdict(),
        "cover": None if cover is None else cover.digest(),
        "labels": hashlib.sha256(canonical_json(dict(asker.labels.names))).hexdigest(),
        "log10_alpha": terms.log10_alpha,
    }


def kept_in(path: Path | None, settled: Mapping[str, Any], *, resume: bool) -> Journal:
    """The journal to write into: a new one, or that of the run on these very terms."""
    if path is None or not resume:
        return begin(path, {**settled, "nonce": secrets.token_hex(16)})
    found = resumed(path)
    named = {*settled, *found.terms} - {"nonce"}
    other = sorted(name for name in named if found.terms.get(name) != settled.get(name))
    queries = settled["triggers"] + settled["covers"]
    if other or not isinstance(found.terms.get("nonce"), str) or len(found.answers) > queries:
        raise BadRecipeError(
            f"{path} is the journal of a run on other terms ({', '.join(other) or 'its size'}); "
            "needed: the same key, service, images, labels, α and budget; give those, or begin "
            "anew under another name"
        )
    return found


def ask_all(
    asker: Asker, images: list[NDArray[np.uint8]], journal: Journal, show: Listener | None
) -> None:
    """Ask all that is left. What may be the service's bad day is kept back until it answers.

    Raises:
        UnreachableServiceError: it seems to be down, or nothing was ever answered.
    """
    heard = any(answer.kind in {Kind.ANSWERED, Kind.ABSTAINED} for answer in journal.answers)
    waiting: list[Answer] = []
    for number in range(len(journal.answers), len(images)):
        waiting.append(asker.ask(images[number]))
        kind = waiting[-1].kind
        heard = heard or kind in {Kind.ANSWERED, Kind.ABSTAINED}
        if heard and kind is not Kind.FAILED:
            waiting = _all_kept(waiting, journal)
        if _hopeless(waiting):
            break
        if show is not None:
            counts = Counter(answer.kind for answer in (*journal.answers, *waiting))
            text = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
            show(number + 1, len(images), text)
    if waiting and (not heard or _hopeless(waiting)):
        left = len(images) - len(journal.answers)
        said = f"; it said {asker.said}" if asker.said else ""
        goes_on = "go on with --resume once it does" if journal.path else "ask again once it does"
        raise UnreachableServiceError(
            f"the service does not answer ({waiting[-1].note}{said}): the run is incomplete, "
            f"{left} of {len(images)} queries are left; needed: a service that answers; check "
            f"{advice(asker, waiting[-1])}, and {goes_on}"
        )
    _all_kept(waiting, journal)


def _hopeless(waiting: list[Answer]) -> bool:
    last = [answer.kind for answer in waiting[-_FAILURES_IN_A_ROW:]]
    return last == [Kind.FAILED] * _FAILURES_IN_A_ROW or len(waiting) >= _NONE_OF_THE_FIRST


def _all_kept(waiting: list[Answer], journal: Journal) -> list[Answer]:
    for answer in waiting:
        journal.add(answer)
    return []
