"""Faults in a run of a script: kills, denied writes, file size limits and full disks."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace

import numpy as np

WRITES = {"open", "os.mkdir", "os.rename", "os.remove"}  # audit events of operations that change the disk


class Fault:
    """A fault in one run of a script; the base class does nothing."""

    name = "nothing"
    exit_code = 0  # of a run with the fault
    sentence = ""  # in the message of a script that exits with 2

    def before(self, folder: Path, rng: np.random.Generator) -> None:
        """Draws random parameters; called before each run."""

    def inside(self, folder: Path) -> None:
        """Called in the process of the script, before its main."""

    def outside(self, process: BaseProcess) -> None:
        """Called when the process has started."""

    def after(self, folder: Path) -> None:
        """Called before the folder is removed."""


class KillAnyTime(Fault):
    """SIGKILL after a uniform random time up to 1.5 times the duration of a run without faults."""

    name, exit_code = "kill -9 at a random moment", -signal.SIGKILL

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def before(self, folder: Path, rng: np.random.Generator) -> None:
        self.moment = rng.uniform(0, 1.5 * self.seconds)

    def outside(self, process: BaseProcess) -> None:
        process.join(self.moment)
        if process.is_alive():
            assert process.pid is not None
            os.kill(process.pid, signal.SIGUSR1)  # makes it print its stack
            time.sleep(0.01)
            process.kill()


class AtWrite(Fault):
    """A fault instead of the n-th operation that changes the disk."""

    def before(self, folder: Path, rng: np.random.Generator) -> None:
        self.remaining = int(rng.integers(1, 50))

    def inside(self, folder: Path) -> None:
        def hook(event: str, arguments: tuple) -> None:
            if event in WRITES and self.remaining > 0 and _changes(event, arguments, folder):
                self.remaining -= 1
                if not self.remaining:
                    self.strike(os.fspath(arguments[0]))

        sys.addaudithook(hook)

    def strike(self, path: str) -> None:
        """The fault at the operation on this path."""


class KillAtWrite(AtWrite):
    """SIGKILL just before the operation."""

    name, exit_code = "kill -9 at a file operation", -signal.SIGKILL

    def strike(self, path: str) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class RefuseWrite(AtWrite):
    """A system error instead of the operation."""

    exit_code = 2

    def __init__(self, number: int) -> None:
        self.number, self.sentence = number, os.strerror(number)
        self.name = f"{errno.errorcode[number]} at a file operation"

    def strike(self, path: str) -> None:
        raise OSError(self.number, self.sentence, path)


class LimitFiles(Fault):
    """A file size limit: the write at that byte fails, in any library."""

    name, exit_code, sentence = "a write fails at a random byte (file size limit)", 2, os.strerror(errno.EFBIG)

    def __init__(self, largest: int) -> None:
        self.largest = largest  # bytes of the largest file of a run without faults

    def before(self, folder: Path, rng: np.random.Generator) -> None:
        self.limit = int(np.exp(rng.uniform(0, np.log(4 * self.largest))))  # log-uniform

    def inside(self, folder: Path) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.RLIM_INFINITY))


class FullDisk(Fault):
    """A separate disk (tmpfs) for the folder, full at a random byte."""

    name, exit_code, sentence = "a disk full at a random byte (tmpfs)", 2, os.strerror(errno.ENOSPC)

    def __init__(self, size: int) -> None:
        self.size = size  # bytes of the files of a run without faults

    def before(self, folder: Path, rng: np.random.Generator) -> None:
        used = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        size = int(rng.uniform(used, 3 * self.size))
        remount = ["-o", f"remount,size={size}"] if folder.is_mount() else ["-o", f"size={size}"]
        subprocess.run(["mount", "-t", "tmpfs", *remount, "tmpfs", folder], check=True, capture_output=True)

    def inside(self, folder: Path) -> None:
        # Passes the check at the start.
        shutil.disk_usage = lambda _: SimpleNamespace(free=sys.maxsize)  # type: ignore[assignment, return-value]

    def after(self, folder: Path) -> None:
        subprocess.run(["umount", folder], check=True)


def _changes(event: str, arguments: tuple, folder: Path) -> bool:
    """Whether an operation changes a file in a folder."""
    path = arguments[0]
    if not isinstance(path, str | os.PathLike) or not os.path.abspath(path).startswith(f"{folder}/"):
        return False
    return event != "open" or bool(set(str(arguments[1])) & set("wax+"))


def can_mount(folder: Path) -> bool:
    """Whether this user may mount a file system, as root outside most containers."""
    probe = folder / "probe"
    probe.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", probe], capture_output=True).returncode == 0
    if mounted:
        subprocess.run(["umount", probe], check=True)
    return mounted
