"""Losses by hand, their gradients against finite differences, and what these reach."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from losses import full_precision, weighted_sum
from losses.perceptual import lpips
from losses.reconstruction import latent_l1, pixel_l1
from losses.sync import CLAMP, sync_bce, sync_loss
from musetalk.models.lpips import LPIPS, VGG16, Heads


def test_weighted_sum_by_hand():
    terms = {"latent_l1": torch.tensor(2.0), "pixel_l1": torch.tensor(3.0)}
    assert weighted_sum(terms, {"latent_l1": 0.5, "pixel_l1": 10.0}).item() == 31.0
    assert weighted_sum(terms, {"pixel_l1": 1.0, "latent_l1": 0.0, "sync": 9.0}).item() == 3.0


def test_a_term_without_a_weight_is_no_zero():
    with pytest.raises(KeyError, match="sync"):
        weighted_sum({"sync": torch.tensor(1.0)}, {"latent_l1": 1.0})


def test_only_halves_change_their_precision():
    wanted = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
    for given in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert full_precision(torch.ones(1, dtype=given)).dtype == wanted.get(given, given)


# L1.


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
    torch.manual_seed(1)
    target = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    away = torch.rand_like(target) + 0.1
    pred = (target + away * torch.sign(torch.randn_like(target))).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: loss(p, target), pred)
    loss(pred, target).backward()
    torch.testing.assert_close(pred.grad, torch.sign(pred.detach() - target) / target.numel())


# LPIPS.


def small_lpips(width: int) -> LPIPS:
    """LPIPS of `width` channels a stage, in float64; its heads are 0 or more, as published ones are."""
    torch.manual_seed(3)
    trunk, heads = VGG16((width,) * 5), Heads((width,) * 5)
    for tensor in heads.state_dict().values():
        tensor.abs_()
    for tensor in trunk.state_dict().values():
        tensor.mul_(3)  # or nothing would be left at the end of 13 convolutions
    return LPIPS(trunk, heads).double()


def red_lpips() -> LPIPS:
    """Each stage passes on what of red is over the shift, and weighs 1, 2, 3, 4, 5."""
    network = small_lpips(1)
    for tensor in network.trunk.state_dict().values():
        tensor.zero_()
        if tensor.ndim == 4:
            tensor[0, 0, 1, 1] = 1
    for index, tensor in enumerate(network.heads.state_dict().values()):
        tensor.fill_(index + 1)
    return network


def test_lpips_by_hand():
    """A vector of one channel has length 1 where red is over the shift, else 0: each stage sees which places differ."""
    bright, dark = torch.ones(1, 3, 32, 32).double(), -torch.ones(1, 3, 32, 32).double()
    half = torch.cat([bright[..., :16], dark[..., :16]], dim=3)
    whole = 1 + 2 + 3 + 4 + 5
    assert lpips(red_lpips(), bright, dark).item() == pytest.approx(whole)
    assert lpips(red_lpips(), half, dark).item() == pytest.approx(whole / 2)
    two = lpips(red_lpips(), torch.cat([bright, half, dark]), torch.cat([dark, dark, dark]))
    assert two.shape == () and two.item() == pytest.approx((whole + whole / 2 + 0) / 3)


def test_lpips_images_are_normalised_once():
    """Red of -0.02 is over the network's shift of -0.03 and -0.04 is under it, where images come as they are."""
    above, below = torch.full((1, 3, 16, 16), -0.02).double(), torch.full((1, 3, 16, 16), -0.04).double()
    assert lpips(red_lpips(), above, below).item() == pytest.approx(15, rel=1e-3)
    assert lpips(red_lpips(), above, -above).item() < 1e-3


@pytest.mark.parametrize("scale", [0.5, 3])
def test_lpips_has_the_gradient_of_its_finite_differences_also_beyond_the_range(scale):
    network = small_lpips(2)
    pred, target = (torch.rand(2, 1, 3, 16, 16, dtype=torch.float64) * 2 - 1) * scale
    spot = pred[:, :, 4:8, 4:8].clone().requires_grad_()

    def loss(spot):
        image = pred.clone()
        image[:, :, 4:8, 4:8] = spot
        return lpips(network, image, target)

    assert torch.autograd.gradcheck(loss, spot, atol=1e-6)
    (gradient,) = torch.autograd.grad(loss(spot), spot)
    assert gradient.count_nonzero() == gradient.numel()


