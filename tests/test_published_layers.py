"""The networks of published weights against formulas written out here."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from musetalk.models.face_parser import CLASSES, BiSeNet, FaceParser
from musetalk.models.lpips import EPS, LPIPS, SCALE, SHIFT, VGG16, Heads
from musetalk.models.syncnet import StableSyncNet, Wav2LipSyncNet
from musetalk.models.syncnet.stable import AttentionBlock, EncoderConfig, ResnetBlock, StableConfig

SMALL = StableConfig(
    resolution=16,
    visual_encoder=EncoderConfig(6, (32, 32, 64, 256), ((1, 2), 2, 2, 2), (0, 0, 1, 0)),
    audio_encoder=EncoderConfig(1, (32, 32, 64, 256), ((2, 1), 2, 2, (10, 1)), (0, 0, 1, 0)),
)


def random_tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_weights(network: nn.Module, seed: int = 0) -> nn.Module:
    """Returns the network in eval mode with random tensors, including batch norm statistics."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in network.state_dict().items():
        if not tensor.is_floating_point():
            tensor.fill_(7)
        elif name.endswith("running_var") or tensor.ndim == 1 and name.endswith("weight"):
            tensor.uniform_(0.5, 1.5, generator=generator)
        else:
            tensor.normal_(0, (2 / max(1, tensor[0].numel())) ** 0.5 if tensor.ndim > 1 else 0.1, generator=generator)
    return network.eval()


@pytest.fixture(scope="module")
def colour() -> Wav2LipSyncNet:
    return random_weights(Wav2LipSyncNet())


@pytest.fixture(scope="module")
def stable() -> StableSyncNet:
    return random_weights(StableSyncNet(SMALL))


@pytest.fixture(scope="module")
def parser() -> BiSeNet:
    return random_weights(BiSeNet())


