"""Distil a tiny decoder from the VAE's own on a cache, through which losses on images cost little.

    python -m tools.distil_decoder --cache data/mine
    python musetalk_trainer.py stage1 --hdtf-samples-dir data/mine --tiny-decoder checkpoints/tiny_decoder.safetensors

Writes into `output` tiny_decoder.safetensors and tiny_decoder.png: rows of faces held out (those that a training with
the same `held_out` and `seed` holds out) as they are, by the VAE's own decoder and by the tiny one. Prints how alike
these are, and how alike the gradients that pixel_l1 gives the latents through both, which is all that a training has
of a decoder.

It learns what the VAE's decoder makes of latents between those of two frames of a clip, with noise, since a UNet's
predictions are not what an encoder gives. The true faces would be no target: they do not change with the latents.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
import tyro
from accelerate import Accelerator
from torch.nn import functional
from tqdm import tqdm

from losses.reconstruction import pixel_l1
from musetalk.cache import Cache
from musetalk.crop import to_tensor, to_uint8
from musetalk.dataset import FaceDataset, split_clips
from musetalk.files import write_whole
from musetalk.metrics import psnr
from musetalk.models.tiny_decoder import TAESD_WIDTH, TinyDecoder, Width, load_tiny_decoder, save_tiny_decoder
from musetalk.models.vae import VAE
from musetalk.run import loader, start_processes
from musetalk.script import Count, Positive, PositiveOrZero, Seed, Share, Workers, check_constants, run_script
from musetalk.training import learning_rate, load_pixel_vae

SHOWN = 8  # faces in the picture


@dataclass
class DistilConfig:
    """The constants of a distillation; override them on the command line."""

    # Paths
    cache: Path = Path("data/cache")  # what datasets_process.py made ...
    models_dir: Path = Path("models")  # ... with the VAE of this folder
    output: Path = Path("checkpoints")  # folder

    # Data
    held_out: Share = 0.1  # share of identities (or clips, of a single one) that it is measured on
    measured: Count = 24  # faces of these
    noise: PositiveOrZero = 0.1  # deviation of what is added to latents, whose own is about 1
    num_workers: Workers = 0  # processes that read the cache

    # Network and optimizer
    width: Width = TAESD_WIDTH  # channels of its layers; operations grow with the square: 35 GFLOP an image at 64
    num_steps: Count = 10_000
    batch_size: Count = 4
    learning_rate: Positive = 2e-3
    warmup_steps: Count = 100  # the rate rises from 0, then falls along a cosine ...
    final_learning_rate: PositiveOrZero = 1e-5  # ... to this
    seed: Seed = 1234


def main(config: DistilConfig) -> None:
    """Distil, write, measure what was written, and draw it."""
    check_constants(config)
    accelerator = start_processes()
    cache = Cache(config.cache)
    train_clips, held_clips, note = split_clips(cache, config.held_out, config.seed)
    print(note)
    vae = load_pixel_vae(config.models_dir, accelerator)
    cache.contract.require(replace(cache.contract, vae=vae.fingerprint), ("vae",), str(cache.folder))
    seen = FaceDataset(cache, train_clips, cache.contract, seed=config.seed, slots=config.batch_size)
    unseen = FaceDataset(cache, held_clips or train_clips, cache.contract, seed=config.seed, slots=config.measured)

    torch.manual_seed(config.seed)
    decoder = TinyDecoder(config.width).to(accelerator.device)
    batches = loader(seen, range(config.num_steps), config.batch_size, config.num_workers)
    try:
        distil(decoder, vae, batches, config, accelerator)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted, nothing was written; the same command begins anew") from None
    path = config.output / "tiny_decoder.safetensors"
    save_tiny_decoder(path, decoder, vae)
    rows = compare(load_tiny_decoder(path, vae), vae, loader(unseen, range(1), 1, 0), config.noise)
    write_whole(path.with_suffix(".png"), cv2.imencode(".png", rows)[1].tobytes())
    print(f"written: {path}, and a picture beside it")


def distil(
    decoder: TinyDecoder, vae: VAE, batches: Iterable[dict], config: DistilConfig, accelerator: Accelerator
) -> None:
    """Train a decoder on the absolute difference from what the VAE's own makes."""
    optimizer = torch.optim.AdamW(decoder.parameters())
    for step, batch in enumerate(tqdm(batches, "distil", config.num_steps, unit="step", mininterval=1)):
        latents = between(batch, config.noise).to(accelerator.device)
        with torch.no_grad():
            target = vae.decode(latents)
        with accelerator.autocast():
            loss = functional.l1_loss(decoder.decode(latents), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = learning_rate(step, config)
        optimizer.step()


def between(batch: dict, noise: float) -> torch.Tensor:
    """Latents float32 (B, 4, 32, 32) somewhere between those of faces and of their references, with noise."""
    face, reference = (batch[f"{kind}_latents"].flatten(0, 1).float() for kind in ("target", "reference"))
    return face.lerp(reference, torch.rand(len(face), 1, 1, 1)) + noise * torch.randn(face.shape)


def compare(decoder: TinyDecoder, vae: VAE, batches: Iterable[dict], noise: float) -> np.ndarray:
    """Print how alike pictures and gradients are. Returns rows of faces: true, full, tiny, BGR uint8.

    batches: of one face each. Gradients are taken where distillation was, for a picture differs from the truth there.
    """
    device, decoders = vae.autoencoder.device, (vae.decode, decoder.decode)
    columns, alike = [], []
    for batch in batches:
        truth = batch["target_image"].flatten(0, 1)  # (1, 256, 256, 3)
        latents = batch["target_latents"].flatten(0, 1).to(device).float()
        moved = between(batch, noise).to(device).requires_grad_()
        with torch.no_grad():
            columns.append([truth[0].numpy(), *(to_uint8(decode(latents))[0] for decode in decoders)])
        losses = [pixel_l1(decode(moved), to_tensor(truth.to(device))) for decode in decoders]
        pair = [torch.autograd.grad(loss, moved)[0].flatten() for loss in losses]
        alike.append(functional.cosine_similarity(*pair, dim=0).item())
    names = "the VAE's own and the truth", "the tiny one and the truth", "both"
    for name, one, other in zip(names, (1, 2, 2), (0, 0, 1), strict=True):
        decibels = np.mean([psnr(column[one], column[other]) for column in columns])
        print(f"{f'PSNR of {name}':<40}{decibels:>8.2f} dB")
    print(f"{'cosine of the gradients of pixel_l1':<40}{np.mean(alike):>8.3f}")
    return np.hstack([np.vstack(column) for column in columns[:SHOWN]])


if __name__ == "__main__":
    run_script(main, tyro.cli(DistilConfig, description=__doc__))
