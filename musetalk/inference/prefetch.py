"""Runs a generator ahead of its consumer, so that the stages of a pipeline work at the same time."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")


def prefetched(items: Generator[Item, None, None], depth: int) -> Generator[Item, None, None]:
    """Yields the items of a generator, which runs in a thread, at most `depth` items ahead.

    An exception of the generator reaches the consumer as it is. When this generator ends or is closed, its thread has
    ended and `items` is closed.
    """

    def take() -> list[Item]:
        """The next item, none at the end."""
        return list(islice(items, 1))

    with closing(items):
        thread = ThreadPoolExecutor(1)
        try:
            ahead = deque(thread.submit(take) for _ in range(depth))
            while taken := ahead.popleft().result():
                ahead.append(thread.submit(take))
                yield from taken
        finally:
            thread.shutdown(cancel_futures=True)
