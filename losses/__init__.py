"""What only training needs. Losses are a dict name -> value, weights a dict with the same names.

latent_l1: on latents. pixel_l1: on decoded images in [-1, 1].
"""

from __future__ import annotations

import torch


def weighted_sum(terms: dict[str, torch.Tensor], weights: dict[str, float]) -> torch.Tensor:
    """The total of some terms, each times its weight."""
    return sum(weights[name] * value for name, value in terms.items())
