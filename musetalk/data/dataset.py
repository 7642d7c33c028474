"""Cache -> training samples. Each is a pure function of (seed, step, slot), so a resumed run draws the same samples.

A sample is a window of T consecutive frames of one clip in one margin variant, and for each of them a reference
frame from the same clip in a randomly drawn variant.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch.utils.data import Dataset

from musetalk.contract import CACHE_FIELDS, FEATURES_PER_FRAME, WINDOW_STEPS, FeatureContract
from musetalk.data.audio import audio_windows, mel_start, window_start
from musetalk.data.cache import Cache, CacheError, Clip
from musetalk.data.crop import CLOSED, EYE_CORNERS, lip_gaps, mouth_box
from musetalk.data.references import face_shapes, pose_matched_candidates
from musetalk.data.sampling import WindowSampler, window_starts
from musetalk.errors import UserError

References = Literal["random", "pose_and_mouth", "adjacent"]
SAMPLE_HELD_OUT = tuple(  # clips of the built-in sample that the presets `demo` hold out
    f"s1_{sentence}" for sentence in ("pwad5a", "lwbl7s", "lrar2p", "bbbs4n", "lwie7a", "lrwz3s", "bgan7a")
)


@dataclass(frozen=True)
class Sample:
    """Frames [start, start + T) of a clip in one margin variant, and T reference frames with a variant each."""

    clip: str
    start: int
    references: tuple[int, ...]
    variant: int
    reference_variants: tuple[int, ...]
    silence: tuple[int, int] | None = None  # instead of the clip's audio: which silence, and the first frame in it


class FaceDataset(Dataset):
    """All samples of a run; item step * slots + slot is the sample of that slot of the global batch."""

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
        identity_cap_minutes: float = 0.0,
        silence_share: float = 0.0,
        silence: np.ndarray | None = None,
    ) -> None:
        """slots: samples per optimizer step, over gradient accumulation and ranks. frames: T.

        references: "random" draws any frame at least min_reference_gap away, since nearer ones show the same mouth,
        which the network could copy; "pose_and_mouth" restricts these to `pose_matched_candidates`; "adjacent" takes
        the nearest usable frame before or after, at any distance.
        mel_frames: length of the window's mel for a sync expert; 0: none. sync_offset: frames by which this mel lags
        the window, as measured with the expert. Only the mel is shifted: whether the offset stems from the expert
        (Wav2Lip's is one frame off) or from the data, shifting the UNet's audio too would not help and would disturb
        published weights.
        identity_cap_minutes: see `WindowSampler`.
        silence_share: share of samples with silence instead of the clip's audio, in all their frames. Their windows are
        drawn from those of the clip whose mouth is closed throughout; a sample of a clip without such a window keeps
        the clip's audio. The mel stays that of the clip. silence: of `audio.silence_features`.
        The contract's model fields shape the audio windows; its margins select the variants.
        Raises ContractError if the cache was made under another contract, CacheError if no clip has such a window.
        """
        assert references in get_args(References), references
        cache.contract.require(contract, CACHE_FIELDS, str(cache.folder))
        self.cache, self.contract, self.seed, self.slots, self.frames = cache, contract, seed, slots, frames
        self.references, self.min_reference_gap = references, 1 if references == "adjacent" else min_reference_gap
        self.mel_frames, self.sync_offset = mel_frames, sync_offset
        self.variants = [cache.contract.margins.index(margin) for margin in contract.margins]
        counts = {name: count for name in clips if (count := len(self.starts(name)))}
        if not counts:
            mel = f" with {mel_frames} mel frames at an offset of {sync_offset} frames" if mel_frames else ""
            raise CacheError(
                f"{cache.folder}: no clip has {frames} consecutive usable frames{mel} and a reference frame "
                f"{self.min_reference_gap} frames away; prepare longer videos"
            )
        self.sampler = WindowSampler(
            counts, {name: cache.clips[name].identity for name in counts}, identity_cap_minutes
        )
        self.silence_share, self.silence = silence_share, silence
        if silence is not None and not any(len(self.closed_starts(name)) for name in counts):
            raise CacheError(
                f"{cache.folder}: no clip has {frames} consecutive frames with a closed mouth; set silence_share to 0"
            )

    def starts(self, name: str) -> np.ndarray:
        """Returns the first frames of a clip's windows: of usable frames with a reference frame each, mel in range."""
        clip = self.cache.clips[name]
        usable = np.flatnonzero(clip.usable)
        if not len(usable):
            return usable
        far = np.maximum(usable - usable[0], usable[-1] - usable) >= self.min_reference_gap
        starts = window_starts(usable[far], self.frames)
        if not self.mel_frames:
            return starts
        mel = mel_start(clip.audio_frame(starts) + self.sync_offset)
        return starts[(mel >= 0) & (mel + self.mel_frames <= clip.rows("mel"))]

    def closed_starts(self, name: str) -> np.ndarray:
        """Returns the first frames of those windows of a clip whose mouth is closed in each frame."""
        closed = np.flatnonzero(lip_gaps(self.cache.clips[name].tensor("landmarks"), EYE_CORNERS) < CLOSED)
        return np.intersect1d(self.starts(name), window_starts(closed, self.frames))

    def draw(self, step: int, slot: int) -> Sample:
        """Draws the sample of a slot at a step: an identity, then one of its windows."""
        rng = np.random.default_rng([self.seed, step, slot])
        name, window = self.sampler.draw(rng)
        start, silence = int(self.starts(name)[window]), None
        if self.silence is not None and rng.random() < self.silence_share and len(closed := self.closed_starts(name)):
            kinds, features = self.silence.shape[:2]
            start = int(rng.choice(closed))
            silence = int(rng.integers(kinds)), int(rng.integers(features // FEATURES_PER_FRAME - self.frames + 1))
        candidates = self._candidates(self.cache.clips[name], range(start, start + self.frames))
        references = tuple(int(rng.choice(frames)) for frames in candidates)
        variant, *others = (int(variant) for variant in rng.choice(self.variants, 1 + self.frames))
        return Sample(name, start, references, variant, tuple(others), silence)

    def _candidates(self, clip: Clip, frames: range) -> Iterator[np.ndarray]:
        """Yields for each of some frames of a clip those that may serve as its reference."""
        usable = np.flatnonzero(clip.usable)
        shapes = read_face_shapes(clip) if self.references == "pose_and_mouth" else None
        for frame in frames:
            distances = np.abs(usable - frame)
            far = distances >= self.min_reference_gap
            if shapes is not None:
                yield pose_matched_candidates(shapes, frame, usable[far])
            elif self.references == "adjacent":
                yield usable[distances == distances[far].min()]
            else:
                yield usable[far]

    def listing(self) -> str:
        """Returns a value that differs if the clips do, see `Cache.listing`."""
        return self.cache.listing()

    def __len__(self) -> int:
        return 2**62  # unlimited steps

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.read(self.draw(*divmod(index, self.slots)))

    def read(self, sample: Sample) -> dict[str, Any]:
        """masked_latents, reference_latents, target_latents float16 (T, 4, 32, 32) · audio_window float16 (T, W, D)
        · target_image uint8 (T, 256, 256, 3) BGR · mouth_box float32 (T, 4) in pixels of the target
        · mel float16 (mel_frames, 80) if mel_frames > 0 · where: position for messages."""
        clip = self.cache.clips[sample.clip]
        start, stop, variant = sample.start, sample.start + self.frames, sample.variant
        references = zip(sample.references, sample.reference_variants, strict=True)
        regions = zip(clip.tensor("landmarks", start, stop), clip.tensor("boxes", start, stop)[:, variant], strict=True)
        arrays = {
            "masked_latents": clip.tensor("masked_latents", start, stop)[:, variant],
            "reference_latents": np.stack([clip.tensor("latents", frame, frame + 1)[0, v] for frame, v in references]),
            "target_latents": clip.tensor("latents", start, stop)[:, variant],
            "audio_window": self._audio_windows(sample),
            "target_image": np.stack([clip.image(frame, variant) for frame in range(start, stop)]),
            "mouth_box": np.stack([mouth_box(landmarks, box) for landmarks, box in regions]),
        }
        if self.mel_frames:
            first = mel_start(clip.audio_frame(start) + self.sync_offset)
            arrays["mel"] = clip.tensor("mel", first, first + self.mel_frames)
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        return tensors | {"where": f"{sample.clip}, frame {start}"}

    def _audio_windows(self, sample: Sample) -> np.ndarray:
        """Returns the audio windows of a sample, float16 (T, W, D)."""
        if sample.silence is None:
            return read_windows(self.cache.clips[sample.clip], sample.start, sample.start + self.frames, self.contract)
        assert self.silence is not None
        kind, first = sample.silence
        return audio_windows(self.silence[kind], range(first, first + self.frames), self.contract)


def read_face_shapes(clip: Clip) -> np.ndarray:
    """Reads the `face_shapes` of a clip, or computes them for a clip that was made before they were stored."""
    return clip.tensor("face_shapes") if clip.has("face_shapes") else face_shapes(clip.tensor("landmarks"))


def read_windows(clip: Clip, start: int, stop: int, contract: FeatureContract) -> np.ndarray:
    """Reads the audio windows of video frames [start, stop) of a clip, corrected by its audio offset.

    Returns float16 (stop - start, W, D). Positions beyond the clip's audio are padded as in `audio_windows`.
    """
    start, stop = clip.audio_frame(start), clip.audio_frame(stop)
    count = clip.rows("audio_features")
    first = int(np.clip(window_start(start), 0, count - 1))
    last = int(np.clip(window_start(stop - 1) + WINDOW_STEPS, first + 1, count))
    features = clip.tensor("audio_features", first, last)
    return audio_windows(features, range(start, stop), contract, first, count)


def split_clips(cache: Cache, share: float, names: Sequence[str] = ()) -> tuple[list[str], list[str], str]:
    """Splits clips by identity. Returns training clips, held-out clips, and a sentence for the log.

    share: identities are held out whose names have a hash below it, in [0, 1): every machine holds out the same ones,
    and more data moves none to the other set. At least one is held out and one is left to train on, by their hashes.
    names: identities to hold out instead of a share.
    If all clips show one identity, they are split by their own names; a single clip is not held out.
    Raises UserError if a name is unknown or nothing is left to train on.
    """
    groups = {name: clip.identity for name, clip in cache.clips.items()}
    kind, note = "identities", ""
    if len(set(groups.values())) == 1:
        groups = {name: name for name in groups}
        kind, note = "clips", " (all clips show one identity)"
    ordered = sorted(set(groups.values()), key=unit_hash)
    if names:
        held_out = set(names)
        if unknown := held_out.difference(ordered):
            raise UserError(
                f"held_out_identities names {min(unknown)!r}, which is none of the {len(ordered)} {kind} in "
                f"{cache.folder}, such as {min(ordered)!r}; correct it, or set it to () to hold out a share"
            )
        if len(held_out) == len(ordered):
            raise UserError(f"held_out_identities names all {kind} in {cache.folder}; leave some to train on")
    else:
        count = sum(unit_hash(group) < share for group in ordered)
        held_out = set(ordered[: min(max(count, 1), len(ordered) - 1)])
    if not held_out:
        return sorted(groups), [], "a single clip: nothing is held out, samples show training data"
    train = sorted(name for name, group in groups.items() if group not in held_out)
    held = sorted(name for name, group in groups.items() if group in held_out)
    return train, held, f"held out {len(held_out)} of {len(ordered)} {kind}{note}: {', '.join(held)}"


def unit_hash(name: str) -> float:
    """Hashes a name uniformly to [0, 1), by the first 6 bytes of its SHA-256."""
    return int.from_bytes(hashlib.sha256(name.encode(errors="surrogatepass")).digest()[:6]) / 2**48
