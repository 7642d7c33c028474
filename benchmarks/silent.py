"""The pipeline with networks replaced by stubs, to measure everything else."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import nn

from benchmarks import ROOT
from benchmarks.workplace import WHISPER_TINY
from musetalk.contract import IMAGE_SIZE, LATENT_CHANNELS, LATENT_SIZE, RIGID
from musetalk.data.face.attention_mesh import AttentionMesh
from musetalk.data.face.blazeface import FullRangeDetector, ShortRangeDetector
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


class Repeated(nn.Module):
    """A face network that runs once and then returns its outputs for the first image for every image."""

    def __init__(self, network: ShortRangeDetector | FullRangeDetector | AttentionMesh) -> None:
        super().__init__()
        self.network, self.size = network, network.size
        self.min_score = getattr(network, "min_score", None)
        self.outputs: tuple[torch.Tensor, ...] = ()

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(B, 3, size, size) -> the network's outputs."""
        self.outputs = self.outputs or self.network(images)
        return tuple(output[:1].expand(len(images), *output.shape[1:]) for output in self.outputs)


def silent_backend() -> MediapipeFaceMesh:
    """The face backend without its networks: all frames get the face of the first."""
    backend = MediapipeFaceMesh(torch.device("cpu"))
    for name in ("full_range", "short_range", "mesh"):
        setattr(backend, name, Repeated(getattr(backend, name)))
    return backend
