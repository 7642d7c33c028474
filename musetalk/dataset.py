"""Cache -> training samples: each a pure function of (seed, step, slot), so that a resumed run draws the same ones.

A sample is a window of T consecutive frames of one clip in one margin variant, and for each of them a reference
frame from elsewhere in the clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from musetalk.audio import audio_windows, window_start
from musetalk.cache import Cache, CacheError, Clip
from musetalk.contract import WINDOW_STEPS, FeatureContract

MIN_REFERENCE_GAP = 5  # frames; nearer ones show the same mouth, and copying it would be a short cut


@dataclass(frozen=True)
class Sample:
    """What to read: frames [start, start + T) of a clip, their reference frames (T,), and the margin variant."""

    clip: str
    start: int
    references: tuple[int, ...]
    variant: int


class FaceDataset(Dataset):
    """All samples of a run, item step * slots + slot being the one of that slot of the global batch."""

    def __init__(
        self,
        cache: Cache,
        clips: Sequence[str],
        contract: FeatureContract,
        *,
        seed: int,
        slots: int,
        frames: int = 1,
    ) -> None:
        """slots: samples in one optimizer step, over accumulation and processes. frames: T.

        The contract's model fields shape the audio windows; its margins say which variants are drawn.
        Raises CacheError where no clip has T usable frames in a row and a reference away from them.
        """
        self.cache, self.contract, self.seed, self.slots, self.frames = cache, contract, seed, slots, frames
        self.variants = [cache.contract.margins.index(margin) for margin in contract.margins]
        self.starts = {}  # clip -> first frames of windows that can be drawn
        for name in clips:
            starts = _window_starts(cache.clips[name].usable, frames)
            if len(starts):
                self.starts[name] = starts
        if not self.starts:
            raise CacheError(
                f"{cache.folder}: no clip has {frames} usable frames in a row and another {MIN_REFERENCE_GAP} frames "
                "away; prepare longer videos"
            )
        self.names = list(self.starts)
        self.ends = np.cumsum([len(starts) for starts in self.starts.values()])

    def draw(self, step: int, slot: int) -> Sample:
        """The sample of a slot at a step: every window of every clip is equally likely."""
        rng = np.random.default_rng([self.seed, step, slot])
        pick = int(rng.integers(self.ends[-1]))
        which = int(np.searchsorted(self.ends, pick, side="right"))
        name = self.names[which]
        start = int(self.starts[name][pick - self.ends[which]])
        usable = np.flatnonzero(self.cache.clips[name].usable)
        references = tuple(
            int(rng.choice(usable[np.abs(usable - frame) >= MIN_REFERENCE_GAP]))
            for frame in range(start, start + self.frames)
        )
        return Sample(name, start, references, int(rng.choice(self.variants)))

    def __len__(self) -> int:
        return 2**62  # steps never run out

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | str]:
        return self.read(self.draw(*divmod(index, self.slots)))

    def read(self, sample: Sample) -> dict[str, torch.Tensor | str]:
        """masked_latents, reference_latents, target_latents float16 (T, 4, 32, 32) · audio_window float16 (T, W, D)
        · target_image uint8 (T, 256, 256, 3) BGR · where: a name for messages."""
        clip = self.cache.clips[sample.clip]
        stop, variant = sample.start + self.frames, sample.variant
        references = [clip.tensor("latents", frame, frame + 1)[0, variant] for frame in sample.references]
        arrays = {
            "masked_latents": clip.tensor("masked_latents", sample.start, stop)[:, variant],
            "reference_latents": np.stack(references),
            "target_latents": clip.tensor("latents", sample.start, stop)[:, variant],
            "audio_window": read_windows(clip, sample.start, stop, self.contract),
            "target_image": np.stack([clip.image(frame, variant) for frame in range(sample.start, stop)]),
        }
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        return tensors | {"where": f"{sample.clip}, frame {sample.start}"}


def read_windows(clip: Clip, start: int, stop: int, contract: FeatureContract) -> np.ndarray:
    """Audio windows float16 (stop - start, W, D) of frames of a clip, reading no more features than they hold."""
    count = clip.rows("audio_features")
    first = int(np.clip(window_start(start, contract), 0, count - 1))
    last = int(np.clip(window_start(stop - 1, contract) + WINDOW_STEPS, first + 1, count))
    features = clip.tensor("audio_features", first, last)
    return audio_windows(features, range(start, stop), contract, first, count)


def _window_starts(usable: np.ndarray, frames: int) -> np.ndarray:
    """First frames of the windows of usable frames, each frame of which has a reference far enough away."""
    where = np.flatnonzero(usable)
    if not len(where):
        return where
    index = np.arange(len(usable))
    good = usable & ((index - where[0] >= MIN_REFERENCE_GAP) | (where[-1] - index >= MIN_REFERENCE_GAP))
    windows = np.lib.stride_tricks.sliding_window_view(good, frames) if len(good) >= frames else np.zeros((0, 1), bool)
    return np.flatnonzero(windows.all(axis=1))


def split_clips(cache: Cache, held_out: float, seed: int) -> tuple[list[str], list[str], str]:
    """Clips to train on, clips held out, and a sentence for the log.

    held_out: share of the identities (at least one) that training never sees. With a single identity whole clips
    are held out; with a single clip none can be.
    """
    identities = {name: clip.identity for name, clip in cache.clips.items()}
    groups = sorted(set(identities.values()))
    by = "identities"
    if len(groups) == 1:
        by, groups, identities = "clips", sorted(identities), {name: name for name in identities}
    if len(groups) == 1:
        return sorted(cache.clips), [], "a single clip: nothing is held out, samples show what was trained on"
    count = min(max(1, round(held_out * len(groups))), len(groups) - 1)
    chosen = set(np.random.default_rng(seed).permutation(groups)[:count])
    train = sorted(name for name, group in identities.items() if group not in chosen)
    held = sorted(name for name, group in identities.items() if group in chosen)
    note = " (all clips show one identity)" if by == "clips" else ""
    return train, held, f"held out {len(chosen)} of {len(groups)} {by}{note}: {', '.join(held)}"
