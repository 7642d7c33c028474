"""Time spent in each stage of a computation."""

from __future__ import annotations

import sys
import threading
import time
from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


class Counted(threading.local):
    """The time that a thread has already counted, in seconds."""

    seconds = 0.0


class StageTimer:
    """Measures the time spent in each stage, without that of the stages nested in it. Stages may run in threads."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._counted = Counted()

    @contextmanager
    def __call__(self, stage: str | None) -> Iterator[None]:
        """Adds the time spent in the block to `stage`, except what the block adds to other stages.

        None: to no stage, as for the time that a stage waits for another thread.
        """
        start, counted = time.perf_counter(), self._counted.seconds
        yield
        nested = self._counted.seconds - counted
        own = time.perf_counter() - start - nested
        self._counted.seconds += own
        if stage:
            self.seconds[stage] += own

    def iterate(self, stage: str | None, items: Iterable[Item]) -> Generator[Item, None, None]:
        """Yields the items and adds the time taken to produce them to `stage`."""
        iterator = iter(items)
        while True:
            with self(stage):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def report(self, frames: int) -> None:
        """Prints the throughput of each stage on its own, below the progress bar."""
        rates = (f"{stage} {frames / seconds:.1f}" for stage, seconds in self.seconds.items())
        tqdm.write(f"frames/s: {', '.join(rates)}", file=sys.stderr)
