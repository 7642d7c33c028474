"""The recipes of the ablations, and the material they are trained on.

A recipe is a preset with the learning rate, steps and frames of the small networks, and the changes defined here. Some
start from an untrained UNet, the others from the UNet of another recipe with the same seed. Each is compared with a
baseline that has the same number of steps and frames. The weight of LPIPS is 0, because its weights are not available.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from benchmarks import ROOT
from datasets_process import SAMPLE_DIR
from musetalk_trainer import PRESETS, TrainConfig

SEEDS = (1, 2, 3)  # of the initial weights and of the order of samples
FRAMES = 5  # of a step, as many as the input of the small expert
STEPS, PIXEL_EVERY = 300, 5  # steps of an untrained UNet, and interval of the steps with pixel losses
FURTHER_STEPS = 50  # steps of a trained UNet, all with pixel losses
DISCRIMINATOR_WIDTH = 16  # channels of the first layer, a quarter of the full size
SYNC_STEPS = 300  # steps of the experts
DECODER_STEPS, DECODER_WIDTH = 400, 16  # of the distillation of the tiny decoder; its channels
TRAINING_EXPERT, MEASURING_EXPERT = 1, 2  # seeds; the measuring expert is never used in training
SHARED = ROOT.parent / "shared"
WHISPER = SHARED / "weights/whisper/tiny.en.pt"


@dataclass(frozen=True)
class Recipe:
    """A training configuration, and the recipe it is compared with."""

    about: str
    config: TrainConfig
    baseline: str
    after: str = ""  # recipe whose weights it starts from; "" starts from an untrained UNet
    crop: Literal["rigid", "musetalk_v15"] = "rigid"  # contract of the cache
    needs_expert: bool = False  # whether it is only useful with a trusted sync expert
    tiny_decoder: bool = False  # whether pixel losses use a tiny decoder
    adjacent: bool = False  # whether the references are the neighbouring frames


@dataclass(frozen=True)
class Material:
    """Videos, with the identities or clips that are held out."""

    about: str
    videos: Path
    held_out: tuple[str, ...]
    recipes: tuple[str, ...]

    @property
    def available(self) -> bool:
        """Whether the videos exist; the sample is created if needed."""
        return self.videos == SAMPLE_DIR or self.videos.is_dir()


def small(preset: str, **changes: object) -> TrainConfig:
    """A preset for the small networks."""
    base = PRESETS[preset]
    constants = {
        "start_from": "",
        "num_workers": 0,
        "batch_size": FRAMES,
        "loss_weights": base.loss_weights | {"lpips": 0.0},
        "pixel_every": PIXEL_EVERY,
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


def stage1(**losses: float) -> TrainConfig:
    """Preset stage1 with additional losses."""
    base = small("stage1")
    return replace(base, loss_weights=base.loss_weights | losses, adaptive_every=5)


def further(**losses: float) -> TrainConfig:
    """Preset stage1 for a trained UNet, with additional losses."""
    return replace(
        stage1(**losses),
        pixel_every=1,
        learning_rate=1e-3,
        warmup_steps=5,
        num_steps=FURTHER_STEPS,
    )


ADVERSARIAL = {"adv_g": 0.01, "feat_match": 0.1, "adv_g_mouth": 0.01, "feat_match_mouth": 0.1}
SYNC = {"sync": 0.05}
WINDOW = {"frames": FRAMES, "batch_size": 1}
WINDOWS = WINDOW | {"batch_size": 4}
ON_WINDOWS = {"baseline": "windows", "after": "stage1", "needs_expert": True}
ON_FOUR_WINDOWS = ON_WINDOWS | {"baseline": "four windows"}
RECIPES = {
    "stage1": Recipe("preset stage1: single frames, latents and pixels", small("stage1"), "stage1"),
    "original": Recipe(
        "preset original: random references, a discriminator from the first step, Adamax", small("original"), "stage1"
    ),
    "adamax": Recipe(
        "stage1 with Adamax, the optimizer of original, and no weight decay",
        small("stage1", optimizer="adamax", weight_decay=0.0),
        "stage1",
    ),
    "discriminators": Recipe(
        "stage1 with both discriminators and feature matching from the first step", stage1(**ADVERSARIAL), "stage1"
    ),
    "random references": Recipe(
        "stage1 with any other frame as the reference", small("stage1", references="random"), "stage1"
    ),
    "adjacent references": Recipe(
        "stage1 with the frame before or after as the reference, which allows a shortcut",
        small("stage1"),
        "stage1",
        adjacent=True,
    ),
    "no positions": Recipe(
        "stage1 without positional encoding of the audio", small("stage1", positional_encoding=False), "stage1"
    ),
    "musetalk crop": Recipe(
        "stage1 in MuseTalk's crop, whose height follows the jaw; only its correlations can be compared",
        small("stage1"),
        "stage1",
        crop="musetalk_v15",
    ),
    "further": Recipe("stage1 for longer", further(), "further", "stage1"),
    "adversarial": Recipe(
        "further with both discriminators and feature matching", further(**ADVERSARIAL), "further", "stage1"
    ),
    "tiny decoder": Recipe(
        "further, with pixel losses through a tiny decoder", further(), "further", "stage1", tiny_decoder=True
    ),
    "tiny decoder mixed": Recipe(
        "tiny decoder, but with the VAE's own decoder in every fourth step",
        replace(further(), full_decoder_every=4),
        "further",
        "stage1",
        tiny_decoder=True,
    ),
    "windows": Recipe(
        "further, but a step has one window of consecutive frames instead of as many single frames",
        replace(further(), **WINDOW),
        **ON_WINDOWS,
    ),
    "sync": Recipe("windows with the sync expert", replace(further(**SYNC), **WINDOW), **ON_WINDOWS),
    "stage2": Recipe(
        "windows with the sync expert and all of adversarial, as preset stage2 does",
        replace(further(**SYNC, **ADVERSARIAL), **WINDOW),
        **ON_WINDOWS,
    ),
    "four windows": Recipe("windows, but four per step", replace(further(), **WINDOWS), **ON_FOUR_WINDOWS),
    "four windows sync": Recipe(
        "four windows with the sync expert", replace(further(**SYNC), **WINDOWS), **ON_FOUR_WINDOWS
    ),
}
MATERIALS = {
    "sample": Material(
        "The built-in sample: eight clips of one portrait that babbles, two of them held out.",
        SAMPLE_DIR,
        ("sample_03", "sample_07"),
        tuple(RECIPES),
    ),
    "clips": Material(
        "Fourteen people, three minutes. Real: talking_a, talking_b, portrait_hevc and the person of "
        "WDA_AlexandriaOcasioCortez_000 and talking_c; the ten of people/ are synthetic, made from portraits. "
        "Held out: that person's two clips (real) and people__person_5 (synthetic). Audio features of Whisper tiny.en.",
        SHARED / "clips",
        ("WDA_AlexandriaOcasioCortez", "people__person_5"),
        ("stage1", "original", "windows", "sync"),
    ),
}
