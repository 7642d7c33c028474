"""The tasks of the ablations: caches, sync experts, and for each recipe and seed a training and its measurement.

They run the project's own scripts.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
from whisper.model import Whisper

import musetalk_trainer
import syncnet_trainer
from ablations.recipes import (
    ALL,
    CACHE,
    CLOSE,
    CURVE_STEPS,
    EXPERT_STEPS,
    FURTHER_STEPS,
    MATERIALS,
    MEASURING_EXPERT,
    REAL_WHISPER,
    RECIPES,
    SEEDS,
    TRAINING_EXPERT,
    VIDEOS,
    Encoder,
    Material,
)
from datasets_process import PrepareConfig
from datasets_process import main as prepare
from musetalk.contract import VIDEO_FPS
from musetalk.data.cache import Cache, Clip
from musetalk.evaluation.pictures import ClipResult
from musetalk.evaluation.sync_check import check_expert
from musetalk.evaluation.validation import Validator
from musetalk.files import atomic_write_bytes, read_json
from musetalk.inference.pipeline import LipSyncPipeline
from musetalk.models.syncnet import load_syncnet
from tools.make_mini.audio_encoder import DIMENSIONS
from tools.make_mini.subset import link_clips

ROOT = Path(__file__).parents[1]
WORK = ROOT / "data/ablations"  # can be deleted
MODELS = ROOT / "models/mini"
CPU = torch.device("cpu")
UNET = "unet"  # name of the folder with the weights of a training
CLIPS_MEASURED, FRAMES_MEASURED = 12, 40  # at most; frames of each clip
STRIP = (0.0, 0.5, 1.0)  # quantiles of mouth opening shown in a strip


@dataclass(frozen=True)
class Task:
    """A task of a kind with its arguments, the first of which is the material, except for the models of an encoder."""

    kind: str
    arguments: tuple[str, ...]

    @property
    def name(self) -> str:
        return "-".join((self.kind, *self.arguments))

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
        """Whether its recipe has a sync loss and a sync expert of its material failed its check or is not trained."""
        if self.kind not in ("training", "measurement"):
            return False
        material, recipe, *_ = self.arguments
        return RECIPES[recipe].config.loss_weights["sync"] > 0 and not experts_fit(material)

    def run(self) -> None:
        """Runs or resumes it and writes its result."""
        result = KINDS[self.kind](self.folder, *self.arguments)
        atomic_write_bytes(self.result, (json.dumps(result, indent=1) + "\n").encode())


def cache_task(material: str, recipe: str) -> Task:
    """The task that makes the cache of a recipe."""
    plan = RECIPES[recipe]
    return Task("cache", (material, plan.config.contract, plan.encoder, str(plan.minutes)))


def stages() -> Iterator[list[Task]]:
    """All tasks in stages, each of which only needs the stages before it.

    A later stage depends on the results of those before it: the last two seeds are only for recipes that are close.
    """
    recipes = [(material, name) for material in MATERIALS for name in MATERIALS[material].recipes]
    yield [Task("models", (encoder,)) for encoder in ("random", "real")]
    yield list(dict.fromkeys(cache_task(material, name) for material, name in recipes))
    yield [Task("expert", (material, *expert)) for material in MATERIALS for expert in MATERIALS[material].experts]
    for seed in map(str, SEEDS):
        chosen = [(material, name) for material, name in recipes if seed == str(SEEDS[0]) or is_close(material, name)]
        for trained in (False, True):
            yield [
                Task("training", (material, name, seed))
                for material, name in chosen
                if bool(RECIPES[name].config.start_from) == trained
            ]
        yield [Task("measurement", (material, name, seed)) for material, name in chosen]
    yield [
        Task("measurement", (material, "stage1", str(SEEDS[0]), str(step)))
        for material in MATERIALS
        for step in CURVE_STEPS
    ]


def is_close(material: str, recipe: str) -> bool:
    """Whether r with the first seed is close to the baseline's, or other recipes are close to this one."""
    pairs = [(name, RECIPES[name].baseline) for name in MATERIALS[material].recipes if name != RECIPES[name].baseline]
    r = {name: r_other(material, name) for pair in pairs for name in pair}
    return any(recipe in pair and abs(r[pair[0]] - r[pair[1]]) < CLOSE for pair in pairs)


