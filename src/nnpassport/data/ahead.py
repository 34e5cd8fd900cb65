"""Work that is done in the background, a bounded number of results ahead of whoever takes them."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

J = TypeVar("J")
R = TypeVar("R")
Prepare = Callable[[J], tuple[R, Sequence[Callable[[], None]]]]


def done_ahead(
    jobs: Iterable[J], prepare: "Prepare[J, R]", *, workers: int, ahead: int
) -> Generator[R, None, None]:
    """The result of each job, in order.

    `prepare` runs in one thread, in the order of the jobs: it returns the result's place and the
    tasks that fill it, which `workers` threads share. At most `ahead` jobs are begun that have not
    been taken. What a job or a task raises is raised where its result would be.

    No thread is left when the iterator ends, is closed or raises.
    """
    reader = ThreadPoolExecutor(1, "nnpassport-read")
    pool = ThreadPoolExecutor(workers, "nnpassport-decode")

    def begin(job: J) -> tuple[R, list[Future[None]]]:
        result, tasks = prepare(job)
        return result, [pool.submit(task) for task in tasks]

    coming = iter(jobs)
    begun: deque[Future[tuple[R, list[Future[None]]]]] = deque()
    try:
        while True:
            begun.extend(reader.submit(begin, job) for job in islice(coming, ahead - len(begun)))
            if not begun:
                return
            result, tasks = begun.popleft().result()
            for task in tasks:
                task.result()
            yield result
            del result, tasks
    finally:
        # The reader first: it still hands tasks to the pool.
        reader.shutdown(cancel_futures=True)
        pool.shutdown(cancel_futures=True)
