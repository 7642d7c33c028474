"""A cache of clips -> a trained lip-sync UNet.

    python musetalk_trainer.py                           preset demo: the small set, the cache of the built-in sample
    python musetalk_trainer.py stage1 --hdtf-samples-dir data/mine
    python musetalk_trainer.py stage2 --hdtf-samples-dir data/mine     starts from the weights of stage1
    python musetalk_trainer.py stage2 --hdtf-samples-dir data/mine --check
                                                         trains nothing: checks that stage2 has all it needs except the
                                                         weights of stage1, and its sync expert on these faces
    python musetalk_trainer.py adapt --hdtf-samples-dir data/mine --start-from models/musetalkV15/unet.pth
                                                         a new language from weights that exist; docs/finetuning.md
    python musetalk_trainer.py personal --hdtf-samples-dir data/me --start-from checkpoints/stage2
                                                         minutes of one speaker
    python musetalk_trainer.py stage1 --help             all constants
    python musetalk_trainer.py plan --hours 40           measures what preparing 40 hours of video and each training
                                                         will cost on this machine, and says what would be refused

Writes to `<checkpoint_dir>/<preset>`: training-state-<step>.pt to resume from, unet-<step>.safetensors to use. Writes
to `log_dir`: trainer.log and a folder of the preset with stats.jsonl, TensorBoard files, curves.png and images of
held-out clips by step: samples/ (masked | reference | prediction | truth), validation/ (rows of truth, prediction, and
predictions with other audio, with another reference and in silence) and mouths/ (their openings over time). To resume,
run the same command again; the result is the same as without the interruption. Ctrl-C, or SIGTERM as clusters send it,
stops the run after the current step and saves the training state.

Each loss counts by its weight in `loss_weights`; 0 disables it: latent_l1 on latents, latent_l1_mouth on those of the
mouth, pixel_l1 and lpips on images, sync by the expert named by `sync_expert`, adv_g and feat_match by a discriminator
trained along with the UNet, adv_g_mouth and feat_match_mouth by a second discriminator on crops of the mouth.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import tyro
from accelerate import Accelerator

from losses.adversarial import GANLoss
from losses.discriminator import PatchDiscriminator
from losses.objective import ADVERSARIAL, Crop, Decode, Objective, term_name
from musetalk.cli import (
    Count,
    CountOrZero,
    Decay,
    Positive,
    PositiveOrZero,
    Seed,
    Share,
    ShareOrZero,
    Workers,
    check_constants,
    parse_preset,
    run_script,
)
from musetalk.contract import FeatureContract, sync_mel_frames
from musetalk.data.cache import Cache
from musetalk.data.crop import crop_mouth
from musetalk.data.dataset import SAMPLE_HELD_OUT, FaceDataset, split_clips
from musetalk.data.rehearsal import RehearsalDataset, clips_to_rehearse
from musetalk.data.tail_split import TailSplit, split_tail
from musetalk.devices import check_compiler, compile_network, describe
from musetalk.errors import TrainError
from musetalk.evaluation.pictures import GRID_ROWS, draw_grid
from musetalk.evaluation.sync_check import SyncCheck, check_expert
from musetalk.evaluation.validation import Validator
from musetalk.images import to_tensor
from musetalk.inference.pipeline import LipSyncPipeline
from musetalk.models.lora import Trained, choose_trained, trained_tensors
from musetalk.models.lpips import load_lpips
from musetalk.models.syncnet import SyncNet, load_syncnet
from musetalk.models.tiny_decoder import load_tiny_decoder
from musetalk.models.trained_unet import find_unet
from musetalk.models.unet import build_unet
from musetalk.models.vae import VAE
from musetalk.training.bounds import BOUNDS_SAMPLES, first_batch, report_bounds
from musetalk.training.checkpoint import save_adapter, save_unet
from musetalk.training.distributed import prepare_model, start_processes
from musetalk.training.fine_tuning import table_command
from musetalk.training.preflight import chunk_that_fits
from musetalk.training.run import Run, open_run
from musetalk.training.state import (
    OPTIMIZERS,
    TrainState,
    check_weight_decay,
    frozen_dtype,
    load_pixel_vae,
    load_silence,
    training_contract,
)
from musetalk.training.step import OptimizerStep, StepResult

LOSSES = (
    *("latent_l1", "latent_l1_mouth", "pixel_l1", "lpips", "sync"),
    *("adv_g", "feat_match", "adv_g_mouth", "feat_match_mouth"),
)
MOST_CHUNK = 16  # samples decoded at once by "auto"; more of them are no faster
FINE_TUNING = ("adapt", "personal")  # presets that need weights to start from
CROPS: dict[str, Crop] = {"face": lambda images, _: images, "mouth": crop_mouth}  # what losses of a region see


def weights(**given: float) -> dict[str, float]:
    """A weight for each loss, 0 (disabled) by default."""
    return dict.fromkeys(LOSSES, 0.0) | given


@dataclass
class TrainConfig:
    """The constants of a training; edit a preset below or override them on the command line."""

    # Paths
    hdtf_samples_dir: Path = Path("data/cache")  # output of datasets_process.py
    checkpoint_dir: Path = Path("checkpoints")  # with a folder for each preset
    log_dir: Path = Path("log")
    models_dir: Path = Path("models")
    start_from: str = ""  # weights to start from: a preset, a file or a folder; "" initialises a new UNet
    rehearsal_dir: Path | None = None  # a second cache, of the material that these were trained on

    # Data
    contract: Literal["rigid", "musetalk_v15", "musetalk_v1"] = "rigid"  # whose audio window the UNet learns
    positional_encoding: bool = True  # of audio tokens; MuseTalk adds it at inference but not in training
    held_out: Share = 0.1  # share of identities (of clips, if there is one identity) for samples and validation
    held_out_identities: tuple[str, ...] = ()  # names of those (of clips, if there is one identity) to hold out instead
    held_out_by: Literal["identity", "tail"] = "identity"  # tail: one speaker's last videos, and as many for a table
    rehearsal_share: Share = 0.2  # of samples that come from rehearsal_dir, if that is given
    identity_cap_minutes: PositiveOrZero = 3.0  # an identity counts as at most this much video; 0: no cap
    silence_share: ShareOrZero = 0.0  # of samples with silence as the audio and a closed mouth as the target
    references: Literal["random", "pose_and_mouth", "adjacent"] = "pose_and_mouth"  # similar pose, different mouth
    min_reference_gap: Count = 5  # frames between a frame and its reference, unless that is adjacent
    frames: Count = 1  # consecutive ones in a sample; with a sync loss, the window of its expert
    num_workers: Workers | None = None  # processes that read the cache; None: one per core, at most 8
    prefetch: Count = 2  # batches that each worker has ready
    batch_size: Count = 8  # samples in one micro step
    grad_accum_steps: Count = 1  # micro steps in one optimizer step

    # Losses: a weight for each term, 0 disables it
    loss_weights: dict[Literal[LOSSES], PositiveOrZero] = field(  # type: ignore[valid-type]  # for pydantic
        default_factory=lambda: weights(latent_l1=1.0, pixel_l1=1.0)
    )
    pixel_every: Count = 1  # steps from one with image losses (a pixel step) to the next; they take most of the time
    chunk_size: Count | Literal["auto"] = "auto"  # samples decoded at once; auto: as many as fit on the GPU, or 1
    tiny_decoder: str = ""  # file of tools/distil_decoder.py, which decodes for image losses; "": the VAE decoder
    full_decoder_every: CountOrZero = 0  # pixel steps from one with the VAE decoder to the next; 0: none
    adversarial_start: CountOrZero = 0  # first step with adversarial losses
    adaptive_every: CountOrZero = 0  # pixel steps between updates of the adaptive GAN weight; 0: fixed
    discriminator_width: Count = 64  # channels of the first layer
    discriminator_learning_rate: Positive = 1e-4
    discriminator_betas: tuple[Decay, Decay] = (0.5, 0.999)
    sync_expert: str = "syncnet/latentsync_syncnet.pt"  # in models_dir, or from syncnet_trainer.py
    unfit_expert: bool = False  # train even if the expert fails its check on these clips

    # Optimizer
    trained: Trained = "all"  # of the UNet: all, its attention, or only low-rank adapters (LoRA) of its attention
    lora_rank: Count = 16  # of the adapters
    optimizer: Literal["adamw", "adamax", "adam"] = "adamw"  # adamax as in the original
    learning_rate: Positive = 2e-5
    warmup_steps: CountOrZero = 1000  # the rate rises from 0, then decays along a cosine ...
    final_learning_rate: PositiveOrZero = 2e-5  # ... to this
    weight_decay: PositiveOrZero = 1e-2  # adamw only
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    max_grad_norm: Positive = 1.0
    on_nonfinite: Literal["stop", "skip"] = "stop"  # in a step with a non-finite gradient
    ema_decay: Decay = 0.999  # of the weights for use
    ema_every: Count = 10  # steps between updates of the average
    ema_on_host: bool = False  # keep the average in host memory: saves 3.4 GB on the GPU, slower
    gradient_checkpointing: bool = False  # of the UNet: less memory, a third slower
    compile: bool = False  # torch.compile UNet, decoder and LPIPS: minutes at the start, faster steps on a GPU

    # Run
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: CUDA's GPU, or the CPU without one
    deterministic: bool = False  # on a GPU: the same bits each time, as far as torch can; slower
    check: bool = False  # train nothing; check that all the run needs is present
    num_steps: Count = 250_000  # optimizer updates
    tracker: Literal["tensorboard", "wandb", "trackio", "none"] = "tensorboard"  # of the figures in stats.jsonl
    log_every: Count = 100
    sample_every: Count = 2000
    val_every: CountOrZero = 10_000  # steps between validations on held-out clips, and after the last one; 0: none
    patience: CountOrZero = 0  # validations in a row without a lower lmd that end the training; 0: none do
    val_clips: Count = 8  # most of them, spread over the identities
    val_frames: Count = 50  # most of each clip, at most half of its usable ones
    save_every: Count = 2000
    save_minutes: PositiveOrZero = 20.0  # a state is also saved when the last save is this old; 0: never
    keep_states: Count = 2  # newest training states: 13.6 GB each at full size
    keep_weights: Count = 3  # newest weights: 3.4 GB each
    keep_weights_every: CountOrZero = 50_000  # weights at multiples of this step are never deleted; 0: none
    seed: Seed = 1234


PRESETS = {
    "demo": TrainConfig(
        models_dir=Path("models/mini"),
        start_from="models/mini/musetalk/unet.safetensors",
        held_out_identities=SAMPLE_HELD_OUT,
        num_workers=0,
        batch_size=8,
        pixel_every=10,
        learning_rate=1e-3,
        final_learning_rate=1e-4,
        warmup_steps=20,
        ema_decay=0.99,
        ema_every=1,
        num_steps=800,
        log_every=20,
        sample_every=200,
        val_every=800,
        val_clips=4,
        save_every=200,
    ),
    # First, faces: single frames.
    "stage1": TrainConfig(
        batch_size=32,
        loss_weights=weights(latent_l1=1.0, pixel_l1=1.0, lpips=0.1),
    ),
    # Then, sync and sharpness: windows of frames.
    "stage2": TrainConfig(
        start_from="stage1",
        frames=16,
        batch_size=2,
        grad_accum_steps=8,
        loss_weights=weights(
            latent_l1=1.0,
            pixel_l1=1.0,
            lpips=0.1,
            sync=0.05,
            adv_g=0.01,
            feat_match=0.1,
            adv_g_mouth=0.01,
            feat_match_mouth=0.1,
        ),
        adversarial_start=1000,
        adaptive_every=10,
        learning_rate=5e-6,
        final_learning_rate=5e-6,
        discriminator_learning_rate=5e-6,
        gradient_checkpointing=True,
        num_steps=20_000,
        keep_weights_every=10_000,
    ),
    # A new language with tens of hours of people who speak it.
    "adapt": TrainConfig(
        batch_size=32,
        loss_weights=weights(latent_l1=1.0, pixel_l1=1.0, lpips=0.1),
        learning_rate=1e-5,
        final_learning_rate=1e-6,
        num_steps=50_000,
        val_every=1000,
        patience=10,
        val_clips=16,
        keep_weights_every=0,
    ),
    # One speaker with 1 to 10 minutes, on a 12 GB card.
    "personal": TrainConfig(
        held_out_by="tail",
        identity_cap_minutes=0.0,
        batch_size=4,
        loss_weights=weights(latent_l1=1.0, pixel_l1=1.0, lpips=0.1),
        trained="lora",
        learning_rate=1e-4,
        final_learning_rate=1e-5,
        warmup_steps=100,
        ema_decay=0.99,
        ema_every=1,
        gradient_checkpointing=True,
        num_steps=3000,
        log_every=20,
        sample_every=500,
        val_every=200,
        patience=5,
        save_every=500,
        keep_weights_every=0,
    ),
    # The recipe of the original MuseTalkTrainer, for comparison on the same cache.
    "original": TrainConfig(
        references="random",
        min_reference_gap=1,
        batch_size=10,
        loss_weights=weights(latent_l1=1.0, pixel_l1=1.0, lpips=0.01, adv_g=0.01),
        discriminator_betas=(0.9, 0.999),
        optimizer="adamax",
        learning_rate=1e-4,
        final_learning_rate=1e-4,
        warmup_steps=0,
        weight_decay=0.0,
        ema_decay=0.0,
        ema_every=1,
    ),
}


def train(preset: str, config: TrainConfig) -> None:
    """Trains until `num_steps`, resuming from the newest training state in the preset's folder."""
    # Check constants, then data, then networks: the cheapest first.
    check_config(config)
    if preset in FINE_TUNING and not config.start_from:
        raise TrainError(
            f"{preset} needs weights to start from; set start_from, for example to models/musetalkV15/unet.pth"
        )
    accelerator = start_processes(config.device, config.deterministic)
    cache = Cache(config.hdtf_samples_dir)
    contract = training_contract(config.contract, cache, config.positional_encoding)
    train_clips, table_clips, held_clips, split_note = split(cache, config)
    silence = load_silence(config.models_dir, cache, accelerator.device) if config.silence_share else None
    world_size = accelerator.num_processes
    open_train_set = partial(
        open_train_dataset, config, cache, train_clips, contract, world_size=world_size, silence=silence
    )
    dataset = open_train_set(sync_offset=0)
    held_clips = held_clips or train_clips
    open_held_set = partial(FaceDataset, cache, held_clips, contract, seed=config.seed)
    grid_dataset = open_held_set(slots=GRID_ROWS)
    bounds_dataset = open_held_set(
        slots=BOUNDS_SAMPLES, references=config.references, min_reference_gap=config.min_reference_gap
    )
    vae = load_pixel_vae(config.models_dir, accelerator)
    cache.contract.require(replace(cache.contract, vae=vae.fingerprint), ("vae",), str(cache.folder))
    state = build_state(config, contract, accelerator)
    features = next(iter(cache.clips.values())).tensor("audio_features", 0, 1)  # (1, S, D)
    state.unet.check_features(features.shape[1:], f"the cache in {cache.folder}")
    objective, expert = build_objective(config, state, vae, accelerator)
    pipeline = LipSyncPipeline(state.unet, vae, contract, config.models_dir)
    validator = None
    if config.val_every:
        limits = config.val_clips, config.val_frames
        validator = Validator(pipeline, cache, held_clips, *limits, distance=objective.distance, expert=expert)
    run_sync_check = expert and partial(check_expert, expert, cache, held_clips, config.seed)
    size, trained = (sum(x.numel() for x in tensors.values()) for tensors in (state.unet.model.state_dict(), state.ema))
    summary = (
        f"UNet of {size:,} parameters, {trained:,} of them trained; {len(train_clips)} clips to train on; {split_note}"
    )
    if config.check:
        if accelerator.is_main_process:
            print(f"on {describe(accelerator.device)}\n{summary}")
            check_start(preset, config, state, run_sync_check)
        return

    weights_every = config.val_every if config.patience else config.save_every
    tensors = state.unet.model.state_dict()
    with open_run(preset, config, state, accelerator, tensors, weights_every) as run:
        run.log.line(summary)
        run.ended = state.best.exhausted(config.patience)

        # A new run: load weights to start from, check the sync expert, print what the losses can reach.
        if not run.resumed:
            if config.start_from:
                run.log.line(state.load_pretrained(pretrained_path(config)))
            if run_sync_check:
                check = run_sync_check()
                run.log.line(str(check))
                run.log.picture(0, check.draw(), "sync_check")
                state.sync_offset = check.require(config.unfit_expert)
            if accelerator.is_main_process:
                batch = to_device(first_batch(bounds_dataset), accelerator.device)
                report_bounds(objective.bounds(batch), run.log)
        if state.sync_offset:
            dataset = open_train_set(sync_offset=state.sync_offset)

        batches = run.batches(dataset)
        for _ in run.steps():
            result = optimizer_step(state, objective, batches, config, accelerator)

            # Log.
            if result.skipped:
                run.log.line(f"skipped: {result.skipped}")
            if run.due(config.log_every):
                adaptive = {term_name("adaptive_weight", name): x.item() for name, x in state.adaptive_weights.items()}
                run.log.record(state.step, run.figures(result) | adaptive)

            # Sample.
            if accelerator.is_main_process and run.due(config.sample_every):
                with state.averaged():
                    run.log.picture(state.step, draw_grid(pipeline, grid_dataset))

            # Validate.
            best = validator is not None and run.due(config.val_every) and validate(validator, state, run, config)

            # Save. With patience only the best weights, so the newest ones are always those to use.
            if best if config.patience else run.due(config.save_every):
                run.save_weights(save_unet, state.unet.model.state_dict() | state.ema, contract)
                if config.trained == "lora":
                    run.save_weights(save_adapter, state.ema, config.lora_rank)
            stop = run.stop_requested()
            if stop or run.ended or run.due(config.save_every) or run.overdue():
                run.save_state()

            # Stop?
            if stop:
                break
        run.finish()
        if accelerator.is_main_process:
            log_result(state, run, config, table_clips)
        pictures = config.log_dir / preset
        run.log.line(f"done at step {state.step}: weights and states in {run.folder}, pictures in {pictures}")


