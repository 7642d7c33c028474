"""Generator and discriminator losses of one training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from losses import full_precision, weighted_sum
from losses.adversarial import GANLoss, adaptive_weight
from losses.perceptual import Distance, lpips
from losses.pixel_branch import Terms, chunks, pixel_branch
from losses.reconstruction import latent_l1, pixel_l1
from losses.sync import sync_loss

Batch = dict[str, torch.Tensor]
Decode = Callable[[torch.Tensor], torch.Tensor]
Crop = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

LATENT = ("latent_l1", "latent_l1_mouth")  # terms that need no decoded images
ADVERSARIAL = ("adv_g", "feat_match")  # the generator's terms from a discriminator, whose own is adv_d
ADAPTIVE_SAMPLES = 8  # most of a process, for a measurement of the adaptive weights
SMOOTHING = 0.2  # share of a new measurement in them


def term_name(name: str, region: str) -> str:
    """The name of a discriminator's term: "adv_g" for the region "face", "adv_g_mouth" for "mouth"."""
    return name if region == "face" else f"{name}_{region}"


@dataclass
class Objective:
    """The weighted terms of a training, and the frozen networks that compute them.

    A batch has N = B T samples: target_latents (N, 4, 32, 32), target_image in the form that `to_tensor` accepts,
    mouth_box (N, 4) and, for sync, mel (B, M, 80). Images are RGB (N, 3, 256, 256) in [-1, 1].
    """

    weights: dict[str, float]  # of active terms, each over 0
    decoder: Callable[[int], Decode]  # index of a pixel step -> function from latents to images
    to_tensor: Callable[[torch.Tensor], torch.Tensor]  # stored images -> images
    chunk_size: int  # samples decoded at once
    distance: Distance | None = None  # LPIPS
    embed: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None  # the sync expert
    gan_losses: dict[str, GANLoss] = field(default_factory=dict)  # by region
    crops: dict[str, Crop] = field(default_factory=dict)  # region -> function of images and mouth boxes
    adaptive_weights: dict[str, torch.Tensor] = field(default_factory=dict)  # factor of adv_g by region

    def has_pixel_terms(self, adversarial: bool) -> bool:
        """Whether any active term needs decoded images, with or without the adversarial ones."""
        adv_terms = {term_name(name, region) for name in ADVERSARIAL for region in self.gan_losses}
        return bool(self.weights.keys() - set(LATENT) - (set() if adversarial else adv_terms))

    def generator_loss(
        self, pred_latents: torch.Tensor, batch: Batch, *, pixel_step: int | None, adversarial: bool
    ) -> tuple[torch.Tensor, Terms, torch.Tensor | None]:
        """Returns the loss to call backward on, its terms (detached), and the decoded images (None without any).

        pred_latents: (N, 4, 32, 32). pixel_step: index of this step among those with pixel losses, None if it has none.
        adversarial: include the discriminators' terms.
        """
        terms = self._latent_terms(pred_latents, batch)
        loss = weighted_sum(terms, self.weights)
        terms = {name: value.detach() for name, value in terms.items()}
        if pixel_step is None:
            return loss, terms, None
        branch = pixel_branch(
            pred_latents,
            self.decoder(pixel_step),
            partial(self._image_terms, batch, adversarial),
            self._current_weights(),
            self.chunk_size,
            window_terms=partial(self._window_terms, batch) if "sync" in self.weights else None,
        )
        return loss + (pred_latents * branch.gradient).sum(), terms | branch.terms, branch.images

    @torch.no_grad()
    def bounds(self, batch: Batch) -> dict[str, tuple[float, float]]:
        """Floor and ceiling of the active reconstruction losses on a batch with reference_latents too.

        The floor is the term of the true latents: 0 for losses on latents, what the VAE's round trip loses for the
        others. The ceiling is that of the reference's latents: a UNet reaches it by copying its reference.
        """
        floor, ceiling = (
            self._reconstruction(batch[f"{name}_latents"].float(), batch) for name in ("target", "reference")
        )
        return {name: (floor[name].item(), ceiling[name].item()) for name in floor}

    def _reconstruction(self, latents: torch.Tensor, batch: Batch) -> Terms:
        """The active reconstruction losses of latents (N, 4, 32, 32)."""
        terms = self._latent_terms(latents, batch)
        if self.has_pixel_terms(adversarial=False):
            for chunk in chunks(len(latents), self.chunk_size):
                images = self.decoder(0)(latents[chunk])
                for name, value in self._image_terms(batch, False, images, chunk).items():
                    terms[name] = terms.get(name, 0) + len(images) / len(latents) * value
        return terms

    def discriminator_backward(self, images: torch.Tensor, batch: Batch, share: float) -> Terms:
        """Adds `share` of each discriminator's loss to its gradients. Returns the losses, detached.

        images: those that `generator_loss` decoded.
        """
        target = self.to_tensor(batch["target_image"])
        return {
            term_name("adv_d", region): gan_loss.backward(
                self._crop(region, target, batch), self._crop(region, images, batch), self.chunk_size, share
            )
            for region, gan_loss in self.gan_losses.items()
        }

    def update_adaptive_weights(
        self,
        pred_latents: torch.Tensor,
        last_layer_gradient: Callable[[torch.Tensor], torch.Tensor],
        average: Callable[[torch.Tensor], torch.Tensor],
        batch: Batch,
        pixel_step: int,
    ) -> None:
        """Balances each adv_g with pixel_l1 and lpips by their gradients at the generator's last layer.

        Measured on the first `ADAPTIVE_SAMPLES` samples of each process, and smoothed over measurements.
        last_layer_gradient: gradient of a loss at the first n predictions (n, 4, 32, 32) -> gradient at the last
        layer's weight. average: mean of a tensor over processes.
        """
        count = min(ADAPTIVE_SAMPLES, len(pred_latents))
        decode = self.decoder(pixel_step)
        gradients: dict[str, list[torch.Tensor]] = {}  # of each loss at the predictions, by chunk
        for chunk in chunks(count, self.chunk_size):
            leaf = pred_latents[chunk].detach().requires_grad_()
            images = decode(leaf).detach().requires_grad_()
            terms = self._image_terms(batch, True, images, chunk)
            recon_losses = {name: value for name, value in terms.items() if name in ("pixel_l1", "lpips")}
            losses = {"reconstruction": weighted_sum(recon_losses, self.weights)}
            losses |= {region: terms[term_name("adv_g", region)] for region in self.adaptive_weights}
            for name, loss in losses.items():
                (at_images,) = torch.autograd.grad(len(leaf) / count * loss, images)
                # Decoded again for each, because a compiled network has a single backward pass for a forward pass.
                gradients.setdefault(name, []).extend(torch.autograd.grad(decode(leaf), leaf, at_images))
        at_layer = average(torch.stack([last_layer_gradient(torch.cat(parts)) for parts in gradients.values()]))
        for region, adv_grad in zip(self.adaptive_weights, at_layer[1:], strict=True):
            measured, smoothed = adaptive_weight(at_layer[0], adv_grad), self.adaptive_weights[region]
            first = smoothed == 0  # not measured before
            self.adaptive_weights[region] = torch.where(first, measured, smoothed.lerp(measured, SMOOTHING))

    def _current_weights(self) -> dict[str, float | torch.Tensor]:
        """The weights, those of adv_g times their adaptive weights."""
        names = {region: term_name("adv_g", region) for region in self.adaptive_weights}
        return self.weights | {
            name: self.weights[name] * self.adaptive_weights[region] for region, name in names.items()
        }

    def _crop(self, region: str, images: torch.Tensor, batch: Batch, chunk: slice = slice(None)) -> torch.Tensor:
        """A region of images or latents."""
        return self.crops[region](images, batch["mouth_box"][chunk])

    def _latent_terms(self, latents: torch.Tensor, batch: Batch) -> Terms:
        """The active terms of latents (N, 4, 32, 32): their difference from the true ones, in all and at the mouth."""
        target, terms = batch["target_latents"], {}
        if "latent_l1" in self.weights:
            terms["latent_l1"] = latent_l1(latents, target)
        if "latent_l1_mouth" in self.weights:
            mouths = [self._crop("mouth", full_precision(values), batch) for values in (latents, target)]
            terms["latent_l1_mouth"] = latent_l1(*mouths)
        return terms

    def _image_terms(self, batch: Batch, adversarial: bool, images: torch.Tensor, chunk: slice) -> Terms:
        """Terms of a chunk of images, each a mean over them."""
        target = self.to_tensor(batch["target_image"][chunk])
        terms = {}
        if "pixel_l1" in self.weights:
            terms["pixel_l1"] = pixel_l1(images, target)
        if "lpips" in self.weights:
            assert self.distance is not None
            terms["lpips"] = lpips(self.distance, images, target)
        for region, gan_loss in self.gan_losses.items() if adversarial else ():
            match = term_name("feat_match", region) in self.weights
            real = self._crop(region, target, batch, chunk) if match else None
            adv_terms = gan_loss.generator_loss(real, self._crop(region, images, batch, chunk))
            for name, value in zip(ADVERSARIAL, adv_terms, strict=True):
                if value is not None and term_name(name, region) in self.weights:
                    terms[term_name(name, region)] = value
        return terms

    def _window_terms(self, batch: Batch, images: torch.Tensor) -> Terms:
        """Terms of whole windows of T images."""
        assert self.embed is not None
        mel = batch["mel"]
        return {"sync": sync_loss(*self.embed(images.unflatten(0, (len(mel), -1)), mel))}
