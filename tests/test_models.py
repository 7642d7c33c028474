"""The UNet and the VAE, compared with direct use of diffusers' classes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file

from musetalk.contract import MASK_TOP, MUSETALK_V1, RIGID
from musetalk.images import mask_lower_half, to_tensor
from musetalk.models import vae as vae_module
from musetalk.models.unet import UNet, build_unet, load_unet, sinusoid
from musetalk.models.vae import VAE, load_vae, posterior_noise
from musetalk.models.weights import WeightsError, fingerprint

CPU = torch.device("cpu")
FULL = Path(__file__).parents[1] / "models"


def parameters(module: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


# The UNet.


@pytest.fixture(scope="module")
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 8, 32, 32, generator=generator), torch.randn(2, 50, 64, generator=generator)


@pytest.mark.parametrize("positional_encoding", [True, False])
def test_unet_equals_diffusers_at_timestep_0(mini, inputs, positional_encoding):
    unet = build_unet(mini, 0, positional_encoding).eval()
    unet_input, window = inputs
    place, channel = np.arange(50)[:, None], np.arange(0, 64, 2)
    angle = place / 10_000 ** (channel / 64)
    positions = np.stack([np.sin(angle), np.cos(angle)], axis=-1).reshape(50, 64)  # sine, cosine in turn
    tokens = window + torch.tensor(positions, dtype=torch.float32) if positional_encoding else window
    with torch.no_grad():
        result = unet(unet_input, window)
        expected = unet.model(unet_input, torch.tensor([0]), encoder_hidden_states=tokens).sample
        at_500 = unet.model(unet_input, torch.tensor([500]), encoder_hidden_states=tokens).sample
    assert result.shape == (2, 4, 32, 32)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    assert (result - at_500).abs().max() > 1e-3


def test_positions_change_the_output(mini, inputs):
    with torch.no_grad():
        first, second = (build_unet(mini, 0, added).eval()(*inputs) for added in (True, False))
    assert (first - second).abs().max() > 1e-3


def test_sinusoid_by_hand():
    table = sinusoid(4, 6)
    assert table.shape == (4, 6)
    assert table[0].tolist() == [0, 1, 0, 1, 0, 1]
    np.testing.assert_allclose(table[3, :2], [np.sin(3), np.cos(3)], atol=1e-6)
    np.testing.assert_allclose(table[3, 4:], [np.sin(3 / 10_000 ** (4 / 6)), np.cos(3 / 10_000 ** (4 / 6))], atol=1e-6)
    assert torch.equal(sinusoid(9, 6)[:4], table)
    assert sinusoid(4, 5).shape == (4, 5)


def test_samples_of_a_batch_are_independent(mini, inputs):
    unet = build_unet(mini, 0, True).eval()
    unet_input, window = inputs
    with torch.no_grad():
        together, alone = unet(unet_input, window), unet(unet_input[1:], window[1:])
    torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=1e-5)


def test_last_layer_gradient_equals_autograd(mini, inputs):
    unet = build_unet(mini, 0, True)
    unet.keep_last_input()
    output = unet(*inputs)
    loss = (output[:1] * torch.linspace(-1, 1, 32)).sin().sum()  # of the first of two predictions
    expected, gradient = torch.autograd.grad(loss, [unet.model.conv_out.weight, output])
    torch.testing.assert_close(unet.last_layer_gradient(gradient[:1]), expected, atol=1e-5, rtol=1e-5)


def test_build_unet_is_seeded_and_leaves_the_global_generator_unchanged(mini):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = build_unet(mini, 7, True)
    assert torch.equal(torch.rand(3), expected)
    assert (
        fingerprint(first.model)
        == fingerprint(build_unet(mini, 7, False).model)
        != fingerprint(build_unet(mini, 8, True).model)
    )


def test_files_have_plain_names_and_no_positions(mini):
    unet = build_unet(mini, 0, True)
    names = set(unet.model.state_dict())
    assert {"conv_in.weight", "time_embedding.linear_1.weight", "conv_out.bias"} <= names
    assert set(unet.state_dict()) == {f"model.{name}" for name in names}


def test_saving_and_loading(mini, tmp_path, inputs):
    unet = build_unet(mini, 3, True).eval()
    torch.save(unet.model.state_dict(), tmp_path / "unet.pth")  # as the official trainer writes them
    reloaded = load_unet(mini, tmp_path / "unet.pth", True).eval()
    with torch.no_grad():
        assert torch.equal(unet(*inputs), reloaded(*inputs))


def test_the_full_unet_has_the_published_size_and_names():
    config = json.loads((FULL / "musetalk" / "musetalk.json").read_text())
    with torch.device("meta"):
        model = UNet2DConditionModel.from_config(config)
    assert parameters(model) == 849_947_844
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes["conv_in.weight"] == (320, 8, 3, 3) and shapes["conv_out.weight"] == (4, 320, 3, 3)
    assert shapes["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"] == (320, 384)
    assert len(shapes["mid_block.attentions.0.proj_in.weight"]) == 4
    assert UNet(model, True).positions.shape[1] == 384


@pytest.mark.parametrize(
    "change",
    [
        {"block_out_channels": [10**6, 10**6]},
        {"block_out_channels": "wide"},
        {"norm_num_groups": 0},
        {"down_block_types": ["Nonsense", "Nonsense"]},
        {"cross_attention_dim": -1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_an_invalid_configuration_is_refused_in_a_sentence(mini, tmp_path, change):
    (tmp_path / "musetalk").mkdir()
    path = tmp_path / "musetalk" / "musetalk.json"
    path.write_text(json.dumps(json.loads((mini / "musetalk" / "musetalk.json").read_text()) | change))
    for make in (lambda: build_unet(tmp_path, 0, True), lambda: load_unet(tmp_path, tmp_path / "none", True)):
        with pytest.raises(WeightsError) as caught:
            make()
        assert str(caught.value).startswith(f"{path} does not describe ") and "\n" not in str(caught.value)


# The VAE.


@pytest.fixture(scope="module")
def vae(mini) -> VAE:
    return load_vae(mini, CPU, torch.float32)


@pytest.fixture(scope="module")
def faces() -> list[np.ndarray]:
    """Nine different smooth images, BGR uint8 (256, 256, 3)."""
    y, x = np.mgrid[:256, :256]
    return [
        np.round(
            127 + 110 * np.stack([np.sin(x / (9 + k)), np.cos(y / (11 + k)), np.sin((x + k * y) / 23)], -1)
        ).astype(np.uint8)
        for k in range(9)
    ]


def moments(vae: VAE, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the posterior, computed with diffusers' layers."""
    with torch.no_grad():
        mean, logvar = vae.autoencoder.quant_conv(vae.autoencoder.encoder(images)).chunk(2, dim=1)
    return mean, torch.exp(0.5 * logvar.clamp(-30, 20))