def validate(validator: Validator, state: TrainState, run: Run, config: TrainConfig) -> bool:
    """Validates the averaged weights in the main process, and ends the run in all of them if patience is exhausted.

    Returns whether they are the best so far: always False in other processes and without patience.
    """
    best = False
    if run.accelerator.is_main_process:
        with state.averaged():
            validation = validator()
        run.log.validation(state.step, validation)
        best = config.patience > 0 and state.best.update(state.step, validation.figures["lmd"])
    if config.patience:
        run.ended = run.ranks.any(state.best.exhausted(config.patience))
    return best


def log_result(state: TrainState, run: Run, config: TrainConfig, table_clips: list[str]) -> None:
    """Logs the best weights, and the command that compares them with those to start from on clips for a table."""
    if config.patience:
        run.log.line(f"best: step {state.best.step}, {run.folder}/unet-{state.best.step:07d}.safetensors")
    if table_clips:
        command = table_command(
            find_unet(pretrained_path(config)),
            find_unet(run.folder),
            cache=config.hdtf_samples_dir,
            models_dir=config.models_dir,
            contract=config.contract,
            clips=table_clips,
        )
        advice = "put the folder of the videos in place of path/to/videos"
        run.log.line(
            f"to compare it with the weights it started from, on the clips kept for this ({advice}):\n{command}"
        )


