"""The work in pieces: caches, sync experts, and for each recipe and seed a training whose result is measured.

The project's own scripts do it.
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

WORK = ROOT / "data/evidence"  # caches, experts and trainings, which nobody keeps
RESULTS = ROOT / "benchmarks/evidence/results"  # what came of them: a JSON for each, and a strip of faces
MINI = ROOT / "models/mini"
UNET = "unet"  # name of the folder of a training's weights
LOOKED_AT = 40  # frames of each clip held out
STRIP = (0.0, 0.5, 1.0)  # shares of the frames that are less open than those in a strip


@dataclass(frozen=True)
class Piece:
    """A kind of work, and what it is done to: a material first."""

    kind: str
    subject: tuple[str, ...]

    @property
    def name(self) -> str:
        return "-".join((self.kind, *self.subject)).replace(" ", "_")

    @property
    def folder(self) -> Path:
        """What it leaves on this machine."""
        return WORK / self.name

    @property
    def result(self) -> Path:
        """The file of what came of it, if there is more to say than that it was done."""
        return RESULTS / f"{self.name}.json"

    @property
    def done(self) -> bool:
        """Of a measurement nothing but the result is needed; of the others what they have left on this machine."""
        return (self.result if self.kind == "measurement" else self.folder.with_suffix(".done")).exists()

    @property
    def goes_on(self) -> bool:
        """Whether it goes on where it was when it is stopped and begun again; the others are short and begin anew."""
        return self.kind in ("cache", "expert", "training")

    @property
    def ruled_out(self) -> bool:
        """Whether it needs a sync expert, and the material's is known to be unfit."""
        if self.kind in ("cache", "decoder") or not unfit(self.subject[0]):
            return False
        if self.kind == "expert":
            return self.subject[1] == str(MEASURING_EXPERT)
        return RECIPES[self.subject[1]].needs_expert

    @property
    def needs(self) -> list[Piece]:
        """What must be done before."""
        return KINDS[self.kind][1](*self.subject)

    def finish(self) -> None:
        """Do what is left of it."""
        if found := KINDS[self.kind][0](self.folder, *self.subject):
            atomic_write_bytes(self.result, (json.dumps(found, indent=1) + "\n").encode())
        atomic_write_bytes(self.folder.with_suffix(".done"), b"")


def make_cache(folder: Path, material: str, crop: str) -> dict:
    """Prepare all videos. Returns how many clips and frames there are, and how many are usable."""
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
    """Train the small sync expert. Returns what its check finds on the clips held out."""
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
    found = check_expert(load_expert(folder), cache, split(material, cache)[1], config.seed)
    return {"accuracy": found.accuracy, "offset": found.offset, "confidence": found.confidence, "fault": found.fault()}


def make_decoder(folder: Path, material: str) -> None:
    """Distil a tiny decoder."""
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
    """Train by a recipe; what comes of it is measured in a piece of its own."""
    plan, decoder = RECIPES[recipe], Piece("decoder", (material,)).folder / "tiny_decoder.safetensors"
    changed = {
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
    with patch.multiple(musetalk_trainer, **changed):
        musetalk_trainer.train(UNET, config)


def make_measurement(_: Path, material: str, recipe: str, seed: str) -> dict:
    """The trainer's validation, by an expert that had no part in training where there is one that can be trusted.

    Returns the figures and the openings of the mouths; leaves a strip of faces.
    """
    cache = Cache(Piece("cache", (material, RECIPES[recipe].crop)).folder)
    judge = Piece("expert", (material, str(MEASURING_EXPERT)))
    expert = None if unfit(material) else load_expert(judge.folder)
    pipeline = LipSyncPipeline.from_checkpoint(weights_folder(material, recipe, seed), models_folder(material))
    found = Validator(pipeline, cache, split(material, cache)[1], frames=LOOKED_AT, expert=expert)()
    path = Piece("measurement", (material, recipe, seed)).result.with_suffix(".jpg")
    atomic_write_bytes(path, strip(found.results, lambda result: result.images["prediction"]))
    atomic_write_bytes(RESULTS / f"truth-{material}.jpg", strip(found.results, lambda result: result.truth))
    return {"figures": found.figures, "openings": [openings(result) for result in found.results]}


def needs_cache(material: str, *_: str) -> list[Piece]:
    return [Piece("cache", (material, "rigid"))]


def needs_of_a_training(material: str, recipe: str, seed: str) -> list[Piece]:
    plan = RECIPES[recipe]
    needed = [Piece("cache", (material, plan.crop))]
    needed += [Piece("training", (material, plan.after, seed))] if plan.after else []
    needed += [Piece("decoder", (material,))] if plan.tiny_decoder else []
    return needed + ([Piece("expert", (material, str(TRAINING_EXPERT)))] if plan.needs_expert else [])


def needs_of_a_measurement(material: str, recipe: str, seed: str) -> list[Piece]:
    experts = [Piece("expert", (material, str(number))) for number in (TRAINING_EXPERT, MEASURING_EXPERT)]
    return [*experts, Piece("training", (material, recipe, seed))]


KINDS = {
    "cache": (make_cache, lambda *_: []),
    "expert": (make_expert, needs_cache),
    "decoder": (make_decoder, needs_cache),
    "training": (make_training, needs_of_a_training),
    "measurement": (make_measurement, needs_of_a_measurement),
}


class AdjacentReferences(FaceDataset):
    """Samples whose references are the usable frames nearest to those to make."""

    def _candidates(self, name: str, frame: int) -> np.ndarray:
        others = np.setdiff1d(np.flatnonzero(self.cache.clips[name].usable), [frame])
        away = np.abs(others - frame)
        return others[away == away.min()]


def split(material: str, cache: Cache, *_: object) -> tuple[list[str], list[str], str]:
    """As `musetalk.data.dataset.split_clips`, but always the same clips held out, whatever the seed."""
    wanted = set(MATERIALS[material].held_out)
    held = sorted(name for name, clip in cache.clips.items() if wanted & {name, clip.identity})
    return sorted(cache.clips.keys() - set(held)), held, f"held out: {', '.join(held)}"


def strip(looks: Sequence[ClipResult], images: Callable[[ClipResult], np.ndarray]) -> bytes:
    """Faces side by side as a JPEG: a closed mouth, one between and an open one, each of the next clip."""
    faces = []
    for index, share in enumerate(STRIP):
        look = looks[index % len(looks)]
        order = look.window.openings.argsort()
        faces.append(images(look)[order[round(share * (len(order) - 1))]])
    return cv2.imencode(".jpg", np.hstack(faces), [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()


def openings(look: ClipResult) -> dict:
    """Openings of the mouths of a clip, as they are and as they were made."""
    series = {"truth": look.window.openings, "prediction": look.openings["prediction"]}
    return {"clip": look.window.clip.name} | {k: [round(float(x), 4) for x in v] for k, v in series.items()}


def models_folder(material: str) -> Path:
    """The small set, for real clips with the real Whisper."""
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
    """Whether one of the two experts did not pass its check."""
    results = [Piece("expert", (material, str(seed))).result for seed in (TRAINING_EXPERT, MEASURING_EXPERT)]
    return any(path.exists() and read_json(path)["fault"] for path in results)
