"""LatentSync's StableSyncNet. Architecture, parameter names and inputs: https://github.com/bytedance/LatentSync
(stable_syncnet.py, configs/syncnet)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Ge, Len, MultipleOf
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from pydantic import TypeAdapter, ValidationError
from torch import nn
from torch.nn import functional

from musetalk.contract import SYNC_MEL_BINS
from musetalk.files import read_json
from musetalk.models.syncnet.base import SyncNet
from musetalk.models.weights import LOAD_ERRORS, WeightsError, first_line

GROUPS = 32  # of each group norm
HEADS = 8  # of each attention
EPS = 1e-6

Channels = Annotated[int, Ge(GROUPS), MultipleOf(GROUPS)]
Factor = Annotated[int, Ge(1)]


@dataclass(frozen=True)
class EncoderConfig:
    """The configuration of an encoder, with LatentSync's names. Lists have an entry per block."""

    in_channels: Annotated[int, Ge(1)]
    block_out_channels: Annotated[tuple[Channels, ...], Len(1)]
    downsample_factors: tuple[Factor | tuple[Factor, Factor], ...]  # of both axes, or of height and width
    attn_blocks: tuple[Annotated[int, Ge(0)], ...]  # 1 if the block is followed by attention


@dataclass(frozen=True)
class StableConfig:
    """The configuration of a StableSyncNet. The visual encoder has 3 input channels per frame.

    resolution: width of a face in pixels; the network sees the lower half of it. The output is normalised in 32 groups:
    if the last width, D, leaves few channels per group, an embedding carries little more than signs.
    """

    resolution: Annotated[int, Ge(2), MultipleOf(2)] = 256
    visual_encoder: EncoderConfig = field(
        default=EncoderConfig(
            in_channels=48,
            block_out_channels=(64, 128, 256, 256, 512, 1024, 2048, 2048),
            downsample_factors=((1, 2), 2, 2, 2, 2, 2, 2, 2),
            attn_blocks=(0,) * 8,
        )
    )
    audio_encoder: EncoderConfig = field(
        default=EncoderConfig(
            in_channels=1,
            block_out_channels=(32, 64, 128, 256, 512, 1024, 2048),
            downsample_factors=((2, 1), 2, 2, 1, 2, 2, (2, 3)),
            attn_blocks=(0,) * 7,
        )
    )


STABLE_SYNCNET_16 = StableConfig()  # syncnet_16_pixel
STABLE_SYNCNET_16_ATTENTION = StableConfig(  # syncnet_16_pixel_attn
    visual_encoder=replace(STABLE_SYNCNET_16.visual_encoder, attn_blocks=(0, 0, 0, 0, 1, 1, 0, 0)),
    audio_encoder=replace(STABLE_SYNCNET_16.audio_encoder, attn_blocks=(0, 0, 0, 1, 1, 0, 0)),
)
STABLE_SYNCNET_16_NARROW = StableConfig(  # ours, for experiments: 16.3 million parameters instead of 371.8
    resolution=128,
    visual_encoder=EncoderConfig(48, (32, 32, 64, 64, 128, 256, 512), ((1, 2), 2, 2, 2, 2, 2, 2), (0,) * 7),
    audio_encoder=replace(STABLE_SYNCNET_16.audio_encoder, block_out_channels=(32, 32, 64, 64, 128, 256, 512)),
)


class ResnetBlock(ResnetBlock2D):
    """diffusers' residual block, followed by a strided convolution if a factor is not 1."""

    def __init__(self, inputs: int, outputs: int, factor: int | tuple[int, int]) -> None:
        super().__init__(in_channels=inputs, out_channels=outputs, temb_channels=None, groups=GROUPS, eps=EPS)
        stride_y, stride_x = (factor, factor) if isinstance(factor, int) else factor
        # Left, right, top, bottom: padded on both sides along an axis of stride 1, else only at the end.
        self.padding = [size for stride in (stride_x, stride_y) for size in ((1, 1) if stride == 1 else (0, 1))]
        self.downsample_conv = nn.Conv2d(outputs, outputs, 3, (stride_y, stride_x)) if factor != 1 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride_y, W / stride_x)."""
        y = super().forward(x, None)  # (B, outputs, H, W)
        return y if self.downsample_conv is None else self.downsample_conv(functional.pad(y, self.padding))


class AttentionBlock(nn.Module):
    """Self-attention over positions and a gated MLP, between two 1 x 1 convolutions, with a skip connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, width, EPS)
        self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.conv_in, self.conv_out = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.attn = Attention(width, heads=HEADS, dim_head=width // HEADS, bias=True)
        self.ff = FeedForward(width, activation_fn="geglu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, width, H, W) -> the same shape."""
        y = self.conv_in(self.norm1(x)).flatten(2).transpose(1, 2)  # (B, H W, width)
        y = y + self.attn(self.norm2(y))
        y = y + self.ff(self.norm3(y))
        return x + self.conv_out(y.transpose(1, 2).unflatten(2, x.shape[2:]))  # (B, width, H, W)


class Encoder(nn.Module):
    """Residual and attention blocks that reduce an image to one position."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        blocks = zip(widths[:1] + widths, widths, config.downsample_factors, config.attn_blocks, strict=False)
        for inputs, outputs, factor, attention in blocks:
            self.down_blocks.append(ResnetBlock(inputs, outputs, factor))
            if attention:
                self.down_blocks.append(AttentionBlock(outputs))
        self.norm_out = nn.GroupNorm(GROUPS, widths[-1], EPS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, H, W) -> (B, D, 1, 1), non-negative."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return functional.relu(self.norm_out(x))


class StableSyncNet(SyncNet):
    """Embeds 16 faces (B, 48, 128, 256), RGB in [-1, 1], and mel (B, 1, 80, 52). D = 2048."""

    def __init__(self, config: StableConfig) -> None:
        super().__init__(config.visual_encoder.in_channels // 3, config.resolution)
        self.visual_encoder = Encoder(config.visual_encoder)
        self.audio_encoder = Encoder(config.audio_encoder)

    @property
    def face_encoder(self) -> Encoder:  # type: ignore[override]  # published files name it visual_encoder
        return self.visual_encoder


def build_from_file(path: Path) -> StableSyncNet:
    """Builds the network of a JSON file of `StableConfig`, on the current device. Raises WeightsError."""
    fault = f"{path} does not describe a StableSyncNet"
    try:
        config = TypeAdapter(StableConfig).validate_python(read_json(path))
        for encoder in (config.visual_encoder, config.audio_encoder):
            if not len(encoder.block_out_channels) == len(encoder.downsample_factors) == len(encoder.attn_blocks):
                raise ValueError("the lists of an encoder must have the same length")
        if config.visual_encoder.in_channels % 3 or config.audio_encoder.in_channels != 1:
            raise ValueError("in_channels must be 3 per frame for faces, and 1 for mel")
        network = StableSyncNet(config)
        images = torch.empty(2, network.frames, 3, config.resolution, config.resolution)
        embeddings = network.embed(images, torch.empty(2, network.mel_frames, SYNC_MEL_BINS))
    except ValidationError as error:
        details = error.errors()[0]
        raise WeightsError(f"{fault}: {'.'.join(map(str, details['loc']))}: {details['msg']}") from error
    except LOAD_ERRORS as error:
        raise WeightsError(f"{fault}: {first_line(error)}") from error
    of_faces, of_mel = (tuple(x.shape) for x in embeddings)
    if of_faces != of_mel:
        raise WeightsError(f"{fault}: the embeddings of faces have the shape {of_faces}, those of mel {of_mel}")
    return network
