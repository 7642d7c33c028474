"""The windows of held-out clips that a validation looks at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from musetalk.contract import AUDIO_MARGIN, CONTEXT_FRAMES, SAMPLES_PER_FRAME
from musetalk.data.audio import FULL_SCALE
from musetalk.data.cache import Cache, CacheError, Clip
from musetalk.data.crop import in_crop, mouth_box
from musetalk.data.dataset import unit_hash
from musetalk.data.face.face import Face
from musetalk.evaluation.metrics import mouth_opening

MIN_FRAMES = 5  # of a window
GAP = 5  # frames between a window and its reference frames
# Level of a silent frame relative to the clip's loud ones. In GRID, pauses are 20 to 35 dB below speech; vlogs, whose
# rooms are louder, have few silent frames.
SILENT = 0.1  # -20 dB
LOUD = 95  # percentile of the levels of a clip's frames


@dataclass(frozen=True)
class Window:
    """F consecutive usable frames [start, stop) of a clip, and two reference frames outside: mouth closed and open."""

    clip: Clip
    start: int
    stop: int
    closed: int
    open: int

    @cached_property
    def openings(self) -> np.ndarray:
        """True mouth openings, float (F,)."""
        return true_openings(self.clip, range(self.start, self.stop))

    def images(self) -> np.ndarray:
        """The true faces, BGR uint8 (F, 256, 256, 3)."""
        return np.stack([self.clip.image(frame) for frame in range(self.start, self.stop)])

    @cached_property
    def mouth_boxes(self) -> torch.Tensor:
        """Boxes of the true mouths, see `crop.mouth_box`: float32 (F, 4)."""
        clip, start, stop = self.clip, self.start, self.stop
        geometry = zip(clip.tensor("landmarks", start, stop), clip.tensor("boxes", start, stop)[:, 0], strict=True)
        return torch.from_numpy(np.stack([mouth_box(landmarks, box) for landmarks, box in geometry]))

    @cached_property
    def silent(self) -> np.ndarray:
        """Frames whose whole audio window is silent, bool (F,); False throughout if the clip stores no sound.

        A frame is silent if its RMS is at most `SILENT` times that of the clip's loud frames.
        """
        if not self.clip.has("audio"):
            return np.zeros(self.stop - self.start, bool)
        samples = self.clip.tensor("audio").astype(np.float64).reshape(-1, SAMPLES_PER_FRAME)
        levels = np.sqrt((samples**2).mean(axis=1))  # of the clip's frames and AUDIO_MARGIN more on either side
        quiet = levels <= SILENT * np.percentile(levels[AUDIO_MARGIN:-AUDIO_MARGIN], LOUD)
        first = self.clip.audio_frame(self.start) + AUDIO_MARGIN - CONTEXT_FRAMES
        span = 2 * CONTEXT_FRAMES + 1
        windows = np.all(np.lib.stride_tricks.sliding_window_view(quiet, span), axis=1)
        return windows[first : first + self.stop - self.start]

    def shifted(self, shift: int) -> np.ndarray:
        """Frames of the window for which the frame `shift` later is usable too, so has its audio: int, from 0."""
        frames = np.arange(self.start, min(self.stop, len(self.clip) - shift))
        return frames[self.clip.usable[frames + shift]] - self.start


def choose_windows(cache: Cache, names: Sequence[str], clips: int, frames: int) -> list[Window]:
    """A window in each of at most `clips` clips: each identity has one before any has a second one.

    Identities, and the clips of each, come in the order of the hashes of their names. Clips without a window (see
    `choose_window`) are left out. Raises CacheError if there are no others.
    """
    windows: list[Window] = []
    for name in _by_turns(cache, names):
        window = choose_window(cache.clips[name], frames) if len(windows) < clips else None
        if window:
            windows.append(window)
    if not windows:
        raise CacheError(
            f"{cache.folder}: no held-out clip has {MIN_FRAMES + 2 * GAP} consecutive usable frames to validate on; "
            "prepare longer videos"
        )
    return windows


def _by_turns(cache: Cache, names: Sequence[str]) -> Iterator[str]:
    """Yields the first clip of each identity, then the second of each, and so on."""
    queues: dict[str, list[str]] = {}
    for name in sorted(names, key=unit_hash):
        queues.setdefault(cache.clips[name].identity, []).append(name)
    order = sorted(queues, key=unit_hash)
    for turn in range(max(map(len, queues.values()), default=0)):
        yield from (queues[identity][turn] for identity in order if turn < len(queues[identity]))


def choose_window(clip: Clip, frames: int) -> Window | None:
    """The start of the longest run of usable frames of a clip, at most `frames` and at most half of its usable frames.

    None if it has fewer than `MIN_FRAMES` frames, or fewer than two usable frames at least `GAP` away from it.
    """
    usable = np.flatnonzero(clip.usable)
    runs = np.split(usable, np.flatnonzero(np.diff(usable) > 1) + 1)
    run = max(runs, key=len)
    run = run[: min(frames, len(usable) // 2)]
    candidates = usable[(usable <= run[0] - GAP) | (usable >= run[-1] + GAP)] if len(run) else run
    if len(run) < MIN_FRAMES or len(candidates) < 2:
        return None
    openings = true_openings(clip, candidates)
    closed, open_ = int(candidates[openings.argmin()]), int(candidates[openings.argmax()])
    return Window(clip, int(run[0]), int(run[-1]) + 1, closed, open_)


def true_openings(clip: Clip, frames: Iterable[int]) -> np.ndarray:
    """Mouth openings in usable frames of a clip, measured in crop coordinates."""
    landmarks, boxes = clip.tensor("landmarks"), clip.tensor("boxes")[:, 0]
    faces = [Face(np.zeros(4), in_crop(landmarks[frame], boxes[frame]), 1.0) for frame in frames]
    return np.array([mouth_opening(face) for face in faces])


def read_sound(clip: Clip, start: int, frames: int) -> np.ndarray:
    """Reads the sound of video frames from `start` on, corrected by the clip's audio offset: float32 (N,) in [-1, 1].

    At most 15 frames beyond the clip; shorter than `frames` if it ends before.
    """
    first = clip.audio_frame(start) + AUDIO_MARGIN
    samples = clip.tensor("audio", SAMPLES_PER_FRAME * first, SAMPLES_PER_FRAME * (first + frames))
    return samples / np.float32(FULL_SCALE)
