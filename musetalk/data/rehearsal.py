"""Rehearsal: a share of the samples of a training comes from older material, so that it is not forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from musetalk.data.cache import Cache
from musetalk.data.dataset import FaceDataset, split_clips
from musetalk.errors import UserError

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


def clips_to_rehearse(older: Cache, share: float, cache: Cache, clips: Sequence[str]) -> list[str]:
    """Returns the clips of the older material to train on: those held out neither there nor in the new cache.

    share: of identities held out there, see `split_clips`. clips: those of the new cache to train on; all its others
    are held out, and so are the identities with no clip among them. Raises UserError if none is left.
    """
    held_out = cache.clips.keys() - set(clips)
    people = {cache.clips[name].identity for name in held_out} - {cache.clips[name].identity for name in clips}
    found = [
        name
        for name in split_clips(older, share)[0]
        if name not in held_out and older.clips[name].identity not in people
    ]
    if not found:
        raise UserError(
            f"{older.folder} has nothing to rehearse, since {cache.folder} holds out all people in it; set "
            "rehearsal_dir to other material, or to None"
        )
    return found
