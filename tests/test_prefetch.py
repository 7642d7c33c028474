"""A generator runs ahead in a thread that neither outlives it nor hides its errors."""

from __future__ import annotations

import threading

import pytest

from musetalk.inference.prefetch import prefetched


class Source:
    """Counts from 0 on, and records how far and in which threads."""

    def __init__(self, stop: int = 1000, error: BaseException | None = None) -> None:
        self.stop, self.error = stop, error
        self.taken, self.closed, self.threads = 0, False, set()
        self.reached = threading.Condition()

    def __iter__(self):
        try:
            for k in range(self.stop):
                with self.reached:
                    self.taken = k + 1
                    self.threads.add(threading.current_thread())
                    self.reached.notify_all()
                yield k
            if self.error:
                raise self.error
        finally:
            self.closed = True

    def wait_for(self, count: int) -> bool:
        with self.reached:
            return self.reached.wait_for(lambda: self.taken >= count, timeout=60)


def ended(source: Source) -> bool:
    return source.closed and not any(thread.is_alive() for thread in source.threads)


@pytest.mark.parametrize("depth", [1, 3, 50])
def test_items_come_in_order_from_another_thread(depth):
    source = Source(20)
    assert list(prefetched(iter(source), depth)) == list(range(20))
    assert threading.current_thread() not in source.threads and len(source.threads) == 1
    assert ended(source)


def test_it_runs_ahead_by_the_depth_and_no_further():
    source = Source()
    items = prefetched(iter(source), 3)
    assert source.taken == 0
    assert [next(items), next(items)] == [0, 1]
    assert source.wait_for(5)
    assert source.taken == 5  # its thread has nothing to do until the next item is taken
    items.close()
    assert source.taken == 5 and ended(source)


@pytest.mark.parametrize("error", [ValueError("lost"), KeyboardInterrupt()])
def test_an_error_follows_the_items_before_it_and_stays_the_same(error):
    source, received = Source(5, error), []
    with pytest.raises(type(error)) as caught:
        for item in prefetched(iter(source), 2):
            received.append(item)
    assert caught.value is error and received == list(range(5)) and ended(source)
