"""A cache of clips -> a sync expert, which scores whether a mouth matches the audio.

    python syncnet_trainer.py                           preset demo: a narrow expert, the cache of the built-in sample
    python syncnet_trainer.py wav2lip --hdtf-samples-dir data/mine
    python syncnet_trainer.py wav2lip --start-from syncnet/lipsync_expert.pth    starts from Wav2Lip's weights
    python syncnet_trainer.py latentsync --help         all constants
    python syncnet_trainer.py --check-only --start-from syncnet/latentsync_syncnet.pt --models-dir models
                                                        trains nothing: measures this expert on your faces

Writes to `<checkpoint_dir>/syncnet_<preset>`: training-state-<step>.pt to resume from, syncnet-<step>.safetensors to
use. Writes to `log_dir`: trainer.log, and in `syncnet_<preset>/` stats.jsonl, TensorBoard files and
sync_check/<step>.png (similarity of held-out faces and shifted audio). To resume, run the same command again; the
result is the same as without the interruption. Ctrl-C, or SIGTERM as clusters send it, stops the run after the current
step and saves the training state. musetalk_trainer.py takes the folder as its `sync_expert`.

A loss (sync_bce) that stays at 0.69 is that of guessing. To get below it, a full-size expert needs hours of in-sync
video of many people, and large batches.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator

from losses.sync import sync_bce
from musetalk.cli import (
    Count,
    CountOrZero,
    Decay,
    Positive,
    PositiveOrZero,
    Seed,
    Share,
    Workers,
    check_constants,
    parse_preset,
    run_script,
)
from musetalk.data.cache import Cache
from musetalk.data.dataset import SAMPLE_HELD_OUT, split_clips
from musetalk.data.sync_dataset import SyncDataset
from musetalk.errors import TrainError
from musetalk.evaluation.sync_check import check_expert
from musetalk.images import to_tensor
from musetalk.models.syncnet import SyncNet, build_syncnet, load_syncnet, save_syncnet
from musetalk.models.weights import load_strictly
from musetalk.training.distributed import prepare_model, start_processes
from musetalk.training.run import open_run
from musetalk.training.state import OPTIMIZERS, NetworkState, check_weight_decay
from musetalk.training.step import OptimizerStep, StepResult


@dataclass
class SyncConfig:
    """The constants of a training; edit a preset below or override them on the command line."""

    # Paths
    hdtf_samples_dir: Path = Path("data/cache")  # output of datasets_process.py
    checkpoint_dir: Path = Path("checkpoints")  # with a folder for each preset
    log_dir: Path = Path("log")
    models_dir: Path = Path("models")  # with the published experts

    # Expert
    architecture: Literal["wav2lip", "wav2lip_narrow", "latentsync", "latentsync_attention", "latentsync_narrow"] = (
        "wav2lip"
    )
    start_from: str = ""  # a published file in models_dir, or a file or folder of this script; "" initialises a new one

    # Data
    held_out: Share = 0.1  # share of identities (of clips, if there is one identity) for the check
    held_out_identities: tuple[str, ...] = ()  # names of those (of clips, if there is one identity) to hold out instead
    num_workers: Workers | None = None  # processes that read the cache; None: one per core, at most 8
    prefetch: Count = 2  # batches that each worker has ready
    batch_size: Count = 32  # windows of faces in one micro step, each paired with its own and with other mel
    grad_accum_steps: Count = 1  # micro steps in one optimizer step
    identity_cap_minutes: PositiveOrZero = 3.0  # an identity counts as at most this much video; 0: no cap
    gaps: tuple[Count, Count] = (15, 3)  # least shift in frames of other mel from the same clip, first and last
    other_clips: Share = 0.25  # share of windows whose other mel is from another clip

    # Optimizer
    optimizer: Literal["adamw", "adamax", "adam"] = "adam"
    learning_rate: Positive = 1e-4
    warmup_steps: CountOrZero = 1000  # the rate rises from 0, then decays along a cosine ...
    final_learning_rate: PositiveOrZero = 1e-4  # ... to this
    weight_decay: PositiveOrZero = 0.0  # adamw only
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    max_grad_norm: Positive = 1.0
    on_nonfinite: Literal["stop", "skip"] = "stop"  # in a step with a non-finite gradient

    # Run
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: CUDA's GPU, or the CPU without one
    check_only: bool = False  # train nothing; check the expert of start_from, or the newest of the preset
    num_steps: Count = 200_000  # optimizer updates
    tracker: Literal["tensorboard", "wandb", "trackio", "none"] = "tensorboard"  # of the figures in stats.jsonl
    log_every: Count = 100
    val_every: Count = 2500
    save_every: Count = 2500
    save_minutes: PositiveOrZero = 20.0  # a state is also saved when the last save is this old; 0: never
    keep_states: Count = 2  # newest training states
    keep_weights: Count = 3  # newest experts: 1.5 GB each with latentsync
    keep_weights_every: CountOrZero = 50_000  # experts at multiples of this step are never deleted; 0: none
    seed: Seed = 1234


PRESETS = {
    "demo": SyncConfig(
        models_dir=Path("models/mini"),
        architecture="wav2lip_narrow",
        held_out_identities=SAMPLE_HELD_OUT,
        num_workers=0,
        batch_size=16,
        learning_rate=2e-3,
        final_learning_rate=1e-4,
        warmup_steps=20,
        num_steps=400,
        log_every=20,
        val_every=200,
        save_every=200,
    ),
    "wav2lip": SyncConfig(),
    "latentsync": SyncConfig(
        architecture="latentsync",
        batch_size=8,
        grad_accum_steps=16,  # 256 pairs in a step; with 128, LatentSync's authors saw the loss stay at 0.69
        optimizer="adamw",
        learning_rate=1e-5,
        final_learning_rate=1e-5,
        weight_decay=1e-2,
    ),
}


def train(preset: str, config: SyncConfig) -> None:
    """Trains until `num_steps`, resuming from the newest training state in the preset's folder."""
    # Check constants, then data, then the network: the cheapest first.
    check_constants(config)
    check_weight_decay(config.optimizer, config.weight_decay)
    accelerator = start_processes(config.device)
    world_size = accelerator.num_processes
    if config.batch_size * world_size == 1 and config.architecture.startswith("wav2lip"):
        raise TrainError(f"batch_size must be 2 or more for {config.architecture}, which has batch norms")
    cache = Cache(config.hdtf_samples_dir)
    train_clips, held_clips, split_note = split_clips(cache, config.held_out, config.held_out_identities)
    held_clips = held_clips or train_clips
    name = f"syncnet_{preset}"
    if config.check_only:
        check_only(config, cache, held_clips, name, accelerator.device)
        return
    state = build_state(config, accelerator)
    dataset = open_dataset(config, cache, train_clips, state.network.frames, world_size)

    with open_run(name, config, state, accelerator, state.network.state_dict()) as run:
        size = sum(parameter.numel() for parameter in state.network.parameters())
        clips = f"{len(train_clips)} clips to train on; {split_note}"
        run.log.line(f"{config.architecture} of {size:,} parameters; {clips}")
        if not run.resumed:
            run.log.line(f"before: {check_expert(state.network, cache, held_clips, config.seed).summary()}")

        batches = run.batches(dataset)
        for _ in run.steps():
            result = optimizer_step(state, batches, config, accelerator)

            # Validate.
            record = {}
            if accelerator.is_main_process and run.due(config.val_every):
                check = check_expert(state.network, cache, held_clips, config.seed)
                record = {"accuracy": check.accuracy, "offset": check.offset, "confidence": check.confidence}
                run.log.picture(state.step, check.draw(), "sync_check")

            # Log.
            if result.skipped:
                run.log.line(f"skipped: {result.skipped}")
            if run.due(config.log_every):
                record = run.figures(result) | record
            if record:
                run.log.record(state.step, record)

            # Save.
            if run.due(config.save_every):
                run.save_weights(save_syncnet, state.network.state_dict(), config.architecture)
                if accelerator.is_main_process and state.step == config.num_steps:
                    run.log.line(f"{check}\n{check.fault() or f'can be used: set sync_expert to {run.folder}'}")
            stop = run.stop_requested()
            if stop or run.due(config.save_every) or run.overdue():
                run.save_state()

            # Stop?
            if stop:
                break
        run.finish()
        pictures = config.log_dir / name / "sync_check"
        run.log.line(f"done at step {state.step}: experts and states in {run.folder}, pictures in {pictures}")


