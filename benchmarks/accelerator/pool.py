"""Cells in several processes until a moment: one that fails or dies does not stop the others."""

import contextlib
import multiprocessing
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Protocol, final

from nnpassport.lab.cells import Cell
from nnpassport.lab.grid import queue
from nnpassport.lab.store import Store

DIED = "its process ended with exit code {}"


class Ended(NamedTuple):
    """A cell that was run. `failure` is empty where it is in the store now."""

    cell: Cell
    seconds: float
    failure: str


class Worker(Protocol):
    """Something that runs one cell at a time."""

    def start(self, cell: Cell) -> None:
        """Begin with this cell; returns at once."""

    def outcome(self) -> str | None:
        """None while it runs, "" once it is done, or why it could not be done."""

    def stop(self) -> None:
        """End it, whatever it is at."""


def run_until(
    cells: Sequence[Cell],
    store: Store,
    workers: Sequence[Worker],
    *,
    deadline: float,
    clock: Callable[[], float] = time.monotonic,
    wait: Callable[[], None] = lambda: time.sleep(0.05),
    ended: Callable[[Ended], None] = lambda _: None,
) -> list[Cell]:
    """Run the cells in their order, as many at a time as there are workers; returns what is left.

    At `deadline`, a reading of the clock, the workers are stopped, whatever they are at. A cell is
    begun when the networks that it needs are there, and unless one of its kind has shown that it
    would not end in time: the time is better spent on a shorter one further down.
    """
    agenda = _Agenda(queue(cells, store), store)
    busy: dict[int, tuple[Cell, float]] = {}
    try:
        while clock() < deadline:
            for number, worker in enumerate(workers):
                failure = worker.outcome() if number in busy else None
                if failure is not None:
                    cell, begun = busy.pop(number)
                    agenda.close(cell, clock() - begun, failure, ended)
                if number not in busy:
                    taken = agenda.take(deadline - clock(), ended)
                    if taken is not None:
                        busy[number] = (taken, clock())
                        worker.start(taken)
            if not busy:
                break
            wait()
    finally:
        for worker in workers:
            worker.stop()
    return [*(cell for cell, _ in busy.values()), *agenda.waiting]


@final
class _Agenda:
    """What is still to be run, and what is known of how long such things take."""

    def __init__(self, cells: Sequence[Cell], store: Store) -> None:
        self.waiting, self._store = list(cells), store
        self._failed: set[str] = set()
        self._took: dict[tuple[str, ...], float] = {}

    def take(self, seconds: float, ended: Callable[[Ended], None]) -> Cell | None:
        """The first cell that can be begun and will end within so many seconds, as far as known."""
        for cell in list(self.waiting):
            if lost := [each for each in cell.needs if each.name in self._failed]:
                self.waiting.remove(cell)
                self._failed.add(cell.name)
                ended(Ended(cell, 0.0, f"needs {lost[0].slug}, which could not be trained"))
            elif all(map(self._store.ready, cell.needs)) and self._expected(cell) <= seconds:
                self.waiting.remove(cell)
                return cell
        return None

    def close(
        self, cell: Cell, seconds: float, failure: str, ended: Callable[[Ended], None]
    ) -> None:
        """Note what came of a cell."""
        if failure:
            self._failed.add(cell.name)
        else:
            for kind in _kinds(cell):
                self._took[kind] = max(seconds, self._took.get(kind, 0.0))
        ended(Ended(cell, seconds, failure))

    def _expected(self, cell: Cell) -> float:
        return next((self._took[kind] for kind in _kinds(cell) if kind in self._took), 0.0)


def _kinds(cell: Cell) -> tuple[tuple[str, ...], ...]:
    """What this cell's time may be told from: cells of the same scheme, else of the same work."""
    work = (cell.network.architecture, cell.work, cell.target)
    return (*work, cell.network.scheme), work


@final
class Process:
    """A worker in a process of its own, which is started anew where it died.

    The cells are told once, by `cells`: then those of one plan share what is kept in memory.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        store: Store,
        run: Callable[[Cell, Store], Any],
        prepare: Callable[[], None],
    ) -> None:
        self._given = (tuple(cells), store, run, prepare)
        self._places = {cell.name: place for place, cell in enumerate(cells)}
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None

    def start(self, cell: Cell) -> None:
        """Begin with this cell; returns at once."""
        if self._process is None or not self._process.is_alive():
            # Not fork: CUDA does not survive it.
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs, *self._given))
            self._process.start()
            theirs.close()
        if self._pipe is not None:
            with contextlib.suppress(OSError):  # it died just now: `outcome` says so
                self._pipe.send(self._places[cell.name])

    def outcome(self) -> str | None:
        """None while it runs, "" once it is done, or why it could not be done."""
        if self._process is None or self._pipe is None:
            return DIED.format("unknown")
        alive = self._process.is_alive()  # asked first: it may answer and end between the two
        try:
            if self._pipe.poll():
                return str(self._pipe.recv())
        except (EOFError, OSError):
            alive = False
        if alive:
            return None
        self._process.join()
        code, self._process = self._process.exitcode, None
        return DIED.format(code)

    def stop(self) -> None:
        """End it, whatever it is at; what it writes, it writes whole or not at all."""
        if self._process is not None:
            self._process.kill()
            self._process.join(5)
            self._process = None


def _serve(
    pipe: Connection,
    cells: tuple[Cell, ...],
    store: Store,
    run: Callable[[Cell, Store], Any],
    prepare: Callable[[], None],
) -> None:
    prepare()
    while True:
        try:
            cell = cells[pipe.recv()]
        except EOFError:  # whoever asked is gone
            return
        try:
            run(cell, store)
            pipe.send("")
        except Exception as error:  # of any kind: the next cell may do
            traceback.print_exc()
            pipe.send(f"{type(error).__name__}: {error}")
