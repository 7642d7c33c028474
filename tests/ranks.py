"""Run by test_distributed.py as one of two processes: a training of next to nothing that is stopped while it saves.

    torchrun --nproc-per-node 2 -m tests.ranks <folder>

Each process first begins with a state of its own, which must be refused; what it says goes to <folder>/<rank>.txt.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import Dataset

from musetalk.cli import run_script
from musetalk.errors import UserError
from musetalk.training import checkpoint, distributed
from musetalk.training.checkpoint import save_state
from musetalk.training.distributed import TIMEOUT, average_gradients, start_processes
from musetalk.training.run import Run, open_run
from musetalk.training.state import NetworkState

SAVING = 2.0  # seconds


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
    seed: int = 0


class Numbers(Dataset):
    """Samples that are their own index."""

    slots = 2  # of all processes together

    def __init__(self, listing: str = "") -> None:
        self.cache = SimpleNamespace(listing=lambda: listing)

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": torch.full((3,), float(index))}


def make_state(seed: int = 0) -> NetworkState:
    """A network of four parameters."""
    torch.manual_seed(seed)
    network = nn.Linear(3, 1)
    return NetworkState(network, torch.optim.Adam(network.parameters(), 0.1), {"kind": "linear"})


def train(going: Run) -> Iterator[int]:
    """Makes the steps that are left, each with chances of its own, and gives their numbers."""
    batches = going.batches(Numbers())
    for _ in going.steps():
        state = going.state
        loss = (state.network(next(batches)["x"] + torch.rand(3)) ** 2).mean()
        state.optimizer.zero_grad()
        loss.backward()
        average_gradients(state.network.parameters())
        state.optimizer.step()
        state.step += 1
        yield state.step


def differing(config: Config, accelerator: Accelerator, *, seed: int, step: int, listing: str) -> str:
    """Goes on from a state of this process's own, and returns what is said against it."""
    state = make_state(seed)
    save_state(config.checkpoint_dir / "unlike", step, state.as_dict(), keep=1)
    try:
        with open_run("unlike", config, state, accelerator) as going:
            going.batches(Numbers(listing))
    except UserError as error:
        return str(error)
    return "nothing"


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.precision = lambda _: "no"
    rank = int(os.environ["RANK"])
    accelerator = start_processes("cpu")
    own = Config(folder / str(rank), folder / str(rank), batch_size=1)
    said = differing(own, accelerator, seed=rank, step=4, listing="abc")
    said += "\n" + differing(own, accelerator, seed=7, step=5 + rank, listing="xyz" if rank else "abc")

    def save_slowly(*arguments: object) -> None:
        for number in (signal.SIGTERM, signal.SIGINT) * 2:  # from the cluster, and once more from the launcher
            os.kill(os.getpid(), number)
        time.sleep(SAVING)
        torch.save(*arguments)

    checkpoint.torch = SimpleNamespace(save=save_slowly)
    with open_run("tiny", Config(folder, folder, batch_size=1), make_state(), accelerator) as going:
        groups = [torch.distributed.group.WORLD, going.ranks.group]
        waits = [group._get_backend(torch.device("cpu")).options._timeout for group in groups]
        try:
            for step in train(going):
                if rank == 1 and step == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:  # only now may a process leave
            saved = len(list(going.folder.glob("training-state-0000002.pt")))
            (folder / f"{rank}.txt").write_text(f"{said}\n{waits == [TIMEOUT] * 2}\n{saved}")


if __name__ == "__main__":
    run_script(main, Path(sys.argv[1]))
