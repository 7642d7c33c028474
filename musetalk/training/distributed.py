"""The processes of a training: started, their gradients averaged, and what they agree on apart from the GPUs' work."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from datetime import timedelta

import torch
from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs
from torch import nn

from musetalk.devices import choose_device, supports_bf16
from musetalk.errors import TrainError, UserError

# Of every collective, on GPUs too: the other processes wait in one while the first validates, or saves to a slow disk.
TIMEOUT = timedelta(hours=2)


class Ranks:
    """The processes of a training; a single one agrees with itself. All of them must make each call."""

    def __init__(self) -> None:
        many = torch.distributed.is_initialized()
        self.group = torch.distributed.new_group(backend="gloo", timeout=TIMEOUT) if many else None

    def any(self, flag: bool) -> bool:
        """Returns whether a flag is set in any process."""
        if self.group is None:
            return flag
        flags = torch.tensor(int(flag))
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, self.group)
        return bool(flags)

    def wait(self) -> None:
        """Waits until all processes are here."""
        if self.group is not None:
            torch.distributed.barrier(self.group)

    def require_same(self, describe: Callable[[], dict[str, object]]) -> None:
        """Raises UserError, in all processes, where they do not describe what they have by the same values."""
        if self.group is None:
            return
        found = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, (socket.gethostname(), describe()), self.group)
        faults = []
        for name in found[0][1]:
            owners: dict[object, list[str]] = {}  # by value
            for rank, (host, values) in enumerate(found):
                owners.setdefault(values[name], []).append(f"{rank} on {host}")
            if len(owners) > 1:
                faults.append(f"{name} " + ", ".join(f"{value} (rank {', '.join(at)})" for value, at in owners.items()))
        if faults:
            raise UserError(
                f"the processes cannot train as one, since they differ in {'; '.join(faults)}; give all nodes the same "
                "cache, models_dir and checkpoint_dir, in a folder that they share or as copies"
            )


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
    return "bf16" if supports_bf16(device) else "no"


def prepare_model(network: nn.Module, accelerator: Accelerator) -> nn.Module:
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
