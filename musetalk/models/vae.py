"""The frozen VAE between images and latents: Stable Diffusion's AutoencoderKL (sd-vae-ft-mse) by diffusers.

Three states of a face: crop (uint8 pixels) -> cached latents (float16, scaled) -> what the UNet sees (the same).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn

from musetalk.contract import IMAGE_SIZE, LATENT_CHANNELS, LATENT_SIZE, FeatureContract
from musetalk.images import batched, mask_lower_half, to_tensor
from musetalk.models.weights import build_network, find, fingerprint, freeze, load_strictly, read_tensors, unwrap

# What the published file calls the layers of the middle attention -> what diffusers does today.
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
# The folders that MuseTalk's scripts of v1.0 and v1.5 leave, and the formats: the first file that is there is loaded.
FILES = tuple(
    f"{folder}/diffusion_pytorch_model.{ending}"
    for folder in ("sd-vae-ft-mse", "sd-vae")
    for ending in ("safetensors", "bin")
)
ENCODE_BATCH = {"cpu": 1, "cuda": 16}  # frames at once; more is slower on a CPU, where each image goes alone


class VAE:
    """Images RGB (B, 3, 256, 256) in [-1, 1] <-> latents (B, 4, 32, 32), scaled as the UNet sees them."""

    def __init__(self, autoencoder: AutoencoderKL) -> None:
        self.fingerprint = fingerprint(autoencoder)
        self.autoencoder = freeze(autoencoder)
        self.scaling_factor = autoencoder.config.scaling_factor

    def encode(self, images: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Latents float32 (B, 4, 32, 32): the posterior's mode, or a sample with the noise given (same shape)."""
        posterior = self.autoencoder.encode(images.to(self.autoencoder.device, self.autoencoder.dtype)).latent_dist
        latents = posterior.mode().float()
        if noise is not None:
            latents = latents + posterior.std.float() * noise.to(latents.device)
        return latents * self.scaling_factor

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images float32 (B, 3, 256, 256), about [-1, 1]. Gradients flow to the latents."""
        return self.autoencoder.decode(latents.to(self.autoencoder.dtype) / self.scaling_factor).sample.float()

    @torch.no_grad()
    def encode_clip(
        self, clip: str, crops: Iterable[Sequence[np.ndarray] | None], contract: FeatureContract
    ) -> tuple[np.ndarray, np.ndarray]:
        """What the cache stores and the UNet sees of the faces of a clip, in batches from its frame 0.

        crops: for each of T frames K images BGR uint8 (256, 256, 3), or None for a frame without a face.
        Returns masked and full latents, each float16 (T, K, 4, 32, 32), zero where there is no face.
        """
        device, variants = self.autoencoder.device, len(contract.margins)
        shape = (2, variants, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)  # of a frame: masked, full
        whole = bytearray()  # an array for each batch would lie among what is let go of, and so keep that memory taken
        for batch in batched(enumerate(crops), ENCODE_BATCH[device.type]):
            piece = np.zeros((len(batch), *shape), np.float16)
            seen = [i for i, (_, faces) in enumerate(batch) if faces is not None]
            if not seen:
                whole += piece.tobytes()
                continue
            images = np.stack([image for _, faces in batch if faces is not None for image in faces])
            images = to_tensor(torch.from_numpy(images).to(device))  # (n K, 3, 256, 256)
            noise = None
            if contract.posterior == "sample":
                drawn = [posterior_noise(clip, batch[i][0], margin) for i in seen for margin in contract.margins]
                noise = torch.from_numpy(np.stack(drawn, axis=1)).flatten(0, 1)  # (2 n K, 4, 32, 32)
            both = torch.cat([mask_lower_half(images), images])
            size = 1 if device.type == "cpu" else len(both)
            noises = noise.split(size) if noise is not None else repeat(None)
            made = [self.encode(*pair) for pair in zip(both.split(size), noises, strict=False)]
            both = torch.cat(made).half().cpu().numpy()
            piece[seen] = both.reshape(2, len(seen), *shape[1:]).swapaxes(0, 1)
            whole += piece.tobytes()
        masked_latents, latents = np.frombuffer(whole, np.float16).reshape(-1, *shape).swapaxes(0, 1).copy()
        return masked_latents, latents


def posterior_noise(clip: str, frame: int, margin: int) -> np.ndarray:
    """Normal noise float32 (2, 4, 32, 32) for the masked and the full face, always the same for these three."""
    seed = int.from_bytes(hashlib.sha256(f"{clip}/{frame}/{margin}".encode()).digest()[:16], "big")
    shape = (2, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def load_vae(
    models_dir: Path, device: torch.device, dtype: torch.dtype, memory_format: torch.memory_format = torch.channels_last
) -> VAE:
    """The VAE of a models folder, the first of `FILES` with the config.json beside it.

    channels_last is faster, but for bfloat16 gradients on a CPU. Raises WeightsError.
    """

    def use(autoencoder: AutoencoderKL) -> None:
        if not 1e-6 < autoencoder.config.scaling_factor < 1e6:
            raise ValueError("scaling_factor must be over 0, and of a size that numbers keep")
        autoencoder.decode(autoencoder.encode(torch.empty(1, 3, IMAGE_SIZE, IMAGE_SIZE)).latent_dist.mode())

    path = find(models_dir, *FILES)
    autoencoder = build_network(AutoencoderKL, path.with_name("config.json"), use)
    tensors = unwrap(read_tensors(path), path)
    load_strictly(autoencoder, {_rename_key(name): tensor for name, tensor in tensors.items()}, path)
    vae = VAE(autoencoder)  # its fingerprint is of the float32 tensors
    # nn.Module's own `to`: diffusers' warns of layers to keep in float32 even where there are none.
    nn.Module.to(autoencoder, device, dtype, memory_format=memory_format)
    return vae


def _rename_key(name: str) -> str:
    """Today's name of a tensor."""
    for old, new in OLD_NAMES.items():
        name = name.replace(old, new)
    return name
