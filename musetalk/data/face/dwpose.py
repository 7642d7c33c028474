"""DWPose, the landmark network of MuseTalk: whole-body RTMPose-l with 133 points, 68 of them in the face.

Architecture and parameter names follow mmpose and mmdet
(https://github.com/open-mmlab/mmpose, RTMPose-l, whole body, 384 x 288) in plain
torch. Jiang et al. 2023, https://arxiv.org/abs/2303.07399 (RTMPose); Lyu et al. 2022, https://arxiv.org/abs/2212.07784
(CSPNeXt); Hua et al. 2022, https://arxiv.org/abs/2202.10447 (gated attention); Yang et al. 2023,
https://arxiv.org/abs/2307.15880 (DWPose). As in MuseTalk, the whole frame is the person's box.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import nn
from torch.nn import functional

from musetalk.data.face.face import Face
from musetalk.images import batched
from musetalk.models.weights import find, freeze, load_strictly, read_tensors, unwrap

WEIGHTS = "dwpose/dw-ll_ucoco_384.pth"
POINTS = 133
FACE = slice(23, 91)  # the 68 face points used by MuseTalk
INPUT_WIDTH, INPUT_HEIGHT = 288, 384
PADDING = 1.25  # of the box
SPLIT = 2.0  # SimCC bins per pixel
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of ImageNet, RGB in [0, 255]
BATCH = 4  # frames; doubled by flip testing. Up to 8 images the output on a CPU does not depend on the batch size
# Minimum mean score of the 68 points of a face. DWPose's own demo drops points below 0.3:
# https://github.com/IDEA-Research/DWPose, ControlNet-v1-1-nightly/annotator/dwpose/__init__.py
MIN_SCORE = 0.3


class ConvNorm(nn.Module):
    """Convolution, batch norm, SiLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        return functional.silu(self.bn(self.conv(x)), inplace=True)


class SeparableConv(nn.Module):
    """Depthwise convolution, then pointwise convolution."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.depthwise_conv = ConvNorm(width, width, kernel, groups=width)
        self.pointwise_conv = ConvNorm(width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, width, H, W) -> the same shape."""
        return self.pointwise_conv(self.depthwise_conv(x))


class Block(nn.Module):
    """CSPNeXt block: a 3x3 convolution and a separable 5x5 convolution, with an optional shortcut."""

    def __init__(self, width: int, shortcut: bool) -> None:
        super().__init__()
        self.conv1 = ConvNorm(width, width, 3)
        self.conv2 = SeparableConv(width, 5)
        self.shortcut = shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, width, H, W) -> the same shape."""
        y = self.conv2(self.conv1(x))
        return x + y if self.shortcut else y


class ChannelAttention(nn.Module):
    """Weights channels by a function of their global averages."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Conv2d(width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, width, H, W) -> the same shape."""
        return x * functional.hardsigmoid(self.fc(functional.adaptive_avg_pool2d(x, 1)))


