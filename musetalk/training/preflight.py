"""What is checked before the first step: room on the disk and in shared memory for all that a training will put there,
and how many workers a node has cores for."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves

from musetalk.errors import UserError
from musetalk.files import saved_files
from musetalk.training.checkpoint import STATE_NAME, WEIGHTS_NAME
from musetalk.training.protocols import RunConfig, State

MOST_WORKERS = 8  # of a process that chooses by itself; a sample takes about a millisecond to read
SHARED_MEMORY = Path("/dev/shm")  # where workers put batches
GB = 10**9


def tensors_in(value: object) -> list[torch.Tensor]:
    """The tensors in nested dictionaries and lists."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def bytes_of(value: object) -> int:
    """The size of the tensors in nested dictionaries and lists."""
    return sum(tensor.nbytes for tensor in tensors_in(value))


def state_bytes(state: State) -> int:
    """The size of a training state with all moments, two for each parameter, also before the first update."""
    parameters = [(optimizer, x) for optimizer in state.optimizers for g in optimizer.param_groups for x in g["params"]]
    return bytes_of(state.as_dict()) + sum(2 * x.nbytes for optimizer, x in parameters if x not in optimizer.state)


def checksum(tensors: list[torch.Tensor]) -> str:
    """A sum over the bits of tensors in their order, taken on their devices, as hexadecimal digits."""
    whole_numbers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [tensor.detach().view(whole_numbers[tensor.itemsize]).sum(dtype=torch.int64) for tensor in tensors]
    return f"{sum(place * int(value) for place, value in enumerate(sums, 1)) % 2**64:016x}"


def check_disk(folder: Path, config: RunConfig, state: State, weights: dict[str, torch.Tensor] | None) -> None:
    """Raises UserError where a run's folder has no room for what will be in it at once; what is there already counts.

    That is the states and weights that are kept and another of each, since old ones are deleted when a new one is
    whole. weights: those that are saved on the way, None where there are none.
    """

    def missing(pattern: str, size: int, most: int, to_come: int) -> int:
        there = [path.stat().st_size for path in saved_files(folder, pattern).values()]
        return max(0, min(most, len(there) + to_come) * size - sum(there))

    left, state_size, fewer = config.num_steps - state.step, state_bytes(state), "keep_states"
    needed = missing(STATE_NAME, state_size, config.keep_states + 1, left)  # one a step at most, with saves by time
    sizes = f"training states of {state_size / GB:.2f} GB"
    if weights is not None:
        size, every = bytes_of(weights), config.keep_weights_every
        most = config.keep_weights + 1 + (config.num_steps // every if every else 0)
        needed += missing(WEIGHTS_NAME, size, most, math.ceil(left / config.save_every))
        sizes += f" and weights of {size / GB:.2f} GB"
        fewer += ", keep_weights and keep_weights_every"
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder} needs another {needed / GB:.2f} GB of disk space for {sizes}, but {free / GB:.2f} GB are free; "
            f"free some, keep fewer of them ({fewer}), or choose another checkpoint_dir"
        )


def local_processes() -> int:
    """Returns how many processes of the training are on this node, as torchrun and accelerate say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def workers_that_fit() -> int:
    """Returns how many workers a process may start so that all processes of this node have a core for each."""
    return min(MOST_WORKERS, len(os.sched_getaffinity(0)) // local_processes())


def check_shared_memory(sample: dict, batch_size: int, workers: int, prefetch: int) -> None:
    """Raises UserError where the batches that workers have ready would not fit into shared memory.

    Where that is full, the system ends a worker with a bus error. sample: one of a batch's.
    """
    if not workers or not SHARED_MEMORY.is_dir():
        return
    batches = (workers * prefetch + 1) * local_processes()  # and the one in use
    needed, free = batches * batch_size * bytes_of(sample), shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise UserError(
            f"{SHARED_MEMORY} must hold {needed / 1e6:.0f} MB for the batches that {workers} workers of each of "
            f"{local_processes()} processes have ready, but has {free / 1e6:.0f} MB free; start Docker with --ipc=host "
            f"or --shm-size={math.ceil(2 * needed / GB)}g, or set num_workers or prefetch lower"
        )
