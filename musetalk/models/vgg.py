"""LPIPS: how different two images look, by what VGG16 sees in them.

Zhang et al. 2018, https://arxiv.org/abs/1801.03924; weights and constants of version 0.1 of
https://github.com/richzhang/PerceptualSimilarity; the trunk is torchvision's VGG16, trained on ImageNet.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import nn

from musetalk.models.weights import find, freeze, load_strictly, read_tensors, unwrap

WIDTHS = (64, 128, 256, 512, 512)  # channels of the five stages
DEPTHS = (2, 2, 3, 3, 3)  # convolutions of each
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of images RGB in [-1, 1]
EPS = 1e-8  # added to a squared length, so that a dark place has a gradient


class VGG16(nn.Module):
    """The convolutions, by torchvision's names: features at the end of each of five stages."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        layers, self.ends, inputs = [], [], 3
        for width, depth in zip(widths, DEPTHS, strict=True):
            layers += [nn.MaxPool2d(2)] if layers else []
            for _ in range(depth):
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU(inplace=True)]
                inputs = width
            self.ends.append(len(layers))
        self.features = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """(B, 3, H, W) -> one after another five of (B, width, H / 2^k, W / 2^k), k = 0 to 4, each 0 or more."""
        begin = 0
        for end in self.ends:
            x = self.features[begin:end](x)
            yield x
            begin = end


class Heads(nn.Module):
    """How much each channel of each stage counts, by the published names lin0.model.1.weight to lin4."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        for index, width in enumerate(widths):
            head = nn.Sequential(nn.Identity(), nn.Conv2d(width, 1, 1, bias=False))
            self.add_module(f"lin{index}", nn.Sequential(OrderedDict(model=head)))

    def forward(self, differences: Iterable[torch.Tensor]) -> torch.Tensor:
        """Five of (B, width, H, W) -> (B,): weighted sums over channels, means over places, summed over stages."""
        weights = (head.model[1].weight[0] for head in self.children())  # (width, 1, 1) each
        pairs = zip(weights, differences, strict=True)  # of a convolution each input would be kept
        return sum((difference * weight).sum(dim=1).mean(dim=(1, 2)) for weight, difference in pairs)


class LPIPS(nn.Module):
    """The distance of images. Its weights never get a gradient, the images do."""

    def __init__(self, trunk: VGG16, heads: Heads) -> None:
        super().__init__()
        self.trunk, self.heads = trunk, heads
        freeze(self)

    def forward(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """one, other: RGB (B, 3, H, W) in [-1, 1], 16 pixels or more. Returns float32 (B,), 0 where they look the same.

        At each place of each stage the features are taken as a vector of length 1; the squared differences of the two
        are weighted by channel, averaged over places and summed over stages.
        """
        # Stage by stage, so that few of the large float32 features live at once.
        stages = zip(self._look(one), self._look(other), strict=True)
        return self.heads((self._unit(a) - self._unit(b)).square() for a, b in stages)

    def _look(self, images: torch.Tensor) -> Iterator[torch.Tensor]:
        """(B, 3, H, W) in [-1, 1] -> one after another the trunk's features of five stages."""
        # By numbers of the host, since it waits while a tensor of them goes to a GPU.
        channels = zip(images.unbind(1), SHIFT, SCALE, strict=True)
        images = torch.stack([(channel - shift) / scale for channel, shift, scale in channels], dim=1)
        return self.trunk(images.to(self.trunk.features[0].weight.dtype))

    def _unit(self, features: torch.Tensor) -> torch.Tensor:
        """(B, width, H, W) -> vectors of length 1 at each place, in the heads' precision."""
        features = features.to(self.heads.lin0.model[1].weight.dtype)
        return features * (features.square().sum(dim=1, keepdim=True) + EPS).rsqrt()


def load_lpips(models_dir: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> LPIPS:
    """LPIPS of vgg/vgg16-397923af.pth (of which the classifier is not needed) and vgg/lpips.pth in a models folder.

    dtype: of the trunk; distances are float32. Raises WeightsError.
    """
    with torch.device("meta"):
        trunk, heads = VGG16(), Heads()
    path = find(models_dir, "vgg/vgg16-397923af.pth")
    tensors = unwrap(read_tensors(path), path)
    load_strictly(trunk, {name: x for name, x in tensors.items() if not str(name).startswith("classifier.")}, path)
    path = find(models_dir, "vgg/lpips.pth")
    load_strictly(heads, unwrap(read_tensors(path), path), path)
    return LPIPS(trunk.to(device, dtype), heads.to(device, torch.float32))
