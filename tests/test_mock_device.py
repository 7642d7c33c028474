"""Training, preparation and inference do not mix devices, and synchronise with the GPU only where they must.

Needs no GPU: tensors are fake and on a mock device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
import whisper
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorDeviceMismatchError

import syncnet_trainer
from benchmarks import ROOT
from benchmarks.counts import STAGE2, TINY_DECODER
from benchmarks.mock_device import MOCK, mock_device, transfers
from benchmarks.training import training, zero_batch
from benchmarks.workplace import WHISPER_TINY
from musetalk.contract import IMAGE_SIZE, RIGID, SYNC_MEL_BINS
from musetalk.data.audio import audio_features
from musetalk.data.face.attention_mesh import AttentionMesh
from musetalk.data.face.blazeface import FullRangeDetector, ShortRangeDetector
from musetalk.data.face.dwpose import DWPose, RTMPose
from musetalk.evaluation.sync_check import offset_sweep
from musetalk.files import read_json
from musetalk.inference.pipeline import LipSyncPipeline
from musetalk.models.audio_encoder import AudioEncoder, build_encoder
from musetalk.models.face_parser import BiSeNet, FaceParser
from musetalk.models.tiny_decoder import TinyDecoder
from musetalk.models.unet import build_unet
from musetalk.models.vae import VAE
from musetalk.training.state import NetworkState
from tools import distil_decoder

MINI = ROOT / "models" / "mini"


@pytest.fixture(autouse=True)
def on_mock_device(monkeypatch) -> Iterator[None]:
    """All tests run on the mock device. Copies to the host become arrays of the same shape."""
    to_numpy = torch.Tensor.numpy
    monkeypatch.setattr(torch.Tensor, "numpy", lambda x: empty_array(x) if isinstance(x, FakeTensor) else to_numpy(x))
    with mock_device():
        yield
    whisper.audio.mel_filters.cache_clear()  # the cached filters are fake tensors


def empty_array(tensor: torch.Tensor) -> np.ndarray:
    assert tensor.device.type == "cpu"
    return np.zeros(tensor.shape, str(tensor.dtype).removeprefix("torch."))


def test_mixed_devices_and_synchronizations_are_detected():
    x = torch.zeros(2, device=MOCK)
    with pytest.raises(FakeTensorDeviceMismatchError):
        x + torch.zeros(2)
    with transfers() as seen:
        torch.zeros(2).to(MOCK, non_blocking=True)
        assert not seen.waiting and seen.queued == ["(2,) is copied from cpu"]
        torch.zeros(2).to(MOCK)
        torch.tensor(1, device=MOCK)
        x.new_tensor([1.0])
        x[0].item()
        x.cpu()
    assert seen.waiting == [
        "(2,) is copied from cpu",
        "a constant is sent by tensor",
        "a constant is sent by new_tensor",
        "a number is read",
        "(2,) is copied from meta",
    ]


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(STAGE2, id="stage2", marks=pytest.mark.slow),
        pytest.param(replace(TINY_DECODER, full_decoder_every=2), id="tiny"),
        pytest.param(replace(TINY_DECODER, ema_on_host=False), id="ema on the device"),
    ],
)
def test_a_training_step(config):
    """A step with every loss synchronises once. The EMA, on the device or not, is updated, used and saved too."""
    config = replace(config, models_dir=MINI)
    with training(config) as run:
        with transfers() as seen:
            result = run.step(2)
        state = run.state
        if config.ema_on_host:
            own = state.unet.model.state_dict()
            state.ema = {name: torch.zeros_like(value, device="cpu") for name, value in own.items()}
        with transfers() as updating:
            state.update_ema(0.9)
        with state.averaged():
            saved = state.as_dict()
    assert seen.waiting == ["a number is read"]  # whether the gradients are finite
    assert {value.device for value in (*result.terms.values(), result.grad_norm, *saved["unet"].values())} == {MOCK}
    assert len(updating.waiting) == (len(saved["ema"]) if config.ema_on_host else 0)
    assert {value.device for value in saved["ema"].values()} == {torch.device("cpu") if config.ema_on_host else MOCK}
    active = {name for name, weight in config.loss_weights.items() if weight}
    discriminators = {name.replace("adv_g", "adv_d") for name in active if name.startswith("adv_g")}
    assert not result.skipped and result.terms.keys() == active | discriminators


@pytest.mark.parametrize("architecture", ["wav2lip_narrow", "latentsync_narrow"])
def test_a_step_and_the_evaluation_of_a_sync_expert(architecture):
    config = syncnet_trainer.SyncConfig(architecture=architecture, grad_accum_steps=2)
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    state = syncnet_trainer.build_state(config, accelerator)
    frames, mel_frames = state.network.frames, state.network.mel_frames
    mel = torch.zeros(2, mel_frames, SYNC_MEL_BINS).half()
    images = torch.zeros(2, frames, IMAGE_SIZE, IMAGE_SIZE, 3, dtype=torch.uint8)
    batch = {"images": images, "mel": mel, "other_mel": mel, "where": ["", ""]}
    with transfers() as seen:
        result = syncnet_trainer.optimizer_step(state, iter([batch, batch]), config, accelerator)
    assert seen.waiting == ["a number is read"]
    assert result.terms["sync_bce"].device == result.grad_norm.device == MOCK
    faces = np.zeros((frames + 1, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    assert offset_sweep(state.network, faces, np.zeros((400, SYNC_MEL_BINS), np.float32)).shape == (31,)


@pytest.fixture
def vae(monkeypatch) -> VAE:
    monkeypatch.setattr("musetalk.models.vae.fingerprint", lambda _: "")
    monkeypatch.setattr("musetalk.models.vae.ENCODE_BATCH", {MOCK.type: 2})
    autoencoder = AutoencoderKL.from_config(read_json(MINI / "sd-vae-ft-mse/config.json"))
    return VAE(nn.Module.to(autoencoder, MOCK))


def test_a_step_and_the_evaluation_of_a_distillation(vae):
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    decoder = TinyDecoder(4).to(accelerator.device)
    state = NetworkState(decoder, torch.optim.AdamW(decoder.parameters()), {})
    config = distil_decoder.DistilConfig()
    batch = zero_batch(replace(TINY_DECODER, frames=1), 1, 4)
    with transfers() as seen:
        result = distil_decoder.optimizer_step(state, vae, iter([batch]), config, accelerator)
    assert result.terms["loss"].device == MOCK and seen.waiting == ["a number is read"]
    figures, faces = distil_decoder.compare(decoder, vae, [batch], config.noise)
    assert "psnr" in figures and faces.shape == (3 * IMAGE_SIZE, IMAGE_SIZE, 3)


def test_preparation(vae, monkeypatch):
    """Landmarks, latents including those of frames without a face, and audio features."""
    frame = np.zeros((60, 80, 3), np.uint8)
    assert DWPose(RTMPose().to(MOCK)).points([frame])[0].shape == (1, 133, 2)
    for network in (FullRangeDetector(), ShortRangeDetector(), AttentionMesh()):
        points, scores = network.to(MOCK)(torch.zeros(2, 3, network.size, network.size, device=MOCK))
        assert points.device == scores.device == MOCK and points.shape[-1] == 2
    crops = [[np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)], None, [np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)]]
    contract = replace(RIGID, posterior="sample")
    assert [latents.shape for latents in vae.encode_clip("clip", crops, contract)] == [(3, 1, 4, 32, 32)] * 2
    monkeypatch.setattr("musetalk.models.audio_encoder.fingerprint", lambda _: "")
    encoder = AudioEncoder(build_encoder(WHISPER_TINY).to(MOCK))
    assert audio_features(np.zeros(32_000, np.float32), encoder, contract).shape == (100, 5, 384)


def test_inference(vae):
    unet = build_unet(MINI, 0, True).to(MOCK)
    pipeline = LipSyncPipeline(unet, vae, RIGID, MINI)
    latents = np.zeros((2, 4, 32, 32), np.float16)
    windows = np.zeros((2, 50, unet.model.config.cross_attention_dim), np.float16)
    assert pipeline.generate(latents, latents, windows).shape == (2, IMAGE_SIZE, IMAGE_SIZE, 3)
    classes = FaceParser(BiSeNet().to(MOCK))(torch.zeros(1, 3, 64, 64))
    assert classes.device == MOCK and classes.shape == (1, 512, 512)
