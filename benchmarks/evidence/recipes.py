"""What is compared: recipes of training, and the material that they are tried on.

A recipe is a preset with the learning rate, steps and frames of the small networks, and what else it says here. Some
begin with an untrained UNet, the others go on from one that another recipe has trained with the same seed, and each is
held against a baseline that makes as many steps from as many frames. LPIPS is 0: its weights are not there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from benchmarks import ROOT
from datasets_process import SAMPLE_DIR
from musetalk_trainer import PRESETS, TrainConfig

SEEDS = (1, 2, 3)  # of the weights at the start and of the samples' order
FRAMES = 5  # in a step, as many as the small expert sees
STEPS, PIXEL_EVERY = 300, 5  # updates of an untrained UNet, and between those with losses on images
FURTHER_STEPS = 50  # updates of a trained one, all of them with losses on images
DISCRIMINATOR_WIDTH = 16  # channels of its first layer, a quarter of the real one's
SYNC_STEPS = 300  # updates of the experts
DECODER_STEPS, DECODER_WIDTH = 400, 16  # of the tiny decoder's distillation, channels of its layers
TRAINING_EXPERT, MEASURING_EXPERT = 1, 2  # seeds: the expert that measures is never the one that was trained with
SHARED = ROOT.parent / "shared"
WHISPER = SHARED / "weights/whisper/tiny.en.pt"


@dataclass(frozen=True)
class Recipe:
    """What a training does, and the recipe that it is held against."""

    about: str
    config: TrainConfig
    baseline: str
    after: str = ""  # the recipe whose weights it goes on from; "" is an untrained UNet
    crop: Literal["rigid", "musetalk_v15"] = "rigid"  # the cache's contract
    needs_expert: bool = False  # is it of use only where a sync expert can be trusted?
    tiny_decoder: bool = False  # are losses on images taken through one?
    adjacent: bool = False  # are the references the frames beside those to make?


@dataclass(frozen=True)
class Material:
    """Videos, and who of them is held out: identities, or clips."""

    about: str
    videos: Path
    held_out: tuple[str, ...]
    recipes: tuple[str, ...]

    @property
    def there(self) -> bool:
        """Whether it can be worked on; the sample is made where it is not there."""
        return self.videos == SAMPLE_DIR or self.videos.is_dir()


def small(preset: str, **changes: object) -> TrainConfig:
    """A preset for the small networks."""
    given = PRESETS[preset]
    suited = {
        "start_from": "",
        "num_workers": 0,
        "batch_size": FRAMES,
        "loss_weights": given.loss_weights | {"lpips": 0.0},
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
    if given.ema_decay:
        suited |= {"ema_decay": 0.98, "ema_every": 1}
    return replace(given, **suited | changes)


def stage1(**losses: float) -> TrainConfig:
    """Preset stage1 with further losses."""
    plain = small("stage1")
    return replace(plain, loss_weights=plain.loss_weights | losses, adaptive_every=5)


def further(**losses: float) -> TrainConfig:
    """Preset stage1 for a UNet that is trained, with further losses."""
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
        "stage1 with Adamax, the optimizer of original, and no decay of weights",
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
        "stage1 with the frame before or after as the reference, the short cut",
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
        "further, its losses on images through a tiny decoder", further(), "further", "stage1", tiny_decoder=True
    ),
    "tiny decoder mixed": Recipe(
        "the same, but the VAE's own decoder in every fourth step",
        replace(further(), full_decoder_every=4),
        "further",
        "stage1",
        tiny_decoder=True,
    ),
    "windows": Recipe(
        "further, but a step has one window of frames instead of as many single ones",
        replace(further(), **WINDOW),
        **ON_WINDOWS,
    ),
    "sync": Recipe("windows with the sync expert", replace(further(**SYNC), **WINDOW), **ON_WINDOWS),
    "stage2": Recipe(
        "windows with the sync expert and all of adversarial, as preset stage2 does",
        replace(further(**SYNC, **ADVERSARIAL), **WINDOW),
        **ON_WINDOWS,
    ),
    "four windows": Recipe("windows, four of them in a step", replace(further(), **WINDOWS), **ON_FOUR_WINDOWS),
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
        "Held out: that person's two clips (real) and people__person_5 (synthetic). Audio features by Whisper tiny.en.",
        SHARED / "clips",
        ("WDA_AlexandriaOcasioCortez", "people__person_5"),
        ("stage1", "original", "windows", "sync"),
    ),
}
