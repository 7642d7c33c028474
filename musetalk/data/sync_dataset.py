"""Cache -> training samples of a sync expert: faces with matching and with non-matching mel.

As in dataset.py, a sample is a pure function of (seed, step, slot).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from musetalk.contract import sync_mel_frames
from musetalk.data.audio import mel_start
from musetalk.data.cache import Cache, CacheError, Clip
from musetalk.data.sampling import WindowSampler, window_starts


@dataclass(frozen=True)
class SyncSample:
    """A window of faces of a clip from frame `start`, optionally mirrored, with its mel; and non-matching mel from
    frame `other_start` of a clip."""

    clip: str
    start: int
    variant: int
    mirrored: bool
    other_clip: str
    other_start: int


class SyncDataset(Dataset):
    """All samples of a run; item step * slots + slot is the sample of that slot of the global batch."""

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
        identity_cap_minutes: float = 0.0,
    ) -> None:
        """slots: samples per optimizer step. frames: length of the expert's window.

        gaps: minimum offset in frames of non-matching mel from the same clip, at the first and at the last of
        `num_steps`; at most half the length of the clip.
        other_clips: share of samples whose non-matching mel comes from another clip.
        identity_cap_minutes: see `WindowSampler`.
        Raises CacheError if no clip has a window of usable frames with its mel and room for non-matching mel.
        """
        self.cache, self.seed, self.slots, self.frames = cache, seed, slots, frames
        self.num_steps, self.gaps, self.other_clips = num_steps, gaps, other_clips
        counts = {
            name: windows
            for name in clips
            if (windows := len(sync_window_starts(cache.clips[name], frames)))
            and len(frames_with_audio(cache.clips[name], frames)) > 2 * min(gaps)
        }
        if not counts:
            raise CacheError(
                f"{cache.folder}: no clip has {frames} consecutive usable frames and mel at least {min(gaps)} frames "
                "away; prepare longer videos"
            )
        self.names = list(counts)
        self.sampler = WindowSampler(
            counts, {name: cache.clips[name].identity for name in counts}, identity_cap_minutes
        )

    def gap(self, step: int) -> int:
        """Minimum offset in frames of non-matching mel from the same clip."""
        first, last = self.gaps
        return round(first + (last - first) * min(1, step / self.num_steps))

    def draw(self, step: int, slot: int) -> SyncSample:
        """Draws the sample of a slot at a step: a window, and mel of the same clip by inverse distance."""
        rng = np.random.default_rng([self.seed, step, slot])
        name, window = self.sampler.draw(rng)
        clip = self.cache.clips[name]
        start = int(sync_window_starts(clip, self.frames)[window])
        variant, mirrored = int(rng.integers(clip.variants)), bool(rng.integers(2))
        if len(self.names) > 1 and rng.random() < self.other_clips:
            index = self.names.index(name) + int(rng.integers(1, len(self.names)))
            other = self.names[index % len(self.names)]
            other_start = int(rng.choice(frames_with_audio(self.cache.clips[other], self.frames)))
            return SyncSample(name, start, variant, mirrored, other, other_start)
        mel_starts = frames_with_audio(clip, self.frames)
        distance = np.abs(mel_starts - start)
        far = distance >= min(self.gap(step), (len(distance) - 1) // 2)
        weights = far / np.maximum(distance, 1)
        other_start = int(rng.choice(mel_starts, p=weights / weights.sum()))
        return SyncSample(name, start, variant, mirrored, name, other_start)

    def listing(self) -> str:
        """Returns a value that differs if the clips do, see `Cache.listing`."""
        return self.cache.listing()

    def __len__(self) -> int:
        return 2**62  # unlimited steps

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.read(self.draw(*divmod(index, self.slots)))

    def read(self, sample: SyncSample) -> dict[str, Any]:
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


def frames_with_audio(clip: Clip, frames: int) -> np.ndarray:
    """Returns the frames, in order and without gaps, at which a complete window of mel starts."""
    starts = mel_start(clip.audio_frame(np.arange(len(clip))))
    return np.flatnonzero((starts >= 0) & (starts + sync_mel_frames(frames) <= clip.rows("mel")))


def sync_window_starts(clip: Clip, frames: int) -> np.ndarray:
    """Returns the first frames of windows with usable frames and complete mel."""
    return np.intersect1d(window_starts(np.flatnonzero(clip.usable), frames), frames_with_audio(clip, frames))


def read_images(clip: Clip, start: int, frames: int, variant: int = 0) -> np.ndarray:
    """Reads a window of faces, BGR uint8 (frames, 256, 256, 3)."""
    return np.stack([clip.image(frame, variant) for frame in range(start, start + frames)])


def read_mel(clip: Clip, start: int, frames: int) -> np.ndarray:
    """Reads the mel of a window of video frames, corrected by the clip's audio offset: float16 (mel_frames, 80)."""
    first = mel_start(clip.audio_frame(start))
    return clip.tensor("mel", first, first + sync_mel_frames(frames))
