"""Figures about a generated video."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from musetalk.contract import VIDEO_FPS
from musetalk.crop import EYE_CORNERS
from musetalk.face import Face, FaceBackend, follow_person
from musetalk.video import batched

LIP_PAIRS = ((61, 67), (62, 66), (63, 65))  # upper and lower points of the inner lips, of the 68


def mouth_opening(face: Face | None) -> float:
    """Distance between the inner lips over the distance between the outer corners of the eyes; nan for no face."""
    if face is None:
        return float("nan")
    gaps = [np.linalg.norm(face.landmarks[low] - face.landmarks[up]) for up, low in LIP_PAIRS]
    left, right = face.landmarks[list(EYE_CORNERS)]
    return float(np.mean(gaps) / max(np.linalg.norm(right - left), 1e-6))


def mouth_openings(frames: Iterable[np.ndarray], backend: FaceBackend) -> np.ndarray:
    """`mouth_opening` of one person in each of T frames, measured by a landmark detector: float (T,)."""
    faces = [found for batch in batched(frames, VIDEO_FPS) for found in backend.detect(batch)]
    return np.array([mouth_opening(face) for face in follow_person(faces)])


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's r of two series over their common length, where both are known."""
    length = min(len(a), len(b))
    both = np.isfinite(a[:length]) & np.isfinite(b[:length])
    return float(np.corrcoef(a[:length][both], b[:length][both])[0, 1])