class Due(NamedTuple):
    """What one step does in addition to the latent loss."""

    pixel_step: int | None  # index among the steps with image losses, from 1; None: no image losses
    train_disc: bool  # adversarial losses, and an update of the discriminators
    adaptive: bool  # an update of the adaptive weights


def due_at(step: int, objective: Objective, config: TrainConfig) -> Due:
    """Returns what is due in the step after `step` updates."""
    index, rest = divmod(step + 1, config.pixel_every)
    adversarial = bool(objective.gan_losses) and step >= config.adversarial_start
    pixel = rest == 0 and objective.has_pixel_terms(adversarial)
    train_disc = pixel and adversarial
    adaptive = train_disc and bool(objective.adaptive_weights) and index % config.adaptive_every == 0
    return Due(index if pixel else None, train_disc, adaptive)


def optimizer_step(
    state: TrainState, objective: Objective, batches: Iterator[dict], config: TrainConfig, accelerator: Accelerator
) -> StepResult:
    """Updates all networks, or none if a gradient is not finite; raises TrainError then, unless steps are skipped."""
    due = due_at(state.step, objective, config)
    active_discs = [*state.gan_losses.values()] if due.train_disc else []
    step = OptimizerStep(state.step, config, [state.optimizer, *(x.optimizer for x in active_discs)])
    for gan_loss in active_discs:
        gan_loss.begin_step()

    # Draw the batch (seeded by step).
    for micro_step, batch in enumerate(step.micro_batches(batches)):
        data = to_device(batch, accelerator.device)

        # Generator losses, backward.
        dtype = state.unet.model.dtype
        unet_input = torch.cat([data["masked_latents"], data["reference_latents"]], dim=1).to(dtype)
        pred_latents = state.unet(unet_input, data["audio_window"].to(dtype))
        if due.adaptive and micro_step == 0:
            assert due.pixel_step is not None
            average = partial(accelerator.reduce, reduction="mean")
            objective.update_adaptive_weights(
                pred_latents, state.unet.last_layer_gradient, average, data, due.pixel_step
            )
        loss, terms, images = objective.generator_loss(
            pred_latents, data, pixel_step=due.pixel_step, adversarial=due.train_disc
        )
        accelerator.backward(loss / config.grad_accum_steps)

        # Discriminator losses, backward.
        if due.train_disc:
            assert images is not None
            terms |= objective.discriminator_backward(images, data, 1 / config.grad_accum_steps)
        del pred_latents, images  # or the next micro step would hold them too
        step.add(terms)

    # Clip, skip if non-finite, update, EMA.
    for gan_loss in active_discs:
        gan_loss.end_step()
    result = step.update()
    if not result.skipped:
        for gan_loss in active_discs:
            gan_loss.network.power_iteration()
    state.step += 1
    if accelerator.is_main_process and state.step % config.ema_every == 0:
        state.update_ema(config.ema_decay)
    return result


