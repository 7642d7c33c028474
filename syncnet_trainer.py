"""A cache of clips -> a sync expert, which tells whether a mouth speaks the audio.

    python syncnet_trainer.py                           preset demo: a narrow expert, the cache of the built-in sample
    python syncnet_trainer.py wav2lip --hdtf-samples-dir data/mine
    python syncnet_trainer.py wav2lip --start-from syncnet/lipsync_expert.pth    goes on from Wav2Lip's own
    python syncnet_trainer.py latentsync --help         all constants
    python syncnet_trainer.py --check-only --start-from syncnet/latentsync_syncnet.pt --models-dir models
                                                        trains nothing: how well does this one know your faces?

Writes `<checkpoint_dir>/syncnet_<preset>/training-state-<step>.pt` to go on and `syncnet-<step>.safetensors` to use,
and in `log_dir` trainer.log, `syncnet_<preset>/stats.jsonl`, `syncnet_<preset>/sync_check/<step>.png` (how well it
hears faces of clips held out with audio that is moved) and TensorBoard files. Run the same command again to go on from
the newest state, exactly as if there had been no interruption. Ctrl-C, or a cluster's SIGTERM, ends it after the step
with its state saved. musetalk_trainer.py takes the folder as its `sync_expert`.

A loss (sync_bce) that stays at 0.69 is that of a coin. To leave it, an expert of full size needs videos that are in
sync, hours of them, of many people, and large batches.
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
from accelerate.utils import gather_object

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
from musetalk.data.dataset import split_clips
from musetalk.data.sync_dataset import SyncDataset
from musetalk.errors import TrainError
from musetalk.images import to_tensor
from musetalk.models.syncnet import SyncNet, build_syncnet, load_syncnet, save_syncnet
from musetalk.models.weights import load_strictly
from musetalk.training.distributed import average_gradients, prepare_model, start_processes
from musetalk.training.run import open_run
from musetalk.training.state import (
    OPTIMIZERS,
    NetworkState,
    check_weight_decay,
    learning_rate,
    nonfinite_error,
)
from musetalk.training.sync_check import check_expert


@dataclass
class SyncConfig:
    """The constants of a training; edit a preset below or override them on the command line."""

    # Paths
    hdtf_samples_dir: Path = Path("data/cache")  # what datasets_process.py made
    checkpoint_dir: Path = Path("checkpoints")  # each preset has a folder in it
    log_dir: Path = Path("log")
    models_dir: Path = Path("models")  # where published experts are

    # Expert
    architecture: Literal["wav2lip", "wav2lip_narrow", "latentsync", "latentsync_attention", "latentsync_narrow"] = (
        "wav2lip"
    )
    start_from: str = ""  # a published file in models_dir or what this script made, a file or a folder; "" is a new one

    # Data
    held_out: Share = 0.1  # share of identities (or clips, of a single one) kept for the check
    num_workers: Workers | None = None  # processes that read the cache; None: 8, or as many as there are cores for
    prefetch: Count = 2  # batches that each of them has ready
    batch_size: Count = 32  # windows of faces in one forward, each with its own mel and with mel that is not its own
    grad_accum_steps: Count = 1  # forwards in one optimizer step
    gaps: tuple[Count, Count] = (15, 3)  # frames that mel of the same clip is off at least: at first, and at the end
    other_clips: Share = 0.25  # share of windows whose other mel is of another clip

    # Optimizer
    optimizer: Literal["adamw", "adamax", "adam"] = "adam"
    learning_rate: Positive = 1e-4
    warmup_steps: CountOrZero = 1000  # the rate rises from 0, then falls along a cosine ...
    final_learning_rate: PositiveOrZero = 1e-4  # ... to this
    weight_decay: PositiveOrZero = 0.0  # with adamw only
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    max_grad_norm: Positive = 1.0

    # Run
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU, or the CPU where there is none
    check_only: bool = False  # train nothing, but check the expert of start_from, or the newest one of the preset
    num_steps: Count = 200_000  # optimizer updates
    log_every: Count = 100
    val_every: Count = 2500
    save_every: Count = 2500
    save_minutes: PositiveOrZero = 20.0  # a state is also saved when the last save is this old; 0: never
    keep_states: Count = 2  # training states of the newest steps
    keep_weights: Count = 3  # experts to use of the newest steps: 1.5 GB each with latentsync
    keep_weights_every: CountOrZero = 50_000  # those of multiples of this many steps are never deleted; 0: none
    seed: Seed = 1234


PRESETS = {
    "demo": SyncConfig(
        models_dir=Path("models/mini"),
        architecture="wav2lip_narrow",
        held_out=0.25,
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
        grad_accum_steps=16,  # 256 pairs in a step; with half of them LatentSync's authors saw it stay at 0.69
        optimizer="adamw",
        learning_rate=1e-5,
        final_learning_rate=1e-5,
        weight_decay=1e-2,
    ),
}


def train(preset: str, config: SyncConfig) -> None:
    """Train until `num_steps`, going on from the newest state in the preset's folder."""
    # Check what costs nothing first: constants, then data, then the network.
    check_constants(config)
    check_weight_decay(config.optimizer, config.weight_decay)
    accelerator = start_processes(config.device)
    world_size = accelerator.num_processes
    if config.batch_size * world_size == 1 and config.architecture.startswith("wav2lip"):
        raise TrainError(f"batch_size must be 2 or more for {config.architecture}, whose batch norms compare windows")
    cache = Cache(config.hdtf_samples_dir)
    train_clips, held_clips, note = split_clips(cache, config.held_out, config.seed)
    shown = held_clips or train_clips
    name = f"syncnet_{preset}"
    if config.check_only:
        check_only(config, cache, shown, name, accelerator.device)
        return
    state = build_state(config, accelerator)
    dataset = open_dataset(config, cache, train_clips, state.network.frames, world_size)

    with open_run(name, config, state, accelerator, state.network.state_dict()) as run:
        size = sum(parameter.numel() for parameter in state.network.parameters())
        run.log.line(f"{config.architecture} of {size:,} parameters; {len(train_clips)} clips to train on; {note}")
        if not run.resumed:
            run.log.line(f"before: {check_expert(state.network, cache, shown, config.seed).summary()}")

        batches = run.batches(dataset)
        for _ in run.steps():
            # Forward, backward and update: this step's samples, the same ones whatever happened before.
            values = optimizer_step(state, batches, config, accelerator, run.folder)
            state.step += 1

            # Report, on clips held out too.
            record = {}
            if run.due(config.log_every):
                values["sync_bce"] = accelerator.reduce(values["sync_bce"], "mean")
                record = {name: float(value) for name, value in values.items()}
            if accelerator.is_main_process and run.due(config.val_every):
                check = check_expert(state.network, cache, shown, config.seed)
                record |= {"accuracy": check.accuracy, "offset": check.offset, "confidence": check.confidence}
                run.log.picture(state.step, check.draw(), "sync_check")
            if record:
                run.log.record(state.step, record)

            # Save.
            if accelerator.is_main_process and run.due(config.save_every):
                run.keep(save_syncnet(run.folder, state.step, state.network, config.architecture))
                if state.step == config.num_steps:
                    run.log.line(f"{check}\n{check.fault() or f'can be used: set sync_expert to {run.folder}'}")
        pictures = config.log_dir / name / "sync_check"
        run.log.line(f"done at step {state.step}: experts and states in {run.folder}, pictures in {pictures}")


