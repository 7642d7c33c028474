"""MuseTalk's UNet: Stable Diffusion's architecture used once, without noise, from masked and reference latents.

Not diffusion: one step at timestep 0 whose output is the latents themselves.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.nn.grad import conv2d_weight

from musetalk.contract import LATENT_CHANNELS, LATENT_SIZE, WINDOW_STEPS
from musetalk.models.weights import WeightsError, build_network, find, load_strictly, read_tensors, unwrap

CONFIGS = ("musetalk/musetalk.json", "musetalkV15/musetalk.json")  # in a models folder; the first that is there is used
SINGLE_STEP_TIMESTEP = 0  # the network was made for diffusion and asks for one
WHISPER_STATES = {384: 5, 512: 7, 768: 13, 1024: 25, 1280: 33}  # width of a published Whisper -> its encoder's states
MAX_TOKENS = 5000
MAX_WIDTH = 2**14  # of a token; the largest Whisper's are 1280 wide


class UNet(nn.Module):
    """diffusers' UNet2DConditionModel (as `.model`, whose state dict is what files hold) and the positions."""

    def __init__(self, model: UNet2DConditionModel, positional_encoding: bool) -> None:
        super().__init__()
        self.model = model
        width = model.config.cross_attention_dim
        positions = sinusoid(MAX_TOKENS, width) if positional_encoding else torch.zeros(MAX_TOKENS, width)
        self.register_buffer("positions", positions, persistent=False)
        self.last_input: torch.Tensor | None = None  # of the last layer at the last forward, where it is kept

    def forward(self, unet_input: torch.Tensor, audio_window: torch.Tensor) -> torch.Tensor:
        """unet_input: (B, 8, 32, 32) masked then reference latents. audio_window: (B, W, D), time-major.

        Returns predicted latents (B, 4, 32, 32).
        """
        timestep = torch.full((), SINGLE_STEP_TIMESTEP, device=unet_input.device)
        tokens = audio_window + self.positions[: audio_window.shape[1]]  # (B, W, D)
        return self.model(unet_input, timestep, encoder_hidden_states=tokens).sample  # (B, 4, 32, 32)

    def keep_last_input(self) -> None:
        """Keep what the last layer gets in each forward, for `last_layer_gradient`. Comes before compiling."""

        def keep(_: nn.Module, inputs: tuple[torch.Tensor]) -> None:
            self.last_input = inputs[0].detach()  # (B, C, 32, 32)

        self.model.conv_out.register_forward_pre_hook(keep)

    def last_layer_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of a loss at the last layer's weight, (4, C, 3, 3), without a backward through the UNet.

        gradient: of the loss at the first n predictions of the last forward, (n, 4, 32, 32), float32 or float64.
        """
        layer, inputs = self.model.conv_out, self.last_input[: len(gradient)].to(gradient.dtype)
        return conv2d_weight(inputs, layer.weight.shape, gradient, layer.stride, layer.padding)

    def check_features(self, shape: tuple[int, int], source: str, known_encoder: bool = True) -> None:
        """Raises WeightsError where the network cannot attend to the audio features of a source.

        shape: S encoder states, each D wide. source: a name for the error message. known_encoder: whether the feature
        contract names the encoder that the network was trained with, or S must be that of the published Whisper of D.
        """
        (states, width), takes = shape, self.model.config.cross_attention_dim
        wanted = states if known_encoder else WHISPER_STATES.get(takes, states)
        if (states, width) != (wanted, takes):
            raise WeightsError(
                f"{source} has {states} states {width} wide, but the UNet attends to {wanted} states {takes} wide, its "
                f"cross_attention_dim; use the Whisper it was trained with, or train one with {width} in musetalk.json"
            )


def sinusoid(length: int, width: int) -> torch.Tensor:
    """Fixed positions (length, width): sines at even, cosines at odd places (Vaswani et al. 2017, section 3.5)."""
    position = torch.arange(length)[:, None]
    frequency = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000) / width))
    table = torch.zeros(length, width)
    table[:, 0::2] = torch.sin(position * frequency)
    table[:, 1::2] = torch.cos(position * frequency[: width // 2])
    return table


def _plan(models_dir: Path) -> UNet2DConditionModel:
    """The network that a models folder describes, on the meta device. Raises WeightsError."""

    def use(model: UNet2DConditionModel) -> None:
        if not 0 < (width := model.config.cross_attention_dim) <= MAX_WIDTH:
            raise ValueError(f"cross_attention_dim must be at most {MAX_WIDTH}")
        tokens = torch.empty(1, WINDOW_STEPS, width)
        made = model(torch.empty(1, 2 * LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE), 0, tokens).sample
        if made.shape != (1, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE):
            raise ValueError(f"of latents it makes {tuple(made.shape)}")

    return build_network(UNet2DConditionModel, find(models_dir, *CONFIGS), use)


def build_unet(models_dir: Path, seed: int, positional_encoding: bool) -> UNet:
    """An untrained UNet as a models folder describes it (`CONFIGS`), the same for the same seed.

    Raises WeightsError.
    """
    plan = _plan(models_dir)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet(UNet2DConditionModel.from_config(plan.config), positional_encoding)


def load_unet(models_dir: Path, path: Path, positional_encoding: bool) -> UNet:
    """A UNet as a models folder describes it (`CONFIGS`) with the weights of a file: .safetensors, or a torch file as
    MuseTalk publishes it (.bin, .pth) or a trainer wraps it. Raises WeightsError."""
    model = _plan(models_dir)
    load_strictly(model, unwrap(read_tensors(path), path), path)
    return UNet(model.float(), positional_encoding)