def to_device(batch: dict, device: torch.device) -> dict[str, torch.Tensor]:
    """Moves a batch's tensors to the device and flattens windows: (B, T, ...) -> (B T, ...), but mel (B, M, 80)."""
    data = {name: value.to(device, non_blocking=True) for name, value in batch.items() if name != "where"}
    return {name: value if name == "mel" else value.flatten(0, 1) for name, value in data.items()}


def check_start(
    preset: str, config: TrainConfig, state: TrainState, run_sync_check: Callable[[], SyncCheck] | None
) -> None:
    """Checks the weights to start from, if they exist yet, and the sync expert, and prints the results.

    run_sync_check: None without an expert. Overwrites the state. Raises WeightsError, ContractError, SyncError.
    """
    path = pretrained_path(config)
    if config.start_from in PRESETS and not any(path.glob("unet-*.safetensors")):
        print(f"{path} has no weights yet to start from")
    elif config.start_from:
        print(state.load_pretrained(path))
    if run_sync_check:
        check = run_sync_check()
        path = config.log_dir / preset / "sync_check.png"
        check.save(path)
        print(f"{check}\n{config.sync_expert} on held-out clips; plot in {path}")
        check.require(config.unfit_expert)
    print(f"{preset} has all it needs; run the same command without --check to train")


