"""The tasks of the ablations: caches, sync experts, tiny decoders, and for each recipe and seed a training and its
measurement. They run the project's own scripts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch

import musetalk_trainer
import syncnet_trainer
from ablations.recipes import (
    DECODER_STEPS,
    DECODER_WIDTH,
    MATERIALS,
    MEASURING_EXPERT,
    RECIPES,
    SEEDS,
    SYNC_STEPS,
    TRAINING_EXPERT,
)
from datasets_process import PrepareConfig
from datasets_process import main as prepare
from musetalk.data.cache import Cache
from musetalk.data.dataset import split_clips
from musetalk.files import atomic_write_bytes, read_json
from musetalk.inference.pipeline import LipSyncPipeline
from musetalk.models.syncnet import SyncNet, load_syncnet
from musetalk.training.pictures import ClipResult
from musetalk.training.sync_check import check_expert
from musetalk.training.validation import Validator
from tools.distil_decoder import DistilConfig
from tools.distil_decoder import main as distil

ROOT = Path(__file__).parents[1]
WORK = ROOT / "data/ablations"  # can be deleted
MODELS = ROOT / "models/mini"
UNET = "unet"  # name of the folder with the weights of a training
FRAMES_MEASURED = 40  # of each held-out clip
STRIP = (0.0, 0.5, 1.0)  # quantiles of mouth opening shown in a strip


@dataclass(frozen=True)
class Task:
    """A task of a kind on a material, with its arguments."""

    kind: str
    material: str
    arguments: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "-".join((self.kind, self.material, *self.arguments))

    @property
    def folder(self) -> Path:
        """The folder of its files."""
        return WORK / self.name

    @property
    def result(self) -> Path:
        """The file of its result, which exists if it is done."""
        return WORK / "results" / f"{self.name}.json"

    @property
    def done(self) -> bool:
        return self.result.exists()

    @property
    def resumable(self) -> bool:
        """Whether it resumes after an interruption; the other tasks are short and start again."""
        return self.kind in ("cache", "expert", "training")

    @property
    def ruled_out(self) -> bool:
        """Whether its recipe has a sync loss and a sync expert of its material failed the check."""
        if self.kind not in ("training", "measurement"):
            return False
        return RECIPES[self.arguments[0]].config.loss_weights["sync"] > 0 and unfit(self.material)

    def run(self) -> None:
        """Runs or resumes it and writes its result."""
        result = KINDS[self.kind](self.folder, self.material, *self.arguments)
        atomic_write_bytes(self.result, (json.dumps(result, indent=1) + "\n").encode())


def stages() -> Iterator[list[Task]]:
    """All tasks in stages, each of which only needs the stages before it."""
    recipes = [(material, name) for material in MATERIALS for name in MATERIALS[material].recipes]
    crops = dict.fromkeys((material, RECIPES[name].config.contract) for material, name in recipes)
    for material, crop in crops:
        yield [Task("cache", material, (crop,))]  # on all cores
    experts = [
        Task("expert", material, (str(seed),)) for material in MATERIALS for seed in (TRAINING_EXPERT, MEASURING_EXPERT)
    ]
    decoders = dict.fromkeys(material for material, name in recipes if RECIPES[name].tiny_decoder)
    yield experts + [Task("decoder", material) for material in decoders]
    for seed in map(str, SEEDS):
        for trained in (False, True):
            yield [
                Task("training", material, (name, seed))
                for material, name in recipes
                if bool(RECIPES[name].config.start_from) == trained
            ]
        yield [Task("measurement", material, (name, seed)) for material, name in recipes]


def make_cache(folder: Path, material: str, crop: Literal["rigid", "musetalk_v15", "musetalk_v1"]) -> dict:
    """Prepares all videos. Returns the numbers of clips, frames and usable frames."""
    prepare(PrepareConfig(MATERIALS[material].videos, folder, models_dir=MODELS, contract=crop))
    clips = Cache(folder).clips.values()
    return {
        "clips": len(clips),
        "frames": sum(map(len, clips)),
        "usable": sum(int(clip.usable.sum()) for clip in clips),
    }


def make_expert(folder: Path, material: str, seed: str) -> dict:
    """Trains the small sync expert. Returns the result of its check on held-out clips."""
    cache = open_cache(material)
    config = replace(
        syncnet_trainer.PRESETS["demo"],
        hdtf_samples_dir=cache.folder,
        checkpoint_dir=folder,
        log_dir=folder / "log",
        held_out_identities=MATERIALS[material].held_out,
        num_steps=SYNC_STEPS,
        seed=int(seed),
    )
    syncnet_trainer.train("demo", config)
    check = check_expert(load_expert(material, config.seed), cache, held_out_clips(material, cache), config.seed)
    return {"accuracy": check.accuracy, "offset": check.offset, "confidence": check.confidence, "fault": check.fault()}


def make_decoder(folder: Path, material: str) -> dict:
    """Distils a tiny decoder."""
    config = DistilConfig(
        cache=open_cache(material).folder,
        models_dir=MODELS,
        checkpoint_dir=folder,
        log_dir=folder / "log",
        held_out_identities=MATERIALS[material].held_out,
        width=DECODER_WIDTH,
        num_steps=DECODER_STEPS,
        batch_size=2,
    )
    distil(config)
    return {}


def make_training(folder: Path, material: str, recipe: str, seed: str) -> dict:
    """Trains a recipe."""
    config, tiny_decoder = RECIPES[recipe].config, Task("decoder", material).folder / "tiny_decoder.safetensors"
    config = replace(
        config,
        hdtf_samples_dir=open_cache(material, config.contract).folder,
        models_dir=MODELS,
        checkpoint_dir=folder,
        log_dir=folder / "log",
        held_out_identities=MATERIALS[material].held_out,
        start_from=str(weights_folder(material, config.start_from, seed)) if config.start_from else "",
        tiny_decoder=str(tiny_decoder) if RECIPES[recipe].tiny_decoder else "",
        sync_expert=str(expert_folder(material, TRAINING_EXPERT)),
        seed=int(seed),
    )
    musetalk_trainer.train(UNET, config)
    return {}


def make_measurement(folder: Path, material: str, recipe: str, seed: str) -> dict:
    """Validates a trained recipe, with a sync expert that was not used in training if it can be trusted.

    Returns figures and mouth openings; writes strips of generated and of true faces.
    """
    cache = open_cache(material, RECIPES[recipe].config.contract)
    expert = None if unfit(material) else load_expert(material, MEASURING_EXPERT)
    pipeline = LipSyncPipeline.from_checkpoint(weights_folder(material, recipe, seed), MODELS)
    clips = held_out_clips(material, cache)
    validation = Validator(pipeline, cache, clips, frames=FRAMES_MEASURED, expert=expert)()
    write_strip(folder / "prediction.jpg", validation.results, lambda result: result.images["prediction"])
    write_strip(folder / "truth.jpg", validation.results, lambda result: result.truth)
    return {"figures": validation.figures, "openings": [openings(result) for result in validation.results]}


KINDS: dict[str, Callable[..., dict]] = {
    "cache": make_cache,
    "expert": make_expert,
    "decoder": make_decoder,
    "training": make_training,
    "measurement": make_measurement,
}


def open_cache(material: str, crop: str = "rigid") -> Cache:
    return Cache(Task("cache", material, (crop,)).folder)


def held_out_clips(material: str, cache: Cache) -> list[str]:
    """Names of the held-out clips."""
    return split_clips(cache, 0, MATERIALS[material].held_out)[1]


def weights_folder(material: str, recipe: str, seed: str) -> Path:
    return Task("training", material, (recipe, seed)).folder / UNET


def expert_folder(material: str, seed: int) -> Path:
    return Task("expert", material, (str(seed),)).folder / "syncnet_demo"


def load_expert(material: str, seed: int) -> SyncNet:
    return load_syncnet(MODELS, str(expert_folder(material, seed)), torch.device("cpu"))


def unfit(material: str) -> bool:
    """Whether one of the two experts failed its check."""
    results = [Task("expert", material, (str(seed),)).result for seed in (TRAINING_EXPERT, MEASURING_EXPERT)]
    return any(path.exists() and read_json(path)["fault"] for path in results)


def write_strip(path: Path, results: Sequence[ClipResult], images: Callable[[ClipResult], np.ndarray]) -> None:
    """Writes faces side by side, with a closed, a half-open and an open mouth, each of another clip, as a JPEG."""
    faces = []
    for index, share in enumerate(STRIP):
        result = results[index % len(results)]
        order = result.window.openings.argsort()
        faces.append(images(result)[order[round(share * (len(order) - 1))]])
    encoded = cv2.imencode(".jpg", np.hstack(faces), [cv2.IMWRITE_JPEG_QUALITY, 92])[1]
    atomic_write_bytes(path, encoded.tobytes())


def openings(result: ClipResult) -> dict:
    """True and generated mouth openings of a clip."""
    series = {"truth": result.window.openings, "prediction": result.openings["prediction"]}
    return {"clip": result.window.clip.name} | {k: [round(float(x), 4) for x in v] for k, v in series.items()}
