"""A cache of clips -> a trained lip-sync UNet.

    python musetalk_trainer.py                           preset demo: the small set, the cache of the built-in sample
    python musetalk_trainer.py stage1 --hdtf-samples-dir data/mine
    python musetalk_trainer.py stage2 --hdtf-samples-dir data/mine     goes on from what stage1 left
    python musetalk_trainer.py stage2 --hdtf-samples-dir data/mine --check
                                                         trains nothing: is all there that stage2 needs but stage1's
                                                         weights, and can its sync expert be trusted on these faces?
    python musetalk_trainer.py stage1 --help             all constants

Writes `<checkpoint_dir>/<preset>/training-state-<step>.pt` to go on and `unet-<step>.safetensors` to use, and in
`log_dir` trainer.log and a folder of the preset's: stats.jsonl, TensorBoard files, curves.png, and pictures of clips
held out by step: samples/ (masked | reference | prediction | truth), validation/ (rows of truth, prediction, and that
by other audio, by another reference, in silence) and mouths/ (their openings over time). Run the same command again to
go on from the newest state, exactly as if there had been no interruption. Ctrl-C, or a cluster's SIGTERM, ends it after
the step with its state saved.

A loss counts by its weight in `loss_weights`, 0 is off: latent_l1 on latents, pixel_l1 and lpips on images, sync by the
expert that `sync_expert` names, adv_g and feat_match by a discriminator that is trained along, adv_g_mouth and
feat_match_mouth by another one that sees mouths.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object

from losses.adversarial import GANLoss
from losses.discriminator import PatchDiscriminator
from losses.objective import ADVERSARIAL, Decode, Objective
from losses.pixel_branch import Terms
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
from musetalk.contract import FeatureContract, sync_mel_frames
from musetalk.data.cache import Cache
from musetalk.data.crop import crop_mouth
from musetalk.data.dataset import FaceDataset, split_clips
from musetalk.devices import describe
from musetalk.errors import TrainError
from musetalk.images import to_tensor
from musetalk.inference.pipeline import LipSyncPipeline
from musetalk.models.lpips import load_lpips
from musetalk.models.syncnet import SyncNet, load_syncnet
from musetalk.models.tiny_decoder import load_tiny_decoder
from musetalk.models.unet import build_unet
from musetalk.models.vae import VAE
from musetalk.training.checkpoint import save_unet
from musetalk.training.distributed import average_gradients, prepare_model, start_processes
from musetalk.training.run import open_run
from musetalk.training.state import (
    OPTIMIZERS,
    TrainState,
    check_weight_decay,
    frozen_dtype,
    learning_rate,
    load_pixel_vae,
    nonfinite_error,
    training_contract,
)
from musetalk.training.sync_check import SyncCheck, check_expert
from musetalk.training.validation import GRID_ROWS, Validator, draw_grid

LOSSES = (
    *("latent_l1", "pixel_l1", "lpips", "sync"),
    *("adv_g", "feat_match", "adv_g_mouth", "feat_match_mouth"),
)
DISC_CROPS = {
    "": lambda images, _: images,
    "_mouth": crop_mouth,
}  # what the discriminators see, by their terms' endings


def weights(**given: float) -> dict[str, float]:
    """A weight for each loss, 0 (off) for those that are not given."""
    return dict.fromkeys(LOSSES, 0.0) | given


@dataclass
class TrainConfig:
    """The constants of a training; edit a preset below or override them on the command line."""

    # Paths
    hdtf_samples_dir: Path = Path("data/cache")  # what datasets_process.py made
    checkpoint_dir: Path = Path("checkpoints")  # each preset has a folder in it
    log_dir: Path = Path("log")
    models_dir: Path = Path("models")
    start_from: str = ""  # weights to begin with: of another preset, or a file, or a folder; "" is a new UNet

    # Data
    contract: Literal["rigid", "musetalk_v15", "musetalk_v1"] = "rigid"  # whose audio window it learns
    positional_encoding: bool = True  # of audio tokens; MuseTalk's inference adds it, its training code does not
    held_out: Share = 0.1  # share of identities (or clips, of a single one) kept for the samples
    references: Literal["random", "pose_and_mouth"] = "pose_and_mouth"  # the latter: alike in pose, another mouth
    min_reference_gap: Count = 5  # frames between a frame and its reference
    frames: Count = 1  # consecutive ones in a sample; with a sync loss those that its expert sees
    num_workers: Workers | None = None  # processes that read the cache; None: 8, or as many as there are cores for
    prefetch: Count = 2  # batches that each of them has ready
    batch_size: Count = 8  # samples in one forward
    grad_accum_steps: Count = 1  # forwards in one optimizer step

    # Losses: a weight for each term, 0 is off
    loss_weights: dict[Literal[LOSSES], PositiveOrZero] = field(
        default_factory=lambda: weights(latent_l1=1.0, pixel_l1=1.0)
    )
    pixel_every: Count = 1  # steps between those with losses on images, which cost most of the time
    chunk_size: Count = 1  # samples decoded at once for them: 0.8 GiB each at full size
    tiny_decoder: str = ""  # file of tools/distil_decoder.py through which they are taken; "": the VAE's own decoder
    full_decoder_every: CountOrZero = 0  # of those steps, one takes the VAE's own all the same; 0: none
    adversarial_start: CountOrZero = 0  # step from which discriminators learn and are heard
    adaptive_every: CountOrZero = (
        0  # of those steps, one measures how much adv_g must weigh to pull as they do; 0: none
    )
    discriminator_learning_rate: Positive = 1e-4
    discriminator_betas: tuple[Decay, Decay] = (0.5, 0.999)
    sync_expert: str = "syncnet/latentsync_syncnet.pt"  # in models_dir, or what syncnet_trainer.py made
    unfit_expert: bool = False  # go on with one that fails its check on these clips

    # Optimizer
    optimizer: Literal["adamw", "adamax", "adam"] = "adamw"  # adamax is the original's
    learning_rate: Positive = 2e-5
    warmup_steps: CountOrZero = 1000  # the rate rises from 0, then falls along a cosine ...
    final_learning_rate: PositiveOrZero = 2e-5  # ... to this
    weight_decay: PositiveOrZero = 1e-2  # with adamw only
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    max_grad_norm: Positive = 1.0
    on_nonfinite: Literal["stop", "skip"] = "stop"  # what to do in a step whose gradient is not finite
    ema_decay: Decay = 0.999  # of the weights that are used; kept in host memory
    ema_every: Count = 10  # steps
    gradient_checkpointing: bool = False  # of the UNet: less memory, a third more time
    compile: bool = False  # the UNet, by torch.compile: minutes at the start, faster steps on a GPU

    # Run
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU, or the CPU where there is none
    check: bool = False  # train nothing, but check that all is there which a training needs
    num_steps: Count = 250_000  # optimizer updates
    log_every: Count = 100
    sample_every: Count = 2000
    val_every: CountOrZero = 10_000  # steps between validations on clips held out, and after the last; 0: none
    val_frames: Count = 50  # of each of four clips
    save_every: Count = 2000
    save_minutes: PositiveOrZero = 20.0  # a state is also saved when the last save is this old; 0: never
    keep_states: Count = 2  # training states of the newest steps: 13.6 GB each at full size
    keep_weights: Count = 3  # weights to use of the newest steps: 3.4 GB each
    keep_weights_every: CountOrZero = 50_000  # those of multiples of this many steps are never deleted; 0: none
    seed: Seed = 1234


PRESETS = {
    "demo": TrainConfig(
        models_dir=Path("models/mini"),
        held_out=0.25,
        references="random",
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
        val_every=800,
        save_every=200,
    ),
    # Faces first, frame by frame.
    "stage1": TrainConfig(
        batch_size=32,
        loss_weights=weights(latent_l1=1.0, pixel_l1=1.0, lpips=0.1),
    ),
    # Then sync and sharpness, from windows of frames.
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
    # The recipe of the original MuseTalkTrainer, to compare with on the same cache.
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
    """Train until `num_steps`, going on from the newest state in the preset's folder."""
    # Check what costs nothing first: constants, then data, then networks.
    check_config(config)
    accelerator = start_processes(config.device)
    cache = Cache(config.hdtf_samples_dir)
    contract = training_contract(config.contract, cache, config.positional_encoding)
    train_clips, held_clips, note = split_clips(cache, config.held_out, config.seed)
    draw = partial(open_dataset, config, cache, train_clips, contract, world_size=accelerator.num_processes)
    draw(sync_offset=0)
    held_clips = held_clips or train_clips
    shown = FaceDataset(cache, held_clips, contract, seed=config.seed, slots=GRID_ROWS)
    vae = load_pixel_vae(config.models_dir, accelerator)
    cache.contract.require(replace(cache.contract, vae=vae.fingerprint), ("vae",), str(cache.folder))
    state = build_state(config, contract, accelerator)
    features = next(iter(cache.clips.values())).tensor("audio_features", 0, 1)  # (1, S, D)
    state.unet.check_features(features.shape[1:], f"the cache in {cache.folder}")
    objective, expert = build_objective(config, state, vae, accelerator)
    pipeline = LipSyncPipeline(state.unet, vae, contract, config.models_dir)
    validator = None
    if config.val_every:
        _ = pipeline.audio_encoder  # rather missed now than then
        judges = {"distance": objective.distance, "expert": expert}
        validator = Validator(pipeline, cache, held_clips, config.val_frames, **judges)
    examine = expert and partial(check_expert, expert, cache, held_clips, config.seed)
    size = sum(parameter.numel() for parameter in state.unet.parameters())
    about = f"UNet of {size:,} parameters; {len(train_clips)} clips to train on; {note}"
    if config.check:
        if accelerator.is_main_process:
            print(f"on {describe(accelerator.device)}\n{about}")
            check_start(preset, config, state, examine)
        return

    with open_run(preset, config, state, accelerator, state.ema) as run:
        run.log.line(about)

        # Begin with the weights of another training, and a look at the expert.
        if config.start_from and not run.resumed:
            run.log.line(state.begin(first_weights(config)))
        if examine and not run.resumed:
            found = examine()
            run.log.line(str(found))
            run.log.picture(0, found.draw(), "sync_check")
            state.sync_offset = found.require(config.unfit_expert)

        batches = run.batches(draw(sync_offset=state.sync_offset))
        for _ in run.steps():
            # Forward, backward and update: this step's samples and chances, whatever happened before.
            made = optimizer_step(state, objective, batches, config, accelerator)
            if not made.finite:
                terms, drawn = accelerator.reduce(made.terms, "mean"), gather_object(made.drawn)
                fault = nonfinite_error(terms, drawn, state.step + 1, run.folder)
                if config.on_nonfinite == "stop":
                    raise fault
                run.log.line(f"skipped: {fault}")
            state.step += 1
            if accelerator.is_main_process and state.step % config.ema_every == 0:
                state.update_ema(config.ema_decay)

            # Report.
            if run.due(config.log_every):
                values = accelerator.reduce(made.terms, "mean") | {"grad_norm": made.norm}
                values |= {f"pull{ending}": pull for ending, pull in state.adaptive_weights.items()}
                run.log.record(state.step, {k: v.item() for k, v in values.items()} | {"learning_rate": made.rate})

            # Sample, validate and save.
            if accelerator.is_main_process:
                if run.due(config.sample_every):
                    with state.averaged():
                        run.log.picture(state.step, draw_grid(pipeline, shown))
                if validator and run.due(config.val_every):
                    with state.averaged():
                        validator().report(state.step, run.log)
                if run.due(config.save_every):
                    run.keep(save_unet(run.folder, state.step, state.ema, contract))
        run.log.line(
            f"done at step {state.step}: weights and states in {run.folder}, pictures in {config.log_dir / preset}"
        )


