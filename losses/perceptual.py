"""Perceptual distance of predicted and target images."""

from __future__ import annotations

from collections.abc import Callable

import torch

Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def lpips(network: Distance, pred_image: torch.Tensor, target_image: torch.Tensor) -> torch.Tensor:
    """Mean LPIPS distance over images (Zhang et al. 2018, https://arxiv.org/abs/1801.03924).

    network: frozen, two RGB (N, 3, H, W) in [-1, 1] -> distances (N,). It normalises its input itself; images are
    neither normalised nor clamped before, since clamping would remove the gradient outside the range.
    """
    return network(pred_image, target_image).mean()
