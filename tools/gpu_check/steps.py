"""Cost of an optimizer step at full size with random weights, compared with the peak throughput of the GPU."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.memory import GIB
from benchmarks.training import untrained_training
from musetalk.training.step import StepResult
from musetalk_trainer import PRESETS
from tools.gpu_check.config import GpuCheckConfig

SIDE = {"cuda": 8192, "cpu": 1024}  # of the matrices whose product measures the peak


def time_steps(config: GpuCheckConfig, accelerator: Accelerator, report: Callable) -> None:
    """Reports the cost of the last micro step of each preset, which has all losses, at each chunk size."""
    peak = matmul_peak(accelerator.device)
    report("peak", "matrix product in bfloat16", TFLOP_per_s=peak / 1e12)
    for preset in config.presets:
        constants = replace(PRESETS[preset], models_dir=config.models_dir, grad_accum_steps=1)
        batch_size = config.batch_size or constants.batch_size
        training = untrained_training(constants, accelerator)
        step = partial(training.step, batch_size)
        samples = batch_size * constants.frames
        for chunk_size in config.chunk_sizes[:1] if config.quick else config.chunk_sizes:
            training.objective.chunk_size = chunk_size
            cost = step_cost(step, accelerator.device, peak, times=1 if config.quick else 3)
            report("step", f"{preset}, {samples} samples, chunk_size {chunk_size}", **cost)
        del training, step
        gc.collect()


def step_cost(step: Callable[[], StepResult], device: torch.device, peak: float, times: int) -> dict[str, float | str]:
    """Time, operations and memory of an optimizer step. peak: operations a second, for `share_of_peak`."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with FlopCounterMode(display=False) as counter:
        finite = not step().skipped
    operations, seconds = counter.get_total_flops(), seconds_of(step, device, times)
    return {
        "seconds": seconds,
        "TFLOP": operations / 1e12,
        "share_of_peak": operations / seconds / peak,
        "GiB": torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else float("nan"),
        "finite": str(finite),
    }


def matmul_peak(device: torch.device) -> float:
    """Operations a second of a large bfloat16 matrix product."""
    side = SIDE[device.type]
    a, b = torch.randn(2, side, side, device=device, dtype=torch.bfloat16)
    return 2 * side**3 / seconds_of(lambda: a @ b, device, 10)


def seconds_of(work: Callable[[], object], device: torch.device, times: int) -> float:
    """Mean seconds of a call, measured after a warm-up call."""
    work()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        work()
    synchronize(device)
    return (time.perf_counter() - start) / times


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