def pretrained_path(config: TrainConfig) -> Path:
    """The path of the weights to start from: another preset's folder, or what start_from names."""
    return config.checkpoint_dir / config.start_from if config.start_from in PRESETS else Path(config.start_from)


def check_config(config: TrainConfig) -> None:
    """Raises UserError for constants that are invalid alone or together."""
    check_constants(config)
    check_weight_decay(config.optimizer, config.weight_decay)
    active = active_weights(config).keys()
    adv_terms = {term_name(name, region) for name in ADVERSARIAL for region in CROPS}
    if not active:
        raise TrainError("loss_weights must have a term with a weight over 0")
    if config.pixel_every > 1 and "latent_l1" not in active:
        raise TrainError("pixel_every must be 1 if latent_l1 has no weight, or steps in between would have no loss")
    if config.adversarial_start and active <= adv_terms:
        raise TrainError("adversarial_start must be 0 if only adversarial losses have a weight")
    if config.adaptive_every and not active & {"pixel_l1", "lpips"}:
        raise TrainError("adaptive_every must be 0 if neither pixel_l1 nor lpips has a weight to balance adv_g with")
    if config.patience and not config.val_every:
        raise TrainError("val_every must be over 0 with patience, which counts validations")
    if config.held_out_by == "tail" and config.held_out_identities:
        raise TrainError("held_out_identities must be () if held_out_by is tail, which chooses clips by their time")
    if config.compile:
        check_compiler()


