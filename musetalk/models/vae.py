"""The frozen VAE that maps images to latents and back: Stable Diffusion's AutoencoderKL (sd-vae-ft-mse), by diffusers.

A face crop (uint8 pixels) is encoded to scaled latents (float16), which the cache stores and the UNet gets as they are.
"""

from __future__ import annotations

import hashlib
import math
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

# Names of the middle attention's layers: published file -> current diffusers.
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
# The folders of MuseTalk's download scripts (v1.0, v1.5) and the formats. The first existing file is loaded.
FILES = tuple(
    f"{folder}/diffusion_pytorch_model.{ending}"
    for folder in ("sd-vae-ft-mse", "sd-vae")
    for ending in ("safetensors", "bin")
)
ENCODE_BATCH = {
    "cpu": 1,
    "mps": 16,
    "cuda": 16,
}  # frames; on a CPU images are encoded one by one, and larger batches are slower


class VAE:
    """Converts RGB images (B, 3, 256, 256) in [-1, 1] to scaled latents (B, 4, 32, 32) and back."""

    def __init__(self, autoencoder: AutoencoderKL) -> None:
        self.fingerprint = fingerprint(autoencoder)
        self.autoencoder = freeze(autoencoder)
        self.scaling_factor = autoencoder.config.scaling_factor

    def encode(self, images: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Returns latents, float32 (B, 4, 32, 32): the posterior's mode or, with noise (same shape), a sample."""
        posterior = self.autoencoder.encode(images.to(self.autoencoder.device, self.autoencoder.dtype)).latent_dist
        latents = posterior.mode().float()
        if noise is not None:
            latents = latents + posterior.std.float() * noise.to(latents.device)
        return latents * self.scaling_factor

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Returns images, float32 (B, 3, 256, 256), about [-1, 1]. Gradients flow to the latents."""
        return self.autoencoder.decode(latents.to(self.autoencoder.dtype) / self.scaling_factor).sample.float()

    @torch.no_grad()
    def encode_clip(
        self, clip: str, crops: Iterable[Sequence[np.ndarray] | None], contract: FeatureContract
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encodes the face crops of a clip. Returns masked and full latents, each float16 (T, K, 4, 32, 32).

        crops: for each of T frames, K images BGR uint8 (256, 256, 3), or None for a frame without a face, whose latents
        are zero.
        """
        device, variants = self.autoencoder.device, len(contract.margins)
        shape = (2, variants, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)  # per frame: masked, full
        buffer = bytearray()  # one array per batch would fragment the heap
        for batch in batched(enumerate(crops), ENCODE_BATCH[device.type]):
            encoded = np.zeros((len(batch), *shape), np.float16)
            with_face = [i for i, (_, faces) in enumerate(batch) if faces is not None]
            if not with_face:
                buffer += encoded.tobytes()
                continue
            pixels = np.stack([image for _, faces in batch if faces is not None for image in faces])
            images = to_tensor(torch.from_numpy(pixels).to(device))  # (n K, 3, 256, 256)
            noise = None
            if contract.posterior == "sample":
                samples = [posterior_noise(clip, batch[i][0], margin) for i in with_face for margin in contract.margins]
                noise = torch.from_numpy(np.stack(samples, axis=1)).flatten(0, 1)  # (2 n K, 4, 32, 32)
            images = torch.cat([mask_lower_half(images), images])  # (2 n K, 3, 256, 256)
            size = 1 if device.type == "cpu" else len(images)
            noises = noise.split(size) if noise is not None else repeat(None)
            latents = torch.cat([self.encode(*pair) for pair in zip(images.split(size), noises, strict=False)])
            pairs = latents.half().cpu().numpy().reshape(2, len(with_face), *shape[1:])
            encoded[with_face] = pairs.swapaxes(0, 1)
            buffer += encoded.tobytes()
        masked_latents, latents = np.frombuffer(buffer, np.float16).reshape(-1, *shape).swapaxes(0, 1).copy()
        return masked_latents, latents


def posterior_noise(clip: str, frame: int, margin: int) -> np.ndarray:
    """Returns normal noise, float32 (2, 4, 32, 32), for the masked and the full face, seeded by the arguments."""
    seed = int.from_bytes(hashlib.sha256(f"{clip}/{frame}/{margin}".encode()).digest()[:16], "big")
    shape = (2, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def load_vae(
    models_dir: Path, device: torch.device, dtype: torch.dtype, memory_format: torch.memory_format = torch.channels_last
) -> VAE:
    """Loads the VAE of a models folder: the first existing file of `FILES` and the config.json next to it.

    memory_format: channels_last is faster, except for bfloat16 gradients on a CPU. Raises WeightsError.
    """

    def check(autoencoder: AutoencoderKL) -> None:
        if not 0 < autoencoder.config.scaling_factor < math.inf:
            raise ValueError("scaling_factor must be positive and finite")
        autoencoder.decode(autoencoder.encode(torch.empty(1, 3, IMAGE_SIZE, IMAGE_SIZE)).latent_dist.mode())

    path = find(models_dir, *FILES)
    autoencoder = build_network(AutoencoderKL, path.with_name("config.json"), check)
    tensors = unwrap(read_tensors(path), path)
    load_strictly(autoencoder, {_rename_key(name): tensor for name, tensor in tensors.items()}, path)
    vae = VAE(autoencoder)  # the fingerprint is that of the float32 tensors
    # Not diffusers' own `to`, which warns of layers to keep in float32 even if there are none.
    nn.Module.to(autoencoder, device, dtype, memory_format=memory_format)  # type: ignore[call-overload]
    return vae


def _rename_key(name: str) -> str:
    """Converts a published parameter name to diffusers' current one."""
    for old, new in OLD_NAMES.items():
        name = name.replace(old, new)
    return name
