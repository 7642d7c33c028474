"""A small stand-in for the VAE's decoder, through which losses on images cost little: TAESD's, by diffusers.

Architecture: https://github.com/madebyollin/taesd. The weights are distilled from a VAE by tools/distil_decoder.py.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import safetensors
import torch
from annotated_types import Ge, Le
from diffusers.models.autoencoders.vae import DecoderTiny
from pydantic import TypeAdapter, ValidationError

from musetalk.contract import LATENT_CHANNELS
from musetalk.models.vae import VAE
from musetalk.models.weights import WeightsError, freeze, load_strictly, read_tensors, write_tensors

TAESD_WIDTH = 64
BLOCKS = (3, 3, 3, 1)  # residual ones at 32, 64, 128 and 256 pixels

Width = Annotated[int, Ge(1), Le(TAESD_WIDTH)]  # channels of every layer


@dataclass(frozen=True)
class Origin:
    """What a file says of its decoder."""

    vae: str  # fingerprint of the VAE that it stands in for
    width: Width


class TinyDecoder(DecoderTiny):
    """Latents, scaled as the UNet sees them -> images. TAESD's has a width of 64 and 1.2 M parameters."""

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
        """As VAE.decode: (B, 4, 32, 32) -> RGB float32 (B, 3, 256, 256), about [-1, 1]."""
        return self(latents.to(self.layers[0].weight.dtype)).float()


def save_tiny_decoder(path: Path, decoder: TinyDecoder, vae: VAE) -> None:
    """Write a decoder that was distilled from a VAE. Raises WeightsError where it cannot be written."""
    origin = asdict(Origin(vae.fingerprint, decoder.width))
    write_tensors(path, decoder.state_dict(), {"tiny_decoder": json.dumps(origin)})


def load_tiny_decoder(path: Path, vae: VAE) -> TinyDecoder:
    """A frozen decoder that was distilled from this VAE, where and in the precision that the VAE is.

    Raises WeightsError where it is none, or of another VAE.
    """
    origin = _origin(path)
    if origin.vae != vae.fingerprint:
        raise WeightsError(
            f"{path} was distilled from the VAE {origin.vae}, not from {vae.fingerprint}, which is used here; make "
            "one with python -m tools.distil_decoder"
        )
    with torch.device("meta"):
        decoder = TinyDecoder(origin.width)
    load_strictly(decoder, read_tensors(path), path)
    return freeze(decoder).to(vae.autoencoder.device, vae.autoencoder.dtype, memory_format=torch.channels_last)


def _origin(path: Path) -> Origin:
    """What `save_tiny_decoder` put into a file. Raises WeightsError where there is none."""
    try:
        if not path.is_file():  # a pipe would be waited for
            raise FileNotFoundError("there is no such file")
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("tiny_decoder", "")
        return TypeAdapter(Origin).validate_json(text, strict=True)
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsError(f"{path} cannot be read as a tiny decoder: {error}") from error
    except ValidationError as error:
        raise WeightsError(f"{path} is no tiny decoder that tools/distil_decoder.py made") from error
