"""A cache of clips -> a trained lip-sync UNet.

    python musetalk_trainer.py                           preset demo: the small set, the cache of the built-in sample
    python musetalk_trainer.py stage1 --hdtf-samples-dir data/mine
    python musetalk_trainer.py stage1 --help             all constants

Writes `<checkpoint_dir>/<preset>/training-state-<step>.pt` to go on and `unet-<step>.safetensors` to use, and in
`log_dir` trainer.log, `<preset>/stats.jsonl`, `<preset>/samples/<step>.png` (masked | reference | prediction |
truth, of clips held out) and TensorBoard files. Run the same command again to go on from the newest state, exactly
as if there had been no interruption. Ctrl-C, or a cluster's SIGTERM, ends it after the step with its state saved.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from tqdm import tqdm

from losses import weighted_sum
from losses.pixel_branch import pixel_branch
from losses.reconstruction import latent_l1, pixel_l1
from musetalk.cache import Cache
from musetalk.checkpoint import save_state, save_unet
from musetalk.contract import ALL_FIELDS, CONTRACTS, MASK_TOP, MODEL_FIELDS, FeatureContract
from musetalk.crop import to_tensor
from musetalk.dataset import FaceDataset, split_clips
from musetalk.files import own_folder
from musetalk.models.unet import UNet, build_unet
from musetalk.models.vae import VAE, load_vae
from musetalk.pipeline import LipSyncPipeline
from musetalk.run_log import RunLog
from musetalk.script import (
    Count,
    CountOrZero,
    Decay,
    Positive,
    PositiveOrZero,
    Seed,
    Share,
    Workers,
    check_constants,
    run_script,
    stop_requests,
)
from musetalk.training import OPTIMIZERS, TrainError, TrainState, learning_rate, loader, precision, resume


@dataclass
class TrainConfig:
    """The constants of a training; edit a preset below or override them on the command line."""

    # Paths
    hdtf_samples_dir: Path = Path("data/cache")  # what datasets_process.py made
    checkpoint_dir: Path = Path("checkpoints")  # each preset has a folder in it
    log_dir: Path = Path("log")
    models_dir: Path = Path("models")

    # Data
    contract: Literal["rigid", "musetalk_v15", "musetalk_v1"] = "rigid"  # whose audio window and positions it learns
    held_out: Share = 0.1  # share of identities (or clips, of a single one) kept for the samples
    num_workers: Workers = 4  # processes that read the cache
    batch_size: Count = 8  # samples in one forward
    grad_accum_steps: Count = 1  # forwards in one optimizer step

    # Losses: a weight for each term, 0 is off
    loss_weights: dict[Literal["latent_l1", "pixel_l1"], PositiveOrZero] = field(
        default_factory=lambda: {"latent_l1": 1.0, "pixel_l1": 1.0}
    )
    pixel_every: Count = 1  # steps between those with losses on images, which cost most of the time
    chunk_size: Count = 4  # samples decoded at once for them

    # Optimizer
    optimizer: Literal["adamw", "adamax", "adam"] = "adamw"  # adamax is the original's
    learning_rate: Positive = 2e-5
    warmup_steps: CountOrZero = 1000  # the rate rises from 0, then falls along a cosine ...
    final_learning_rate: PositiveOrZero = 2e-5  # ... to this
    weight_decay: PositiveOrZero = 1e-2
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    max_grad_norm: Positive = 1.0
    ema_decay: Decay = 0.999  # of the weights that are used; kept in host memory
    ema_every: Count = 10  # steps
    gradient_checkpointing: bool = False  # of the UNet: less memory, a third more time

    # Run
    num_steps: Count = 250_000  # optimizer updates
    log_every: Count = 100
    sample_every: Count = 2000
    save_every: Count = 2000
    keep_states: Count = 2  # training states of the newest steps; weights to use are all kept
    seed: Seed = 1234


PRESETS = {
    "demo": TrainConfig(
        models_dir=Path("models/mini"),
        held_out=0.25,
        num_workers=0,
        batch_size=8,
        pixel_every=10,
        learning_rate=3e-3,
        final_learning_rate=1e-4,
        warmup_steps=20,
        ema_decay=0.98,
        ema_every=1,
        num_steps=800,
        log_every=20,
        sample_every=200,
        save_every=200,
    ),
    "stage1": TrainConfig(batch_size=32),
}

GRID_ROWS = 6  # moments in a sample grid


def train(preset: str, config: TrainConfig) -> None:
    """Train until `num_steps`, going on from the newest state in the preset's folder."""
    # Check what costs nothing first: constants, then data, then networks.
    check(config)
    accelerator = Accelerator(mixed_precision=precision())
    if accelerator.num_processes > 1:
        raise TrainError("training on several processes is not supported yet; start it with plain python")
    cache = Cache(config.hdtf_samples_dir)
    contract = training_contract(config, cache)
    train_clips, held_clips, note = split_clips(cache, config.held_out, config.seed)
    slots = config.batch_size * config.grad_accum_steps
    dataset = FaceDataset(cache, train_clips, contract, seed=config.seed, slots=slots)
    shown = FaceDataset(cache, held_clips or train_clips, contract, seed=config.seed, slots=GRID_ROWS)
    if slots > (count := int(dataset.ends[-1])):
        raise TrainError(
            f"batch_size x grad_accum_steps is {slots}, but {cache.folder} has {count} samples to train on"
        )
    vae = load_pixel_vae(config.models_dir, accelerator)
    cache.contract.require(replace(cache.contract, vae=vae.fingerprint), ("vae",), str(cache.folder))
    state = build_state(config, contract, accelerator)
    check_width(state.unet, cache, config)
    pipeline = LipSyncPipeline(state.unet, vae, contract, config.models_dir)

    run_dir, log_dir = config.checkpoint_dir / preset, config.log_dir / preset
    with own_folder(run_dir), own_folder(log_dir), stop_requests() as stopping:
        # Go on from the newest state, if there is one.
        resume(state, run_dir, contract)
        log = RunLog(config.log_dir, preset, state.step)
        log.line(f"preset {preset}: {json.dumps(asdict(config), default=str)}")
        log.line(f"{len(train_clips)} clips to train on; {note}")
        size = sum(parameter.numel() for parameter in state.unet.parameters())
        where = f"{accelerator.device}, {accelerator.mixed_precision}"
        log.line(f"UNet of {size:,} parameters on {where}; at step {state.step}")

        batches = iter(loader(dataset, state.step, config.num_steps, config.batch_size, config.num_workers))
        with tqdm(total=config.num_steps, initial=state.step, desc="train", unit="step") as bar:
            stop = False
            while state.step < config.num_steps and not stop:
                # Forward and backward: this step's samples and chances, the same ones whatever happened before.
                torch.manual_seed(config.seed + state.step)
                terms, drawn, rate = {}, [], learning_rate(state.step, config)
                for _ in range(config.grad_accum_steps):
                    batch = next(batches)
                    drawn += batch["where"]
                    for name, value in generator_step(state, vae, batch, config, accelerator).items():
                        terms[name] = terms.get(name, 0) + value / config.grad_accum_steps

                # Update, unless a gradient is not finite.
                norm = accelerator.clip_grad_norm_(state.unet.parameters(), config.max_grad_norm)
                if not torch.isfinite(norm):
                    raise not_finite(terms, drawn, state.step + 1, run_dir)
                state.optimizer.param_groups[0]["lr"] = rate
                state.optimizer.step()
                state.optimizer.zero_grad(set_to_none=True)
                state.step += 1
                if state.step % config.ema_every == 0:
                    state.update_ema(config.ema_decay)
                bar.update()

                # Report.
                last = state.step == config.num_steps
                if last or state.step % config.log_every == 0:
                    values = {name: value.item() for name, value in terms.items()}
                    log.record(state.step, values | {"grad_norm": norm.item(), "learning_rate": rate})

                # Sample and save, also the step after which to stop.
                if last or state.step % config.sample_every == 0:
                    with state.averaged():
                        log.picture(state.step, draw_grid(pipeline, shown))
                due = last or state.step % config.save_every == 0
                if due:
                    log.line(f"saved {save_unet(run_dir, state.step, state.ema, contract)}")
                stop = stopping()
                if due or stop:
                    moving = state.as_dict() | {"contract": contract.as_dict(ALL_FIELDS)}
                    save_state(run_dir, state.step, moving, config.keep_states)

        if state.step < config.num_steps:
            raise KeyboardInterrupt(f"stopped at step {state.step}, all saved; run the same command again to go on")
        log.line(f"done at step {state.step}: weights and states in {run_dir}, pictures in {log.folder / 'samples'}")