def r_other(material: str, recipe: str) -> float:
    """r with another clip's audio with the first seed, nan if it is not measured."""
    task = Task("measurement", (material, recipe, str(SEEDS[0])))
    return read_json(task.result)["figures"]["r_other_audio"] if task.done else float("nan")


def make_models(folder: Path, encoder: Encoder) -> dict:
    """The small networks with another audio encoder: one with random weights, or the real one."""
    shutil.copytree(MODELS, folder, dirs_exist_ok=True)
    whisper, config = folder / "whisper" / "tiny.pt", folder / "musetalk" / "musetalk.json"
    if encoder == "real":
        whisper.unlink()
        shutil.copy(ROOT / REAL_WHISPER, whisper.parent)
        content = torch.load(ROOT / REAL_WHISPER, weights_only=True)
        width = content["dims"]["n_audio_state"]
        config.write_text(json.dumps(read_json(config) | {"cross_attention_dim": width}))
        return {"width": width}
    torch.manual_seed(0)
    torch.save({"dims": asdict(DIMENSIONS), "model_state_dict": Whisper(DIMENSIONS).state_dict()}, whisper)
    return {"width": DIMENSIONS.n_audio_state}


def models_folder(encoder: Encoder) -> Path:
    return MODELS if encoder == "small" else Task("models", (encoder,)).folder


def make_cache(
    folder: Path,
    material: str,
    crop: Literal["rigid", "musetalk_v15", "musetalk_v1"],
    encoder: Encoder,
    minutes: str,
) -> dict:
    """Links the clips of a material, or prepares their videos again. Returns clips and minutes to train on."""
    source = Cache(ROOT / CACHE)
    clips = choose_clips(list(source.clips.values()), MATERIALS[material], int(minutes))
    if (crop, encoder) == ("rigid", "small"):
        shutil.rmtree(folder, ignore_errors=True)
        link_clips(source, folder, lambda clip: clip in clips)
    else:
        videos = WORK / f"{folder.name}-videos"
        for clip in clips:
            link = videos / clip.metadata["source"]
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to((ROOT / VIDEOS / clip.metadata["source"]).resolve())
        shutil.copy(ROOT / VIDEOS / "identities.json", videos)
        prepare(PrepareConfig(videos, folder, models_folder(encoder), crop, encode_dtype="float32", num_workers=1))
        for clip in Cache(folder).clips.values():
            clip.write_offset(source.clips[clip.name].audio_offset, {})
    trained = [clip for clip in Cache(folder).clips.values() if MATERIALS[material].includes(clip.identity)]
    return {"clips": len(trained), "minutes": round(sum(map(len, trained)) / VIDEO_FPS / 60, 1)}


def choose_clips(clips: Sequence[Clip], material: Material, minutes: int) -> list[Clip]:
    """The clips of a material: those held out, and of those to train on as many as fit into the minutes.

    Identities take turns in a random order, each with its next clip.
    """
    rng = np.random.default_rng(0)
    queues: dict[str, list[Clip]] = {}
    for index in rng.permutation(len(clips)):
        if material.includes(clips[index].identity):
            queues.setdefault(clips[index].identity, []).append(clips[index])
    turns = [clip for turn in zip_longest(*queues.values()) for clip in turn if clip]
    seconds = np.cumsum([len(clip) / VIDEO_FPS for clip in turns])
    chosen = [clip for clip, end in zip(turns, seconds, strict=True) if minutes == ALL or end <= 60 * minutes]
    return chosen + [clip for clip in clips if clip.identity in material.held_out]


