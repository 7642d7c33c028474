"""Losses on images in chunks against unchunked ones. test_objective.py does the same with every loss."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from losses import weighted_sum
from losses.pixel_branch import pixel_branch
from losses.reconstruction import pixel_l1
from losses.sync import sync_loss

WEIGHTS = {"pixel_l1": 2.0, "square": 0.7, "window": 0.4}


@pytest.fixture
def decoder() -> nn.Module:
    """A small decoder in float64 that mixes pixels and channels but no samples, like the VAE's."""
    torch.manual_seed(0)
    layers = nn.Conv2d(4, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.SiLU(), nn.Upsample(scale_factor=2)
    return nn.Sequential(*layers, nn.Conv2d(6, 3, 3, padding=1)).double()


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def image_terms(image: torch.Tensor, chunk: slice) -> dict[str, torch.Tensor]:
    difference = image - random(7, 3, 8, 8, seed=10)[chunk]
    return {"pixel_l1": difference.abs().mean(), "square": difference.square().mean()}


def window_terms(images: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"window": images.mean(dim=0).square().sum()}  # mixes all images


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 8])
@pytest.mark.parametrize("windows", [None, window_terms])
def test_gradient_terms_and_images_in_chunks_equal_unchunked_ones(decoder, windows, chunk_size):
    latents = random(7, 4, 4, 4, seed=3).requires_grad_()
    branch = pixel_branch(latents, decoder, image_terms, WEIGHTS, chunk_size, window_terms=windows)
    assert latents.grad is None and all(weight.grad is None for weight in decoder.parameters())
    assert not any(value.requires_grad for value in (*branch.terms.values(), branch.gradient, branch.images))

    images = decoder(latents)
    terms = image_terms(images, slice(0, 7)) | (windows(images) if windows else {})
    weighted_sum(terms, WEIGHTS).backward()
    torch.testing.assert_close(branch.gradient, latents.grad, atol=1e-10, rtol=0)
    torch.testing.assert_close(branch.images, images.detach(), atol=1e-10, rtol=0)
    assert branch.terms.keys() == terms.keys()
    for name, value in terms.items():
        torch.testing.assert_close(branch.terms[name], value.detach(), atol=1e-10, rtol=0)


def test_a_window_term_needs_no_image_term(decoder):
    latents = random(4, 4, 4, 4, seed=0).requires_grad_()
    branch = pixel_branch(latents, decoder, lambda *_: {}, WEIGHTS, 3, window_terms=window_terms)
    (WEIGHTS["window"] * window_terms(decoder(latents))["window"]).backward()
    torch.testing.assert_close(branch.gradient, latents.grad, atol=1e-10, rtol=0)
    assert branch.terms.keys() == {"window"}


@pytest.mark.parametrize("windows", [None, window_terms])
def test_only_several_chunks_are_decoded_twice_and_only_for_windows(decoder, windows):
    decoded: list[tuple[int, bool]] = []

    def decode(latents):
        decoded.append((len(latents), torch.is_grad_enabled()))
        return decoder(latents)

    pixel_branch(random(5, 4, 4, 4, seed=0), decode, image_terms, WEIGHTS, 2, window_terms=windows)
    with_graph = [(2, True), (2, True), (1, True)]
    assert decoded == ([(2, False), (2, False), (1, False)] + with_graph if windows else with_graph)

    decoded.clear()
    pixel_branch(random(5, 4, 4, 4, seed=0), decode, image_terms, WEIGHTS, 5, window_terms=windows)
    assert decoded == [(5, True)]


def test_the_host_reads_no_value():
    """Reading a tensor on the meta device raises."""
    with torch.device("meta"):
        decoder, target, audio = nn.Conv2d(4, 3, 1), torch.empty(4, 3, 8, 8), torch.empty(4, 3 * 8 * 8)
        latents = torch.empty(4, 4, 8, 8)
    branch = pixel_branch(
        latents,
        decoder,
        lambda image, chunk: {"pixel_l1": pixel_l1(image, target[chunk])},
        {"pixel_l1": 2.0, "sync": 0.4},
        3,
        window_terms=lambda images: {"sync": sync_loss(images.flatten(1), audio)},
    )
    assert branch.gradient.is_meta and branch.terms.keys() == {"pixel_l1", "sync"}