def check(config: TrainConfig) -> None:
    """Raises UserError for constants that cannot work."""
    check_constants(config)
    if not any(weight > 0 for weight in config.loss_weights.values()):
        raise TrainError("loss_weights must have a term with a weight over 0")
    if config.pixel_every > 1 and not config.loss_weights.get("latent_l1", 0) > 0:
        raise TrainError("pixel_every must be 1 where latent_l1 has no weight, or steps between would have no loss")


def check_width(unet: UNet, cache: Cache, config: TrainConfig) -> None:
    """Raises TrainError where the audio features of the cache do not fit the UNet's attention to them."""
    takes = unet.model.config.cross_attention_dim
    width = next(iter(cache.clips.values())).tensor("audio_features", 0, 1).shape[-1]
    if width != takes:
        raise TrainError(
            f"{config.models_dir / 'musetalk/musetalk.json'} has cross_attention_dim {takes}, but the audio features "
            f"in {cache.folder} are {width} wide; set it to {width}, or prepare with the Whisper that belongs to it"
        )


def load_pixel_vae(models_dir: Path, accelerator: Accelerator) -> VAE:
    """The frozen VAE in the precision and layout in which the losses on images are fastest."""
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    layout = torch.contiguous_format if accelerator.device.type == "cpu" else torch.channels_last
    return load_vae(models_dir, accelerator.device, dtype, layout)


