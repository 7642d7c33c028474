"""The discriminator's architecture, the hinge losses by hand, and gradients in chunks against unchunked ones."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from losses.adversarial import GANLoss, adaptive_weight
from losses.discriminator import Layers, PatchDiscriminator

SIZE = 32  # pixels


def small_gan_loss(device: str = "cpu") -> GANLoss:
    """A narrow discriminator in float64 with the same weights at each call."""
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


class Mean(nn.Module):
    """Logit: the mean of the image times `gain`. Features: its red channel, and twice the image."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones((), dtype=torch.float64))

    def normalised(self) -> Layers:
        return [(self.gain, self.gain)]

    def forward(self, x: torch.Tensor, layers: Layers | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        ((gain, _),) = layers or self.normalised()
        return gain * x.mean(dim=(1, 2, 3), keepdim=True), [gain * x[:, :1], 2 * gain * x]


@pytest.fixture
def mean_gan_loss() -> GANLoss:
    network = Mean()
    return GANLoss(network, torch.optim.SGD(network.parameters(), lr=1.0))


def flat(*values: float) -> torch.Tensor:
    """Images of one value each, float64 (N, 3, 2, 2)."""
    return torch.tensor(values, dtype=torch.float64)[:, None, None, None].expand(-1, 3, 2, 2).clone()


# The discriminator.


def test_the_default_is_the_70_pixel_discriminator_of_pix2pix():
    network = PatchDiscriminator()
    assert sum(parameter.numel() for parameter in network.parameters()) == 2_764_737
    with torch.no_grad():
        logits, features = network(torch.zeros(1, 3, 256, 256))
    assert logits.shape == (1, 1, 30, 30)
    shapes = [(1, 64, 128, 128), (1, 128, 64, 64), (1, 256, 32, 32), (1, 512, 31, 31)]
    assert [feature.shape for feature in features] == shapes

    image = torch.randn(1, 3, 128, 128, requires_grad=True)
    PatchDiscriminator(width=2)(image)[0][0, 0, 7, 7].backward()
    receptive = image.grad.abs().sum(dim=(0, 1)) > 0
    assert receptive.any(dim=0).sum() == receptive.any(dim=1).sum() == 70


def test_features_are_the_inputs_of_the_next_convolution():
    """The activation is a leaky ReLU of slope 0.2."""
    network = small_gan_loss().network
    logits, features = network(images(2, seed=1))
    for x, y, convolution in zip(features, features[1:], network.convolutions[1:], strict=False):
        torch.testing.assert_close(nn.functional.leaky_relu(convolution(x), 0.2), y)
    torch.testing.assert_close(network.convolutions[-1](features[-1]), logits)


def test_every_weight_is_divided_by_its_largest_singular_value():
    network = small_gan_loss().network
    for _ in range(200):
        network.power_iteration()
    for convolution in network.convolutions:
        largest = torch.linalg.matrix_norm(convolution.weight.flatten(1), ord=2)
        torch.testing.assert_close(largest, torch.ones_like(largest))


# Losses of generator and discriminator.


def test_hinge_loss_by_hand(mean_gan_loss):
    """real: relu(1 - 2), relu(1 - 0.5); fake: relu(1 - 3), relu(1 + 0)."""
    loss = mean_gan_loss.discriminator_loss(flat(2, 0.5), flat(-3, 0))
    assert loss.item() == (0 + 0.5) / 2 + (0 + 1) / 2
    loss.backward()
    assert mean_gan_loss.network.gain.grad.item() == -0.5 / 2 + 0 / 2


def test_generator_loss_by_hand(mean_gan_loss):
    """Layers have equal weights whatever their sizes: red differs by 0.5 and 1, twice the image by 1 and 2."""
    adv, feat_match = mean_gan_loss.generator_loss(flat(1, 1), flat(0.5, 2))
    assert adv.item() == -(0.5 + 2) / 2
    assert feat_match.item() == (0.75 + 1.5) / 2


def test_losses_have_the_gradients_of_finite_differences():
    gan_loss = small_gan_loss()
    real, fake = images(2, seed=1), images(2, seed=2)
    patch = fake[:, :, 10:13, 10:13].clone().requires_grad_()

    def losses(patch):
        image = fake.clone()
        image[:, :, 10:13, 10:13] = patch
        return gan_loss.generator_loss(real, image)

    assert torch.autograd.gradcheck(losses, patch)

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


def test_the_generator_loss_trains_the_fake_image_and_the_discriminator_loss_the_weights():
    gan_loss = small_gan_loss()
    before = tensors(gan_loss)
    real, fake = images(2, seed=1).requires_grad_(), images(2, seed=2).requires_grad_()
    sum(gan_loss.generator_loss(real, fake)).backward()
    assert fake.grad.abs().sum() > 0 and real.grad is None
    assert all(parameter.grad is None for parameter in gan_loss.network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in tensors(gan_loss).items())

    fake.grad = None
    gan_loss.discriminator_loss(real, fake).backward()
    last_bias = gan_loss.network.convolutions[-1].bias  # its gradients from real and fake images cancel
    for parameter in gan_loss.network.parameters():
        assert parameter is last_bias or parameter.grad.abs().sum() > 1e-10
    assert real.grad is None and fake.grad is None


def test_losses_of_half_precision_are_computed_in_float32():
    """In bfloat16 the mean of 1 and 1.0039 would be 1."""
    network = Mean().bfloat16()
    logits = flat(-1, -1.0078125).bfloat16()
    adv, feat_match = GANLoss(network, torch.optim.SGD(network.parameters())).generator_loss(logits, logits)
    assert adv.item() == 1.00390625 and feat_match.dtype == torch.float32


# The step of the discriminator.


@pytest.mark.parametrize(("count", "chunk_size", "batches"), [(5, 2, 1), (3, 1, 2), (2, 8, 2)])
def test_gradients_in_chunks_and_batches_equal_those_of_all_images(count, chunk_size, batches):
    whole, chunked = small_gan_loss(), small_gan_loss()
    real, fake = images(batches * count, seed=1), images(batches * count, seed=2)
    loss = whole.discriminator_loss(real, fake)
    loss.backward()
    chunked.begin_step()
    losses = [
        chunked.backward(*pair, chunk_size, share=1 / batches)
        for pair in zip(real.chunk(batches), fake.chunk(batches), strict=True)
    ]
    assert all(parameter.grad is None for parameter in chunked.network.parameters())
    chunked.end_step()
    torch.testing.assert_close(sum(losses) / batches, loss.detach(), atol=1e-10, rtol=0)
    assert not losses[0].requires_grad
    for x, y in zip(chunked.network.parameters(), whole.network.parameters(), strict=True):
        torch.testing.assert_close(x.grad, y.grad, atol=1e-10, rtol=0)


def test_spectral_norms_are_updated_once_per_step():
    gan_loss = small_gan_loss()
    before = tensors(gan_loss)
    gan_loss.begin_step()
    gan_loss.backward(images(5, seed=1), images(5, seed=2), chunk_size=2)
    gan_loss.end_step()
    assert all(torch.equal(value, before[name]) for name, value in tensors(gan_loss).items())
    gan_loss.optimizer.step()
    gan_loss.network.power_iteration()
    after = tensors(gan_loss)
    for index in range(len(gan_loss.network.convolutions)):
        name = f"convolutions.{index}.parametrizations.weight"
        matrix = after[f"{name}.original"].flatten(1)  # of the updated weights
        assert not torch.equal(matrix, before[f"{name}.original"].flatten(1))
        left = nn.functional.normalize(matrix @ before[f"{name}.0._v"], dim=0)
        right = nn.functional.normalize(matrix.T @ left, dim=0)
        torch.testing.assert_close(after[f"{name}.0._u"], left, atol=1e-12, rtol=0)
        torch.testing.assert_close(after[f"{name}.0._v"], right, atol=1e-12, rtol=0)


def test_the_host_reads_no_value():
    """Reading a tensor on the meta device raises."""
    gan_loss = small_gan_loss("meta")
    real, fake = torch.empty(2, 5, 3, SIZE, SIZE, device="meta")
    gan_loss.generator_loss(real, fake.requires_grad_())
    assert gan_loss.backward(real, fake, chunk_size=2).is_meta


def test_the_adaptive_weight_by_hand():
    recon_grad, adv_grad = torch.tensor([[0.3, 0.0], [0.0, 0.4]]), torch.tensor([0.0, 2.0])
    assert adaptive_weight(recon_grad, adv_grad).item() == pytest.approx(0.5 / (2 + 1e-4))
    assert adaptive_weight(adv_grad, recon_grad).item() == 1
    assert adaptive_weight(recon_grad, 0 * adv_grad).item() == 1
    assert adaptive_weight(0 * recon_grad, adv_grad).item() == 0
    assert adaptive_weight(recon_grad.bfloat16(), adv_grad).dtype == torch.float32
