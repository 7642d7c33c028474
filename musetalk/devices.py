"""Chooses the device that a script computes on, describes it in one line, and compiles networks for it."""

from __future__ import annotations

import os
import re
import shutil
from contextlib import AbstractContextManager, nullcontext
from glob import glob
from pathlib import Path

import torch
from torch import nn

from musetalk.errors import UserError

NVIDIA_DEVICES = ("/dev/nvidia[0-9]*", "/dev/dxg")  # on Linux, and in WSL
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


class DeviceError(UserError):
    """A device cannot be used."""


def choose_device(name: str) -> torch.device:
    """The device called "cpu", "cuda", "cuda:<number>", "mps" or "auto": CUDA's GPU if there is one, else the CPU.

    Raises DeviceError for another name, and if CUDA is requested but cannot be used. "auto" requests CUDA if there is
    an NVIDIA device that CUDA_VISIBLE_DEVICES does not hide, so that it never falls back to the CPU silently.
    """
    if not re.fullmatch("auto|cpu|mps|cuda(:[0-9]{1,2})?", name):
        raise DeviceError(f"device must be auto, cpu, mps, cuda or cuda:<number>, not {name!r}")
    if name == "mps" and not torch.backends.mps.is_available():
        raise DeviceError('device = "mps" needs a Mac with an Apple GPU; set device = "auto"')
    if name in ("cpu", "mps"):
        return torch.device(name)
    if name == "auto" and not torch.cuda.is_available() and not nvidia_present():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise DeviceError(
            f"the GPU cannot be used by {' with '.join(filter(None, [torch_build(), driver()]))}: {cuda_fault()}; "
            'install a build of torch for this driver (https://pytorch.org/get-started/locally), or set device = "cpu"'
        )
    device = torch.device("cuda" if name == "auto" else name)
    if (device.index or 0) >= (count := torch.cuda.device_count()):
        raise DeviceError(f"device must be an existing GPU, at most cuda:{count - 1}, not {name!r}")
    return device


def nvidia_present() -> bool:
    """Whether this machine has an NVIDIA device that CUDA_VISIBLE_DEVICES does not hide."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not hidden and any(glob(pattern) for pattern in NVIDIA_DEVICES)


def cuda_fault() -> str:
    """torch's reason why CUDA cannot be used."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().split("\n")[0].split(". ")[0].rstrip(".")
    return "torch finds no GPU"


def torch_build() -> str:
    """torch's version and the CUDA version it was built for."""
    return f"torch {torch_version()} ({f'CUDA {torch.version.cuda}' if torch.version.cuda else 'a CPU build'})"


def torch_version() -> str:
    return torch.__version__.partition("+")[0]


def driver() -> str:
    """The version of the NVIDIA driver, "" if it cannot be read."""
    text = NVIDIA_DRIVER.read_text() if NVIDIA_DRIVER.is_file() else ""
    version = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", text)
    return f"driver {version[0]}" if version else ""


def describe(device: torch.device) -> str:
    """A device in one line: "NVIDIA H100 80GB HBM3, 79.2 GiB, driver 580.159, torch 2.13.0 (CUDA 13.0)"."""
    if device.type == "cpu":
        return f"CPU, {cpu_cores()} cores, torch {torch_version()}"
    if device.type == "mps":
        return f"Apple GPU, torch {torch_version()}"
    gpu = torch.cuda.get_device_properties(device)
    return ", ".join(filter(None, [gpu.name, f"{gpu.total_memory / 2**30:.1f} GiB", driver(), torch_build()]))


def supports_bf16(device: torch.device | str) -> bool:
    """Whether a device supports bfloat16 in hardware; others are several times slower in it than in float32."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return kind == "cpu" and bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def mixed_precision(device: torch.device) -> AbstractContextManager:
    """A context in which networks compute in bfloat16 on GPUs that support it, and in their own dtype elsewhere."""
    if device.type == "cuda" and supports_bf16(device):
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def check_compiler() -> None:
    """Raises DeviceError if there is no C++ compiler for torch.compile."""
    if not shutil.which(os.environ.get("CXX", "g++")):
        raise DeviceError("compile must be False here: torch.compile needs a C++ compiler (g++, or the one in CXX)")


def compile_network(network: nn.Module, device: torch.device) -> None:
    """Makes torch compile a network at its first forward pass with inputs of a shape."""
    # On a CPU torch 2.13 loses the gradient of an upsampler, in bfloat16 and channels_last, if it optimises layouts.
    options = {"layout_optimization": False} if device.type == "cpu" else None
    network.compile(dynamic=False, options=options)


def cpu_cores() -> int:
    """The number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS has no affinity
