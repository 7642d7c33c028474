"""The sync experts: does this mouth speak this audio? Wav2Lip's SyncNet and LatentSync's StableSyncNet.

Each turns a window of faces and the mel of its time into two unit vectors, whose product is 1 where they belong
together and 0 where they do not. Architectures, names and inputs: https://github.com/Rudrabha/Wav2Lip (SyncNet_color),
https://github.com/bytedance/LatentSync (stable_syncnet.py, configs/syncnet).
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from reprlib import repr as short
from typing import Annotated

import safetensors.torch
import torch
from annotated_types import Ge, Le, Len, MultipleOf
from pydantic import TypeAdapter, ValidationError
from torch import nn
from torch.nn import functional

from musetalk.contract import SYNC_MEL_BINS, sync_mel_frames
from musetalk.files import read_json
from musetalk.models.weights import (
    LOAD_ERRORS,
    WeightsError,
    find,
    freeze,
    load_strictly,
    read_tensors,
    unwrap,
    write_tensors,
)

GROUPS = 32  # of a group norm
HEADS = 8  # of an attention
EPS = 1e-6

# Wav2Lip's stages: inputs, outputs, kernel, stride, padding, residual blocks after it; widths in units of 32 channels,
# except for the first input.
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


class SyncNet(nn.Module):
    """What both experts have in common: windows of `frames` faces and `mel_frames` of mel -> vectors of one width.

    frames: video frames of a window, 25 a second. image_size: pixels, to which faces are resized. mel_frames: of the
    same time, 80 a second, rounded up.
    """

    face_encoder: nn.Module
    audio_encoder: nn.Module

    def __init__(self, frames: int, image_size: int) -> None:
        super().__init__()
        self.frames, self.image_size = frames, image_size
        self.mel_frames = sync_mel_frames(frames)

    def forward(self, images: torch.Tensor, mel: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """images: (B, frames, 3, H, W), mel: (B, mel_frames, 80). Returns their embeddings, each (B, D)."""
        return self.embed(images, mel)

    def embed(self, images: torch.Tensor, mel: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The embeddings of faces and of mel, each float32 (B, D), 0 or more, of length 1.

        images: (B, frames, 3, H, W) whole face crops, RGB in [-1, 1], of which the lower half is seen.
        mel: (B, mel_frames, 80) in [-4, 4], as `audio.sync_mel` makes it.
        """
        return self.embed_faces(images), self.embed_mel(mel)

    def embed_faces(self, images: torch.Tensor) -> torch.Tensor:
        """(B, frames, 3, H, W) -> (B, D), the half of `embed` that a gradient goes through."""
        assert images.shape[1:3] == (self.frames, 3), images.shape
        faces = images.float().clamp(-1, 1).flatten(0, 1)  # (B frames, 3, H, W)
        if faces.shape[2:] != (self.image_size, self.image_size):
            faces = functional.interpolate(faces, (self.image_size,) * 2, mode="bilinear", antialias=True)
        faces = self.preprocess(faces[:, :, self.image_size // 2 :])  # (B frames, 3, size / 2, size)
        faces = faces.unflatten(0, (-1, self.frames)).flatten(1, 2)  # (B, 3 frames, size / 2, size)
        return _unit(self.face_encoder, faces)

    def embed_mel(self, mel: torch.Tensor) -> torch.Tensor:
        """(B, mel_frames, 80) -> (B, D)."""
        assert mel.shape[1:] == (self.mel_frames, SYNC_MEL_BINS), mel.shape
        return _unit(self.audio_encoder, mel.transpose(1, 2)[:, None])  # of (B, 1, 80, mel_frames)

    def preprocess(self, faces: torch.Tensor) -> torch.Tensor:
        """Faces RGB in [-1, 1] as the network was trained to see them."""
        return faces


def _unit(encoder: nn.Module, values: torch.Tensor) -> torch.Tensor:
    """Vectors of length 1, float32 (B, D)."""
    values = encoder(values.to(next(encoder.parameters()).dtype))  # (B, D, 1, 1)
    return functional.normalize(values.flatten(1).float(), dim=1)


# Wav2Lip's.


class MeanOverProcesses(torch.autograd.Function):
    """The mean of every process's tensor, which the gradients of all of them go back through."""

    @staticmethod
    def forward(_, values: torch.Tensor) -> torch.Tensor:
        values = values.contiguous().clone()
        torch.distributed.all_reduce(values)
        return values / torch.distributed.get_world_size()

    @staticmethod
    def backward(_, gradient: torch.Tensor) -> torch.Tensor:
        return MeanOverProcesses.apply(gradient)


class SharedBatchNorm(nn.BatchNorm2d):
    """A batch norm for which the batches of all processes, all as large, are one while it is trained.

    torch's SyncBatchNorm does so too, on GPUs alone.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        if not (self.training and torch.distributed.is_initialized()):
            return super().forward(x)
        count = x.numel() // x.shape[1] * torch.distributed.get_world_size()
        values = x.to(self.weight.dtype)
        mean = MeanOverProcesses.apply(values.mean((0, 2, 3), keepdim=True))  # (1, C, 1, 1)
        centred = values - mean
        variance = MeanOverProcesses.apply(centred.square().mean((0, 2, 3), keepdim=True))
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_var.lerp_(variance.flatten() * (count / (count - 1)), self.momentum)
        scale = self.weight[:, None, None] * (variance + self.eps).rsqrt()
        return (centred * scale + self.bias[:, None, None]).to(x.dtype)


class ConvBlock(nn.Module):
    """Convolution, batch norm, ReLU; its input is added before the ReLU where it is residual."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int | tuple, padding: int, residual: bool
    ) -> None:
        super().__init__()
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding)
        self.conv_block = nn.Sequential(convolution, SharedBatchNorm(outputs))
        self.residual = residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, inputs, H, W) -> (B, outputs, H', W')."""
        y = self.conv_block(x)
        return functional.relu(x + y if self.residual else y)


def _stages(stages: tuple[tuple, ...], width: int) -> nn.Sequential:
    blocks = []
    for index, (inputs, outputs, *convolution, repeats) in enumerate(stages):
        inputs, outputs = inputs * (width if index else 1), outputs * width
        blocks.append(ConvBlock(inputs, outputs, *convolution, residual=False))
        blocks += [ConvBlock(outputs, outputs, 3, 1, 1, residual=True) for _ in range(repeats)]
    return nn.Sequential(*blocks)


class Wav2LipSyncNet(SyncNet):
    """Wav2Lip's expert: 5 faces (B, 15, 48, 96), BGR in [0, 1], and mel (B, 1, 80, 16) -> D = 16 width = 512."""

    def __init__(self, width: int = 32) -> None:
        super().__init__(frames=5, image_size=96)
        self.face_encoder = _stages(FACE_STAGES, width)
        self.audio_encoder = _stages(MEL_STAGES, width)

    def preprocess(self, faces: torch.Tensor) -> torch.Tensor:
        return (faces.flip(1) + 1) / 2


