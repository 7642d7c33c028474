"""The loader: batches in slot order from any step on, and workers that ignore signals to the trainer."""

from __future__ import annotations

import os
import signal

from musetalk.data.loader import loader
from tests.ranks import Numbers


def indices(batches) -> list[list[str]]:
    return [batch["where"] for batch in batches]


def test_batches_hold_the_slots_in_order_from_any_step_on():
    dataset = Numbers()
    dataset.slots = 4
    assert indices(loader(dataset, range(2), 2, 0)) == [["0", "1"], ["2", "3"], ["4", "5"], ["6", "7"]]
    assert indices(loader(dataset, range(1, 2), 2, 0)) == [["4", "5"], ["6", "7"]]
    assert indices(loader(dataset, range(2, 2), 2, 0)) == []


def test_workers_ignore_the_signals_that_stop_the_trainer():
    alone = indices(loader(Numbers(), range(20), 2, 0))
    batches = iter(loader(Numbers(), range(20), 2, 2))
    found = indices(next(batches) for _ in batches._workers)  # each worker has started
    for worker in batches._workers:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(worker.pid, number)
    assert found + indices(batches) == alone
