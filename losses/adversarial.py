"""The generator against a discriminator: both sides' losses, the discriminator's step, and how much its word counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import relu

from losses import full_precision
from losses.discriminator import PatchDiscriminator


@dataclass
class GANLoss:
    """A discriminator and the optimizer of its parameters.

    One step of it, after the generator's losses were taken: `backward` for each batch, `clip`, and, where the norm is
    finite, `update`. Images are RGB (N, 3, H, W) in [-1, 1], losses are scalars in float32 at least, and nothing is
    read by the host.
    """

    network: PatchDiscriminator
    optimizer: torch.optim.Optimizer

    def generator_loss(self, real: torch.Tensor | None, fake: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """adv: minus the mean logit of `fake`. feat_match: mean over layers of the features' mean absolute difference,
        None where there is no `real` to match.

        Gradients go to `fake` alone. Sources: Lim and Ye 2017, https://arxiv.org/abs/1705.02894 (hinge); Wang et al.
        2018, https://arxiv.org/abs/1711.11585 (feature matching).
        """
        self.network.requires_grad_(False)
        logits_fake, features_fake = self.network(fake)
        features_real = [] if real is None else self.network(real.detach())[1]
        self.network.requires_grad_(True)
        pairs = zip(features_fake, features_real, strict=False)
        apart = [(full_precision(a) - full_precision(b)).abs().mean() for a, b in pairs]
        return -full_precision(logits_fake).mean(), torch.stack(apart).mean() if apart else None

    def discriminator_loss(self, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        """Hinge loss, 0 where no logit of `real` is under 1 and none of `fake` over -1. Images get no gradient."""
        logits_real, _ = self.network(real.detach())
        logits_fake, _ = self.network(fake.detach())
        return relu(1 - full_precision(logits_real)).mean() + relu(1 + full_precision(logits_fake)).mean()

    def backward(self, real: torch.Tensor, fake: torch.Tensor, chunk_size: int, share: float = 1.0) -> torch.Tensor:
        """Add to the parameters' gradients `share` times that of the loss of N images, a few of them at a time.

        share: of this batch in the step, 1 / number of batches. Returns the loss, a mean over the N, detached.
        """
        total = real.new_zeros(())
        for real_chunk, fake_chunk in zip(real.split(chunk_size), fake.split(chunk_size), strict=True):
            loss = len(real_chunk) / len(real) * self.discriminator_loss(real_chunk, fake_chunk)
            (share * loss).backward()
            total = total + loss.detach()
        return total

    def clip(self, max_grad_norm: float) -> torch.Tensor:
        """Scale the gradients down to a norm over all parameters. Returns the norm they had, on the device."""
        return torch.nn.utils.clip_grad_norm_(self.network.parameters(), max_grad_norm)

    def update(self) -> None:
        """Step along the gradients and forget them; the spectral norms follow the new weights by one iteration."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.network.power_iteration()


@torch.no_grad()
def adaptive_weight(reconstruction_gradient: torch.Tensor, adversarial_gradient: torch.Tensor) -> torch.Tensor:
    """The weight at which the adversarial loss pulls as hard as the reconstruction, at most 1; a scalar in [0, 1].

    Both gradients at the weight of the generator's last layer, of any one shape.
    Source: Esser et al. 2021, https://arxiv.org/abs/2012.09841, with CodeFormer's bound, https://arxiv.org/abs/2206.11253.
    """
    pull, adversarial_pull = full_precision(reconstruction_gradient), full_precision(adversarial_gradient)
    return (pull.norm() / (adversarial_pull.norm() + 1e-4)).clamp(max=1)
