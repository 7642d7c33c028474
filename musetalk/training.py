"""What moves in a training and what moves it, for every trainer alike."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Protocol

import torch
from torch.utils.data import DataLoader

from musetalk.checkpoint import GO_BACK, load_latest_state
from musetalk.contract import ALL_FIELDS, FeatureContract
from musetalk.dataset import FaceDataset
from musetalk.models.unet import UNet
from musetalk.script import STOP_SIGNALS, UserError
from musetalk.weights import WeightsError, load_strictly

MAX_STEPS = 2**53
OPTIMIZERS = {"adamw": torch.optim.AdamW, "adamax": torch.optim.Adamax, "adam": torch.optim.Adam}


class TrainError(UserError):
    """Training cannot start or go on."""


class Schedule(Protocol):
    """The constants of a learning rate."""

    learning_rate: float
    warmup_steps: int
    final_learning_rate: float
    num_steps: int


@dataclass
class TrainState:
    """All that moves in training."""

    unet: UNet
    optimizer: torch.optim.Optimizer
    optimizer_name: str  # of `OPTIMIZERS`
    ema: dict[str, torch.Tensor]  # averaged weights under diffusers' names, in host memory
    step: int = 0  # optimizer updates made

    def as_dict(self) -> dict:
        """For the training state file."""
        return {
            "unet": self.unet.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "optimizer_name": self.optimizer_name,
            "ema": self.ema,
        }

    def restore(self, saved: dict, path: Path) -> None:
        """Go on from what `as_dict` gave, read from a file. Raises WeightsError where it is of something else."""
        if missing := (self.as_dict().keys() | {"step", "contract"}) - saved.keys():
            raise WeightsError(f"{path} is no training state, it lacks {', '.join(sorted(missing))}; {GO_BACK}")
        if saved["optimizer_name"] != self.optimizer_name:
            name = short(saved["optimizer_name"])
            raise WeightsError(f"{path} is of a training with the optimizer {name}, not {self.optimizer_name!r}")
        if not self._owns(saved["optimizer"]) or type(saved["step"]) is not int or not 0 <= saved["step"] < MAX_STEPS:
            raise WeightsError(f"{path} holds no state of this optimizer; {GO_BACK}")
        load_strictly(self.unet.model, saved["ema"], path)
        self.ema = {name: value.to("cpu", copy=True) for name, value in self.unet.model.state_dict().items()}
        load_strictly(self.unet.model, saved["unet"], path)
        groups = self.optimizer.state_dict()["param_groups"]  # the constants of this run
        self.optimizer.load_state_dict({"state": saved["optimizer"]["state"], "param_groups": groups})
        self.step = saved["step"]

    def _owns(self, saved: object) -> bool:
        """Whether it is a state of this optimizer: moments as large as its parameters."""
        parameters = self.optimizer.param_groups[0]["params"]
        moments = {"step", "exp_avg", "exp_inf" if self.optimizer_name == "adamax" else "exp_avg_sq"}
        try:
            return all(
                index in range(len(parameters))
                and values.keys() == moments
                and all(value.is_floating_point() for value in values.values())
                and all(values[name].shape == parameters[index].shape for name in moments - {"step"})
                and values["step"].shape == ()
                for index, values in saved["state"].items()
            )
        except (ValueError, LookupError, TypeError, AttributeError):
            return False

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


def resume(state: TrainState, run_dir: Path, contract: FeatureContract) -> None:
    """Go on from the newest state of a run, if there is one. Raises WeightsError, ContractError."""
    if found := load_latest_state(run_dir):
        path, saved = found
        state.restore(saved, path)
        learnt = FeatureContract.from_dict(saved["contract"], ALL_FIELDS, str(path))
        learnt.require(contract, ALL_FIELDS, str(run_dir))


def precision() -> str:
    """bf16 where the device computes in it, else full float32; accelerate's word for it."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return "bf16" if torch.cpu.get_capabilities().get("avx512_bf16") else "no"


def loader(dataset: FaceDataset, step: int, num_steps: int, batch_size: int, num_workers: int) -> DataLoader:
    """Batches from a step on, in the order of their slots."""
    items = range(step * dataset.slots, num_steps * dataset.slots)
    pin = torch.cuda.is_available()
    return DataLoader(
        dataset,
        batch_size,
        sampler=items,
        num_workers=num_workers,
        pin_memory=pin,
        worker_init_fn=ignore_stop_requests,
    )


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
