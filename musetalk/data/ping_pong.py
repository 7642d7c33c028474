"""Plays a video forwards and backwards, for audio that is longer than the video."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

import av
import numpy as np

from musetalk.data.video import resampled_frames, upright

BLOCK_BYTES = 1 << 27  # of the decoded frames of a block: 97 of 1280 x 720; at most two blocks are in memory


def ping_pong(path: Path, length: int, count: int) -> Generator[np.ndarray, None, None]:
    """Yields `count` frames of a video of `length` frames that plays forwards, then backwards, and so on.

    BGR uint8 (H, W, 3), a new array for each frame. Memory is constant: the frames before a turn are kept for after it,
    the others decoded again, backwards in blocks. A video of a single block is decoded once.
    """
    played = resampled_frames(path, 0, count) if count <= length else islice(_play(path, length), count)
    yield from map(upright, played)


def ping_pong_index(k: int, length: int) -> int:
    """Returns the index of the k-th frame of `ping_pong`."""
    k %= 2 * length
    return k if k < length else 2 * length - 1 - k


def _play(path: Path, length: int) -> Iterator[av.VideoFrame]:
    """Plays a video forwards and backwards without end."""
    size = max(1, BLOCK_BYTES // _bytes(next(resampled_frames(path))))
    block: list[av.VideoFrame] = []  # frames [start, start + len(block))
    while True:
        last: deque[av.VideoFrame] = deque(maxlen=size)
        rest: Iterable = resampled_frames(path, len(block), length) if len(block) < length else ()
        for frame in chain(block, rest):
            last.append(frame)
            yield frame
        block, start = list(last), length - len(last)
        yield from reversed(block)
        while start:
            stop, start = start, max(0, start - size)
            block = list(resampled_frames(path, start, stop))
            yield from reversed(block)


def _bytes(frame: av.VideoFrame) -> int:
    """The memory of a decoded frame."""
    return sum(plane.buffer_size for plane in frame.planes)
