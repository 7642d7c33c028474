"""BlazeFace, MediaPipe's face detector, in two sizes.

Bazarevsky et al. 2019, https://arxiv.org/abs/1907.05047; the layers are those of MediaPipe's published networks
(Apache-2.0, https://github.com/google-ai-edge/mediapipe, mediapipe/modules/face_detection).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

POINTS = 8  # of a face: two corners of its box, the eyes, nose tip, mouth and ears


def same_padding(x: torch.Tensor, kernel: int) -> torch.Tensor:
    """Pads an even-sized input (B, C, H, W) of a convolution with stride 2 as TensorFlow's "same" padding does."""
    before, after = (kernel - 2) // 2, (kernel - 1) // 2
    return functional.pad(x, (before, after, before, after))


class BlazeBlock(nn.Module):
    """Separable convolution with a residual connection.

    With stride 2 the shortcut is max-pooled; new channels of the shortcut are zero.
    """

    def __init__(self, inputs: int, outputs: int, activation: nn.Module, stride: int = 1) -> None:
        super().__init__()
        self.stride, self.new_channels = stride, outputs - inputs
        self.depthwise = nn.Conv2d(inputs, inputs, 3, stride, padding=2 - stride, groups=inputs)
        self.pointwise = nn.Conv2d(inputs, outputs, 1)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        y, shortcut = x, x
        if self.stride == 2:
            y, shortcut = same_padding(x, 3), functional.max_pool2d(x, 2)
        if self.new_channels:
            shortcut = functional.pad(shortcut, (0, 0, 0, 0, 0, self.new_channels))
        return self.activation(self.pointwise(self.depthwise(y)) + shortcut)


def blaze_blocks(inputs: int, widths: tuple[int, ...], activation: Callable[[int], nn.Module]) -> nn.Sequential:
    """Blaze blocks of these output widths; a negative one has stride 2. activation: width -> module."""
    blocks = []
    for width in widths:
        outputs = abs(width)
        blocks.append(BlazeBlock(inputs, outputs, activation(outputs), 1 if width > 0 else 2))
        inputs = outputs
    return nn.Sequential(*blocks)


def relu(_: int) -> nn.ReLU:
    """An activation of any width."""
    return nn.ReLU(inplace=True)


