"""Adversarial losses of the generator and a discriminator, and the adaptive weight between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import relu

from losses import full_precision
from losses.discriminator import PatchDiscriminator


@dataclass
class GANLoss:
    """A discriminator and the optimizer of its parameters.

    Images are RGB (N, 3, H, W) in [-1, 1]; losses are scalars in float32 or float64. Nothing is read by the host.
    """

    network: PatchDiscriminator
    optimizer: torch.optim.Optimizer

    def generator_loss(self, real: torch.Tensor | None, fake: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the adversarial loss and the feature matching loss, None without `real`.

        The adversarial loss is minus the mean logit of `fake`; feature matching is the mean absolute difference of
        features, averaged over layers. Only `fake` gets a gradient. Sources: Lim and Ye 2017,
        https://arxiv.org/abs/1705.02894 (hinge); Wang et al. 2018, https://arxiv.org/abs/1711.11585 (feature matching).
        """
        self.network.requires_grad_(False)
        logits_fake, features_fake = self.network(fake)
        features_real = [] if real is None else self.network(real.detach())[1]
        self.network.requires_grad_(True)
        pairs = zip(features_fake, features_real, strict=False)
        feature_l1 = [(full_precision(a) - full_precision(b)).abs().mean() for a, b in pairs]
        return -full_precision(logits_fake).mean(), torch.stack(feature_l1).mean() if feature_l1 else None

    def discriminator_loss(self, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        """Hinge loss: 0 if all logits of `real` are at least 1 and all of `fake` at most -1. Images get no gradient."""
        logits_real, _ = self.network(real.detach())
        logits_fake, _ = self.network(fake.detach())
        return relu(1 - full_precision(logits_real)).mean() + relu(1 + full_precision(logits_fake)).mean()

    def backward(self, real: torch.Tensor, fake: torch.Tensor, chunk_size: int, share: float = 1.0) -> torch.Tensor:
        """Adds `share` times the gradient of the loss to the parameters' gradients, `chunk_size` images at a time.

        share: of this batch in the step, 1 / number of batches. Returns the loss, a mean over N images, detached.
        """
        total = real.new_zeros(())
        for real_chunk, fake_chunk in zip(real.split(chunk_size), fake.split(chunk_size), strict=True):
            loss = len(real_chunk) / len(real) * self.discriminator_loss(real_chunk, fake_chunk)
            (share * loss).backward()
            total = total + loss.detach()
        return total


@torch.no_grad()
def adaptive_weight(reconstruction_gradient: torch.Tensor, adversarial_gradient: torch.Tensor) -> torch.Tensor:
    """The weight of the adversarial loss that equalises both gradient norms, a scalar in [0, 1].

    Both gradients are taken at the weight of the generator's last layer and have any one shape.
    Source: Esser et al. 2021, https://arxiv.org/abs/2012.09841, with CodeFormer's bound, https://arxiv.org/abs/2206.11253.
    """
    recon_norm = full_precision(reconstruction_gradient).norm()
    return (recon_norm / (full_precision(adversarial_gradient).norm() + 1e-4)).clamp(max=1)
