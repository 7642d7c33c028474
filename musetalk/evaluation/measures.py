"""The figures of generated faces of a window, beside the true ones. docs/validation.md says what each figure means."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from musetalk.data.cache import Clip
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
from musetalk.evaluation.sync_distance import lip_sync_error
from musetalk.evaluation.windows import Window, read_sound
from musetalk.images import to_tensor, to_uint8
from musetalk.models.face_embedding import FaceEmbedder
from musetalk.models.syncnet import SyncNet
from musetalk.models.syncnet_v2 import FRAMES, SyncNetV2

BATCH = 8  # images at once
EMBED_EVERY = 5  # frames, for CSIM

Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class Measures:
    """Measures the faces of a window. What needs a network that is None is left out."""

    backend: FaceBackend  # detects landmarks in face crops
    device: torch.device
    distance: Distance | None = None  # LPIPS
    expert: SyncNet | None = None
    syncnet: SyncNetV2 | None = None  # LSE-C, LSE-D and offset
    embedder: FaceEmbedder | None = None  # CSIM

    def detect(self, images: np.ndarray) -> Faces:
        """Detects the faces in images BGR uint8 (F, 256, 256, 3)."""
        return Faces(images, detect_in_crops(images, self.backend))

    def copied(self, window: Window) -> Faces:
        """The reference with a closed mouth in place of each frame of a window."""
        still, count = self.detect(window.clip.image(window.closed)[None]), window.stop - window.start
        return Faces(np.repeat(still.images, count, axis=0), still.found * count)

    def __call__(self, window: Window, faces: Faces, truth: Faces | None = None) -> dict[str, float]:
        """The figures of faces that speak a window's own audio. truth: the true faces, None if these are they."""
        mouths = mouth_crops(window, faces)
        openings, ratios = faces.openings, aspect_ratios(faces.found)
        closed = np.where(np.isfinite(openings), openings < CLOSED, np.nan)
        figures = {
            "r_own_audio": correlation(openings, window.openings),
            "opening": finite_mean(openings),
            "closed": finite_mean(closed),
            "closures": closures(openings, window.openings),
            "lip_leak_pauses": lip_leak(ratios[window.silent]),
            "sharpness": sharpness(faces.images),
        }
        figures |= self.any_audio(window, faces, window.clip)
        if truth:
            true_mouths = mouth_crops(window, truth)
            figures["lmd"] = mouth_landmark_distance(faces.found, truth.found)
            figures |= self._similarity("", faces.images, truth.images)
            figures |= self._similarity("_mouth", mouths, true_mouths)
        return figures

    def any_audio(self, window: Window, faces: Faces, speech: Clip) -> dict[str, float]:
        """The figures of the faces of a window that speak the audio of a clip, at the same frames, that need no truth.

        Sync is left out if that clip ends too early.
        """
        ratios = aspect_ratios(faces.found)
        figures = {
            "mar_spread": float(np.std(ratios[np.isfinite(ratios)])) if np.isfinite(ratios).any() else math.nan,
            "jitter": mouth_jitter(faces.found),
            "sharpness_mouth": sharpness(mouth_crops(window, faces)),
        }
        images = faces.images[: max(0, len(speech) - window.start)]
        if self.expert and len(images) >= self.expert.frames:
            first = speech.audio_frame(window.start)
            similarities = offset_sweep(self.expert, images, speech.tensor("mel"), first)
            figures["sync_confidence"] = sync_confidence(similarities)
            figures["sync_offset"] = float(sync_offset(similarities))
        if self.syncnet and len(images) > FRAMES and speech.has("audio"):
            error = lip_sync_error(self.syncnet, images, read_sound(speech, window.start, len(images)))
            figures |= {"lse_c": error.lse_c, "lse_d": error.lse_d, "lse_offset": float(error.offset)}
        if self.embedder:
            figures["csim"] = self._identity_similarity(window, faces.images)
        return figures

    def _identity_similarity(self, window: Window, images: np.ndarray) -> float:
        """Mean cosine (CSIM) of every `EMBED_EVERY`th face with the true face of the reference frame."""
        assert self.embedder
        clip, frames = window.clip, np.arange(window.start, window.stop, EMBED_EVERY)
        crops = np.concatenate([clip.image(window.closed)[None], images[::EMBED_EVERY]])
        index = np.array([window.closed, *frames])
        boxes, landmarks = clip.tensor("boxes")[index, 0], clip.tensor("landmarks")[index]
        vectors = self.embedder.embed_crops(crops, boxes, landmarks)
        return float(np.mean(vectors[1:] @ vectors[0]))

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


def mouth_crops(window: Window, faces: Faces) -> np.ndarray:
    """The mouths of faces in the boxes of the true ones, BGR uint8 (F, 64, 128, 3)."""
    return to_uint8(crop_mouth(to_tensor(faces.images), window.mouth_boxes))


def chance_level(window: Window, windows: Sequence[Window]) -> float:
    """Mean correlation of the true mouth openings of a window with those of the others; nan if there are none."""
    return finite_mean(np.array([correlation(window.openings, x.openings) for x in windows if x is not window]))


def aspect_ratios(faces: Sequence[Face | None]) -> np.ndarray:
    """Mouth aspect ratios (F,), nan for None."""
    return np.array([mouth_aspect_ratio(face) for face in faces])
