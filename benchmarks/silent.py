"""The pipeline with networks replaced by stubs, to measure everything else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn

from benchmarks import ROOT
from benchmarks.workplace import WHISPER_TINY
from musetalk.contract import IMAGE_SIZE, LATENT_CHANNELS, LATENT_SIZE, RIGID
from musetalk.data.face.face import Face
from musetalk.data.face.mediapipe import MediapipeFaceMesh
from musetalk.files import read_json
from musetalk.inference.pipeline import LipSyncPipeline
from musetalk.models.audio_encoder import SEGMENT_STATES
from musetalk.models.vae import VAE


def silent_pipeline() -> LipSyncPipeline:
    """The inference pipeline with stub networks."""
    unet = Silent(LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)
    pipeline = LipSyncPipeline(unet, silent_vae(), RIGID, ROOT / "models")  # type: ignore[arg-type]  # a stub
    pipeline.backend, pipeline.audio_encoder = SilentBackend(), SilentAudioEncoder()  # type: ignore[assignment]  # stubs
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


class SilentBackend:
    """MediaPipe's face backend that detects faces once: all frames get the faces of the first."""

    def __init__(self) -> None:
        self.backend = MediapipeFaceMesh(torch.device("cpu"))
        self.faces: list[list[Face]] = []

    def detect(self, frames: Sequence[np.ndarray]) -> list[list[Face]]:
        """Returns the first frame's faces for each frame. frames: BGR uint8 (H, W, 3)."""
        self.faces = self.faces or self.backend.detect(frames[:1])
        return self.faces * len(frames)
