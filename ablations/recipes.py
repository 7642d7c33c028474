"""What the ablations compare: recipes, and the materials that they are trained on.

A recipe is a preset with the learning rate, steps and frames of the small networks, and its own changes. Some start
from an untrained UNet, the others from the UNet of another recipe with the same seed. Each is compared with a baseline
that has the same number of steps and frames. The weight of LPIPS is 0, because its weights are not available.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from musetalk.data.dataset import SAMPLE_HELD_OUT
from musetalk_trainer import PRESETS, TrainConfig

SEEDS = (1, 2, 3)  # of the initial weights and of the order of samples
FRAMES = 5  # of a step, as many as the window of the small expert
STEPS, PIXEL_EVERY = 300, 5  # steps of an untrained UNet, and interval of the steps with image losses
FURTHER_STEPS = 50  # steps of a trained UNet, all with image losses
DISCRIMINATOR_WIDTH = 16  # a quarter of the full size
SYNC_STEPS = 300  # steps of the experts
DECODER_STEPS, DECODER_WIDTH = 400, 16  # of the tiny decoder
TRAINING_EXPERT, MEASURING_EXPERT = 1, 2  # seeds; the measuring expert is never used in training


@dataclass(frozen=True)
class Material:
    """Videos, with the identities that are held out (or clips, if there is one identity)."""

    about: str
    videos: Path
    held_out: tuple[str, ...]
    recipes: tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """A training, and the recipe that it is compared with."""

    about: str
    config: TrainConfig  # start_from is the name of a recipe; the training task sets all paths
    baseline: str = "stage1"
    tiny_decoder: bool = False  # whether image losses use a tiny decoder


def small(preset: str = "stage1", losses: dict[str, float] | None = None, **changes: Any) -> TrainConfig:
    """A preset for small networks, with the weights of additional losses and other changes."""
    base = PRESETS[preset]
    constants: dict[str, Any] = {
        "num_workers": 0,
        "batch_size": FRAMES,
        "loss_weights": base.loss_weights | {"lpips": 0.0} | (losses or {}),
        "pixel_every": PIXEL_EVERY,
        "discriminator_width": DISCRIMINATOR_WIDTH,
        "learning_rate": 3e-3,
        "final_learning_rate": 1e-4,
        "warmup_steps": 20,
        "num_steps": STEPS,
        "log_every": 20,
        "sample_every": STEPS,
        "val_every": 0,
        "save_every": 50,
        "keep_states": 1,
    }
    if base.ema_decay:
        constants |= {"ema_decay": 0.98, "ema_every": 1}
    return replace(base, **constants | changes)


def further(losses: dict[str, float] | None = None, **changes: Any) -> TrainConfig:
    """Preset stage1 for the UNet that recipe stage1 trained, with image losses in every step."""
    constants: dict[str, Any] = {"pixel_every": 1, "learning_rate": 1e-3, "warmup_steps": 5, "num_steps": FURTHER_STEPS}
    return small("stage1", losses, start_from="stage1", **constants | changes)


SYNC = {"sync": 0.05}
ADVERSARIAL = {"adv_g": 0.01, "feat_match": 0.1, "adv_g_mouth": 0.01, "feat_match_mouth": 0.1}
ADAPTIVE: dict[str, Any] = {"adaptive_every": 5}
WINDOW: dict[str, Any] = {"frames": FRAMES, "batch_size": 1}
FOUR_WINDOWS: dict[str, Any] = {"frames": FRAMES, "batch_size": 4}
RECIPES = {
    "stage1": Recipe("preset stage1: single frames, latents and pixels", small()),
    "original": Recipe(
        "preset original: random references, a discriminator from the first step, Adamax", small("original")
    ),
    "discriminators": Recipe(
        "stage1 with both discriminators and feature matching from the first step",
        small(losses=ADVERSARIAL, **ADAPTIVE),
    ),
    "random_references": Recipe("stage1 with any other frame as the reference", small(references="random")),
    "adjacent_references": Recipe(
        "stage1 with the frame before or after as the reference, which can be copied", small(references="adjacent")
    ),
    "no_positions": Recipe("stage1 without positional encoding of the audio tokens", small(positional_encoding=False)),
    "musetalk_crop": Recipe(
        "stage1 in MuseTalk's crop, whose height follows the jaw; only its correlations can be compared",
        small(contract="musetalk_v15"),
    ),
    "further": Recipe("stage1 for longer", further(), "further"),
    "adversarial": Recipe(
        "further with both discriminators and feature matching", further(ADVERSARIAL, **ADAPTIVE), "further"
    ),
    "tiny_decoder": Recipe("further with image losses through a tiny decoder", further(), "further", tiny_decoder=True),
    "window": Recipe(
        "further, but a step has a window of consecutive frames instead of as many single frames",
        further(**WINDOW),
        "window",
    ),
    "sync": Recipe("window with the sync expert", further(SYNC, **WINDOW), "window"),
    "stage2": Recipe(
        "window with the sync expert and all of adversarial, as preset stage2 does",
        further(SYNC | ADVERSARIAL, **WINDOW, **ADAPTIVE),
        "window",
    ),
    "four_windows": Recipe("window, but four per step", further(**FOUR_WINDOWS), "four_windows"),
    "four_windows_sync": Recipe("four_windows with the sync expert", further(SYNC, **FOUR_WINDOWS), "four_windows"),
}
MATERIALS = {
    "sample": Material(
        "The built-in sample: 28 clips of one man, two of them held out.",
        Path("sample"),
        SAMPLE_HELD_OUT[:2],
        tuple(RECIPES),
    ),
}