def optimizer_step(
    state: NetworkState[SyncNet], batches: Iterator[dict], config: SyncConfig, accelerator: Accelerator
) -> StepResult:
    """Updates the expert unless a gradient is not finite; raises TrainError then, unless steps are skipped."""
    step = OptimizerStep(state.step, config, state.optimizers)

    # Draw the batch (seeded by step).
    for batch in step.micro_batches(batches):
        # Loss, backward.
        loss = sync_expert_loss(state.network, batch, accelerator.device)
        accelerator.backward(loss / config.grad_accum_steps)
        step.add({"sync_bce": loss.detach()})

    # Clip, skip if non-finite, update.
    result = step.update()
    state.step += 1
    return result


def sync_expert_loss(expert: SyncNet, batch: dict, device: torch.device) -> torch.Tensor:
    """Mean over the windows of faces, each paired with its own mel (in sync) and with other mel (not)."""
    data = {name: batch[name].to(device, non_blocking=True) for name in ("images", "mel", "other_mel")}
    images = to_tensor(data["images"].flatten(0, 1)).unflatten(0, (-1, expert.frames))  # (B, frames, 3, 256, 256)
    mel = torch.cat([data["mel"], data["other_mel"]]).float()  # (2 B, mel_frames, 80)
    face_embeddings, audio_embeddings = expert(images, mel)  # (B, D), (2 B, D)
    in_sync = torch.arange(len(mel), device=mel.device) < len(images)
    return sync_bce(face_embeddings.repeat(2, 1), audio_embeddings, in_sync)


