"""What moves in a training and what moves it, for every trainer alike."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from reprlib import repr as short
from typing import Protocol

import torch
from accelerate import Accelerator, DistributedType
from torch import nn
from torch.utils.data import DataLoader, Dataset

from musetalk.cache import Cache
from musetalk.checkpoint import GO_BACK, find_unet, load_latest_state, read_unet_contract
from musetalk.contract import ALL_FIELDS, CACHE_FIELDS, CONTRACTS, MODEL_FIELDS, OWN_CONSTANTS, FeatureContract
from musetalk.models.unet import UNet
from musetalk.models.vae import VAE, knows_bfloat16, load_vae
from musetalk.script import STOP_SIGNALS, UserError
from musetalk.sync_check import MAX_OFFSET
from musetalk.weights import WeightsError, load_strictly, read_tensors, unwrap

MAX_STEPS = 2**53
OPTIMIZERS = {  # such that none of them makes a copy as large as the weights
    "adamw": partial(torch.optim.AdamW, fused=True),
    "adamax": partial(torch.optim.Adamax, foreach=False),
    "adam": partial(torch.optim.Adam, fused=True),
}


class TrainError(UserError):
    """Training cannot start or go on."""


class Schedule(Protocol):
    """The constants of a learning rate."""

    learning_rate: float
    warmup_steps: int
    final_learning_rate: float
    num_steps: int


class Opponent(Protocol):
    """A discriminator and the optimizer that moves it."""

    network: nn.Module
    optimizer: torch.optim.Optimizer


@dataclass
class TrainState:
    """All that moves in training."""

    unet: UNet
    optimizer: torch.optim.Optimizer
    optimizer_name: str  # of `OPTIMIZERS`, of the discriminators' too
    ema: dict[str, torch.Tensor]  # averaged weights under diffusers' names, in host memory
    adversaries: dict[str, Opponent] = field(default_factory=dict)  # by the ending of their terms' names
    pulls: dict[str, torch.Tensor] = field(default_factory=dict)  # how much the word of each counts
    sync_offset: int = 0  # frames that the mel of the sync expert is moved by, as its check measured
    step: int = 0  # optimizer updates made

    def as_dict(self) -> dict:
        """For the training state file."""
        return {
            "unet": self.unet.model.state_dict(),
            "optimizer": moments(self.optimizer),
            "optimizer_name": self.optimizer_name,
            "ema": self.ema,
            "adversaries": {
                ending: {"network": one.network.state_dict(), "optimizer": moments(one.optimizer)}
                for ending, one in self.adversaries.items()
            },
            "pulls": self.pulls,
            "sync_offset": self.sync_offset,
        }

    def restore(self, saved: dict, path: Path) -> None:
        """Go on from what `as_dict` gave, read from a file. Raises WeightsError where it is of something else."""
        if missing := (self.as_dict().keys() | {"step", "contract"}) - saved.keys():
            raise WeightsError(f"{path} is no training state, it lacks {', '.join(sorted(missing))}; {GO_BACK}")
        if saved["optimizer_name"] != self.optimizer_name:
            name = short(saved["optimizer_name"])
            raise WeightsError(f"{path} is of a training with the optimizer {name}, not {self.optimizer_name!r}")
        for name, least, most in (("step", 0, MAX_STEPS), ("sync_offset", -MAX_OFFSET, MAX_OFFSET)):
            if type(saved[name]) is not int or not least <= saved[name] <= most:
                raise WeightsError(f"{path} holds no {name} of a training; {GO_BACK}")
        self._check_adversaries(saved, path)
        check_moments(self.optimizer, saved["optimizer"], path)
        load_strictly(self.unet.model, saved["ema"], path)
        self.ema = {name: value.to("cpu", copy=True) for name, value in self.unet.model.state_dict().items()}
        load_strictly(self.unet.model, saved["unet"], path)
        restore_moments(self.optimizer, saved["optimizer"])
        for ending, one in self.adversaries.items():
            load_strictly(one.network, saved["adversaries"][ending]["network"], path)
            restore_moments(one.optimizer, saved["adversaries"][ending]["optimizer"])
        for ending, pull in self.pulls.items():
            pull.copy_(saved["pulls"][ending])
        self.step, self.sync_offset = saved["step"], saved["sync_offset"]

    def _check_adversaries(self, saved: dict, path: Path) -> None:
        """Raises WeightsError where other discriminators were saved than those there are."""
        found, pulls = saved["adversaries"], saved["pulls"]
        if not isinstance(found, dict) or found.keys() != self.adversaries.keys():
            raise WeightsError(
                f"{path} is of a training with other discriminators; set loss_weights as they were, or start another "
                "preset's folder from its weights with start_from"
            )
        for ending, one in self.adversaries.items():
            if not isinstance(found[ending], dict) or found[ending].keys() != {"network", "optimizer"}:
                raise WeightsError(f"{path} holds no discriminator; {GO_BACK}")
            check_moments(one.optimizer, found[ending]["optimizer"], path)
        if not isinstance(pulls, dict) or pulls.keys() != self.pulls.keys():
            raise WeightsError(f"{path} is of a training with another adaptive_every; set it to 0 or not as it was")
        if not all(isinstance(pull, torch.Tensor) and pull.shape == () for pull in pulls.values()):
            raise WeightsError(f"{path} holds no weights of discriminators; {GO_BACK}")

    def begin(self, place: Path, contract: FeatureContract) -> str:
        """Take over weights to start from, of this project or another. Returns a sentence about them for the log.

        place: a file, or a folder whose newest is taken. Raises WeightsError; ContractError where they were trained
        under another contract than the one given.
        """
        path = find_unet(place)
        own = read_unet_contract(path)
        if own:
            own.require(contract, ALL_FIELDS, str(path))
        load_strictly(self.unet.model, unwrap(read_tensors(path), path), path)
        self.ema = {name: value.to("cpu", copy=True) for name, value in self.unet.model.state_dict().items()}
        return f"starts from {path}" + ("" if own else ", which carries no contract and is taken to be of this one")

    def zero_grad(self) -> None:
        """Forget the gradients of all networks."""
        for optimizer in (self.optimizer, *(one.optimizer for one in self.adversaries.values())):
            optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def update_ema(self, decay: float) -> None:
        """Move the average towards the weights; at first faster, so that the start is soon forgotten."""
        decay = min(decay, (1 + self.step) / (10 + self.step))
        for name, value in self.unet.model.state_dict().items():
            self.ema[name].lerp_(value.to("cpu"), 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the UNet has the averaged weights."""
        own = {name: value.to("cpu", copy=True) for name, value in self.unet.model.state_dict().items()}
        self.unet.model.load_state_dict(self.ema)
        yield
        self.unet.model.load_state_dict(own)


