"""Data loading for one rank of a distributed run."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass

from torch.utils.data import DataLoader

from musetalk.cli import STOP_SIGNALS
from musetalk.data.dataset import FaceDataset
from musetalk.data.rehearsal import RehearsalDataset
from musetalk.data.sync_dataset import SyncDataset

Samples = FaceDataset | SyncDataset | RehearsalDataset


@dataclass(frozen=True)
class SlotSampler:
    """Yields the dataset indices of one rank, batch by batch: its slots of every micro step of every step.

    A micro step is one batch on every rank, so it covers the same slots for any world size as long as the global batch
    size stays the same.
    """

    slots: int  # samples per optimizer step, over micro steps and ranks
    steps: range
    batch_size: int  # of one rank
    rank: int = 0
    world_size: int = 1

    def __iter__(self) -> Iterator[int]:
        for step in self.steps:
            for first_slot in range(self.rank * self.batch_size, self.slots, self.world_size * self.batch_size):
                yield from range(step * self.slots + first_slot, step * self.slots + first_slot + self.batch_size)


def loader(
    dataset: Samples,
    steps: range,
    batch_size: int,
    num_workers: int,
    prefetch: int = 2,
    *,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> DataLoader:
    """Returns a loader of the batches of one rank for a range of steps, in slot order."""
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
    """Lets loader workers ignore signals sent to the process group: the current step still needs their batches."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
