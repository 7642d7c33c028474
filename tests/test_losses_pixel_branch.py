"""The pixel branch in chunks against the whole, with every loss on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import normalize

from losses import weighted_sum
from losses.adversarial import GANLoss
from losses.discriminator import PatchDiscriminator
from losses.perceptual import lpips
from losses.pixel_branch import pixel_branch
from losses.reconstruction import pixel_l1
from losses.sync import sync_loss
from musetalk.models.lpips import LPIPS, VGG16, Heads

SIZE = 16  # pixels, twice those of latents here
FRAMES = 3  # of a window
WEIGHTS = {"pixel_l1": 2.0, "lpips": 0.7, "adv_g": 0.3, "feat_match": 1.5, "sync": 0.4}


@pytest.fixture
def decoder() -> nn.Module:
    """A small decoder in float64 that mixes pixels and channels but no samples, as the VAE's does."""
    torch.manual_seed(0)
    layers = nn.Conv2d(4, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.SiLU(), nn.Upsample(scale_factor=2)
    return nn.Sequential(*layers, nn.Conv2d(6, 3, 3, padding=1)).double()


@pytest.fixture
def networks() -> SimpleNamespace:
    """Small networks of all losses in float64; the expert, unlike the real one, is not even frozen."""
    torch.manual_seed(4)
    discriminator = PatchDiscriminator(width=4, layers=2).double()
    gan_loss = GANLoss(discriminator, torch.optim.SGD(discriminator.parameters(), lr=1.0))
    trunk, heads = VGG16((2,) * 5), Heads((2,) * 5)
    for tensor in trunk.state_dict().values():
        tensor.mul_(3)  # or nothing would be left at the end of 13 convolutions
    expert = nn.Sequential(nn.Flatten(), nn.Linear(FRAMES * 3 * SIZE * SIZE, 6), nn.ReLU()).double()
    return SimpleNamespace(gan_loss=gan_loss, lpips=LPIPS(trunk, heads).double(), expert=expert)


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def all_terms(networks: SimpleNamespace, count: int):
    """image_terms and window_terms of every loss on images."""
    target = random(count, 3, SIZE, SIZE, seed=1).tanh()
    audio = normalize(random(count // FRAMES, 6, seed=2).abs())

    def image_terms(image, chunk):
        adv, feat_match = networks.gan_loss.generator_loss(target[chunk], image)
        l1, distance = pixel_l1(image, target[chunk]), lpips(networks.lpips, image, target[chunk])
        return {"pixel_l1": l1, "lpips": distance, "adv_g": adv, "feat_match": feat_match}

    def window_terms(images):
        faces = networks.expert(images.unflatten(0, (-1, FRAMES)))
        return {"sync": sync_loss(normalize(faces), audio)}

    return image_terms, window_terms


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 4, 5, 6, 7])
def test_with_every_loss_the_gradient_in_chunks_is_that_of_the_whole(decoder, networks, chunk_size):
    """Windows of three frames: chunks that are smaller, larger, and cut windows and N."""
    image_terms, window_terms = all_terms(networks, 6)
    latents = random(6, 4, SIZE // 2, SIZE // 2, seed=3)
    found = pixel_branch(latents, decoder, image_terms, WEIGHTS, chunk_size, window_terms=window_terms)

    leaf = latents.clone().requires_grad_()
    images = decoder(leaf)
    wanted = image_terms(images, slice(0, 6)) | window_terms(images)
    (gradient,) = torch.autograd.grad(weighted_sum(wanted, WEIGHTS), leaf, retain_graph=True)
    torch.testing.assert_close(found.gradient, gradient, atol=1e-10, rtol=0)
    torch.testing.assert_close(found.images, images.detach(), atol=1e-10, rtol=0)
    assert found.terms.keys() == wanted.keys() == WEIGHTS.keys()
    for name in wanted:
        torch.testing.assert_close(found.terms[name], wanted[name].detach(), atol=1e-10, rtol=0)
        (share,) = torch.autograd.grad(wanted[name], leaf, retain_graph=True)
        assert WEIGHTS[name] * share.abs().max() > 1e-6, f"the comparison would not see {name}"
    assert not any(value.requires_grad for value in (*found.terms.values(), found.gradient, found.images))


def test_no_weight_of_any_network_gets_a_gradient_and_the_spectral_norms_stay(decoder, networks):
    before = {name: value.clone() for name, value in networks.gan_loss.network.state_dict().items()}
    image_terms, window_terms = all_terms(networks, 6)
    latents = random(6, 4, SIZE // 2, SIZE // 2, seed=3).requires_grad_()
    found = pixel_branch(latents, decoder, image_terms, WEIGHTS, 2, window_terms=window_terms)
    assert found.gradient.shape == latents.shape and found.gradient.abs().sum() > 0
    for network in (decoder, networks.gan_loss.network, networks.lpips, networks.expert):
        assert all(weight.grad is None for weight in network.parameters())
    assert latents.grad is None
    after = networks.gan_loss.network.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


@given(data=st.data())
def test_the_gradient_in_chunks_is_that_of_the_whole(data):
    count = data.draw(st.integers(1, 7))
    chunk_size = data.draw(st.integers(1, count + 1))
    latents, target = random(count, 4, 4, 4, seed=data.draw(st.integers(0, 9))), random(count, 3, 8, 8, seed=10)
    weights = {name: data.draw(st.floats(0.1, 9)) for name in ("pixel_l1", "square", "window")}
    torch.manual_seed(0)
    decode = nn.Sequential(nn.Conv2d(4, 5, 3, padding=1), nn.Tanh(), nn.Upsample(scale_factor=2), nn.Conv2d(5, 3, 1))
    decode.double()

    def image_terms(image, chunk):
        apart = image - target[chunk]
        return {"pixel_l1": apart.abs().mean(), "square": apart.square().mean()}

    def window_terms(images):
        return {"window": images.mean(dim=0).square().sum()}  # mixes all of them

    windows = data.draw(st.sampled_from([None, window_terms]))
    found = pixel_branch(latents, decode, image_terms, weights, chunk_size, window_terms=windows)
    leaf = latents.clone().requires_grad_()
    images = decode(leaf)
    wanted = image_terms(images, slice(0, count)) | (windows(images) if windows else {})
    weighted_sum(wanted, weights).backward()
    torch.testing.assert_close(found.gradient, leaf.grad, atol=1e-10, rtol=0)
    assert found.terms.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found.terms[name], wanted[name].detach(), atol=1e-10, rtol=0)


def test_a_window_term_alone_is_enough(decoder):
    latents = random(4, 4, 4, 4, seed=0)

    def window_terms(images):
        return {"sync": (images[::2] * images[1::2]).mean()}

    found = pixel_branch(latents, decoder, lambda *_: {}, {"sync": 3.0}, 3, window_terms=window_terms)
    leaf = latents.clone().requires_grad_()
    (3 * window_terms(decoder(leaf))["sync"]).backward()
    torch.testing.assert_close(found.gradient, leaf.grad, atol=1e-10, rtol=0)
    assert found.terms.keys() == {"sync"}


@pytest.mark.parametrize("windows", [False, True])
def test_no_chunk_is_too_large_and_images_are_decoded_twice_only_for_windows(decoder, windows):
    decoded, seen = [], []

    def decode(latents):
        decoded.append((len(latents), torch.is_grad_enabled()))
        return decoder(latents)

    def image_terms(image, chunk):
        seen.append((len(image), chunk))
        return {"a": image.square().mean()}

    def window_terms(images):
        return {"b": images.square().mean()}

    latents = random(5, 4, 4, 4, seed=0)
    weights = {"a": 1.0, "b": 1.0}
    pixel_branch(latents, decode, image_terms, weights, 2, window_terms=window_terms if windows else None)
    assert seen == [(2, slice(0, 2)), (2, slice(2, 4)), (1, slice(4, 5))]
    once = [(2, True), (2, True), (1, True)]
    assert decoded == ([(2, False), (2, False), (1, False)] + once if windows else once)


def test_one_backward_with_that_gradient_trains_the_network_before_it(decoder):
    torch.manual_seed(2)
    unet = nn.Conv2d(8, 4, 3, padding=1).double()
    inputs, target = torch.randn(3, 8, 4, 4).double(), torch.randn(3, 3, 8, 8).double()

    def terms(images, chunk):
        return {"pixel_l1": (images - target[chunk]).abs().mean()}

    pred = unet(inputs)
    pred.backward(pixel_branch(pred, decoder, terms, {"pixel_l1": 2.0}, 2).gradient)
    chunked = unet.weight.grad.clone()
    unet.zero_grad()
    (2 * terms(decoder(unet(inputs)), slice(0, 3))["pixel_l1"]).backward()
    torch.testing.assert_close(chunked, unet.weight.grad, atol=1e-10, rtol=0)


def test_the_host_reads_nothing():
    """Tensors on the meta device have no values that it could read."""
    with torch.device("meta"):
        decoder, target, audio = nn.Conv2d(4, 3, 1), torch.empty(4, 3, 8, 8), torch.empty(4, 3 * 8 * 8)
        latents = torch.empty(4, 4, 8, 8)
    found = pixel_branch(
        latents,
        decoder,
        lambda image, chunk: {"pixel_l1": pixel_l1(image, target[chunk])},
        WEIGHTS,
        3,
        window_terms=lambda images: {"sync": sync_loss(images.flatten(1), audio)},
    )
    assert found.gradient.is_meta and found.terms.keys() == {"pixel_l1", "sync"}
