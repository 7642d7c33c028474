"""How different the prediction looks from the truth."""

from __future__ import annotations

from collections.abc import Callable

import torch

Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def lpips(network: Distance, pred_image: torch.Tensor, target_image: torch.Tensor) -> torch.Tensor:
    """Mean over images of their LPIPS distances (Zhang et al. 2018, https://arxiv.org/abs/1801.03924).

    network: frozen, RGB (N, 3, H, W) in [-1, 1] twice -> distances (N,). It does its own normalisation, so the images
    are given as they are: neither normalised before, nor clamped, which would end the gradient outside the range.
    """
    return network(pred_image, target_image).mean()
