"""Memory of a computation, counted by live storages; also works for fake tensors."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from functools import cache
from pathlib import Path
from types import FrameType

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from benchmarks import ROOT

GIB = 2**30
HERE = Path(__file__).parent


class LiveStorages(TorchDispatchMode):
    """Counts the live storages of all tensors returned by operations within the context, each once.

    Excludes the workspace of kernels and the overhead of the allocator. To count fake tensors, enter their mode first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0  # bytes
        self.at_peak: Counter[str] = Counter()  # function and dtype -> bytes at the peak
        self._live: dict[int, tuple[int, str]] = {}  # address -> bytes, function and dtype
        self._recorded = True  # whether at_peak belongs to the current peak

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self._count(tensor)
        return result

    def restart(self) -> None:
        """Resets the peak."""
        self.peak, self._recorded = self.current, False

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address in self._live:
            return
        self._live[address] = size, f"{_creator()}, {str(tensor.dtype).removeprefix('torch.')}"
        weakref.finalize(storage, self._release, address)
        self.current += size
        if self.current > self.peak:
            self.peak, self._recorded = self.current, False

    def _release(self, address: int) -> None:
        if not self._recorded and self.current == self.peak:
            self._recorded, self.at_peak = True, Counter()
            for size, origin in self._live.values():
                self.at_peak[origin] += size
        self.current -= self._live.pop(address)[0]


def _creator() -> str:
    """The innermost running function of the project, except private functions of this package."""
    frame: FrameType | None = sys._getframe(1)
    while frame:
        path, name = _below_root(frame.f_code.co_filename), frame.f_code.co_name
        if path and not (name.startswith("_") and Path(path).parts[0] == HERE.name):
            return f"{path} {name}"
        frame = frame.f_back
    return ""


@cache
def _below_root(filename: str) -> str:
    """The path of a source file relative to the project, "" if it is outside."""
    path = Path(filename)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) and "site-packages" not in path.parts else ""
