"""Reconstruction losses in latents and pixels."""

from __future__ import annotations

import torch

from losses import full_precision


def latent_l1(pred_latents: torch.Tensor, target_latents: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of latents (N, 4, 32, 32), in float32 or float64."""
    return (full_precision(pred_latents) - full_precision(target_latents)).abs().mean()


def pixel_l1(pred_image: torch.Tensor, target_image: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of RGB images (N, 3, 256, 256) in [-1, 1], in float32 or float64."""
    return (full_precision(pred_image) - full_precision(target_image)).abs().mean()
