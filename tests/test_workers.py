"""Jobs on several processes: results, progress, errors, killed processes, interruption. No process is left behind."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from musetalk.data.cache import CacheError
from musetalk.data.workers import Bar, map_jobs, most_processes
from musetalk.errors import UserError

ROOT = Path(__file__).parents[1]

# What the workers run. The first word of a job is the name of a function below.


def begin(number: int, folder: Path) -> Callable[[str, Bar], object]:
    """Called once by each process; writes its pid to a file."""
    (folder / f"{number}.pid").write_text(str(os.getpid()))
    return lambda job, bar: globals()[job.split()[0]](number, folder, bar, *job.split()[1:])


def fail_to_begin(number: int, folder: Path) -> None:
    raise CacheError("no networks")


def double(number: int, folder: Path, bar: Bar, value: str) -> int:
    bar.set_postfix_str(value)
    for _ in range(int(value)):
        bar.update()
    bar.write(f"half of {2 * int(value)}")
    return 2 * bar.n


def killed(number: int, folder: Path, bar: Bar) -> None:
    wait_for(number, folder, bar, "a.partial")
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for(number: int, folder: Path, bar: Bar, name: str) -> str:
    while not (folder / name).exists():
        time.sleep(0.01)
    return name


def wait_for_three(number: int, folder: Path, bar: Bar, name: str) -> None:
    while len(list(folder.glob("*.pid"))) < 3:
        time.sleep(0.01)


def write(number: int, folder: Path, bar: Bar, name: str) -> None:
    """Runs until it is interrupted, then cleans up."""
    try:
        (folder / f"{name}.partial").touch()
        while True:
            bar.update()
            time.sleep(0.01)
    finally:
        (folder / f"{name}.partial").rename(folder / f"{name}.tidied")


def refuse(number: int, folder: Path, bar: Bar) -> None:
    wait_for(number, folder, bar, "a.partial")
    raise UserError(f"{folder}: is unsuitable")


def fill_disk(number: int, folder: Path, bar: Bar) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def raise_bug(number: int, folder: Path, bar: Bar) -> None:
    raise KeyError("a bug")


class RecordingBar:
    """A bar that records its calls."""

    def __init__(self) -> None:
        self.n, self.lines, self.names = 0, [], []
        self.update, self.write, self.set_postfix_str = self._update, self.lines.append, self.names.append

    def _update(self, count: int) -> None:
        self.n += count


@pytest.fixture
def run(tmp_path) -> Callable:
    """A function: jobs, number of processes -> results and the bar. Checks that no process is left."""

    def share(jobs: list[str], count: int, start: str = "begin") -> tuple[dict[str, object], RecordingBar]:
        bar = RecordingBar()
        try:
            return map_jobs(f"tests.test_workers:{start}", (tmp_path,), {job: job for job in jobs}, count, bar), bar
        finally:
            for path in tmp_path.glob("*.pid"):
                with pytest.raises(ProcessLookupError):
                    os.kill(int(path.read_text()), 0)

    return share


def test_each_job_runs_once_and_reports_to_the_bar(run):
    jobs = [f"double {value}" for value in range(9)]
    results, bar = run(jobs, 2)
    assert results == {f"double {value}": 2 * value for value in range(9)}
    assert bar.n == sum(range(9)) and sorted(bar.names) == list("012345678")
    assert sorted(bar.lines) == sorted(f"half of {2 * value}" for value in range(9))


def test_processes_run_at_the_same_time(run):
    """With fewer than three processes the jobs would wait forever."""
    run(["wait_for_three a", "wait_for_three b", "wait_for_three c", "double 1"], 3)


def test_a_killed_process_ends_all_with_an_error_that_names_its_job(run, tmp_path):
    with pytest.raises(UserError, match="was killed while processing write a, killed, .*num_workers"):
        run(["write a", "killed", "double 3", "double 4", "double 5"], 2)
    assert (tmp_path / "a.tidied").exists()


@pytest.mark.parametrize(
    ("job", "error", "message"),
    [
        ("refuse", UserError, "is unsuitable"),
        ("fill_disk", OSError, os.strerror(errno.ENOSPC)),
        ("raise_bug", KeyError, "a bug"),
    ],
)
def test_an_error_in_a_job_ends_all_processes(run, tmp_path, job, error, message):
    jobs = ["write a", job] if job == "refuse" else [job]
    with pytest.raises(error, match=message) as raised:
        run(jobs, len(jobs))
    assert job != "refuse" or (tmp_path / "a.tidied").exists()
    assert not (tmp_path / "a.partial").exists()
    assert getattr(raised.value, "filename", None) in (None, str(tmp_path))
    assert job != "raise_bug" or "in raise_bug" in str(raised.value.__cause__)  # the traceback of the worker


def test_an_error_at_the_start_of_a_process_ends_all(run):
    with pytest.raises(CacheError, match="no networks"):
        run(["double 1"], 1, "fail_to_begin")


TWO_AT_WORK = """
import sys
from pathlib import Path
from musetalk.cli import run_script
from musetalk.data.workers import map_jobs
from tests.test_workers import RecordingBar
jobs = {name: f"write {name}" for name in "ab"}
run_script(lambda folder: map_jobs("tests.test_workers:begin", (folder,), jobs, 2, RecordingBar()), Path(sys.argv[1]))
"""


def both(folder: Path, ending: str) -> Callable[[], bool]:
    return lambda: all((folder / f"{name}.{ending}").exists() for name in "ab")


def test_ctrl_c_ends_all_processes(interrupt, tmp_path):
    code, output = interrupt(["-c", TWO_AT_WORK, tmp_path], both(tmp_path, "partial"))
    assert code == 130 and "Traceback" not in output
    assert output.endswith("\ninterrupted; run the same command again to resume\n")
    assert both(tmp_path, "tidied")()


def test_workers_end_when_their_parent_is_killed(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", TWO_AT_WORK, tmp_path], cwd=ROOT, stderr=subprocess.DEVNULL)
    while not both(tmp_path, "partial")():
        time.sleep(0.01)
    process.kill()
    process.wait()
    while not both(tmp_path, "tidied")():
        time.sleep(0.01)


@pytest.mark.parametrize(("memory", "count"), [(64 << 30, 4), (10 << 30, 3), (1 << 30, 1)])
def test_each_core_has_a_process_if_memory_allows(monkeypatch, memory, count):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=memory))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert most_processes() == count


@pytest.mark.parametrize(("gpus", "gigabytes", "count"), [(1, 80, 16), (2, 80, 16), (1, 24, 8), (2, 16, 10), (1, 2, 1)])
def test_the_cores_share_the_gpus_as_far_as_their_memory_allows(monkeypatch, gpus, gigabytes, count):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64 << 30))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    properties = SimpleNamespace(total_memory=gigabytes << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert most_processes() == count
