"""Nothing on the way mixes devices, and nothing waits for a GPU but where it must: tried without one.

Tensors without contents may be said to be on a device that is not there, and torch refuses to mix them with those of
the CPU as it does on a GPU. They are said to be on "meta" here, since a CPU build of torch knows no GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch._functorch.config
import whisper
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorDeviceMismatchError
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import syncnet_trainer
from benchmarks import ROOT
from benchmarks.counts import STAGE2, TINY_DECODER
from benchmarks.training import made_up_batch, training, without_contents
from benchmarks.workplace import WHISPER_TINY
from musetalk.contract import IMAGE_SIZE, RIGID, SYNC_MEL_BINS
from musetalk.data.audio import audio_features
from musetalk.data.face.dwpose import DWPose, RTMPose
from musetalk.files import read_json
from musetalk.inference.pipeline import LipSyncPipeline
from musetalk.models.audio_encoder import AudioEncoder, build_encoder
from musetalk.models.face_parser import BiSeNet, FaceParser
from musetalk.models.tiny_decoder import TinyDecoder
from musetalk.models.unet import build_unet
from musetalk.models.vae import VAE
from musetalk.training.state import OPTIMIZERS, NetworkState
from musetalk.training.sync_check import offset_sweep
from tools import distil_decoder

ELSEWHERE = torch.device("meta")
MINI = ROOT / "models" / "mini"


@pytest.fixture
def elsewhere(monkeypatch) -> Iterator[None]:
    """Within it the device of a training is one that is not there."""
    for name, plain in (("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam)):
        monkeypatch.setitem(OPTIMIZERS, name, plain)  # fused kernels ask for a device that is there
    monkeypatch.setattr(Accelerator, "device", ELSEWHERE)
    # What comes back to the host is an array of the same shape.
    to_numpy = torch.Tensor.numpy
    monkeypatch.setattr(torch.Tensor, "numpy", lambda x: empty_array(x) if isinstance(x, FakeTensor) else to_numpy(x))
    with torch._functorch.config.patch(fake_tensor_allow_meta=True), without_contents():
        yield
    whisper.audio.mel_filters.cache_clear()  # which would have no contents ever after


@contextmanager
def host_waits() -> Iterator[list[str]]:
    """What the host does within it that waits for the device: what it reads of it, and sends without non_blocking."""
    found = []

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **kwargs or {})
            if func is torch.ops.aten._local_scalar_dense.default and args[0].device == ELSEWHERE:
                found.append("a number is read")
            if func is torch.ops.aten._to_copy.default and args[0].device != made.device:
                if not (kwargs or {}).get("non_blocking"):
                    found.append(f"{tuple(args[0].shape)} is copied from {args[0].device}")
            return made

    class Constants(TorchFunctionMode):  # whose copy is no operation
        def __torch_function__(self, func, types, args=(), kwargs=None):
            made = func(*args, **kwargs or {})
            if func in (torch.tensor, torch.Tensor.new_tensor) and made.device == ELSEWHERE:
                found.append(f"a constant is sent by {func.__name__}")
            return made

    with Operations(), Constants():
        yield found


def empty_array(tensor: torch.Tensor) -> np.ndarray:
    assert tensor.device.type == "cpu"
    return np.zeros(tensor.shape, str(tensor.dtype).removeprefix("torch."))


def test_what_goes_wrong_is_seen(elsewhere):
    there = torch.zeros(2, device=ELSEWHERE)
    with pytest.raises(FakeTensorDeviceMismatchError):
        there + torch.zeros(2)
    with host_waits() as found:
        torch.zeros(2).to(ELSEWHERE, non_blocking=True)
        assert not found
        torch.zeros(2).to(ELSEWHERE)
        torch.tensor(1, device=ELSEWHERE)
        there.new_tensor([1.0])
        there[0].item()
        there.cpu()
    assert found == [
        "(2,) is copied from cpu",
        "a constant is sent by tensor",
        "a constant is sent by new_tensor",
        "a number is read",
        "(2,) is copied from meta",
    ]


@pytest.mark.parametrize("config", [STAGE2, replace(TINY_DECODER, full_decoder_every=2)], ids=["stage2", "tiny"])
def test_a_training_step(elsewhere, config):
    """With every loss the host waits once; averaging, saving and looking at the average are tried too."""
    config = replace(config, models_dir=MINI)
    with training(config) as run:
        with host_waits() as found:
            result = run.step(2)
        state = run.state
        own = state.unet.model.state_dict()
        state.ema = {name: torch.zeros_like(value, device="cpu") for name, value in own.items()}
        state.update_ema(0.9)
        with state.averaged():
            moved = state.as_dict()
    assert found == ["a number is read"]  # whether the gradients are finite
    assert {value.device for value in (*result.terms.values(), result.grad_norm, *moved["unet"].values())} == {
        ELSEWHERE
    }
    assert {value.device.type for value in moved["ema"].values()} == {"cpu"}
    active = {name for name, weight in config.loss_weights.items() if weight}
    learning = {name.replace("adv_g", "adv_d") for name in active if name.startswith("adv_g")}
    assert not result.skipped and result.terms.keys() == active | learning


@pytest.mark.parametrize("architecture", ["wav2lip_narrow", "latentsync_narrow"])
def test_a_step_and_a_check_of_a_sync_expert(elsewhere, architecture):
    config = syncnet_trainer.SyncConfig(architecture=architecture, grad_accum_steps=2)
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    state = syncnet_trainer.build_state(config, accelerator)
    frames, mel_frames = state.network.frames, state.network.mel_frames
    mel = torch.zeros(2, mel_frames, SYNC_MEL_BINS).half()
    images = torch.zeros(2, frames, IMAGE_SIZE, IMAGE_SIZE, 3, dtype=torch.uint8)
    batch = {"images": images, "mel": mel, "other_mel": mel, "where": ["", ""]}
    with host_waits() as found:
        result = syncnet_trainer.optimizer_step(state, iter([batch, batch]), config, accelerator)
    assert found == ["a number is read"]
    assert result.terms["sync_bce"].device == result.grad_norm.device == ELSEWHERE
    seen = np.zeros((frames + 1, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    assert offset_sweep(state.network, seen, np.zeros((400, SYNC_MEL_BINS), np.float32)).shape == (31,)


@pytest.fixture
def vae(elsewhere, monkeypatch) -> VAE:
    monkeypatch.setattr("musetalk.models.vae.fingerprint", lambda _: "")
    monkeypatch.setattr("musetalk.models.vae.ENCODE_BATCH", {ELSEWHERE.type: 2})
    autoencoder = AutoencoderKL.from_config(read_json(MINI / "sd-vae-ft-mse/config.json"))
    return VAE(nn.Module.to(autoencoder, ELSEWHERE))


def test_a_step_and_the_measures_of_a_distillation(vae):
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    decoder = TinyDecoder(4).to(accelerator.device)
    state = NetworkState(decoder, torch.optim.AdamW(decoder.parameters()), {})
    config = distil_decoder.DistilConfig()
    batch = made_up_batch(replace(TINY_DECODER, frames=1), 1, 4)
    with host_waits() as found:
        result = distil_decoder.optimizer_step(state, vae, iter([batch]), config, accelerator)
    assert result.terms["loss"].device == ELSEWHERE and found == ["a number is read"]
    alike, faces = distil_decoder.compare(decoder, vae, [batch], config.noise)
    assert "psnr" in alike and faces.shape == (3 * IMAGE_SIZE, IMAGE_SIZE, 3)


@pytest.mark.parametrize("posterior", ["mode", "sample"])
def test_preparing(vae, monkeypatch, posterior):
    """Landmarks, latents, also of frames without a face, and audio features."""
    assert DWPose(RTMPose().to(ELSEWHERE)).points([np.zeros((60, 80, 3), np.uint8)])[0].shape == (1, 133, 2)
    crops = [[np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)], None, [np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)]]
    contract = replace(RIGID, posterior=posterior)
    assert [latents.shape for latents in vae.encode_clip("clip", crops, contract)] == [(3, 1, 4, 32, 32)] * 2
    monkeypatch.setattr("musetalk.models.audio_encoder.fingerprint", lambda _: "")
    encoder = AudioEncoder(build_encoder(WHISPER_TINY).to(ELSEWHERE))
    assert audio_features(np.zeros(32_000, np.float32), encoder, contract).shape == (100, 5, 384)


def test_inference(vae):
    unet = build_unet(MINI, 0, True).to(ELSEWHERE)
    pipeline = LipSyncPipeline(unet, vae, RIGID, MINI)
    latents = np.zeros((2, 4, 32, 32), np.float16)
    windows = np.zeros((2, 50, unet.model.config.cross_attention_dim), np.float16)
    assert pipeline.generate(latents, latents, windows).shape == (2, IMAGE_SIZE, IMAGE_SIZE, 3)
    classes = FaceParser(BiSeNet().to(ELSEWHERE))(torch.zeros(1, 3, 64, 64))
    assert classes.device == ELSEWHERE and classes.shape == (1, 512, 512)
