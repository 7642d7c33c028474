"""What moves in a training and what moves it: networks, optimizers with their moments, the average, the rate."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from reprlib import repr as short
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import nn

from musetalk.contract import ALL_FIELDS, CACHE_FIELDS, CONTRACTS, MODEL_FIELDS, OWN_CONSTANTS, FeatureContract
from musetalk.data.cache import Cache
from musetalk.errors import TrainError
from musetalk.models.trained_unet import find_unet, read_unet_contract
from musetalk.models.unet import UNet
from musetalk.models.vae import VAE, load_vae
from musetalk.models.weights import WeightsError, load_strictly, read_tensors, unwrap
from musetalk.training.checkpoint import GO_BACK
from musetalk.training.sync_check import MAX_OFFSET

MAX_STEPS = 2**53
OPTIMIZERS = {  # such that none of them makes a copy as large as the weights
    "adamw": partial(torch.optim.AdamW, fused=True),
    "adamax": partial(torch.optim.Adamax, foreach=False),
    "adam": partial(torch.optim.Adam, fused=True),
}


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
class NetworkState:
    """All that moves in the training of one network alone."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    fixed: dict[str, str | int]  # what must be as it was to go on, under names other than those here
    step: int = 0  # optimizer updates made

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.optimizer]

    def as_dict(self) -> dict:
        """For the training state file."""
        return {"network": self.network.state_dict(), "optimizer": moments(self.optimizer)} | self.fixed

    def restore(self, saved: dict, path: Path) -> None:
        """Go on from what `as_dict` gave, read from a file. Raises WeightsError where it is of something else."""
        if missing := (self.as_dict().keys() | {"step"}) - saved.keys():
            raise WeightsError(
                f"{path} is no state of a training of one network, it lacks {', '.join(sorted(missing))}; {GO_BACK}"
            )
        for name, value in self.fixed.items():
            if saved[name] != value:
                what = f"{name} {short(saved[name])}, not {value!r}"
                raise WeightsError(f"{path} is of a training with the {what}; set it so, or another checkpoint_dir")
        check_number(saved, "step", 0, MAX_STEPS, path)
        check_optimizer_state(self.optimizer, saved["optimizer"], path)
        load_strictly(self.network, saved["network"], path)
        restore_optimizer_state(self.optimizer, saved["optimizer"])
        self.step = saved["step"]


@dataclass
class TrainState:
    """All that moves in the training of a UNet."""

    unet: UNet
    contract: FeatureContract  # that it learns under
    optimizer: torch.optim.Optimizer
    optimizer_name: str  # of `OPTIMIZERS`, of the discriminators' too
    ema: dict[str, torch.Tensor]  # averaged weights under diffusers' names, in host memory
    gan_losses: dict[str, Opponent] = field(default_factory=dict)  # by the ending of their terms' names
    adaptive_weights: dict[str, torch.Tensor] = field(default_factory=dict)  # how much the word of each counts
    sync_offset: int = 0  # frames that the mel of the sync expert is moved by, as its check measured
    step: int = 0  # optimizer updates made

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.optimizer, *(one.optimizer for one in self.gan_losses.values())]

    def as_dict(self) -> dict:
        """For the training state file."""
        return {
            "unet": self.unet.model.state_dict(),
            "optimizer": moments(self.optimizer),
            "optimizer_name": self.optimizer_name,
            "ema": self.ema,
            "gan_losses": {
                ending: {"network": one.network.state_dict(), "optimizer": moments(one.optimizer)}
                for ending, one in self.gan_losses.items()
            },
            "adaptive_weights": self.adaptive_weights,
            "sync_offset": self.sync_offset,
            "contract": self.contract.as_dict(ALL_FIELDS),
        }

    def restore(self, saved: dict, path: Path) -> None:
        """Go on from what `as_dict` gave, read from a file.

        Raises WeightsError where it is of something else, ContractError where of another contract.
        """
        if missing := (self.as_dict().keys() | {"step"}) - saved.keys():
            raise WeightsError(f"{path} is no training state, it lacks {', '.join(sorted(missing))}; {GO_BACK}")
        FeatureContract.from_dict(saved["contract"], ALL_FIELDS, str(path)).require(
            self.contract, ALL_FIELDS, str(path.parent)
        )
        if saved["optimizer_name"] != self.optimizer_name:
            name = short(saved["optimizer_name"])
            raise WeightsError(f"{path} is of a training with the optimizer {name}, not {self.optimizer_name!r}")
        check_number(saved, "step", 0, MAX_STEPS, path)
        check_number(saved, "sync_offset", -MAX_OFFSET, MAX_OFFSET, path)
        self._check_adversaries(saved, path)
        check_optimizer_state(self.optimizer, saved["optimizer"], path)
        load_strictly(self.unet.model, saved["ema"], path)
        self.ema = {name: value.to("cpu", copy=True) for name, value in self.unet.model.state_dict().items()}
        load_strictly(self.unet.model, saved["unet"], path)
        restore_optimizer_state(self.optimizer, saved["optimizer"])
        for ending, one in self.gan_losses.items():
            load_strictly(one.network, saved["gan_losses"][ending]["network"], path)
            restore_optimizer_state(one.optimizer, saved["gan_losses"][ending]["optimizer"])
        for ending, pull in self.adaptive_weights.items():
            pull.copy_(saved["adaptive_weights"][ending])
        self.step, self.sync_offset = saved["step"], saved["sync_offset"]

    def _check_adversaries(self, saved: dict, path: Path) -> None:
        """Raises WeightsError where other discriminators were saved than those there are."""
        found, adaptive_weights = saved["gan_losses"], saved["adaptive_weights"]
        if not isinstance(found, dict) or found.keys() != self.gan_losses.keys():
            raise WeightsError(
                f"{path} is of a training with other discriminators; set loss_weights as they were, or start another "
                "preset's folder from its weights with start_from"
            )
        for ending, one in self.gan_losses.items():
            if not isinstance(found[ending], dict) or found[ending].keys() != {"network", "optimizer"}:
                raise WeightsError(f"{path} holds no discriminator; {GO_BACK}")
            check_optimizer_state(one.optimizer, found[ending]["optimizer"], path)
        if not isinstance(adaptive_weights, dict) or adaptive_weights.keys() != self.adaptive_weights.keys():
            raise WeightsError(f"{path} is of a training with another adaptive_every; set it to 0 or not as it was")
        if not all(isinstance(pull, torch.Tensor) and pull.shape == () for pull in adaptive_weights.values()):
            raise WeightsError(f"{path} holds no weights of discriminators; {GO_BACK}")

    def begin(self, place: Path) -> str:
        """Take over weights to start from, of this project or another. Returns a sentence about them for the log.

        place: a file, or a folder whose newest is taken. Raises WeightsError; ContractError where they were trained
        under another contract.
        """
        path = find_unet(place)
        own = read_unet_contract(path)
        if own:
            own.require(self.contract, ALL_FIELDS, str(path))
        load_strictly(self.unet.model, unwrap(read_tensors(path), path), path)
        self.ema = {name: value.to("cpu", copy=True) for name, value in self.unet.model.state_dict().items()}
        return f"starts from {path}" + ("" if own else ", which carries no contract and is taken to be of this one")

    def zero_grad(self) -> None:
        """Forget the gradients of all networks."""
        for optimizer in self.optimizers:
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


