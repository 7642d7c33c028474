"""The discriminator's sizes, both networks' losses by hand, chunked gradients against unchunked ones."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from losses.adversarial import GANLoss, adaptive_weight
from losses.discriminator import PatchDiscriminator

SIZE = 32  # pixels of images here


def small_gan_loss(device: str = "cpu") -> GANLoss:
    """The same one each time: narrow, in float64."""
    torch.manual_seed(0)
    with torch.device(device):
        network = PatchDiscriminator(width=4, layers=2).double()
    return GANLoss(network, torch.optim.SGD(network.parameters(), lr=0.5))


def images(count: int, seed: int) -> torch.Tensor:
    """(count, 3, 32, 32) in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, SIZE, SIZE, dtype=torch.float64, generator=generator) * 2 - 1


def tensors(gan_loss: GANLoss) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in gan_loss.network.state_dict().items()}


def gradients(gan_loss: GANLoss) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in gan_loss.network.parameters()]


class Mean(nn.Module):
    """Logit: an image's mean times `gain`. Features: its red, and twice the image. Values for a hand."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return self.gain * x.mean(dim=(1, 2, 3), keepdim=True), [self.gain * x[:, :1], 2 * self.gain * x]


@pytest.fixture
def mean_gan_loss() -> GANLoss:
    network = Mean()
    return GANLoss(network, torch.optim.SGD(network.parameters(), lr=1.0))


def flat(*values: float) -> torch.Tensor:
    """Images of one value each, float64 (N, 3, 2, 2)."""
    return torch.tensor(values, dtype=torch.float64)[:, None, None, None].expand(-1, 3, 2, 2).clone()


# The discriminator.


def test_the_default_is_pix2pixs_in_size():
    network = PatchDiscriminator()
    assert sum(parameter.numel() for parameter in network.parameters()) == 2_764_737
    with torch.no_grad():
        logits, features = network(torch.zeros(1, 3, 256, 256))
    assert logits.shape == (1, 1, 30, 30)
    wanted = [(1, 64, 128, 128), (1, 128, 64, 64), (1, 256, 32, 32), (1, 512, 31, 31)]
    assert [feature.shape for feature in features] == wanted


def test_widths_stop_at_512():
    convolutions = PatchDiscriminator(width=64, layers=5).convolutions
    assert [convolution.out_channels for convolution in convolutions] == [64, 128, 256, 512, 512, 512, 1]


def test_a_logit_sees_70_pixels():
    image = torch.randn(1, 3, 128, 128, requires_grad=True)
    logits, _ = PatchDiscriminator(width=2)(image)
    logits[0, 0, 7, 7].backward()
    seen = image.grad.abs().sum(dim=(0, 1))
    assert (seen.sum(dim=0) > 0).sum() == (seen.sum(dim=1) > 0).sum() == 70


def test_features_have_passed_their_activation_and_nothing_more():
    """The next convolution's input is the feature before it, negative values a fifth of what they were."""
    network = small_gan_loss().network
    logits, features = network(images(2, seed=1))
    for before, after, convolution in zip(features, features[1:], network.convolutions[1:], strict=False):
        torch.testing.assert_close(nn.functional.leaky_relu(convolution(before), 0.2), after)
    torch.testing.assert_close(network.convolutions[-1](features[-1]), logits)


def test_every_weight_is_divided_by_its_largest_singular_value():
    network = small_gan_loss().network
    for _ in range(200):
        network.power_iteration()
    for convolution in network.convolutions:
        largest = torch.linalg.matrix_norm(convolution.weight.flatten(1), ord=2)
        torch.testing.assert_close(largest, torch.ones_like(largest))


def test_images_of_any_precision_come_in():
    network = PatchDiscriminator(width=2)
    logits, _ = network(images(1, seed=0).to(torch.bfloat16))
    assert logits.dtype == torch.float32


# Both sides' losses.


def test_hinge_by_hand(mean_gan_loss):
    """real: relu(1 - 2), relu(1 - 0.5); fake: relu(1 - 3), relu(1 + 0)."""
    loss = mean_gan_loss.discriminator_loss(flat(2, 0.5), flat(-3, 0))
    assert loss.item() == (0 + 0.5) / 2 + (0 + 1) / 2
    loss.backward()
    assert mean_gan_loss.network.gain.grad.item() == -0.5 / 2 + 0 / 2
    assert mean_gan_loss.discriminator_loss(flat(1), flat(-1)).item() == 0
    assert mean_gan_loss.discriminator_loss(flat(-1), flat(1)).item() == 4


