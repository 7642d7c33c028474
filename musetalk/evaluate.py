"""Judges weights or finished videos against true videos: a table, JSON and a picture.

    python -m musetalk.evaluate --truth videos --checkpoint checkpoints/stage2 --models-dir models
    python -m musetalk.evaluate --truth videos --checkpoint base.safetensors tuned.safetensors
    python -m musetalk.evaluate --truth videos --videos dubbed_by_latentsync dubbed_by_wav2lip

Weights dub each true video twice, with its own audio and with another one's, through the same pipeline as
`musetalk.dub`. The videos of another program have the names of the true ones: `anna.mp4` speaks its own audio,
`anna_ben.mp4` that of `ben.mp4`. Both kinds can be judged together. The true videos are prepared into a cache first;
--cache takes one that exists, of which --held-out-share judges only the people whom training holds out.

Measures whose networks are not in the models folder are left out, and the result says so. docs/evaluation.md explains
the protocols and the figures.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal

import cv2
import tyro

import datasets_process
from musetalk.cli import Count, ShareOrZero, check_constants, run_script
from musetalk.data.cache import Cache, Clip
from musetalk.data.dataset import split_clips
from musetalk.data.face import load_face_backend
from musetalk.devices import choose_device
from musetalk.errors import UserError
from musetalk.evaluation.candidates import Candidate, DubbedVideos, FinishedVideos, key
from musetalk.evaluation.evaluator import Evaluator
from musetalk.evaluation.measures import Measures
from musetalk.evaluation.windows import Window, choose_windows
from musetalk.files import atomic_write_bytes
from musetalk.inference.pipeline import LipSyncPipeline
from musetalk.models import face_embedding, inception, lpips, syncnet_v2
from musetalk.models.syncnet import load_syncnet
from musetalk.models.trained_unet import find_unet, read_unet_contract

MUSETALK = "musetalkV15/unet.pth"  # MuseTalk's own weights, judged too if they are in the models folder


@dataclass
class EvaluateConfig:
    """The constants of an evaluation; override them on the command line."""

    truth: Path  # folder of the true videos, searched recursively
    checkpoint: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="PATH ...")] = ()  # weights, or folders with some
    videos: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FOLDER ...")] = ()  # of finished videos
    models_dir: Path = Path("models/mini")  # with the networks of the checkpoint and of the measures
    contract: Literal["rigid", "musetalk_v15", "musetalk_v1"] | None = None  # of weights without one, as MuseTalk's own
    cache: Path | None = None  # of the true videos; None: made in output
    held_out_share: ShareOrZero = 0.0  # judge the identities that training holds out at this share; 0: all
    names: tuple[str, ...] = ()  # judge these clips of the cache; (): all
    clips: Count = 50  # at most; each identity has one before any has a second one
    frames: Count = 125  # of a clip, at most, and at most half of it, so that it has other frames as references
    sync_expert: str = ""  # a trained sync expert, as in musetalk_trainer.py
    output: Path = Path("output/evaluation")  # folder of the result
    device: str = "auto"  # cpu, cuda, cuda:<number>, mps; auto: CUDA's GPU, or the CPU without one


def main(config: EvaluateConfig) -> None:
    """Writes evaluation.txt, evaluation.json and evaluation.png. Raises UserError for what cannot be evaluated."""
    check_constants(config)
    if not (config.checkpoint or config.videos):
        raise UserError(
            "there is nothing to evaluate; set checkpoint to weights, or videos to folders of finished videos"
        )
    cache = Cache(config.cache or prepare(config))
    names = [
        name for name, clip in cache.clips.items() if not clip.metadata.get("start")
    ]  # later parts of a split video
    if config.held_out_share:
        held_out = set(split_clips(cache, config.held_out_share)[1])
        names = [name for name in names if name in held_out]
    if config.names:
        if unknown := set(config.names).difference(names):
            raise UserError(f"{cache.folder} has no clip {min(unknown)!r} to evaluate, but for example {names[0]!r}")
        names = list(config.names)
    windows = choose_windows(cache, names, config.clips, config.frames)
    candidates = load_candidates(config, [window.clip for window in windows])
    measures, inception_network, notes = load_measures(config)
    evaluator = Evaluator(windows, choose_others(windows, cache, candidates), candidates, measures, inception_network)
    comparison = evaluator(notes)
    print(comparison)
    results = {
        "evaluation.txt": f"{comparison}\n".encode(),
        "evaluation.json": (json.dumps(comparison.as_json(), indent=1) + "\n").encode(),
        "evaluation.png": cv2.imencode(".png", evaluator.picture(comparison))[1].tobytes(),
    }
    for name, content in results.items():
        atomic_write_bytes(config.output / name, content)
    print(f"wrote {', '.join(str(config.output / name) for name in results)}")


def prepare(config: EvaluateConfig) -> Path:
    """Prepares the true videos, or what of them is not prepared yet. Returns the cache."""
    folder = config.output / "cache"
    constants = datasets_process.PrepareConfig(config.truth, folder, config.models_dir, device=config.device)
    datasets_process.main(constants)
    return folder


def load_candidates(config: EvaluateConfig, clips: list[Clip]) -> list[Candidate]:
    """The finished videos, the weights, and MuseTalk's own weights if they are in the models folder."""
    finished = [FinishedVideos(folder.name, folder, config.truth) for folder in config.videos]
    for videos in finished:
        videos.require(clips)
    candidates: list[Candidate] = [*finished]
    stems = [path.stem for path in config.checkpoint]
    weights: list[tuple[str, Path, Any]] = [
        (path.stem if stems.count(path.stem) == 1 else f"{path.parent.name}/{path.stem}", path, config.contract)
        for path in config.checkpoint
    ]
    official = config.models_dir / MUSETALK
    if official.is_file() and official not in config.checkpoint:
        weights.append(("MuseTalk 1.5", official, "musetalk_v15"))
    for name, path, named_contract in weights:
        contract = None if read_unet_contract(find_unet(path)) else named_contract
        pipeline = LipSyncPipeline.from_checkpoint(path, config.models_dir, contract=contract, device=config.device)
        candidates.append(DubbedVideos(name, pipeline, config.truth))
    names = [candidate.name for candidate in candidates]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise UserError(f"two sides are named {min(repeated)}; rename one, since the table has a column for each")
    return candidates


