"""Run by test_distributed.py as one of two processes: refused starts, one averaged step, a run stopped while it saves.

    torchrun --nproc-per-node 2 -m tests.ranks <folder>

Each process writes what it saw to <folder>/<rank>.json.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import Dataset

from musetalk.cli import run_script
from musetalk.errors import UserError
from musetalk.training import distributed
from musetalk.training.checkpoint import save_state
from musetalk.training.distributed import start_processes
from musetalk.training.run import Run, open_run
from musetalk.training.state import NetworkState
from musetalk.training.step import OptimizerStep

SAVE_SECONDS = 2.0


@dataclass
class Config:
    """The constants of a run."""

    checkpoint_dir: Path
    log_dir: Path
    batch_size: int = 2
    num_workers: int | None = 0
    prefetch: int = 2
    num_steps: int = 6
    save_every: int = 100
    save_minutes: float = 0
    keep_states: int = 2
    keep_weights: int = 1
    keep_weights_every: int = 0
    tracker: str = "tensorboard"
    seed: int = 0
    grad_accum_steps: int = 1
    max_grad_norm: float = 1e9
    on_nonfinite: str = "stop"
    learning_rate: float = 0.1
    warmup_steps: int = 0
    final_learning_rate: float = 0.1


class Numbers(Dataset):
    """Samples that hold their own index."""

    slots = 2  # of all processes together

    def __init__(self, listing: str = "") -> None:
        self.listing = lambda: listing

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> dict:
        return {"x": torch.full((3,), float(index)), "where": str(index)}


def make_state(seed: int = 0) -> NetworkState:
    """Builds a network of four parameters."""
    torch.manual_seed(seed)
    network = nn.Linear(3, 1)
    return NetworkState(network, torch.optim.Adam(network.parameters(), 0.1), {"kind": "linear"})


def train(run: Run) -> Iterator[int]:
    """Makes the remaining steps, each with random numbers, and yields the step before it is saved."""
    state, config = run.state, run.config
    batches = run.batches(Numbers())
    for _ in run.steps():
        step = OptimizerStep(state.step, config, state.optimizers)
        for batch in step.micro_batches(batches):
            loss = (state.network(batch["x"] + torch.rand(3)) ** 2).mean()
            loss.backward()
            step.add({"loss": loss.detach()})
        step.update()
        state.step += 1
        yield state.step
        stop = run.stop_requested()
        if stop or run.due(config.save_every) or run.overdue():
            run.save_state()
        if stop:
            break
    run.finish()


def refusal(config: Config, accelerator: Accelerator, *, seed: int, step: int, listing: str) -> str:
    """Resumes from a state that only this process has. Returns the error."""
    state = make_state(seed)
    save_state(config.checkpoint_dir / "unlike", step, state.as_dict(), keep=1)
    try:
        with open_run("unlike", config, state, accelerator) as run:
            run.batches(Numbers(listing))
    except UserError as error:
        return str(error)
    return "no error"


def averaged_step(config: Config, gradient: list[float]) -> tuple[list[float], float, str]:
    """Updates zeros by SGD with a gradient of this process. Returns them, the norm, and why no update was made."""
    parameter = nn.Parameter(torch.zeros(2))
    config = replace(config, on_nonfinite="skip", max_grad_norm=1.0, learning_rate=1.0)
    step = OptimizerStep(0, config, [torch.optim.SGD([parameter], 1.0)])
    for _ in step.micro_batches(iter([{"where": [f"sample {os.environ['RANK']}"]}])):
        parameter.backward(torch.tensor(gradient))
        step.add({"loss": torch.tensor(gradient[0])})
    result = step.update()
    return parameter.tolist(), result.grad_norm.item(), result.skipped


def save_slowly(save: Callable, *arguments: object) -> None:
    """Replaces `torch.save` in a process that a cluster and a launcher signal meanwhile."""
    for number in (signal.SIGTERM, signal.SIGINT) * 2:
        os.kill(os.getpid(), number)
    time.sleep(SAVE_SECONDS)
    save(*arguments)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.precision = lambda _: "no"
    rank = int(os.environ["RANK"])
    accelerator = start_processes("cpu")
    own = Config(folder / str(rank), folder / str(rank), batch_size=1)
    seen = {
        "other weights": refusal(own, accelerator, seed=rank, step=4, listing="abc"),
        "other step and cache": refusal(own, accelerator, seed=7, step=5 + rank, listing="xyz" if rank else "abc"),
        "step": averaged_step(own, [[2.0, 0.0], [4.0, 8.0]][rank]),
        "skipped": averaged_step(own, [[1.0, 1.0], [float("nan"), 1.0]][rank]),
    }

    torch.save = partial(save_slowly, torch.save)
    with open_run("tiny", Config(folder, folder, batch_size=1), make_state(), accelerator) as run:
        try:
            for step in train(run):
                if rank == 1 and step == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            seen["saved before exit"] = [path.name for path in run.folder.glob("training-state-*.pt")]
            (folder / f"{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    run_script(main, Path(sys.argv[1]))
