"""A small replacement for the VAE's decoder that makes pixel losses cheap: TAESD's decoder, as in diffusers.

Architecture: https://github.com/madebyollin/taesd. tools/distil_decoder.py distils the weights from a VAE.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import safetensors
import torch
from annotated_types import Ge, Le
from diffusers.models.autoencoders.vae import DecoderTiny
from pydantic import TypeAdapter, ValidationError
from torch.nn import functional

from musetalk.contract import LATENT_CHANNELS
from musetalk.models.vae import VAE
from musetalk.models.weights import WeightsError, freeze, load_strictly, read_tensors, write_tensors

TAESD_WIDTH = 64
BLOCKS = (3, 3, 3, 1)  # residual blocks at 32, 64, 128 and 256 pixels

Width = Annotated[int, Ge(1), Le(TAESD_WIDTH)]  # channels of each layer


@dataclass(frozen=True)
class Origin:
    """The metadata of a decoder file."""

    vae: str  # fingerprint of the VAE it was distilled from
    width: Width


class TinyDecoder(DecoderTiny):
    """Decodes scaled latents, as the UNet predicts them. TAESD's width is 64 (1.2 M parameters)."""

    def __init__(self, width: int = TAESD_WIDTH) -> None:
        super().__init__(
            in_channels=LATENT_CHANNELS,
            out_channels=3,
            num_blocks=BLOCKS,
            block_out_channels=(width,) * len(BLOCKS),
            upsampling_scaling_factor=2,
            act_fn="relu",
            upsample_fn="nearest",
        )
        self.width = width

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, 4, 32, 32) -> RGB float32 (B, 3, 256, 256), about [-1, 1], like VAE.decode."""
        return self(latents.to(self.layers[0].weight.dtype)).float()


def save_tiny_decoder(path: Path, decoder: TinyDecoder, vae: VAE) -> None:
    """Writes a decoder that was distilled from a VAE. Raises WeightsError if writing fails."""
    origin = asdict(Origin(vae.fingerprint, decoder.width))
    write_tensors(path, decoder.state_dict(), {"tiny_decoder": json.dumps(origin)})


def load_tiny_decoder(path: Path, vae: VAE) -> TinyDecoder:
    """Loads a frozen decoder that was distilled from this VAE, with the VAE's device and dtype.

    Raises WeightsError if the file is not such a decoder or belongs to another VAE.
    """
    origin = _origin(path)
    if origin.vae != vae.fingerprint:
        raise WeightsError(
            f"{path} was distilled from the VAE {origin.vae}, but the VAE in use is {vae.fingerprint}; distil a "
            "decoder from it with python -m tools.distil_decoder"
        )
    with torch.device("meta"):
        decoder = TinyDecoder(origin.width)
    load_strictly(decoder, read_tensors(path), path)
    return freeze(decoder).to(vae.autoencoder.device, vae.autoencoder.dtype, memory_format=torch.channels_last)


@torch.no_grad()
def decoder_psnr(decoder: TinyDecoder, vae: VAE, latents: torch.Tensor) -> float:
    """PSNR in dB of a decoder's images against those of the VAE's decoder, for latents (B, 4, 32, 32) together."""
    images, truth = (x.decode(latents).clamp(-1, 1) for x in (decoder, vae))
    return 10 * math.log10(2**2 / functional.mse_loss(images, truth).item())


def _origin(path: Path) -> Origin:
    """Reads the metadata that `save_tiny_decoder` wrote. Raises WeightsError."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("tiny_decoder", "")
        return TypeAdapter(Origin).validate_json(text, strict=True)
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsError(f"{path} cannot be read as a tiny decoder: {error}") from error
    except ValidationError as error:
        raise WeightsError(f"{path} is not a tiny decoder; make one with python -m tools.distil_decoder") from error