def check_start(preset: str, config: TrainConfig, state: TrainState, examine: Callable[[], SyncCheck] | None) -> None:
    """Check the weights to begin with, where they are there already, and the sync expert; print what was found.

    examine: the check of the expert, None without one. The state is of no use afterwards. Raises WeightsError,
    ContractError, SyncError.
    """
    place = first_weights(config)
    if config.start_from in PRESETS and not any(place.glob("unet-*.safetensors")):
        print(f"{place} has no weights yet to start from")
    elif config.start_from:
        print(state.begin(place))
    if examine:
        found = examine()
        path = config.log_dir / preset / "sync_check.png"
        found.save(path)
        print(f"{found}\n{config.sync_expert}, on clips held out; drawn in {path}")
        found.require(config.unfit_expert)
    print(f"all is there that {preset} needs; run the same command without --check to train")


def first_weights(config: TrainConfig) -> Path:
    """Where the weights are that a training begins with: in another preset's folder, or wherever start_from says."""
    return config.checkpoint_dir / config.start_from if config.start_from in PRESETS else Path(config.start_from)


def check_config(config: TrainConfig) -> None:
    """Raises UserError for constants that cannot work."""
    check_constants(config)
    check_weight_decay(config.optimizer, config.weight_decay)
    heard = {name for name, weight in config.loss_weights.items() if weight > 0}
    if not heard:
        raise TrainError("loss_weights must have a term with a weight over 0")
    if config.pixel_every > 1 and "latent_l1" not in heard:
        raise TrainError("pixel_every must be 1 where latent_l1 has no weight, or steps between would have no loss")
    if config.adversarial_start and heard <= {f"{name}{ending}" for name in ADVERSARIAL for ending in DISC_CROPS}:
        raise TrainError("adversarial_start must be 0 where only discriminators have a weight")
    if config.adaptive_every and not heard & {"pixel_l1", "lpips"}:
        raise TrainError("adaptive_every must be 0 where neither pixel_l1 nor lpips has a weight to be as strong as")
    if config.compile and not shutil.which(os.environ.get("CXX", "g++")):
        raise TrainError(
            "compile must be False here: torch.compile needs a C++ compiler, g++ or the one that CXX names"
        )


