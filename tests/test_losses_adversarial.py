"""The discriminator by its sizes, both sides' losses by hand, its step in chunks against the whole."""

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


def small_adversary(device: str = "cpu") -> GANLoss:
    """The same one each time: narrow, in float64."""
    torch.manual_seed(0)
    with torch.device(device):
        network = PatchDiscriminator(width=4, layers=2).double()
    return GANLoss(network, torch.optim.SGD(network.parameters(), lr=0.5))


def images(count: int, seed: int) -> torch.Tensor:
    """(count, 3, 32, 32) in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, SIZE, SIZE, dtype=torch.float64, generator=generator) * 2 - 1


def tensors(adversary: GANLoss) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in adversary.network.state_dict().items()}


def gradients(adversary: GANLoss) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in adversary.network.parameters()]


class Mean(nn.Module):
    """Logit: an image's mean times `gain`. Features: its red, and twice the image. Values for a hand."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return self.gain * x.mean(dim=(1, 2, 3), keepdim=True), [self.gain * x[:, :1], 2 * self.gain * x]


@pytest.fixture
def mean_adversary() -> GANLoss:
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
    network = small_adversary().network
    logits, features = network(images(2, seed=1))
    for before, after, convolution in zip(features, features[1:], network.convolutions[1:], strict=False):
        torch.testing.assert_close(nn.functional.leaky_relu(convolution(before), 0.2), after)
    torch.testing.assert_close(network.convolutions[-1](features[-1]), logits)


def test_every_weight_is_divided_by_its_largest_singular_value():
    network = small_adversary().network
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


def test_hinge_by_hand(mean_adversary):
    """real: relu(1 - 2), relu(1 - 0.5); fake: relu(1 - 3), relu(1 + 0)."""
    loss = mean_adversary.discriminator_loss(flat(2, 0.5), flat(-3, 0))
    assert loss.item() == (0 + 0.5) / 2 + (0 + 1) / 2
    loss.backward()
    assert mean_adversary.network.gain.grad.item() == -0.5 / 2 + 0 / 2
    assert mean_adversary.discriminator_loss(flat(1), flat(-1)).item() == 0
    assert mean_adversary.discriminator_loss(flat(-1), flat(1)).item() == 4


def test_generator_loss_by_hand(mean_adversary):
    """Layers count alike, whatever their sizes: red is 0.5 and 1 apart, twice the image 1 and 2."""
    adv, feat_match = mean_adversary.generator_loss(flat(1, 1), flat(0.5, 2))
    assert adv.item() == -(0.5 + 2) / 2
    assert feat_match.item() == (0.75 + 1.5) / 2
    assert mean_adversary.generator_loss(flat(2), flat(2))[1].item() == 0


def test_losses_have_the_gradients_of_their_finite_differences():
    adversary = small_adversary()
    real, fake = images(2, seed=1), images(2, seed=2)
    spot = fake[:, :, 10:13, 10:13].clone().requires_grad_()

    def losses(spot):
        image = fake.clone()
        image[:, :, 10:13, 10:13] = spot
        return adversary.generator_loss(real, image)

    assert torch.autograd.gradcheck(losses, spot)

    convolution = adversary.network.convolutions[1]
    parameters = {
        "convolutions.1.bias": convolution.bias,
        "convolutions.1.parametrizations.weight.original": convolution.parametrizations.weight.original,
    }

    def discriminator_loss(*values):
        changed = dict(zip(parameters, values, strict=True))
        network = partial(torch.func.functional_call, adversary.network, changed)
        return GANLoss(network, adversary.optimizer).discriminator_loss(real, fake)

    assert torch.autograd.gradcheck(discriminator_loss, tuple(parameters.values()), fast_mode=True)


@pytest.mark.parametrize("which", [0, 1])
def test_the_generators_loss_reaches_the_fake_and_nothing_else(which):
    adversary = small_adversary()
    before = tensors(adversary)
    real, fake = images(2, seed=1).requires_grad_(), images(2, seed=2).requires_grad_()
    adversary.generator_loss(real, fake)[which].backward()
    assert fake.grad.abs().sum() > 0 and real.grad is None
    assert all(parameter.grad is None for parameter in adversary.network.parameters())
    after = tensors(adversary)
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_the_discriminators_loss_reaches_its_weights_and_no_image():
    """Also after a generator's loss, during which they were frozen."""
    adversary = small_adversary()
    real, fake = images(2, seed=1).requires_grad_(), images(2, seed=2).requires_grad_()
    adversary.generator_loss(real, fake)
    adversary.discriminator_loss(real, fake).backward()
    last = adversary.network.convolutions[-1].bias
    assert last.grad.abs() < 1e-10  # real images pull it up as fake ones pull it down
    assert all(
        parameter.grad.abs().sum() > 1e-10 for parameter in adversary.network.parameters() if parameter is not last
    )
    assert real.grad is None and fake.grad is None


