"""What a run needs of a training: its constants and its state."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch


class RunConfig(Protocol):
    """The constants of a run, whatever is trained: a dataclass."""

    checkpoint_dir: Path
    log_dir: Path
    batch_size: int
    num_workers: int | None  # None: as many as fit this node
    prefetch: int
    num_steps: int
    save_every: int
    save_minutes: float  # 0: saved by steps alone
    keep_states: int
    keep_weights: int  # these two only where weights are saved on the way
    keep_weights_every: int
    seed: int


class State(Protocol):
    """All that moves in a training."""

    step: int  # optimizer updates made
    optimizers: list[torch.optim.Optimizer]

    def as_dict(self) -> dict: ...

    def restore(self, saved: dict, path: Path) -> None: ...