def open_dataset(
    config: TrainConfig, cache: Cache, clips: list[str], contract: FeatureContract, *, world_size: int, sync_offset: int
) -> FaceDataset:
    """The samples to train on. ranks: processes. Raises TrainError where there are fewer than a step takes."""
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
    )
    if slots > (count := int(dataset.ends[-1])):
        raise TrainError(
            f"batch_size x grad_accum_steps x processes is {slots}, but {cache.folder} has {count} samples to train on"
        )
    return dataset


def build_state(config: TrainConfig, contract: FeatureContract, accelerator: Accelerator) -> TrainState:
    """An untrained UNet with its optimizer and average, and a discriminator for each view whose terms have a weight."""
    unet = build_unet(config.models_dir, config.seed, contract.positional_encoding)
    if config.gradient_checkpointing:
        unet.model.enable_gradient_checkpointing()
    if config.adaptive_every:
        unet.keep_last_input()
    if config.compile:
        # In bfloat16 on a CPU torch 2.13 loses the gradient at an upsampler where it may choose layouts.
        unet.model.compile(options={"layout_optimization": False} if accelerator.device.type == "cpu" else None)
    make = partial(OPTIMIZERS[config.optimizer], weight_decay=config.weight_decay)
    optimizer = make(unet.parameters(), config.learning_rate, config.betas)
    ema = {name: value.clone() for name, value in unet.model.state_dict().items()}
    unet = prepare_model(unet, accelerator)
    gan_losses = {}
    for ending in DISC_CROPS:
        if any(config.loss_weights.get(f"{name}{ending}") for name in ADVERSARIAL):
            torch.manual_seed(config.seed)
            network = PatchDiscriminator().to(accelerator.device)
            rate, betas = config.discriminator_learning_rate, config.discriminator_betas
            gan_losses[ending] = GANLoss(network, make(network.parameters(), rate, betas))
    told = [ending for ending in gan_losses if config.loss_weights.get(f"adv_g{ending}")]
    adaptive_weights = {ending: torch.zeros((), device=accelerator.device) for ending in told if config.adaptive_every}
    return TrainState(unet, contract, optimizer, config.optimizer, ema, gan_losses, adaptive_weights)


