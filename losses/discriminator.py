"""Patch discriminator: which patches of an image look real?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

MAX_WIDTH = 512  # channels

Layers = Sequence[tuple[torch.Tensor, torch.Tensor]]  # weight and bias of each convolution


class PatchDiscriminator(nn.Module):
    """The patch discriminator of pix2pix with spectral norms instead of batch norms.

    By default each logit has a receptive field of 70 x 70 pixels, 256 x 256 pixels give 30 x 30 logits, and there are
    2.76 M parameters. Without batch norms images are independent, so a batch can be processed in chunks. Spectral norm
    divides a convolution's weight by its largest singular value, estimated by power iteration. The network is always in
    eval mode: `forward` does not change the estimate, only `power_iteration` does.

    Isola et al. 2017, https://arxiv.org/abs/1611.07004 (patches); Miyato et al. 2018, https://arxiv.org/abs/1802.05957.
    """

    def __init__(self, width: int = 64, layers: int = 3) -> None:
        """width: channels of the first convolution, doubled by each one up to 512. layers: number with stride 2."""
        super().__init__()
        widths = [3, *(min(width * 2**index, MAX_WIDTH) for index in range(layers + 1)), 1]
        self.strides = [2] * layers + [1, 1]
        self.convolutions = nn.ModuleList(
            spectral_norm(nn.Conv2d(inputs, outputs, 4, stride, padding=1))
            for inputs, outputs, stride in zip(widths, widths[1:], self.strides, strict=False)
        )
        self.eval()

    def normalised(self) -> Layers:
        """Returns the normalised weights and the biases, with a graph to the parameters."""
        return [(layer.weight, layer.bias) for layer in self.convolutions]  # type: ignore[misc]  # they are nn.Conv2d

    def forward(self, images: torch.Tensor, layers: Layers | None = None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """images: RGB (B, 3, H, W) in [-1, 1]. layers: what `normalised` returned, if several passes share it.

        Returns logits (B, 1, h, w) and a feature of each convolution except the last. Logits are positive for real
        patches; with n features, h = H / 2^(n - 1) - 2, w likewise. Features are (B, width, H / 2, W / 2),
        (B, 2 width, H / 4, W / 4), ...
        """
        layers = self.normalised() if layers is None else layers
        x, features = images.to(layers[0][0].dtype), []
        for index, ((weight, bias), stride) in enumerate(zip(layers, self.strides, strict=True)):
            if index:
                x = functional.leaky_relu(x, 0.2, inplace=True)
                features.append(x)
            x = functional.conv2d(x, weight, bias, stride, padding=1)
        return x, features

    @torch.no_grad()
    def power_iteration(self) -> None:
        """Runs one power iteration for the current weights; call it once after each update."""
        self.train()
        for convolution in self.convolutions:
            convolution.get_submodule("parametrizations.weight")()
        self.eval()