# LatentSync's.

Channels = Annotated[int, Ge(GROUPS), Le(2**13), MultipleOf(GROUPS)]
Factor = Annotated[int, Ge(1), Le(16)]


@dataclass(frozen=True)
class EncoderConfig:
    """Of one encoder, by LatentSync's names: a list has an entry for each block."""

    in_channels: Annotated[int, Ge(1), Le(3 * 64)]
    block_out_channels: Annotated[tuple[Channels, ...], Len(1, 16)]
    downsample_factors: tuple[Factor | tuple[Factor, Factor], ...]  # down, or down and across
    attn_blocks: tuple[Annotated[int, Ge(0), Le(1)], ...]  # 1 where an attention follows


@dataclass(frozen=True)
class StableConfig:
    """Of a StableSyncNet. The visual encoder takes 3 channels a frame; resolution: pixels, of which half the height.

    The last width, D, is normed in 32 groups: with few channels in each, little but signs is left of an embedding.
    """

    resolution: Annotated[int, Ge(2), Le(1024), MultipleOf(2)] = 256
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
PIXEL_ATTENTION = StableConfig(  # syncnet_16_pixel_attn
    visual_encoder=replace(STABLE_SYNCNET_16.visual_encoder, attn_blocks=(0, 0, 0, 0, 1, 1, 0, 0)),
    audio_encoder=replace(STABLE_SYNCNET_16.audio_encoder, attn_blocks=(0, 0, 0, 1, 1, 0, 0)),
)


