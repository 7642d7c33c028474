"""What the ablations compare: recipes, and the people that they are trained and measured on.

A recipe is a preset with the learning rate, steps and batch of the small networks, and its own changes. Most start from
an untrained UNet, the others from the UNet that recipe stage1 trained with the same seed. Each is compared with a
baseline that has the same number of steps and samples. The weight of LPIPS is 0, because its weights are not available.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from musetalk_trainer import PRESETS, TrainConfig
from tools.make_mini.held_out import HELD_OUT, VALIDATION
from tools.make_mini.unet import AVERAGE, SMALL

VIDEOS = Path("data/mini/videos")  # from tools.make_mini.material
CACHE = Path("data/mini/cache")  # of these, with the small networks and measured audio offsets
REAL_WHISPER = Path("../shared/weights/whisper/tiny.en.pt")
SEEDS = (1, 2, 3)  # of the initial weights and of the order of samples; the last two only where recipes are close
CLOSE = 0.05  # difference in r to the baseline
FURTHER_STEPS = 400  # of a trained UNet; every second one has image losses
CURVE_STEPS = (500, 1000, 2000)  # at which stage1 is also measured
DISCRIMINATOR_WIDTH = 16  # a quarter of the full size
# Sync experts: architecture, minutes of video, seed. The measuring expert is never used in training.
EXPERT_STEPS = 1600
TRAINING_EXPERT = ("wav2lip_narrow", "0", "1")
MEASURING_EXPERT = ("latentsync_narrow", "0", "1")
ALL = 0  # minutes: no limit

Encoder = Literal["small", "random", "real"]


@dataclass(frozen=True)
class Material:
    """People to train on and people (or clips of one) that are held out, as identities of `CACHE`."""

    about: str
    identities: tuple[str, ...]  # to train on; (): all except validation people
    held_out: tuple[str, ...]
    num_steps: int  # of an untrained UNet
    minutes: tuple[int, ...]  # of less video, for learning curves
    recipes: tuple[str, ...]

    @property
    def experts(self) -> list[tuple[str, str, str]]:
        """The sync experts, with less video for the learning curve of their accuracy."""
        architecture, _, seed = TRAINING_EXPERT
        less = [(architecture, str(minutes), seed) for minutes in self.minutes]
        return [*less, TRAINING_EXPERT, MEASURING_EXPERT]

    def includes(self, identity: str) -> bool:
        """Whether an identity is trained on. The held-out clips of GRID's speaker s1 have an identity of their own."""
        return identity in self.identities if self.identities else identity not in VALIDATION


@dataclass(frozen=True)
class Recipe:
    """A training, and the recipe that it is compared with."""

    about: str
    config: TrainConfig  # start_from is the name of a recipe; the training task sets all paths and the steps
    baseline: str = "stage1"
    minutes: int = ALL  # of video to train on
    encoder: Encoder = "small"  # of the audio: of models/mini, with random weights, or Whisper's tiny.en


def small(preset: str = "stage1", losses: dict[str, float] | None = None, **changes: Any) -> TrainConfig:
    """A preset for small networks, with the weights of additional losses and other changes."""
    base = PRESETS[preset]
    constants = SMALL | {
        "loss_weights": base.loss_weights | {"lpips": 0.0} | (losses or {}),
        "discriminator_width": DISCRIMINATOR_WIDTH,
        "val_every": 0,
        "save_every": 500,
        "keep_weights": 8,
    }
    if base.ema_decay:
        constants |= AVERAGE
    return replace(base, **constants | changes)


def further(losses: dict[str, float] | None = None, **changes: Any) -> TrainConfig:
    """Preset stage1 for the UNet that recipe stage1 trained, with more image losses."""
    constants: dict[str, Any] = {"pixel_every": 2, "learning_rate": 5e-4, "warmup_steps": 20}
    return small("stage1", losses, start_from="stage1", **constants | changes)


ADVERSARIAL = {"adv_g": 0.01, "feat_match": 0.1, "adv_g_mouth": 0.01, "feat_match_mouth": 0.1}
WINDOW: dict[str, Any] = {"frames": 5, "batch_size": 2}  # of the small sync expert
RECIPES = {
    "stage1": Recipe("preset stage1: single frames, latents and pixels", small()),
    "latent_l1_mouth": Recipe(
        "stage1 with the loss on latents of the mouth added at half the weight",
        small(losses={"latent_l1_mouth": 0.5}),
    ),
    "original": Recipe(
        "preset original: random references, a discriminator from the first step, Adamax", small("original")
    ),
    "random_references": Recipe("stage1 with any other frame as the reference", small(references="random")),
    "adjacent_references": Recipe(
        "stage1 with the frame before or after as the reference, which can be copied", small(references="adjacent")
    ),
    "musetalk_crop": Recipe(
        "stage1 in MuseTalk's crop, whose height follows the jaw; only its correlations can be compared",
        small(contract="musetalk_v15"),
    ),
    "random_encoder": Recipe("stage1 with an untrained audio encoder of the same size", small(), encoder="random"),
    "real_encoder": Recipe("stage1 with Whisper's tiny.en as the audio encoder", small(), encoder="real"),
    "further": Recipe("stage1 for longer", further(), "further"),
    "discriminators": Recipe(
        "further with both discriminators and feature matching", further(ADVERSARIAL, adaptive_every=5), "further"
    ),
    "window": Recipe("further in windows of consecutive frames instead of single ones", further(**WINDOW), "window"),
    "sync": Recipe("window with the sync expert", further({"sync": 0.05}, **WINDOW), "window"),
} | {
    f"minutes_{minutes}": Recipe(f"stage1 with only {minutes} minutes of video", small(), minutes=minutes)
    for minutes in (1, 3, 4, 10)
}

COMMON = (
    *("stage1", "latent_l1_mouth", "original", "random_references", "adjacent_references"),
    *("further", "discriminators", "window", "sync"),
)
MATERIALS = {
    "one": Material(
        "One man, GRID's speaker s1: 9 minutes to train on, other sentences of his held out.",
        ("grid_s1",),
        ("grid_s1_validation",),
        num_steps=2000,
        minutes=(1, 4),
        recipes=(*COMMON, "musetalk_crop", "random_encoder", "real_encoder", "minutes_1", "minutes_4"),
    ),
    "many": Material(
        "All people of the corpus; twelve people are held out.",
        (),
        tuple(HELD_OUT["validation"]["identities"]),
        num_steps=4000,
        minutes=(3, 10),
        recipes=(*COMMON, "minutes_3", "minutes_10"),
    ),
}
