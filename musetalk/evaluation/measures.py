"""The figures of generated faces of a window, beside the true ones. docs/validation.md says what each figure means."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from musetalk.data.crop import CLOSED, crop_mouth
from musetalk.data.face.face import Face, FaceBackend
from musetalk.evaluation.metrics import (
    Faces,
    closures,
    correlation,
    detect_in_crops,
    finite_mean,
    lip_leak,
    mouth_aspect_ratio,
    mouth_jitter,
    mouth_landmark_distance,
    psnr,
    sharpness,
    ssim,
)
from musetalk.evaluation.sync_check import offset_sweep, sync_confidence, sync_offset
from musetalk.evaluation.windows import Window
from musetalk.images import to_tensor, to_uint8
from musetalk.models.syncnet import SyncNet

BATCH = 8  # images at once

Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class Measures:
    """Measures faces that speak a window's own audio. What needs a network that is None is left out."""

    backend: FaceBackend  # detects landmarks in face crops
    device: torch.device
    distance: Distance | None = None  # LPIPS
    expert: SyncNet | None = None

    def detect(self, images: np.ndarray) -> Faces:
        """Detects the faces in images BGR uint8 (F, 256, 256, 3)."""
        return Faces(images, detect_in_crops(images, self.backend))

    def __call__(self, window: Window, faces: Faces, truth: Faces | None = None) -> dict[str, float]:
        """The figures of the faces of a window by name. truth: the true faces, None if these are they."""
        mouths = to_uint8(crop_mouth(to_tensor(faces.images), window.mouth_boxes))
        figures = self._mouth_figures(window, faces)
        figures |= {"sharpness": sharpness(faces.images), "sharpness_mouth": sharpness(mouths)}
        if truth:
            true_mouths = to_uint8(crop_mouth(to_tensor(truth.images), window.mouth_boxes))
            figures["lmd"] = mouth_landmark_distance(faces.found, truth.found)
            figures |= self._similarity("", faces.images, truth.images)
            figures |= self._similarity("_mouth", mouths, true_mouths)
        return figures

    def _mouth_figures(self, window: Window, faces: Faces) -> dict[str, float]:
        """The figures of the mouths of a window."""
        openings, ratios = faces.openings, aspect_ratios(faces.found)
        closed = np.where(np.isfinite(openings), openings < CLOSED, np.nan)
        figures = {
            "r_own_audio": correlation(openings, window.openings),
            "opening": finite_mean(openings),
            "closed": finite_mean(closed),
            "closures": closures(openings, window.openings),
            "mar_spread": float(np.std(ratios[np.isfinite(ratios)])) if np.isfinite(ratios).any() else math.nan,
            "jitter": mouth_jitter(faces.found),
            "lip_leak_pauses": lip_leak(ratios[window.silent]),
        }
        if self.expert and len(faces.images) >= self.expert.frames:
            first = window.clip.audio_frame(window.start)
            similarities = offset_sweep(self.expert, faces.images, window.clip.tensor("mel"), first)
            figures["sync_confidence"] = sync_confidence(similarities)
            figures["sync_offset"] = float(sync_offset(similarities))
        return figures

    @torch.no_grad()
    def _similarity(self, region: str, x: np.ndarray, y: np.ndarray) -> dict[str, float]:
        """PSNR, SSIM and LPIPS of images x to the truth y, BGR uint8 (F, H, W, 3), with the region in their names."""
        pairs = list(zip(x, y, strict=True))
        figures = {
            f"psnr{region}": float(np.mean([psnr(a, b) for a, b in pairs])),
            f"ssim{region}": float(np.mean([ssim(a, b) for a, b in pairs])),
        }
        if self.distance:
            halves = to_tensor(x).split(BATCH), to_tensor(y).split(BATCH)
            distances = [self.distance(a.to(self.device), b.to(self.device)) for a, b in zip(*halves, strict=True)]
            figures[f"lpips{region}"] = float(torch.cat(distances).mean())
        return figures


def aspect_ratios(faces: Sequence[Face | None]) -> np.ndarray:
    """Mouth aspect ratios (F,), nan for None."""
    return np.array([mouth_aspect_ratio(face) for face in faces])
