"""Memory of a computation by its live storages, whether its tensors have contents or only shapes."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from functools import cache
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from benchmarks import ROOT

GIB = 2**30
HERE = Path(__file__).parent


class LiveStorages(TorchDispatchMode):
    """Within it the storages of all tensors that come out of an operation are counted while they live, each once.

    Neither the workspace of a kernel is counted nor what an allocator rounds up or cannot use again. To count tensors
    without contents, enter their mode before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0  # bytes
        self.at_peak: Counter[str] = Counter()  # where and of what kind -> bytes at the peak
        self._live: dict[int, tuple[int, str]] = {}  # address -> bytes, where and of what kind
        self._noted = True  # whether at_peak is of the peak

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self._count(tensor)
        return result

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak, self._noted = self.current, False

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address in self._live:
            return
        self._live[address] = size, f"{_maker()}, {str(tensor.dtype).removeprefix('torch.')}"
        weakref.finalize(storage, self._release, address)
        self.current += size
        if self.current > self.peak:
            self.peak, self._noted = self.current, False

    def _release(self, address: int) -> None:
        if not self._noted and self.current == self.peak:
            self._noted, self.at_peak = True, Counter()
            for size, what in self._live.values():
                self.at_peak[what] += size
        self.current -= self._live.pop(address)[0]


def _maker() -> str:
    """The innermost function of the project that is running; those here that begin with _ only stand between."""
    frame = sys._getframe(1)
    while frame:
        path, name = _below_root(frame.f_code.co_filename), frame.f_code.co_name
        if path and not (name.startswith("_") and Path(path).parts[0] == HERE.name):
            return f"{path} {name}"
        frame = frame.f_back
    return ""


@cache
def _below_root(filename: str) -> str:
    """Where in the project a file of code is, "" where it is none of its own."""
    path = Path(filename)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) and "site-packages" not in path.parts else ""
