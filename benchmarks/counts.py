"""Deterministic figures: operations and memory of a training step, bytes and files of a cache."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import ROOT
from benchmarks.memory import GIB, LiveStorages
from benchmarks.mock_device import mock_device, transfers
from benchmarks.training import fake_tensors, training
from benchmarks.workplace import Measured, Workplace
from musetalk.contract import IMAGE_SIZE, FeatureContract
from musetalk.files import read_json
from musetalk.models.lora import factors
from musetalk.models.vae import VAE
from musetalk.training.preflight import bytes_of
from musetalk_trainer import PRESETS, TrainConfig

FRUGAL: dict[str, Any] = {"models_dir": ROOT / "models", "chunk_size": 1, "ema_on_host": True}  # with memory
FAST: dict[str, Any] = FRUGAL | {"chunk_size": 16, "ema_on_host": False}  # what "auto" chooses with enough memory
ORIGINAL = replace(PRESETS["original"], **FRUGAL, batch_size=32)
ORIGINAL_CHUNK16 = replace(ORIGINAL, chunk_size=16)
ORIGINAL_EMA = replace(ORIGINAL, ema_on_host=False)
TINY_DECODER = replace(ORIGINAL, tiny_decoder="any")
CHECKPOINTED = replace(ORIGINAL, gradient_checkpointing=True)
# The second micro step holds the most memory, because it starts with the gradients of the first.
STAGE2 = replace(PRESETS["stage2"], **FRUGAL, grad_accum_steps=2)
PERSONAL = replace(PRESETS["personal"], models_dir=ROOT / "models", chunk_size=4)  # what "auto" chooses with 12 GB
STAGE1_FAST = replace(PRESETS["stage1"], **FAST)
STAGE2_FAST = replace(STAGE2, **FAST)
COUNTED, FRAMES = 2, 3  # samples of a step, frames of a clip
ROWS = 12  # most lines of a note
MB = 10**6


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


def adapter_mb(config: TrainConfig) -> Measured:
    """Megabytes of the factors of a training with LoRA, which are the file of its adapter."""
    with fake_tensors(), training(config) as run:
        adapter = factors(run.state.unet.model.state_dict())
    return Measured(bytes_of(adapter) / MB, f"{len(adapter)} tensors")


class Operators(TorchDispatchMode):
    """Counts the operators that launch work on a GPU within the context: all but views."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "aten" and not func.is_view:
            self.counts[str(func)] += 1
        return func(*args, **kwargs or {})


def operators_per_sample(config: TrainConfig) -> Measured:
    """Operators that a step launches, per sample; the note lists the most frequent."""
    with fake_tensors(), training(config) as run, Operators() as operators:
        run.step(config.batch_size)
    samples = config.batch_size * config.frames * config.grad_accum_steps
    note = [f"{count / samples:9.1f} {name}" for name, count in operators.counts.most_common(ROWS)]
    return Measured(operators.counts.total() / samples, "\n".join(note))


def all_reduces(config: TrainConfig) -> Measured:
    """Number of all-reduces of a step's gradients in a training with several processes."""
    sent: list[torch.Tensor] = []

    def all_reduce(tensor: torch.Tensor, async_op: bool) -> Mock:
        sent.append(tensor)
        return Mock(spec=torch.distributed.Work)

    processes: dict[str, Any] = {"is_initialized": lambda: True, "get_world_size": lambda: 2, "all_reduce": all_reduce}
    with fake_tensors(), training(config) as run, patch.multiple("torch.distributed", **processes):
        run.step(COUNTED)
    return Measured(len(sent), f"of at most {max(tensor.nbytes for tensor in sent) / GIB:.2f} GiB")


def host_copies(config: TrainConfig) -> Measured:
    """Tensors that a step copies between the host and the device, or reads, with an update of the averaged weights."""
    with mock_device(), training(config) as run, transfers() as seen:
        run.step(COUNTED)
        run.state.update_ema(config.ema_decay)
    count = len(seen.waiting) + len(seen.queued)
    return Measured(count, f"the host waits for {len(seen.waiting)}")


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
