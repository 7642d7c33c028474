"""Losses on decoded images without holding all decodes at once.

The UNet's prediction is taken as a leaf; a few samples at a time are decoded, their losses taken and the gradient
at the latents kept. One backward through the UNet with that gradient then equals the unchunked one, since no
network in the branch mixes samples.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from losses import weighted_sum

ImageTerms = Callable[[torch.Tensor, slice], dict[str, torch.Tensor]]


def pixel_branch(
    pred_latents: torch.Tensor,
    decode: Callable[[torch.Tensor], torch.Tensor],
    image_terms: ImageTerms,
    weights: dict[str, float],
    chunk_size: int,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Image losses of predicted latents, and the gradient of their weighted sum at the latents.

    pred_latents: (N, 4, 32, 32). decode: latents (n, 4, 32, 32) -> images (n, 3, 256, 256) in [-1, 1].
    image_terms: (images, their slice of the N) -> terms, each a mean over the images.
    Returns the terms as means over the N, detached, and the gradient, (N, 4, 32, 32).
    """
    count = len(pred_latents)
    totals: dict[str, torch.Tensor] = {}
    gradients = []
    for begin in range(0, count, chunk_size):
        chunk = slice(begin, min(begin + chunk_size, count))
        leaf = pred_latents[chunk].detach().requires_grad_()
        terms = image_terms(decode(leaf), chunk)
        share = len(leaf) / count
        (gradient,) = torch.autograd.grad(share * weighted_sum(terms, weights), leaf)
        gradients.append(gradient)
        for name, value in terms.items():
            totals[name] = totals.get(name, 0) + share * value.detach()
    return totals, torch.cat(gradients)
