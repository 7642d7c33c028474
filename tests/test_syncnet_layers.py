"""The sync experts, against formulas and published shapes, and their files."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hostile import refusal
from seeded import random_tensor, random_weights
from torch import nn
from torch.nn import functional

from musetalk.contract import SYNC_MEL_BINS
from musetalk.models.syncnet import (
    STABLE_SYNCNET_16,
    STABLE_SYNCNET_16_ATTENTION,
    StableSyncNet,
    SyncNet,
    Wav2LipSyncNet,
    load_syncnet,
)
from musetalk.models.syncnet.stable import AttentionBlock, EncoderConfig, ResnetBlock, StableConfig

CPU = torch.device("cpu")
SMALL = StableConfig(
    resolution=16,
    visual_encoder=EncoderConfig(6, (32, 32, 64, 64, 256), ((1, 2), 2, 2, 2, 1), (0, 0, 0, 1, 0)),
    audio_encoder=EncoderConfig(1, (32, 32, 64, 64, 256), ((2, 1), 2, 2, (10, 1), 1), (0, 0, 0, 1, 0)),
)
WITHOUT_ATTENTION = replace(
    SMALL,
    visual_encoder=replace(SMALL.visual_encoder, attn_blocks=(0,) * 5),
    audio_encoder=replace(SMALL.audio_encoder, attn_blocks=(0,) * 5),
)


@pytest.fixture(scope="module")
def wav2lip() -> Wav2LipSyncNet:
    return random_weights(Wav2LipSyncNet())


@pytest.fixture(scope="module")
def stable() -> StableSyncNet:
    return random_weights(StableSyncNet(SMALL))


@pytest.fixture(params=["wav2lip", "stable"])
def network(request) -> SyncNet:
    return request.getfixturevalue(request.param)


# Published names and shapes.


@pytest.mark.parametrize(
    "build, entries, parameters, shapes",
    [
        (
            Wav2LipSyncNet,
            217,
            16_435_072,
            {
                "face_encoder.0.conv_block.0.weight": (32, 15, 7, 7),
                "face_encoder.16.conv_block.0.weight": (512, 512, 1, 1),
                "face_encoder.13.conv_block.1.num_batches_tracked": (),
                "audio_encoder.0.conv_block.0.bias": (32,),
                "audio_encoder.13.conv_block.1.running_var": (512,),
            },
        ),
        (
            lambda: StableSyncNet(STABLE_SYNCNET_16),
            178,
            371_766_496,
            {
                "visual_encoder.conv_in.weight": (64, 48, 3, 3),
                "visual_encoder.down_blocks.7.downsample_conv.weight": (2048, 2048, 3, 3),
                "visual_encoder.down_blocks.6.conv_shortcut.weight": (2048, 1024, 1, 1),
                "audio_encoder.down_blocks.4.conv1.weight": (512, 256, 3, 3),
                "audio_encoder.norm_out.bias": (2048,),
            },
        ),
        (
            lambda: StableSyncNet(STABLE_SYNCNET_16_ATTENTION),
            266,
            401_306_080,
            {
                "visual_encoder.down_blocks.5.attn.to_q.bias": (512,),
                "visual_encoder.down_blocks.7.attn.to_out.0.weight": (1024, 1024),
                "audio_encoder.down_blocks.4.ff.net.0.proj.weight": (2048, 256),
                "audio_encoder.down_blocks.6.ff.net.2.weight": (512, 2048),
                "audio_encoder.down_blocks.6.conv_out.weight": (512, 512, 1, 1),
                "audio_encoder.down_blocks.6.norm3.weight": (512,),
            },
        ),
    ],
    ids=["Wav2Lip", "stable", "stable with attention"],
)
def test_a_network_has_the_published_size_names_shapes_and_window(build, entries, parameters, shapes):
    with torch.device("meta"), torch.no_grad():
        network = build()
        embeddings = network(
            torch.empty(3, network.frames, 3, 256, 256), torch.empty(3, network.mel_frames, SYNC_MEL_BINS)
        )
    tensors = network.state_dict()
    assert len(tensors) == entries and sum(weight.numel() for weight in network.parameters()) == parameters
    assert shapes.items() <= {name: tuple(tensor.shape) for name, tensor in tensors.items()}.items()
    window = (5, 16, 96, 512) if build is Wav2LipSyncNet else (16, 52, 256, 2048)
    assert (network.frames, network.mel_frames, network.image_size, embeddings[0].shape[1]) == window
    assert embeddings[0].shape == embeddings[1].shape


# Formulas.


def test_wav2lips_expert_layer_by_layer(wav2lip):
    tensors = wav2lip.state_dict()
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
        embeddings = wav2lip.embed(images, mel)
    for embedding, (encoder, blocks) in zip(embeddings, layers.items(), strict=True):
        y = inputs[encoder]
        for index, block in enumerate(blocks):
            name = f"{encoder}_encoder.{index}.conv_block"
            stride, padding = block or (1, 1)
            z = functional.conv2d(y, tensors[f"{name}.0.weight"], tensors[f"{name}.0.bias"], stride, padding)
            mean, var, *affine = (tensors[f"{name}.1.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
            y = (functional.batch_norm(z, mean, var, *affine) + (0 if block else y)).clamp(min=0)
        y = y.reshape(2, 512)
        torch.testing.assert_close(embedding, y / y.square().sum(1, keepdim=True).sqrt())


@pytest.mark.parametrize(
    "factor, size, padding",
    [(2, (3, 5), (0, 1, 0, 1)), ((1, 2), (6, 5), (0, 1, 1, 1)), ((2, 1), (3, 10), (1, 1, 0, 1))],
)
def test_padding_of_the_strided_convolution(factor, size, padding):
    block = random_weights(ResnetBlock(32, 32, factor))
    x = random_tensor(1, 32, 6, 10)
    with torch.no_grad():
        result = block(x)
        weight, bias = block.downsample_conv.parameters()
        block.downsample_conv = None
        torch.testing.assert_close(result, functional.conv2d(functional.pad(block(x), padding), weight, bias, factor))
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
    encoders = stable.visual_encoder, stable.audio_encoder
    with torch.no_grad():
        for encoder, x, embedding in zip(encoders, inputs, stable.embed(images, mel), strict=True):
            x = nn.Sequential(encoder.conv_in, *encoder.down_blocks)(x)
            x = functional.group_norm(x, 32, encoder.norm_out.weight, encoder.norm_out.bias, 1e-6)
            x = x.relu().reshape(2, 256)
            torch.testing.assert_close(embedding, x / x.square().sum(1, keepdim=True).sqrt())


# Embeddings.


def test_embeddings_are_unit_vectors_and_independent_of_the_batch(network):
    images, mel = random_tensor(3, network.frames, 3, 64, 48), random_tensor(3, network.mel_frames, 80, seed=1)
    with torch.no_grad():
        together = network.embed(images, mel)
        alone = network.embed(images[1:2], mel[1:2])
    for x, y in zip(together, alone, strict=True):
        torch.testing.assert_close(x.norm(dim=1), torch.ones(3))
        assert x.min() >= 0 and (x[0] - x[1]).abs().max() > 1e-4
        torch.testing.assert_close(x[1:2], y)


def test_gradients_reach_the_lower_half_of_the_faces_only(network):
    middle = 3 * network.image_size // 2  # of images three times the size of the network's input
    images = random_tensor(1, network.frames, 3, 2 * middle, 2 * middle).clamp(-0.9, 0.9).requires_grad_()
    network.embed_faces(images)[0, ::3].sum().backward()
    assert not images.grad[:, :, :, : middle - 3].any()
    assert images.grad[:, :, :, middle:].ne(0).float().mean() > 0.99


@pytest.mark.parametrize(
    "network, expected", [("wav2lip", (0.25, 0.5, 0.75)), ("stable", (0.5, 0, -0.5))], indirect=["network"]
)
def test_the_first_frame_comes_first_in_the_colours_of_the_network(network, expected):
    """Wav2Lip's takes BGR in [0, 1], LatentSync's RGB in [-1, 1]; values beyond the range are clamped."""
    inputs = []
    hook = network.face_encoder.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    images = torch.tensor([0.5, 0, -0.5])[:, None, None].expand(1, network.frames, 3, 300, 200).clone()
    images[:, 1:] = 2
    network.embed_faces(images)
    hook.remove()
    (faces,) = inputs
    assert faces.shape == (1, 3 * network.frames, network.image_size // 2, network.image_size)
    torch.testing.assert_close(faces[0, :3, 4, 4], torch.tensor(expected, dtype=torch.float32))
    torch.testing.assert_close(faces[0, 3:], torch.ones_like(faces[0, 3:]))


# Files.


def save(values: dict, folder: Path, name: str, config: StableConfig | None = None) -> str:
    """Saves a checkpoint and its configuration. Returns the name of the checkpoint in the models folder."""
    (folder / "syncnet").mkdir(exist_ok=True)
    torch.save(values, folder / "syncnet" / name)
    if config:
        (folder / "syncnet" / name).with_suffix(".json").write_text(json.dumps(asdict(config)))
    return f"syncnet/{name}"


def test_wav2lips_training_checkpoint_is_loaded_exactly(tmp_path, wav2lip):
    optimizer = torch.optim.Adam([weight := nn.Parameter(torch.ones(3))])
    weight.sum().backward()
    optimizer.step()
    tensors = nn.DataParallel(wav2lip).state_dict()
    assert "module.face_encoder.0.conv_block.0.weight" in tensors
    values = {"state_dict": tensors, "optimizer": optimizer.state_dict(), "global_step": 10, "global_epoch": 2}
    loaded = load_syncnet(tmp_path, save(values, tmp_path, "lipsync_expert.pth"), CPU)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in wav2lip.state_dict().items())
    assert not loaded.training and not any(x.requires_grad for x in loaded.parameters())


@pytest.mark.parametrize("name", ["latentsync_syncnet.pt", "stable_syncnet.pt"])
def test_latentsyncs_checkpoint_is_loaded_exactly_with_a_configuration(tmp_path, name, stable):
    values = {"state_dict": stable.state_dict(), "global_step": 3, "train_step_list": [1, 2, 3], "val_loss_list": [0.7]}
    file = save(values, tmp_path, name, SMALL)
    loaded, rounded = (load_syncnet(tmp_path, file, CPU, dtype) for dtype in (torch.float32, torch.bfloat16))
    for key, tensor in stable.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor)
        assert torch.equal(rounded.state_dict()[key], tensor.bfloat16())


def test_a_stable_syncnet_with_or_without_attention_is_recognised(tmp_path, stable):
    plain = StableSyncNet(WITHOUT_ATTENTION)
    for network, config, kind in ((stable, WITHOUT_ATTENTION, "with"), (plain, SMALL, "without")):
        file = save({"state_dict": network.state_dict()}, tmp_path, "latentsync_syncnet.pt", config)
        message = refusal(lambda file=file: load_syncnet(tmp_path, file, CPU), file)
        assert message.endswith(f"looks like a StableSyncNet {kind} attention")


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(audio_encoder={}),
        lambda c: c["visual_encoder"].update(block_out_channels=[10] * 5),
        lambda c: c["visual_encoder"].update(attn_blocks=[0]),
        lambda c: c["audio_encoder"].update(in_channels=2),
        lambda c: c["audio_encoder"].update(downsample_factors=[16] * 5),
        lambda c: c.update(resolution=32),
    ],
    ids=["missing field", "groups", "lengths", "channels", "reduced to nothing", "widths"],
)
def test_an_unsuitable_configuration_is_refused_by_name(tmp_path, change):
    config = asdict(SMALL)
    change(config)
    file = save({}, tmp_path, "stable_syncnet.pt")
    (tmp_path / "syncnet/stable_syncnet.json").write_text(json.dumps(config))
    refusal(lambda: load_syncnet(tmp_path, file, CPU), "stable_syncnet.json does not describe a StableSyncNet: ")
