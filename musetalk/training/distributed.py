"""Processes of a training: launch, averaged gradients, and agreement through a group of their own on the CPU."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs
from torch import nn

from musetalk.devices import choose_device, supports_bf16
from musetalk.errors import TrainError, UserError
from musetalk.models.weights import Network

# Of every collective, also on GPUs: other processes wait while the main one validates or saves to a slow disk.
TIMEOUT = timedelta(hours=2)
BUCKET_BYTES = 100 * 2**20  # of gradients averaged at once


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


def start_processes(device: str, deterministic: bool = False) -> Accelerator:
    """Sets up device, precision and process group for `python`, `torchrun` or `accelerate launch`.

    device: "auto", "cpu" or "cuda", with one GPU for each process. deterministic: on a GPU, use kernels that give the
    same bits each time; torch warns of operators that have none. On a CPU all do. Raises DeviceError if the GPU cannot
    be used, TrainError for an unsupported kind of distributed training.
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
        torch.backends.cudnn.benchmark = not deterministic  # which chooses kernels by their speed
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS
            torch.use_deterministic_algorithms(True, warn_only=True)
            for enable in (torch.backends.cuda.enable_mem_efficient_sdp, torch.backends.cuda.enable_cudnn_sdp):
                enable(False)  # unlike FlashAttention, they have no deterministic backward pass
    return accelerator


def precision(device: torch.device) -> str:
    """Returns "bf16" if the device supports it, else "no" (float32), as accelerate names them."""
    return "bf16" if supports_bf16(device) else "no"


def prepare_model(network: Network, accelerator: Accelerator) -> Network:
    """Moves a network to its device with the training's autocast; `GradientAverage` replaces DDP."""
    return accelerator.prepare_model(network, evaluation_mode=True)


class GradientAverage:
    """Averages gradients over processes, in buckets, each as soon as its gradients are complete.

    average = GradientAverage(parameters)  # before the last backward pass of a step
    loss.backward()
    average.finish()

    The backward pass must add to each gradient at most once. It runs in the same order in all processes, so they send
    the buckets in the same order. In a single process nothing happens.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        distributed = torch.distributed.is_initialized()
        self.buckets = gradient_buckets(parameters) if distributed else []
        self._missing = [len(bucket) for bucket in self.buckets]  # gradients
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._count, index))
            for index, bucket in enumerate(self.buckets)
            for parameter in bucket
        ]
        self._sent: dict[int, tuple[torch.Tensor, torch.distributed.Work]] = {}  # by bucket: its gradients' sum

    def _count(self, index: int, _: torch.Tensor) -> None:
        """Sends a bucket as soon as its last gradient is complete."""
        self._missing[index] -= 1
        if not self._missing[index]:
            self._send(index)

    def _send(self, index: int) -> None:
        """Starts to sum the gradients of a bucket, if it has any: some networks are not due in each step."""
        gradients = gradients_of(self.buckets[index])
        if gradients:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            self._sent[index] = flat, torch.distributed.all_reduce(flat, async_op=True)

    def finish(self) -> None:
        """Waits until all gradients are averaged."""
        for hook in self._hooks:
            hook.remove()
        for index in range(len(self.buckets)):
            if index not in self._sent:
                self._send(index)
        for index, (flat, work) in self._sent.items():
            work.wait()
            flat /= torch.distributed.get_world_size()
            gradients = gradients_of(self.buckets[index])
            for gradient, values in zip(gradients, flat.split([x.numel() for x in gradients]), strict=True):
                gradient.copy_(values.view_as(gradient))


def gradients_of(parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
    """Returns the gradients of those parameters that have one."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def gradient_buckets(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Splits parameters into buckets of about `BUCKET_BYTES`, from the last to the first, as backward passes do."""
    buckets: list[list[nn.Parameter]] = []
    size = BUCKET_BYTES
    for parameter in reversed(list(parameters)):
        if size >= BUCKET_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += parameter.nbytes
    return buckets
