"""Distil a tiny decoder from the VAE decoder on a cache, for cheap image losses.

    python -m tools.distil_decoder --cache data/mine
    python musetalk_trainer.py stage1 --hdtf-samples-dir data/mine --tiny-decoder checkpoints/tiny_decoder.safetensors

Writes `<checkpoint_dir>/tiny_decoder.safetensors` to use and `<checkpoint_dir>/tiny_decoder/training-state-<step>.pt`
to resume from. Writes to `log_dir`: trainer.log, and in tiny_decoder/ stats.jsonl, TensorBoard files and
faces/<step>.png: rows of held-out faces: true, by the VAE decoder, by the tiny decoder. A training with the same
`held_out` and `held_out_identities` holds out the same clips. Reports how similar the images are, and how similar the
gradients of pixel_l1 at the latents are, which is what a training uses a decoder for. To resume, run the same command
again. Ctrl-C, or SIGTERM as clusters send it, stops the run after the current step and saves the training state.

The target is the VAE decoder's image of a latent between those of two frames of a clip, with noise, because a UNet's
predictions are not an encoder's latents. The true faces are no target: they do not change with the latents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
from musetalk.evaluation.metrics import psnr
from musetalk.images import to_tensor, to_uint8
from musetalk.models.tiny_decoder import TAESD_WIDTH, TinyDecoder, Width, load_tiny_decoder, save_tiny_decoder
from musetalk.models.vae import VAE
from musetalk.training.distributed import start_processes
from musetalk.training.run import open_run
from musetalk.training.state import NetworkState, load_pixel_vae
from musetalk.training.step import OptimizerStep, StepResult

ROWS = 8  # faces in the picture


@dataclass
class DistilConfig:
    """The constants of a distillation; override them on the command line."""

    # Paths
    cache: Path = Path("data/cache")  # output of datasets_process.py
    models_dir: Path = Path("models")  # with the VAE of the cache
    checkpoint_dir: Path = Path("checkpoints")
    log_dir: Path = Path("log")

    # Data
    held_out: Share = 0.1  # share of identities (of clips, if there is one identity) to measure on
    held_out_identities: tuple[str, ...] = ()  # names of those (of clips, if there is one identity) to hold out instead
    measured: Count = 24  # held-out faces
    noise: PositiveOrZero = 0.1  # standard deviation of the noise added to latents, whose own is about 1
    num_workers: Workers | None = 0  # processes that read the cache; None: one per core, at most 8
    prefetch: Count = 2  # batches that each worker has ready
    batch_size: Count = 4  # samples in one micro step
    grad_accum_steps: Count = 1  # micro steps in one optimizer step

    # Network and optimizer
    width: Width = TAESD_WIDTH  # channels; operations grow with the square: 35 GFLOP an image at 64
    learning_rate: Positive = 2e-3
    warmup_steps: Count = 100  # the rate rises from 0, then decays along a cosine ...
    final_learning_rate: PositiveOrZero = 1e-5  # ... to this
    max_grad_norm: Positive = 1.0
    on_nonfinite: Literal["stop", "skip"] = "stop"  # in a step with a non-finite gradient

    # Run
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: CUDA's GPU, or the CPU without one
    num_steps: Count = 10_000
    tracker: Literal["tensorboard", "wandb", "trackio", "none"] = "tensorboard"  # of the figures in stats.jsonl
    log_every: Count = 100
    save_every: Count = 1000
    save_minutes: PositiveOrZero = 20.0  # a state is also saved when the last save is this old; 0: never
    keep_states: Count = 2  # newest training states
    seed: Seed = 1234

    keep_weights = keep_weights_every = 0  # weights are saved only at the end


def main(config: DistilConfig) -> None:
    """Distils until `num_steps`, resuming from the newest training state; saves, measures and draws the result."""
    check_constants(config)
    accelerator = start_processes(config.device)
    cache = Cache(config.cache)
    train_clips, held_clips, split_note = split_clips(cache, config.held_out, config.held_out_identities)
    vae = load_pixel_vae(config.models_dir, accelerator)
    cache.contract.require(replace(cache.contract, vae=vae.fingerprint), ("vae",), str(cache.folder))
    slots = config.batch_size * config.grad_accum_steps * accelerator.num_processes
    train_set = FaceDataset(cache, train_clips, cache.contract, seed=config.seed, slots=slots)
    held_set = FaceDataset(cache, held_clips or train_clips, cache.contract, seed=config.seed, slots=config.measured)
    torch.manual_seed(config.seed)
    decoder = TinyDecoder(config.width).to(accelerator.device)
    resume_metadata = {"width": config.width, "vae": vae.fingerprint}
    state = NetworkState(decoder, torch.optim.AdamW(decoder.parameters()), resume_metadata)

    with open_run("tiny_decoder", config, state, accelerator) as run:
        run.log.line(split_note)
        batches = run.batches(train_set)
        for _ in run.steps():
            result = optimizer_step(state, vae, batches, config, accelerator)

            # Log.
            if result.skipped:
                run.log.line(f"skipped: {result.skipped}")
            if run.due(config.log_every):
                run.log.record(state.step, run.figures(result))

            # Save.
            stop = run.stop_requested()
            if stop or run.due(config.save_every) or run.overdue():
                run.save_state()

            # Stop?
            if stop:
                break
        run.finish()
        if not accelerator.is_main_process:
            return

        # Measure what was saved.
        path = config.checkpoint_dir / "tiny_decoder.safetensors"
        save_tiny_decoder(path, decoder, vae)
        run.log.line(f"saved {path}")
        torch.manual_seed(config.seed)
        tiny_decoder = load_tiny_decoder(path, vae)
        similarity, faces = compare(tiny_decoder, vae, loader(held_set, range(1), 1, 0), config.noise)
        run.log.record(state.step, similarity)
        run.log.line(f"done at step {state.step}: faces in {run.log.picture(state.step, faces, 'faces')}")


def optimizer_step(
    state: NetworkState[TinyDecoder], vae: VAE, batches: Iterator[dict], config: DistilConfig, accelerator: Accelerator
) -> StepResult:
    """Updates the tiny decoder on the absolute difference of its images from the VAE decoder's."""
    step = OptimizerStep(state.step, config, state.optimizers)

    # Draw the batch (seeded by step).
    for batch in step.micro_batches(batches):
        latents = interpolated_latents(batch, config.noise).to(accelerator.device, non_blocking=True)

        # Loss, backward.
        with torch.no_grad():
            target = vae.decode(latents)
        with accelerator.autocast():
            loss = functional.l1_loss(state.network.decode(latents), target)
        accelerator.backward(loss / config.grad_accum_steps)
        step.add({"loss": loss.detach()})

    # Clip, skip if non-finite, update.
    result = step.update()
    state.step += 1
    return result