def check_only(config: SyncConfig, cache: Cache, clips: list[str], run: str, device: torch.device) -> None:
    """Check an expert that there is. Raises SyncError where it cannot be trusted."""
    name = config.start_from or str(config.checkpoint_dir / run)
    check = check_expert(load_syncnet(config.models_dir, name, device), cache, clips, config.seed)
    path = config.log_dir / run / "sync_check.png"
    check.save(path)
    print(f"{check}\n{name}, on {len(clips)} clips of {cache.folder}; drawn in {path}")
    check.require(allow=False)


def build_state(config: SyncConfig, accelerator: Accelerator) -> NetworkState:
    """An expert, untrained or as it was trained before, with its optimizer. Raises WeightsError."""
    expert = build_syncnet(config.architecture, config.seed)
    if config.start_from:
        trained = load_syncnet(config.models_dir, config.start_from, torch.device("cpu"))
        load_strictly(expert, trained.state_dict(), Path(config.start_from))
    make = OPTIMIZERS[config.optimizer]
    optimizer = make(expert.parameters(), config.learning_rate, config.betas, weight_decay=config.weight_decay)
    fixed = {"architecture": config.architecture, "optimizer_name": config.optimizer}
    return NetworkState(prepare_model(expert, accelerator), optimizer, fixed)


def open_dataset(config: SyncConfig, cache: Cache, clips: list[str], frames: int, world_size: int) -> SyncDataset:
    """The samples to train on. ranks: processes.

    Raises TrainError where they are fewer than those of a step, CacheError for none.
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
    )
    if slots > (count := int(dataset.ends[-1])):
        raise TrainError(
            f"batch_size x grad_accum_steps x processes is {slots}, but {cache.folder} has {count} windows to train on"
        )
    return dataset


def optimizer_step(
    state: NetworkState, batches: Iterator[dict], config: SyncConfig, accelerator: Accelerator, run_dir: Path
) -> dict[str, torch.Tensor | float]:
    """One update, and what there is to tell of it. Raises TrainError, without it, where a gradient is not finite."""
    loss, drawn, rate = 0, [], learning_rate(state.step, config)
    for _ in range(config.grad_accum_steps):
        batch = next(batches)
        drawn += batch["where"]
        loss = loss + sync_step(state.network, batch, accelerator, config.grad_accum_steps)
    average_gradients(state.network.parameters())
    norm = accelerator.clip_grad_norm_(state.network.parameters(), config.max_grad_norm)
    if not torch.isfinite(norm):
        raise nonfinite_error(
            {"sync_bce": accelerator.reduce(loss, "mean")}, gather_object(drawn), state.step + 1, run_dir
        )
    state.optimizer.param_groups[0]["lr"] = rate
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    return {"sync_bce": loss, "grad_norm": norm, "learning_rate": rate}


def sync_step(expert: SyncNet, batch: dict, accelerator: Accelerator, parts: int) -> torch.Tensor:
    """The loss of one batch of a step's `parts`, its gradient added to the expert's. Returns its share, detached."""
    data = {name: batch[name].to(accelerator.device, non_blocking=True) for name in ("images", "mel", "other_mel")}
    images = to_tensor(data["images"].flatten(0, 1)).unflatten(0, (-1, expert.frames))  # (B, frames, 3, 256, 256)
    mel = torch.cat([data["mel"], data["other_mel"]]).float()  # (2 B, mel_frames, 80)
    faces, heard = expert(images, mel)  # (B, D), (2 B, D)
    in_sync = torch.arange(len(mel), device=mel.device) < len(images)
    loss = sync_bce(faces.repeat(2, 1), heard, in_sync) / parts
    accelerator.backward(loss)
    return loss.detach()


parse = partial(parse_preset, presets=PRESETS, manual=__doc__)

if __name__ == "__main__":
    run_script(lambda arguments: train(*parse(arguments)), sys.argv[1:])
