"""Where the demo stands, and how long each of its stages took."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

from nnpassport.embedding.train.loop import Journal, Progress
from nnpassport.ground.progress import Listener

STAGES = (
    "train a plain network",
    "draw a key and embed it",
    "release the network",
    "verify the released network",
    "try random keys",
    "check an unrelated network",
    "present forged passports",
    "ask a copy of the answers",
    "draw the pictures",
)


@final
class Stage:
    """One stage while it runs; `note` is what came out of it."""

    def __init__(self, number: int, show: Listener) -> None:
        self.number, self.show, self.note = number, show, ""
        self._furthest = 0.0

    def at(self, share: float, note: str = "") -> None:
        """Show that this share of the stage is done, or more if more was done before."""
        share = self._furthest = max(share, self._furthest)
        text = f"{STAGES[self.number]}{note and ': '}{note}"
        self.show(self.number + share, len(STAGES), text)

    @property
    def journal(self) -> Journal:
        """For a training run that is to show where it stands."""

        def watch(progress: Progress) -> None:
            self.at(progress.step / progress.steps, f"loss {progress.loss:.2f}")

        return Journal(show=watch)


@final
class Clock:
    """Runs the stages, shows when they begin and end, and keeps how long they took."""

    def __init__(self, show: Listener) -> None:
        self.show = show
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, number: int) -> Iterator[Stage]:
        """Run the stage of this number."""
        stage = Stage(number, self.show)
        started = time.perf_counter()
        stage.at(0)
        yield stage
        self.seconds[STAGES[number]] = time.perf_counter() - started
        stage.at(1, stage.note)
