"""Frames and audio of the built-in sample, for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from musetalk.contract import SAMPLES_PER_FRAME
from musetalk.data.video import read_audio, read_frames

CLIPS = sorted((Path(__file__).parents[1] / "sample").glob("*.mp4"))


def sample_frames(index: int, start: int, stop: int) -> list[np.ndarray]:
    """Frames [start, stop) of a clip, BGR uint8 (288, 360, 3)."""
    return list(read_frames(CLIPS[index], start, stop))


def sample_audio(index: int, start: int, stop: int) -> np.ndarray:
    """The audio of frames [start, stop) of a clip, float32 (640 (stop - start),) in [-1, 1]."""
    return read_audio(CLIPS[index])[start * SAMPLES_PER_FRAME : stop * SAMPLES_PER_FRAME]
