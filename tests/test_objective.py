"""All losses together: chunks do not change the result, and only the generator gets a gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate

from losses.adversarial import GANLoss
from losses.discriminator import PatchDiscriminator
from losses.objective import ADVERSARIAL, LATENT, Objective, term_name

CLIPS, FRAMES = 2, 3
WEIGHTS = {
    **{"latent_l1": 0.7, "latent_l1_mouth": 0.3, "pixel_l1": 1.3, "lpips": 0.2, "sync": 0.4},
    **{"adv_g": 0.3, "feat_match": 0.5, "adv_g_mouth": 0.6, "feat_match_mouth": 0.8},
}


class SyncNet(nn.Module):
    """Embeds windows of three images and their mel spectrograms."""

    def __init__(self) -> None:
        super().__init__()
        self.faces, self.mel = nn.Linear(FRAMES * 3 * 16 * 16, 5), nn.Linear(7 * 80, 5)

    def forward(self, images: torch.Tensor, mel: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        embeddings = self.faces(images.flatten(1)), self.mel(mel.flatten(1))
        return tuple(nn.functional.normalize(x.exp(), dim=1) for x in embeddings)


def mouth(images: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """A part of each image at the left edge of its box, resized."""
    crops = [image[:, int(box[0]) : int(box[0]) + 6] for image, box in zip(images, boxes, strict=True)]
    return interpolate(torch.stack(crops), (12, 16), mode="bilinear")


CROPS = {"face": lambda images, _: images, "mouth": mouth}


class Setup:
    """A generator and an objective with narrow networks in float64 on images of 16 x 16 pixels."""

    def __init__(self, weights: dict[str, float], chunk_size: int) -> None:
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.SiLU(), nn.Conv2d(6, 4, 3, padding=1)).double()
        self.decoder = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.SiLU()).double()
        self.decoder.extend([nn.Upsample(scale_factor=2), nn.Conv2d(6, 3, 3, padding=1).double(), nn.Tanh()])
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh()).double()
        self.syncnet = SyncNet().double()
        for network in (self.decoder, self.features, self.syncnet):
            network.requires_grad_(False)
        self.gan_losses = {}
        for region in CROPS:
            network = PatchDiscriminator(width=4, layers=1).double()
            if any(term_name(name, region) in weights for name in ADVERSARIAL):
                self.gan_losses[region] = GANLoss(network, torch.optim.SGD(network.parameters(), 0.1))
        self.objective = Objective(
            weights,
            lambda _: self.decoder,
            lambda stored: stored * 2 - 1,
            chunk_size,
            distance=lambda a, b: (self.features(a) - self.features(b)).square().mean(dim=(1, 2, 3)),
            embed=self.syncnet,
            gan_losses=self.gan_losses,
            crops=CROPS,
        )
        count = CLIPS * FRAMES
        self.x = torch.randn(count, 2, 8, 8).double()
        self.batch = {
            "target_latents": torch.randn(count, 4, 8, 8).double(),
            "reference_latents": torch.randn(count, 4, 8, 8).double(),
            "target_image": torch.rand(count, 3, 16, 16).double(),
            "mouth_box": torch.arange(count)[:, None].expand(-1, 4) % 3,
            "mel": torch.randn(CLIPS, 7, 80).double(),
        }

    def backward(self, **options: int | None) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        loss, terms, images = self.objective.generator_loss(self.generator(self.x), self.batch, **options)
        loss.backward()
        return terms, images

    def gradients(self) -> list[torch.Tensor]:
        return [parameter.grad for parameter in self.generator.parameters()]


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_chunks_do_not_change_losses_and_gradients(chunk_size):
    whole, parts = Setup(WEIGHTS, CLIPS * FRAMES), Setup(WEIGHTS, chunk_size)
    results = [setup.backward(pixel_step=1, adversarial=True) for setup in (whole, parts)]
    assert results[0][0].keys() == WEIGHTS.keys()
    for name, value in results[0][0].items():
        torch.testing.assert_close(results[1][0][name], value, atol=1e-10, rtol=0)
    torch.testing.assert_close(parts.gradients(), whole.gradients(), atol=1e-10, rtol=0)
    losses = [
        setup.objective.discriminator_backward(images, setup.batch, 0.5)
        for setup, (_, images) in zip((whole, parts), results, strict=True)
    ]
    assert losses[0].keys() == {"adv_d", "adv_d_mouth"}
    torch.testing.assert_close(losses[0], losses[1], atol=1e-10, rtol=0)
    for region in CROPS:
        networks = [setup.gan_losses[region].network for setup in (whole, parts)]
        for x, y in zip(*(list(network.parameters()) for network in networks), strict=True):
            torch.testing.assert_close(x.grad, y.grad, atol=1e-10, rtol=0)


def test_the_gradient_is_the_sum_of_those_of_each_term_and_reaches_the_generator_alone():
    together = Setup(WEIGHTS, 4)
    together.backward(pixel_step=1, adversarial=True)
    sums = [torch.zeros_like(gradient) for gradient in together.gradients()]
    for name, weight in WEIGHTS.items():
        alone = Setup({name: weight}, 4)
        terms, _ = alone.backward(pixel_step=None if name in LATENT else 1, adversarial=True)
        assert list(terms) == [name]
        assert any(gradient.abs().max() > 1e-9 for gradient in alone.gradients()), name
        networks = [alone.decoder, alone.features, alone.syncnet, *(x.network for x in alone.gan_losses.values())]
        assert all(parameter.grad is None for network in networks for parameter in network.parameters()), name
        for total, gradient in zip(sums, alone.gradients(), strict=True):
            total += gradient
    for total, gradient in zip(sums, together.gradients(), strict=True):
        torch.testing.assert_close(total, gradient, atol=1e-10, rtol=0)


def test_disabled_terms_are_not_computed():
    setup = Setup(WEIGHTS, 2)
    terms, images = setup.backward(pixel_step=None, adversarial=True)
    assert list(terms) == list(LATENT) and images is None
    terms, images = setup.backward(pixel_step=1, adversarial=False)
    assert terms.keys() == {*LATENT, "pixel_l1", "lpips", "sync"} and images.shape == (6, 3, 16, 16)


def test_images_are_decoded_only_for_terms_that_need_them():
    for name, alone, with_discriminators in (("latent_l1", 0, 0), ("adv_g_mouth", 0, 1), ("sync", 1, 1)):
        objective = Setup({"latent_l1": 1.0, name: 1.0}, 2).objective
        assert (objective.has_pixel_terms(False), objective.has_pixel_terms(True)) == (alone, with_discriminators)


@pytest.mark.parametrize("chunk_size", [1, 4, 6])
def test_adaptive_weights_equalise_gradient_norms_whatever_the_chunks(chunk_size):
    active = ("pixel_l1", "lpips", "adv_g", "adv_g_mouth", "feat_match")
    setup = Setup({name: WEIGHTS[name] for name in active}, chunk_size)
    setup.objective.adaptive_weights |= dict.fromkeys(CROPS, torch.zeros(()).double())
    pred, last = setup.generator(setup.x), setup.generator[2].weight

    def last_layer_gradient(gradient: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(pred[: len(gradient)], last, gradient, retain_graph=True)[0]

    def measure(factor: float) -> None:
        """Measures with the mean gradient over processes `factor` times that of this one, for adversarial losses."""
        factors = torch.tensor([1, factor, factor]).reshape(3, 1, 1, 1, 1)
        setup.objective.update_adaptive_weights(pred, last_layer_gradient, lambda x: factors * x, setup.batch, 1)

    measure(1)
    assert last.grad is None

    norms = {}
    image, target, boxes = setup.decoder(pred), setup.batch["target_image"] * 2 - 1, setup.batch["mouth_box"]
    terms = {
        "recon": WEIGHTS["pixel_l1"] * (image - target).abs().mean()
        + WEIGHTS["lpips"] * (setup.features(image) - setup.features(target)).square().mean(),
        "face": -setup.gan_losses["face"].network(image)[0].mean(),
        "mouth": -setup.gan_losses["mouth"].network(mouth(image, boxes))[0].mean(),
    }
    for name, value in terms.items():
        norms[name] = torch.autograd.grad(value, last, retain_graph=True)[0].norm()

    def expected(factor: float) -> dict[str, torch.Tensor]:
        return {region: (norms["recon"] / (factor * norms[region] + 1e-4)).clamp(max=1) for region in CROPS}

    torch.testing.assert_close(setup.objective.adaptive_weights, expected(1), atol=1e-10, rtol=0)
    measure(10)  # further measurements move them a little
    smoothed = {region: 0.8 * expected(1)[region] + 0.2 * expected(10)[region] for region in CROPS}
    torch.testing.assert_close(setup.objective.adaptive_weights, smoothed, atol=1e-10, rtol=0)

    # They scale the loss but not the logged terms.
    adaptive_terms, _ = setup.backward(pixel_step=1, adversarial=True)
    gradients = [gradient.clone() for gradient in setup.gradients()]
    plain = Setup({**setup.objective.weights}, chunk_size)
    for region, weight in setup.objective.adaptive_weights.items():
        plain.objective.weights[term_name("adv_g", region)] *= weight.item()
    plain_terms, _ = plain.backward(pixel_step=1, adversarial=True)
    assert adaptive_terms == plain_terms
    torch.testing.assert_close(gradients, plain.gradients(), atol=1e-10, rtol=0)


@pytest.mark.parametrize("active", [("latent_l1", "pixel_l1", "lpips", "sync", "adv_g"), ("latent_l1",)])
def test_bounds_are_the_losses_of_the_true_latents_and_of_the_reference(active):
    setup = Setup({name: WEIGHTS[name] for name in active}, chunk_size=4)
    setup.objective.decoder = lambda _: lambda latents: setup.decoder(latents.double())
    bounds = setup.objective.bounds(setup.batch)
    assert list(bounds) == [name for name in ("latent_l1", "pixel_l1", "lpips") if name in active]
    assert bounds["latent_l1"][0] == pytest.approx(0, abs=1e-6)
    for index, latents in enumerate(("target_latents", "reference_latents")):
        pixel_step = 1 if len(active) > 1 else None
        _, terms, _ = setup.objective.generator_loss(
            setup.batch[latents], setup.batch, pixel_step=pixel_step, adversarial=False
        )
        for name, values in bounds.items():
            assert values[index] == pytest.approx(terms[name].item(), abs=1e-6)
