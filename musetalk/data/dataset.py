"""Cache -> training samples: each a pure function of (seed, step, slot), so that a resumed run draws the same ones.

A sample is a window of T consecutive frames of one clip in one margin variant, and for each of them a reference
frame from elsewhere in the clip in a variant of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch.utils.data import Dataset

from musetalk.contract import CACHE_FIELDS, WINDOW_STEPS, FeatureContract
from musetalk.data.audio import audio_windows, mel_start, window_start
from musetalk.data.cache import Cache, CacheError, Clip
from musetalk.data.crop import EYE_CORNERS, INNER_LIPS, JAW, mouth_box, skull_size

References = Literal["random", "pose_and_mouth"]
QUANTILE = 0.51  # share of the frames whose pose is near, and of those whose mouth is far; two such shares always meet


@dataclass(frozen=True)
class Sample:
    """What to read: frames [start, start + T) of a clip in a margin variant; T reference frames, each in its own."""

    clip: str
    start: int
    references: tuple[int, ...]
    variant: int
    reference_variants: tuple[int, ...]


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
        references: References = "random",
        min_reference_gap: int = 5,
        mel_frames: int = 0,
        sync_offset: int = 0,
    ) -> None:
        """slots: samples in one optimizer step, over accumulation and processes. frames: T.

        references: any frame at least min_reference_gap away (nearer ones show the same mouth, and copying it would
        be a short cut), or one that `pose_matched_candidates` finds among them.
        mel_frames: of the window's time, for a sync expert; 0 is none. sync_offset: frames that this mel is later than
        the window. It is measured with the expert, and whether it is due to the expert (Wav2Lip's published one is a
        frame off) or to the data, moving what the UNet hears too would gain nothing and disturb published weights.
        The contract's model fields shape the audio windows; its margins say which variants are drawn.
        Raises ContractError for a cache made under other rules, CacheError where no clip has such a window.
        """
        assert references in get_args(References), references
        cache.contract.require(contract, CACHE_FIELDS, str(cache.folder))
        self.cache, self.contract, self.seed, self.slots, self.frames = cache, contract, seed, slots, frames
        self.references, self.min_reference_gap = references, min_reference_gap
        self.mel_frames, self.sync_offset = mel_frames, sync_offset
        self.variants = [cache.contract.margins.index(margin) for margin in contract.margins]
        self.starts = {}  # clip -> first frames of windows that can be drawn
        for name in clips:
            starts = self._window_starts(cache.clips[name])
            if len(starts):
                self.starts[name] = starts
        if not self.starts:
            sound = f" with {mel_frames} mel frames of sound {sync_offset} frames later" if mel_frames else ""
            raise CacheError(
                f"{cache.folder}: no clip has {frames} usable frames in a row{sound} and another {min_reference_gap} "
                "frames away; prepare longer videos"
            )
        self.names = list(self.starts)
        self.ends = np.cumsum([len(starts) for starts in self.starts.values()])
        self._shapes: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # clip -> `face_shapes`, 200 bytes a frame

    def _window_starts(self, clip: Clip) -> np.ndarray:
        """First frames of the windows of usable frames with their mel, each frame with a reference far enough away."""
        usable = np.flatnonzero(clip.usable)
        if len(clip) < self.frames or not len(usable):
            return np.zeros(0, int)
        index = np.arange(len(clip))
        far = (index - usable[0] >= self.min_reference_gap) | (usable[-1] - index >= self.min_reference_gap)
        windows = np.lib.stride_tricks.sliding_window_view(clip.usable & far, self.frames)
        starts = np.flatnonzero(windows.all(axis=1))
        if not self.mel_frames:
            return starts
        mel = mel_start(starts + self.sync_offset)
        return starts[(mel >= 0) & (mel + self.mel_frames <= clip.rows("mel"))]

    def draw(self, step: int, slot: int) -> Sample:
        """The sample of a slot at a step: every window of every clip is equally likely."""
        rng = np.random.default_rng([self.seed, step, slot])
        pick = int(rng.integers(self.ends[-1]))
        which = int(np.searchsorted(self.ends, pick, side="right"))
        name = self.names[which]
        start = int(self.starts[name][pick - self.ends[which]])
        references = tuple(
            int(rng.choice(self._candidates(name, frame))) for frame in range(start, start + self.frames)
        )
        variant, *others = (int(variant) for variant in rng.choice(self.variants, 1 + self.frames))
        return Sample(name, start, references, variant, tuple(others))

    def _candidates(self, name: str, frame: int) -> np.ndarray:
        """The frames of a clip that may be the reference of one of them."""
        clip = self.cache.clips[name]
        usable = np.flatnonzero(clip.usable)
        far = usable[np.abs(usable - frame) >= self.min_reference_gap]
        if self.references == "random":
            return far
        if name not in self._shapes:
            self._shapes[name] = face_shapes(clip.tensor("landmarks"))
        return pose_matched_candidates(*self._shapes[name], frame, far)

    def __len__(self) -> int:
        return 2**62  # steps never run out

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | str]:
        return self.read(self.draw(*divmod(index, self.slots)))

    def read(self, sample: Sample) -> dict[str, torch.Tensor | str]:
        """masked_latents, reference_latents, target_latents float16 (T, 4, 32, 32) · audio_window float16 (T, W, D)
        · target_image uint8 (T, 256, 256, 3) BGR · mouth_box float32 (T, 4), of the target in its pixels
        · mel float16 (mel_frames, 80) where there are any · where: a name for messages."""
        clip = self.cache.clips[sample.clip]
        start, stop, variant = sample.start, sample.start + self.frames, sample.variant
        references = zip(sample.references, sample.reference_variants, strict=True)
        places = zip(clip.tensor("landmarks", start, stop), clip.tensor("boxes", start, stop)[:, variant], strict=True)
        arrays = {
            "masked_latents": clip.tensor("masked_latents", start, stop)[:, variant],
            "reference_latents": np.stack([clip.tensor("latents", frame, frame + 1)[0, v] for frame, v in references]),
            "target_latents": clip.tensor("latents", start, stop)[:, variant],
            "audio_window": read_windows(clip, start, stop, self.contract),
            "target_image": np.stack([clip.image(frame, variant) for frame in range(start, stop)]),
            "mouth_box": np.stack([mouth_box(landmarks, box) for landmarks, box in places]),
        }
        if self.mel_frames:
            first = mel_start(start + self.sync_offset)
            arrays["mel"] = clip.tensor("mel", first, first + self.mel_frames)
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        return tensors | {"where": f"{sample.clip}, frame {start}"}


def face_shapes(landmarks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Jaw and mouth of each frame as x + iy in skull sizes: complex64 (T, 17) and (T, 8).

    The jaw is seen from the middle between the eyes: it moves with the pose of the head, and only a little with
    speech. The mouth, its inner lips, is seen from their own middle with the head upright: it moves with speech, and
    only a little with the pose. landmarks: (T, 68, 2), zero where there is no face.
    """
    points = landmarks[..., 0] + 1j * landmarks[..., 1]
    left, right = points[:, EYE_CORNERS[:1]], points[:, EYE_CORNERS[1:]]
    size = np.array([skull_size(frame) for frame in landmarks])[:, None]
    upright = np.conj(right - left) / np.maximum(np.abs(right - left), 1e-6)
    lips = points[:, INNER_LIPS]
    jaw = (points[:, JAW] - (left + right) / 2) / size
    mouth = (lips - lips.mean(axis=1, keepdims=True)) * upright / size
    return jaw.astype(np.complex64), mouth.astype(np.complex64)