def test_losses_are_taken_in_float32_at_least():
    """In bfloat16 the mean of 1 and 1.0039 would be 1."""
    adversary = small_adversary()
    assert adversary.discriminator_loss(images(1, 0), images(1, 1)).dtype == torch.float64
    halves = Mean().bfloat16()
    logits = flat(-1, -1.0078125).bfloat16()
    adv, feat_match = GANLoss(halves, torch.optim.SGD(halves.parameters())).generator_loss(logits, logits)
    assert adv.item() == 1.00390625 and feat_match.dtype == torch.float32


# The discriminator's step.


@given(count=st.integers(1, 7), chunk_size=st.integers(1, 8), batches=st.integers(1, 2))
def test_a_step_in_chunks_is_that_of_the_whole(count, chunk_size, batches):
    """Gradients, the norm, new weights and spectral norms, also over several batches."""
    whole, chunked = small_adversary(), small_adversary()
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
    for adversary in (whole, chunked):
        adversary.clip(0.1)
        adversary.update()
    torch.testing.assert_close(tensors(chunked), tensors(whole), atol=1e-10, rtol=0)


@pytest.mark.parametrize("chunk_size", [1, 2, 5])
def test_spectral_norms_move_once_a_step_whatever_the_chunks(chunk_size):
    adversary = small_adversary()
    before = tensors(adversary)
    adversary.backward(images(5, seed=1), images(5, seed=2), chunk_size)
    after = tensors(adversary)
    assert all(torch.equal(after[name], before[name]) for name in before)
    adversary.update()
    after = tensors(adversary)
    adversary.generator_loss(images(1, seed=1), images(1, seed=2))
    assert all(torch.equal(value, after[name]) for name, value in tensors(adversary).items())
    for index in range(len(adversary.network.convolutions)):
        name = f"convolutions.{index}.parametrizations.weight"
        matrix = after[f"{name}.original"].flatten(1)  # of the new weights
        assert not torch.equal(matrix, before[f"{name}.original"].flatten(1))
        left = nn.functional.normalize(matrix @ before[f"{name}.0._v"], dim=0)
        right = nn.functional.normalize(matrix.T @ left, dim=0)
        torch.testing.assert_close(after[f"{name}.0._u"], left, atol=1e-12, rtol=0)
        torch.testing.assert_close(after[f"{name}.0._v"], right, atol=1e-12, rtol=0)


def test_clip_and_update_by_hand(mean_adversary, monkeypatch):
    monkeypatch.setattr(Mean, "power_iteration", lambda self: None, raising=False)
    assert mean_adversary.backward(flat(0.5, 0.5), flat(-0.75, -3), chunk_size=1).item() == 0.5 + 0.125
    norm = mean_adversary.clip(0.25)  # of a gradient -0.5 - 0.375
    assert norm.item() == 0.875
    mean_adversary.update()
    assert mean_adversary.network.gain.item() == pytest.approx(1 + 0.25, rel=1e-5)
    assert mean_adversary.network.gain.grad is None


def test_a_gradient_that_is_not_finite_shows_before_the_update():
    adversary = small_adversary()
    before = tensors(adversary)
    adversary.backward(images(1, seed=1), torch.full((1, 3, SIZE, SIZE), float("nan")), chunk_size=1)
    assert not torch.isfinite(adversary.clip(1.0))
    assert all(torch.equal(value, before[name]) for name, value in tensors(adversary).items())


def test_the_host_reads_nothing():
    """Tensors on the meta device have no values that it could read."""
    adversary = small_adversary("meta")
    real, fake = torch.empty(2, 5, 3, SIZE, SIZE, device="meta")
    adversary.generator_loss(real, fake.requires_grad_())
    assert adversary.backward(real, fake, chunk_size=2).is_meta
    assert adversary.clip(1.0).is_meta
    adversary.update()


def test_it_learns_to_tell_bright_from_dark():
    torch.manual_seed(0)
    network = PatchDiscriminator(width=4, layers=2)
    adversary = GANLoss(network, torch.optim.Adam(network.parameters(), lr=1e-2))
    losses = []
    for seed in range(40):
        real, fake = images(4, seed=seed).float() / 2 + 0.3, images(4, seed=100 + seed).float() / 2 - 0.3
        losses.append(adversary.backward(real, fake, chunk_size=2).item())
        adversary.clip(1.0)
        adversary.update()
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
    pull, push = torch.tensor([[0.3, 0.0], [0.0, 0.4]]), torch.tensor([0.0, 2.0])
    assert adaptive_weight(pull, push).item() == pytest.approx(0.5 / (2 + 1e-4))
    assert adaptive_weight(push, pull).item() == 1
    assert adaptive_weight(pull, 0 * push).item() == 1
    assert adaptive_weight(0 * pull, push).item() == 0
    assert adaptive_weight(pull.bfloat16(), push).dtype == torch.float32
