"""Batches of a dataset for one of several processes."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass

from torch.utils.data import DataLoader, Dataset

from musetalk.cli import STOP_SIGNALS


@dataclass(frozen=True)
class SlotSampler:
    """The items of a dataset that one of several processes reads, batch by batch: its slots of each part of each step.

    A part of a step is one batch of every process, so the parts hold the same slots on any number of processes whose
    batches are together as large.
    """

    slots: int  # samples in one optimizer step, over parts and processes
    steps: range
    batch_size: int  # of one process
    rank: int = 0
    world_size: int = 1

    def __iter__(self) -> Iterator[int]:
        for step in self.steps:
            for begin in range(self.rank * self.batch_size, self.slots, self.world_size * self.batch_size):
                yield from range(step * self.slots + begin, step * self.slots + begin + self.batch_size)


def loader(
    dataset: Dataset,
    steps: range,
    batch_size: int,
    num_workers: int,
    prefetch: int = 2,
    *,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> DataLoader:
    """Batches of some steps for one of several processes, in the order of their slots. dataset: has `slots`."""
    return DataLoader(
        dataset,
        batch_size,
        sampler=SlotSampler(dataset.slots, steps, batch_size, rank, world_size),
        num_workers=num_workers,
        prefetch_factor=prefetch if num_workers else None,
        pin_memory=pin_memory,
        worker_init_fn=ignore_stop_requests,
    )


def ignore_stop_requests(_: int) -> None:
    """A worker goes on through what is sent to the whole group of processes: the step at hand needs it."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