def build_objective(
    config: TrainConfig, state: TrainState, vae: VAE, accelerator: Accelerator
) -> tuple[Objective, SyncNet | None]:
    """The losses with the frozen networks that they need, and the sync expert if it is one of them."""
    heard = {name: weight for name, weight in config.loss_weights.items() if weight > 0}
    frozen = accelerator.device, frozen_dtype(accelerator)
    expert = load_syncnet(config.models_dir, config.sync_expert, *frozen) if "sync" in heard else None
    if expert and expert.frames != config.frames:
        raise TrainError(f"frames must be {expert.frames}, as {config.sync_expert} sees them, not {config.frames}")
    tiny = load_tiny_decoder(Path(config.tiny_decoder), vae) if config.tiny_decoder else None

    def decoder(turn: int) -> Decode:
        own = tiny is None or (config.full_decoder_every and turn % config.full_decoder_every == 0)
        return vae.decode if own else tiny.decode

    objective = Objective(
        heard,
        decoder,
        to_tensor,
        config.chunk_size,
        distance=load_lpips(config.models_dir, *frozen) if "lpips" in heard else None,
        embed=expert and expert.embed,
        gan_losses=state.gan_losses,
        views={ending: DISC_CROPS[ending] for ending in state.gan_losses},
        adaptive_weights=state.adaptive_weights,
    )
    return objective, expert