def active_weights(config: TrainConfig) -> dict[str, float]:
    """The weights over 0."""
    return {name: weight for name, weight in config.loss_weights.items() if weight > 0}


def split(cache: Cache, config: TrainConfig) -> TailSplit:
    """Splits the clips by identity, with none for a table, or in time. Raises UserError if that is impossible."""
    if config.held_out_by == "tail":
        return split_tail(cache, config.held_out)
    train, held_out, note = split_clips(cache, config.held_out, config.held_out_identities)
    return TailSplit(train, [], held_out, note)


def open_train_dataset(
    config: TrainConfig,
    cache: Cache,
    clips: list[str],
    contract: FeatureContract,
    *,
    world_size: int,
    sync_offset: int,
    silence: np.ndarray | None = None,
) -> FaceDataset | RehearsalDataset:
    """Opens the training set, with rehearsal if a cache for it is given.

    Raises ContractError if the two caches were made under different contracts, UserError if there is nothing to
    rehearse, TrainError as `open_dataset` does.
    """
    open_set = partial(
        open_dataset, config, contract=contract, world_size=world_size, sync_offset=sync_offset, silence=silence
    )
    dataset = open_set(cache, clips)
    if config.rehearsal_dir is None:
        return dataset
    older = Cache(config.rehearsal_dir)
    older_clips = clips_to_rehearse(older, config.held_out, cache, clips)
    return RehearsalDataset(dataset, open_set(older, older_clips), config.rehearsal_share)