def moments(optimizer: torch.optim.Optimizer) -> dict:
    """What an optimizer has gathered, for a file; its constants are those of the run that goes on."""
    return {"state": optimizer.state_dict()["state"]}


def restore_moments(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Go on with moments that `check_moments` has let through."""
    groups = optimizer.state_dict()["param_groups"]  # the constants of this run
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})


def check_moments(optimizer: torch.optim.Optimizer, saved: object, path: Path) -> None:
    """Raises WeightsError where these are not moments as large as the optimizer's parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    wanted = {"step", "exp_avg", "exp_inf" if isinstance(optimizer, torch.optim.Adamax) else "exp_avg_sq"}
    try:
        fits = all(
            index in range(len(parameters))
            and values.keys() == wanted
            and all(value.is_floating_point() for value in values.values())
            and all(values[name].shape == parameters[index].shape for name in wanted - {"step"})
            and values["step"].shape == ()
            for index, values in saved["state"].items()
        )
    except (ValueError, LookupError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise WeightsError(f"{path} holds no state of this optimizer; {GO_BACK}")


def resume(state: TrainState, run_dir: Path, contract: FeatureContract) -> bool:
    """Go on from the newest state of a run, if there is one. Raises WeightsError, ContractError."""
    found = load_latest_state(run_dir)
    if found:
        path, saved = found
        state.restore(saved, path)
        learnt = FeatureContract.from_dict(saved["contract"], ALL_FIELDS, str(path))
        learnt.require(contract, ALL_FIELDS, str(run_dir))
    return bool(found)


def precision() -> str:
    """bf16 where the device computes in it, else full float32; accelerate's word for it."""
    return "bf16" if knows_bfloat16("cuda" if torch.cuda.is_available() else "cpu") else "no"


def frozen_dtype(accelerator: Accelerator) -> torch.dtype:
    """The precision of networks that are only looked through."""
    return torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32


def load_pixel_vae(models_dir: Path, accelerator: Accelerator) -> VAE:
    """The frozen VAE in the precision and layout in which the losses on images are fastest. Raises WeightsError."""
    layout = torch.contiguous_format if accelerator.device.type == "cpu" else torch.channels_last
    return load_vae(models_dir, accelerator.device, frozen_dtype(accelerator), layout)


@dataclass(frozen=True)
class SlotSampler:
    """The items of a dataset that one of several processes reads, batch by batch: its slots of each part of each step.

    A part of a step is one batch of every process, so the parts hold the same slots on any number of processes whose
    batches are together as large.
    """

    slots: int  # samples in one optimizer step, over parts and processes
    steps: range
    batch_size: int  # of one process
    rank: int = 0
    ranks: int = 1

    def __iter__(self) -> Iterator[int]:
        for step in self.steps:
            for begin in range(self.rank * self.batch_size, self.slots, self.ranks * self.batch_size):
                yield from range(step * self.slots + begin, step * self.slots + begin + self.batch_size)


def loader(
    dataset: Dataset,
    steps: range,
    batch_size: int,
    num_workers: int,
    prefetch: int = 2,
    *,
    rank: int = 0,
    ranks: int = 1,
) -> DataLoader:
    """Batches of some steps for one of several processes, in the order of their slots. dataset: has `slots`."""
    return DataLoader(
        dataset,
        batch_size,
        sampler=SlotSampler(dataset.slots, steps, batch_size, rank, ranks),
        num_workers=num_workers,
        prefetch_factor=prefetch if num_workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=ignore_stop_requests,
    )


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give every process the mean of all processes' gradients; nothing where there is one process."""
    if not torch.distributed.is_initialized():
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for work in [torch.distributed.all_reduce(gradient, async_op=True) for gradient in gradients]:
        work.wait()
    for gradient in gradients:
        gradient /= torch.distributed.get_world_size()


def of_any_process(flag: bool, accelerator: Accelerator) -> bool:
    """Whether the flag is set in any process. All must ask."""
    if accelerator.num_processes == 1:
        return flag
    return accelerator.reduce(torch.tensor(float(flag), device=accelerator.device)).item() > 0


def start_processes() -> Accelerator:
    """Devices, precision and processes, as `python`, `torchrun` or `accelerate launch` started this one.

    Raises TrainError for ways to share a training that are not supported.
    """
    accelerator = Accelerator(mixed_precision=precision(), cpu=not torch.cuda.is_available())
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise TrainError(
            f"{accelerator.distributed_type.value} is not supported: start it with python, torchrun or accelerate "
            "launch, without DeepSpeed and FSDP, so that each process has all networks"
        )
    return accelerator


def ignore_stop_requests(_: int) -> None:
    """A worker goes on through what is sent to the whole group of processes: the step at hand needs it."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def learning_rate(step: int, config: Schedule) -> float:
    """The rate at an update: up in a line over the warm-up, then down along half a cosine."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.num_steps - config.warmup_steps)
    fall = (config.learning_rate - config.final_learning_rate) * (1 + math.cos(math.pi * min(1, progress))) / 2
    return config.final_learning_rate + fall


def check_weight_decay(optimizer: str, weight_decay: float) -> None:
    """Raises TrainError where an optimizer would take the decay for a part of the gradient, and scale it up with it."""
    if weight_decay and optimizer != "adamw":
        raise TrainError(
            f"weight_decay must be 0 with {optimizer}, which scales it up like a small gradient until it rules; "
            "adamw keeps the two apart"
        )


def training_contract(name: str, cache: Cache) -> FeatureContract:
    """The cache's own rules with the model fields of a name in CONTRACTS.

    Raises ContractError for a cache made under another contract: what is learnt would fit the rules of neither. Only
    what a user sets when preparing may be otherwise, and noise in the latents.
    """
    chosen = CONTRACTS[name]
    fixed = tuple(name for name in CACHE_FIELDS if name not in (*OWN_CONSTANTS, "posterior"))
    cache.contract.require(chosen, fixed, str(cache.folder))
    return replace(cache.contract, **{name: getattr(chosen, name) for name in MODEL_FIELDS})


def check_width(unet: UNet, cache: Cache, models_dir: Path) -> None:
    """Raises TrainError where the audio features of the cache do not fit the UNet's attention to them."""
    takes = unet.model.config.cross_attention_dim
    width = next(iter(cache.clips.values())).tensor("audio_features", 0, 1).shape[-1]
    if width != takes:
        raise TrainError(
            f"{models_dir / 'musetalk/musetalk.json'} has cross_attention_dim {takes}, but the audio features "
            f"in {cache.folder} are {width} wide; set it to {width}, or prepare with the Whisper that belongs to it"
        )


def not_finite(terms: dict[str, torch.Tensor], drawn: list[str], step: int, run_dir: Path) -> TrainError:
    """The error that names what was not finite, and where."""
    broken = [name for name, value in terms.items() if not torch.isfinite(value)] or ["none of the terms"]
    return TrainError(
        f"step {step}: the gradient is not finite (terms not finite: {', '.join(broken)}); no update was made. "
        f"Samples of this step: {'; '.join(drawn)}. The last good state is in {run_dir}"
    )
