"""Frames -> faces: the interface that every detector of faces and landmarks has, and the one that follows a person.

A backend is stateless: a frame gives the same faces whatever came before it, so batches and processes may cut
a video anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from musetalk.contract import VIDEO_FPS
from musetalk.script import UserError

# Backends, and whose landmarks each gives, by the name that a feature contract has for them.
FACE_BACKENDS = {"mediapipe": "mediapipe", "dwpose": "dwpose", "mmpose": "dwpose"}
SAME_PERSON_IOU = 0.3  # overlap of a person's boxes from one frame to the next
MAX_GAP = 2 * VIDEO_FPS  # frames that a person may be unseen before a face there counts as somebody else


@dataclass(frozen=True)
class Face:
    """One face in one frame.

    box: (4,) x1, y1, x2, y2 in source pixels. score: in [0, 1].
    landmarks: (68, 2) x, y in source pixels, in the order of dlib and of MuseTalk: jaw 0-16, brows 17-26, nose 27-35
    (29 low on the bridge), eyes 36-47, outer lips 48-59, inner lips 60-67.
    Both are float32 from mediapipe and float64 from DWPose, whose fractions MuseTalk cuts off: rounded to float32 one
    may be a whole pixel more.
    """

    box: np.ndarray
    landmarks: np.ndarray
    score: float


class FaceBackend(Protocol):
    """A detector of faces with landmarks."""

    def detect(self, frames: Sequence[np.ndarray]) -> list[list[Face]]:
        """Faces of each frame, in any order. frames: BGR uint8 (H, W, 3), of any size."""


def check_face_backend(name: str) -> None:
    """Raises UserError for a name that is not in FACE_BACKENDS."""
    if name not in FACE_BACKENDS:
        raise UserError(f"face_backend must be one of {', '.join(map(repr, FACE_BACKENDS))}, not {name!r}")


def load_face_backend(name: str, models_dir: Path, device: torch.device | str) -> FaceBackend:
    """The backend of a name in FACE_BACKENDS; mediapipe has its weights in itself and runs on the CPU.

    Raises UserError for a name there is none of, WeightsError where a file of models_dir is missing or unfit.
    """
    check_face_backend(name)
    if name == "mediapipe":
        from musetalk.face.mediapipe import MediapipeFaceMesh  # heavy: imported by those who use it

        return MediapipeFaceMesh()
    if name == "dwpose":
        from musetalk.face.dwpose import load_dwpose  # weights.py imports diffusers

        return load_dwpose(models_dir, torch.device(device))
    from musetalk.face.mmpose import load_mmpose  # not among the requirements

    return load_mmpose(models_dir, torch.device(device))


def follow_person(faces: Sequence[Sequence[Face]]) -> list[Face | None]:
    """The face of one person in each of T frames, None where it is not seen.

    Faces that overlap from frame to frame make a track; the person is the track with the largest sum of box
    areas, so somebody passing behind, or seen only before a cut, is left out.
    """
    tracks: list[dict[int, Face]] = []
    for index, candidates in enumerate(faces):
        alive = [track for track in tracks if index - next(reversed(track)) <= MAX_GAP]
        pairs = [
            (overlap(track[next(reversed(track))].box, face.box), t, f)
            for t, track in enumerate(alive)
            for f, face in enumerate(candidates)
        ]
        free_tracks, free_faces = set(range(len(alive))), set(range(len(candidates)))
        for iou, t, f in sorted(pairs, reverse=True):  # the best pair first
            if iou >= SAME_PERSON_IOU and t in free_tracks and f in free_faces:
                alive[t][index] = candidates[f]
                free_tracks.remove(t)
                free_faces.remove(f)
        tracks += [{index: candidates[f]} for f in sorted(free_faces)]
    person = max(tracks, key=lambda track: sum(area(face.box) for face in track.values()), default={})
    return [person.get(index) for index in range(len(faces))]


def area(box: np.ndarray) -> float:
    """Pixels in a box (4,), 0 where it is empty."""
    return float(max(0, box[2] - box[0]) * max(0, box[3] - box[1]))


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boxes (4,), in [0, 1]."""
    common = area(np.concatenate([np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])]))
    union = area(a) + area(b) - common
    return common / union if union > 0 else 0.0