def open_dataset(
    config: TrainConfig,
    cache: Cache,
    clips: list[str],
    contract: FeatureContract,
    *,
    world_size: int,
    sync_offset: int,
    silence: np.ndarray | None = None,
) -> FaceDataset:
    """Opens the training set. Raises TrainError if it has fewer samples than one optimizer step takes."""
    slots = config.batch_size * config.grad_accum_steps * world_size
    dataset = FaceDataset(
        cache,
        clips,
        contract,
        seed=config.seed,
        slots=slots,
        frames=config.frames,
        references=config.references,
        min_reference_gap=config.min_reference_gap,
        mel_frames=sync_mel_frames(config.frames) if config.loss_weights.get("sync") else 0,
        sync_offset=sync_offset,
        identity_cap_minutes=config.identity_cap_minutes,
        silence_share=config.silence_share,
        silence=silence,
    )
    if slots > (count := dataset.sampler.count):
        raise TrainError(
            f"batch_size x grad_accum_steps x processes is {slots}, but {cache.folder} has {count} samples to train on"
        )
    return dataset


def build_state(config: TrainConfig, contract: FeatureContract, accelerator: Accelerator) -> TrainState:
    """Builds an untrained UNet, its optimizer and average, and a discriminator for each region with a weighted term."""
    unet = build_unet(config.models_dir, config.seed, contract.positional_encoding)
    if config.gradient_checkpointing:
        unet.model.enable_gradient_checkpointing()
    if config.adaptive_every:
        unet.keep_last_input()
    if config.compile:
        compile_network(unet.model, accelerator.device)
    choose_trained(unet.model, config.trained, config.lora_rank, config.seed)
    make_optimizer = partial(OPTIMIZERS[config.optimizer], weight_decay=config.weight_decay)
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(parameters, config.learning_rate, config.betas)
    unet = prepare_model(unet, accelerator)
    on_host = config.ema_on_host or not accelerator.is_main_process  # the main process alone updates and saves it
    place = torch.device("cpu") if on_host else accelerator.device
    ema = {name: value.to(place, copy=True) for name, value in trained_tensors(unet.model).items()}
    active, gan_losses, adaptive_weights = active_weights(config), {}, {}
    for region in CROPS:
        if any(term_name(name, region) in active for name in ADVERSARIAL):
            torch.manual_seed(config.seed)
            network = PatchDiscriminator(config.discriminator_width).to(accelerator.device)
            rate, betas = config.discriminator_learning_rate, config.discriminator_betas
            gan_losses[region] = GANLoss(network, make_optimizer(network.parameters(), rate, betas))
        if config.adaptive_every and term_name("adv_g", region) in active:
            adaptive_weights[region] = torch.zeros((), device=accelerator.device)
    return TrainState(unet, contract, optimizer, config.optimizer, ema, gan_losses, adaptive_weights)


