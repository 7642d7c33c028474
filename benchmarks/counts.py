"""Deterministic figures: operations and memory of a training step, bytes and files of a cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from diffusers import AutoencoderKL
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import ROOT
from benchmarks.memory import GIB, LiveStorages
from benchmarks.training import fake_tensors, training
from benchmarks.workplace import Measured, Workplace
from musetalk.contract import IMAGE_SIZE, FeatureContract
from musetalk.files import read_json
from musetalk.models.vae import VAE
from musetalk_trainer import PRESETS, TrainConfig

ORIGINAL = replace(PRESETS["original"], models_dir=ROOT / "models", batch_size=32)
TINY_DECODER = replace(ORIGINAL, tiny_decoder="any")
CHECKPOINTED = replace(ORIGINAL, gradient_checkpointing=True)
# The second micro step holds the most memory, because it starts with the gradients of the first.
STAGE2 = replace(PRESETS["stage2"], models_dir=ROOT / "models", grad_accum_steps=2)
COUNTED, FRAMES = 2, 3  # samples of a step, frames of a clip
ROWS = 12  # most lines of a note


def tflop_per_sample(config: TrainConfig) -> Measured:
    """Floating-point operations of a step in TFLOP per sample; a multiply-add counts as two."""
    with fake_tensors(), training(config) as run:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused attention is not counted
            run.step(COUNTED)
    flop_counts = counter.get_flop_counts()["Global"]
    note = [f"{flop / COUNTED / 1e9:9.1f} GFLOP {operation}" for operation, flop in flop_counts.items()]
    return Measured(counter.get_total_flops() / COUNTED / 1e12, "\n".join(note))


def peak_gib(config: TrainConfig) -> Measured:
    """Peak memory of the tensors of a step in GiB; the note lists the largest."""
    with fake_tensors(), LiveStorages() as storages, training(config) as run:
        storages.restart()
        run.step(config.batch_size)
    note = [f"{size / GIB:9.3f} GiB {what}" for what, size in storages.at_peak.most_common(ROWS)]
    return Measured(storages.peak / GIB, "\n".join(note))


def cache_bytes_per_frame(workplace: Workplace) -> Measured:
    """Bytes of all clip files of a cache, divided by the number of frames."""
    frames = sum(map(len, workplace.cache.clips.values()))
    return Measured(sum(path.stat().st_size for path in _clip_files(workplace)) / frames)


def cache_files_per_clip(workplace: Workplace) -> Measured:
    return Measured(len(_clip_files(workplace)) / len(workplace.cache.clips))


def _clip_files(workplace: Workplace) -> list[Path]:
    return [path for path in (workplace.cache.folder / "clips").rglob("*") if path.is_file()]


def vae_encodes_per_frame() -> Measured:
    """Number of images that the VAE encodes per frame of a clip with one margin variant."""
    vae = VAE(AutoencoderKL.from_config(read_json(ROOT / "models/mini/sd-vae-ft-mse/config.json")))
    batch_sizes = []
    vae.autoencoder.encoder.register_forward_pre_hook(lambda _, args: batch_sizes.append(len(args[0])))
    crops = np.zeros((FRAMES, 1, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    vae.encode_clip("clip", crops, FeatureContract())
    return Measured(sum(batch_sizes) / FRAMES)
