"""The constants of a plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from musetalk.cli import Positive


@dataclass
class PlanConfig:
    """The constants of a plan; override them on the command line."""

    hours: Positive  # of video to plan for
    hdtf_dir: Path = Path("sample")  # videos, as for datasets_process.py
    hdtf_samples_dir: Path = Path("data/cache")  # the cache; it need not exist
    models_dir: Path = Path("models/mini")  # models/mini: the small test set; models: the published weights
    checkpoint_dir: Path = Path("checkpoints")  # of the trainings; it need not exist
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: CUDA's GPU, or the CPU without one
