"""Run lifecycle: launch, resume, checkpoint, stop.

Several processes train as one: each has all networks and a share of the samples, and gradients are averaged. The main
process writes all files.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from musetalk.cli import StopRequests, stop_requests
from musetalk.data.loader import Samples, loader
from musetalk.devices import describe
from musetalk.files import delete_older, folder_lock
from musetalk.training.checkpoint import host_copy, load_latest_state, save_state
from musetalk.training.distributed import Ranks
from musetalk.training.log import RunLog, SilentLog
from musetalk.training.preflight import check_disk, check_shared_memory, checksum, tensors_in, worker_count
from musetalk.training.protocols import RunConfig, State
from musetalk.training.step import StepResult


@dataclass
class Run:
    """An open run; `open_run` makes it."""

    config: RunConfig
    state: State
    accelerator: Accelerator
    folder: Path  # of training states and weights
    log: RunLog | SilentLog
    resumed: bool  # from a training state
    ranks: Ranks
    stopping: StopRequests  # of this process
    stack: ExitStack  # closed at the end of the run
    saved_at: float  # seconds of time.monotonic() at the last save or the start
    writer: ThreadPoolExecutor  # of one thread, which writes files while the training goes on
    writes: deque[Future] = field(default_factory=deque)  # that may not be complete
    ended: bool = False  # complete before its last step

    def batches(self, dataset: Samples) -> Iterator[dict]:
        """Returns this process's batches of all remaining steps; a resumed run draws the same ones.

        Raises UserError if shared memory is too small for the batches, or if processes differ in step, weights or
        cache.
        """
        state = self.state
        self.ranks.require_same(
            lambda: {
                "step": state.step,
                "weights": checksum(tensors_in(state.as_dict())),
                "cache": dataset.listing(),
            }
        )
        batches = open_batches(dataset, state.step, self.config, self.accelerator)
        self.stack.callback(batches.close)
        return batches

    def steps(self) -> Iterator[int]:
        """Yields the remaining steps until the run has `ended`, with a progress bar. Raises what a write raised."""
        first, last = self.state.step, self.config.num_steps
        tqdm_kwargs = {"desc": "train", "unit": "step", "disable": not self.accelerator.is_main_process}
        for step in tqdm(range(first, last), initial=first, total=last, **tqdm_kwargs):
            if self.ended:
                break
            yield step
            while self.writes and self.writes[0].done():
                self.writes.popleft().result()

    def save_state(self) -> None:
        """Copies the training state in the main process and writes the copy while the training goes on."""
        if self.accelerator.is_main_process:
            with self.stopping.patience():
                copy = host_copy(self.state.as_dict())
            self._write(save_state, self.folder, self.state.step, copy, self.config.keep_states)
            self.saved_at = time.monotonic()

    def save_weights(self, save: Callable[..., Path], weights: dict[str, torch.Tensor], metadata: object) -> None:
        """Copies weights in the main process, writes the copy while the training goes on, and deletes older weights.

        save: writes them, given the folder, the step, the weights and the metadata, and returns the path.
        """

        def _write(step: int, copy: dict[str, torch.Tensor]) -> None:
            path = save(self.folder, step, copy, metadata)
            delete_older(path, self.config.keep_weights, self.config.keep_weights_every)
            self.log.line(f"saved {path}")

        if self.accelerator.is_main_process:
            self._write(_write, self.state.step, host_copy(weights))

    def _write(self, function: Callable[..., object], *arguments: object) -> None:
        """Calls a function in the writer's thread, after the earlier writes, of which it leaves at most one pending."""
        self._finish_writes(pending=1)
        self.writes.append(self.writer.submit(function, *arguments))

    def _finish_writes(self, pending: int = 0) -> None:
        """Waits until at most so many writes are pending; signals do not interrupt it. Raises what a write raised."""
        with self.stopping.patience():
            while len(self.writes) > pending:
                self.writes.popleft().result()

    def figures(self, result: StepResult) -> dict[str, float]:
        """Losses of a step as means over processes, gradient norm and learning rate. All processes must call it."""
        values = self.accelerator.reduce(result.terms, "mean") | {"grad_norm": result.grad_norm}
        return {name: value.item() for name, value in values.items()} | {"learning_rate": result.learning_rate}

    def stop_requested(self) -> bool:
        """Whether any process was asked to stop. All processes must call it."""
        return self.ranks.any(self.stopping())

    def finish(self) -> None:
        """Waits until all is written. Raises KeyboardInterrupt if the run was stopped before its last step."""
        self._finish_writes()
        self.ranks.wait()  # when one process exits, a launcher kills the others
        self.accelerator.end_training()
        if self.state.step < self.config.num_steps and not self.ended:
            raise KeyboardInterrupt(
                f"stopped at step {self.state.step}, all saved; run the same command again to resume"
            )

    def due(self, every: int) -> bool:
        """Whether the last update completed a multiple of `every` steps or the whole run."""
        return self.state.step == self.config.num_steps or self.state.step % every == 0

    def overdue(self) -> bool:
        """Whether `save_minutes` have passed since the last save."""
        minutes = self.config.save_minutes
        return minutes > 0 and time.monotonic() - self.saved_at >= 60 * minutes


