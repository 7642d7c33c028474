"""What an evaluation judges: weights, which dub the true videos, and videos that any program has made of them.

Both are judged as videos: what they show in the boxes of the true faces.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path, PurePath
from typing import Protocol

import numpy as np

from musetalk.contract import SAMPLES_PER_FRAME
from musetalk.data.audio import audio_features
from musetalk.data.cache import Clip
from musetalk.data.cache_format import video_key
from musetalk.data.crop import crop_face
from musetalk.data.video import read_audio, read_frames
from musetalk.errors import UserError
from musetalk.evaluation.windows import Window
from musetalk.inference.pipeline import LipSyncPipeline

OWN, OTHER, SILENCE = "own audio", "other audio", "silence"
ASPECT_TOLERANCE = 0.01  # relative difference of the scales of width and height


class Candidate(Protocol):
    """One side of an evaluation."""

    name: str

    def __call__(self, window: Window, other: Clip | None) -> dict[str, np.ndarray]:
        """The faces of a window by what they speak: `OWN` and `OTHER` audio, that of a clip, or `SILENCE`.

        Each: BGR uint8 (F, 256, 256, 3), the crops of the true boxes. Frame k speaks the audio of frame k, also of the
        other clip, if there is one. What the candidate does not have is left out.
        """
        ...


@dataclass
class DubbedVideos:
    """The true videos as weights dub them, with a reference frame from elsewhere in the clip throughout."""

    name: str
    pipeline: LipSyncPipeline
    videos: Path  # folder of the true videos

    def __call__(self, window: Window, other: Clip | None) -> dict[str, np.ndarray]:
        """See `Candidate`. Raises MediaError for a video that cannot be read."""
        path = self.videos / window.clip.metadata["source"]
        prepared = self.pipeline.prepare(path, max_frames=max(window.stop, window.closed + 1))
        if prepared.faces[window.closed] is None:
            raise UserError(f"{path}: {self.pipeline.face_backend} finds no face in frame {window.closed}")
        prepared = replace(prepared, latents=np.broadcast_to(prepared.latents[window.closed], prepared.latents.shape))
        count = window.stop
        speech = {OWN: corrected_audio(self.videos, window.clip), SILENCE: np.zeros(0, np.float32)}
        if other:
            speech[OTHER] = corrected_audio(self.videos, other)
        faces = {}
        for kind, samples in speech.items():
            length = count * SAMPLES_PER_FRAME
            samples = np.pad(samples[:length], (0, max(0, length - len(samples))))
            features = audio_features(samples, self.pipeline.audio_encoder, self.pipeline.contract)
            with closing(self.pipeline.frames(prepared, features, count)) as frames:
                faces[kind] = crop_window(islice(frames, window.start, None), window)
        return faces


@dataclass
class FinishedVideos:
    """A folder of videos that have the names of the true ones, whatever the suffix.

    `<face>` speaks its own audio, `<face>_<audio>` that of the true video with the second name.
    """

    name: str
    folder: Path
    videos: Path  # folder of the true videos

    def __call__(self, window: Window, other: Clip | None) -> dict[str, np.ndarray]:
        """See `Candidate`. Raises UserError for a video that is not a version of the true one."""
        face = key(window.clip)
        paths = {OWN: self.files.get(face)}
        if other:
            paths[OTHER] = self.files.get(f"{face}_{PurePath(key(other)).name}")
        return {kind: self._read(path, window) for kind, path in paths.items() if path}

    def require(self, clips: Sequence[Clip]) -> None:
        """Raises UserError if there is no video of any of these clips."""
        faces = [key(clip) for clip in clips]
        if not any(file == face or file.startswith(f"{face}_") for file in self.files for face in faces):
            raise UserError(f"{self.folder} has no video named like a true one, such as {faces[0]}.mp4")

    @cached_property
    def files(self) -> dict[str, Path]:
        """The files by their paths without the suffix."""
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {video_key(path.relative_to(self.folder)): path for path in paths}

    def _read(self, path: Path, window: Window) -> np.ndarray:
        """The crops of a window in a video, which may be larger or smaller than the true one."""
        frames = list(read_frames(path, window.start, window.stop))
        if len(frames) < window.stop - window.start:
            raise UserError(
                f"{path} has fewer than {window.stop} frames at 25 per second, which the true video has; it must begin "
                "and end with it"
            )
        true_frame = next(read_frames(self.videos / window.clip.metadata["source"]))
        down, across = np.divide(frames[0].shape[:2], true_frame.shape[:2])
        if abs(down / across - 1) > ASPECT_TOLERANCE:
            raise UserError(f"{path} has other proportions than the true video; it must show the whole frame")
        return crop_window(frames, window, across)


def crop_window(frames: Iterable[np.ndarray], window: Window, scale: float = 1.0) -> np.ndarray:
    """Crops the true boxes from the frames of a window, whose sides are `scale` times the true ones."""
    boxes = np.round(window.clip.tensor("boxes", window.start, window.stop)[:, 0] * scale).astype(int)
    return np.stack([crop_face(frame, box) for frame, box in zip(frames, boxes, strict=True)])


def corrected_audio(videos: Path, clip: Clip) -> np.ndarray:
    """The audio of a clip's video, float32 (N,) at 16 kHz, beginning with that of its first frame."""
    samples, late = read_audio(videos / clip.metadata["source"]), SAMPLES_PER_FRAME * clip.audio_offset
    return np.pad(samples[max(0, late) :], (max(0, -late), 0))


def key(clip: Clip) -> str:
    """The path of a clip's video without its suffix."""
    return video_key(PurePath(clip.metadata["source"]))
