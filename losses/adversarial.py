"""Adversarial losses of the generator and a discriminator, and the adaptive weight between them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import torch
from torch.nn.functional import relu

from losses import full_precision
from losses.discriminator import Layers, PatchDiscriminator


@dataclass
class GANLoss:
    """A discriminator and the optimizer of its parameters.

    Images are RGB (N, 3, H, W) in [-1, 1]; losses are scalars in float32 or float64. Nothing is read by the host.
    Between `begin_step` and `end_step` all passes share the normalised weights, which are computed once.
    """

    network: PatchDiscriminator
    optimizer: torch.optim.Optimizer
    normalised: Layers | None = None  # of the current step, with a graph to the parameters
    trained: Layers | None = None  # the same as leaves, which collect the step's gradients

    def begin_step(self) -> None:
        """Normalises the weights for all passes of an optimizer step."""
        self.normalised = self.network.normalised()
        self.trained = [(w.detach().requires_grad_(), b.detach().requires_grad_()) for w, b in self.normalised]

    def end_step(self) -> None:
        """Propagates the gradients that the step collected to the parameters."""
        assert self.normalised is not None and self.trained is not None
        gradients = [tensor.grad for tensor in chain(*self.trained)]
        torch.autograd.backward(list(chain(*self.normalised)), gradients)
        self.normalised = self.trained = None

    def generator_loss(self, real: torch.Tensor | None, fake: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the adversarial loss and the feature matching loss, None without `real`.

        The adversarial loss is minus the mean logit of `fake`; feature matching is the mean absolute difference of
        features, averaged over layers. Only `fake` gets a gradient. Sources: Lim and Ye 2017,
        https://arxiv.org/abs/1705.02894 (hinge); Wang et al. 2018, https://arxiv.org/abs/1711.11585 (feature matching).
        """
        frozen = [(w.detach(), b.detach()) for w, b in self.normalised or self.network.normalised()]
        logits_fake, features_fake = self.network(fake, frozen)
        features_real = [] if real is None else self.network(real.detach(), frozen)[1]
        pairs = zip(features_fake, features_real, strict=False)
        feature_l1 = [(full_precision(a) - full_precision(b)).abs().mean() for a, b in pairs]
        return -full_precision(logits_fake).mean(), torch.stack(feature_l1).mean() if feature_l1 else None

    def discriminator_loss(self, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        """Hinge loss: 0 if all logits of `real` are at least 1 and all of `fake` at most -1. Images get no gradient."""
        logits_real, _ = self.network(real.detach(), self.trained)
        logits_fake, _ = self.network(fake.detach(), self.trained)
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
