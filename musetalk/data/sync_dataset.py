"""Cache -> what a sync expert learns from: faces, the mel of their time, and mel of another time.

Samples are, as in dataset.py, a pure function of (seed, step, slot).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from musetalk.contract import sync_mel_frames
from musetalk.data.audio import mel_start
from musetalk.data.cache import Cache, CacheError, Clip


@dataclass(frozen=True)
class SyncSample:
    """What to read: faces from frame `start` of a clip on in a margin variant, mirrored or not, and the mel of that
    time; and mel from frame `other_start` of a clip on, which is not theirs."""

    clip: str
    start: int
    variant: int
    mirrored: bool
    other_clip: str
    other_start: int


class SyncDataset(Dataset):
    """All samples of a run, item step * slots + slot being the one of that slot of the global batch."""

    def __init__(
        self,
        cache: Cache,
        clips: Sequence[str],
        *,
        seed: int,
        slots: int,
        frames: int,
        num_steps: int,
        gaps: tuple[int, int],
        other_clips: float,
    ) -> None:
        """slots: samples in one optimizer step. frames: that the expert sees at once.

        gaps: frames that mel of the same clip is off at least, at the first step and at the last of `num_steps`; in a
        clip that is too short for the larger one, as many as half of it.
        other_clips: share of samples whose other mel is of another clip.
        Raises CacheError where no clip has a window of usable frames with their mel and room for other mel.
        """
        self.cache, self.seed, self.slots, self.frames = cache, seed, slots, frames
        self.num_steps, self.gaps, self.other_clips = num_steps, gaps, other_clips
        self.starts, self.heard = {}, {}  # clip -> first frames of windows, and how many frames mel begins at
        for name in clips:
            starts, heard = window_starts(cache.clips[name], frames), frames_with_audio(cache.clips[name], frames)
            if len(starts) and heard > 2 * min(gaps):
                self.starts[name], self.heard[name] = starts, heard
        if not self.starts:
            raise CacheError(
                f"{cache.folder}: no clip has {frames} usable frames in a row and mel {min(gaps)} frames away "
                "from any; prepare longer videos"
            )
        self.names = list(self.starts)
        self.ends = np.cumsum([len(starts) for starts in self.starts.values()])

    def gap(self, step: int) -> int:
        """Frames that mel of the same clip is off at least."""
        first, last = self.gaps
        return round(first + (last - first) * min(1, step / self.num_steps))

    def draw(self, step: int, slot: int) -> SyncSample:
        """The sample of a slot at a step: every window is equally likely, other mel of the clip the more the nearer."""
        rng = np.random.default_rng([self.seed, step, slot])
        pick = int(rng.integers(self.ends[-1]))
        which = int(np.searchsorted(self.ends, pick, side="right"))
        name = self.names[which]
        start = int(self.starts[name][pick - self.ends[which]])
        variant, mirrored = int(rng.integers(self.cache.clips[name].variants)), bool(rng.integers(2))
        if len(self.names) > 1 and rng.random() < self.other_clips:
            other = self.names[(which + int(rng.integers(1, len(self.names)))) % len(self.names)]
            return SyncSample(name, start, variant, mirrored, other, int(rng.integers(self.heard[other])))
        distance = np.abs(np.arange(self.heard[name]) - start)
        far = distance >= min(self.gap(step), (self.heard[name] - 1) // 2)
        chances = far / np.maximum(distance, 1)
        other_start = int(rng.choice(len(chances), p=chances / chances.sum()))
        return SyncSample(name, start, variant, mirrored, name, other_start)

    def __len__(self) -> int:
        return 2**62  # steps never run out

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | str]:
        return self.read(self.draw(*divmod(index, self.slots)))

    def read(self, sample: SyncSample) -> dict[str, torch.Tensor | str]:
        """images uint8 (frames, 256, 256, 3) BGR · mel, other_mel float16 (mel_frames, 80) · where: for messages."""
        clip, other = self.cache.clips[sample.clip], self.cache.clips[sample.other_clip]
        images = read_images(clip, sample.start, self.frames, sample.variant)
        if sample.mirrored:
            images = images[:, :, ::-1]
        arrays = {
            "images": images,
            "mel": read_mel(clip, sample.start, self.frames),
            "other_mel": read_mel(other, sample.other_start, self.frames),
        }
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        return tensors | {"where": f"{sample.clip}, frame {sample.start}"}


def frames_with_audio(clip: Clip, frames: int) -> int:
    """How many frames of a clip are the first of a window of mel that is whole; they are the first ones of the clip."""
    begins = mel_start(np.arange(len(clip)))
    return int((begins + sync_mel_frames(frames) <= clip.rows("mel")).sum())


def window_starts(clip: Clip, frames: int) -> np.ndarray:
    """First frames of the windows of a clip that can be seen and heard."""
    if len(clip) < frames:
        return np.zeros(0, int)
    starts = np.flatnonzero(np.lib.stride_tricks.sliding_window_view(clip.usable, frames).all(axis=1))
    return starts[starts < frames_with_audio(clip, frames)]


def read_images(clip: Clip, start: int, frames: int, variant: int = 0) -> np.ndarray:
    """A window of faces, BGR uint8 (frames, 256, 256, 3)."""
    return np.stack([clip.image(frame, variant) for frame in range(start, start + frames)])


def read_mel(clip: Clip, start: int, frames: int) -> np.ndarray:
    """The mel of a window's time, float16 (mel_frames, 80)."""
    first = mel_start(start)
    return clip.tensor("mel", first, first + sync_mel_frames(frames))