def pose_matched_candidates(jaw: np.ndarray, mouth: np.ndarray, frame: int, candidates: np.ndarray) -> np.ndarray:
    """Those of some frames of a clip that show the pose of a frame, but another mouth; at least one.

    Nearer than most by the jaw and farther than most by the mouth (MuseTalk v1.5's choice; its distances are between
    landmarks in the face's box). Both shares are rounded up to more than half, so that they always have one in common.
    jaw, mouth: as `face_shapes` gives them. candidates: int (N,), N at least 1.
    """
    count = math.ceil(QUANTILE * len(candidates))
    turned = np.linalg.norm(jaw[candidates] - jaw[frame], axis=1)
    spoken = np.linalg.norm(mouth[candidates] - mouth[frame], axis=1)
    near, far = np.argsort(turned, kind="stable")[:count], np.argsort(-spoken, kind="stable")[:count]
    return candidates[np.intersect1d(near, far)]


def read_windows(clip: Clip, start: int, stop: int, contract: FeatureContract) -> np.ndarray:
    """Audio windows float16 (stop - start, W, D) of frames of a clip, reading no more features than they hold."""
    count = clip.rows("audio_features")
    first = int(np.clip(window_start(start), 0, count - 1))
    last = int(np.clip(window_start(stop - 1) + WINDOW_STEPS, first + 1, count))
    features = clip.tensor("audio_features", first, last)
    return audio_windows(features, range(start, stop), contract, first, count)


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
