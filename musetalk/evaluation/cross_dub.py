"""Dubs clips with each other's audio and measures whether the mouths follow it.

The audio belongs to another clip, so the true mouth openings are known and are not those of the face in the video.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

import numpy as np

from musetalk.data.face.face import FaceBackend
from musetalk.data.video import read_frames
from musetalk.evaluation.metrics import correlation, mouth_openings
from musetalk.inference.pipeline import LipSyncPipeline


def cross_dub(pipeline: LipSyncPipeline, clips: Sequence[Path], folder: Path) -> list[Path]:
    """Dubs each of N clips with the audio of the next one, and the last with that of the first.

    Writes an mp4 with the name of its face's clip to `folder` for each, and returns them in the order of `clips`.
    """
    dubbed = [folder / f"{clip.stem}.mp4" for clip in clips]
    for face, speech, output in zip(clips, rotated(clips), dubbed, strict=True):
        pipeline(face, speech, output)
    return dubbed


def correlation_with_audio(dubbed: Sequence[Path], clips: Sequence[Path], backend: FaceBackend) -> tuple[float, float]:
    """r of the N results of `cross_dub`, and its chance level.

    r: Pearson's correlation of the measured mouth openings with the true ones of the clips that the audio is from, over
    all frames of all results at once. Chance: the same for the true openings of all ordered pairs of different clips.
    """
    generated, truth = ([mouth_openings(read_frames(path), backend) for path in paths] for paths in (dubbed, clips))
    return (
        pooled_correlation(list(zip(generated, rotated(truth), strict=True))),
        pooled_correlation(list(permutations(truth, 2))),
    )


def pooled_correlation(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """Pearson's r over the frames of all pairs of series at once, each pair cut to its shorter series."""
    cut = [(a[: len(b)], b[: len(a)]) for a, b in pairs]
    return correlation(*(np.concatenate(side) for side in zip(*cut, strict=True)))


def rotated(items: Sequence) -> list:
    """The items from the second one on, then the first."""
    return [*items[1:], *items[:1]]