def make_expert(
    folder: Path, material: str, architecture: Literal["wav2lip_narrow", "latentsync_narrow"], minutes: str, seed: str
) -> dict:
    """Trains a small sync expert. Returns the result of its check on held-out clips."""
    cache = Cache(Task("cache", (material, "rigid", "small", minutes)).folder)
    config = replace(
        syncnet_trainer.PRESETS["demo"],
        hdtf_samples_dir=cache.folder,
        checkpoint_dir=folder,
        log_dir=folder / "log",
        architecture=architecture,
        held_out_identities=MATERIALS[material].held_out,
        num_steps=EXPERT_STEPS,
        val_every=EXPERT_STEPS,
        seed=int(seed),
    )
    syncnet_trainer.train("demo", config)
    expert = load_syncnet(MODELS, str(folder / "syncnet_demo"), CPU)
    check = check_expert(expert, cache, held_out_clips(material, cache), config.seed)
    return {"accuracy": check.accuracy, "offset": check.offset, "confidence": check.confidence, "fault": check.fault()}


def make_training(folder: Path, material: str, recipe: str, seed: str) -> dict:
    """Trains a recipe."""
    plan = RECIPES[recipe]
    further = bool(plan.config.start_from)
    steps = FURTHER_STEPS if further else MATERIALS[material].num_steps
    config = replace(
        plan.config,
        hdtf_samples_dir=cache_task(material, recipe).folder,
        models_dir=models_folder(plan.encoder),
        checkpoint_dir=folder,
        log_dir=folder / "log",
        held_out_identities=MATERIALS[material].held_out,
        start_from=str(weights_folder(material, plan.config.start_from, seed)) if further else "",
        sync_expert=str(expert_folder(material, TRAINING_EXPERT)),
        num_steps=steps,
        sample_every=steps,
        seed=int(seed),
    )
    musetalk_trainer.train(UNET, config)
    return {}


def make_measurement(folder: Path, material: str, recipe: str, seed: str, step: str = "") -> dict:
    """Validates a trained recipe, with a sync expert that was not used in training if it can be trusted.

    step: of the weights, by default the last. Returns figures and mouth openings; writes strips of generated and of
    true faces.
    """
    cache = Cache(cache_task(material, recipe).folder)
    expert = None
    if experts_fit(material):
        expert = load_syncnet(MODELS, str(expert_folder(material, MEASURING_EXPERT)), CPU)
    weights = weights_folder(material, recipe, seed)
    if step:
        weights /= f"unet-{int(step):07d}.safetensors"
    pipeline = LipSyncPipeline.from_checkpoint(weights, models_folder(RECIPES[recipe].encoder))
    clips = held_out_clips(material, cache)
    validation = Validator(pipeline, cache, clips, CLIPS_MEASURED, FRAMES_MEASURED, expert=expert)()
    write_strip(folder / "prediction.jpg", validation.results, lambda result: result.faces["prediction"].images)
    write_strip(folder / "truth.jpg", validation.results, lambda result: result.truth)
    return {"figures": validation.figures, "openings": [openings(result) for result in validation.results]}


KINDS: dict[str, Callable[..., dict]] = {
    "models": make_models,
    "cache": make_cache,
    "expert": make_expert,
    "training": make_training,
    "measurement": make_measurement,
}


def held_out_clips(material: str, cache: Cache) -> list[str]:
    """Names of the held-out clips."""
    return [name for name, clip in cache.clips.items() if clip.identity in MATERIALS[material].held_out]


def weights_folder(material: str, recipe: str, seed: str) -> Path:
    return Task("training", (material, recipe, seed)).folder / UNET


def expert_folder(material: str, expert: tuple[str, str, str]) -> Path:
    return Task("expert", (material, *expert)).folder / "syncnet_demo"


def experts_fit(material: str) -> bool:
    """Whether the training and the measuring expert passed their checks."""
    results = [Task("expert", (material, *expert)).result for expert in (TRAINING_EXPERT, MEASURING_EXPERT)]
    return all(path.exists() and not read_json(path)["fault"] for path in results)


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
    series = {"truth": result.window.openings, "prediction": result.faces["prediction"].openings}
    return {"clip": result.window.clip.name} | {k: [round(float(x), 4) for x in v] for k, v in series.items()}
