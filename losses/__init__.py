"""Training losses. A loss is a dict name -> value, its weights a dict with the same names.

latent_l1 is on latents, latent_l1_mouth on those of the mouth. The others are on decoded images, RGB in [-1, 1]:
pixel_l1, lpips, sync (on windows of frames), adv_g and feat_match (the generator's losses from the face discriminator),
adv_d (the loss of that discriminator), and adv_g_mouth, feat_match_mouth, adv_d_mouth (the same for a second
discriminator, which sees crops of the mouth).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch


def weighted_sum(terms: dict[str, torch.Tensor], weights: Mapping[str, float | torch.Tensor]) -> torch.Tensor:
    """Sum of the terms, each times its weight."""
    return sum(weights[name] * value for name, value in terms.items())  # type: ignore[return-value]  # 0 without terms


def full_precision(values: torch.Tensor) -> torch.Tensor:
    """Converts half precision to float32 for losses; returns float32 and float64 unchanged."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
