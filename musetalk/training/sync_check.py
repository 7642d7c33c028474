"""Can a sync expert be trusted on these crops? Its accuracy, and the audio that it hears the faces best with.

An offset of k frames, k > 0, means audio that is k frames later than the faces: mel from int(80 (frame + k) / 25) on.
An expert that knows such crops, of videos that are in sync, hears them best at offset 0 and tells it from others.
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
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from musetalk.data.audio import mel_start
from musetalk.data.cache import Cache, CacheError
from musetalk.data.sync_dataset import read_images, read_mel, window_starts
from musetalk.errors import UserError
from musetalk.files import atomic_write_bytes
from musetalk.images import batched, to_tensor
from musetalk.models.syncnet import SyncNet

MAX_OFFSET = 15  # frames
OFFSETS = np.arange(-MAX_OFFSET, MAX_OFFSET + 1)  # (31,)
THRESHOLD = 0.5  # a cosine above it says "in sync"
CLEAR_OFFSET = 6  # frames; audio that is as far off is out of sync for sure
MIN_ACCURACY, MAX_BIAS = 0.8, 1  # of an expert that can be trusted; frames that it may be off
WINDOWS = 256  # looked at, spread evenly over all there are
BATCH = 16  # windows embedded at once
BAR = 40  # characters of a similarity of 1


class SyncError(UserError):
    """A sync expert cannot tell whether these faces speak this audio."""


@dataclass(frozen=True)
class SyncCheck:
    """What an expert makes of faces and their audio; as a string a table."""

    accuracy: float  # share of pairs told rightly; in sync are half of them, with audio at the best offset
    similarities: np.ndarray  # (31,), mean cosine at each of `OFFSETS`, NaN where no clip is long enough
    windows: int  # looked at

    @property
    def offset(self) -> int:
        return sync_offset(self.similarities)

    @property
    def confidence(self) -> float:
        return sync_confidence(self.similarities)

    def __str__(self) -> str:
        rows = ["mean cosine of faces with audio that is some frames later:"]
        for offset, cosine in zip(OFFSETS, self.similarities, strict=True):
            rows.append(f"{offset:+4d}  {cosine:6.3f}  {'#' * round(BAR * max(0, np.nan_to_num(cosine)))}".rstrip())
        return "\n".join([*rows, self.summary()])

    def summary(self) -> str:
        best = f"best with audio {self.offset:+d} frames later, confidence {self.confidence:.3f}"
        return f"accuracy {self.accuracy:.3f}, {best}, of {self.windows} windows"

    def draw(self) -> np.ndarray:
        """The similarities as a curve, BGR uint8 (H, W, 3)."""
        figure = Figure(figsize=(8, 4), dpi=100, layout="constrained")
        canvas, axes = FigureCanvasAgg(figure), figure.subplots()
        axes.plot(OFFSETS, self.similarities, marker="o")
        axes.axvline(self.offset, color="tab:red", linestyle=":")
        axes.set(title=self.summary(), xlabel="frames that the audio is later", ylabel="mean cosine", ylim=(0, 1))
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., 2::-1].copy()

    def save(self, path: Path) -> None:
        """Write what `draw` gives as a PNG."""
        atomic_write_bytes(path, cv2.imencode(".png", self.draw())[1].tobytes())

    def fault(self) -> str:
        """Why the expert cannot be trusted, a sentence; "" where it can."""
        if abs(self.offset) <= MAX_BIAS and self.accuracy >= MIN_ACCURACY:
            return ""
        return (
            f"the sync expert cannot be trusted on these faces (accuracy {self.accuracy:.2f}, {MIN_ACCURACY} needed; "
            f"best with audio {self.offset:+d} frames later, {MAX_BIAS} allowed): train one with syncnet_trainer.py, "
            "see if the videos are in sync, or let musetalk_trainer.py take it with unfit_expert"
        )

    def require(self, allow: bool) -> int:
        """Frames that the audio of this expert is to be moved by: the offset, or 0 where it is more than a frame.

        Raises SyncError where the expert has a fault, unless that is allowed.
        """
        if self.fault() and not allow:
            raise SyncError(self.fault())
        return self.offset if abs(self.offset) <= MAX_BIAS else 0


def sync_offset(similarities: np.ndarray) -> int:
    """Of similarities (31,) the offset of the largest, in frames."""
    return int(OFFSETS[np.nanargmax(similarities)])


def sync_confidence(similarities: np.ndarray) -> float:
    """Of similarities (31,) how far the largest is above their median."""
    return float(np.nanmax(similarities) - np.nanmedian(similarities))


@torch.no_grad()
def check_expert(expert: SyncNet, cache: Cache, clips: Sequence[str], seed: int) -> SyncCheck:
    """Hold an expert against clips of a cache: in eval mode, in its own precision and on its own device.

    Raises CacheError where no clip is long enough, SyncError where the expert makes what is no number.
    """
    places = [(name, int(start)) for name in clips for start in window_starts(cache.clips[name], expert.frames)]
    if not places:
        raise CacheError(f"{cache.folder}: no clip has {expert.frames} usable frames in a row; prepare longer videos")
    places = [places[k] for k in np.linspace(0, len(places) - 1, min(WINDOWS, len(places))).astype(int)]
    faces, heard, similar = [], [], []
    with evaluating(expert):
        for name, group in groupby(places, key=lambda place: place[0]):
            clip, starts = cache.clips[name], np.array([start for _, start in group])
            faces.append(_embed_faces(expert, (read_images(clip, start, expert.frames) for start in starts)))
            heard.append(_embed_mel(expert, (read_mel(clip, start, expert.frames) for start in starts)))
            similar.append(_similarities(expert, faces[-1], starts, clip.tensor("mel")))
    similar = np.concatenate(similar)  # (N, 31)
    cosines = (torch.cat(faces) @ torch.cat(heard).T).cpu().numpy()  # (N, N), of each with the mel of each
    if not np.isfinite(cosines).all():
        raise SyncError("what the sync expert makes of these faces or their audio is no number; take other weights")
    owners = np.array([name for name, _ in places])
    return SyncCheck(_accuracy(similar, cosines, owners, seed), _mean(similar), len(places))


@torch.no_grad()
def offset_sweep(expert: SyncNet, images: np.ndarray, mel: np.ndarray, first: int = 0) -> np.ndarray:
    """Mean cosine of all windows of consecutive faces with audio at each of `OFFSETS`, (31,), NaN where there is none.

    images: BGR uint8 (T, H, W, 3), T at least `expert.frames`. mel: (M, 80), as `audio.sync_mel` makes it, of audio in
    which the frame of the first image is `first`.
    """
    count = len(images) - expert.frames + 1
    assert count >= 1, images.shape
    with evaluating(expert):
        faces = _embed_faces(expert, (images[start : start + expert.frames] for start in range(count)))
        return _mean(_similarities(expert, faces, first + np.arange(count), mel))


@contextmanager
def evaluating(network: torch.nn.Module) -> Iterator[None]:
    """Within it the network is in eval mode: its batch norms use what they have gathered, and gather nothing."""
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)


def _embed_faces(expert: SyncNet, windows: Iterator[np.ndarray]) -> torch.Tensor:
    """N windows of faces, BGR uint8 (frames, H, W, 3) -> (N, D)."""
    device, made = next(expert.parameters()).device, []
    for batch in batched(windows, BATCH):
        images = to_tensor(torch.from_numpy(np.concatenate(batch)).to(device))  # (B frames, 3, H, W)
        made.append(expert.embed_faces(images.unflatten(0, (len(batch), -1))))
    return torch.cat(made)


def _embed_mel(expert: SyncNet, windows: Iterator[np.ndarray]) -> torch.Tensor:
    """N windows of mel, (mel_frames, 80) -> (N, D)."""
    device = next(expert.parameters()).device
    batches = (torch.from_numpy(np.stack(batch)).to(device).float() for batch in batched(windows, BATCH))
    return torch.cat([expert.embed_mel(batch) for batch in batches])


def _similarities(expert: SyncNet, faces: torch.Tensor, starts: np.ndarray, mel: np.ndarray) -> np.ndarray:
    """Cosines of faces (N, D) from frames (N,) on with mel at each of `OFFSETS`: (N, 31), NaN beyond the mel."""
    begins = mel_start(starts[:, None] + OFFSETS)  # (N, 31)
    there = (begins >= 0) & (begins + expert.mel_frames <= len(mel))
    needed, which = np.unique(begins[there], return_inverse=True)
    heard = _embed_mel(expert, (mel[begin : begin + expert.mel_frames] for begin in needed))
    similar = np.full(begins.shape, np.nan)
    similar[there] = (faces[np.nonzero(there)[0]] * heard[which]).sum(dim=1).cpu().numpy()
    return similar


def _mean(similar: np.ndarray) -> np.ndarray:
    """(N, 31) -> (31,) over what is there, NaN where nothing is."""
    return np.ma.masked_invalid(similar).mean(axis=0).filled(np.nan)


def _accuracy(similar: np.ndarray, cosines: np.ndarray, owners: np.ndarray, seed: int) -> float:
    """Share of pairs on their side of `THRESHOLD`, as many in sync as not; 0 where there is none.

    similar: (N, 31). cosines: (N, N), of faces with the mel of other windows. owners: (N,), whose they are.
    In sync is mel at the best offset; out of sync are, by turns, mel of the clip far from there and of another clip.
    """
    rng, offset, right = np.random.default_rng(seed), sync_offset(_mean(similar)), []
    for row, own in enumerate(similar[:, offset + MAX_OFFSET]):
        shifted = similar[row, (np.abs(OFFSETS - offset) >= CLEAR_OFFSET) & ~np.isnan(similar[row])]
        foreign = cosines[row, owners != owners[row]]
        others = foreign if len(foreign) and (row % 2 or not len(shifted)) else shifted
        if len(others) and not np.isnan(own):
            right += [own > THRESHOLD, rng.choice(others) <= THRESHOLD]
    return float(np.mean(right or [0]))