def test_encode_returns_the_scaled_mode_or_sample(vae, faces):
    images = to_tensor(np.stack(faces[:2]))
    mean, std = moments(vae, images)
    noise = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    factor = json.loads((FULL / "mini" / "sd-vae-ft-mse" / "config.json").read_text())["scaling_factor"]
    assert std.min() > 0
    torch.testing.assert_close(vae.encode(images), mean * factor, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vae.encode(images, noise), (mean + std * noise) * factor, atol=1e-5, rtol=1e-5)
    assert vae.encode(images).dtype == torch.float32 and not vae.encode(images).requires_grad


def test_decode_divides_by_the_scaling_factor(vae):
    latents = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layers = vae.autoencoder.decoder(vae.autoencoder.post_quant_conv(latents / vae.scaling_factor))
        result = vae.decode(latents)
    assert result.shape == (1, 3, 256, 256) and result.dtype == torch.float32
    torch.testing.assert_close(result, layers, atol=1e-5, rtol=1e-5)


def test_gradients_reach_the_latents_but_no_weights(vae):
    latents = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    vae.decode(latents).square().mean().backward()
    assert latents.grad.abs().max() > 0 and torch.isfinite(latents.grad).all()
    assert all(weight.grad is None and not weight.requires_grad for weight in vae.autoencoder.parameters())
    assert not vae.autoencoder.training


def test_encode_clip_encodes_masked_and_full_crops(vae, faces):
    crops = [[faces[0]], None, [faces[1]]]
    masked_latents, latents = vae.encode_clip("a", crops, RIGID)
    assert masked_latents.shape == latents.shape == (3, 1, 4, 32, 32)
    assert masked_latents.dtype == latents.dtype == np.float16
    assert not masked_latents[1].any() and not latents[1].any()
    for frame in (0, 2):
        images = to_tensor(crops[frame][0][None])
        black = images.clone()
        black[:, :, MASK_TOP:] = -1
        expected = [(moments(vae, x)[0] * vae.scaling_factor).half().numpy()[0] for x in (black, images)]
        np.testing.assert_allclose(masked_latents[frame, 0], expected[0], atol=2e-3, rtol=1e-3)
        np.testing.assert_allclose(latents[frame, 0], expected[1], atol=2e-3, rtol=1e-3)
    assert np.abs(masked_latents[0, 0, :, 20:].astype(float) - latents[0, 0, :, 20:]).max() > 0.1


def test_variants_keep_their_order(vae, faces):
    contract = replace(RIGID, margins=(0, 10))
    masked_latents, latents = vae.encode_clip("a", [[faces[0], faces[1]], None, [faces[2], faces[3]]], contract)
    for frame, variant, face in ((0, 0, 0), (0, 1, 1), (2, 0, 2), (2, 1, 3)):
        first = vae.encode_clip("a", [[faces[face]]], RIGID)
        np.testing.assert_array_equal(masked_latents[frame, variant], first[0][0, 0])
        np.testing.assert_array_equal(latents[frame, variant], first[1][0, 0])


