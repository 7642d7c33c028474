"""Figures that are the same at every run: operations and memory of a training step, bytes and files of a cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from diffusers import AutoencoderKL
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import ROOT
from benchmarks.memory import GIB, LiveStorages
from benchmarks.training import training, without_contents
from benchmarks.workplace import Measured, Workplace
from musetalk.contract import IMAGE_SIZE, FeatureContract
from musetalk.files import read_json
from musetalk.models.vae import VAE
from musetalk_trainer import PRESETS, TrainConfig

ORIGINAL = replace(PRESETS["original"], models_dir=ROOT / "models", batch_size=32)
TINY_DECODER = replace(ORIGINAL, tiny_decoder="any")
CHECKPOINTED = replace(ORIGINAL, gradient_checkpointing=True)
# Of an accumulated step the second part holds most, since it begins with the gradients of the first.
STAGE2 = replace(PRESETS["stage2"], models_dir=ROOT / "models", grad_accum_steps=2)
COUNTED, FRAMES = 2, 3  # samples of a step, frames of a clip
ROWS = 12  # of a note


def tflop_per_sample(config: TrainConfig) -> Measured:
    """Floating-point operations of a step, a multiply-add being two, in TFLOP a sample."""
    with without_contents(), training(config) as run:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # which counts no fused attention
            run.step(COUNTED)
    counted = counter.get_flop_counts()["Global"]
    note = [f"{flop / COUNTED / 1e9:9.1f} GFLOP {operation}" for operation, flop in counted.items()]
    return Measured(counter.get_total_flops() / COUNTED / 1e12, "\n".join(note))


def peak_gib(config: TrainConfig) -> Measured:
    """The most that tensors hold at any time of a step, in GiB; the note tells of the largest."""
    with without_contents(), LiveStorages() as storages, training(config) as run:
        storages.restart()
        run.step(config.batch_size)
    note = [f"{size / GIB:9.3f} GiB {what}" for what, size in storages.at_peak.most_common(ROWS)]
    return Measured(storages.peak / GIB, "\n".join(note))


def cache_bytes_per_frame(workplace: Workplace) -> Measured:
    """Bytes of all files of a cache's clips over their frames."""
    frames = sum(map(len, workplace.cache.clips.values()))
    return Measured(sum(path.stat().st_size for path in _clip_files(workplace)) / frames)


def cache_files_per_clip(workplace: Workplace) -> Measured:
    return Measured(len(_clip_files(workplace)) / len(workplace.cache.clips))


def _clip_files(workplace: Workplace) -> list[Path]:
    return [path for path in (workplace.cache.folder / "clips").rglob("*") if path.is_file()]


def vae_encodes_per_frame() -> Measured:
    """Images that the VAE's encoder sees for each frame of a clip in one margin variant."""
    vae = VAE(AutoencoderKL.from_config(read_json(ROOT / "models/mini/sd-vae-ft-mse/config.json")))
    seen = []
    vae.autoencoder.encoder.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    crops = np.zeros((FRAMES, 1, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    vae.encode_clip("clip", crops, FeatureContract())
    return Measured(sum(seen) / FRAMES)
