"""Metrics of generated faces: image similarity to the truth, sharpness, and mouth shapes by a landmark detector."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from musetalk.contract import IMAGE_SIZE, VIDEO_FPS
from musetalk.data.crop import CLOSED, EYE_CORNERS, LIPS, lip_gaps
from musetalk.data.face.face import Face, FaceBackend, area
from musetalk.data.face.tracking import follow_person
from musetalk.images import batched

LIP_CORNERS = (60, 64)  # of the inner lips
LEAK = 0.25  # mouth aspect ratio from which a mouth leaks. Source: KeySync, https://arxiv.org/abs/2505.00497
RESAMPLES = 1000  # of the bootstrap
CROP_BORDER = IMAGE_SIZE // 4  # pixels of black padding, without which detectors miss faces that fill the image


def mouth_opening(face: Face | None) -> float:
    """Distance between the inner lips divided by the distance between the outer eye corners; nan for None."""
    return float("nan") if face is None else float(lip_gaps(face.landmarks, EYE_CORNERS))


def mouth_aspect_ratio(face: Face | None) -> float:
    """Distance between the inner lips divided by that between the corners of the inner lips (MAR); nan for None."""
    return float("nan") if face is None else float(lip_gaps(face.landmarks, LIP_CORNERS))


def mouth_openings(frames: Iterable[np.ndarray], backend: FaceBackend) -> np.ndarray:
    """`mouth_opening` of the tracked person in each of T frames: float (T,), nan in frames without a face."""
    detections = [faces for batch in batched(frames, VIDEO_FPS) for faces in backend.detect(batch)]
    return np.array([mouth_opening(face) for face in follow_person(detections)])


def detect_in_crops(images: Iterable[np.ndarray], backend: FaceBackend) -> list[Face | None]:
    """The largest face in each of T face crops, BGR uint8 (256, 256, 3), in pixels of the crop; None if there is none.

    On real crops the mediapipe backend detects 99.4 % of faces with the contract "rigid" and 99.9 % with
    "musetalk_v15"; without padding, 93 % and 66 %. The lips differ by 0.7 % of the distance between the eyes from those
    detected in the whole frame.
    """
    largest = []
    for batch in batched(images, VIDEO_FPS):
        padded = [cv2.copyMakeBorder(image, *[CROP_BORDER] * 4, cv2.BORDER_CONSTANT) for image in batch]
        for faces in backend.detect(padded):
            face = max(faces, key=lambda face: area(face.box), default=None)
            if face is not None:
                face = Face(face.box - CROP_BORDER, face.landmarks - CROP_BORDER, face.score)
            largest.append(face)
    return largest


@dataclass(frozen=True)
class Faces:
    """Face crops, BGR uint8 (F, 256, 256, 3), and the faces detected in them."""

    images: np.ndarray
    found: list[Face | None]

    @property
    def openings(self) -> np.ndarray:
        """Mouth openings (F,), nan where no face is detected."""
        return np.array([mouth_opening(face) for face in self.found])


def mouth_landmark_distance(faces: Sequence[Face | None], truth: Sequence[Face | None]) -> float:
    """Mean distance of the 20 lip points of T faces from the true ones, over that between the true outer eye corners.

    Both in pixels of the same crops or frames. Averages over the frames in which both have a face; nan if there are
    none.
    """
    distances = []
    for face, true in zip(faces, truth, strict=True):
        if face is not None and true is not None:
            left, right = true.landmarks[list(EYE_CORNERS)]
            distance = np.linalg.norm(face.landmarks[LIPS] - true.landmarks[LIPS], axis=1).mean()
            distances.append(distance / max(np.linalg.norm(right - left), 1e-6))
    return float(np.mean(distances)) if distances else float("nan")


def mouth_jitter(faces: Sequence[Face | None]) -> float:
    """Mean second difference over time of the 20 lip points of T faces, in distances between the outer eye corners.

    Lips are measured relative to the eyes, so head motion does not count. faces: in pixels of crops or frames. Only
    three faces in consecutive frames count; nan if there are none.
    """
    lips = [None if face is None else _lips(face) for face in faces]
    differences = []
    for before, now, after in zip(lips, lips[1:], lips[2:], strict=False):
        if before is not None and now is not None and after is not None:
            differences.append(np.abs(before - 2 * now + after).mean())
    return float(np.mean(differences)) if differences else float("nan")


def _lips(face: Face) -> np.ndarray:
    """Lip points of a face as complex (20,), in coordinates with its outer eye corners at -1/2 and 1/2."""
    points = face.landmarks[:, 0] + 1j * face.landmarks[:, 1]
    left, right = points[list(EYE_CORNERS)]
    return (points[LIPS] - (left + right) / 2) / ((right - left) or 1e-6)


def lip_leak(aspect_ratios: np.ndarray) -> float:
    """Share of mouth aspect ratios (F,) above `LEAK`, in frames whose mouth should be closed.

    Ratios that are not finite are left out; nan if there are no others.
    """
    return finite_mean(np.where(np.isfinite(aspect_ratios), aspect_ratios > LEAK, np.nan))


def closures(openings: np.ndarray, true_openings: np.ndarray) -> float:
    """Share of the frames closed in the truth that are closed in the prediction within one frame; nan if none are.

    Both: mouth openings (F,) of consecutive frames; closed: below `CLOSED`. A mouth that never opens scores 1, so this
    says something only beside the share of closed frames.
    """
    closed = np.pad(openings < CLOSED, 1)
    near = closed[:-2] | closed[1:-1] | closed[2:]
    return finite_mean(near[true_openings < CLOSED].astype(float))


def sharpness(images: np.ndarray) -> float:
    """Mean variance of the Laplacian of the grey levels of images BGR uint8 (F, H, W, 3); depends on their size.

    Source: KeySync, https://arxiv.org/abs/2505.00497
    """
    grey = (cv2.cvtColor(image, cv2.COLOR_BGR2GRAY) for image in images)
    return float(np.mean([cv2.Laplacian(image, cv2.CV_64F).var() for image in grey]))


def psnr(image: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal-to-noise ratio of an image BGR uint8 (H, W, 3) in dB; inf if it equals the truth."""
    with np.errstate(divide="ignore"):
        return float(peak_signal_noise_ratio(truth, image))


