"""Trains the small VAE on patches of crops and saves it."""

from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from musetalk.contract import IMAGE_SIZE, LATENT_CHANNELS, MASK_TOP
from musetalk.images import to_tensor
from tools.make_mini.config import Config
from tools.make_mini.figures import EYES, MOUTH
from tools.make_mini.schedule import learning_rate_factor

MOUTH_SHARE, EYES_SHARE = 0.3, 0.2  # of the patches are drawn around mouth and eyes
SCALING_FACTOR = 0.18215  # scales latents to a standard deviation of 1, as in the real VAE


def train_vae(
    vae: AutoencoderKL, images: np.ndarray, points: np.ndarray, config: Config, rng: np.random.Generator
) -> AutoencoderKL:
    """Trains on squared error in bfloat16, saves regularly and returns the EMA of the weights."""
    optimizer = torch.optim.AdamW(vae.parameters(), config.learning_rate, config.betas, weight_decay=1e-4)
    factor = partial(learning_rate_factor, num_warmup_steps=config.num_warmup_steps, num_steps=config.num_steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    average = AveragedModel(vae, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
    progress = tqdm(range(config.num_steps), "vae", unit="step", mininterval=5)
    for step in progress:
        # A batch of patches, or of whole crops
        whole = step >= config.num_steps - config.num_whole_steps
        size = IMAGE_SIZE if whole else config.patch_size
        count = config.whole_batch_size if whole else config.batch_size
        target = torch.stack([draw_patch(images, points, size, config, rng) for _ in range(count)])

        # Reconstruction and KL loss
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(target).latent_dist
            latents = posterior.sample() if step % config.sampled_every == 0 else posterior.mode()
            pred = vae.decode(latents).sample.float()
        mse = functional.mse_loss(pred, target)
        loss = 10 * mse + config.kl_weight * posterior.kl().mean() / latents[0].numel()

        # Update
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), config.max_grad_norm)
        optimizer.step()
        schedule.step()
        average.update_parameters(vae)
        if step % 20 == 0:
            progress.set_postfix(psnr=f"{10 * math.log10(4 / mse.item()):.1f}", refresh=False)
        if step and step % config.save_every == 0:
            save_vae(average.module, images, config)
    return average.module


def draw_patch(
    images: np.ndarray, points: np.ndarray, size: int, config: Config, rng: np.random.Generator
) -> torch.Tensor:
    """A square patch of a random crop with random colours, often at mouth or eyes: float (3, size, size).

    Some are masked as in MuseTalk: rows of the crop from MASK_TOP on are -1.
    """
    index = rng.integers(len(images))
    masked = rng.random() < config.masked_share
    region, furthest = rng.random(), IMAGE_SIZE - size
    left, top = rng.integers(0, furthest + 1, 2)
    if masked and furthest:
        top = MASK_TOP - rng.integers(size // 5, size - size // 5)  # the mask starts within the patch
    elif region < MOUTH_SHARE + EYES_SHARE:
        middle = points[index][MOUTH if region < MOUTH_SHARE else EYES].mean(0) + rng.uniform(-32, 32, 2)
        left, top = np.clip(middle - size / 2, 0, furthest).astype(int)
    square = images[index, top : top + size, left : left + size]
    patch = recolour((to_tensor(square[None])[0] + 1) / 2, rng) * 2 - 1
    if masked:
        patch[:, MASK_TOP - top :] = -1
    return patch


def recolour(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Flips half of the images and augments the colours of most: RGB (3, H, W) in [0, 1].

    Channel permutation, hue rotation about the grey axis, saturation, white balance, brightness, gamma.
    """
    if rng.random() < 0.5:
        image = image.flip(2)
    if rng.random() < 0.25:
        return image
    if rng.random() < 0.25:
        image = image[rng.permutation(3).tolist()]
    angle, saturation = rng.normal(0, 0.35), rng.uniform(0.5, 1.5)
    grey = np.full((3, 3), 1 / 3)
    rotation = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    matrix = grey + saturation * (math.cos(angle) * (np.eye(3) - grey) + math.sin(angle) * rotation)
    gains = rng.uniform(0.8, 1.2, 3) * rng.uniform(0.75, 1.2)
    matrix = torch.from_numpy((gains[:, None] * matrix).astype(np.float32))
    image = (matrix @ image.flatten(1)).view_as(image).clamp(0, 1)
    return image ** math.exp(rng.normal(0, 0.3))


def save_vae(vae: AutoencoderKL, images: np.ndarray, config: Config) -> Path:
    """Writes weights in fp16 and config of the VAE with normalised latents. Returns the folder.

    images: BGR uint8 (N, 256, 256, 3), the training crops; every other one is MuseTalk's crop.
    """
    saved = copy.deepcopy(vae)
    normalise_latents(saved, images[:: 2 * max(1, len(images) // 100)])
    saved.register_to_config(scaling_factor=SCALING_FACTOR)
    folder = config.models_dir / "sd-vae-ft-mse"
    saved.half().save_pretrained(folder)
    return folder


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, images: np.ndarray) -> None:
    """Normalises each latent channel over images (N, 256, 256, 3) to mean 0 and standard deviation 1 / SCALING_FACTOR.

    Exact, because the convolutions around the latents are 1 x 1. All channels are then equally important to a UNet.
    """
    latents = torch.cat([vae.encode(to_tensor(image[None])).latent_dist.mode() for image in images])
    mean, gain = latents.mean((0, 2, 3)), 1 / (SCALING_FACTOR * latents.std((0, 2, 3)))
    conv_in, conv_out = vae.quant_conv, vae.post_quant_conv
    conv_in.weight[:LATENT_CHANNELS] *= gain[:, None, None, None]
    conv_in.bias[:LATENT_CHANNELS] = (conv_in.bias[:LATENT_CHANNELS] - mean) * gain
    conv_in.bias[LATENT_CHANNELS:] += 2 * gain.log()  # log variance
    conv_out.bias += conv_out.weight[:, :, 0, 0] @ mean
    conv_out.weight /= gain[None, :, None, None]
