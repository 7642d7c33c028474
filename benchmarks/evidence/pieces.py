"""The tasks of the ablations: caches, sync experts, and a training and its measurement for each recipe and seed.

They run the project's own scripts.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import cv2
import numpy as np
import torch

import musetalk_trainer
import syncnet_trainer
from benchmarks import ROOT
from benchmarks.evidence.recipes import (
    DECODER_STEPS,
    DECODER_WIDTH,
    DISCRIMINATOR_WIDTH,
    MATERIALS,
    MEASURING_EXPERT,
    RECIPES,
    SYNC_STEPS,
    TRAINING_EXPERT,
    WHISPER,
)
from datasets_process import PrepareConfig
from datasets_process import main as prepare
from losses.discriminator import PatchDiscriminator
from musetalk.data.cache import Cache
from musetalk.data.dataset import FaceDataset
from musetalk.files import atomic_write_bytes, read_json
from musetalk.inference.pipeline import LipSyncPipeline
from musetalk.models.syncnet import SyncNet, load_syncnet
from musetalk.training.sync_check import check_expert
from musetalk.training.validation import ClipResult, Validator
from tools.distil_decoder import DistilConfig
from tools.distil_decoder import main as distil

WORK = ROOT / "data/evidence"  # caches, experts and trainings; can be deleted
RESULTS = ROOT / "benchmarks/evidence/results"  # a JSON and a strip of faces for each task
MINI = ROOT / "models/mini"
UNET = "unet"  # name of the folder with the weights of a training
FRAMES_MEASURED = 40  # of each held-out clip
STRIP = (0.0, 0.5, 1.0)  # quantiles of mouth opening shown in a strip


@dataclass(frozen=True)
class Piece:
    """A task of a kind, with its arguments, of which the first is the material."""

    kind: str
    subject: tuple[str, ...]

    @property
    def name(self) -> str:
        return "-".join((self.kind, *self.subject)).replace(" ", "_")

    @property
    def folder(self) -> Path:
        """The folder of its files on this machine."""
        return WORK / self.name

    @property
    def result(self) -> Path:
        """The file of its result, if it returns one."""
        return RESULTS / f"{self.name}.json"

    @property
    def done(self) -> bool:
        """Whether it is finished: a measurement if its result exists, another task if its files are on this machine."""
        return (self.result if self.kind == "measurement" else self.folder.with_suffix(".done")).exists()

    @property
    def resumable(self) -> bool:
        """Whether it resumes after an interruption; the other tasks are short and start again."""
        return self.kind in ("cache", "expert", "training")

    @property
    def ruled_out(self) -> bool:
        """Whether it needs a sync expert and that of its material is known to be unfit."""
        if self.kind in ("cache", "decoder") or not unfit(self.subject[0]):
            return False
        if self.kind == "expert":
            return self.subject[1] == str(MEASURING_EXPERT)
        return RECIPES[self.subject[1]].needs_expert

    @property
    def needs(self) -> list[Piece]:
        """The tasks that it depends on."""
        return KINDS[self.kind][1](*self.subject)

    def finish(self) -> None:
        """Runs or resumes it."""
        if result := KINDS[self.kind][0](self.folder, *self.subject):
            atomic_write_bytes(self.result, (json.dumps(result, indent=1) + "\n").encode())
        atomic_write_bytes(self.folder.with_suffix(".done"), b"")


def make_cache(folder: Path, material: str, crop: str) -> dict:
    """Prepares all videos. Returns the numbers of clips, frames and usable frames."""
    prepare(
        PrepareConfig(
            hdtf_dir=MATERIALS[material].videos,
            hdtf_samples_dir=folder,
            models_dir=models_folder(material),
            contract=crop,
        )
    )
    clips = Cache(folder).clips.values()
    return {
        "clips": len(clips),
        "frames": sum(map(len, clips)),
        "usable": sum(int(clip.usable.sum()) for clip in clips),
    }


def make_expert(folder: Path, material: str, seed: str) -> dict:
    """Trains the small sync expert. Returns the result of its check on held-out clips."""
    cache = Cache(Piece("cache", (material, "rigid")).folder)
    config = replace(
        syncnet_trainer.PRESETS["demo"],
        hdtf_samples_dir=cache.folder,
        checkpoint_dir=folder,
        log_dir=folder / "log",
        num_steps=SYNC_STEPS,
        seed=int(seed),
    )
    with patch("syncnet_trainer.split_clips", partial(split, material)):
        syncnet_trainer.train("demo", config)
    check = check_expert(load_expert(folder), cache, split(material, cache)[1], config.seed)
    return {"accuracy": check.accuracy, "offset": check.offset, "confidence": check.confidence, "fault": check.fault()}


def make_decoder(folder: Path, material: str) -> None:
    """Distils a tiny decoder."""
    config = DistilConfig(
        cache=Piece("cache", (material, "rigid")).folder,
        models_dir=models_folder(material),
        checkpoint_dir=folder,
        log_dir=folder,
        width=DECODER_WIDTH,
        num_steps=DECODER_STEPS,
        batch_size=2,
    )
    with patch("tools.distil_decoder.split_clips", partial(split, material)):
        distil(config)


def make_training(folder: Path, material: str, recipe: str, seed: str) -> None:
    """Trains a recipe, which another task measures."""
    plan, decoder = RECIPES[recipe], Piece("decoder", (material,)).folder / "tiny_decoder.safetensors"
    replacements = {
        "split_clips": partial(split, material),
        "PatchDiscriminator": partial(PatchDiscriminator, DISCRIMINATOR_WIDTH),
        "FaceDataset": AdjacentReferences if plan.adjacent else FaceDataset,
    }
    config = replace(
        plan.config,
        hdtf_samples_dir=Piece("cache", (material, plan.crop)).folder,
        models_dir=models_folder(material),
        checkpoint_dir=folder,
        log_dir=folder / "log",
        start_from=str(weights_folder(material, plan.after, seed)) if plan.after else "",
        contract=plan.crop,
        tiny_decoder=str(decoder) if plan.tiny_decoder else "",
        sync_expert=str(expert_folder(Piece("expert", (material, str(TRAINING_EXPERT))).folder)),
        seed=int(seed),
    )
    with patch.multiple(musetalk_trainer, **replacements):
        musetalk_trainer.train(UNET, config)


def make_measurement(_: Path, material: str, recipe: str, seed: str) -> dict:
    """Validates a trained recipe, with a sync expert that was not used in training if it can be trusted.

    Returns figures and mouth openings; writes a strip of faces.
    """
    cache = Cache(Piece("cache", (material, RECIPES[recipe].crop)).folder)
    expert_piece = Piece("expert", (material, str(MEASURING_EXPERT)))
    expert = None if unfit(material) else load_expert(expert_piece.folder)
    pipeline = LipSyncPipeline.from_checkpoint(weights_folder(material, recipe, seed), models_folder(material))
    validation = Validator(pipeline, cache, split(material, cache)[1], frames=FRAMES_MEASURED, expert=expert)()
    path = Piece("measurement", (material, recipe, seed)).result.with_suffix(".jpg")
    atomic_write_bytes(path, strip(validation.results, lambda result: result.images["prediction"]))
    atomic_write_bytes(RESULTS / f"truth-{material}.jpg", strip(validation.results, lambda result: result.truth))
    return {"figures": validation.figures, "openings": [openings(result) for result in validation.results]}


def needs_cache(material: str, *_: str) -> list[Piece]:
    return [Piece("cache", (material, "rigid"))]


def needs_of_training(material: str, recipe: str, seed: str) -> list[Piece]:
    plan = RECIPES[recipe]
    needed = [Piece("cache", (material, plan.crop))]
    needed += [Piece("training", (material, plan.after, seed))] if plan.after else []
    needed += [Piece("decoder", (material,))] if plan.tiny_decoder else []
    return needed + ([Piece("expert", (material, str(TRAINING_EXPERT)))] if plan.needs_expert else [])


def needs_of_measurement(material: str, recipe: str, seed: str) -> list[Piece]:
    experts = [Piece("expert", (material, str(number))) for number in (TRAINING_EXPERT, MEASURING_EXPERT)]
    return [*experts, Piece("training", (material, recipe, seed))]


KINDS = {
    "cache": (make_cache, lambda *_: []),
    "expert": (make_expert, needs_cache),
    "decoder": (make_decoder, needs_cache),
    "training": (make_training, needs_of_training),
    "measurement": (make_measurement, needs_of_measurement),
}


class AdjacentReferences(FaceDataset):
    """Samples whose references are the nearest usable frames."""

    def _candidates(self, name: str, frame: int) -> np.ndarray:
        others = np.setdiff1d(np.flatnonzero(self.cache.clips[name].usable), [frame])
        distances = np.abs(others - frame)
        return others[distances == distances.min()]


def split(material: str, cache: Cache, *_: object) -> tuple[list[str], list[str], str]:
    """Replaces `musetalk.data.dataset.split_clips`: holds out the same clips for every seed."""
    held_out = set(MATERIALS[material].held_out)
    held = sorted(name for name, clip in cache.clips.items() if held_out & {name, clip.identity})
    return sorted(cache.clips.keys() - set(held)), held, f"held out: {', '.join(held)}"


def strip(results: Sequence[ClipResult], images: Callable[[ClipResult], np.ndarray]) -> bytes:
    """A JPEG of faces side by side, with a closed, a half-open and an open mouth, each of another clip."""
    faces = []
    for index, share in enumerate(STRIP):
        result = results[index % len(results)]
        order = result.window.openings.argsort()
        faces.append(images(result)[order[round(share * (len(order) - 1))]])
    return cv2.imencode(".jpg", np.hstack(faces), [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()


def openings(result: ClipResult) -> dict:
    """True and generated mouth openings of a clip."""
    series = {"truth": result.window.openings, "prediction": result.openings["prediction"]}
    return {"clip": result.window.clip.name} | {k: [round(float(x), 4) for x in v] for k, v in series.items()}


def models_folder(material: str) -> Path:
    """The small networks; for real clips with the real Whisper."""
    if material == "sample":
        return MINI
    folder = WORK / f"models-{material}"
    if not (folder / "whisper/tiny.pt").exists():
        shutil.copytree(MINI, folder, dirs_exist_ok=True)
        unet = read_json(MINI / "musetalk/musetalk.json") | {"cross_attention_dim": 384}
        atomic_write_bytes(folder / "musetalk/musetalk.json", json.dumps(unet).encode())
        atomic_write_bytes(folder / "whisper/tiny.pt", WHISPER.read_bytes())
    return folder


def weights_folder(material: str, recipe: str, seed: str) -> Path:
    return Piece("training", (material, recipe, seed)).folder / UNET


def load_expert(folder: Path) -> SyncNet:
    return load_syncnet(MINI, str(expert_folder(folder)), torch.device("cpu"))


def expert_folder(folder: Path) -> Path:
    return folder / "syncnet_demo"


def unfit(material: str) -> bool:
    """Whether one of the two experts failed its check."""
    results = [Piece("expert", (material, str(seed))).result for seed in (TRAINING_EXPERT, MEASURING_EXPERT)]
    return any(path.exists() and read_json(path)["fault"] for path in results)
