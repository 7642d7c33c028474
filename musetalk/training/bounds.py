"""Bounds of the reconstruction losses, printed before the first step."""

from __future__ import annotations

from typing import Any

from torch.utils.data import default_collate

from musetalk.data.dataset import FaceDataset
from musetalk.training.log import RunLog, SilentLog

BOUNDS_SAMPLES = 16  # held-out ones that the bounds are measured on


def first_batch(dataset: FaceDataset) -> dict[str, Any]:
    """The samples of the first step of a dataset, as one batch."""
    return default_collate([dataset[slot] for slot in range(dataset.slots)])


def report_bounds(bounds: dict[str, tuple[float, float]], log: RunLog | SilentLog) -> None:
    """Writes a table of the floor and the ceiling of each loss, and records them at step 0.

    bounds: see `losses.objective.Objective.bounds`.
    """
    lines = [f"{'on held-out samples':<24}{'floor: VAE':>12}{'ceiling: copying':>18}"]
    lines += [f"{name:<24}{floor:>12.4g}{ceiling:>18.4g}" for name, (floor, ceiling) in bounds.items()]
    log.line("\n".join(lines))
    floors = {f"{name}_floor": floor for name, (floor, _) in bounds.items()}
    log.store(0, floors | {f"{name}_ceiling": ceiling for name, (_, ceiling) in bounds.items()})
