"""A run of a trainer: its processes, its folders and log, its batches and steps; gone on with, saved and stopped.

One process trains, or several of one machine or more as one: all networks are in each of them, samples are shared out,
gradients averaged. One of them writes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import Dataset
from tqdm import tqdm

from musetalk.cli import StopRequests, stop_requests
from musetalk.data.loader import loader
from musetalk.devices import describe
from musetalk.files import delete_older, folder_lock
from musetalk.training.checkpoint import load_latest_state, save_state
from musetalk.training.distributed import Ranks
from musetalk.training.log import RunLog, SilentLog
from musetalk.training.preflight import check_disk, check_shared_memory, checksum, tensors_in, workers_that_fit
from musetalk.training.protocols import RunConfig, State


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
        share = {"rank": self.accelerator.process_index, "world_size": self.accelerator.num_processes}
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
            stack.enter_context(folder_lock(folder))
            stack.enter_context(folder_lock(log_dir))
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


# Batches.
