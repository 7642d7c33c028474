"""What only training needs. Losses are a dict name -> value, weights a dict with the same names.

latent_l1: on latents. The others are on decoded images, RGB in [-1, 1]: pixel_l1, lpips, sync (of a window of frames),
adv_g and feat_match (the generator's against the discriminator of faces), adv_d (that discriminator's own), and
adv_g_mouth, feat_match_mouth, adv_d_mouth, the same of a second discriminator that sees crops of the mouth.
"""

from __future__ import annotations

import torch


def weighted_sum(terms: dict[str, torch.Tensor], weights: dict[str, float]) -> torch.Tensor:
    """The total of some terms, each times its weight."""
    return sum(weights[name] * value for name, value in terms.items())


def full_precision(values: torch.Tensor) -> torch.Tensor:
    """Halves as float32, in which a loss is taken; float32 and float64 as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
