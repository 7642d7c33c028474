"""The pipeline and its parts without the work of their networks, to measure all that is around them."""

from __future__ import annotations

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
    """The pipeline without the work of its networks."""
    unet = Silent(LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)
    pipeline = LipSyncPipeline(unet, silent_vae(), RIGID, ROOT / "models")
    pipeline.backend, pipeline.audio_encoder = recalling_backend(), SilentAudioEncoder()
    return pipeline


class Silent(nn.Module):
    """A network that costs nothing: zeros of one shape for each of a batch."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape, self.weight = shape, nn.Parameter(torch.zeros(()))

    def forward(self, values: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        """(B, ...) -> (B, *shape)."""
        return values.new_zeros(len(values), *self.shape)


class SilentAudioEncoder:
    """Whisper tiny's encoder without its work."""

    shape, mel_bins = (WHISPER_TINY.n_audio_layer + 1, WHISPER_TINY.n_audio_state), WHISPER_TINY.n_mels

    def __call__(self, mel: torch.Tensor, final_layer_norm: bool) -> torch.Tensor:
        """(mel_bins, 3000) -> (1500, S, D)."""
        return torch.zeros(SEGMENT_STATES, *self.shape)


def silent_vae() -> VAE:
    """The VAE without the work of its encoder and decoder."""
    autoencoder = AutoencoderKL.from_config(read_json(ROOT / "models/mini/sd-vae-ft-mse/config.json"))
    autoencoder.encoder = Silent(2 * LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)
    autoencoder.decoder = Silent(3, IMAGE_SIZE, IMAGE_SIZE)
    return VAE(autoencoder)


class Recalling:
    """One of MediaPipe's networks, asked once: it gives the same answer ever after."""

    def __init__(self, network: object) -> None:
        self.network, self.answer = network, None

    def process(self, image: np.ndarray) -> object:
        self.answer = self.answer or self.network.process(image)
        return self.answer


def recalling_backend() -> MediapipeFaceMesh:
    """The face backend without the work of its networks: all frames have the face of the first."""
    backend = MediapipeFaceMesh()
    backend.detector, backend.mesh = Recalling(backend.detector), Recalling(backend.mesh)
    return backend
