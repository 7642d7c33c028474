"""What a run and a state require of the objects passed to them."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch


class RunConfig(Protocol):
    """The constants of a run: a dataclass of any trainer."""

    checkpoint_dir: Path
    log_dir: Path
    batch_size: int
    num_workers: int | None  # None: as many as fit this node
    prefetch: int
    num_steps: int
    save_every: int
    save_minutes: float  # 0: saves by steps alone
    keep_states: int
    keep_weights: int  # this and the next only if weights are saved during training
    keep_weights_every: int
    seed: int

    @property
    def tracker(self) -> str: ...


class State(Protocol):
    """The state of a training."""

    step: int  # optimizer updates made

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]: ...

    def as_dict(self) -> dict: ...

    def restore(self, saved: dict, path: Path) -> None: ...
