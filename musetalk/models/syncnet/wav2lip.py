"""Wav2Lip's SyncNet. Architecture, parameter names and inputs: https://github.com/Rudrabha/Wav2Lip (SyncNet_color)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from musetalk.models.syncnet.base import SyncNet
from musetalk.models.syncnet.batch_norm import SyncBatchNorm

# Stages: input channels, output channels, kernel, stride, padding, number of residual blocks that follow. Channels are
# in units of `width`, except for the input of the first stage.
FACE_STAGES = (
    (15, 1, 7, 1, 3, 0),  # (32, 48, 96)
    (1, 2, 5, (1, 2), 1, 2),  # (64, 46, 47)
    (2, 4, 3, 2, 1, 3),  # (128, 23, 24)
    (4, 8, 3, 2, 1, 2),  # (256, 12, 12)
    (8, 16, 3, 2, 1, 2),  # (512, 6, 6)
    (16, 16, 3, 2, 1, 0),  # (512, 3, 3)
    (16, 16, 3, 1, 0, 0),  # (512, 1, 1)
    (16, 16, 1, 1, 0, 0),
)
MEL_STAGES = (
    (1, 1, 3, 1, 1, 2),  # (32, 80, 16)
    (1, 2, 3, (3, 1), 1, 2),  # (64, 27, 16)
    (2, 4, 3, 3, 1, 2),  # (128, 9, 6)
    (4, 8, 3, (3, 2), 1, 2),  # (256, 3, 3)
    (8, 16, 3, 1, 0, 0),  # (512, 1, 1)
    (16, 16, 1, 1, 0, 0),
)


class ConvBlock(nn.Module):
    """Convolution, batch norm, ReLU, with an optional skip connection before the ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int | tuple, padding: int, residual: bool
    ) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, padding), SyncBatchNorm(outputs))
        self.residual = residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, inputs, H, W) -> (B, outputs, H', W')."""
        y = self.conv_block(x)
        return functional.relu(x + y if self.residual else y)


def build_encoder(stages: tuple[tuple, ...], width: int) -> nn.Sequential:
    """Builds an encoder from `FACE_STAGES` or `MEL_STAGES`."""
    blocks = []
    for index, (inputs, outputs, kernel, stride, padding, repeats) in enumerate(stages):
        inputs, outputs = inputs * (width if index else 1), outputs * width
        blocks.append(ConvBlock(inputs, outputs, kernel, stride, padding, residual=False))
        blocks += [ConvBlock(outputs, outputs, 3, 1, 1, residual=True) for _ in range(repeats)]
    return nn.Sequential(*blocks)


class Wav2LipSyncNet(SyncNet):
    """Embeds 5 faces (B, 15, 48, 96), BGR in [0, 1], and mel (B, 1, 80, 16). D = 16 width = 512."""

    def __init__(self, width: int = 32) -> None:
        super().__init__(frames=5, image_size=96)
        self.face_encoder = build_encoder(FACE_STAGES, width)
        self.audio_encoder = build_encoder(MEL_STAGES, width)

    def preprocess(self, faces: torch.Tensor) -> torch.Tensor:
        return (faces.flip(1) + 1) / 2