def norm(x: torch.Tensor, tensors: dict, name: str) -> torch.Tensor:
    mean, var, weight, bias = (tensors[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
    return functional.batch_norm(x, mean, var, weight, bias)


def test_wav2lips_expert_layer_by_layer(colour):
    tensors = colour.state_dict()
    layers = {  # stride and padding of each block, None for a residual one
        "face": [(1, 3), ((1, 2), 1), None, None, (2, 1), None, None, None, (2, 1), None, None, (2, 1), None, None]
        + [(2, 1), (1, 0), (1, 0)],
        "audio": [(1, 1), None, None, ((3, 1), 1), None, None, (3, 1), None, None, ((3, 2), 1), None, None]
        + [(1, 0), (1, 0)],
    }
    images, mel = random_tensor(2, 5, 3, 96, 96).clamp(-1, 1), random_tensor(2, 16, 80, seed=1)
    bgr = images[:, :, [2, 1, 0], 48:].add(1).div(2)
    inputs = {"face": torch.cat([bgr[:, k] for k in range(5)], 1), "audio": mel.permute(0, 2, 1)[:, None]}
    with torch.no_grad():
        result = colour.embed(images, mel)
    for x, (encoder, blocks) in zip(result, layers.items(), strict=True):
        y = inputs[encoder]
        for index, block in enumerate(blocks):
            name = f"{encoder}_encoder.{index}.conv_block"
            stride, padding = block or (1, 1)
            z = functional.conv2d(y, tensors[f"{name}.0.weight"], tensors[f"{name}.0.bias"], stride, padding)
            y = (norm(z, tensors, f"{name}.1") + (0 if block else y)).clamp(min=0)
        y = y.reshape(2, 512)
        torch.testing.assert_close(x, y / y.square().sum(1, keepdim=True).sqrt())


@pytest.mark.parametrize("kind", ["colour", "stable"])
def test_embeddings_are_unit_vectors_and_independent_of_the_batch(request, kind):
    network = request.getfixturevalue(kind)
    images, mel = random_tensor(3, network.frames, 3, 64, 48), random_tensor(3, network.mel_frames, 80, seed=1)
    with torch.no_grad():
        together = network.embed(images, mel)
        alone = network.embed(images[1:2], mel[1:2])
    for x, y in zip(together, alone, strict=True):
        torch.testing.assert_close(x.norm(dim=1), torch.ones(3))
        assert x.min() >= 0 and (x[0] - x[1]).abs().max() > 1e-4
        torch.testing.assert_close(x[1:2], y)


@pytest.mark.parametrize("kind", ["colour", "stable"])
def test_gradients_reach_all_of_the_lower_half_only(request, kind):
    network = request.getfixturevalue(kind)
    middle = 3 * network.image_size // 2  # of images three times as large as it takes
    images = random_tensor(1, network.frames, 3, 2 * middle, 2 * middle).clamp(-0.9, 0.9).requires_grad_()
    network.embed_faces(images)[0, ::3].sum().backward()
    assert not images.grad[:, :, :, : middle - 3].any()
    assert images.grad[:, :, :, middle:].ne(0).float().mean() > 0.99


@pytest.mark.parametrize(
    "kind, expected", [("colour", [(0.5 * k + 1) / 2 for k in (-1, 0, 1)]), ("stable", [0.5, 0, -0.5])]
)
def test_colour_format_and_order_of_the_frames(request, kind, expected):
    network = request.getfixturevalue(kind)
    captured = []
    hook = network.face_encoder.register_forward_pre_hook(lambda _, args: captured.append(args[0]))
    images = torch.tensor([0.5, 0, -0.5])[:, None, None].expand(1, network.frames, 3, 300, 200).clone()
    images[:, 1:] = 2  # later frames are white, beyond what can be shown
    network.embed_faces(images)
    hook.remove()
    (faces,) = captured
    assert faces.shape == (1, 3 * network.frames, network.image_size // 2, network.image_size)
    torch.testing.assert_close(faces[0, :3, 4, 4], torch.tensor(expected, dtype=torch.float32))
    torch.testing.assert_close(faces[0, 3:], torch.ones_like(faces[0, 3:]))


@pytest.mark.parametrize("inputs", [32, 64])
def test_a_residual_block_by_its_formula(inputs):
    block = random_weights(ResnetBlock(inputs, 64, 1))
    tensors = block.state_dict()
    assert ("conv_shortcut.weight" in tensors) == (inputs != 64)
    x = 1e-3 * random_tensor(2, inputs, 6, 10)  # so small that the epsilon of the norms matters
    y = x
    for layer in "12":
        norm, conv = ([tensors[f"{kind}{layer}.{name}"] for name in ("weight", "bias")] for kind in ("norm", "conv"))
        y = functional.conv2d(functional.silu(functional.group_norm(y, 32, *norm, 1e-6)), *conv, padding=1)
    shortcut = functional.conv2d(x, *block.conv_shortcut.parameters()) if inputs != 64 else x
    with torch.no_grad():
        torch.testing.assert_close(block(x), y + shortcut)


@pytest.mark.parametrize(
    "factor, size, pads",
    [(2, (3, 5), (0, 1, 0, 1)), ((1, 2), (6, 5), (0, 1, 1, 1)), ((2, 1), (3, 10), (1, 1, 0, 1))],
)
def test_padding_of_the_strided_convolution(factor, size, pads):
    block = random_weights(ResnetBlock(32, 32, factor))
    x = random_tensor(1, 32, 6, 10)
    with torch.no_grad():
        result = block(x)
        weight, bias = block.downsample_conv.parameters()
        block.downsample_conv = None
        torch.testing.assert_close(result, functional.conv2d(functional.pad(block(x), pads), weight, bias, factor))
    assert result.shape == (1, 32, *size)


def test_an_attention_block_by_its_formula():
    block = random_weights(AttentionBlock(64))
    tensors = block.state_dict()

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    x = 1e-3 * random_tensor(2, 64, 3, 5)
    with torch.no_grad():
        tokens = block.conv_in(functional.group_norm(x, 32, block.norm1.weight, block.norm1.bias, 1e-6))
        tokens = tokens.permute(0, 2, 3, 1).reshape(2, 15, 64)
        normed = functional.layer_norm(tokens, (64,), block.norm2.weight, block.norm2.bias, 1e-5)
        q, k, v = (linear(normed, f"attn.to_{name}").reshape(2, 15, 8, 8).transpose(1, 2) for name in "qkv")
        weights = (q @ k.transpose(2, 3) / 8**0.5).softmax(dim=-1)
        tokens = tokens + linear((weights @ v).transpose(1, 2).reshape(2, 15, 64), "attn.to_out.0")
        normed = functional.layer_norm(tokens, (64,), block.norm3.weight, block.norm3.bias, 1e-5)
        values, gate = linear(normed, "ff.net.0.proj").chunk(2, dim=-1)
        tokens = tokens + linear(values * functional.gelu(gate), "ff.net.2")
        expected = x + block.conv_out(tokens.reshape(2, 3, 5, 64).permute(0, 3, 1, 2))
        torch.testing.assert_close(block(x), expected)


def test_a_stable_syncnet_by_its_blocks(stable):
    images, mel = 1e-3 * random_tensor(2, 2, 3, 16, 16), 1e-3 * random_tensor(2, 7, 80, seed=1)
    inputs = images[:, :, :, 8:].flatten(1, 2), mel.transpose(1, 2).unsqueeze(1)
    with torch.no_grad():
        for encoder, x, result in zip(
            (stable.visual_encoder, stable.audio_encoder), inputs, stable.embed(images, mel), strict=True
        ):
            x = nn.Sequential(encoder.conv_in, *encoder.down_blocks)(x)
            x = (
                functional.group_norm(x, 32, encoder.norm_out.weight, encoder.norm_out.bias, 1e-6)
                .relu()
                .reshape(2, 256)
            )
            torch.testing.assert_close(result, x / x.square().sum(1, keepdim=True).sqrt())


def test_the_parser_layer_by_layer(parser):
    tensors = parser.state_dict()

    def conv(x, name, stride=1):
        weight = tensors[f"{name}.weight"]
        return functional.conv2d(x, weight, None, stride, weight.shape[2] // 2)

    def block(x, name):
        return norm(conv(x, f"{name}.conv"), tensors, f"{name}.bn").relu()

    def refined(x, name):
        y = block(x, name + ".conv")
        return y * norm(conv(y.mean((2, 3), True), f"{name}.conv_atten"), tensors, f"{name}.bn_atten").sigmoid()

    images, features = random_tensor(1, 3, 64, 96), []
    x = norm(conv(images, "cp.resnet.conv1", 2), tensors, "cp.resnet.bn1").relu()
    x = functional.max_pool2d(x, 3, 2, 1)
    for layer in range(1, 5):
        for index in range(2):
            name, stride = f"cp.resnet.layer{layer}.{index}", 2 if layer > 1 and index == 0 else 1
            y = norm(conv(x, f"{name}.conv1", stride), tensors, f"{name}.bn1").relu()
            y = norm(conv(y, f"{name}.conv2"), tensors, f"{name}.bn2")
            if stride == 2:
                x = norm(conv(x, f"{name}.downsample.0", 2), tensors, f"{name}.downsample.1")
            x = (x + y).relu()
        features.append(x)
    _, eighth, sixteenth, last = features
    x = refined(last, "cp.arm32") + block(last.mean((2, 3), True), "cp.conv_avg")
    x = block(x.repeat_interleave(2, 2).repeat_interleave(2, 3), "cp.conv_head32") + refined(sixteenth, "cp.arm16")
    x = block(x.repeat_interleave(2, 2).repeat_interleave(2, 3), "cp.conv_head16")
    x = block(torch.cat([eighth, x], 1), "ffm.convblk")
    x = x + x * conv(conv(x.mean((2, 3), True), "ffm.conv1").relu(), "ffm.conv2").sigmoid()
    x = conv(block(x, "conv_out.conv"), "conv_out.conv_out")
    expected = functional.interpolate(x, (64, 96), mode="bilinear", align_corners=True)
    with torch.no_grad():
        torch.testing.assert_close(parser(images), expected)


def test_the_parser_normalises_and_resizes_images(parser):
    captured = []
    hook = parser.register_forward_pre_hook(lambda _, args: captured.append(args[0]))
    image = -torch.ones(1, 3, 40, 3 * 512)
    image[:, 0, :, 1::3] = 1  # red, a third of the columns
    classes = FaceParser(parser)(image)
    hook.remove()
    assert classes.shape == (1, 512, 512) and classes.dtype == torch.uint8
    with torch.no_grad():
        assert torch.equal(classes, parser(captured[0]).argmax(1).byte())
    expected = torch.tensor([(1 / 3 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225])
    torch.testing.assert_close(captured[0][0, :, 100, 100], expected)
    names = {1: "skin", 10: "nose", 11: "mouth", 12: "upper_lip", 13: "lower_lip", 14: "neck", 17: "hair"}
    assert len(CLASSES) == 19 and {index: CLASSES[index] for index in names} == names


@pytest.fixture
def hand_lpips() -> LPIPS:
    """LPIPS whose convolutions pass red and green on; the head of stage k weights them k + 1 and 2."""
    trunk, heads = VGG16((2,) * 5).double(), Heads((2,) * 5).double()
    for tensor in trunk.state_dict().values():
        tensor.zero_()
        if tensor.ndim == 4:
            tensor[0, 0, 1, 1] = tensor[1, 1, 1, 1] = 1
    for index, head in enumerate(heads.state_dict().values()):
        head[0, :, 0, 0] = torch.tensor([index + 1, 2])
    return LPIPS(trunk, heads)


def painted(red: float, green: float) -> torch.Tensor:
    """A uniform image with these values after normalisation."""
    values = [value * scale + shift for value, scale, shift in zip((red, green, 0), SCALE, SHIFT, strict=True)]
    return torch.tensor(values, dtype=torch.float64)[None, :, None, None].expand(1, 3, 16, 16).clone()


def test_lpips_by_hand(hand_lpips):
    """(3, 4) and (4, 3), both of length 5, differ by 0.2 per channel once normalised; ReLU removes negative values."""
    result = hand_lpips(painted(3, 4), painted(4, 3))
    assert result.dtype == torch.float64
    assert result.item() == pytest.approx((1 + 2 + 3 + 4 + 5 + 5 * 2) * 0.04, rel=1e-8)
    # One image is only red, the other only green: squared differences of 1 each.
    assert hand_lpips(painted(1, -1), painted(-1, 1)).item() == pytest.approx(25, rel=1e-7)
    # Compared with black, the norm of the other image remains, here a small one.
    share = 1e-8 / (1e-8 + EPS)
    assert hand_lpips(painted(1e-4, -1), painted(-1, -1)).item() == pytest.approx(15 * share, rel=1e-6)
    both = hand_lpips(torch.cat([painted(3, 4), painted(1, 1)]), torch.cat([painted(4, 3), painted(1, 1)]))
    assert both.tolist() == pytest.approx([1.0, 0.0])


def test_lpips_is_a_distance():
    lpips = LPIPS(random_weights(VGG16((4, 4, 8, 8, 8))), random_weights(Heads((4, 4, 8, 8, 8))))
    for head in lpips.heads.parameters():
        head.abs_()
    first, second = random_tensor(2, 2, 3, 32, 48).clamp(-1, 1)
    assert torch.equal(lpips(first, first), torch.zeros(2))
    torch.testing.assert_close(lpips(first, second), lpips(second, first))
    assert (lpips(first, second) > 1e-3).all()
    assert (lpips(first, 0.9 * first + 0.1 * second) < lpips(first, 0.5 * first + 0.5 * second)).all()
    torch.testing.assert_close(lpips(first, second)[1:], lpips(first[1:], second[1:]))


def test_gradients_of_lpips_are_finite_and_reach_no_weights(hand_lpips):
    first = painted(3, 4)
    first[..., :8] = painted(-1, -1)[..., :8]
    first.requires_grad_()
    hand_lpips.train()(first, painted(4, 3)).sum().backward()
    assert torch.isfinite(first.grad).all() and first.grad[:, :2, :, 8:].all() and not first.grad[:, 2].any()
    assert all(weight.grad is None for weight in hand_lpips.parameters())