def test_generator_loss_by_hand(mean_gan_loss):
    """Layers count alike, whatever their sizes: red is 0.5 and 1 apart, twice the image 1 and 2."""
    adv, feat_match = mean_gan_loss.generator_loss(flat(1, 1), flat(0.5, 2))
    assert adv.item() == -(0.5 + 2) / 2
    assert feat_match.item() == (0.75 + 1.5) / 2
    assert mean_gan_loss.generator_loss(flat(2), flat(2))[1].item() == 0


def test_losses_have_the_gradients_of_their_finite_differences():
    gan_loss = small_gan_loss()
    real, fake = images(2, seed=1), images(2, seed=2)
    spot = fake[:, :, 10:13, 10:13].clone().requires_grad_()

    def losses(spot):
        image = fake.clone()
        image[:, :, 10:13, 10:13] = spot
        return gan_loss.generator_loss(real, image)

    assert torch.autograd.gradcheck(losses, spot)

    convolution = gan_loss.network.convolutions[1]
    parameters = {
        "convolutions.1.bias": convolution.bias,
        "convolutions.1.parametrizations.weight.original": convolution.parametrizations.weight.original,
    }

    def discriminator_loss(*values):
        changed = dict(zip(parameters, values, strict=True))
        network = partial(torch.func.functional_call, gan_loss.network, changed)
        return GANLoss(network, gan_loss.optimizer).discriminator_loss(real, fake)

    assert torch.autograd.gradcheck(discriminator_loss, tuple(parameters.values()), fast_mode=True)


@pytest.mark.parametrize("which", [0, 1])
def test_the_generators_loss_reaches_the_fake_and_nothing_else(which):
    gan_loss = small_gan_loss()
    before = tensors(gan_loss)
    real, fake = images(2, seed=1).requires_grad_(), images(2, seed=2).requires_grad_()
    gan_loss.generator_loss(real, fake)[which].backward()
    assert fake.grad.abs().sum() > 0 and real.grad is None
    assert all(parameter.grad is None for parameter in gan_loss.network.parameters())
    after = tensors(gan_loss)
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_the_discriminators_loss_reaches_its_weights_and_no_image():
    """Also after a generator's loss, during which they were frozen."""
    gan_loss = small_gan_loss()
    real, fake = images(2, seed=1).requires_grad_(), images(2, seed=2).requires_grad_()
    gan_loss.generator_loss(real, fake)
    gan_loss.discriminator_loss(real, fake).backward()
    last = gan_loss.network.convolutions[-1].bias
    assert last.grad.abs() < 1e-10  # real images pull it up as fake ones pull it down
    assert all(
        parameter.grad.abs().sum() > 1e-10 for parameter in gan_loss.network.parameters() if parameter is not last
    )
    assert real.grad is None and fake.grad is None


def test_losses_are_taken_in_float32_at_least():
    """In bfloat16 the mean of 1 and 1.0039 would be 1."""
    gan_loss = small_gan_loss()
    assert gan_loss.discriminator_loss(images(1, 0), images(1, 1)).dtype == torch.float64
    halves = Mean().bfloat16()
    logits = flat(-1, -1.0078125).bfloat16()
    adv, feat_match = GANLoss(halves, torch.optim.SGD(halves.parameters())).generator_loss(logits, logits)
    assert adv.item() == 1.00390625 and feat_match.dtype == torch.float32


# The discriminator's gradients.


@given(count=st.integers(1, 7), chunk_size=st.integers(1, 8), batches=st.integers(1, 2))
def test_gradients_in_chunks_equal_unchunked_ones(count, chunk_size, batches):
    """Also over several batches."""
    whole, chunked = small_gan_loss(), small_gan_loss()
    real, fake = images(batches * count, seed=1), images(batches * count, seed=2)
    loss = whole.discriminator_loss(real, fake)
    loss.backward()
    parts = [
        chunked.backward(*pair, chunk_size, share=1 / batches)
        for pair in zip(real.chunk(batches), fake.chunk(batches), strict=True)
    ]
    torch.testing.assert_close(sum(parts) / batches, loss.detach(), atol=1e-10, rtol=0)
    assert not parts[0].requires_grad
    torch.testing.assert_close(gradients(chunked), gradients(whole), atol=1e-10, rtol=0)


