"""How far a long act is, told to whoever listens: acts say it, and the command line shows it."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

Item = TypeVar("Item")
Listener = Callable[[float, float, str], None]
"""Takes what is done, of how much, and what is being done."""

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def heard_by(listener: Listener | None) -> Iterator[None]:
    """What is told in here goes to this listener, and to no other; None hears nothing."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def tell(done: float, total: float, what: str) -> None:
    """So much of so much is done of this."""
    listener = _listener.get()
    if listener is not None:
        listener(done, total, what)


def counted(items: Collection[Item], what: str) -> Iterator[Item]:
    """The items one by one, and after each that it is done."""
    for number, item in enumerate(items):
        tell(number, len(items), what)
        yield item
    tell(len(items), len(items), what)
