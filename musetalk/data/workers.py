"""Distributes jobs over processes that are set up once, for example by loading networks."""

from __future__ import annotations

import multiprocessing
import pkgutil
import signal
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Lock
from typing import Any, TypeAlias

import psutil
import torch
from tqdm import tqdm

from musetalk.devices import cpu_cores
from musetalk.errors import UserError

MEMORY = 3 << 30  # bytes per process: up to 2 GB for networks and libraries, the rest for frames and audio
GPU_MEMORY = 3 << 30  # bytes per process on its GPU: CUDA itself, full-size networks and a batch of the VAE's encoder
GRACE_SECONDS = 10  # for a process to remove its temporary files before it is killed


@dataclass
class RemoteBar:
    """The part of tqdm's interface that jobs use, in a process whose parent draws the progress bar.

    n: progress of the current job.
    """

    pipe: Connection
    lock: Lock
    job: str
    n: int = 0

    def _send(self, method: str, value: object) -> None:
        with self.lock:
            self.pipe.send((self.job, method, value))

    def update(self, count: int = 1) -> None:
        self.n += count
        self._send("update", count)

    def write(self, line: str) -> None:
        self._send("write", line)

    def set_postfix_str(self, text: str) -> None:
        self._send("set_postfix_str", text)


Bar: TypeAlias = tqdm | RemoteBar


def most_processes() -> int:
    """Returns the number of processes that makes full use of this machine: one per core, as far as memory allows.

    Each runs on one thread. A GPU is shared by the processes of several cores, since decoding and finding landmarks
    takes a core about 20 ms a frame, and the networks take a GPU a few.
    """
    count = min(cpu_cores(), psutil.virtual_memory().total // MEMORY)
    if torch.cuda.is_available():
        gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        count = min(count, sum(gpu.total_memory // GPU_MEMORY for gpu in gpus))
    return max(1, count)


def map_jobs(start: str, arguments: tuple, jobs: Mapping[str, object], count: int, bar: tqdm) -> dict[str, Any]:
    """Runs jobs on `count` processes, starting them in order. Returns their results by name.

    start: "module:function". Each process calls it once with its index and the arguments; it returns the function of
    a job and a bar that runs a job. Jobs, arguments and results are pickled, so their classes must not be defined in a
    script. All processes have ended when this returns or raises. Raises UserError if a process is killed, and the
    error of a job.
    """
    others = multiprocessing.active_children()
    context = multiprocessing.get_context("spawn")  # neither CUDA nor the threads of a library survive a fork
    reader, writer = context.Pipe(duplex=False)
    executor = ProcessPoolExecutor(
        count, context, _initialize, (start, arguments, context.Value("i", 0), writer, context.Lock())
    )
    started: list[str] = []
    results: dict[str, object] = {}
    display = threading.Thread(target=_show_progress, args=(reader, bar, started), daemon=True)
    try:
        # Ctrl-C reaches all processes of a terminal; the workers inherit a mask that blocks it, and this process
        # ends them.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            futures = {executor.submit(_run_job, name, job): name for name, job in jobs.items()}
        finally:
            writer.close()
            display.start()
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for future in as_completed(futures):
            results[futures[future]] = future.result()
    except BrokenProcessPool as error:
        display.join()
        running = ", ".join(name for name in started if name not in results)
        raise UserError(
            f"a process was killed while processing {running}, perhaps out of memory; "
            "run the same command again, with a smaller num_workers"
        ) from error
    finally:
        workers = [child for child in multiprocessing.active_children() if child not in others]
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join(GRACE_SECONDS)
            worker.kill()
        executor.shutdown(cancel_futures=True)
        display.join()
        reader.close()
    return {name: results[name] for name in jobs}


def _show_progress(reader: Connection, bar: tqdm, started: list[str]) -> None:
    """Applies the messages of all workers to the bar until the last worker ends, and lists the jobs that started."""
    try:
        while True:
            job, method, value = reader.recv()
            if method == "start":
                started.append(job)
            else:
                getattr(bar, method)(value)
    except EOFError:
        return


# What follows runs in the workers.

_setup: tuple[str, tuple, int, Connection, Lock]
_work: Callable[[object, Bar], object] | None = None


def _initialize(start: str, arguments: tuple, counter: Synchronized, pipe: Connection, lock: Lock) -> None:
    global _setup
    with counter.get_lock():
        _setup = start, arguments, counter.value, pipe, lock
        counter.value += 1
    parent, main_thread = multiprocessing.parent_process(), threading.get_ident()
    threading.Thread(target=_end_with_parent, args=(parent, main_thread), daemon=True).start()


def _end_with_parent(parent: BaseProcess, main_thread: int) -> None:
    parent.join()
    signal.pthread_kill(main_thread, signal.SIGTERM)


def _run_job(name: str, job: object) -> object:
    """Runs a job, after setting up this process if it is the first one. SIGTERM unwinds it and ends the process."""
    global _work
    start, arguments, index, pipe, lock = _setup
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        bar = RemoteBar(pipe, lock, name)
        bar._send("start", None)
        if _work is None:
            _work = pkgutil.resolve_name(start)(index, *arguments)
        return _work(job, bar)
    except KeyboardInterrupt:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)
        raise  # never reached
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