@pytest.mark.parametrize("chunk_size", [1, 2, 5])
def test_spectral_norms_move_once_a_step_whatever_the_chunks(chunk_size):
    gan_loss = small_gan_loss()
    before = tensors(gan_loss)
    gan_loss.backward(images(5, seed=1), images(5, seed=2), chunk_size)
    after = tensors(gan_loss)
    assert all(torch.equal(after[name], before[name]) for name in before)
    gan_loss.optimizer.step()
    gan_loss.network.power_iteration()
    after = tensors(gan_loss)
    gan_loss.generator_loss(images(1, seed=1), images(1, seed=2))
    assert all(torch.equal(value, after[name]) for name, value in tensors(gan_loss).items())
    for index in range(len(gan_loss.network.convolutions)):
        name = f"convolutions.{index}.parametrizations.weight"
        matrix = after[f"{name}.original"].flatten(1)  # of the new weights
        assert not torch.equal(matrix, before[f"{name}.original"].flatten(1))
        left = nn.functional.normalize(matrix @ before[f"{name}.0._v"], dim=0)
        right = nn.functional.normalize(matrix.T @ left, dim=0)
        torch.testing.assert_close(after[f"{name}.0._u"], left, atol=1e-12, rtol=0)
        torch.testing.assert_close(after[f"{name}.0._v"], right, atol=1e-12, rtol=0)


def test_the_discriminators_gradient_by_hand(mean_gan_loss):
    assert mean_gan_loss.backward(flat(0.5, 0.5), flat(-0.75, -3), chunk_size=1).item() == 0.5 + 0.125
    assert mean_gan_loss.network.gain.grad.item() == -0.5 - 0.375


def test_the_host_reads_nothing():
    """Tensors on the meta device have no values that it could read."""
    gan_loss = small_gan_loss("meta")
    real, fake = torch.empty(2, 5, 3, SIZE, SIZE, device="meta")
    gan_loss.generator_loss(real, fake.requires_grad_())
    assert gan_loss.backward(real, fake, chunk_size=2).is_meta


def test_it_learns_to_tell_bright_from_dark():
    torch.manual_seed(0)
    network = PatchDiscriminator(width=4, layers=2)
    gan_loss = GANLoss(network, torch.optim.Adam(network.parameters(), lr=1e-2))
    losses = []
    for seed in range(40):
        real, fake = images(4, seed=seed).float() / 2 + 0.3, images(4, seed=100 + seed).float() / 2 - 0.3
        losses.append(gan_loss.backward(real, fake, chunk_size=2).item())
        gan_loss.optimizer.step()
        gan_loss.optimizer.zero_grad()
        gan_loss.network.power_iteration()
    assert losses[0] > 1.5 and losses[-1] < 0.2


# The adaptive weight.


@pytest.mark.parametrize("strength", [0.01, 1, 10, 1000])
def test_the_adaptive_weight_is_that_of_gradients_through_the_layer(strength):
    torch.manual_seed(0)
    layer = nn.Conv2d(5, 4, 3, padding=1).double()
    activation, target = torch.randn(2, 5, 8, 8).double(), torch.randn(2, 4, 8, 8).double()
    output = layer(activation)
    losses = (output - target).square().mean(), strength * output.exp().mean()
    gradients = [torch.autograd.grad(loss, layer.weight, retain_graph=True)[0] for loss in losses]
    ratio = gradients[0].square().sum().sqrt() / (gradients[1].square().sum().sqrt() + 1e-4)
    found = adaptive_weight(*gradients)
    assert found.shape == () and not found.requires_grad
    torch.testing.assert_close(found, ratio.clamp(0, 1), atol=1e-12, rtol=0)
    assert (ratio > 1) == (strength <= 1)  # both sides of the bound are seen


def test_the_adaptive_weight_by_hand():
    recon_grad, adv_grad = torch.tensor([[0.3, 0.0], [0.0, 0.4]]), torch.tensor([0.0, 2.0])
    assert adaptive_weight(recon_grad, adv_grad).item() == pytest.approx(0.5 / (2 + 1e-4))
    assert adaptive_weight(adv_grad, recon_grad).item() == 1
    assert adaptive_weight(recon_grad, 0 * adv_grad).item() == 1
    assert adaptive_weight(0 * recon_grad, adv_grad).item() == 0
    assert adaptive_weight(recon_grad.bfloat16(), adv_grad).dtype == torch.float32
