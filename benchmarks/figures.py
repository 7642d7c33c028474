"""The figures and their targets. The deterministic ones are also tested."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from benchmarks import counts, inference, reading, timings
from benchmarks.workplace import Measured, Workplace

RELATIONS = {"<=": operator.le, ">=": operator.ge, "==": operator.eq}


@dataclass(frozen=True)
class Figure:
    """A figure with its target."""

    name: str
    unit: str
    relation: Literal["<=", ">=", "=="]
    bound: float
    measure: Callable[[Workplace], Measured]

    @property
    def target(self) -> str:
        return f"{self.relation} {self.bound:g}"

    def holds(self, value: float) -> bool:
        return RELATIONS[self.relation](value, self.bound)


FIGURES = (
    Figure("train_tflop_per_sample", "TFLOP", "<=", 1.95, lambda _: counts.tflop_per_sample(counts.ORIGINAL)),
    Figure(
        *("train_tflop_per_sample_tiny_decoder", "TFLOP", "<=", 0.8),
        lambda _: counts.tflop_per_sample(counts.TINY_DECODER),
    ),
    Figure("train_gib_b32", "GiB", "<=", 21.5, lambda _: counts.peak_gib(counts.ORIGINAL)),
    Figure("train_gib_b32_ckpt", "GiB", "<=", 14.5, lambda _: counts.peak_gib(counts.CHECKPOINTED)),
    Figure("train_gib_b32_chunk16", "GiB", "<=", 35, lambda _: counts.peak_gib(counts.ORIGINAL_CHUNK16)),
    Figure("train_gib_b32_ema", "GiB", "<=", 25, lambda _: counts.peak_gib(counts.ORIGINAL_EMA)),
    Figure("stage2_gib_2x16", "GiB", "<=", 22, lambda _: counts.peak_gib(counts.STAGE2)),
    Figure("personal_gib_b4", "GiB", "<=", 11, lambda _: counts.peak_gib(counts.PERSONAL)),
    Figure("adapter_mb", "MB", "<=", 12, lambda _: counts.adapter_mb(counts.PERSONAL)),
    Figure(
        "stage1_operators_per_sample", "operators", "<=", 300, lambda _: counts.operators_per_sample(counts.STAGE1_FAST)
    ),
    Figure(
        "stage2_operators_per_sample", "operators", "<=", 600, lambda _: counts.operators_per_sample(counts.STAGE2_FAST)
    ),
    Figure("stage2_all_reduces", "all-reduces", "<=", 40, lambda _: counts.all_reduces(counts.STAGE2)),
    Figure("stage1_host_copies", "copies", "<=", 10, lambda _: counts.host_copies(counts.STAGE1_FAST)),
    Figure("cache_bytes_per_frame", "bytes", "<=", 45_000, counts.cache_bytes_per_frame),
    Figure("cache_files_per_clip", "files", "<=", 2, counts.cache_files_per_clip),
    Figure("reader_gb_64_workers", "GB", "<=", 2, reading.reader_gb_64_workers),
    Figure("cache_open_ratio", "x", "<=", 1.5, reading.cache_open_ratio),
    Figure("cold_read_mb", "MB", "<=", 2, reading.cold_read_mb),
    Figure("cold_read_ratio", "x", "<=", 10, reading.cold_read_ratio),
    Figure("loader_ratio", "x", ">=", 8, timings.loader_ratio),
    Figure("preprocess_vae_encodes_per_frame", "encodes", "==", 2, lambda _: counts.vae_encodes_per_frame()),
    Figure("preprocess_nonmodel_ratio", "x", ">=", 2.7, timings.preprocess_nonmodel_ratio),
    Figure("vae_encode_cpu_ratio", "x", ">=", 2.3, timings.vae_encode_cpu_ratio),
    Figure("preprocess_ratio", "x", ">=", 2, timings.preprocess_ratio),
    Figure("pipeline_overhead", "x", "<=", 1.3, inference.pipeline_overhead),
    Figure("pipeline_wall_ratio", "x", "<=", 0.8, inference.pipeline_wall_ratio),
    Figure("inference_memory_ratio", "x", "<=", 1.2, inference.inference_memory_ratio),
)