class SplitStage(nn.Module):
    """Cross stage partial: half of the channels passes through the blocks, the other half bypasses them."""

    def __init__(self, width: int, blocks: int, shortcut: bool) -> None:
        super().__init__()
        half = width // 2
        self.main_conv = ConvNorm(width, half, 1)
        self.short_conv = ConvNorm(width, half, 1)
        self.final_conv = ConvNorm(width, width, 1)
        self.blocks = nn.Sequential(*(Block(half, shortcut) for _ in range(blocks)))
        self.attention = ChannelAttention(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, width, H, W) -> the same shape."""
        both = torch.cat([self.blocks(self.main_conv(x)), self.short_conv(x)], dim=1)
        return self.final_conv(self.attention(both))


class PyramidPooling(nn.Module):
    """Spatial pyramid pooling: max pooling at three sizes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(width, width // 2, 1)
        self.conv2 = ConvNorm(2 * width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, width, H, W) -> the same shape."""
        x = self.conv1(x)
        pooled = [functional.max_pool2d(x, size, stride=1, padding=size // 2) for size in (5, 9, 13)]
        return self.conv2(torch.cat([x, *pooled], dim=1))


class CSPNeXt(nn.Module):
    """CSPNeXt-L backbone with stride 32."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(ConvNorm(3, 32, 3, 2), ConvNorm(32, 32, 3), ConvNorm(32, 64, 3))
        self.stage1 = nn.Sequential(ConvNorm(64, 128, 3, 2), SplitStage(128, 3, True))
        self.stage2 = nn.Sequential(ConvNorm(128, 256, 3, 2), SplitStage(256, 6, True))
        self.stage3 = nn.Sequential(ConvNorm(256, 512, 3, 2), SplitStage(512, 6, True))
        self.stage4 = nn.Sequential(ConvNorm(512, 1024, 3, 2), PyramidPooling(1024), SplitStage(1024, 3, False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, 1024, H / 32, W / 32)."""
        return self.stage4(self.stage3(self.stage2(self.stage1(self.stem(x)))))


class ScaleNorm(nn.Module):
    """Normalises vectors to a root mean square of g (https://arxiv.org/abs/1910.05895)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1))
        self.scale = width**-0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., width) -> the same shape."""
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True) * self.scale
        return x / size.clamp(min=1e-5) * self.g


class Scale(nn.Module):
    """Learned scale per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., width) -> the same shape."""
        return x * self.scale


class GatedAttention(nn.Module):
    """Gated attention unit over the points, with squared ReLU instead of softmax."""

    def __init__(self, width: int, inner: int, keys: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(2, keys))
        self.beta = nn.Parameter(torch.zeros(2, keys))
        self.ln = ScaleNorm(width)
        self.uv = nn.Linear(width, 2 * inner + keys, bias=False)
        self.o = nn.Linear(inner, width, bias=False)
        self.res_scale = Scale(width)
        self.widths = [inner, inner, keys]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, K, width) -> the same shape."""
        gates, values, base = functional.silu(self.uv(self.ln(x))).split(self.widths, dim=-1)
        queries, keys = (base.unsqueeze(2) * self.gamma + self.beta).unbind(dim=2)  # (B, K, keys) each
        attention = functional.relu(queries @ keys.transpose(1, 2) / self.widths[-1] ** 0.5).square()  # (B, K, K)
        return self.res_scale(x) + self.o(gates * (attention @ values))


class SimCCHead(nn.Module):
    """Predicts for each point a score per column and per row of the input, at half-pixel resolution."""

    def __init__(self) -> None:
        super().__init__()
        places, width = INPUT_WIDTH // 32 * (INPUT_HEIGHT // 32), 256
        self.final_layer = nn.Conv2d(1024, POINTS, 7, padding=3)
        self.mlp = nn.Sequential(ScaleNorm(places), nn.Linear(places, width, bias=False))
        self.gau = GatedAttention(width, inner=512, keys=128)
        self.cls_x = nn.Linear(width, int(INPUT_WIDTH * SPLIT), bias=False)
        self.cls_y = nn.Linear(width, int(INPUT_HEIGHT * SPLIT), bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 1024, 12, 9) -> (B, 133, 576), (B, 133, 768)."""
        points = self.gau(self.mlp(self.final_layer(x).flatten(2)))
        return self.cls_x(points), self.cls_y(points)


class RTMPose(nn.Module):
    """RTMPose-l with 133 points, 33,610,919 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = CSPNeXt()
        self.head = SimCCHead()

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, 384, 288) normalised -> columns (B, 133, 576), rows (B, 133, 768)."""
        return self.head(self.backbone(images))


class DWPose:
    """Stateless face backend for one person per frame."""

    def __init__(self, network: RTMPose) -> None:
        self.network = freeze(network)

    def detect(self, frames: Sequence[np.ndarray]) -> list[list[Face]]:
        """Detects at most one face per frame. frames: BGR uint8 (H, W, 3), of any size."""
        return faces_of_points(*self.points(frames))

    def points(self, frames: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Estimates all points of the person in each frame: float64 (T, 133, 2) x, y in source pixels, and scores,
        float32 (T, 133).

        frames: BGR uint8 (H, W, 3), of any size. Scores are about 1 for visible points; they may exceed 1 or be
        negative.
        """
        points, scores = np.zeros((len(frames), POINTS, 2)), np.zeros((len(frames), POINTS), np.float32)
        for batch in batched(range(len(frames)), BATCH):
            columns, rows = self._simcc([warp(frames[index]) for index in batch])
            points[batch], scores[batch] = decode(columns, rows)
        for index, frame in enumerate(frames):
            centre, size = box_of_frame(frame)
            points[index] = points[index] / (INPUT_WIDTH, INPUT_HEIGHT) * size + centre - 0.5 * size  # float64
        return points, scores

    @torch.no_grad()
    def _simcc(self, views: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """B views of `warp` -> columns (B, 133, 576), rows (B, 133, 768), averaged with the mirrored views."""
        images = torch.from_numpy(np.stack(views)).to(next(self.network.parameters()).device)
        images = images.permute(0, 3, 1, 2).flip(1).float().contiguous()  # the memory layout affects the last bits
        mean, std = (images.new_tensor(values)[:, None, None] for values in (MEAN, STD))
        images = (images - mean) / std
        columns, rows = self.network(torch.cat([images, images.flip(-1)]))
        (columns, mirrored), (rows, rows_of_mirrored) = columns.chunk(2), rows.chunk(2)
        columns = (columns + mirrored[:, MIRRORED].flip(-1)) * 0.5
        rows = (rows + rows_of_mirrored[:, MIRRORED]) * 0.5
        return columns.cpu().numpy(), rows.cpu().numpy()


def load_dwpose(models_dir: Path, device: torch.device) -> DWPose:
    """Loads dwpose/dw-ll_ucoco_384.pth of a models folder. Raises WeightsError."""
    with torch.device("meta"):
        network = RTMPose()
    load_published(network, models_dir)
    return DWPose(network.to(device, torch.float32))


def load_published(network: nn.Module, models_dir: Path) -> None:
    """Loads dwpose/dw-ll_ucoco_384.pth, a checkpoint of mmengine, into a network with RTMPose's parameter names.

    Raises WeightsError.
    """
    path = find(models_dir, WEIGHTS)
    load_strictly(network, unwrap(read_tensors(path), path), path)


def box_of_frame(frame: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns centre and size of the network's view of a frame, each float32 (2,) in source pixels: the whole frame
    with a margin, extended to the aspect ratio of the input."""
    extent = np.array([frame.shape[1], frame.shape[0]], np.float32)
    width, height = extent * np.float32(PADDING)
    aspect = INPUT_WIDTH / INPUT_HEIGHT
    size = (width, width / aspect) if width > height * aspect else (height * aspect, height)
    return extent * np.float32(0.5), np.array(size, np.float32)


def warp(frame: np.ndarray) -> np.ndarray:
    """Warps a frame to the network's view: BGR uint8 (384, 288, 3), black outside the frame."""
    centre, size = box_of_frame(frame)
    left = centre - (size[0] / 2, 0)
    source = np.array([centre, left, left + (0, size[0] / 2)], np.float32)
    half = INPUT_WIDTH / 2
    target = np.array([(half, INPUT_HEIGHT / 2), (0, INPUT_HEIGHT / 2), (0, INPUT_HEIGHT / 2 + half)], np.float32)
    return cv2.warpAffine(frame, cv2.getAffineTransform(source, target), (INPUT_WIDTH, INPUT_HEIGHT))


def decode(columns: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """SimCC: columns (B, K, 576), rows (B, K, 768) -> points (B, K, 2) in pixels of the input, scores (B, K).

    A point is at the two maxima, and its score is the smaller maximum. Points without a positive score are half a
    pixel outside the input, as in mmpose.
    """
    points = np.stack([columns.argmax(axis=-1), rows.argmax(axis=-1)], axis=-1).astype(np.float32)
    scores = np.minimum(columns.max(axis=-1), rows.max(axis=-1))
    points[scores <= 0] = -1
    return points / np.float32(SPLIT), scores


def faces_of_points(points: np.ndarray, scores: np.ndarray) -> list[list[Face]]:
    """Extracts the face of each frame if its mean score reaches MIN_SCORE. points: (T, 133, 2). scores: (T, 133)."""
    faces = []
    for landmarks, score in zip(points[:, FACE], scores[:, FACE].mean(axis=1), strict=True):
        box = np.concatenate([landmarks.min(axis=0), landmarks.max(axis=0)])
        faces.append([Face(box, landmarks, min(1.0, float(score)))] if score >= MIN_SCORE else [])
    return faces


def _mirrored() -> list[int]:
    """Returns for each point the index of its mirrored counterpart."""
    order = np.arange(POINTS)
    nose_to_ankles, feet = range(1, 17, 2), range(17, 20)
    pairs = [(point, point + 1) for point in nose_to_ankles] + [(point, point + 3) for point in feet]
    sums = {16: range(8), 43: range(17, 22), 66: (31, 32), 81: (36, 37, 38, 39), 87: (40, 41), 102: (48, 49, 50)}
    sums |= {
        114: (55, 56),
        124: (60, 61),
        132: (65,),
    }  # sums of paired indices among the 68: jaw, brows, nose, eyes, lips
    pairs += [(23 + point, 23 + total - point) for total, points in sums.items() for point in points]
    pairs += [(point, point + 21) for point in range(91, 112)]  # hands
    for left, right in pairs:
        order[[left, right]] = right, left
    return order.tolist()


MIRRORED = _mirrored()
