"""Patch discriminator: which patches of an image look real?"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

MAX_WIDTH = 512  # channels


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
        strides = [2] * layers + [1, 1]
        self.convolutions = nn.ModuleList(
            spectral_norm(nn.Conv2d(inputs, outputs, 4, stride, padding=1))
            for inputs, outputs, stride in zip(widths, widths[1:], strides, strict=False)
        )
        self.eval()

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """images: RGB (B, 3, H, W) in [-1, 1]. Returns logits (B, 1, h, w) and `layers` + 1 features.

        Logits are positive for real patches; h = H / 2^layers - 2, w likewise.
        Features are (B, width, H / 2, W / 2), (B, 2 width, H / 4, W / 4), ...
        """
        *hidden, last = self.convolutions
        x, features = images.to(next(self.parameters()).dtype), []
        for convolution in hidden:
            x = functional.leaky_relu(convolution(x), 0.2, inplace=True)
            features.append(x)
        return last(x), features

    @torch.no_grad()
    def power_iteration(self) -> None:
        """Runs one power iteration for the current weights; call it once after each update."""
        self.train()
        for convolution in self.convolutions:
            convolution.get_submodule("parametrizations.weight")()
        self.eval()
