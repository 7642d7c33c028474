"""Losses on decoded images in chunks, so that memory does not hold all decodes at once.

The UNet's prediction is the leaf of a separate graph: a few samples at a time are decoded and their losses
differentiated with respect to the latents. One backward through the UNet with that gradient equals the unchunked one,
since no network in the branch mixes samples. A loss on whole windows of frames needs all images at once: unless they
are a single chunk, they are first decoded without a graph. The loss's gradient with respect to the images is passed to
the chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from losses import weighted_sum

Terms = dict[str, torch.Tensor]


class PixelBranch(NamedTuple):
    """Terms, gradient and images, all detached."""

    terms: Terms  # means over N
    gradient: torch.Tensor  # (N, 4, 32, 32), of the weighted sum of the terms with respect to the latents
    images: torch.Tensor  # (N, 3, 256, 256), decoded


def chunks(count: int, size: int) -> list[slice]:
    """Returns slices of `size` samples that cover `count` samples, the last of them possibly shorter."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def pixel_branch(
    pred_latents: torch.Tensor,
    decode: Callable[[torch.Tensor], torch.Tensor],
    image_terms: Callable[[torch.Tensor, slice], Terms],
    weights: Mapping[str, float | torch.Tensor],
    chunk_size: int,
    *,
    window_terms: Callable[[torch.Tensor], Terms] | None = None,
) -> PixelBranch:
    """Computes image losses of predicted latents and the gradient of their weighted sum.

    pred_latents: (N, 4, 32, 32). decode: latents (n, 4, 32, 32) -> images (n, 3, 256, 256) in [-1, 1].
    image_terms: (images, their slice of N) -> terms, each a mean over the images.
    window_terms: all images (N, 3, 256, 256) -> further terms; several chunks are then decoded twice.
    """
    count = len(pred_latents)
    slices = chunks(count, chunk_size)
    leaves = [pred_latents[chunk].detach().requires_grad_() for chunk in slices]
    whole = decode(leaves[0]) if len(leaves) == 1 else None
    terms: Terms = {}
    if window_terms is not None:
        with torch.no_grad():
            all_images = torch.cat([decode(leaf) for leaf in leaves]) if whole is None else whole.detach()
        values = window_terms(all_images.requires_grad_())
        (image_gradient,) = torch.autograd.grad(weighted_sum(values, weights), all_images)
        terms = {name: value.detach() for name, value in values.items()}
        del all_images, values

    gradients: list[torch.Tensor] = []
    images = []
    for chunk, leaf in zip(slices, leaves, strict=True):
        image = decode(leaf) if whole is None else whole
        images.append(image.detach())
        share = len(leaf) / count
        values = image_terms(image, chunk)
        loss = share * weighted_sum(values, weights)
        if window_terms is not None:
            loss = loss + (image * image_gradient[chunk]).sum()
        gradients += torch.autograd.grad(loss, leaf)
        for name, value in values.items():
            terms[name] = terms.get(name, 0) + share * value.detach()
    return PixelBranch(terms, torch.cat(gradients), torch.cat(images))
