"""Measures by how many frames the audio of each clip of a cache lags its video, and stores it in the clip's record.

    python -m musetalk.data.offsets data/mine                         learns from the clips themselves
    python -m musetalk.data.offsets data/mine --in-sync data/studio   learns from a cache that is known to be in sync

A ridge regression predicts the opening of the mouth in a frame from the audio features around it. The offset of a clip
is the shift of its audio at which predicted and true openings correlate best. The confidence is the lead of this
correlation over the best one of another peak: the difference of their Fisher's z, times the root of the number of
frames. A few minutes of speech are enough to learn from, where a sync expert
needs hours. What it learns from must be in sync on the whole, because a common offset is learned as well.

Measures the audio as it is stored, whatever offset the record has, so the same command writes the same again. Takes
about a second for each minute of video.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from sklearn.linear_model import Ridge
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.random_projection import GaussianRandomProjection
from tqdm import tqdm

from musetalk.cli import run_script
from musetalk.contract import AUDIO_MARGIN, FEATURES_PER_FRAME, RIGID
from musetalk.data.audio import audio_windows
from musetalk.data.cache import Cache, CacheError, Clip
from musetalk.data.crop import CLOSED, EYE_CORNERS, lip_gaps
from musetalk.files import folder_lock

OFFSETS = np.arange(-AUDIO_MARGIN, AUDIO_MARGIN + 1)  # frames, (31,)
PRECISION = 1  # frames by which a measured offset may be wrong
PEAK = 3  # frames; correlations at offsets this close belong to the same peak
# Below it an offset is not used. On 109 clips of real people other than the main speaker, 95 % have more with their own
# audio, and 4 % with that of someone else.
MIN_CONFIDENCE = 3.5
MIN_FRAMES = 40  # with audio, at every offset
LEARNED_FRAMES = 20_000  # at most, spread evenly over the clips
DIMENSIONS = 1024  # of a randomly projected window of features, which has 5,000 to 64,000
PENALTY = 0.003  # of the regression, relative to the mean square of the projected windows
AUDIO_FIELDS = ("audio_encoder", "final_layer_norm", "mel_scope", "tail")  # of the contract: the kind of features
SCORE = "sync_confidence"  # its name in records


@dataclass(frozen=True)
class OffsetsConfig:
    """Caches; override on the command line."""

    cache: Annotated[Path, tyro.conf.Positional]  # whose clips are measured
    in_sync: Path | None = None  # a cache with the same audio features to learn from; None: the same one


@dataclass(frozen=True)
class Offset:
    """A measured offset."""

    frames: int  # by which the audio lags the video
    confidence: float  # nan if there are too few frames

    @property
    def clear(self) -> bool:
        return self.confidence >= MIN_CONFIDENCE


@dataclass(frozen=True)
class Series:
    """The openings of a clip's mouth and their predictions from its audio."""

    openings: np.ndarray  # (T,), standardised; nan where unknown
    predictions: np.ndarray  # (T + 30,), from 15 frames before the clip on; nan beyond its audio


def main(config: OffsetsConfig) -> None:
    """Measures and stores the offsets, and prints a table of them."""
    cache = Cache(config.cache)
    learned = Cache(config.in_sync) if config.in_sync else cache
    learned.contract.require(cache.contract, AUDIO_FIELDS, str(learned.folder))
    regression = learn(list(learned.clips.values()))
    with folder_lock(config.cache):
        print(offset_table(write_offsets(cache, regression)))


