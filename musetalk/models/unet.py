"""MuseTalk's UNet: Stable Diffusion's architecture, applied once to masked and reference latents.

This is not diffusion: there is no noise, and a single step at timestep 0 predicts the latents directly.
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

CONFIGS = ("musetalk/musetalk.json", "musetalkV15/musetalk.json")  # in a models folder; the first existing one is used
SINGLE_STEP_TIMESTEP = 0  # the architecture requires a timestep
WHISPER_STATES = {
    384: 5,
    512: 7,
    768: 13,
    1024: 25,
    1280: 33,
}  # width of a published Whisper -> S
MAX_TOKENS = 5000


class UNet(nn.Module):
    """diffusers' UNet2DConditionModel (`.model`, whose state dict is the file format) with positional encoding."""

    positions: torch.Tensor  # (MAX_TOKENS, D)

    def __init__(self, model: UNet2DConditionModel, positional_encoding: bool) -> None:
        super().__init__()
        self.model = model
        width = model.config.cross_attention_dim
        positions = sinusoid(MAX_TOKENS, width) if positional_encoding else torch.zeros(MAX_TOKENS, width)
        self.register_buffer("positions", positions, persistent=False)
        self.last_input: torch.Tensor | None = None  # input of the last layer in the last forward, if kept

    def forward(self, unet_input: torch.Tensor, audio_window: torch.Tensor) -> torch.Tensor:
        """Returns the predicted latents (B, 4, 32, 32).

        unet_input: (B, 8, 32, 32), masked then reference latents. audio_window: (B, W, D), time-major.
        """
        timestep = torch.full((), SINGLE_STEP_TIMESTEP, device=unet_input.device)
        tokens = audio_window + self.positions[: audio_window.shape[1]]  # (B, W, D)
        return self.model(unet_input, timestep, encoder_hidden_states=tokens).sample  # (B, 4, 32, 32)

    def keep_last_input(self) -> None:
        """Keeps the input of the last layer in each forward, for `last_layer_gradient`. Call before compiling."""

        def keep(_: nn.Module, inputs: tuple[torch.Tensor]) -> None:
            self.last_input = inputs[0].detach()  # (B, C, 32, 32)

        self.model.conv_out.register_forward_pre_hook(keep)

    def last_layer_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """Computes the gradient of a loss with respect to the last layer's weight, (4, C, 3, 3), without a backward
        pass through the UNet.

        gradient: of the loss with respect to the first n predictions of the last forward, (n, 4, 32, 32), float32 or
        float64.
        """
        assert self.last_input is not None, "keep_last_input must be called before the forward pass"
        layer, inputs = self.model.conv_out, self.last_input[: len(gradient)].to(gradient.dtype)
        return conv2d_weight(inputs, layer.weight.shape, gradient, layer.stride, layer.padding)

    def check_features(self, shape: tuple[int, ...], source: str, known_encoder: bool = True) -> None:
        """Checks that audio features fit the UNet. Raises WeightsError if not.

        shape: (S, D). source: the origin of the features, for the error message. known_encoder: whether the feature
        contract names the audio encoder of the training; if not, S must be that of the published Whisper of width D.
        """
        (states, width), expected_width = shape, self.model.config.cross_attention_dim
        expected_states = states if known_encoder else WHISPER_STATES.get(expected_width, states)
        if (states, width) != (expected_states, expected_width):
            raise WeightsError(
                f"{source} has {states} states of width {width}, but the UNet expects {expected_states} of width "
                f"{expected_width} (cross_attention_dim); use the Whisper it was trained with, or train a UNet with "
                f"{width} in musetalk.json"
            )


def sinusoid(length: int, width: int) -> torch.Tensor:
    """Returns the sinusoidal positional encoding (length, width) (Vaswani et al. 2017, section 3.5)."""
    position = torch.arange(length)[:, None]
    frequency = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000) / width))
    table = torch.zeros(length, width)
    table[:, 0::2] = torch.sin(position * frequency)
    table[:, 1::2] = torch.cos(position * frequency[: width // 2])
    return table


def _meta_unet(models_dir: Path) -> UNet2DConditionModel:
    """Builds the network of a models folder's configuration on the meta device. Raises WeightsError."""

    def check(model: UNet2DConditionModel) -> None:
        tokens = torch.empty(1, WINDOW_STEPS, model.config.cross_attention_dim)
        output = model(torch.empty(1, 2 * LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE), 0, tokens).sample
        if output.shape != (1, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE):
            raise ValueError(f"its output has the shape {tuple(output.shape)}")

    return build_network(UNet2DConditionModel, find(models_dir, *CONFIGS), check)


def build_unet(models_dir: Path, seed: int, positional_encoding: bool) -> UNet:
    """Builds an untrained UNet from the configuration in a models folder (`CONFIGS`), seeded.

    Raises WeightsError.
    """
    config = _meta_unet(models_dir).config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet(UNet2DConditionModel.from_config(config), positional_encoding)


def load_unet(models_dir: Path, path: Path, positional_encoding: bool) -> UNet:
    """Loads a UNet from the configuration in a models folder (`CONFIGS`) and a file of weights.

    path: .safetensors, or a torch file: MuseTalk's (.bin, .pth) or a trainer's checkpoint. Raises WeightsError.
    """
    model = _meta_unet(models_dir)
    load_strictly(model, unwrap(read_tensors(path), path), path)
    return UNet(model.float(), positional_encoding)
