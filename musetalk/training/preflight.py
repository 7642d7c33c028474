"""Checks and choices before the first step: disk space, shared memory, the number of workers, the chunk size."""

from __future__ import annotations

import math
import os
import re
import shutil
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves

from musetalk.devices import cpu_cores
from musetalk.errors import UserError
from musetalk.training.checkpoint import STATE_NAME, WEIGHTS_NAME
from musetalk.training.protocols import RunConfig, State

MOST_WORKERS = 8  # of a process by default; a sample takes about a millisecond to read
SHARED_MEMORY = Path("/dev/shm")  # holds the batches of workers
GB = 10**9
# Bytes of a sample on a GPU at full size: activations of the UNet, without and with checkpointing, and of all networks
# on decoded images.
UNET_BYTES, CHECKPOINTED_BYTES, DECODE_BYTES = 0.25 * 2**30, 0.05 * 2**30, 0.9 * 2**30
RESERVE = 0.9  # share of the free memory to use: the rest is for the workspace of kernels and fragmentation


def tensors_in(value: object) -> list[torch.Tensor]:
    """Returns the tensors in nested dicts and lists."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def bytes_of(value: object) -> int:
    """Returns the size of the tensors in nested dicts and lists."""
    return sum(tensor.nbytes for tensor in tensors_in(value))


def state_bytes(state: State) -> int:
    """Returns the size of a training state with two moments for each parameter, even before the first update."""
    parameters = [(optimizer, x) for optimizer in state.optimizers for g in optimizer.param_groups for x in g["params"]]
    return bytes_of(state.as_dict()) + sum(2 * x.nbytes for optimizer, x in parameters if x not in optimizer.state)


def checksum(tensors: list[torch.Tensor]) -> str:
    """Returns a checksum of the tensors' bits and order in hexadecimal, computed on their devices."""
    whole_numbers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [tensor.detach().view(whole_numbers[tensor.itemsize]).sum(dtype=torch.int64) for tensor in tensors]
    return f"{sum(place * int(value) for place, value in enumerate(sums, 1)) % 2**64:016x}"


def missing_bytes(
    folder: Path, config: RunConfig, state: State, weights: dict[str, torch.Tensor] | None, weights_every: int = 0
) -> int:
    """Returns the bytes that a run adds to its folder for the states and weights to keep, and one more of each.

    An old file is deleted only after the new one is complete. Existing files count as room. weights: those saved during
    training, in one or more files, None without any. weights_every: least steps between their saves; 0: `save_every`.
    """

    def missing(pattern: str, size: int, most: int, remaining: int) -> int:
        found = {path: int(match[1]) for path in folder.glob("*") if (match := re.fullmatch(pattern, path.name))}
        steps = len(set(found.values()))
        return max(0, min(most, steps + remaining) * size - sum(path.stat().st_size for path in found))

    steps_left = config.num_steps - state.step
    needed = missing(STATE_NAME, state_bytes(state), config.keep_states + 1, steps_left)  # at most one a step
    if weights is not None:
        every = config.keep_weights_every
        most = config.keep_weights + 1 + (config.num_steps // every if every else 0)
        remaining = math.ceil(steps_left / (weights_every or config.save_every))
        needed += missing(WEIGHTS_NAME, bytes_of(weights), most, remaining)
    return needed


def check_disk(
    folder: Path, config: RunConfig, state: State, weights: dict[str, torch.Tensor] | None, weights_every: int = 0
) -> None:
    """Raises UserError if the disk has no room for `missing_bytes`."""
    needed = missing_bytes(folder, config, state, weights, weights_every)
    free = shutil.disk_usage(folder).free
    if needed > free:
        sizes, constants = f"training states of {state_bytes(state) / GB:.2f} GB", "keep_states"
        if weights is not None:
            sizes += f" and weights of {bytes_of(weights) / GB:.2f} GB"
            constants += ", keep_weights and keep_weights_every"
        raise UserError(
            f"{folder} needs another {needed / GB:.2f} GB of disk space for {sizes}, but {free / GB:.2f} GB are free; "
            f"free some, keep fewer of them ({constants}), or choose another checkpoint_dir"
        )


def local_processes() -> int:
    """Returns the number of this training's processes on this node, from torchrun or accelerate."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def workers_that_fit() -> int:
    """Returns how many workers each process of this node can start with one core for each."""
    return min(MOST_WORKERS, cpu_cores() // local_processes())


def worker_count(config: RunConfig) -> int:
    """Returns how many workers each process starts."""
    return workers_that_fit() if config.num_workers is None else config.num_workers


def check_shared_memory(sample: dict, batch_size: int, workers: int, prefetch: int) -> None:
    """Raises UserError if the prefetched batches of all workers do not fit into shared memory.

    When it is full, workers die with a bus error. sample: one sample of a batch.
    """
    if not workers or not SHARED_MEMORY.is_dir():
        return
    batches = (workers * prefetch + 1) * local_processes()  # plus the one in use
    needed, free = batches * batch_size * bytes_of(sample), shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise UserError(
            f"{SHARED_MEMORY} must hold {needed / 1e6:.0f} MB for the batches that {workers} workers of each of "
            f"{local_processes()} processes have ready, but has {free / 1e6:.0f} MB free; start Docker with --ipc=host "
            f"or --shm-size={math.ceil(2 * needed / GB)}g, or set num_workers or prefetch lower"
        )


def chunk_that_fits(device: torch.device, state: State, samples: int, *, checkpointing: bool) -> int:
    """Returns how many samples of a batch can be decoded at once in the free memory of a GPU; 1 on other devices.

    Gradients and the optimizers' moments are not allocated yet. An estimate for the full-size networks.
    """
    if device.type != "cuda":
        return 1
    free, _ = torch.cuda.mem_get_info(device)
    parameters = [x for optimizer in state.optimizers for group in optimizer.param_groups for x in group["params"]]
    used = 3 * bytes_of(parameters) + samples * (CHECKPOINTED_BYTES if checkpointing else UNET_BYTES)
    return max(1, int((RESERVE * free - used) / DECODE_BYTES))
