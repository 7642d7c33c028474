"""A run of a trainer: its processes, its folders and log, its batches and steps; gone on with, saved and stopped.

One process trains, or several of one machine or more as one: all networks are in each of them, samples are shared out,
gradients averaged. One of them writes.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from musetalk.checkpoint import delete_older, load_latest_state, save_state
from musetalk.devices import choose_device, describe, knows_bfloat16
from musetalk.distributed import TIMEOUT, Ranks
from musetalk.files import own_folder
from musetalk.preflight import check_disk, check_shared_memory, checksum, tensors_in, workers_that_fit
from musetalk.run_log import RunLog, SilentLog
from musetalk.script import STOP_SIGNALS, StopRequests, UserError, stop_requests


class TrainError(UserError):
    """Training cannot start or go on."""


class RunConfig(Protocol):
    """The constants of a run, whatever is trained: a dataclass."""

    checkpoint_dir: Path
    log_dir: Path
    batch_size: int
    num_workers: int | None  # None: as many as fit this node
    prefetch: int
    num_steps: int
    save_every: int
    save_minutes: float  # 0: saved by steps alone
    keep_states: int
    keep_weights: int  # these two only where weights are saved on the way
    keep_weights_every: int
    seed: int


class State(Protocol):
    """All that moves in a training."""

    step: int  # optimizer updates made
    optimizers: list[torch.optim.Optimizer]

    def as_dict(self) -> dict: ...

    def restore(self, saved: dict, path: Path) -> None: ...


@dataclass
class Run:
    """A run that is going on: `open_run` begins it."""

    config: RunConfig
    state: State
    accelerator: Accelerator
    folder: Path  # of its states and weights
    log: RunLog | SilentLog
    resumed: bool  # whether it goes on from a state
    ranks: Ranks
    stopping: StopRequests  # of this process
    stack: ExitStack  # of what ends with it
    saved_at: float  # seconds of time.monotonic() at the last save or the start

    def batches(self, dataset: Dataset) -> Iterator[dict]:
        """This process's batches of all steps that are left, the same whatever happened before.

        dataset: with `slots` and the `cache`. Raises UserError where shared memory is too small for them, or where
        processes differ in their step, weights or cache.
        """
        config, state = self.config, self.state
        workers = workers_that_fit() if config.num_workers is None else config.num_workers
        check_shared_memory(dataset[state.step * dataset.slots], config.batch_size, workers, config.prefetch)
        self.ranks.require_same(
            lambda: {
                "step": state.step,
                "weights": checksum(tensors_in(state.as_dict())),
                "cache": dataset.cache.listing(),
            }
        )
        share = {"rank": self.accelerator.process_index, "ranks": self.accelerator.num_processes}
        share["pin_memory"] = self.accelerator.device.type == "cuda"
        steps = range(state.step, config.num_steps)
        return iter(loader(dataset, steps, config.batch_size, workers, config.prefetch, **share))

    def steps(self) -> Iterator[None]:
        """A turn for each step that is left: the caller makes it and counts it in the state, which is saved when due.

        A step begins with the same random numbers whatever happened before. Raises KeyboardInterrupt, with all saved,
        where a process was asked to stop before the last.
        """
        config, state = self.config, self.state
        told = {"desc": "train", "unit": "step", "disable": not self.accelerator.is_main_process}
        bar = self.stack.enter_context(tqdm(total=config.num_steps, initial=state.step, **told))
        stop = False
        while state.step < config.num_steps and not stop:
            torch.manual_seed(config.seed + state.step)
            yield
            bar.update()
            stop = self.ranks.any(self.stopping())
            if self.accelerator.is_main_process and (stop or self.due(config.save_every) or self.overdue()):
                self.save()
        self.ranks.wait()  # for the save: when one process exits, a launcher kills the others
        self.accelerator.end_training()  # here the processes part
        if state.step < config.num_steps:
            raise KeyboardInterrupt(f"stopped at step {state.step}, all saved; run the same command again to go on")

    def save(self) -> None:
        """Writes the state, whatever signals come."""
        with self.stopping.patience():
            save_state(self.folder, self.state.step, self.state.as_dict(), self.config.keep_states)
        self.saved_at = time.monotonic()

    def keep(self, weights: Path) -> None:
        """Notes weights that were saved, and deletes older ones that are not kept."""
        delete_older(weights, self.config.keep_weights, self.config.keep_weights_every)
        self.log.line(f"saved {weights}")

    def due(self, every: int) -> bool:
        """Whether what is done every so many steps, and after the last, is to be done after this one."""
        return self.state.step == self.config.num_steps or self.state.step % every == 0

    def overdue(self) -> bool:
        """Whether the last save was `save_minutes` ago."""
        minutes = self.config.save_minutes
        return minutes > 0 and time.monotonic() - self.saved_at >= 60 * minutes


@contextmanager
def open_run(
    name: str,
    config: RunConfig,
    state: State,
    accelerator: Accelerator,
    weights: dict[str, torch.Tensor] | None = None,
) -> Iterator[Run]:
    """Opens a run, resumed from its newest state if there is one.

    Within it Ctrl-C and SIGTERM end the run after the current step. weights: those that are saved on the way, by
    `Run.keep`. Raises UserError where another process uses its folders or the disk has too little space; WeightsError,
    ContractError where the state is not of this training.
    """
    folder, log_dir = config.checkpoint_dir / name, config.log_dir / name
    with ExitStack() as stack:
        if accelerator.is_main_process:
            stack.enter_context(own_folder(folder))
            stack.enter_context(own_folder(log_dir))
        accelerator.wait_for_everyone()
        resumed = resume(state, folder, check_sums=accelerator.is_main_process)
        if accelerator.is_main_process:
            check_disk(folder, config, state, weights)
        ranks = Ranks()
        log = RunLog(config.log_dir, name, state.step) if accelerator.is_main_process else SilentLog()
        log.line(f"{name}: {json.dumps(asdict(config), default=str)}")
        where = f"{accelerator.num_processes} x ({describe(accelerator.device)}), {accelerator.mixed_precision}"
        log.line(f"on {where}; at step {state.step}")
        # Not before: until here there is nothing to save, so a signal may end the process.
        stopping = stack.enter_context(stop_requests(patient=accelerator.num_processes > 1))
        yield Run(config, state, accelerator, folder, log, resumed, ranks, stopping, stack, time.monotonic())


def resume(state: State, folder: Path, *, check_sums: bool = True) -> bool:
    """Resumes from the newest state in a folder, if there is one. Raises WeightsError, ContractError.

    check_sums: read the whole file to verify it, which one process of several does.
    """
    found = load_latest_state(folder, check_sums=check_sums)
    if found:
        path, saved = found
        state.restore(saved, path)
    return found is not None


# Processes.


def start_processes(device: str) -> Accelerator:
    """Devices, precision and processes, as `python`, `torchrun` or `accelerate launch` started this one.

    device: "auto", "cpu" or "cuda", for which each process takes a GPU of its own. Raises DeviceError where the GPU
    cannot be used, TrainError for ways to share a training that are not supported.
    """
    chosen, groups = choose_device(device), InitProcessGroupKwargs(timeout=TIMEOUT)
    accelerator = Accelerator(mixed_precision=precision(chosen), cpu=chosen.type == "cpu", kwargs_handlers=[groups])
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise TrainError(
            f"{accelerator.distributed_type.value} is not supported: start it with python, torchrun or accelerate "
            "launch, without DeepSpeed and FSDP, so that each process has all networks"
        )
    if chosen.type == "cuda":
        # Speed for the last bits, which training can spare; a cache and inference cannot.
        torch.set_float32_matmul_precision("high")  # TF32
        torch.backends.cudnn.benchmark = True
    return accelerator


def precision(device: torch.device) -> str:
    """bf16 where the device computes in it, else full float32; accelerate's word for it."""
    return "bf16" if knows_bfloat16(device) else "no"


def placed(network: nn.Module, accelerator: Accelerator) -> nn.Module:
    """A network on its device and in the training's precision; `average_gradients` makes processes learn as one."""
    return accelerator.prepare_model(network, evaluation_mode=True)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give every process the mean of all processes' gradients; nothing where there is one process."""
    if not torch.distributed.is_initialized():
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for work in [torch.distributed.all_reduce(gradient, async_op=True) for gradient in gradients]:
        work.wait()
    for gradient in gradients:
        gradient /= torch.distributed.get_world_size()


# Batches.


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
    pin_memory: bool = False,
) -> DataLoader:
    """Batches of some steps for one of several processes, in the order of their slots. dataset: has `slots`."""
    return DataLoader(
        dataset,
        batch_size,
        sampler=SlotSampler(dataset.slots, steps, batch_size, rank, ranks),
        num_workers=num_workers,
        prefetch_factor=prefetch if num_workers else None,
        pin_memory=pin_memory,
        worker_init_fn=ignore_stop_requests,
    )


def ignore_stop_requests(_: int) -> None:
    """A worker goes on through what is sent to the whole group of processes: the step at hand needs it."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
