"""Innocent pictures first: no trigger is shown before the service's answers can be read.

A misspelt pointer, names that the service does not use, a wrong token: each would spend all the
triggers on answers that nobody can read, and a service that has seen them knows them.
"""

import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnpassport.keys.context import TriggerShape
from nnpassport.scheme import UnreachableServiceError
from nnpassport.verification.remote.asking import OUTSIDE, UNKNOWN, Answer, Asker, Kind

PICTURES = 2

_ADVICE = {
    "status 401": "--header (NAME=VARIABLE: the token)",
    "status 403": "--header (NAME=VARIABLE: the token)",
    "status 404": "the address, or the model's name in it",
    "certificate": "--ca (PEM file of the authority)",
    UNKNOWN: "--labels (the service's names in the order of the classes), or --any-order",
    OUTSIDE: (
        "--labels (what the service calls each class, in their order: it may count from 1, or have "
        "a class more)"
    ),
}


def innocent(
    shape: TriggerShape,
    cover: Any | None,
    chosen: Sequence[int],
) -> NDArray[np.uint8]:
    """Pictures of the triggers' size that say nothing of them (pictures channels height width).

    They are covers, of those that are not `chosen` to hide triggers while there are any; or slopes
    of grey that no key knows.
    """
    if cover is None or not len(cover):
        return np.stack([_slope(shape.size) for _ in range(PICTURES)])
    left = sorted(set(range(len(cover))) - set(chosen)) or list(chosen)
    picks = [left[secrets.randbelow(len(left))] for _ in range(PICTURES)]
    shown: NDArray[np.uint8] = cover[picks].cpu().numpy()
    return shown


def rehearse(asker: Asker, pictures: NDArray[np.uint8]) -> None:
    """Ask about innocent pictures until one is answered with a class.

    Raises:
        UnreachableServiceError: none is, or an answer has another form than the one expected.
    """
    for picture in pictures:
        answer = asker.ask(picture)
        if answer.kind is Kind.ANSWERED:
            return
        if answer.kind is Kind.FAILED:
            break
    raise unread(asker, answer, "no trigger was shown")


def unread(asker: Asker, answer: Answer, state: str) -> UnreachableServiceError:
    """The error for an answer that cannot be read: what came back, and which option to change."""
    said = f"; it said {asker.said}" if asker.said else ""
    return UnreachableServiceError(
        f"the service's answer cannot be read ({answer.note}{said}); {state}; needed: an answer "
        f"with one of the {asker.labels.classes} classes; check {advice(asker, answer)}"
    )


def advice(asker: Asker, answer: Answer) -> str:
    """Which option an answer without a class speaks of."""
    for part, option in _ADVICE.items():
        if part in answer.note:
            return option
    return asker.service.options


def _slope(size: tuple[int, int, int]) -> NDArray[np.uint8]:
    """A picture that grows lighter from one side to the other, between random greys."""
    channels, height, width = size
    dark, light = secrets.randbelow(100), 155 + secrets.randbelow(100)
    row = np.linspace(dark, light, width).round().astype(np.uint8)
    return np.tile(row, (channels, height, 1))
