"""The VAE, compared with direct use of diffusers' class."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from hostile import refusal
from safetensors.torch import load_file, save_file

from musetalk.contract import MASK_TOP, MUSETALK_V1, RIGID
from musetalk.images import mask_lower_half, to_tensor
from musetalk.models import vae as vae_module
from musetalk.models.vae import VAE, load_vae, posterior_noise

CPU = torch.device("cpu")
FULL = Path(__file__).parents[1] / "models"


@pytest.fixture(scope="module")
def vae(small_models) -> VAE:
    return load_vae(small_models, CPU, torch.float32)


@pytest.fixture(scope="module")
def faces() -> list[np.ndarray]:
    """Four different smooth images, BGR uint8 (256, 256, 3)."""
    y, x = np.mgrid[:256, :256]
    waves = [[np.sin(x / (9 + k)), np.cos(y / (11 + k)), np.sin((x + k * y) / 23)] for k in range(4)]
    return [np.round(127 + 110 * np.stack(channels, -1)).astype(np.uint8) for channels in waves]


def moments(vae: VAE, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the posterior, computed with diffusers' layers."""
    with torch.no_grad():
        mean, logvar = vae.autoencoder.quant_conv(vae.autoencoder.encoder(images)).chunk(2, dim=1)
    return mean, torch.exp(0.5 * logvar.clamp(-30, 20))


def test_encode_returns_the_scaled_mode_or_sample(vae, faces):
    images = to_tensor(np.stack(faces[:2]))
    mean, std = moments(vae, images)
    noise = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    assert std.min() > 0
    torch.testing.assert_close(vae.encode(images), mean * 0.18215, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vae.encode(images, noise), (mean + std * noise) * 0.18215, atol=1e-5, rtol=1e-5)
    assert vae.encode(images).dtype == torch.float32 and not vae.encode(images).requires_grad


def test_decode_divides_by_the_scaling_factor(vae):
    latents = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layers = vae.autoencoder.decoder(vae.autoencoder.post_quant_conv(latents / 0.18215))
        result = vae.decode(latents)
    assert result.shape == (1, 3, 256, 256) and result.dtype == torch.float32
    torch.testing.assert_close(result, layers, atol=1e-5, rtol=1e-5)


def test_gradients_reach_the_latents_but_no_weights(vae):
    latents = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    vae.decode(latents).square().mean().backward()
    assert latents.grad.abs().max() > 0 and torch.isfinite(latents.grad).all()
    assert all(weight.grad is None and not weight.requires_grad for weight in vae.autoencoder.parameters())
    assert not vae.autoencoder.training


# Clips.


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
    assert np.abs(masked_latents[0, 0, :, 20:].astype(float) - latents[0, 0, :, 20:]).max() > 0.05


def test_variants_keep_their_order(vae, faces):
    contract = replace(RIGID, margins=(0, 10))
    masked_latents, latents = vae.encode_clip("a", [[faces[0], faces[1]], None, [faces[2], faces[3]]], contract)
    for frame, variant, face in ((0, 0, 0), (0, 1, 1), (2, 0, 2), (2, 1, 3)):
        first = vae.encode_clip("a", [[faces[face]]], RIGID)
        np.testing.assert_array_equal(masked_latents[frame, variant], first[0][0, 0])
        np.testing.assert_array_equal(latents[frame, variant], first[1][0, 0])


@pytest.mark.parametrize("posterior", ["mode", "sample"])
def test_latents_are_bit_identical_for_any_batch_and_clip_length(monkeypatch, vae, faces, posterior):
    """With one thread, as the datasets script and conftest.py set it."""
    assert torch.get_num_threads() == 1
    contract = replace(RIGID, posterior=posterior)
    crops = [[faces[0]], None, [faces[1]], [faces[2]]]
    result = []
    for size in (1, 3):
        monkeypatch.setattr(vae_module, "ENCODE_BATCH", {"cpu": size})
        result.append(vae.encode_clip("a", iter(crops), contract))
    np.testing.assert_array_equal(*result)
    alone = vae.encode_clip("a", [None, None, [faces[1]]], contract)
    np.testing.assert_array_equal(np.array(alone)[:, 2], np.array(result[0])[:, 2])


# Samples of the posterior.


def test_posterior_samples_depend_on_clip_frame_and_margin_only(vae, faces):
    contract = replace(MUSETALK_V1, margins=(0, 10))
    crops = [[faces[0], faces[0]], [faces[0], faces[0]]]
    latents = vae.encode_clip("a", crops, contract)[1]
    np.testing.assert_array_equal(latents, vae.encode_clip("a", crops, contract)[1])
    others = vae.encode_clip("b", crops, contract)[1]
    samples = [latents[0, 0], latents[0, 1], latents[1, 0], latents[1, 1], others[0, 0]]
    assert len({array.tobytes() for array in samples}) == 5
    reversed_margins = vae.encode_clip("a", [None, crops[1]], replace(contract, margins=(10, 0)))[1]
    np.testing.assert_array_equal(reversed_margins[1, ::-1], latents[1])


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
    correlations = np.corrcoef(samples.reshape(20, -1)) - np.eye(20)
    assert np.abs(correlations).max() < 0.1


# Files.


def test_the_fingerprint_does_not_depend_on_dtype_or_memory_format(small_models, vae):
    other = load_vae(small_models, CPU, torch.bfloat16, torch.contiguous_format)
    assert other.fingerprint == vae.fingerprint and other.autoencoder.dtype == torch.bfloat16


def test_the_full_vae_has_the_published_size_and_names():
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
    assert sum(weight.numel() for weight in model.parameters()) == 83_653_863
    assert model.config.scaling_factor == 0.18215
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in expected.state_dict().items()}


def test_the_published_names_of_the_attention_are_loaded(small_models, vae, tmp_path):
    """The published files have the names of an earlier version of diffusers."""
    folder = Path(shutil.copytree(small_models / "sd-vae-ft-mse", tmp_path / "sd-vae-ft-mse"))
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        tensors = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in tensors.items()}
    assert "encoder.mid_block.attentions.0.proj_attn.bias" in tensors
    save_file(tensors, path)
    assert load_vae(tmp_path, CPU, torch.float32).fingerprint == vae.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"_class_name": "UNet2DConditionModel"},
        {"latent_channels": "4"},
        *({"scaling_factor": value} for value in (0, math.inf, math.nan, None)),
    ],
    ids=repr,
)
def test_an_unsuitable_configuration_is_refused_in_one_sentence(small_models, tmp_path, change):
    folder = Path(shutil.copytree(small_models / "sd-vae-ft-mse", tmp_path / "sd-vae-ft-mse"))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refusal(lambda: load_vae(tmp_path, CPU, torch.float32), f"{path} does not describe ")
