"""Distil a tiny decoder from the VAE's own on a cache, through which losses on images cost little.

    python -m tools.distil_decoder --cache data/mine
    python musetalk_trainer.py stage1 --hdtf-samples-dir data/mine --tiny-decoder checkpoints/tiny_decoder.safetensors

Writes `<checkpoint_dir>/tiny_decoder.safetensors` to use, and `<checkpoint_dir>/tiny_decoder/training-state-<step>.pt`
to go on; in `log_dir` trainer.log, and in tiny_decoder/ stats.jsonl, TensorBoard files and faces/<step>.png: rows of
faces held out (those that a training with the same `held_out` and `seed` holds out) as they are, by the VAE's own
decoder and by the tiny one. Tells how alike these are, and how alike the gradients that pixel_l1 gives the latents
through both, which is all that a training has of a decoder. Run the same command again to go on from the newest state;
Ctrl-C, or a cluster's SIGTERM, ends it after the step with its state saved.

It learns what the VAE's decoder makes of latents between those of two frames of a clip, with noise, since a UNet's
predictions are not what an encoder gives. The true faces would be no target: they do not change with the latents.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from torch.nn import functional

from losses.reconstruction import pixel_l1
from musetalk.cli import Count, Positive, PositiveOrZero, Seed, Share, Workers, check_constants, run_script
from musetalk.data.cache import Cache
from musetalk.data.dataset import FaceDataset, split_clips
from musetalk.data.loader import loader
from musetalk.images import to_tensor, to_uint8
from musetalk.inference.metrics import psnr
from musetalk.models.tiny_decoder import TAESD_WIDTH, TinyDecoder, Width, load_tiny_decoder, save_tiny_decoder
from musetalk.models.vae import VAE
from musetalk.training.distributed import average_gradients, start_processes
from musetalk.training.run import open_run
from musetalk.training.state import NetworkState, learning_rate, load_pixel_vae

SHOWN = 8  # faces in the picture


@dataclass
class DistilConfig:
    """The constants of a distillation; override them on the command line."""

    # Paths
    cache: Path = Path("data/cache")  # what datasets_process.py made ...
    models_dir: Path = Path("models")  # ... with the VAE of this folder
    checkpoint_dir: Path = Path("checkpoints")
    log_dir: Path = Path("log")

    # Data
    held_out: Share = 0.1  # share of identities (or clips, of a single one) that it is measured on
    measured: Count = 24  # faces of these
    noise: PositiveOrZero = 0.1  # deviation of what is added to latents, whose own is about 1
    num_workers: Workers | None = 0  # processes that read the cache; None: 8, or as many as there are cores for
    prefetch: Count = 2  # batches that each of them has ready
    batch_size: Count = 4

    # Network and optimizer
    width: Width = TAESD_WIDTH  # channels of its layers; operations grow with the square: 35 GFLOP an image at 64
    learning_rate: Positive = 2e-3
    warmup_steps: Count = 100  # the rate rises from 0, then falls along a cosine ...
    final_learning_rate: PositiveOrZero = 1e-5  # ... to this

    # Run
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU, or the CPU where there is none
    num_steps: Count = 10_000
    log_every: Count = 100
    save_every: Count = 1000
    save_minutes: PositiveOrZero = 20.0  # a state is also saved when the last save is this old; 0: never
    keep_states: Count = 2  # training states of the newest steps
    seed: Seed = 1234


def main(config: DistilConfig) -> None:
    """Distil, going on from the newest state, write, measure what was written, and draw it."""
    check_constants(config)
    accelerator = start_processes(config.device)
    cache = Cache(config.cache)
    train_clips, held_clips, note = split_clips(cache, config.held_out, config.seed)
    vae = load_pixel_vae(config.models_dir, accelerator)
    cache.contract.require(replace(cache.contract, vae=vae.fingerprint), ("vae",), str(cache.folder))
    slots = config.batch_size * accelerator.num_processes
    seen = FaceDataset(cache, train_clips, cache.contract, seed=config.seed, slots=slots)
    unseen = FaceDataset(cache, held_clips or train_clips, cache.contract, seed=config.seed, slots=config.measured)
    torch.manual_seed(config.seed)
    decoder = TinyDecoder(config.width).to(accelerator.device)
    fixed = {"width": config.width, "vae": vae.fingerprint}
    state = NetworkState(decoder, torch.optim.AdamW(decoder.parameters()), fixed)

    with open_run("tiny_decoder", config, state, accelerator) as run:
        run.log.line(note)
        batches = run.batches(seen)
        for _ in run.steps():
            loss = optimizer_step(state, vae, next(batches), config, accelerator)
            state.step += 1
            if run.due(config.log_every):
                run.log.record(state.step, {"loss": accelerator.reduce(loss, "mean").item()})
        if not accelerator.is_main_process:
            return
        path = config.checkpoint_dir / "tiny_decoder.safetensors"
        save_tiny_decoder(path, decoder, vae)
        run.log.line(f"saved {path}")
        torch.manual_seed(config.seed)
        alike, faces = compare(load_tiny_decoder(path, vae), vae, loader(unseen, range(1), 1, 0), config.noise)
        run.log.record(state.step, alike)
        run.log.line(f"done at step {state.step}: faces in {run.log.picture(state.step, faces, 'faces')}")


def optimizer_step(
    state: NetworkState, vae: VAE, batch: dict, config: DistilConfig, accelerator: Accelerator
) -> torch.Tensor:
    """One update on the absolute difference from what the VAE's own decoder makes, which is returned."""
    latents = between(batch, config.noise).to(accelerator.device, non_blocking=True)
    with torch.no_grad():
        target = vae.decode(latents)
    with accelerator.autocast():
        loss = functional.l1_loss(state.network.decode(latents), target)
    state.optimizer.zero_grad()
    loss.backward()
    average_gradients(state.network.parameters())
    state.optimizer.param_groups[0]["lr"] = learning_rate(state.step, config)
    state.optimizer.step()
    return loss.detach()


def between(batch: dict, noise: float) -> torch.Tensor:
    """Latents float32 (B, 4, 32, 32) somewhere between those of faces and of their references, with noise."""
    face, reference = (batch[f"{kind}_latents"].flatten(0, 1).float() for kind in ("target", "reference"))
    return face.lerp(reference, torch.rand(len(face), 1, 1, 1)) + noise * torch.randn(face.shape)


def compare(
    decoder: TinyDecoder, vae: VAE, batches: Iterable[dict], noise: float
) -> tuple[dict[str, float], np.ndarray]:
    """How alike pictures and gradients are, and rows of faces: true, by the VAE's own, by the tiny one, BGR uint8.

    batches: of one face each. Gradients are taken where distillation was, for a picture differs from the truth there.
    In dB psnr_own and psnr_tiny are of the two decoders' pictures and the truth, psnr of one and the other.
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
    compared = {"psnr_own": (1, 0), "psnr_tiny": (2, 0), "psnr": (2, 1)}
    found = {
        name: float(np.mean([psnr(column[one], column[other]) for column in columns]))
        for name, (one, other) in compared.items()
    }
    found["gradient_cosine"] = float(np.mean(alike))  # of pixel_l1, at the latents
    return found, np.hstack([np.vstack(column) for column in columns[:SHOWN]])


if __name__ == "__main__":
    run_script(main, tyro.cli(DistilConfig, description=__doc__))