def load_measures(config: EvaluateConfig) -> tuple[Measures, inception.Inception | None, list[str]]:
    """The measures with all networks in the models folder, and notes on those that are not there."""
    device, notes = choose_device(config.device), []

    def load(names: str, files: tuple[str, ...], loader: Callable[..., Any], *arguments: Any) -> Any:
        """Loads a network, or notes that its figures are not measured for lack of a file."""
        for file in files:
            if not (config.models_dir / file).is_file():
                notes.append(f"not measured: {names}; {config.models_dir / file} is missing")
                return None
        return loader(config.models_dir, *arguments)

    measures = Measures(load_face_backend("mediapipe", config.models_dir, device), device)
    distance = load("lpips", (lpips.TRUNK, lpips.HEADS), lpips.load_lpips, device)
    syncnet = load("lse_c, lse_d, lse_offset", (syncnet_v2.WEIGHTS,), syncnet_v2.load_syncnet_v2, device)
    embedder = load("csim", (face_embedding.WEIGHTS,), face_embedding.load_face_embedder)
    network = load("fid", (inception.WEIGHTS,), inception.load_inception, device)
    expert = load_syncnet(config.models_dir, config.sync_expert, device) if config.sync_expert else None
    return replace(measures, distance=distance, expert=expert, syncnet=syncnet, embedder=embedder), network, notes


def choose_others(windows: list[Window], cache: Cache, candidates: list[Candidate]) -> list[Clip | None]:
    """For each window the clip whose audio it speaks: as a finished video does, or else that of the next window.

    None if there is neither.
    """
    clips = {PurePath(key(clip)).name: clip for clip in cache.clips.values()}
    others: list[Clip | None] = []
    for window, following in zip(windows, [*windows[1:], *windows[:1]], strict=True):
        prefix = f"{key(window.clip)}_"
        files = (file for candidate in candidates if isinstance(candidate, FinishedVideos) for file in candidate.files)
        spoken = (clips.get(file.removeprefix(prefix)) for file in files if file.startswith(prefix))
        others.append(next(filter(None, spoken), None if following is window else following.clip))
    return others


if __name__ == "__main__":
    run_script(main, tyro.cli(EvaluateConfig, description=__doc__))