class ResnetBlock(nn.Module):
    """Two normed convolutions beside a shortcut, then a convolution that makes it smaller."""

    def __init__(self, inputs: int, outputs: int, factor: int | tuple[int, int]) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, inputs, EPS)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = nn.GroupNorm(GROUPS, outputs, EPS)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        down, across = (factor, factor) if isinstance(factor, int) else factor
        # Before and after: one each where the size stays, else one after.
        self.padding = [size for stride in (across, down) for size in ((1, 1) if stride == 1 else (0, 1))]
        self.downsample_conv = nn.Conv2d(outputs, outputs, 3, (down, across)) if factor != 1 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / down, W / across)."""
        y = self.conv1(functional.silu(self.norm1(x)))  # (B, outputs, H, W)
        y = self.conv2(functional.silu(self.norm2(y))) + self.conv_shortcut(x)  # (B, outputs, H, W)
        return y if self.downsample_conv is None else self.downsample_conv(functional.pad(y, self.padding))


class Attention(nn.Module):
    """Each place of a picture looks at all others."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, places, width) -> the same shape."""
        queries, keys, values = (
            project(x).unflatten(2, (HEADS, -1)).transpose(1, 2)  # (B, heads, places, width / heads)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        seen = functional.scaled_dot_product_attention(queries, keys, values)
        return self.to_out(seen.transpose(1, 2).flatten(2))


class Gated(nn.Module):
    """One half of a projection, weighted by the GELU of the other (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.proj = nn.Linear(inputs, 2 * outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, places, inputs) -> (B, places, outputs)."""
        values, gate = self.proj(x).chunk(2, dim=2)
        return values * functional.gelu(gate)


class AttentionBlock(nn.Module):
    """Attention and a gated perceptron, between two 1 x 1 convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, width, EPS)
        self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.conv_in, self.conv_out = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.attn = Attention(width)
        perceptron = nn.Sequential(Gated(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))
        self.ff = nn.Sequential(OrderedDict(net=perceptron))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, width, H, W) -> the same shape."""
        y = self.conv_in(self.norm1(x)).flatten(2).transpose(1, 2)  # (B, H W, width)
        y = y + self.attn(self.norm2(y))
        y = y + self.ff(self.norm3(y))
        return x + self.conv_out(y.transpose(1, 2).unflatten(2, x.shape[2:]))  # (B, width, H, W)


class Encoder(nn.Module):
    """Blocks that leave one place of a picture."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        places = zip(widths[:1] + widths, widths, config.downsample_factors, config.attn_blocks, strict=False)
        for inputs, outputs, factor, attention in places:
            self.down_blocks.append(ResnetBlock(inputs, outputs, factor))
            if attention:
                self.down_blocks.append(AttentionBlock(outputs))
        self.norm_out = nn.GroupNorm(GROUPS, widths[-1], EPS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, H, W) -> (B, D, 1, 1), 0 or more."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return functional.relu(self.norm_out(x))


class StableSyncNet(SyncNet):
    """LatentSync's expert: 16 faces (B, 48, 128, 256), RGB in [-1, 1], and mel (B, 1, 80, 52) -> D = 2048."""

    def __init__(self, config: StableConfig) -> None:
        super().__init__(config.visual_encoder.in_channels // 3, config.resolution)
        self.visual_encoder = Encoder(config.visual_encoder)
        self.audio_encoder = Encoder(config.audio_encoder)

    @property
    def face_encoder(self) -> Encoder:
        return self.visual_encoder


PIXEL_NARROW = StableConfig(  # ours, to try things with: 16.3 million parameters instead of 371.8
    resolution=128,
    visual_encoder=EncoderConfig(48, (32, 32, 64, 64, 128, 256, 512), ((1, 2), 2, 2, 2, 2, 2, 2), (0,) * 7),
    audio_encoder=replace(STABLE_SYNCNET_16.audio_encoder, block_out_channels=(32, 32, 64, 64, 128, 256, 512)),
)

# Building, saving and loading.

ARCHITECTURES: dict[str, Callable[[], SyncNet]] = {
    "wav2lip": Wav2LipSyncNet,
    "wav2lip_narrow": lambda: Wav2LipSyncNet(width=8),
    "latentsync": lambda: StableSyncNet(STABLE_SYNCNET_16),
    "latentsync_attention": lambda: StableSyncNet(PIXEL_ATTENTION),
    "latentsync_narrow": lambda: StableSyncNet(PIXEL_NARROW),
}
PUBLISHED = {  # file in a models folder -> its architecture where no configuration beside it says otherwise
    "syncnet/lipsync_expert.pth": "wav2lip",
    "syncnet/latentsync_syncnet.pt": "latentsync",  # what MuseTalk v1.5 trains against
    "syncnet/stable_syncnet.pt": "latentsync_attention",
}
TRAINED_NAME = re.compile(r"^syncnet-(\d+)\.safetensors$")


def build_syncnet(architecture: str, seed: int) -> SyncNet:
    """An untrained expert of a name of `ARCHITECTURES`, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ARCHITECTURES[architecture]()


def save_syncnet(run_dir: Path, step: int, network: SyncNet, architecture: str) -> Path:
    """Write an expert to use, all that it holds and its architecture in the one metadata key.

    Raises WeightsError where it cannot be written.
    """
    path = run_dir / f"syncnet-{step:07d}.safetensors"
    write_tensors(path, network.state_dict(), {"architecture": architecture})
    return path


def load_syncnet(models_dir: Path, name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> SyncNet:
    """A frozen expert.

    name: a file of `PUBLISHED` in a models folder, or a syncnet-<step>.safetensors that syncnet_trainer.py made
    anywhere, or a folder whose newest is taken. A published StableSyncNet of other widths has its configuration beside
    it, of the same name but .json: `StableConfig` by the names of its fields.
    Raises WeightsError where a file is missing or is something else.
    """
    if name in PUBLISHED:
        path = find(models_dir, name)
        config = path.with_suffix(".json")
        build = (lambda: _plan(config)) if config.is_file() else ARCHITECTURES[PUBLISHED[name]]
    else:
        path = find_trained(Path(name))
        build = ARCHITECTURES[_architecture(path)]
    with torch.device("meta"):
        network = build()
    load_strictly(network, unwrap(read_tensors(path), path), path)
    return freeze(network).to(device, dtype)


def find_trained(place: Path) -> Path:
    """A trained expert: a file itself, the newest of a run's folder. Raises WeightsError where there is none."""
    if place.is_file():
        return place
    found = {int(match[1]): path for path in place.glob("*") if (match := TRAINED_NAME.match(path.name))}
    if not found:
        raise WeightsError(
            f"{place} is no sync expert: name a file of the models folder ({', '.join(PUBLISHED)}), a "
            "syncnet-<step>.safetensors that syncnet_trainer.py made, or the folder of one"
        )
    return found[max(found)]


def _architecture(path: Path) -> str:
    """The architecture that `save_syncnet` put into a file. Raises WeightsError where there is none."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            name = (file.metadata() or {}).get("architecture")
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsError(f"{path} cannot be read as a sync expert that syncnet_trainer.py made: {error}") from error
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise WeightsError(f"{path} is no sync expert: its architecture is {short(name)}, not one of {known}")
    return name


def _plan(path: Path) -> StableSyncNet:
    """The network of a configuration file, on the device at hand. Raises WeightsError."""
    try:
        config = TypeAdapter(StableConfig).validate_python(read_json(path))
        for encoder in (config.visual_encoder, config.audio_encoder):
            if not len(encoder.block_out_channels) == len(encoder.downsample_factors) == len(encoder.attn_blocks):
                raise ValueError("a list of an encoder has another length than the others")
        if config.visual_encoder.in_channels % 3 or config.audio_encoder.in_channels != 1:
            raise ValueError("in_channels must be 3 for each frame, and 1 of mel")
        network = StableSyncNet(config)
        images = torch.empty(2, network.frames, 3, config.resolution, config.resolution)
        made = [tuple(x.shape) for x in network.embed(images, torch.empty(2, network.mel_frames, SYNC_MEL_BINS))]
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise WeightsError(f"{path} describes no StableSyncNet: {where}: {fault['msg']}") from error
    except LOAD_ERRORS as error:
        raise WeightsError(f"{path} describes no StableSyncNet: {str(error).splitlines()[0]}") from error
    if made[0] != made[1]:
        raise WeightsError(f"{path} describes no StableSyncNet: of faces it makes {made[0]}, of mel {made[1]}")
    return network