def training_contract(config: TrainConfig, cache: Cache) -> FeatureContract:
    """The cache's own rules with the model fields of the constants."""
    chosen = CONTRACTS[config.contract]
    return replace(cache.contract, **{name: getattr(chosen, name) for name in MODEL_FIELDS})


def build_state(config: TrainConfig, contract: FeatureContract, accelerator: Accelerator) -> TrainState:
    """An untrained UNet with its optimizer and average."""
    unet = build_unet(config.models_dir, config.seed, contract.positional_encoding)
    if config.gradient_checkpointing:
        unet.model.enable_gradient_checkpointing()
    make = OPTIMIZERS[config.optimizer]
    optimizer = make(unet.parameters(), config.learning_rate, config.betas, weight_decay=config.weight_decay)
    ema = {name: value.clone() for name, value in unet.model.state_dict().items()}
    unet, optimizer = accelerator.prepare(unet, optimizer)
    return TrainState(unet, optimizer, config.optimizer, ema)


def generator_step(
    state: TrainState, vae: VAE, batch: dict, config: TrainConfig, accelerator: Accelerator
) -> dict[str, torch.Tensor]:
    """Losses of one batch, their gradients added to the UNet's. Returns the terms, detached, on the device."""
    data = {
        name: value.flatten(0, 1).to(accelerator.device, non_blocking=True)  # (B, T, ...) -> (B T, ...)
        for name, value in batch.items()
        if isinstance(value, torch.Tensor)
    }
    weights = {name: weight for name, weight in config.loss_weights.items() if weight > 0}
    unet_input = torch.cat([data["masked_latents"], data["reference_latents"]], dim=1).float()
    pred_latents = state.unet(unet_input, data["audio_window"].float())

    # Terms on latents.
    terms = {"latent_l1": latent_l1(pred_latents, data["target_latents"])} if "latent_l1" in weights else {}
    loss = weighted_sum(terms, weights)
    terms = {name: value.detach() for name, value in terms.items()}

    # Terms on images: their gradient at the latents, a few samples at a time.
    if "pixel_l1" in weights and (state.step + 1) % config.pixel_every == 0:
        target = data["target_image"]

        def image_terms(image: torch.Tensor, chunk: slice) -> dict[str, torch.Tensor]:
            return {"pixel_l1": pixel_l1(image, to_tensor(target[chunk]))}

        image_values, gradient = pixel_branch(pred_latents, vae.decode, image_terms, weights, config.chunk_size)
        terms |= image_values
        loss = loss + (pred_latents * gradient).sum()

    accelerator.backward(loss / config.grad_accum_steps)
    return terms


def not_finite(terms: dict[str, torch.Tensor], drawn: list[str], step: int, run_dir: Path) -> TrainError:
    """The error that names what was not finite, and where."""
    broken = [name for name, value in terms.items() if not torch.isfinite(value)] or ["none of the terms"]
    return TrainError(
        f"step {step}: the gradient is not finite (terms not finite: {', '.join(broken)}); no update was made. "
        f"Samples of this step: {'; '.join(drawn)}. The last good state is in {run_dir}"
    )


def draw_grid(pipeline: LipSyncPipeline, shown: FaceDataset) -> np.ndarray:
    """masked | reference | prediction | truth of fixed moments, BGR uint8, a row each."""
    rows = []
    for slot in range(GRID_ROWS):
        sample = shown.draw(0, slot)
        item = shown.read(sample)
        truth = item["target_image"][0].numpy()
        masked = truth.copy()
        masked[MASK_TOP:] = 0
        reference = shown.cache.clips[sample.clip].image(sample.references[0], sample.variant)
        names = ("masked_latents", "reference_latents", "audio_window")
        prediction = pipeline.generate(*(item[name].numpy() for name in names))[0]
        rows.append(np.hstack([masked, reference, prediction, truth]))
    return np.vstack(rows)


def parse(arguments: list[str]) -> tuple[str, TrainConfig]:
    """Preset and constants of a command line. Raises TrainError for a preset there is none of."""
    named = arguments and not arguments[0].startswith("-")
    preset = arguments[0] if named else "demo"
    if preset not in PRESETS:
        raise TrainError(f"there is no preset {preset!r}; there are {', '.join(PRESETS)}")
    rest = arguments[1:] if named else arguments
    return preset, tyro.cli(TrainConfig, default=PRESETS[preset], args=rest, description=__doc__)


if __name__ == "__main__":
    run_script(lambda arguments: train(*parse(arguments)), sys.argv[1:])
