"""The common interface of the sync experts."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from musetalk.contract import SYNC_MEL_BINS, sync_mel_frames


class SyncNet(nn.Module):
    """Embeds windows of `frames` face crops and `mel_frames` mel frames into one space.

    frames: video frames per window, at 25 per second. image_size: pixels, to which faces are resized. mel_frames: mel
    frames of the same duration, at 80 per second, rounded up.
    """

    face_encoder: nn.Module
    audio_encoder: nn.Module

    def __init__(self, frames: int, image_size: int) -> None:
        super().__init__()
        self.frames, self.image_size = frames, image_size
        self.mel_frames = sync_mel_frames(frames)

    def forward(self, images: torch.Tensor, mel: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """images: (B, frames, 3, H, W), mel: (B, mel_frames, 80). Returns `embed` of them, each (B, D)."""
        return self.embed(images, mel)

    def embed(self, images: torch.Tensor, mel: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the embeddings of faces and mel, each float32 (B, D), non-negative, of length 1.

        images: (B, frames, 3, H, W), full face crops, RGB in [-1, 1]; only the lower half is used.
        mel: (B, mel_frames, 80) in [-4, 4], from `audio.sync_mel`.
        """
        return self.embed_faces(images), self.embed_mel(mel)

    def embed_faces(self, images: torch.Tensor) -> torch.Tensor:
        """(B, frames, 3, H, W) -> (B, D). Gradients flow to the images."""
        assert images.shape[1:3] == (self.frames, 3), images.shape
        faces = images.float().clamp(-1, 1).flatten(0, 1)  # (B frames, 3, H, W)
        if faces.shape[2:] != (self.image_size, self.image_size):
            faces = functional.interpolate(faces, (self.image_size,) * 2, mode="bilinear", antialias=True)
        faces = self.preprocess(faces[:, :, self.image_size // 2 :])  # (B frames, 3, size / 2, size)
        faces = faces.unflatten(0, (-1, self.frames)).flatten(1, 2)  # (B, 3 frames, size / 2, size)
        return _encode(self.face_encoder, faces)

    def embed_mel(self, mel: torch.Tensor) -> torch.Tensor:
        """(B, mel_frames, 80) -> (B, D)."""
        assert mel.shape[1:] == (self.mel_frames, SYNC_MEL_BINS), mel.shape
        return _encode(self.audio_encoder, mel.transpose(1, 2)[:, None])  # from (B, 1, 80, mel_frames)

    def preprocess(self, faces: torch.Tensor) -> torch.Tensor:
        """Converts faces, RGB in [-1, 1], to the network's colour format."""
        return faces


def _encode(encoder: nn.Module, values: torch.Tensor) -> torch.Tensor:
    """Returns the output of an encoder, normalised to length 1, float32 (B, D)."""
    values = encoder(values.to(next(encoder.parameters()).dtype))  # (B, D, 1, 1)
    return functional.normalize(values.flatten(1).float(), dim=1)