@contextmanager
def open_run(
    name: str,
    config: RunConfig,
    state: State,
    accelerator: Accelerator,
    weights: dict[str, torch.Tensor] | None = None,
    weights_every: int = 0,
) -> Iterator[Run]:
    """Opens a run and resumes it from its newest training state, if there is one.

    Inside the context Ctrl-C and SIGTERM ask the run to stop after the current step. weights: those to be saved during
    training, and weights_every: least steps between their saves, see `missing_bytes`. Raises UserError if another
    process uses its folders or the disk has too little space; WeightsError or ContractError if the state belongs to
    another training.
    """
    folder, log_dir = config.checkpoint_dir / name, config.log_dir / name
    with ExitStack() as stack:
        if accelerator.is_main_process:
            stack.enter_context(folder_lock(folder))
            stack.enter_context(folder_lock(log_dir))
        accelerator.wait_for_everyone()
        resumed = resume(state, folder, check_sums=accelerator.is_main_process)
        if accelerator.is_main_process:
            check_disk(folder, config, state, weights, weights_every)
        ranks = Ranks()
        main = accelerator.is_main_process
        log = RunLog(config.log_dir, name, state.step, config.tracker) if main else SilentLog()
        stack.callback(log.close)
        log.line(f"{name}: {json.dumps(vars(config), default=str)}")
        devices = f"{accelerator.num_processes} x ({describe(accelerator.device)}), {accelerator.mixed_precision}"
        log.line(f"on {devices}; at step {state.step}")
        # Until here there is nothing to save, and a signal ends the process.
        stopping = stack.enter_context(stop_requests(patient=accelerator.num_processes > 1))
        writer = stack.enter_context(ThreadPoolExecutor(1))
        yield Run(config, state, accelerator, folder, log, resumed, ranks, stopping, stack, time.monotonic(), writer)


def open_batches(
    dataset: Samples, first_step: int, config: RunConfig, accelerator: Accelerator
) -> Generator[dict, None, None]:
    """Returns this process's batches from a step on. Raises UserError if shared memory is too small for them."""
    workers = worker_count(config)
    check_shared_memory(dataset[first_step * dataset.slots], config.batch_size, workers, config.prefetch)
    share = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    share["pin_memory"] = accelerator.device.type == "cuda"
    steps = range(first_step, config.num_steps)
    return closable(iter(loader(dataset, steps, config.batch_size, workers, config.prefetch, **share)))


def closable(batches: Iterator[dict]) -> Generator[dict, None, None]:
    """Yields batches. Closing it drops the only reference to a DataLoader's iterator, which ends its workers.

    Otherwise they could outlive the run: workers ignore SIGTERM, and Python waits for them when it exits.
    """
    yield from batches


def resume(state: State, folder: Path, *, check_sums: bool = True) -> bool:
    """Restores the newest training state of a folder. Returns whether there was one.

    check_sums: read the whole file to verify it, which one process of several does. Raises WeightsError, ContractError.
    """
    latest = load_latest_state(folder, check_sums=check_sums)
    if latest is None:
        return False
    path, saved = latest
    state.restore(saved, path)
    return True
