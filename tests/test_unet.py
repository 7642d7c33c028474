"""The UNet, compared with direct use of diffusers' class."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from hostile import refusal

from musetalk.models.unet import UNet, build_unet, load_unet, sinusoid
from musetalk.models.weights import fingerprint

FULL = Path(__file__).parents[1] / "models"
WIDTH = 16  # of audio features


@pytest.fixture(scope="module")
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 8, 32, 32, generator=generator), torch.randn(2, 50, WIDTH, generator=generator)


@pytest.mark.parametrize("positional_encoding", [True, False])
def test_the_unet_equals_diffusers_at_timestep_0(small_models, inputs, positional_encoding):
    unet = build_unet(small_models, 0, positional_encoding).eval()
    unet_input, window = inputs
    place, channel = np.arange(50)[:, None], np.arange(0, WIDTH, 2)
    angle = place / 10_000 ** (channel / WIDTH)
    positions = np.stack([np.sin(angle), np.cos(angle)], axis=-1).reshape(50, WIDTH)  # sine, cosine in turn
    tokens = window + torch.tensor(positions, dtype=torch.float32) if positional_encoding else window
    with torch.no_grad():
        result = unet(unet_input, window)
        expected = unet.model(unet_input, torch.tensor([0]), encoder_hidden_states=tokens).sample
        at_500 = unet.model(unet_input, torch.tensor([500]), encoder_hidden_states=tokens).sample
        alone = unet(unet_input[1:], window[1:])
    assert result.shape == (2, 4, 32, 32)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(result[1:], alone, atol=1e-5, rtol=1e-5)
    assert (result - at_500).abs().max() > 1e-3


def test_sinusoid_by_hand():
    table = sinusoid(4, 6)
    assert table.shape == (4, 6)
    assert table[0].tolist() == [0, 1, 0, 1, 0, 1]
    np.testing.assert_allclose(table[3, :2], [np.sin(3), np.cos(3)], atol=1e-6)
    np.testing.assert_allclose(table[3, 4:], [np.sin(3 / 10_000 ** (4 / 6)), np.cos(3 / 10_000 ** (4 / 6))], atol=1e-6)
    assert torch.equal(sinusoid(9, 6)[:4], table)
    assert sinusoid(4, 5).shape == (4, 5)


def test_the_last_layer_gradient_equals_autograd(small_models, inputs):
    unet = build_unet(small_models, 0, True)
    unet.keep_last_input()
    output = unet(*inputs)
    loss = (output[:1] * torch.linspace(-1, 1, 32)).sin().sum()  # of the first of two predictions
    expected, gradient = torch.autograd.grad(loss, [unet.model.conv_out.weight, output])
    torch.testing.assert_close(unet.last_layer_gradient(gradient[:1]), expected, atol=1e-5, rtol=1e-5)


def test_build_unet_is_seeded_and_leaves_the_global_generator_unchanged(small_models):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first, again, other = (fingerprint(build_unet(small_models, seed, True).model) for seed in (7, 7, 8))
    assert torch.equal(torch.rand(3), expected)
    assert first == again != other


def test_weights_of_the_official_trainer_are_loaded(small_models, tmp_path, inputs):
    unet = build_unet(small_models, 3, True).eval()
    assert set(unet.state_dict()) == {f"model.{name}" for name in unet.model.state_dict()}  # without positions
    torch.save(unet.model.state_dict(), tmp_path / "unet.pth")
    loaded = load_unet(small_models, tmp_path / "unet.pth", True).eval()
    with torch.no_grad():
        assert torch.equal(unet(*inputs), loaded(*inputs))


def test_the_full_unet_has_the_published_size_and_names():
    config = json.loads((FULL / "musetalk" / "musetalk.json").read_text())
    with torch.device("meta"):
        model = UNet2DConditionModel.from_config(config)
    assert sum(weight.numel() for weight in model.parameters()) == 849_947_844
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes["conv_in.weight"] == (320, 8, 3, 3) and shapes["conv_out.weight"] == (4, 320, 3, 3)
    assert shapes["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"] == (320, 384)
    assert len(shapes["mid_block.attentions.0.proj_in.weight"]) == 4
    assert UNet(model, True).positions.shape[1] == 384


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "change",
    [
        {"block_out_channels": [7, 7]},
        {"block_out_channels": "wide"},
        {"down_block_types": ["os.system"] * 2},
        {"cross_attention_dim": None},
        {"_class_name": "AutoencoderKL"},
        {"in_channels": 4},
        {"out_channels": 8},
    ],
    ids=repr,
)
def test_an_unsuitable_configuration_is_refused_in_one_sentence(small_models, tmp_path, change):
    path = tmp_path / "musetalk" / "musetalk.json"
    path.parent.mkdir()
    path.write_text(json.dumps(json.loads((small_models / "musetalk" / "musetalk.json").read_text()) | change))
    refusal(lambda: build_unet(tmp_path, 0, True), f"{path} does not describe ")
    refusal(lambda: load_unet(tmp_path, tmp_path / "none", True), f"{path} does not describe ")
