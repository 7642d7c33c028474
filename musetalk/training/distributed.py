"""Processes of a training: launch, averaged gradients, and agreement through a group of their own on the CPU."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs
from torch import nn

from musetalk.devices import choose_device, supports_bf16
from musetalk.errors import TrainError, UserError
from musetalk.models.weights import Network

# Of every collective, also on GPUs: other processes wait while the main one validates or saves to a slow disk.
TIMEOUT = timedelta(hours=2)


class Ranks:
    """All processes of a training, or a single one. Every process must make each call."""

    def __init__(self) -> None:
        distributed = torch.distributed.is_initialized()
        self.group = torch.distributed.new_group(backend="gloo", timeout=TIMEOUT) if distributed else None

    def any(self, flag: bool) -> bool:
        """Returns whether the flag is set in any process."""
        if self.group is None:
            return flag
        flags = torch.tensor(int(flag))
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, self.group)
        return bool(flags)

    def wait(self) -> None:
        """Waits until all processes call it."""
        if self.group is not None:
            torch.distributed.barrier(self.group)

    def require_same(self, describe: Callable[[], dict[str, object]]) -> None:
        """Raises UserError in all processes if `describe` returns different values in some of them."""
        if self.group is None:
            return
        descriptions: list[Any] = [None] * torch.distributed.get_world_size()  # (host, values) by rank
        torch.distributed.all_gather_object(descriptions, (socket.gethostname(), describe()), self.group)
        faults = []
        for name in descriptions[0][1]:
            owners: dict[object, list[str]] = {}  # by value
            for rank, (host, values) in enumerate(descriptions):
                owners.setdefault(values[name], []).append(f"{rank} on {host}")
            if len(owners) > 1:
                faults.append(f"{name} " + ", ".join(f"{value} (rank {', '.join(at)})" for value, at in owners.items()))
        if faults:
            raise UserError(
                f"the processes cannot train as one, since they differ in {'; '.join(faults)}; give all nodes the same "
                "cache, models_dir and checkpoint_dir, in a folder that they share or as copies"
            )


def start_processes(device: str) -> Accelerator:
    """Sets up device, precision and process group for `python`, `torchrun` or `accelerate launch`.

    device: "auto", "cpu" or "cuda", with one GPU for each process. Raises DeviceError if the GPU cannot be used,
    TrainError for an unsupported kind of distributed training.
    """
    chosen, groups = choose_device(device), InitProcessGroupKwargs(timeout=TIMEOUT)
    accelerator = Accelerator(mixed_precision=precision(chosen), cpu=chosen.type == "cpu", kwargs_handlers=[groups])
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise TrainError(
            f"{accelerator.distributed_type.value} is not supported: start it with python, torchrun or accelerate "
            "launch, without DeepSpeed and FSDP, so that each process has all networks"
        )
    if chosen.type == "cuda":
        # Faster and less exact: acceptable in training, not in preparing or inference.
        torch.set_float32_matmul_precision("high")  # TF32
        torch.backends.cudnn.benchmark = True
    return accelerator


def precision(device: torch.device) -> str:
    """Returns "bf16" if the device supports it, else "no" (float32), as accelerate names them."""
    return "bf16" if supports_bf16(device) else "no"


def prepare_model(network: Network, accelerator: Accelerator) -> Network:
    """Moves a network to its device with the training's autocast; `average_gradients` replaces DDP."""
    return accelerator.prepare_model(network, evaluation_mode=True)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Averages gradients over processes; does nothing in a single one."""
    if not torch.distributed.is_initialized():
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for work in [torch.distributed.all_reduce(gradient, async_op=True) for gradient in gradients]:
        work.wait()
    for gradient in gradients:
        gradient /= torch.distributed.get_world_size()