def interpolated_latents(batch: dict, noise: float) -> torch.Tensor:
    """Latents float32 (B, 4, 32, 32) at random points between those of faces and their references, with noise."""
    target, reference = (batch[f"{kind}_latents"].flatten(0, 1).float() for kind in ("target", "reference"))
    return target.lerp(reference, torch.rand(len(target), 1, 1, 1)) + noise * torch.randn(target.shape)


def compare(
    decoder: TinyDecoder, vae: VAE, batches: Iterable[dict], noise: float
) -> tuple[dict[str, float], np.ndarray]:
    """Compares the tiny decoder with the VAE decoder. Returns figures and rows of faces, BGR uint8.

    A row is the true face, the VAE decoder's and the tiny decoder's. batches: of one face each. psnr_own and psnr_tiny
    are those of the VAE decoder and of the tiny decoder against the truth in dB, psnr that of the two decoders.
    gradient_cosine is taken at interpolated latents as in training, where images differ from the truth.
    """
    device, decoders = vae.autoencoder.device, (vae.decode, decoder.decode)
    rows, cosines = [], []
    for batch in batches:
        truth = batch["target_image"].flatten(0, 1)  # (1, 256, 256, 3)
        target_latents = batch["target_latents"].flatten(0, 1).to(device).float()
        latents = interpolated_latents(batch, noise).to(device).requires_grad_()
        with torch.no_grad():
            rows.append([truth[0].numpy(), *(to_uint8(decode(target_latents))[0] for decode in decoders)])
        losses = [pixel_l1(decode(latents), to_tensor(truth.to(device))) for decode in decoders]
        own, tiny = (torch.autograd.grad(loss, latents)[0].flatten() for loss in losses)
        cosines.append(functional.cosine_similarity(own, tiny, dim=0).item())
    pairs = {"psnr_own": (1, 0), "psnr_tiny": (2, 0), "psnr": (2, 1)}
    similarity = {name: float(np.mean([psnr(row[a], row[b]) for row in rows])) for name, (a, b) in pairs.items()}
    similarity["gradient_cosine"] = float(np.mean(cosines))  # of pixel_l1, at the latents
    return similarity, np.hstack([np.vstack(row) for row in rows[:ROWS]])


if __name__ == "__main__":
    run_script(main, tyro.cli(DistilConfig, description=__doc__))
