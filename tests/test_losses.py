"""Values of the losses worked out by hand, their gradients against finite differences, and what receives a gradient."""

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
    assert weighted_sum(terms, {"latent_l1": 0.5, "pixel_l1": 10.0, "sync": 9.0}).item() == 31.0
    with pytest.raises(KeyError, match="pixel_l1"):
        weighted_sum(terms, {"latent_l1": 1.0})


def test_only_half_precision_is_promoted():
    promoted = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert full_precision(torch.ones(1, dtype=dtype)).dtype == promoted.get(dtype, dtype)


# L1.


@pytest.mark.parametrize("loss", [latent_l1, pixel_l1])
def test_l1_and_its_gradient_by_hand(loss):
    pred = torch.tensor([[1.0, -2.0], [0.0, 4.5]]).reshape(2, 1, 1, 2).requires_grad_()
    target = torch.tensor([[0.0, 1.0], [0.5, 4.0]]).reshape(2, 1, 1, 2)
    value = loss(pred, target)
    assert value.item() == (1 + 3 + 0.5 + 0.5) / 4
    value.backward()
    assert (4 * pred.grad).flatten().tolist() == [1, -1, -1, 1]
    overflow = torch.full((2, 4, 64, 64), 300.0, dtype=torch.float16)  # if its sum were in float16
    assert loss(overflow, torch.zeros(2, 4, 64, 64)).item() == 300.0


# LPIPS.


def small_lpips(width: int) -> LPIPS:
    """LPIPS with `width` channels per stage, in float64; the weights of its heads are not negative, as published."""
    torch.manual_seed(3)
    trunk, heads = VGG16((width,) * 5), Heads((width,) * 5)
    for tensor in heads.state_dict().values():
        tensor.abs_()
    for tensor in trunk.state_dict().values():
        tensor.mul_(3)  # otherwise 13 convolutions would leave values close to 0
    return LPIPS(trunk, heads).double()


def red_lpips() -> LPIPS:
    """Every stage passes on by how much red exceeds the shift; the stages have weights 1, 2, 3, 4, 5."""
    network = small_lpips(1)
    for tensor in network.trunk.state_dict().values():
        tensor.zero_()
        if tensor.ndim == 4:
            tensor[0, 0, 1, 1] = 1
    for index, tensor in enumerate(network.heads.state_dict().values()):
        tensor.fill_(index + 1)
    return network


def test_lpips_by_hand():
    """A normalised vector of one channel is 1 where red exceeds the shift, else 0: stages compare where it does."""
    bright, dark = torch.ones(1, 3, 32, 32).double(), -torch.ones(1, 3, 32, 32).double()
    half = torch.cat([bright[..., :16], dark[..., :16]], dim=3)
    total = 1 + 2 + 3 + 4 + 5
    assert lpips(red_lpips(), bright, dark).item() == pytest.approx(total)
    assert lpips(red_lpips(), half, dark).item() == pytest.approx(total / 2)
    mean = lpips(red_lpips(), torch.cat([bright, half, dark]), torch.cat([dark, dark, dark]))
    assert mean.shape == () and mean.item() == pytest.approx((total + total / 2 + 0) / 3)


def test_lpips_normalises_images_once():
    """The network's shift of red is -0.03 for images in [-1, 1]: -0.02 exceeds it and -0.04 does not."""
    above, below = torch.full((1, 3, 16, 16), -0.02).double(), torch.full((1, 3, 16, 16), -0.04).double()
    assert lpips(red_lpips(), above, below).item() == pytest.approx(15, rel=1e-3)
    assert lpips(red_lpips(), above, -above).item() < 1e-3


def test_lpips_has_the_gradient_of_finite_differences_and_trains_no_weight():
    """Also for images outside [-1, 1]."""
    network = small_lpips(2)
    pred, target = (torch.rand(2, 1, 3, 16, 16, dtype=torch.float64) * 2 - 1) * 3
    patch = pred[:, :, 4:8, 4:8].clone().requires_grad_()

    def loss(patch):
        image = pred.clone()
        image[:, :, 4:8, 4:8] = patch
        return lpips(network, image, target)

    assert torch.autograd.gradcheck(loss, patch, atol=1e-6)
    loss(patch).backward()
    assert patch.grad.count_nonzero() == patch.numel()
    assert all(weight.grad is None for weight in network.parameters())


# Sync.


def unit_vectors(*angles: float) -> torch.Tensor:
    """Unit vectors float64 (B, 2) at angles in radians."""
    return torch.tensor([[math.cos(angle), math.sin(angle)] for angle in angles], dtype=torch.float64)


def test_sync_by_hand():
    face = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
    audio = torch.tensor([[0.6, 0.8], [0.8, 0.6]], dtype=torch.float64)  # cosines 0.6 and 0.96
    assert sync_loss(face, audio).item() == pytest.approx(-(math.log(0.6) + math.log(0.96)) / 2)
    bce = sync_bce(face, audio, torch.tensor([0, 1])).item()
    assert bce == pytest.approx(-(math.log(0.4) + math.log(0.96)) / 2)


def test_sync_of_equal_vectors_is_finite_though_rounding_makes_their_cosine_exceed_1():
    torch.manual_seed(0)
    vectors = nn.functional.normalize(torch.randn(64, 512))
    assert (vectors * vectors).sum(dim=1).max() > 1
    assert sync_loss(vectors, vectors).item() == pytest.approx(-math.log(1 - CLAMP), rel=1e-3)
    assert sync_bce(vectors, vectors, torch.zeros(64)).item() == pytest.approx(-math.log(CLAMP), rel=1e-3)


def test_clamped_pairs_keep_the_gradient_at_the_clamp():
    face, audio = unit_vectors(0.0).requires_grad_(), unit_vectors(math.pi)
    loss = sync_loss(face, audio)
    assert loss.item() == pytest.approx(-math.log(CLAMP))
    torch.testing.assert_close(torch.autograd.grad(loss, face)[0], -audio / CLAMP)
    loss = sync_bce(face, -audio, torch.zeros(1))  # a pair that should not match
    torch.testing.assert_close(torch.autograd.grad(loss, face)[0], -audio / CLAMP)


def test_sync_has_the_gradient_of_finite_differences():
    face, audio = unit_vectors(0.1, 0.7, 1.3).requires_grad_(), unit_vectors(0.5, 0.2, 0.4).requires_grad_()
    assert torch.autograd.gradcheck(sync_loss, (face, audio))
    label = torch.tensor([0.0, 1.0, 0.0])
    assert torch.autograd.gradcheck(lambda f, a: sync_bce(f, a, label), (face, audio))


def test_sync_of_half_precision_is_computed_in_float32():
    """Below 1, bfloat16 has steps of 0.4 %, too coarse for cosines."""
    face = torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16)
    audio = torch.tensor([[0.99609375, 0.08837890625]], dtype=torch.bfloat16)
    loss = sync_loss(face, audio)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(-math.log(0.99609375))
