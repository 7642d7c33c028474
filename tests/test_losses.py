"""Losses by hand, and the pixel branch in chunks against the whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from losses import weighted_sum
from losses.pixel_branch import pixel_branch
from losses.reconstruction import latent_l1, pixel_l1


@pytest.fixture
def decoder() -> nn.Module:
    """A small decoder in float64 that mixes pixels and channels but no samples, as the VAE's does."""
    torch.manual_seed(0)
    layers = nn.Conv2d(4, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.SiLU(), nn.Upsample(scale_factor=2)
    return nn.Sequential(*layers, nn.Conv2d(6, 3, 3, padding=1)).double()


def test_weighted_sum_by_hand():
    terms = {"latent_l1": torch.tensor(2.0), "pixel_l1": torch.tensor(3.0)}
    assert weighted_sum(terms, {"latent_l1": 0.5, "pixel_l1": 10.0}).item() == 31.0
    assert weighted_sum(terms, {"pixel_l1": 1.0, "latent_l1": 0.0, "sync": 9.0}).item() == 3.0


def test_a_term_without_a_weight_is_no_zero():
    with pytest.raises(KeyError, match="sync"):
        weighted_sum({"sync": torch.tensor(1.0)}, {"latent_l1": 1.0})


@pytest.mark.parametrize("loss", [latent_l1, pixel_l1])
def test_l1_by_hand(loss):
    pred = torch.tensor([[1.0, -2.0], [0.0, 4.0]]).reshape(2, 1, 1, 2)
    target = torch.tensor([[0.0, 1.0], [0.5, 4.0]]).reshape(2, 1, 1, 2)
    assert loss(pred, target).item() == (1 + 3 + 0.5 + 0) / 4
    assert loss(target, pred).item() == loss(pred, target).item()
    assert loss(pred, pred).item() == 0


@pytest.mark.parametrize("loss", [latent_l1, pixel_l1])
def test_l1_of_halves_is_taken_in_float32(loss):
    """In float16 the sum of these would be infinite, in bfloat16 the small difference lost."""
    pred, target = torch.full((2, 4, 64, 64), 300.0, dtype=torch.float16), torch.zeros(2, 4, 64, 64)
    assert loss(pred, target).item() == 300.0
    one = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    assert loss(one, torch.full((1, 1, 1, 1), 1.001)).item() == pytest.approx(0.001, rel=1e-3)


@pytest.mark.parametrize("loss", [latent_l1, pixel_l1])
def test_l1_has_the_gradient_of_its_finite_differences(loss):
    """Exact for steps that no difference crosses zero in, so that float32 inside is precise enough."""
    torch.manual_seed(1)
    target = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    away = torch.rand_like(target) + 0.1
    pred = (target + away * torch.sign(torch.randn_like(target))).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: loss(p, target), pred, eps=1e-2, atol=1e-4, rtol=1e-3)
    loss(pred, target).backward()
    torch.testing.assert_close(pred.grad, torch.sign(pred.detach() - target) / target.numel())


@given(data=st.data())
def test_the_gradient_in_chunks_is_that_of_the_whole(data):
    count = data.draw(st.integers(1, 7))
    chunk_size = data.draw(st.integers(1, count + 1))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    latents = torch.randn(count, 4, 4, 4, dtype=torch.float64, generator=generator)
    target = torch.randn(count, 3, 8, 8, dtype=torch.float64, generator=generator)
    weights = {"pixel_l1": data.draw(st.floats(0.1, 9)), "square": data.draw(st.floats(0.1, 9))}
    torch.manual_seed(0)
    decode = nn.Sequential(nn.Conv2d(4, 5, 3, padding=1), nn.Tanh(), nn.Upsample(scale_factor=2), nn.Conv2d(5, 3, 1))
    decode.double()

    def terms(images, chunk):
        apart = images - target[chunk]
        return {"pixel_l1": apart.abs().mean(), "square": apart.square().mean()}

    found, gradient = pixel_branch(latents, decode, terms, weights, chunk_size)
    leaf = latents.clone().requires_grad_()
    wanted = terms(decode(leaf), slice(0, count))
    weighted_sum(wanted, weights).backward()
    torch.testing.assert_close(gradient, leaf.grad, atol=1e-10, rtol=0)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name].detach(), atol=1e-10, rtol=0)
        assert not found[name].requires_grad


def test_no_weight_of_the_decoder_gets_a_gradient_and_no_chunk_is_too_large(decoder):
    sizes = []
    latents = torch.randn(5, 4, 4, 4, dtype=torch.float64, requires_grad=True)

    def terms(images, chunk):
        sizes.append((len(images), chunk))
        return {"a": images.square().mean()}

    _, gradient = pixel_branch(latents, decoder, terms, {"a": 1.0}, 2)
    assert sizes == [(2, slice(0, 2)), (2, slice(2, 4)), (1, slice(4, 5))]
    assert gradient.shape == latents.shape and not gradient.requires_grad and gradient.abs().sum() > 0
    assert all(weight.grad is None for weight in decoder.parameters())
    assert latents.grad is None


def test_one_backward_with_that_gradient_trains_the_network_before_it(decoder):
    torch.manual_seed(2)
    unet = nn.Conv2d(8, 4, 3, padding=1).double()
    inputs, target = torch.randn(3, 8, 4, 4).double(), torch.randn(3, 3, 8, 8).double()

    def terms(images, chunk):
        return {"pixel_l1": (images - target[chunk]).abs().mean()}

    pred = unet(inputs)
    _, gradient = pixel_branch(pred, decoder, terms, {"pixel_l1": 2.0}, 2)
    pred.backward(gradient)
    chunked = unet.weight.grad.clone()
    unet.zero_grad()
    (2 * terms(decoder(unet(inputs)), slice(0, 3))["pixel_l1"]).backward()
    torch.testing.assert_close(chunked, unet.weight.grad, atol=1e-10, rtol=0)