def learn(clips: Sequence[Clip]) -> Pipeline:
    """Learns to predict openings from windows of audio features. Raises CacheError if no frame has both."""
    every = max(1, sum(map(len, clips)) // LEARNED_FRAMES)
    projection = GaussianRandomProjection(DIMENSIONS, random_state=0)
    windows, openings = [], []
    for clip in tqdm(clips, desc="learning", unit="clip"):
        frames = np.flatnonzero(np.isfinite(mouth_openings(clip)) & has_window(clip, np.arange(len(clip))))[::every]
        if len(frames):
            flat = flat_windows(clip, frames)
            windows.append(projection.fit_transform(flat))
            openings.append(mouth_openings(clip)[frames])
    if not windows:
        raise CacheError("no clip to learn from has a face and audio; prepare videos of speaking people")
    projected, target = np.concatenate(windows), np.concatenate(openings)
    ridge = Ridge(PENALTY * len(target) * np.square(projected).mean())
    return make_pipeline(projection, ridge.fit(projected, target))


def write_offsets(cache: Cache, regression: Pipeline) -> list[Offset]:
    """Writes and returns the `audio_offset` of each clip, with the score `sync_confidence`. Guarded by folder_lock.

    A clip has the offset of all clips of its identity together, unless its own is clearly another. Where neither is
    clear the offset is 0; where there are too few frames there is no score.
    """
    groups: dict[str, list[Series]] = defaultdict(list)
    series = {}
    for clip in tqdm(cache.clips.values(), desc="offsets", unit="clip"):
        series[clip.name] = predict(regression, clip)
        groups[clip.identity].append(series[clip.name])
    common = {identity: best_offset(group) for identity, group in groups.items()}
    offsets = []
    for clip in cache.clips.values():
        own, offset = best_offset([series[clip.name]]), common[clip.identity]
        if own.clear and (not offset.clear or abs(own.frames - offset.frames) > PRECISION):
            offset = own
        scores = {} if np.isnan(offset.confidence) else {SCORE: offset.confidence}
        clip.write_offset(offset.frames if offset.clear else 0, scores)
        offsets.append(offset)
    return offsets


def best_offset(group: Sequence[Series]) -> Offset:
    """The offset at which openings and predictions of some clips, taken together, correlate best."""
    correlations, counts = np.transpose([correlation_at(group, offset) for offset in OFFSETS.tolist()])
    if counts.min() < MIN_FRAMES:
        return Offset(0, float("nan"))
    best = int(correlations.argmax())
    elsewhere = correlations[np.abs(OFFSETS - OFFSETS[best]) > PEAK].max()
    lead = np.arctanh(correlations[best]) - np.arctanh(elsewhere)
    return Offset(int(OFFSETS[best]), float(lead * np.sqrt(counts[best])))


def correlation_at(group: Sequence[Series], offset: int) -> tuple[float, int]:
    """Pearson's r of openings and predictions at an offset, and the number of frames; 0 if there are fewer than two."""
    pairs = [(series.openings, series.predictions[AUDIO_MARGIN + offset :][: len(series.openings)]) for series in group]
    openings, predictions = (np.concatenate(side) for side in zip(*pairs, strict=True))
    known = np.isfinite(openings) & np.isfinite(predictions)
    r = np.corrcoef(openings[known], predictions[known])[0, 1] if known.sum() > 1 else 0.0
    return r, known.sum()


def predict(regression: Pipeline, clip: Clip) -> Series:
    """Predicts the openings of a clip for all offsets of its audio."""
    frames = np.arange(-AUDIO_MARGIN, len(clip) + AUDIO_MARGIN)
    predictions = np.full(len(frames), np.nan)
    inside = has_window(clip, frames)
    if inside.any():
        predictions[inside] = regression.predict(flat_windows(clip, frames[inside]))
    return Series(mouth_openings(clip), predictions)


def mouth_openings(clip: Clip) -> np.ndarray:
    """Logarithms of the lip gaps (T,), with a mean of 0 and a standard deviation of 1; nan where there is no face."""
    gaps = np.log(lip_gaps(clip.tensor("landmarks"), EYE_CORNERS) + CLOSED)
    gaps[~clip.tensor("usable")] = np.nan
    known = gaps[np.isfinite(gaps)]
    if not len(known) or known.std() < 1e-3:  # no face, or a mouth that does not move
        return np.full(len(gaps), np.nan)
    return (gaps - known.mean()) / known.std()


def has_window(clip: Clip, frames: np.ndarray) -> np.ndarray:
    """Whether the frame numbers (N,), of the audio as stored, are inside the clip's audio: bool (N,)."""
    return (frames >= 0) & (FEATURES_PER_FRAME * (frames + 1) <= clip.rows("audio_features"))


def flat_windows(clip: Clip, frames: np.ndarray) -> np.ndarray:
    """The windows of audio features that the UNet sees in frames (N,), float32 (N, 10 S D)."""
    windows = audio_windows(clip.tensor("audio_features"), frames.tolist(), RIGID)
    return windows.reshape(len(frames), -1).astype(np.float32)


def offset_table(offsets: Sequence[Offset]) -> str:
    """The number of clips with each offset, and of those without."""
    counts = sorted(Counter(offset.frames for offset in offsets if offset.clear).items())
    rows = [(f"{frames:+d} frames", count) for frames, count in counts]
    short = sum(bool(np.isnan(offset.confidence)) for offset in offsets)
    rows += [("not clear, left at 0", len(offsets) - short - sum(count for _, count in counts))]
    rows += [("too short, left at 0", short)]
    return "\n".join(f"{name:<24}{count:>6}" for name, count in [("audio lags by", "clips"), *rows])


if __name__ == "__main__":
    run_script(main, tyro.cli(OffsetsConfig, description=__doc__))
