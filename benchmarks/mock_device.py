"""Runs code on a mock device with fake tensors, to find its transfers and synchronisations without a GPU.

Mixing its tensors with those of the CPU is an error, as on a GPU. The mock device is "meta", because a CPU build of
torch has no GPU device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import PropertyMock, patch

import torch
import torch._functorch.config
from accelerate import Accelerator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.training import fake_tensors
from musetalk.training.state import OPTIMIZERS

MOCK = torch.device("meta")


@contextmanager
def mock_device() -> Iterator[None]:
    """Makes the mock device that of accelerate, and all new tensors fake, within the context."""
    plain = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}  # fused kernels need a real device
    with (
        patch.dict(OPTIMIZERS, plain),
        patch.object(Accelerator, "device", PropertyMock(return_value=MOCK)),
        torch._functorch.config.patch(fake_tensor_allow_meta=True),
        fake_tensors(),
    ):
        yield


class Transfers:
    """Transfers between the host and the mock device, as sentences."""

    def __init__(self) -> None:
        self.waiting: list[str] = []  # the host waits for them: reads, and copies without non_blocking
        self.queued: list[str] = []  # copies to the device with non_blocking


@contextmanager
def transfers() -> Iterator[Transfers]:
    """Records the transfers within the context."""
    records = Transfers()

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **kwargs or {})
            if func is torch.ops.aten._local_scalar_dense.default and args[0].device == MOCK:
                records.waiting.append("a number is read")
            if func is torch.ops.aten._to_copy.default and args[0].device != output.device:
                queued = (kwargs or {}).get("non_blocking")
                kind = records.queued if queued else records.waiting
                kind.append(f"{tuple(args[0].shape)} is copied from {args[0].device}")
            return output

    class Constants(TorchFunctionMode):  # copies by these functions are not dispatched
        def __torch_function__(self, func, types, args=(), kwargs=None):
            output = func(*args, **kwargs or {})
            if func in (torch.tensor, torch.Tensor.new_tensor) and output.device == MOCK:
                records.waiting.append(f"a constant is sent by {func.__name__}")
            return output

    with Operations(), Constants():
        yield records
