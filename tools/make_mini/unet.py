"""Trains the small UNet of models/mini on a cache of the people that are not held out.

    python -m tools.make_mini.unet --cache data/mini/cache

Trains in three phases in `work_dir`, for about two and a half hours on one core, and writes
`<models_dir>/musetalk/unet.safetensors` in fp16. To resume after an interruption, run the same command again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from musetalk.cli import run_script
from musetalk.models.trained_unet import find_unet, load_trained_unet, write_unet
from musetalk_trainer import PRESETS, train, weights
from tools.make_mini.held_out import VALIDATION

# Constants of trainings of the small networks, also of those that the ablations compare
SMALL: dict[str, Any] = {
    "num_workers": 0,
    "batch_size": 8,
    "pixel_every": 10,
    "learning_rate": 2e-3,
    "final_learning_rate": 1e-4,
    "warmup_steps": 100,
    "keep_states": 1,
}
AVERAGE: dict[str, Any] = {"ema_decay": 0.995, "ema_every": 1}
LOSSES = {"latent_l1": 1.0, "pixel_l1": 1.0}  # no LPIPS: its weights are not available
FIRST = replace(
    PRESETS["stage1"],
    **SMALL,
    **AVERAGE,
    held_out_identities=VALIDATION,
    silence_share=0.05,
    loss_weights=weights(**LOSSES),
    num_steps=8000,
    sample_every=1000,
    val_every=4000,
    val_clips=14,
    val_frames=75,
    save_every=1000,
    save_minutes=10.0,
    keep_weights=9,
)
PHASES = {  # start_from is in the folder of all phases
    "first": FIRST,
    "longer": replace(FIRST, start_from="first", learning_rate=1e-3, val_every=8000),
    # Discriminators sharpen mouths, which L1 leaves soft.
    "sharper": replace(
        FIRST,
        start_from="longer/unet-0007000.safetensors",
        learning_rate=5e-4,
        warmup_steps=20,
        pixel_every=2,
        loss_weights=weights(**LOSSES, adv_g=0.02, feat_match=0.1, adv_g_mouth=0.04, feat_match_mouth=0.2),
        discriminator_width=16,
        discriminator_learning_rate=5e-4,
        num_steps=600,
        val_every=600,
        save_every=200,
    ),
}


@dataclass(frozen=True)
class UNetConfig:
    """Folders; override on the command line."""

    cache: Path = Path("data/mini/cache")
    models_dir: Path = Path(__file__).parents[2] / "models" / "mini"
    work_dir: Path = Path("data/mini/unet")


def main(config: UNetConfig) -> None:
    """Trains the UNet and writes its averaged weights."""
    paths: dict[str, Any] = {"hdtf_samples_dir": config.cache, "models_dir": config.models_dir}
    paths |= {"checkpoint_dir": config.work_dir, "log_dir": config.work_dir / "log"}
    for name, phase in PHASES.items():
        start_from = str(config.work_dir / phase.start_from) if phase.start_from else ""
        train(name, replace(phase, **paths, start_from=start_from))
    unet, contract = load_trained_unet(find_unet(config.work_dir / name), config.models_dir)
    tensors = {name: tensor.half() for name, tensor in unet.model.state_dict().items()}
    write_unet(config.models_dir / "musetalk" / "unet.safetensors", tensors, contract)


if __name__ == "__main__":
    run_script(main, tyro.cli(UNetConfig, description=__doc__))
