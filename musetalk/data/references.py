"""Chooses reference frames by head pose and mouth shape."""

from __future__ import annotations

import math

import numpy as np

from musetalk.data.crop import EYE_CORNERS, INNER_LIPS, JAW, skull_size

JAW_POINTS = JAW.stop - JAW.start  # the first ones of `face_shapes`; the others are the inner lips
QUANTILE = 0.51  # of frames, which are near in pose, and which are far in mouth shape; over 0.5 so that the two overlap


def face_shapes(landmarks: np.ndarray) -> np.ndarray:
    """Returns jaw and mouth shape of each frame, x and y in skull sizes: float32 (T, 17 + 8, 2).

    The jaw is relative to the midpoint of the eyes, so it changes with head pose and only a little with speech. The
    inner lips are relative to their own centre and rotated upright, so they change with speech and only a little with
    pose. landmarks: (T, 68, 2), zero where there is no face.
    """
    points = landmarks[..., 0] + 1j * landmarks[..., 1]
    left, right = points[:, EYE_CORNERS[:1]], points[:, EYE_CORNERS[1:]]
    size = skull_size(landmarks)[:, None]
    upright = np.conj(right - left) / np.maximum(np.abs(right - left), 1e-6)
    lips = points[:, INNER_LIPS]
    jaw = (points[:, JAW] - (left + right) / 2) / size
    mouth = (lips - lips.mean(axis=1, keepdims=True)) * upright / size
    shapes = np.concatenate([jaw, mouth], axis=1)
    return np.stack([shapes.real, shapes.imag], axis=-1).astype(np.float32)


def pose_matched_candidates(shapes: np.ndarray, frame: int, candidates: np.ndarray) -> np.ndarray:
    """Returns those candidates whose pose is near that of a frame and whose mouth shape differs; at least one.

    The intersection of the nearer half by jaw and the farther half by mouth, as in MuseTalk v1.5 (which measures
    landmarks within the face box). Both halves are rounded up to more than half, so the intersection is not empty.
    shapes: see `face_shapes`. candidates: int (N,), N >= 1.
    """
    count = math.ceil(QUANTILE * len(candidates))
    differences = (shapes[candidates] - shapes[frame]).view(np.complex64)[..., 0]  # (N, 25)
    jaw_distance = np.linalg.norm(differences[:, :JAW_POINTS], axis=1)
    mouth_distance = np.linalg.norm(differences[:, JAW_POINTS:], axis=1)
    near, far = np.argsort(jaw_distance, kind="stable")[:count], np.argsort(-mouth_distance, kind="stable")[:count]
    return candidates[np.intersect1d(near, far)]
