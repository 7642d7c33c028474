"""The constants of the GPU check."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass
class GpuCheckConfig:
    """The constants of the check; override them on the command line."""

    material: Path = Path("data/gpu_material")  # cache of one person's clips, with latents of the VAE in vae_dir
    output: Path = Path("output/gpu_check")
    models_dir: Path = Path("models")  # sizes of the networks
    vae_dir: Path = Path("models/mini")
    quick: bool = False  # seconds instead of minutes: one learning rate, chunk size and height each
    checks: tuple[Literal["learning", "steps", "dubbing"], ...] = ("learning", "steps", "dubbing")
    presets: tuple[str, ...] = ("stage1", "stage2")  # presets whose steps are measured
    chunk_sizes: tuple[int, ...] = (16, 4, 1)
    batch_size: int = 0  # samples of a micro step; 0: that of the preset
    heights: tuple[int, ...] = (720, 1080)  # pixels, of the dubbed videos
    learning_rates: tuple[float, ...] = (2e-5, 1e-4)
    learn_seconds: float = 120.0  # per learning rate; a tenth of it in a quick check
