"""Times the steps of trainings, and the reading of their samples."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import NamedTuple, TypeAlias

import torch
from accelerate import Accelerator
from tqdm import tqdm, trange

import musetalk_trainer
import syncnet_trainer
from musetalk.check import Finding
from musetalk.data.cache import Cache, forget_clips
from musetalk.data.dataset import FaceDataset, split_clips
from musetalk.data.sync_dataset import SyncDataset
from musetalk.devices import choose_device
from musetalk.errors import UserError
from musetalk.evaluation.sync_check import check_expert
from musetalk.models.lpips import HEADS, TRUNK, VGG16, Heads, load_lpips
from musetalk.models.syncnet import build_syncnet, load_syncnet, save_syncnet
from musetalk.training.distributed import start_processes
from musetalk.training.preflight import missing_bytes, worker_count
from musetalk.training.protocols import State
from musetalk.training.run import open_batches
from musetalk.training.state import load_pixel_vae, training_contract
from musetalk_trainer import TrainConfig
from syncnet_trainer import SyncConfig
from tools.plan.config import PlanConfig
from tools.plan.costs import Cost

STEPS, WARMUP, MOST_SECONDS = 25, 0.2, 120.0  # most steps of a training, their share that is not timed, and their time
READ_BATCHES = 5  # timed batches of each worker
STAGES = ("stage1", "stage2")  # presets of musetalk_trainer.py
EXPERT = "latentsync"  # preset of syncnet_trainer.py whose window is that of stage2
Config: TypeAlias = TrainConfig | SyncConfig


class Training(NamedTuple):
    """A training that is ready to run. weights: those it saves for use. step: makes one with the next batches."""

    accelerator: Accelerator
    state: State
    weights: dict[str, torch.Tensor]
    dataset: FaceDataset | SyncDataset
    step: Callable[[Iterator[dict]], object]


def loss_networks(config: PlanConfig, cache: Cache, folder: Path) -> tuple[Path, str, list[Finding]]:
    """Checks LPIPS and the sync expert, and writes a random network into a folder for each that would be refused.

    Returns the models folder and the sync expert to time with, and findings.
    """
    models_dir, stage2, findings = config.models_dir, musetalk_trainer.PRESETS["stage2"], []
    try:
        load_lpips(config.models_dir, torch.device("cpu"))
    except UserError as error:
        findings.append(Finding(f"{', '.join(STAGES)}: {error} (timed with random weights)", fault=True))
        models_dir = folder / "models"
        (models_dir / "vgg").mkdir(parents=True)
        for path in config.models_dir.iterdir():
            if path.name != "vgg":
                (models_dir / path.name).symlink_to(path.resolve())
        torch.save(VGG16().state_dict(), models_dir / TRUNK)
        torch.save(Heads().state_dict(), models_dir / HEADS)
    sync_expert = stage2.sync_expert
    train_clips, held_clips, _ = split_clips(cache, stage2.held_out)
    try:
        expert = load_syncnet(config.models_dir, sync_expert, choose_device(config.device))
        check = check_expert(expert, cache, held_clips or train_clips, stage2.seed)
        check.require(stage2.unfit_expert)
        findings.append(Finding(f"stage2: {sync_expert} can be used ({check.summary()}); you need not train an expert"))
    except UserError as error:
        other = f"syncnet_trainer.py {EXPERT} trains one, for --sync-expert checkpoints/syncnet_{EXPERT}"
        findings.append(Finding(f"stage2: {error}; {other} (timed with random weights)", fault=True))
        architecture = syncnet_trainer.PRESETS[EXPERT].architecture
        tensors = build_syncnet(architecture, stage2.seed).state_dict()
        sync_expert = str(save_syncnet(folder, 0, tensors, architecture))
    return models_dir, sync_expert, findings


def open_training(preset: Config, cache: Cache) -> Training:
    """Opens a training with one batch in a step, and all losses from the first step on. Raises UserError."""
    accelerator = start_processes(preset.device)
    clips, _, _ = split_clips(cache, preset.held_out)
    if isinstance(preset, SyncConfig):
        sync_config = replace(preset, grad_accum_steps=1)
        expert = syncnet_trainer.build_state(sync_config, accelerator)
        windows = syncnet_trainer.open_dataset(sync_config, cache, clips, expert.network.frames, world_size=1)
        step = partial(syncnet_trainer.optimizer_step, expert, config=sync_config, accelerator=accelerator)
        return Training(accelerator, expert, expert.network.state_dict(), windows, step)
    config = replace(preset, grad_accum_steps=1, adversarial_start=0)
    contract = training_contract(config.contract, cache, config.positional_encoding)
    faces = musetalk_trainer.open_dataset(config, cache, clips, contract, world_size=1, sync_offset=0)
    vae = load_pixel_vae(config.models_dir, accelerator)
    cache.contract.require(replace(cache.contract, vae=vae.fingerprint), ("vae",), str(cache.folder))
    state = musetalk_trainer.build_state(config, contract, accelerator)
    objective, _ = musetalk_trainer.build_objective(config, state, vae, accelerator)
    step = partial(musetalk_trainer.optimizer_step, state, objective, config=config, accelerator=accelerator)
    return Training(accelerator, state, state.ema, faces, step)


def time_training(name: str, preset: Config, cache: Cache, checkpoint_dir: Path) -> Cost:
    """Times the reading and the steps of a training. Raises UserError if the training would be refused."""
    training = open_training(preset, cache)
    cold_rate = time_reading(name, preset, training) if hasattr(os, "posix_fadvise") else None  # which macOS lacks
    on_gpu = training.accelerator.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []  # seconds
    with closing(open_batches(training.dataset, 0, preset, training.accelerator)) as batches:
        for _ in trange(STEPS, desc=f"{name}: train", leave=False, unit="step"):
            start = time.perf_counter()
            training.step(batches)
            if on_gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
            if len(times) > 1 and sum(times) > MOST_SECONDS:
                break
    seconds = mean(times[math.ceil(WARMUP * len(times)) :])
    folder = checkpoint_dir / name
    return Cost(
        name=name,
        rate=preset.batch_size / seconds,
        hours=preset.num_steps * preset.grad_accum_steps * seconds / 3600,
        size=missing_bytes(cache.folder, preset, training.state, training.weights),  # which has no such files yet
        folder=folder,
        missing=missing_bytes(folder, preset, training.state, training.weights),
        work=f"{preset.num_steps:,} steps of {preset.batch_size * preset.grad_accum_steps} samples",
        cold_rate=cold_rate,
        memory=torch.cuda.max_memory_allocated() if on_gpu else None,
    )


def time_reading(name: str, preset: Config, training: Training) -> float:
    """Returns how many samples a second the loader reads of which nothing is in memory."""
    forget_clips(training.dataset.cache.clips.values())
    at_once = max(1, worker_count(preset))  # batches
    count = READ_BATCHES * at_once
    with closing(open_batches(training.dataset, 0, preset, training.accelerator)) as batches:
        for _ in islice(batches, at_once):  # the workers start
            pass
        start = time.perf_counter()
        for _ in tqdm(islice(batches, count), f"{name}: read", count, leave=False, unit="batch"):
            pass
        return count * preset.batch_size / (time.perf_counter() - start)
