"""The small VAE, and initial weights from which it trains fast."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch.nn.init import dirac_

from musetalk.contract import IMAGE_SIZE, LATENT_CHANNELS
from tools.make_mini.config import Config

CONSTANT = 4.0  # magnitude of the constants that make a GroupNorm ignore contrast


def build_vae(config: Config) -> AutoencoderKL:
    """The small VAE with random weights."""
    blocks = len(config.block_out_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=config.block_out_channels,
        norm_num_groups=config.norm_num_groups,
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        mid_block_add_attention=False,
        sample_size=IMAGE_SIZE,
    )


@torch.no_grad()
def start_as_colour_pyramid(vae: AutoencoderKL) -> None:
    """Initialises some weights so that training starts from area downsampling and bilinear upsampling of the colours.

    Channels 0-2 carry the colours along the residual path: averaged in the encoder's downsampling, converted to
    opponent colours (luma and two differences) in latents 0-2, interpolated in the decoder's upsampling. All other
    weights stay random, but do not write to these channels initially.

    Pairs of channels cancel the SiLU before both last convolutions, silu(x) - silu(-x) = x, and constants +-CONSTANT in
    the same group make its GroupNorm ignore the contrast of the image.
    """
    average, tent = torch.zeros(3, 3), torch.tensor([1.0, 2.0, 1.0]) / 4
    average[:2, :2] = 1 / 4
    centre = torch.zeros(3, 3)
    centre[1, 1] = 1
    opponent = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [1.0, 0.0, -1.0], [-0.5, 1.0, -0.5]])
    opponent *= torch.tensor([[2.0], [3.0], [6.0]])  # to a similar spread

    encoder, decoder = vae.encoder, vae.decoder
    blocks = [*encoder.down_blocks, encoder.mid_block, decoder.mid_block, *decoder.up_blocks]
    for resnet in [resnet for block in blocks for resnet in block.resnets]:
        resnet.conv2.weight *= 0.5
        _write(resnet.conv2, torch.zeros(3, 3), torch.zeros(3, 3))
        if resnet.conv_shortcut is not None:
            _write(resnet.conv_shortcut, torch.eye(3), torch.ones(1, 1))
    for block in encoder.down_blocks[:-1]:
        _write(block.downsamplers[0].conv, torch.eye(3), average)
    for block in decoder.up_blocks[:-1]:
        _write(block.upsamplers[0].conv, torch.eye(3), torch.outer(tent, tent))
    _write(encoder.conv_in, torch.eye(3), centre)
    _write(decoder.conv_in, torch.linalg.inv(opponent), centre)

    last = encoder.down_blocks[-1].resnets
    _pair_colours(last[0], [*last[1:], *encoder.mid_block.resnets], encoder.conv_out, 3, opponent)
    last = decoder.up_blocks[-1].resnets
    _pair_colours(last[0], last[1:], decoder.conv_out, 1, torch.eye(3))
    encoder.conv_out.weight[LATENT_CHANNELS:] *= 0.1
    encoder.conv_out.bias[LATENT_CHANNELS:] = -6  # log variance
    for conv in (vae.quant_conv, vae.post_quant_conv):
        dirac_(conv.weight)
        conv.bias.zero_()


def _write(conv: torch.nn.Conv2d, matrix: torch.Tensor, kernel: torch.Tensor) -> None:
    """Makes the first outputs of a convolution `matrix` (outputs, inputs) times the first inputs, through `kernel`."""
    outputs, inputs = matrix.shape
    conv.weight[:outputs] = 0
    conv.weight[:outputs, :inputs] = matrix[:, :, None, None] * kernel
    conv.get_parameter("bias")[:outputs] = 0


def _pair_colours(
    first: ResnetBlock2D,
    later: Iterable[ResnetBlock2D],
    conv_out: torch.nn.Conv2d,
    num_constants: int,
    matrix: torch.Tensor,
) -> None:
    """Makes `conv_out` return `matrix` (3, 3) times the colours, which are input channels 0-2 of the resnet `first`.

    Group c of the GroupNorm starts with +colour c, -colour c and `num_constants` pairs of constants; the resnets
    `later` do not change these channels.
    """
    shortcut, norm = first.conv_shortcut, first.norm2
    size = norm.num_channels // norm.num_groups
    reserved = 2 + 2 * num_constants
    rows = torch.cat([torch.arange(reserved) + c * size for c in range(3)])
    signs = torch.tensor([1.0, -1.0]).repeat(num_constants)
    for conv in (shortcut, first.conv2, *(resnet.conv2 for resnet in later)):
        conv.weight[rows] = 0
        conv.bias[rows] = 0
    # Mean squares in a group: colours 1/4, other channels 1/2, roughly
    gain = math.sqrt((2 * num_constants * CONSTANT**2 + 2 / 4 + (size - reserved) / 2) / size)
    conv_out.get_parameter("bias")[:3] = 0
    conv_out.weight[:3] *= 0.1
    for c in range(3):
        shortcut.weight[c * size : c * size + 2, c, 0, 0] = signs[:2]
        shortcut.bias[c * size + 2 : c * size + reserved] = CONSTANT * signs
        conv_out.weight[:3, c * size : c * size + reserved] = 0
        conv_out.weight[:3, c * size, 1, 1] = gain * matrix[:, c]
        conv_out.weight[:3, c * size + 1, 1, 1] = -gain * matrix[:, c]
