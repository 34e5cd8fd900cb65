"""Many cells: in order of what they need, on one machine or on many, through joblib."""

import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from nnpassport.ground.progress import Listener
from nnpassport.lab.cells import Cell
from nnpassport.lab.runs import run
from nnpassport.lab.store import Store
from nnpassport.scheme import BadRecipeError, OwnershipError

BACKENDS = ("loky", "dask", "ray")


class Failure(NamedTuple):
    """A cell that could not be run, and why."""

    cell: Cell
    reason: str


def waves(cells: Iterable[Cell], store: Store) -> list[list[Cell]]:
    """Cells that are still to be run, so that each wave needs nothing but earlier ones.

    A network that is needed and not there is trained by its own cell, in an earlier wave, even if
    that cell's result is known.
    """
    todo = {cell.name: cell for cell in cells if not store.done(cell)}
    found: list[dict[str, Cell]] = []
    while todo:
        found.insert(0, todo)
        needed = (each for cell in todo.values() for each in cell.needs)
        todo = {c.name: c for c in needed if not store.ready(c)}
    earlier: set[str] = set()
    ordered = []
    for wave in found:
        ordered.append([cell for name, cell in wave.items() if name not in earlier])
        earlier |= set(wave)
    return [wave for wave in ordered if wave]


def queue(cells: Iterable[Cell], store: Store) -> list[Cell]:
    """Cells that are still to be run, in the order given, each after what it needs.

    Unlike in `waves`, nothing is brought forward but what the next cell needs.
    """
    ordered: dict[str, Cell] = {}

    def take(cell: Cell) -> None:
        for needed in cell.needs:
            if needed.name not in ordered and not store.ready(needed):
                take(needed)
        ordered.setdefault(cell.name, cell)

    for cell in cells:
        if not store.done(cell):
            take(cell)
    return list(ordered.values())


def run_grid(
    cells: Sequence[Cell],
    store: Store,
    *,
    jobs: int = 1,
    backend: str = "loky",
    show: Listener = lambda *_: None,
) -> list[Failure]:
    """Run what was not run; returns what could not be.

    One job runs the cells in the order given (`queue`); several run `waves`, all trainings first.

    "loky" is this machine's processes. "dask" sends cells to the cluster of the client that there
    is, or else of $DASK_SCHEDULER_ADDRESS; "ray" to the one of $RAY_ADDRESS, or else to processes
    that Ray starts here. Their machines must see the same folders.

    Raises:
        BadRecipeError: the backend is unknown, or what it needs is not installed.
    """
    failures: list[Failure] = []
    if jobs == 1 and backend == "loky":
        ordered = queue(cells, store)
        for number, cell in enumerate(ordered):
            show(number, len(ordered), cell.slug)
            failures += _attempt(cell, store)
        return failures
    planned = waves(cells, store)
    total, done = sum(map(len, planned)), 0
    from joblib import Parallel, delayed  # noqa: PLC0415 - not needed for one process

    with _backend(backend, jobs):
        for wave in planned:
            # Ray's backend gives results at the end of a wave only.
            how = "list" if backend == "ray" else "generator_unordered"
            parallel = Parallel(n_jobs=jobs, return_as=how, batch_size=1)
            for failed in parallel(delayed(_attempt)(cell, store) for cell in wave):
                done += 1
                failures += failed
                show(done, total, "")
    return failures


def _attempt(cell: Cell, store: Store) -> list[Failure]:
    """Nothing, or the failure; any other exception than ours is a bug and ends the grid."""
    try:
        run(cell, store)
    except OwnershipError as error:
        return [Failure(cell, str(error))]
    return []


def _backend(name: str, jobs: int):  # type: ignore[no-untyped-def]  # joblib's own type is private
    from joblib import parallel_config  # noqa: PLC0415

    if name not in BACKENDS:
        raise BadRecipeError(f"backend {name!r} is unknown; there are: {', '.join(BACKENDS)}")
    try:
        if name == "ray":
            from ray.util.joblib import register_ray  # noqa: PLC0415

            register_ray()  # type: ignore[no-untyped-call, unused-ignore]
        elif name == "dask":
            _dask_client()
    except ImportError as error:
        raise BadRecipeError(
            f"backend {name!r} needs a package that is not installed ({error}); install "
            f"nnpassport[{name}], or leave the backend out"
        ) from error
    return parallel_config(backend=name, n_jobs=jobs)


def _dask_client() -> None:
    """Connect this process to a cluster, unless it is: joblib looks for its client."""
    import distributed  # noqa: PLC0415 - optional, and slow to import

    try:
        distributed.get_client()
    except ValueError:
        address = os.environ.get("DASK_SCHEDULER_ADDRESS")
        if not address:
            raise BadRecipeError(
                "there is no Dask cluster to send runs to; set DASK_SCHEDULER_ADDRESS to its "
                "scheduler's address, such as tcp://host:8786"
            ) from None
        try:
            distributed.Client(address, timeout="10s")  # type: ignore[no-untyped-call, unused-ignore]
        except (OSError, ValueError) as error:
            raise BadRecipeError(
                f"no Dask scheduler answers at DASK_SCHEDULER_ADDRESS={address} ({error}); "
                "start one with `dask scheduler`, and workers with `dask worker ADDRESS`"
            ) from error
