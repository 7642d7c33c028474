"""Image conversion between disk (BGR uint8) and networks (RGB float in [-1, 1]), masking and batching."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
import torch

from musetalk.contract import MASK_TOP


def to_tensor(images: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Converts BGR uint8 (B, H, W, 3) -> RGB float32 (B, 3, H, W) in [-1, 1], on the device of the images."""
    rgb = torch.as_tensor(images).flip(-1).permute(0, 3, 1, 2)
    return rgb.float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Converts RGB float (B, 3, H, W), clamped to [-1, 1] -> BGR uint8 (B, H, W, 3)."""
    scaled = ((images.detach().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).cpu().numpy()[..., ::-1]


def mask_lower_half(images: torch.Tensor) -> torch.Tensor:
    """Returns a copy of images (B, 3, 256, 256) with the lower half black (-1)."""
    masked = images.clone()
    masked[:, :, MASK_TOP:] = -1
    return masked


def batched(items: Iterable, size: int) -> Iterator[list]:
    """Yields lists of `size` items; the last list may be shorter."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch
