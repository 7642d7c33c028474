"""Reconstruction metrics of the small VAE."""

from __future__ import annotations

import math

import cv2
import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional

from musetalk.contract import IMAGE_SIZE, MASK_TOP, VAE_FACTOR
from musetalk.images import mask_lower_half, to_tensor

MOUTH, EYES = slice(48, 68), slice(36, 48)  # landmarks
MOUTH_BORDER = 8  # px around the mouth landmarks


@torch.no_grad()
def evaluate(vae: AutoencoderKL, images: np.ndarray, points: np.ndarray) -> dict[str, float]:
    """Mean metrics over crops uint8 (N, 256, 256, 3) with landmarks (N, 68, 2).

    psnr_*: dB, of the whole crop, the mouth box, the upper half, and the upper half of the masked crop. *_bilinear: of
    the crop downsampled 8 times by area and upsampled. colour_*: mean absolute error of 8 x 8 averages, in [0, 1].
    """
    target = to_tensor(images)
    pred = torch.cat([reconstruct(vae, target[k : k + 1]) for k in range(len(target))])
    masked = torch.cat([reconstruct(vae, mask_lower_half(target[k : k + 1])) for k in range(len(target))])
    bilinear = to_tensor(np.stack([shrink_and_enlarge(image) for image in images]))
    upper = np.s_[:, :MASK_TOP]
    records = []
    for k, landmarks in enumerate(points):
        mouth = mouth_box(landmarks)
        error = functional.avg_pool2d(pred[k] - target[k], VAE_FACTOR).abs().mean(0) / 2
        records.append(
            {
                "psnr": psnr(pred[k], target[k]),
                "psnr_bilinear": psnr(bilinear[k], target[k]),
                "psnr_mouth": psnr(pred[k][mouth], target[k][mouth]),
                "psnr_mouth_bilinear": psnr(bilinear[k][mouth], target[k][mouth]),
                "psnr_upper": psnr(pred[k][upper], target[k][upper]),
                "psnr_upper_masked": psnr(masked[k][upper], target[k][upper]),
                "colour": error.mean().item(),
            }
            | {
                f"colour_{name}": ((error * region).sum() / region.sum()).item()
                for name, region in regions(landmarks).items()
            }
        )
    return {name: float(np.nanmean([record[name] for record in records])) for name in records[0]}


def reconstruct(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Encodes and decodes images (B, 3, 256, 256) in [-1, 1]."""
    return vae.decode(vae.encode(images).latent_dist.mode()).sample.clamp(-1, 1)


def shrink_and_enlarge(image: np.ndarray) -> np.ndarray:
    """Downsamples an image uint8 (256, 256, 3) to 32 x 32 by area and upsamples it bilinearly."""
    small = cv2.resize(image, None, fx=1 / VAE_FACTOR, fy=1 / VAE_FACTOR, interpolation=cv2.INTER_AREA)
    return cv2.resize(small, image.shape[1::-1], interpolation=cv2.INTER_LINEAR)


def psnr(pred: torch.Tensor, target: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of values in [-1, 1]."""
    return 10 * math.log10(4 / functional.mse_loss(pred, target).item())


def mouth_box(landmarks: np.ndarray) -> tuple[slice, slice, slice]:
    """Index of the mouth and its border in an image (3, 256, 256)."""
    mouth = landmarks[MOUTH]
    x1, y1 = np.clip(mouth.min(0) - MOUTH_BORDER, 0, IMAGE_SIZE).astype(int)
    x2, y2 = np.clip(mouth.max(0) + MOUTH_BORDER, 0, IMAGE_SIZE).astype(int)
    return np.s_[:, y1:y2, x1:x2]


def regions(landmarks: np.ndarray) -> dict[str, torch.Tensor]:
    """Coverage of each 8 x 8 block by lips, eyes and background (outside all landmarks): float (32, 32)."""

    def hulls(*landmark_groups: slice) -> torch.Tensor:
        mask = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.float32)
        for group in landmark_groups:
            cv2.fillConvexPoly(mask, cv2.convexHull(landmarks[group].round().astype(np.int32)), 1.0)
        return functional.avg_pool2d(torch.from_numpy(mask)[None], VAE_FACTOR)[0]

    return {
        "lips": hulls(MOUTH),
        "eyes": hulls(slice(36, 42), slice(42, 48)),
        "background": 1 - hulls(slice(0, 68)),
    }
