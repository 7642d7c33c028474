"""The pipeline with networks replaced by stubs, to measure everything else."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn

from benchmarks import ROOT
from benchmarks.workplace import WHISPER_TINY
from musetalk.contract import IMAGE_SIZE, LATENT_CHANNELS, LATENT_SIZE, RIGID
from musetalk.data.face.mediapipe import MediapipeFaceMesh
from musetalk.files import read_json
from musetalk.inference.pipeline import LipSyncPipeline
from musetalk.models.audio_encoder import SEGMENT_STATES
from musetalk.models.vae import VAE


def silent_pipeline() -> LipSyncPipeline:
    """The inference pipeline with stub networks."""
    unet = Silent(LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)
    pipeline = LipSyncPipeline(unet, silent_vae(), RIGID, ROOT / "models")  # type: ignore[arg-type]  # a stub
    pipeline.backend, pipeline.audio_encoder = silent_backend(), SilentAudioEncoder()  # type: ignore[assignment]  # stubs
    return pipeline


class Silent(nn.Module):
    """A stub network that returns zeros of a fixed shape for each item of a batch."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape, self.weight = shape, nn.Parameter(torch.zeros(()))

    def forward(self, values: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        """(B, ...) -> (B, *shape)."""
        return values.new_zeros(len(values), *self.shape)


class SilentAudioEncoder:
    """A stub of Whisper tiny's encoder."""

    shape, mel_bins = (WHISPER_TINY.n_audio_layer + 1, WHISPER_TINY.n_audio_state), WHISPER_TINY.n_mels

    def __call__(self, mel: torch.Tensor, final_layer_norm: bool) -> torch.Tensor:
        """(mel_bins, 3000) -> (1500, S, D)."""
        return torch.zeros(SEGMENT_STATES, *self.shape)


def silent_vae() -> VAE:
    """The VAE with a stub encoder and decoder."""
    autoencoder = AutoencoderKL.from_config(read_json(ROOT / "models/mini/sd-vae-ft-mse/config.json"))
    autoencoder.encoder = Silent(2 * LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)
    autoencoder.decoder = Silent(3, IMAGE_SIZE, IMAGE_SIZE)
    return VAE(autoencoder)


class Cached:
    """A MediaPipe network that runs once and then always returns its first result."""

    def __init__(self, network: Any) -> None:
        self.network, self.result = network, None

    def process(self, image: np.ndarray) -> object:
        self.result = self.result or self.network.process(image)
        return self.result


def silent_backend() -> MediapipeFaceMesh:
    """The face backend without its networks: all frames get the face of the first."""
    backend = MediapipeFaceMesh()
    backend.detector, backend.mesh = Cached(backend.detector), Cached(backend.mesh)
    return backend
