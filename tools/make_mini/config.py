"""The constants of the small networks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Config:
    """The constants; override them on the command line."""

    clips: Path = Path("../shared/clips")  # folder of videos, searched to any depth
    models_dir: Path = Path(__file__).parents[2] / "models" / "mini"
    seed: int = 0
    num_threads: int = 1

    # Crops
    frame_step: int = 5  # every 5th frame of a clip
    held_out_frame_step: int = 25  # for held-out clips
    max_margin: int = 20  # source px below the chin
    max_zoom_out: float = 1.8  # size of the largest crop, relative to MuseTalk's
    max_shift: float = 0.15  # largest offset of a wide crop, relative to its size

    # Network
    block_out_channels: tuple[int, ...] = (16, 32, 48, 128)
    norm_num_groups: int = 4

    # Training
    num_steps: int = 5600
    num_whole_steps: int = 900  # the last steps use whole crops, for the statistics of GroupNorm
    batch_size: int = 8  # patches
    whole_batch_size: int = 2  # crops
    patch_size: int = 128  # px
    masked_share: float = 0.25  # of the patches have their lower half masked
    sampled_every: int = 4  # steps; in these the latents are sampled from the posterior, else its mode is used
    learning_rate: float = 6e-4  # peak
    betas: tuple[float, float] = (0.9, 0.99)
    num_warmup_steps: int = 200
    kl_weight: float = 1e-6  # per latent
    max_grad_norm: float = 1.0
    ema_decay: float = 0.998
    save_every: int = 300  # steps
