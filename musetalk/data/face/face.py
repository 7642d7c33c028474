"""A detected face, and the interface of face backends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Face:
    """A face in a frame.

    box: (4,) x1, y1, x2, y2 in source pixels. score: in [0, 1].
    landmarks: (68, 2) x, y in source pixels, in the order of dlib and of MuseTalk: jaw 0-16, brows 17-26, nose 27-35
    (29 low on the bridge), eyes 36-47, outer lips 48-59, inner lips 60-67.
    Both are float32 from mediapipe and float64 from DWPose: MuseTalk truncates DWPose's points, and rounding them to
    float32 first could change a point by a whole pixel.
    """

    box: np.ndarray
    landmarks: np.ndarray
    score: float


class FaceBackend(Protocol):
    """A detector of faces with landmarks."""

    def detect(self, frames: Sequence[np.ndarray]) -> list[list[Face]]:
        """Faces of each frame, in any order. frames: BGR uint8 (H, W, 3), of any size."""


def area(box: np.ndarray) -> float:
    """Area of a box (4,) in pixels, 0 if it is empty."""
    return float(max(0, box[2] - box[0]) * max(0, box[3] - box[1]))


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boxes (4,), in [0, 1]."""
    intersection = area(np.concatenate([np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])]))
    union = area(a) + area(b) - intersection
    return intersection / union if union > 0 else 0.0