class ShortRangeDetector(nn.Module):
    """Detects faces within about two metres of the camera: 128 x 128 pixels, 101,390 parameters."""

    anchors: torch.Tensor
    size = 128  # pixels, width and height of the input
    min_score = 0.5  # of a face

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 5, 2)
        self.blocks16 = blaze_blocks(24, (24, 28, -32, 36, 42, -48, 56, 64, 72, 80, 88), relu)
        self.blocks8 = blaze_blocks(88, (-96, 96, 96, 96, 96), relu)
        self.score16, self.score8 = nn.Conv2d(88, 2, 1), nn.Conv2d(96, 6, 1)
        self.face16, self.face8 = nn.Conv2d(88, 2 * 2 * POINTS, 1), nn.Conv2d(96, 6 * 2 * POINTS, 1)
        # Two anchors in each of 16 x 16 cells, six in each of 8 x 8.
        anchors = [cell_centres(16).repeat_interleave(2, dim=0), cell_centres(8).repeat_interleave(6, dim=0)]
        self.register_buffer("anchors", torch.cat(anchors), persistent=False)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, 3, 128, 128), RGB in [0, 1] -> faces (B, 896, 8, 2), their scores in [0, 1] (B, 896).

        A face: two corners of its box and six points, x, y relative to the input.
        """
        x = self.blocks16(functional.relu(self.stem(same_padding(2 * images - 1, 5))))
        y = self.blocks8(x)
        logits = [rows(self.score16(x), 1), rows(self.score8(y), 1)]
        values = [rows(self.face16(x), 2 * POINTS), rows(self.face8(y), 2 * POINTS)]
        return decode(torch.cat(values, dim=1) / self.size, self.anchors), torch.cat(logits, dim=1).flatten(1).sigmoid()


class Bottleneck(nn.Module):
    """Two separable convolutions with fewer channels between them, and a residual connection if shapes permit."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.residual = inputs == outputs
        self.depthwise1 = nn.Conv2d(inputs, inputs, 3, stride, padding=1, groups=inputs)
        self.pointwise1 = nn.Conv2d(inputs, inner, 1)
        self.depthwise2 = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.pointwise2 = nn.Conv2d(inner, outputs, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        y = functional.relu(self.pointwise1(self.depthwise1(x)), inplace=True)
        y = self.pointwise2(self.depthwise2(y))
        return functional.relu(y.add_(x) if self.residual else y, inplace=True)


def stage(inputs: int, inner: int, outputs: int, blocks: int = 3) -> nn.Sequential:
    """Bottlenecks, the first of which halves the size."""
    return nn.Sequential(
        Bottleneck(inputs, inner, outputs, 2), *(Bottleneck(outputs, inner, outputs) for _ in range(blocks - 1))
    )


class FullRangeDetector(nn.Module):
    """Detects faces within about five metres of the camera: 192 x 192 pixels, a pyramid, 508,308 parameters."""

    anchors: torch.Tensor
    size = 192
    min_score = 0.6

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, 2, padding=1)
        self.shallow = nn.Sequential(Bottleneck(32, 8, 32), Bottleneck(32, 8, 32))
        self.down = nn.ModuleList([stage(32, 16, 64), stage(64, 32, 128), stage(128, 48, 192)])
        self.lateral = nn.ModuleList([nn.Conv2d(64, 48, 1), nn.Conv2d(128, 64, 1), nn.Conv2d(192, 96, 1)])
        self.deep = stage(192, 96, 384, blocks=4)
        self.narrow = nn.ModuleList([nn.Conv2d(384, 96, 1), nn.Conv2d(96, 64, 1), nn.Conv2d(64, 48, 1)])
        self.up = nn.ModuleList(
            [
                nn.Sequential(Bottleneck(96, 48, 96), Bottleneck(96, 48, 96)),
                nn.Sequential(Bottleneck(64, 32, 64), Bottleneck(64, 32, 64)),
                nn.Sequential(Bottleneck(48, 24, 48)),
            ]
        )
        self.score, self.face = self._head(4), self._head(4 * 2 * POINTS)
        self.register_buffer("anchors", cell_centres(48), persistent=False)  # one in each of 48 x 48 cells

    @staticmethod
    def _head(outputs: int) -> nn.Sequential:
        depthwise = nn.Conv2d(outputs, outputs, 3, 2, padding=1, groups=outputs)
        return nn.Sequential(nn.Conv2d(48, outputs, 1), depthwise, nn.PixelShuffle(2))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, 3, 192, 192), RGB in [0, 1] -> faces (B, 2304, 8, 2), their scores in [0, 1] (B, 2304).

        See `ShortRangeDetector.forward`.
        """
        x = self.shallow(functional.relu(self.stem(2 * images - 1)))
        levels = []
        for stage, lateral in zip(self.down, self.lateral, strict=True):
            x = stage(x)
            levels.append(functional.relu(lateral(x)))
        x = self.deep(x)
        for narrow, level, stage in zip(self.narrow, reversed(levels), self.up, strict=True):
            x = functional.interpolate(functional.relu(narrow(x)), scale_factor=2, mode="bilinear")
            x = stage(level + x)
        scores = self.score(x).flatten(1).sigmoid()
        return decode(rows(self.face(x), 2 * POINTS) / self.size, self.anchors), scores


def rows(x: torch.Tensor, width: int) -> torch.Tensor:
    """(B, anchors x width, H, W) -> (B, H x W x anchors, width)."""
    return x.permute(0, 2, 3, 1).reshape(len(x), -1, width)


def decode(values: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Outputs (B, N, 16) -> faces (B, N, 8, 2). anchors: (N, 2) x, y.

    An output is the centre relative to its anchor, width and height of the box, and the points relative to the anchor.
    """
    values = values.unflatten(-1, (POINTS, 2))
    centre, half = values[:, :, :1] + anchors[:, None], values[:, :, 1:2] / 2
    return torch.cat([centre - half, centre + half, values[:, :, 2:] + anchors[:, None]], dim=2)


def cell_centres(count: int) -> torch.Tensor:
    """Centres of count x count cells of the unit square, row by row: (count ** 2, 2) x, y."""
    centres = (torch.arange(count) + 0.5) / count
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    return torch.stack([x, y], dim=-1).flatten(0, 1)