class StepResult(NamedTuple):
    """What an optimizer step came to."""

    terms: Terms  # means over its samples, on the device
    drawn: list[str]  # its samples
    norm: torch.Tensor  # of the UNet's gradient, on the device
    rate: float
    finite: bool  # whether an update was made


def optimizer_step(
    state: TrainState, objective: Objective, batches: Iterator[dict], config: TrainConfig, accelerator: Accelerator
) -> StepResult:
    """One update of all networks, unless a gradient is not finite: then of none."""
    terms, drawn, rate = {}, [], learning_rate(state.step, config)
    for part in range(config.grad_accum_steps):
        batch = next(batches)
        drawn += batch["where"]
        values = training_step(state, objective, batch, config, accelerator, measure=part == 0)
        for name, value in values.items():
            terms[name] = terms.get(name, 0) + value / config.grad_accum_steps
    playing = [one for ending, one in state.gan_losses.items() if f"adv_d{ending}" in terms]
    average_gradients(chain(state.unet.parameters(), *(one.network.parameters() for one in playing)))
    norm = accelerator.clip_grad_norm_(state.unet.parameters(), config.max_grad_norm)
    norms = [norm, *(one.clip(config.max_grad_norm) for one in playing)]
    finite = bool(torch.stack(norms).isfinite().all())  # the one thing read by the host
    if finite:
        state.optimizer.param_groups[0]["lr"] = rate
        state.optimizer.step()
        for one in playing:
            one.update()
    state.zero_grad()
    return StepResult(terms, drawn, norm, rate, finite)


def training_step(
    state: TrainState,
    objective: Objective,
    batch: dict,
    config: TrainConfig,
    accelerator: Accelerator,
    *,
    measure: bool,
) -> Terms:
    """Losses of one batch, their gradients added to the networks'. Returns the terms, detached, on the device.

    measure: look, where it is time to, how much adv_g must weigh.
    """
    data = {name: value.to(accelerator.device, non_blocking=True) for name, value in batch.items() if name != "where"}
    mel = data.pop("mel", None)
    data = {name: value.flatten(0, 1) for name, value in data.items()}  # (B, T, ...) -> (B T, ...)
    if mel is not None:
        data["mel"] = mel  # (B, M, 80)

    # The generator.
    dtype = state.unet.model.dtype
    unet_input = torch.cat([data["masked_latents"], data["reference_latents"]], dim=1).to(dtype)
    pred_latents = state.unet(unet_input, data["audio_window"].to(dtype))
    count, rest = divmod(state.step + 1, config.pixel_every)  # of steps with losses on images
    adversarial = bool(state.gan_losses) and state.step >= config.adversarial_start
    turn = count if rest == 0 and objective.sees_images(adversarial) else 0
    playing = turn > 0 and adversarial
    if playing and state.adaptive_weights and measure and count % config.adaptive_every == 0:
        objective.update_adaptive_weights(pred_latents, state.unet.last_layer_gradient, data, turn)
        broadcast(state.adaptive_weights)  # those that the first process has measured
    loss, terms, images = objective.generator(pred_latents, data, turn=turn, adversarial=adversarial)
    accelerator.backward(loss / config.grad_accum_steps)

    # The discriminators, against what was just made.
    return terms | objective.discriminators(images, data, 1 / config.grad_accum_steps) if playing else terms


parse = partial(parse_preset, presets=PRESETS, manual=__doc__)

if __name__ == "__main__":
    run_script(lambda arguments: train(*parse(arguments)), sys.argv[1:])