def ssim(image: np.ndarray, truth: np.ndarray) -> float:
    """Structural similarity of an image BGR uint8 (H, W, 3), averaged over channels; 1 if it equals the truth.

    Uses a Gaussian window of sigma 1.5 pixels. Source: Wang et al. 2004, https://doi.org/10.1109/TIP.2003.819861
    """
    gaussian = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return float(structural_similarity(truth, image, channel_axis=-1, **gaussian))


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's r of two series over their common length, where both are finite; nan if either is constant."""
    length = min(len(a), len(b))
    a, b = a[:length], b[:length]
    finite = np.isfinite(a) & np.isfinite(b)
    if not finite.any():
        return float("nan")
    x, y = (values[finite] - values[finite].mean() for values in (a, b))
    norm = np.linalg.norm(x) * np.linalg.norm(y)
    return float(x @ y / norm) if norm > 0 else float("nan")


def finite_mean(values: np.ndarray) -> float:
    """The mean of the finite values; nan if there are none."""
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else float("nan")


def bootstrap_interval(values: Sequence[float] | np.ndarray, groups: Sequence[str]) -> tuple[float, float]:
    """The 95 % interval of the mean of N values over resampled groups, such as identities; the same at each call.

    Each of `RESAMPLES` resamples draws as many groups as there are, with replacement, and averages all their values.
    Values that are not finite are left out. nan for fewer than two groups, which say nothing about a spread.
    """
    members: dict[str, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        if np.isfinite(value):
            members.setdefault(group, []).append(value)
    if len(members) < 2:
        return float("nan"), float("nan")
    sums, counts = (np.array([measure(values) for values in members.values()]) for measure in (sum, len))
    drawn = np.random.default_rng(0).integers(len(members), size=(RESAMPLES, len(members)))
    low, high = np.quantile(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1), (0.025, 0.975))
    return float(low), float(high)