def check_number(saved: dict, name: str, least: int, most: int, path: Path) -> None:
    """Raises WeightsError where what was saved under a name is no whole number from the least to the most."""
    if type(saved[name]) is not int or not least <= saved[name] <= most:
        raise WeightsError(f"{path} holds no {name} of a training; {GO_BACK}")


def moments(optimizer: torch.optim.Optimizer) -> dict:
    """What an optimizer has gathered, for a file; its constants are those of the run that goes on."""
    return {"state": optimizer.state_dict()["state"]}


def restore_optimizer_state(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Go on with moments that `check_optimizer_state` has let through."""
    groups = optimizer.state_dict()["param_groups"]  # the constants of this run
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
    for values in optimizer.state.values():  # what torch has not copied would keep the file open
        values.update({name: value.clone() for name, value in values.items() if value.device.type == "cpu"})


def check_optimizer_state(optimizer: torch.optim.Optimizer, saved: object, path: Path) -> None:
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


def frozen_dtype(accelerator: Accelerator) -> torch.dtype:
    """The precision of networks that are only looked through."""
    return torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32


def load_pixel_vae(models_dir: Path, accelerator: Accelerator) -> VAE:
    """The frozen VAE in the precision and layout in which the losses on images are fastest. Raises WeightsError."""
    layout = torch.contiguous_format if accelerator.device.type == "cpu" else torch.channels_last
    return load_vae(models_dir, accelerator.device, frozen_dtype(accelerator), layout)


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


def training_contract(name: str, cache: Cache, positional_encoding: bool) -> FeatureContract:
    """The cache's own rules with the model fields of a name in CONTRACTS, but for the positional encoding.

    Raises ContractError for a cache made under another contract: what is learnt would fit the rules of neither. Only
    what a user sets when preparing may be otherwise, and noise in the latents.
    """
    chosen = replace(CONTRACTS[name], positional_encoding=positional_encoding)
    fixed = tuple(name for name in CACHE_FIELDS if name not in (*OWN_CONSTANTS, "posterior"))
    cache.contract.require(chosen, fixed, str(cache.folder))
    return replace(cache.contract, **{name: getattr(chosen, name) for name in MODEL_FIELDS})


def nonfinite_error(terms: dict[str, torch.Tensor], drawn: list[str], step: int, run_dir: Path) -> TrainError:
    """The error that names what was not finite, and where."""
    broken = [name for name, value in terms.items() if not torch.isfinite(value)] or ["none of the terms"]
    return TrainError(
        f"step {step}: the gradient is not finite (terms not finite: {', '.join(broken)}); no update was made. "
        f"Samples of this step: {'; '.join(drawn)}. The last good state is in {run_dir}"
    )
