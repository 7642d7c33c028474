"""The face parser, which labels each pixel as skin, lips, nose, hair etc.: BiSeNet on ResNet-18, trained on
CelebAMask-HQ. MuseTalk uses it for blending.

Architecture, parameter names and classes: https://github.com/zllrunning/face-parsing.PyTorch (its ResNet-18 is
torchvision's without the last layer); Yu et al. 2018, https://arxiv.org/abs/1808.00897.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from musetalk.models.weights import find, freeze, load_strictly, read_tensors, unwrap

WEIGHTS = "face-parse-bisent/79999_iter.pth"
INPUT_SIZE = 512  # pixels, width and height
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, for RGB in [0, 1]
# Left and right from the person's point of view.
CLASSES = (
    *("background", "skin", "left_brow", "right_brow", "left_eye", "right_eye", "glasses", "left_ear", "right_ear"),
    *("earring", "nose", "mouth", "upper_lip", "lower_lip", "neck", "necklace", "clothes", "hair", "hat"),
)


class ConvNorm(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, inputs, H, W) -> (B, outputs, H, W)."""
        return functional.relu(self.bn(self.conv(x)))


class BasicBlock(nn.Module):
    """ResNet's basic block: two convolutions and a shortcut (He et al. 2015, https://arxiv.org/abs/1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.downsample(x) + self.bn2(self.conv2(y)))


class ResNet18(nn.Module):
    """The backbone. Returns features at strides 8, 16 and 32."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        widths = (64, 64, 128, 256, 512)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(BasicBlock(inputs, outputs, 1 if inputs == outputs else 2), BasicBlock(outputs, outputs, 1))
            for inputs, outputs in zip(widths, widths[1:], strict=False)
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, 3, H, W) -> (B, 128, H / 8, W / 8), (B, 256, H / 16, W / 16), (B, 512, H / 32, W / 32)."""
        x = functional.relu(self.bn1(self.conv1(x)))  # (B, 64, H / 2, W / 2)
        x = functional.max_pool2d(x, 3, stride=2, padding=1)  # (B, 64, H / 4, W / 4)
        stride8 = self.layer2(self.layer1(x))
        stride16 = self.layer3(stride8)
        return stride8, stride16, self.layer4(stride16)


class AttentionRefinement(nn.Module):
    """Channel attention computed from the global average of the features."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = ConvNorm(inputs, outputs, 3)
        self.conv_atten = nn.Conv2d(outputs, outputs, 1, bias=False)
        self.bn_atten = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, inputs, H, W) -> (B, outputs, H, W)."""
        x = self.conv(x)
        return x * torch.sigmoid(self.bn_atten(self.conv_atten(_average(x))))


class ContextPath(nn.Module):
    """Context features, from the global average down to stride 8."""

    def __init__(self) -> None:
        super().__init__()
        self.resnet = ResNet18()
        self.arm16, self.arm32 = AttentionRefinement(256, 128), AttentionRefinement(512, 128)
        self.conv_head16, self.conv_head32 = ConvNorm(128, 128, 3), ConvNorm(128, 128, 3)
        self.conv_avg = ConvNorm(512, 128, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, H, W) -> detail (B, 128, H / 8, W / 8) and context of the same shape."""
        detail, stride16, stride32 = self.resnet(x)
        context = self.arm32(stride32) + self.conv_avg(_average(stride32))  # (B, 128, H / 32, W / 32)
        context = self.conv_head32(functional.interpolate(context, stride16.shape[2:]))  # (B, 128, H / 16, W / 16)
        context = self.arm16(stride16) + context
        return detail, self.conv_head16(functional.interpolate(context, detail.shape[2:]))


class FeatureFusion(nn.Module):
    """Fuses detail and context features, with channel attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convblk = ConvNorm(width, width, 1)
        self.conv1 = nn.Conv2d(width, width // 4, 1, bias=False)
        self.conv2 = nn.Conv2d(width // 4, width, 1, bias=False)

    def forward(self, detail: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Each (B, width / 2, H, W) -> (B, width, H, W)."""
        x = self.convblk(torch.cat([detail, context], dim=1))
        return x + x * torch.sigmoid(self.conv2(functional.relu(self.conv1(_average(x)))))


class Head(nn.Module):
    """Computes class scores from features."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.conv = ConvNorm(inputs, width, 3)
        self.conv_out = nn.Conv2d(width, len(CLASSES), 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, inputs, H, W) -> (B, 19, H, W)."""
        return self.conv_out(self.conv(x))


class BiSeNet(nn.Module):
    """Computes scores of the 19 classes. conv_out16 and conv_out32, heads for auxiliary training losses, are in the
    published file and are not used here."""

    def __init__(self) -> None:
        super().__init__()
        self.cp = ContextPath()
        self.ffm = FeatureFusion(256)
        self.conv_out = Head(256, 256)
        self.conv_out16, self.conv_out32 = Head(128, 64), Head(128, 64)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images: (B, 3, H, W) normalised by MEAN and STD, H and W multiples of 32. Returns (B, 19, H, W)."""
        scores = self.conv_out(self.ffm(*self.cp(images)))  # (B, 19, H / 8, W / 8)
        return functional.interpolate(scores, images.shape[2:], mode="bilinear", align_corners=True)


def _average(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B, C, 1, 1)."""
    return x.mean(dim=(2, 3), keepdim=True)


class FaceParser:
    """Predicts the class of each pixel."""

    def __init__(self, network: BiSeNet) -> None:
        self.network = freeze(network)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Returns indices into CLASSES, uint8 (B, 512, 512).

        images: RGB (B, 3, H, W) in [-1, 1]; resized to 512 x 512 without keeping the aspect ratio.
        """
        weight = self.network.conv_out.conv_out.weight
        images = functional.interpolate(
            images.to(weight.device).float(), (INPUT_SIZE,) * 2, mode="bilinear", antialias=True
        )
        mean, std = (images.new_tensor(values)[:, None, None] for values in (MEAN, STD))
        return self.network((((images + 1) / 2 - mean) / std).to(weight.dtype)).argmax(dim=1).to(torch.uint8)


def load_face_parser(models_dir: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> FaceParser:
    """Loads face-parse-bisent/79999_iter.pth of a models folder. Raises WeightsError.

    MuseTalk also ships resnet18-5c106cde.pth, the initialisation of the parser's training. It is not needed here.
    """
    path = find(models_dir, WEIGHTS)
    with torch.device("meta"):
        network = BiSeNet()
    load_strictly(network, unwrap(read_tensors(path), path), path)
    return FaceParser(network.to(device, dtype))
