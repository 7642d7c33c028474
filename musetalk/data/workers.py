"""Work shared out to processes that get ready once, by loading networks say, and then do one job after another.

Each is an interpreter of its own, since neither a GPU nor the threads of a library survive a fork, and has a pipe to
the process that gives the jobs: when one of the two ends, however that comes, the other sees its end of the pipe close.
"""

from __future__ import annotations

import os
import pkgutil
import signal
import subprocess
import sys
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait

import torch
from tqdm import tqdm

from musetalk.errors import UserError, printable

MEMORY = 3 << 30  # bytes for one: networks and libraries take up to 2 GB, the frames at hand and sound the rest
LAST_SECONDS = 10  # that a process has to remove what it has half written, when it must end


class RemoteBar:
    """A progress bar in a process that has none: the one that gave the job draws it. The part of tqdm's that is used.

    n: how far this job has moved it.
    """

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe
        self.n = 0

    def update(self, count: int = 1) -> None:
        self.n += count
        self.pipe.send(("update", count))

    def write(self, line: str) -> None:
        self.pipe.send(("write", line))

    def set_postfix_str(self, text: str) -> None:
        self.pipe.send(("set_postfix_str", text))


Bar = tqdm | RemoteBar


@dataclass
class Worker:
    """A process, from the side of the one that gives the jobs."""

    process: subprocess.Popen
    pipe: Connection
    job: str | None = None  # what it is at
    moved: int = 0  # how far it has moved the bar with it


def most_processes() -> int:
    """How many processes make full use of this machine.

    On GPUs two each: one decodes, finds faces and writes while the other one's networks are at work. Else one a core,
    since networks on a CPU run on one thread, as far as memory goes.
    """
    if torch.cuda.is_available():
        return 2 * torch.cuda.device_count()
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(len(os.sched_getaffinity(0)), whole // MEMORY))


def map_jobs(start: str, arguments: tuple, jobs: dict[str, object], count: int, bar: tqdm) -> dict[str, object]:
    """Have jobs done by `count` processes, the first ones first. Returns what each gave, by its name.

    start: "module:function". The function is called in each process with its number and the arguments, and gives one
    of a job and a bar, which does the job. Jobs, arguments and results are pickled, so none is of a class of a script.
    When a process is killed it is said, and the others go on; its job is done again at the end. Raises UserError where
    no process is left, and the UserError or OSError of a job. When it ends, so have all processes.
    """
    waiting, results = deque(jobs), {}
    workers: list[Worker] = []
    try:
        # Ctrl-C at a terminal is for all processes of a command: the others never get it, this one ends them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            workers += (_launch(start, (number, *arguments)) for number in range(count))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        while len(results) < len(jobs):
            for worker in workers:
                if worker.job is None and waiting:
                    worker.job, worker.moved = waiting.popleft(), 0
                    with suppress(ConnectionError):  # it is gone, as reading from it will show
                        worker.pipe.send(jobs[worker.job])
            ready = wait([worker.pipe for worker in workers])
            for worker in [worker for worker in workers if worker.pipe in ready]:
                try:
                    what, value = worker.pipe.recv()
                except (EOFError, OSError):  # the latter in the middle of a message
                    workers.remove(worker)
                    bar.update(-worker.moved)
                    waiting += [worker.job] * (worker.job is not None)
                    bar.write(_exit_message(worker, len(workers)))
                    continue
                if what == "done":
                    results[worker.job], worker.job = value, None
                elif what == "failed":
                    raise value
                else:
                    getattr(bar, what)(value)
                    worker.moved += value if what == "update" else 0
        return results
    finally:
        _end(workers)


def _launch(start: str, arguments: tuple) -> Worker:
    """A process that has got its arguments and imports what this one would."""
    pipe, other_end = Pipe()
    with other_end:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, start, str(other_end.fileno())],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            pass_fds=[other_end.fileno()],
        )
    pipe.send(arguments)
    return Worker(process, pipe)


def _exit_message(worker: Worker, left: int) -> str:
    """What to say of a process that was killed. Raises UserError where it was the last, RuntimeError if it failed."""
    code = worker.process.wait()
    if code >= 0:
        raise RuntimeError(f"a process failed with exit code {code} at {worker.job}; its traceback is above")
    at = f" at {worker.job}" if worker.job is not None else ""
    cause = f"a process was ended by signal {-code} ({signal.strsignal(-code)}){at}, perhaps for want of memory"
    if not left:
        raise UserError(f"{cause}; run the same command again, with a smaller num_workers")
    return printable(f"{cause}; what it was at is done at the end, number of processes left: {left}")


def _end(workers: list[Worker]) -> None:
    for worker in workers:
        worker.pipe.close()
        worker.process.terminate()
    for worker in workers:
        try:
            worker.process.wait(LAST_SECONDS)
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()


def _serve(start: str, pipe: Connection) -> None:
    """Do jobs until there is nobody to give one."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that nothing is left half written
    try:
        work = pkgutil.resolve_name(start)(*pipe.recv())
        while True:
            job = pipe.recv()
            pipe.send(("done", work(job, RemoteBar(pipe))))
    except KeyboardInterrupt:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)
    except (EOFError, ConnectionError):
        return
    except (UserError, OSError) as error:
        pipe.send(("failed", error))


if __name__ == "__main__":
    _serve(sys.argv[1], Connection(int(sys.argv[2])))
