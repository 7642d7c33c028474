"""All terms of a training step: what the generator is told, and what the discriminators learn from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from losses import weighted_sum
from losses.adversarial import GANLoss, adaptive_weight
from losses.perceptual import Distance, lpips
from losses.pixel_branch import Terms, pixel_branch
from losses.reconstruction import latent_l1, pixel_l1
from losses.sync import sync_loss

Batch = dict[str, torch.Tensor]
Decode = Callable[[torch.Tensor], torch.Tensor]
View = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

ADVERSARIAL = ("adv_g", "feat_match")  # a discriminator's terms for the generator; its own is adv_d


@dataclass
class Objective:
    """The terms that have a weight, and the networks that they need, all of them handed in.

    A batch has N = B T samples: target_latents (N, 4, 32, 32), target_image as `to_tensor` takes it, mouth_box (N, 4)
    and, for sync, mel (B, M, 80). Images are RGB (N, 3, 256, 256) in [-1, 1].
    """

    weights: dict[str, float]  # over 0
    decoder: Callable[[int], Decode]  # latents -> images, at the n-th of the steps that have losses on images
    to_tensor: Callable[[torch.Tensor], torch.Tensor]  # stored images -> images
    chunk_size: int  # samples decoded at once
    distance: Distance | None = None  # LPIPS
    embed: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None  # the sync expert
    gan_losses: dict[str, GANLoss] = field(default_factory=dict)  # by the ending of their terms
    views: dict[str, View] = field(default_factory=dict)  # what each of them sees of images with mouth boxes
    adaptive_weights: dict[str, torch.Tensor] = field(default_factory=dict)  # how much the adv_g of each counts

    def sees_images(self, adversarial: bool) -> bool:
        """Whether any term is on images, with those of the discriminators or without."""
        told = {f"{name}{ending}" for name in ADVERSARIAL for ending in self.gan_losses}
        return bool(self.weights.keys() - {"latent_l1"} - (set() if adversarial else told))

    def generator(
        self, pred_latents: torch.Tensor, batch: Batch, *, turn: int, adversarial: bool
    ) -> tuple[torch.Tensor, Terms, torch.Tensor | None]:
        """Loss to call backward on, terms detached, and the images decoded for `discriminators`, None without any.

        pred_latents: (N, 4, 32, 32). turn: which of the steps that have losses on images this is, 0 for another one.
        adversarial: with those of the discriminators.
        """
        terms = {"latent_l1": latent_l1(pred_latents, batch["target_latents"])} if "latent_l1" in self.weights else {}
        loss = weighted_sum(terms, self.weights)
        terms = {name: value.detach() for name, value in terms.items()}
        if not turn:
            return loss, terms, None
        branch = pixel_branch(
            pred_latents,
            self.decoder(turn),
            partial(self._image_terms, batch, adversarial),
            self._weights(),
            self.chunk_size,
            window_terms=partial(self._window_terms, batch) if "sync" in self.weights else None,
        )
        return loss + (pred_latents * branch.gradient).sum(), terms | branch.terms, branch.images

    def discriminators(self, images: torch.Tensor, batch: Batch, share: float) -> Terms:
        """Add `share` of the gradients of the discriminators' own losses to theirs. images: as decoded."""
        real = self.to_tensor(batch["target_image"])
        return {
            f"adv_d{ending}": adversary.backward(
                self._view(ending, real, batch), self._view(ending, images, batch), self.chunk_size, share
            )
            for ending, adversary in self.gan_losses.items()
        }

    def update_adaptive_weights(
        self,
        pred_latents: torch.Tensor,
        at_last_layer: Callable[[torch.Tensor], torch.Tensor],
        batch: Batch,
        turn: int,
    ) -> None:
        """Let each adv_g pull at the generator's last layer as hard as the reconstruction, judged by one chunk.

        at_last_layer: the gradient of a loss at the first n predictions, (n, 4, 32, 32) -> that at the weight of the
        layer that they come from.
        """
        chunk = slice(0, self.chunk_size)
        leaf = pred_latents[chunk].detach().requires_grad_()
        terms = self._image_terms(batch, True, self.decoder(turn)(leaf), chunk)
        fidelity = {name: value for name, value in terms.items() if name in ("pixel_l1", "lpips")}

        def pull(loss: torch.Tensor) -> torch.Tensor:
            return at_last_layer(torch.autograd.grad(loss, leaf, retain_graph=True)[0])

        wanted = pull(weighted_sum(fidelity, self.weights))
        for ending in self.adaptive_weights:
            self.adaptive_weights[ending] = adaptive_weight(wanted, pull(terms[f"adv_g{ending}"]))

    def _weights(self) -> dict[str, float | torch.Tensor]:
        """The weights of today."""
        pulled = {
            f"adv_g{ending}": self.weights[f"adv_g{ending}"] * pull for ending, pull in self.adaptive_weights.items()
        }
        return self.weights | pulled

    def _view(self, ending: str, images: torch.Tensor, batch: Batch, chunk: slice = slice(None)) -> torch.Tensor:
        return self.views[ending](images, batch["mouth_box"][chunk])

    def _image_terms(self, batch: Batch, adversarial: bool, images: torch.Tensor, chunk: slice) -> Terms:
        """Terms of some of the images, each a mean over them."""
        target = self.to_tensor(batch["target_image"][chunk])
        terms = {}
        if "pixel_l1" in self.weights:
            terms["pixel_l1"] = pixel_l1(images, target)
        if "lpips" in self.weights:
            terms["lpips"] = lpips(self.distance, images, target)
        for ending, adversary in self.gan_losses.items() if adversarial else ():
            matched = f"feat_match{ending}" in self.weights
            real = self._view(ending, target, batch, chunk) if matched else None
            told = adversary.generator_loss(real, self._view(ending, images, batch, chunk))
            for name, value in zip(ADVERSARIAL, told, strict=True):
                if f"{name}{ending}" in self.weights:
                    terms[f"{name}{ending}"] = value
        return terms

    def _window_terms(self, batch: Batch, images: torch.Tensor) -> Terms:
        """Terms of all images, T after T."""
        mel = batch["mel"]
        return {"sync": sync_loss(*self.embed(images.unflatten(0, (len(mel), -1)), mel))}
