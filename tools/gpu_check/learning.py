"""Trains the full-size UNet from scratch; saves and loads its state and repeats the next step."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import cv2
import numpy as np
import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.memory import GIB
from musetalk.contract import FeatureContract
from musetalk.data.cache import Cache, Clip
from musetalk.data.dataset import FaceDataset, read_windows, split_clips
from musetalk.data.loader import loader
from musetalk.evaluation.metrics import correlation
from musetalk.evaluation.pictures import rendered
from musetalk.evaluation.windows import true_openings
from musetalk.images import to_uint8
from musetalk.models.vae import VAE
from musetalk.training.checkpoint import save_state
from musetalk.training.preflight import workers_that_fit
from musetalk.training.run import resume as restore_latest
from musetalk.training.state import TrainState, load_pixel_vae, training_contract
from musetalk.training.step import StepResult
from musetalk_trainer import (
    PRESETS,
    TrainConfig,
    build_objective,
    build_state,
    open_dataset,
    optimizer_step,
    weights,
)
from tools.gpu_check.config import GpuCheckConfig
from tools.gpu_check.mouth import MouthReader

HELD_OUT = 0.35  # share of identities, or of clips if there is one identity
QUICK_SHARE = 0.1  # duration of a quick check, relative to a full one
EVALUATIONS, QUICK_EVALUATIONS = 6, 2  # of a training
MOMENTS = 6  # rows of the image
BATCH = 32  # faces generated at once
WARMUP = 50  # steps
MANY_STEPS = 10**6  # more than fit into the time


def learn(config: GpuCheckConfig, accelerator: Accelerator, report: Callable) -> None:
    """Reports training for equal times at each learning rate, then saving and loading of the last training."""
    cache = Cache(config.material)
    vae = load_pixel_vae(config.vae_dir, accelerator)
    train_clips, held_clips, _ = split_clips(cache, HELD_OUT)
    probe = Probe(cache, train_clips, held_clips, vae)
    seconds = config.learn_seconds * (QUICK_SHARE if config.quick else 1)
    curves = {}
    for rate in config.learning_rates[-1:] if config.quick else config.learning_rates:
        constants = replace(
            PRESETS["stage1"],
            models_dir=config.models_dir,
            loss_weights=weights(latent_l1=1.0, pixel_l1=1.0),
            chunk_size=max(config.chunk_sizes),
            batch_size=config.batch_size or PRESETS["stage1"].batch_size,
            learning_rate=rate,
            final_learning_rate=rate,
            warmup_steps=WARMUP,
            num_steps=MANY_STEPS,
            ema_every=2 * MANY_STEPS,  # never: `Probe` uses the weights themselves
        )
        training = FromScratch(constants, cache, train_clips, vae, accelerator)
        records, faces = train(training, probe, seconds, QUICK_EVALUATIONS if config.quick else EVALUATIONS)
        curves[f"{rate:g}"] = records
        report("learning", f"rate {rate:g}, {seconds:g} s", **records[-1], **probe.limits)
        cv2.imwrite(str(config.output / f"learning_{rate:g}.png"), draw_faces(probe, faces))
        cv2.imwrite(str(config.output / "learning.png"), draw_curves(curves))
    resume(training, config, report)


@dataclass
class FromScratch:
    """A training with the trainer's own functions, without its files."""

    constants: TrainConfig
    cache: Cache
    clips: list[str]
    vae: VAE
    accelerator: Accelerator

    @cached_property
    def contract(self) -> FeatureContract:
        return training_contract(self.constants.contract, self.cache, self.constants.positional_encoding)

    @cached_property
    def dataset(self) -> FaceDataset:
        return open_dataset(self.constants, self.cache, self.clips, self.contract, world_size=1, sync_offset=0)

    @cached_property
    def state(self) -> TrainState:
        return build_state(self.constants, self.contract, self.accelerator)

    @cached_property
    def objective(self):
        return build_objective(self.constants, self.state, self.vae, self.accelerator)[0]

    def batches(self) -> Iterator[dict]:
        """Batches, starting at the current step."""
        steps = range(self.state.step, self.constants.num_steps)
        return iter(loader(self.dataset, steps, self.constants.batch_size, workers_that_fit()))

    def step(self, batches: Iterator[dict]) -> StepResult:
        return optimizer_step(self.state, self.objective, batches, self.constants, self.accelerator)


def train(training: FromScratch, probe: Probe, seconds: float, evaluations: int) -> tuple[list[dict], list[np.ndarray]]:
    """Trains for some seconds. Returns the figures and faces of evaluations at regular intervals."""
    records, faces, trained = [], [], 0.0
    batches, bar = training.batches(), tqdm(unit="step", desc=f"rate {training.constants.learning_rate:g}")
    for index in range(evaluations):
        start = time.perf_counter()
        terms: list[dict[str, torch.Tensor]] = []
        while trained + time.perf_counter() - start < seconds * (index + 1) / evaluations or not terms:
            terms.append(training.step(batches).terms)
            bar.update()
        losses = {name: torch.stack([term[name] for term in terms]).mean().item() for name in terms[0]}
        trained += time.perf_counter() - start
        figures, images = probe(training.state)
        records.append({"steps": training.state.step, "steps_per_s": training.state.step / trained} | losses | figures)
        faces.append(images)
    return records, faces


