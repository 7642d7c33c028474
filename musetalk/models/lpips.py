"""LPIPS, a perceptual distance of two images from the features of VGG16.

Zhang et al. 2018, https://arxiv.org/abs/1801.03924; weights and constants are those of version 0.1 of
https://github.com/richzhang/PerceptualSimilarity; the trunk is torchvision's VGG16, trained on ImageNet.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import nn

from musetalk.models.weights import find, freeze, load_strictly, read_tensors, unwrap

TRUNK, HEADS = "vgg/vgg16-397923af.pth", "vgg/lpips.pth"
WIDTHS = (64, 128, 256, 512, 512)  # channels of the five stages
DEPTHS = (2, 2, 3, 3, 3)  # convolutions per stage
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # for RGB in [-1, 1]
EPS = 1e-8  # added to the squared norm, so that the gradient is finite where all features are 0


class VGG16(nn.Module):
    """The convolutions, under torchvision's names. Yields the features at the end of each of five stages."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.ends, inputs = [], 3
        for width, depth in zip(widths, DEPTHS, strict=True):
            layers += [nn.MaxPool2d(2)] if layers else []
            for _ in range(depth):
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU(inplace=True)]
                inputs = width
            self.ends.append(len(layers))
        self.features = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """(B, 3, H, W) -> yields (B, width, H / 2^k, W / 2^k) for k = 0 to 4, non-negative."""
        begin = 0
        for end in self.ends:
            x = self.features[begin:end](x)
            yield x
            begin = end


class Heads(nn.Module):
    """The weights of the channels of each stage, under the published names lin0.model.1.weight to lin4."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        for index, width in enumerate(widths):
            head = nn.Sequential(nn.Identity(), nn.Conv2d(width, 1, 1, bias=False))
            self.add_module(f"lin{index}", nn.Sequential(OrderedDict(model=head)))

    def forward(self, differences: Iterable[torch.Tensor]) -> torch.Tensor:
        """Five of (B, width, H, W) -> (B,): weighted sums over channels, spatial means, sum over stages."""
        weights = (weight[0] for weight in self.parameters())  # (width, 1, 1) each
        pairs = zip(weights, differences, strict=True)  # a convolution would keep its input for backward
        distances = ((difference * weight).sum(dim=1).mean(dim=(1, 2)) for weight, difference in pairs)
        return sum(distances)  # type: ignore[return-value]  # 0 only without stages


class LPIPS(nn.Module):
    """The distance, with frozen weights. Gradients flow to the images."""

    def __init__(self, trunk: VGG16, heads: Heads) -> None:
        super().__init__()
        self.trunk, self.heads = trunk, heads
        freeze(self)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Returns the distance, float32 (B,), 0 for images that look the same.

        x, y: RGB (B, 3, H, W) in [-1, 1], at least 16 pixels wide and high. In each stage the features are normalised
        to length 1 at each position; their squared differences are weighted per channel, averaged over positions and
        summed over stages.
        """
        # Stage by stage, so that few of the large float32 features are in memory at a time.
        stages = zip(self._features(x), self._features(y), strict=True)
        return self.heads((self._unit(a) - self._unit(b)).square() for a, b in stages)

    def _features(self, images: torch.Tensor) -> Iterator[torch.Tensor]:
        """(B, 3, H, W) in [-1, 1] -> yields the trunk's features of the five stages."""
        # With Python floats: copying a tensor of constants to a GPU would synchronise.
        channels = zip(images.unbind(1), SHIFT, SCALE, strict=True)
        images = torch.stack([(channel - shift) / scale for channel, shift, scale in channels], dim=1)
        return self.trunk(images.to(next(self.trunk.parameters()).dtype))

    def _unit(self, features: torch.Tensor) -> torch.Tensor:
        """(B, width, H, W) -> vectors of length 1 at each position, in the heads' dtype."""
        features = features.to(next(self.heads.parameters()).dtype)
        return features * (features.square().sum(dim=1, keepdim=True) + EPS).rsqrt()


def load_lpips(models_dir: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> LPIPS:
    """Loads `TRUNK` (without its classifier) and `HEADS` of a models folder.

    dtype: of the trunk; the distance is float32. Raises WeightsError.
    """
    with torch.device("meta"):
        trunk, heads = VGG16(), Heads()
    path = find(models_dir, TRUNK)
    tensors = unwrap(read_tensors(path), path)
    load_strictly(trunk, {name: x for name, x in tensors.items() if not str(name).startswith("classifier.")}, path)
    path = find(models_dir, HEADS)
    load_strictly(heads, unwrap(read_tensors(path), path), path)
    return LPIPS(trunk.to(device, dtype), heads.to(device, torch.float32))