def choose_chunk_size(config: TrainConfig, state: TrainState, device: torch.device) -> int:
    """The number of samples to decode at once: `chunk_size`, or as many as fit into the free memory of a GPU."""
    if config.chunk_size != "auto":
        return config.chunk_size
    samples = config.batch_size * config.frames
    # With a sync loss several chunks are decoded twice, but a single chunk once.
    most = samples if config.loss_weights.get("sync") else min(samples, MOST_CHUNK)
    return min(most, chunk_that_fits(device, state, samples, checkpointing=config.gradient_checkpointing))


def build_objective(
    config: TrainConfig, state: TrainState, vae: VAE, accelerator: Accelerator
) -> tuple[Objective, SyncNet | None]:
    """Builds the losses with the frozen networks that they need. Returns them and the sync expert, if there is one."""
    active = active_weights(config)
    expert = load_syncnet(config.models_dir, config.sync_expert, accelerator.device) if "sync" in active else None
    if expert and expert.frames != config.frames:
        raise TrainError(f"frames must be {expert.frames}, the window of {config.sync_expert}, not {config.frames}")
    tiny = load_tiny_decoder(Path(config.tiny_decoder), vae) if config.tiny_decoder else None
    frozen = accelerator.device, frozen_dtype(accelerator)
    distance = load_lpips(config.models_dir, *frozen) if "lpips" in active else None
    if config.compile:
        for network in filter(None, (vae.autoencoder.decoder, tiny, distance)):
            compile_network(network, accelerator.device)

    def decoder(pixel_step: int) -> Decode:
        if tiny is None or (config.full_decoder_every and pixel_step % config.full_decoder_every == 0):
            return vae.decode
        return tiny.decode

    @accelerator.autocast()
    def embed(images: torch.Tensor, mel: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert expert is not None
        return expert.embed(images, mel)

    objective = Objective(
        active,
        decoder,
        to_tensor,
        choose_chunk_size(config, state, accelerator.device),
        distance=distance,
        embed=embed,
        gan_losses=state.gan_losses,
        crops=CROPS,
        adaptive_weights=state.adaptive_weights,
    )
    return objective, expert


parse = partial(parse_preset, presets=PRESETS, manual=__doc__)


def main(arguments: list[str]) -> None:
    """Trains a preset, or plans trainings if `plan` is named in place of a preset."""
    if arguments[:1] == ["plan"]:
        from tools.plan import command  # which imports this script

        signal.signal(signal.SIGTERM, signal.default_int_handler)  # clusters send it; handled like Ctrl-C
        command.main(tyro.cli(command.PlanConfig, args=arguments[1:], description=command.__doc__))
    else:
        train(*parse(arguments))


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