@pytest.mark.parametrize("posterior", ["mode", "sample"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latents_are_bit_identical_for_any_batch_size(monkeypatch, mini, faces, posterior, dtype):
    """With one thread, as the datasets script and conftest.py set it."""
    assert torch.get_num_threads() == 1
    vae = load_vae(mini, CPU, dtype)
    contract = replace(RIGID, posterior=posterior)
    crops = [[face] for face in faces[:8]]
    crops[4] = None
    result = []
    for size in (1, 3, 8):
        monkeypatch.setattr(vae_module, "ENCODE_BATCH", {"cpu": size})
        result.append(vae.encode_clip("a", iter(crops), contract))
    for other in result[1:]:
        np.testing.assert_array_equal(result[0], other)


def test_latents_do_not_depend_on_other_frames(vae, faces):
    first = vae.encode_clip("a", [[face] for face in faces[:4]], RIGID)
    second = vae.encode_clip("a", [None, [faces[1]], [faces[8]], None], RIGID)
    np.testing.assert_array_equal(first[0][1], second[0][1])
    np.testing.assert_array_equal(first[1][1], second[1][1])


def test_posterior_samples_depend_on_clip_frame_and_margin_only(vae, faces):
    contract = replace(MUSETALK_V1, margins=(0, 10))
    crops = [[faces[0], faces[0]], [faces[0], faces[0]]]
    latents = vae.encode_clip("a", crops, contract)[1]
    np.testing.assert_array_equal(latents, vae.encode_clip("a", crops, contract)[1])
    others = vae.encode_clip("b", crops, contract)[1]
    samples = [latents[0, 0], latents[0, 1], latents[1, 0], latents[1, 1], others[0, 0]]
    assert len({array.tobytes() for array in samples}) == 5
    alone = vae.encode_clip("a", [None, crops[1]], replace(contract, margins=(10, 0)))[1]
    np.testing.assert_array_equal(alone[1, ::-1], latents[1])  # a margin's noise is its own, whatever its place


def test_posterior_samples_by_formula(vae, faces):
    masked_latents, latents = vae.encode_clip("clip", [None, [faces[3]]], MUSETALK_V1)
    noise = torch.from_numpy(posterior_noise("clip", 1, 0))
    images = to_tensor(faces[3][None])
    for result, shown, samples in ((masked_latents, mask_lower_half(images), noise[0]), (latents, images, noise[1])):
        mean, std = moments(vae, shown)
        np.testing.assert_allclose(result[1, 0], ((mean + std * samples) * vae.scaling_factor)[0], atol=2e-3, rtol=1e-3)


def test_posterior_noise_is_normal_and_uncorrelated():
    samples = np.stack([posterior_noise("a", frame, margin) for frame in range(5) for margin in (0, 10)])
    assert samples.shape == (10, 2, 4, 32, 32) and samples.dtype == np.float32
    assert abs(samples.mean()) < 0.02 and abs(samples.std() - 1) < 0.02
    apart = np.corrcoef(samples.reshape(20, -1)) - np.eye(20)
    assert np.abs(apart).max() < 0.1


def test_fingerprint_does_not_depend_on_dtype_or_memory_format(mini, vae):
    other = load_vae(mini, CPU, torch.bfloat16, torch.contiguous_format)
    assert other.fingerprint == vae.fingerprint and other.autoencoder.dtype == torch.bfloat16


def test_a_missing_vae_is_reported(tmp_path):
    with pytest.raises(WeightsError, match="sd-vae-ft-mse/.* is missing"):
        load_vae(tmp_path, CPU, torch.float32)


def test_the_full_vae_has_the_published_size():
    """Stable Diffusion's AutoencoderKL has 83,653,863 parameters."""
    config = json.loads((FULL / "sd-vae-ft-mse" / "config.json").read_text())
    with torch.device("meta"):
        model = AutoencoderKL.from_config(config)
        expected = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
    assert parameters(model) == parameters(expected) == 83_653_863
    assert model.config.scaling_factor == 0.18215
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in expected.state_dict().items()}


def test_the_published_names_of_the_vaes_attention_are_loaded(tmp_path):
    """The names before diffusers changed them. The small VAE has no such layers."""
    folder = tmp_path / "sd-vae-ft-mse"
    torch.manual_seed(0)
    original = AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    original.save_config(folder)
    new_names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    tensors = {}
    for name, tensor in original.state_dict().items():
        for new, old in new_names.items():
            name = name.replace(new, old)
        tensors[name] = tensor
    assert "encoder.mid_block.attentions.0.query.weight" in tensors
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    loaded = load_vae(tmp_path, torch.device("cpu"), torch.float32).autoencoder.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in original.state_dict().items())
