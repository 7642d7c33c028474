"""Checks whether a sync expert can be trusted on the crops of a cache: its accuracy and its estimated audio offset.

An offset of k frames pairs the faces from `frame` on with mel from int(80 (frame + k) / 25) on: for k > 0 the audio is
later than the faces. On videos in sync, a suitable expert has its highest similarity at offset 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import cv2
import numpy as np
import torch
from matplotlib.figure import Figure

from musetalk.data.audio import mel_start
from musetalk.data.cache import Cache, CacheError
from musetalk.data.sync_dataset import read_images, read_mel, sync_window_starts
from musetalk.errors import UserError
from musetalk.evaluation.pictures import rendered
from musetalk.files import atomic_write_bytes
from musetalk.images import batched, to_tensor
from musetalk.models.syncnet import SyncNet

MAX_OFFSET = 15  # frames
OFFSETS = np.arange(-MAX_OFFSET, MAX_OFFSET + 1)  # (31,)
THRESHOLD = 0.5  # cosine above which a pair is classified as in sync
CLEAR_OFFSET = 6  # frames; audio at least this far off is out of sync
MIN_ACCURACY, MAX_BIAS = 0.8, 1  # largest offset in frames; limits of an expert that can be trusted
WINDOWS = 256  # most windows of a check, spread evenly over the clips
BATCH = 16  # windows embedded at once
BAR = 40  # length in characters of the bar of a similarity of 1


class SyncError(UserError):
    """A sync expert cannot be trusted on these faces."""


@dataclass(frozen=True)
class SyncCheck:
    """The result of checking a sync expert; its string is a table."""

    accuracy: float  # share of pairs classified correctly; half of them are in sync, at the best offset
    similarities: np.ndarray  # (31,), mean cosine at each of `OFFSETS`, NaN if no clip is long enough
    windows: int  # number of windows

    @property
    def offset(self) -> int:
        return sync_offset(self.similarities)

    @property
    def confidence(self) -> float:
        return sync_confidence(self.similarities)

    def __str__(self) -> str:
        rows = ["mean cosine of faces and audio, by audio offset in frames:"]
        for offset, cosine in zip(OFFSETS, self.similarities, strict=True):
            rows.append(f"{offset:+4d}  {cosine:6.3f}  {'#' * round(BAR * max(0, np.nan_to_num(cosine)))}".rstrip())
        return "\n".join([*rows, self.summary()])

    def summary(self) -> str:
        offset = f"audio offset {self.offset:+d} frames, confidence {self.confidence:.3f}"
        return f"accuracy {self.accuracy:.3f}, {offset}, {self.windows} windows"

    def draw(self) -> np.ndarray:
        """The similarities as a curve, BGR uint8 (H, W, 3)."""
        figure = Figure(figsize=(8, 4), dpi=100, layout="constrained")
        axes = figure.subplots()
        axes.plot(OFFSETS, self.similarities, marker="o")
        axes.axvline(self.offset, color="tab:red", linestyle=":")
        axes.set(title=self.summary(), xlabel="audio offset in frames", ylabel="mean cosine", ylim=(0, 1))
        return rendered(figure)

    def save(self, path: Path) -> None:
        """Writes the curve of `draw` as a PNG."""
        atomic_write_bytes(path, cv2.imencode(".png", self.draw())[1].tobytes())

    def fault(self) -> str:
        """A sentence that says why the expert cannot be trusted; "" if it can."""
        if abs(self.offset) <= MAX_BIAS and self.accuracy >= MIN_ACCURACY:
            return ""
        return (
            f"the sync expert cannot be trusted on these faces (accuracy {self.accuracy:.2f}, at least "
            f"{MIN_ACCURACY} needed; audio offset {self.offset:+d} frames, at most {MAX_BIAS} allowed): train one with "
            "syncnet_trainer.py, check that the videos are in sync, or set unfit_expert in musetalk_trainer.py"
        )

    def require(self, allow: bool) -> int:
        """The offset in frames to apply to the audio for this expert: its own, or 0 if that exceeds `MAX_BIAS`.

        Raises SyncError if the expert has a fault, unless `allow`.
        """
        if self.fault() and not allow:
            raise SyncError(self.fault())
        return self.offset if abs(self.offset) <= MAX_BIAS else 0


def sync_offset(similarities: np.ndarray) -> int:
    """The offset in frames of the largest of similarities (31,)."""
    return int(OFFSETS[np.nanargmax(similarities)])


def sync_confidence(similarities: np.ndarray) -> float:
    """The largest of similarities (31,) minus their median."""
    return float(np.nanmax(similarities) - np.nanmedian(similarities))


@torch.no_grad()
def check_expert(expert: SyncNet, cache: Cache, clips: Sequence[str], seed: int) -> SyncCheck:
    """Checks an expert on clips of a cache, in eval mode, with its own dtype and device.

    Raises CacheError if no clip is long enough, SyncError if the outputs of the expert are not finite.
    """
    windows = [(name, int(start)) for name in clips for start in sync_window_starts(cache.clips[name], expert.frames)]
    if not windows:
        raise CacheError(f"{cache.folder}: no clip has {expert.frames} usable frames in a row; prepare longer videos")
    windows = [windows[k] for k in np.linspace(0, len(windows) - 1, min(WINDOWS, len(windows))).astype(int)]
    face_embeddings, audio_embeddings, clip_similarities = [], [], []
    with evaluating(expert):
        for name, group in groupby(windows, key=lambda window: window[0]):
            clip, starts = cache.clips[name], np.array([start for _, start in group])
            faces = _embed_faces(expert, (read_images(clip, start, expert.frames) for start in starts))
            face_embeddings.append(faces)
            audio_embeddings.append(_embed_mel(expert, (read_mel(clip, start, expert.frames) for start in starts)))
            clip_similarities.append(_similarities(expert, faces, clip.audio_frame(starts), clip.tensor("mel")))
    similarities = np.concatenate(clip_similarities)  # (N, 31)
    cosines = (torch.cat(face_embeddings) @ torch.cat(audio_embeddings).T).cpu().numpy()  # (N, N), faces x mel
    if not np.isfinite(cosines).all():
        raise SyncError("the outputs of the sync expert are not finite; use other weights")
    clip_names = np.array([name for name, _ in windows])
    return SyncCheck(_accuracy(similarities, cosines, clip_names, seed), _mean(similarities), len(windows))


@torch.no_grad()
def offset_sweep(expert: SyncNet, images: np.ndarray, mel: np.ndarray, first: int = 0) -> np.ndarray:
    """Mean cosine (31,) of all windows of consecutive faces with audio at each of `OFFSETS`, NaN beyond the audio.

    images: BGR uint8 (T, H, W, 3), T at least `expert.frames`. mel: (M, 80) of `audio.sync_mel`. first: the frame of
    the first image in that audio.
    """
    count = len(images) - expert.frames + 1
    assert count >= 1, images.shape
    with evaluating(expert):
        faces = _embed_faces(expert, (images[start : start + expert.frames] for start in range(count)))
        return _mean(_similarities(expert, faces, first + np.arange(count), mel))


@contextmanager
def evaluating(network: torch.nn.Module) -> Iterator[None]:
    """Sets a network to eval mode within the context, so that batch norms use their running statistics unchanged."""
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)


def _embed_faces(expert: SyncNet, windows: Iterator[np.ndarray]) -> torch.Tensor:
    """N windows of faces, BGR uint8 (frames, H, W, 3) -> (N, D)."""
    device, embeddings = next(expert.parameters()).device, []
    for batch in batched(windows, BATCH):
        images = to_tensor(torch.from_numpy(np.concatenate(batch)).to(device))  # (B frames, 3, H, W)
        embeddings.append(expert.embed_faces(images.unflatten(0, (len(batch), -1))))
    return torch.cat(embeddings)


def _embed_mel(expert: SyncNet, windows: Iterator[np.ndarray]) -> torch.Tensor:
    """N windows of mel, (mel_frames, 80) -> (N, D)."""
    device = next(expert.parameters()).device
    batches = (torch.from_numpy(np.stack(batch)).to(device).float() for batch in batched(windows, BATCH))
    return torch.cat([expert.embed_mel(batch) for batch in batches])


def _similarities(expert: SyncNet, faces: torch.Tensor, starts: np.ndarray, mel: np.ndarray) -> np.ndarray:
    """Cosines (N, 31) of face embeddings (N, D) of windows at `starts` (N,) with mel at each of `OFFSETS`, else NaN."""
    begins = mel_start(starts[:, None] + OFFSETS)  # (N, 31)
    inside = (begins >= 0) & (begins + expert.mel_frames <= len(mel))
    unique, inverse = np.unique(begins[inside], return_inverse=True)
    audio_embeddings = _embed_mel(expert, (mel[begin : begin + expert.mel_frames] for begin in unique))
    similarities = np.full(begins.shape, np.nan)
    similarities[inside] = (faces[np.nonzero(inside)[0]] * audio_embeddings[inverse]).sum(dim=1).cpu().numpy()
    return similarities


def _mean(similarities: np.ndarray) -> np.ndarray:
    """Mean over windows ignoring NaN, (N, 31) -> (31,); NaN where all are."""
    return np.ma.masked_invalid(similarities).mean(axis=0).filled(np.nan)


def _accuracy(similarities: np.ndarray, cosines: np.ndarray, clip_names: np.ndarray, seed: int) -> float:
    """Share of pairs on the correct side of `THRESHOLD`, half of them in sync; 0 if there are none.

    similarities: (N, 31), at each offset. cosines: (N, N), of the faces with the mel of each window. clip_names: (N,).
    Positive pairs have the best offset. Negative pairs alternate between the same clip, at least `CLEAR_OFFSET` frames
    off, and another clip.
    """
    rng, offset, correct = np.random.default_rng(seed), sync_offset(_mean(similarities)), []
    for row, positive in enumerate(similarities[:, offset + MAX_OFFSET]):
        shifted = similarities[row, (np.abs(OFFSETS - offset) >= CLEAR_OFFSET) & ~np.isnan(similarities[row])]
        other_clips = cosines[row, clip_names != clip_names[row]]
        negatives = other_clips if len(other_clips) and (row % 2 or not len(shifted)) else shifted
        if len(negatives) and not np.isnan(positive):
            correct += [positive > THRESHOLD, rng.choice(negatives) <= THRESHOLD]
    return float(np.mean(correct or [0]))
