"""Figures about generated faces: of pictures against the truth, of the mouths that a landmark detector sees in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import cv2
import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from musetalk.contract import IMAGE_SIZE, VIDEO_FPS
from musetalk.data.crop import EYE_CORNERS, LIPS
from musetalk.data.face.face import Face, FaceBackend, area
from musetalk.data.face.tracking import follow_person
from musetalk.images import batched

LIP_PAIRS = ((61, 67), (62, 66), (63, 65))  # upper and lower points of the inner lips, of the 68
CROP_BORDER = IMAGE_SIZE // 4  # pixels of black around a crop, in which a detector finds faces that fill it


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


def detect_in_crops(images: Sequence[np.ndarray], backend: FaceBackend) -> list[Face | None]:
    """The largest face in each of T face crops, BGR uint8 (256, 256, 3), in pixels of the crop; None where none is.

    Of real crops the mediapipe backend finds 99.4 % under the contract "rigid" and 99.9 % under "musetalk_v15"; without
    the border, 93 % and 66 %. Their lips are 0.7 % of the distance between the eyes away from those in the whole frame.
    """
    faces = []
    for batch in batched(images, VIDEO_FPS):
        framed = [cv2.copyMakeBorder(image, *[CROP_BORDER] * 4, cv2.BORDER_CONSTANT) for image in batch]
        for found in backend.detect(framed):
            face = max(found, key=lambda face: area(face.box), default=None)
            if face is not None:
                face = Face(face.box - CROP_BORDER, face.landmarks - CROP_BORDER, face.score)
            faces.append(face)
    return faces


def mouth_landmark_distance(faces: Sequence[Face | None], truth: Sequence[Face | None]) -> float:
    """How far the 20 lip points of T faces are from the true ones, in distances of the true outer eye corners.

    Both in pixels of the same crops or frames. The mean over the frames in which both have a face, nan where none has.
    """
    distances = []
    for face, true in zip(faces, truth, strict=True):
        if face is not None and true is not None:
            left, right = true.landmarks[list(EYE_CORNERS)]
            away = np.linalg.norm(face.landmarks[LIPS] - true.landmarks[LIPS], axis=1).mean()
            distances.append(away / max(np.linalg.norm(right - left), 1e-6))
    return float(np.mean(distances)) if distances else float("nan")


def mouth_jitter(faces: Sequence[Face | None]) -> float:
    """How unsteadily the 20 lip points of T faces move: their mean second difference, in distances of the eye corners.

    Of the lips as the eyes see them, whatever the head does. In pixels of crops or frames. Frames without a face and
    their neighbours do not count; nan where no three faces follow each other.
    """
    second = []
    for before, face, after in zip(faces, faces[1:], faces[2:], strict=False):
        if before is not None and face is not None and after is not None:
            lips = [_lips(one) for one in (before, face, after)]
            second.append(np.abs(lips[0] - 2 * lips[1] + lips[2]).mean())
    return float(np.mean(second)) if second else float("nan")


def _lips(face: Face) -> np.ndarray:
    """Lip points complex (20,) of a face, with the outer corners of its eyes at -1/2 and 1/2."""
    points = face.landmarks[:, 0] + 1j * face.landmarks[:, 1]
    left, right = points[list(EYE_CORNERS)]
    return (points[LIPS] - (left + right) / 2) / ((right - left) or 1e-6)


def psnr(image: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal-to-noise ratio of an image BGR uint8 (H, W, 3) in dB, inf where it equals the truth."""
    with np.errstate(divide="ignore"):
        return float(peak_signal_noise_ratio(truth, image))


def ssim(image: np.ndarray, truth: np.ndarray) -> float:
    """Structural similarity of an image BGR uint8 (H, W, 3), mean of its channels, 1 where it equals the truth.

    Source of the window's Gaussian, sigma 1.5 pixels: Wang et al. 2004, https://doi.org/10.1109/TIP.2003.819861
    """
    gaussian = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return float(structural_similarity(truth, image, channel_axis=-1, **gaussian))


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's r of two series over their common length, where both are known; nan where one of them stands still."""
    length = min(len(a), len(b))
    both = np.isfinite(a[:length]) & np.isfinite(b[:length])
    if not both.any():
        return float("nan")
    one, other = (values[:length][both] - values[:length][both].mean() for values in (a, b))
    size = np.linalg.norm(one) * np.linalg.norm(other)
    return float(one @ other / size) if size > 0 else float("nan")


def known_mean(values: np.ndarray) -> float:
    """The mean of those that are known; nan where none is."""
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else float("nan")
