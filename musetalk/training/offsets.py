"""Measures the audio offset of the clips of a cache with a sync expert, and stores it in their records.

The expert's own bias is part of what it measures, so it must be trained on material known to be in sync.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePath

import numpy as np
from tqdm import tqdm

from musetalk.data.cache import Cache, Clip
from musetalk.models.syncnet import SyncNet
from musetalk.training.sync_check import clip_sweep, sync_confidence, sync_offset

MIN_CONFIDENCE = 0.15  # below it an offset is not used; provisional: not yet chosen by measuring planted offsets
MIN_WINDOWS = 20  # of faces with audio at every offset of the sweep; clips with fewer are not measured
SCORE = "sync_confidence"  # its name in records


@dataclass(frozen=True)
class OffsetResult:
    """The measured offset of a clip."""

    folder: str  # of the source, relative to the root of the videos
    offset: int  # frames by which the audio lags the video, as measured
    confidence: float  # nan if the clip is too short

    @property
    def accepted(self) -> bool:
        return self.confidence >= MIN_CONFIDENCE


def measure_offset(expert: SyncNet, clip: Clip) -> tuple[int, float]:
    """Returns the offset of a clip's audio as stored, in frames, and its confidence; 0 and nan if it is too short.

    An offset already in the record has no influence.
    """
    similarities, counts = clip_sweep(expert, clip)
    if counts.min() < MIN_WINDOWS:
        return 0, float("nan")
    return sync_offset(similarities), sync_confidence(similarities)


def write_offsets(expert: SyncNet, cache: Cache) -> list[OffsetResult]:
    """Measures all clips of a cache and writes `audio_offset` and the score `sync_confidence` into their records.

    The offset of a clip whose confidence is too low is 0; one that is too short has no score. Tensors are not touched,
    and a second run writes the same. Guarded by folder_lock against other runs.
    """
    results = []
    for clip in tqdm(cache.clips.values(), desc="offsets", unit="clip"):
        offset, confidence = measure_offset(expert, clip)
        result = OffsetResult(PurePath(clip.metadata["source"]).parent.as_posix(), offset, confidence)
        clip.write_offset(offset if result.accepted else 0, {} if np.isnan(confidence) else {SCORE: confidence})
        results.append(result)
    return results


def offset_table(results: Iterable[OffsetResult]) -> str:
    """A row for each folder of sources and one for all: clips with offsets, their quantiles, and clips without."""
    groups: dict[str, list[OffsetResult]] = {}
    for result in results:
        for folder in (result.folder, "all"):
            groups.setdefault(folder, []).append(result)
    table: list[tuple[str, ...]] = [("folder", "clips", "written", "10 %", "median", "90 %", "unsure", "too short")]
    for folder, group in sorted(groups.items(), key=lambda item: (item[0] == "all", item[0])):
        offsets = [result.offset for result in group if result.accepted]
        quantiles = [f"{value:+.1f}" for value in np.quantile(offsets, (0.1, 0.5, 0.9))] if offsets else ["-"] * 3
        short = sum(bool(np.isnan(result.confidence)) for result in group)
        unsure = len(group) - len(offsets) - short
        table.append((folder[-27:], *map(str, (len(group), len(offsets))), *quantiles, str(unsure), str(short)))
    rows = [f"{row[0]:<28}" + "".join(f"{cell:>10}" for cell in row[1:]) for row in table]
    return "\n".join([f"audio offsets in frames, of clips with a confidence of at least {MIN_CONFIDENCE}", *rows])
