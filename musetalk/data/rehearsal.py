"""Rehearsal: a share of the samples of a training comes from older material, so that it is not forgotten."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.utils.data import Dataset

from musetalk.data.dataset import FaceDataset

CHOICE = 1  # follows seed, step and slot in the seed of the choice, which is then independent of the sample's own


class RehearsalDataset(Dataset):
    """Two datasets as one; item step * slots + slot is the sample of that slot in one of them."""

    def __init__(self, dataset: FaceDataset, older: FaceDataset, share: float) -> None:
        """share: of the samples from `older`, which has as many slots and the same seed."""
        assert (older.slots, older.seed) == (dataset.slots, dataset.seed)
        self.dataset, self.older, self.share = dataset, older, share
        self.slots = dataset.slots

    def listing(self) -> str:
        """Returns a value that differs if the clips do, see `Cache.listing`."""
        return f"{self.dataset.listing()} {self.older.listing()}"

    def is_older(self, step: int, slot: int) -> bool:
        """Whether the sample of a slot is one of `older`."""
        return np.random.default_rng([self.dataset.seed, step, slot, CHOICE]).random() < self.share

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return (self.older if self.is_older(*divmod(index, self.slots)) else self.dataset)[index]