def test_lpips_teaches_the_prediction_and_no_weight():
    network, pred = small_lpips(2), torch.randn(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    lpips(network, pred, torch.randn_like(pred)).backward()
    assert pred.grad.abs().sum() > 0
    assert all(weight.grad is None for weight in network.parameters())


# Sync.


def unit_vectors(*angles: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """(B, 2), in radians from the first axis."""
    return torch.tensor([[math.cos(angle), math.sin(angle)] for angle in angles], dtype=dtype)


def test_sync_by_hand():
    face = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
    audio = torch.tensor([[0.6, 0.8], [0.8, 0.6]], dtype=torch.float64)  # cosines 0.6 and 0.96
    assert sync_loss(face, audio).item() == pytest.approx(-(math.log(0.6) + math.log(0.96)) / 2)
    found = sync_bce(face, audio, torch.tensor([0, 1])).item()
    assert found == pytest.approx(-(math.log(0.4) + math.log(0.96)) / 2)
    probability, label = torch.tensor([0.6, 0.96], dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64)
    wanted = nn.functional.binary_cross_entropy(probability, label)
    torch.testing.assert_close(sync_bce(face, audio, label), wanted)


def test_sync_of_equal_vectors_is_finite_though_their_cosine_is_over_1():
    torch.manual_seed(0)
    vectors = nn.functional.normalize(torch.randn(64, 512))
    assert (vectors * vectors).sum(dim=1).max() > 1
    assert sync_loss(vectors, vectors).item() == pytest.approx(-math.log(1 - CLAMP), rel=1e-3)
    assert sync_bce(vectors, vectors, torch.zeros(64)).item() == pytest.approx(-math.log(CLAMP), rel=1e-3)


@pytest.mark.parametrize("cosine", [0.0, -0.5, -1.0, 1e-5])
def test_a_mouth_that_does_not_fit_at_all_still_learns(cosine):
    """The value stops at the clamp; the slope is that of its edge, and no steeper."""
    face = unit_vectors(0.0).requires_grad_()
    audio = unit_vectors(math.acos(cosine))
    loss = sync_loss(face, audio)
    assert loss.item() == pytest.approx(-math.log(CLAMP))
    loss.backward()
    torch.testing.assert_close(face.grad, -audio / CLAMP)


def test_a_pair_that_fits_and_should_not_still_learns():
    face, audio = unit_vectors(0.0).requires_grad_(), unit_vectors(0.0)
    sync_bce(face, audio, torch.zeros(1)).backward()
    torch.testing.assert_close(face.grad, audio / CLAMP)


def test_sync_has_the_gradient_of_its_finite_differences():
    face, audio = unit_vectors(0.1, 0.7, 1.3).requires_grad_(), unit_vectors(0.5, 0.2, 0.4).requires_grad_()
    assert torch.autograd.gradcheck(sync_loss, (face, audio))
    label = torch.tensor([0.0, 1.0, 0.0])
    assert torch.autograd.gradcheck(lambda f, a: sync_bce(f, a, label), (face, audio))


def test_sync_of_halves_is_taken_in_float32():
    """bfloat16 has steps of 0.4 % below 1, so that a product in it is 1 or well off."""
    face = unit_vectors(0.0, dtype=torch.bfloat16)
    audio = torch.tensor([[0.99609375, 0.08837890625]], dtype=torch.bfloat16)
    loss = sync_loss(face, audio)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(-math.log(0.99609375))
    assert sync_loss(unit_vectors(0.1), unit_vectors(0.2)).dtype == torch.float64


def test_sync_teaches_the_mouth_and_no_weight_of_a_frozen_expert():
    torch.manual_seed(0)
    expert = nn.Linear(6, 4).double().requires_grad_(False)
    images = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    audio = nn.functional.normalize(torch.randn(3, 4, dtype=torch.float64))
    sync_loss(nn.functional.normalize(expert(images)), audio).backward()
    assert images.grad.abs().sum() > 0
    assert expert.weight.grad is None and audio.grad is None