def check_only(config: SyncConfig, cache: Cache, clips: list[str], run: str, device: torch.device) -> None:
    """Checks an existing expert, prints and plots the result. Raises SyncError if it cannot be trusted."""
    name = config.start_from or str(config.checkpoint_dir / run)
    check = check_expert(load_syncnet(config.models_dir, name, device), cache, clips, config.seed)
    path = config.log_dir / run / "sync_check.png"
    check.save(path)
    print(f"{check}\n{name}, on {len(clips)} clips of {cache.folder}; plot in {path}")
    check.require(allow=False)


def build_state(config: SyncConfig, accelerator: Accelerator) -> NetworkState[SyncNet]:
    """Builds an expert, untrained or from start_from, with its optimizer. Raises WeightsError."""
    expert = build_syncnet(config.architecture, config.seed)
    if config.start_from:
        pretrained = load_syncnet(config.models_dir, config.start_from, torch.device("cpu"))
        load_strictly(expert, pretrained.state_dict(), Path(config.start_from))
    make_optimizer = partial(OPTIMIZERS[config.optimizer], weight_decay=config.weight_decay)
    optimizer = make_optimizer(expert.parameters(), config.learning_rate, config.betas)
    resume_metadata = {"architecture": config.architecture, "optimizer_name": config.optimizer}
    return NetworkState(prepare_model(expert, accelerator), optimizer, resume_metadata)


def open_dataset(config: SyncConfig, cache: Cache, clips: list[str], frames: int, world_size: int) -> SyncDataset:
    """Opens the training set. frames: of the expert's window.

    Raises TrainError if it has fewer windows than one optimizer step takes, CacheError if it has none.
    """
    slots = config.batch_size * config.grad_accum_steps * world_size
    dataset = SyncDataset(
        cache,
        clips,
        seed=config.seed,
        slots=slots,
        frames=frames,
        num_steps=config.num_steps,
        gaps=config.gaps,
        other_clips=config.other_clips,
        identity_cap_minutes=config.identity_cap_minutes,
    )
    if slots > (count := dataset.sampler.count):
        raise TrainError(
            f"batch_size x grad_accum_steps x processes is {slots}, but {cache.folder} has {count} windows to train on"
        )
    return dataset


parse = partial(parse_preset, presets=PRESETS, manual=__doc__)

if __name__ == "__main__":
    run_script(lambda arguments: train(*parse(arguments)), sys.argv[1:])