class Probe:
    """Measures what the generated mouths of held-out clips follow, each clip with the audio of the previous one.

    A call returns `r`, the correlation of the generated openings with those of the audio's clip, and `r_source`, with
    those of the video's own clip, whose upper half is an input. `limits` has `r_true`, the correlation for the true
    faces through the VAE, and `r_chance`, that between the true openings of the two clips.
    """

    def __init__(self, cache: Cache, train_clips: list[str], held_clips: list[str], vae: VAE) -> None:
        self.vae, self.contract = vae, cache.contract
        self.clips = [cache.clips[name] for name in held_clips]
        self.openings = [true_openings(clip, _usable(clip)) for clip in self.clips]
        clips = [cache.clips[name] for name in train_clips]
        images = np.concatenate([self._decode(clip.tensor("latents")[_usable(clip), 0]) for clip in clips])
        self.read = MouthReader(images, np.concatenate([true_openings(clip, _usable(clip)) for clip in clips]))
        self.truth = [self._decode(clip.tensor("latents")[_usable(clip), 0]) for clip in self.clips]
        true = [correlation(self.read(faces), known) for faces, known in zip(self.truth, self.openings, strict=True)]
        chance = [correlation(own, self.openings[i - 1]) for i, own in enumerate(self.openings)]
        self.limits = {"r_true": float(np.mean(true)), "r_chance": float(np.mean(chance))}

    @torch.no_grad()
    def __call__(self, state: TrainState) -> tuple[dict[str, float], np.ndarray]:
        """The figures, and the faces generated at `moments`, BGR uint8 (MOMENTS, 256, 256, 3)."""
        target, source, generated = [], [], []
        for index, clip in enumerate(self.clips):
            faces = self._generate(state, clip, self.clips[index - 1])
            openings = self.read(faces)
            target.append(correlation(openings, self.openings[index - 1]))
            source.append(correlation(openings, self.openings[index]))
            generated.append(faces)
        faces = np.stack([generated[clip][frame] for clip, frame in self.moments])
        return {"r": float(np.mean(target)), "r_source": float(np.mean(source))}, faces

    @property
    def moments(self) -> list[tuple[int, int]]:
        """Clips and frames of the image."""
        length = min(map(len, self.openings))
        return [(i % len(self.clips), int(length * (i + 0.5) / MOMENTS)) for i in range(MOMENTS)]

    def _generate(self, state: TrainState, clip: Clip, speaker: Clip) -> np.ndarray:
        """Faces of a clip with the audio of `speaker`; the reference is the frame with the most closed mouth."""
        frames = _usable(clip)[: len(_usable(speaker))]
        closed = _usable(clip)[true_openings(clip, _usable(clip)).argmin()]
        masked = torch.from_numpy(clip.tensor("masked_latents")[frames, 0])
        reference = torch.from_numpy(clip.tensor("latents")[closed, 0]).expand_as(masked)
        windows = read_windows(speaker, 0, len(speaker), self.contract)[_usable(speaker)[: len(frames)]]
        device, predictions = self.vae.autoencoder.device, []
        for batch in torch.arange(len(frames)).split(BATCH):
            unet_input = torch.cat([masked[batch], reference[batch]], dim=1).to(device).float()
            predictions.append(state.unet(unet_input, torch.from_numpy(windows)[batch].to(device).float()))
        return self._decode(torch.cat(predictions).float().cpu().numpy())

    @torch.no_grad()
    def _decode(self, latents: np.ndarray) -> np.ndarray:
        """Latents (T, 4, 32, 32) -> faces BGR uint8 (T, 256, 256, 3)."""
        batches = torch.from_numpy(latents).to(self.vae.autoencoder.device).float().split(BATCH)
        return np.concatenate([to_uint8(self.vae.decode(batch)) for batch in batches])


def _usable(clip: Clip) -> np.ndarray:
    return np.flatnonzero(clip.usable)


def draw_faces(probe: Probe, faces: list[np.ndarray]) -> np.ndarray:
    """A row for each moment: the true face, then the generated face at each evaluation. BGR uint8."""
    truth = np.stack([probe.truth[clip][frame] for clip, frame in probe.moments])
    return np.vstack([np.hstack(row) for row in zip(truth, *faces, strict=True)])


def draw_curves(curves: dict[str, list[dict]]) -> np.ndarray:
    """Plots each figure over the steps, a line for each learning rate. BGR uint8."""
    names = [name for name in next(iter(curves.values()))[0] if name not in ("steps", "steps_per_s")]
    figure = Figure(figsize=(4 * len(names), 3), layout="constrained")
    for name, axis in zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True):
        for rate, records in curves.items():
            axis.plot([record["steps"] for record in records], [record[name] for record in records], ".-", label=rate)
        axis.set(title=name, xlabel="step")
        axis.legend(fontsize=7)
    return rendered(figure)


def resume(training: FromScratch, config: GpuCheckConfig, report: Callable) -> None:
    """Saves the training, makes a step, loads it and repeats the step; reports times and differences."""
    state, folder = training.state, config.output / "state"
    start = time.perf_counter()
    path = save_state(folder, state.step, state.as_dict(), keep=1)
    saved, size = time.perf_counter(), path.stat().st_size
    first = training.step(training.batches())
    loading = time.perf_counter()
    restore_latest(state, folder)
    restored = time.perf_counter()
    second = training.step(training.batches())
    shutil.rmtree(folder)
    report(
        "resume",
        f"step {state.step}",
        GiB=size / GIB,
        seconds_to_save=saved - start,
        seconds_to_load=restored - loading,
        **{f"{name}_differs_by": abs(second.terms[name] - value).item() for name, value in first.terms.items()},
        gradient_norm_differs_by=abs(second.grad_norm - first.grad_norm).item(),
    )
