"""Fault injection on the real scripts: kills, full disks, denied writes and concurrent runs.

    python -m tools.torture                            the full test, as in docs/robustness.md
    python -m tools.torture --kills 1 --faults 1       a short test

Each script is run once without faults on a small copy of the built-in sample. Then it is run with faults in one folder,
resuming by the same command each time, until it completes. The files must then equal those of the run without faults,
byte for byte, and a script that was not killed must have printed one sentence.
"""

from __future__ import annotations

import errno
import faulthandler
import fcntl
import importlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import tyro
from tqdm import tqdm

import datasets_process
import musetalk.data.crop
import musetalk.data.sample
import musetalk_trainer
from musetalk.cli import Count, Seed, check_constants, run_script
from musetalk.contract import AUDIO_SAMPLE_RATE
from musetalk.data.audio import sync_mel
from musetalk.errors import UserError
from musetalk.models.unet import build_unet

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "models" / "mini"
SAMPLE_CLIPS, SAMPLE_FRAMES, CLIP_FRAMES = 2, 14, 8  # of the small sample; its clips are split in two
NOT_COMPARED = re.compile(r"\.lock|trainer\.log|events\.out\..*")  # empty files, and files with timestamps
PIPE_BYTES = 1 << 20
FORK = get_context("fork")  # runs start from this process, without importing everything again
WRITES = {"open", "os.mkdir", "os.rename", "os.remove"}  # audit events of operations that change the disk
# Functions in which a script can be killed -> stage in the report.
STAGES = {
    "datasets_process.py": {
        "load_models": "load",
        "render_frames": "sample",
        "write_video": "sample",
        "read_audio": "audio",
        "audio_features": "audio",
        "sync_mel": "audio",
        "detect": "find faces",
        "find_person": "find faces",
        "crop_person": "crop",
        "encode_clip": "encode",
        "extend": "encode",
        "atomic_write": "write",
        "atomic_write_bytes": "write",
        "finished": "resume",
        "write_contact_sheet": "report",
    },
    "musetalk_trainer.py": {
        "Cache": "load",
        "load_pixel_vae": "load",
        "build_state": "load",
        "resume": "resume",
        "generator_loss": "forward and backward",
        "update_ema": "update",
        "clip_grad_norm_": "update",
        "draw_grid": "sample",
        "picture": "sample",
        "record": "log",
        "line": "log",
        "save_state": "save",
        "save_unet": "save",
    },
}


@dataclass(frozen=True)
class Config:
    """The number of faults."""

    kills: Count = 200  # per script, at random moments, and as many at file operations
    faults: Count = 40  # per script, of each other kind
    seed: Seed = 0


@dataclass
class Row:
    """The results of one kind of fault in one script."""

    script: str
    fault: str
    count: int = 0  # faults
    stages: Counter = field(default_factory=Counter)  # stages in which the script was killed
    losses: list[str] = field(default_factory=list)  # descriptions of failures


@dataclass(frozen=True)
class Script:
    """A script with its constants, and the files and duration in seconds of a run without faults."""

    name: str
    main: Callable[[], None]
    expected: dict[str, bytes] = field(default_factory=dict)
    seconds: float = 0

    def start(self, folder: Path, fault: Fault) -> tuple[BaseProcess, int]:
        """Starts a run in a folder in its own process. Returns the process and the read end of a pipe of its output."""
        (output, output_end), (started, started_end) = os.pipe(), os.pipe()
        fcntl.fcntl(output_end, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        process = FORK.Process(target=self._run, args=(folder, output_end, started_end, fault))
        process.start()
        os.close(output_end)
        os.close(started_end)
        read_all(started)  # returns when the process starts its script or dies
        return process, output

    def _run(self, folder: Path, output_end: int, started_end: int, fault: Fault) -> None:
        os.chdir(folder)
        os.dup2(output_end, 1)
        os.dup2(output_end, 2)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1) for number in (1, 2))
        faulthandler.register(signal.SIGUSR1, all_threads=False)
        fault.inside(folder)
        os.close(started_end)
        self.main()


def prepare() -> None:
    """Runs datasets_process.py on a small sample, which it renders first."""
    musetalk.data.sample.SEEDS, musetalk.data.sample.NUM_FRAMES = (
        musetalk.data.sample.SEEDS[:SAMPLE_CLIPS],
        SAMPLE_FRAMES,
    )
    datasets_process.MAX_CLIP_FRAMES = musetalk.data.crop.MAX_CLIP_FRAMES = CLIP_FRAMES
    run_script(datasets_process.main, datasets_process.PrepareConfig(models_dir=MODELS, num_workers=1))


def train(cache: Path) -> None:
    """Runs a few steps of musetalk_trainer.py with the preset demo."""
    config = replace(
        musetalk_trainer.PRESETS["demo"],
        hdtf_samples_dir=cache,
        held_out_identities=(),
        models_dir=MODELS,
        batch_size=2,
        pixel_every=2,
        num_steps=4,
        warmup_steps=2,
        log_every=1,
        sample_every=2,
        val_every=0,
        save_every=2,
    )
    run_script(lambda config: musetalk_trainer.train("demo", config), config)


def run_without_faults(name: str, main: Callable[[], None], folder: Path) -> Script:
    """Runs a script once and returns it with its files and duration."""
    folder.mkdir()
    script, start = Script(name, main), time.monotonic()
    process, pipe = script.start(folder, Fault())
    process.join()
    output = read_all(pipe)
    if process.exitcode:
        raise UserError(f"{name} fails without faults: {output}")
    return replace(script, expected=contents(folder), seconds=time.monotonic() - start)


def contents(folder: Path) -> dict[str, bytes]:
    """The contents of the files in a folder, except those with timestamps."""
    return {
        path.relative_to(folder).as_posix(): b"".join(leaves(torch.load(path, weights_only=True)))
        if path.suffix == ".pt"  # equal values may have different pickles
        else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not NOT_COMPARED.fullmatch(path.name)
    }


def leaves(value: object) -> Iterator[bytes]:
    """The bytes of all values in nested dicts and lists, in order."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield str(name).encode()
            yield from leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)
    else:
        yield value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode()


def read_all(pipe: int) -> str:
    """Reads a pipe to its end."""
    with open(pipe, errors="replace") as file:
        return file.read()


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
        shutil.disk_usage = lambda _: SimpleNamespace(free=sys.maxsize)  # passes the check at the start

    def after(self, folder: Path) -> None:
        subprocess.run(["umount", folder], check=True)


def _changes(event: str, arguments: tuple, folder: Path) -> bool:
    """Whether an operation changes a file in a folder."""
    path = arguments[0]
    if not isinstance(path, str | os.PathLike) or not os.path.abspath(path).startswith(f"{folder}/"):
        return False
    return event != "open" or bool(set(str(arguments[1])) & set("wax+"))


def inject(script: Script, fault: Fault, repeats: int, seed: int, folder: Path) -> Row:
    """Runs a script with faults until it completes, and repeats until there were `repeats` faults."""
    row, rng = Row(script.name, fault.name), np.random.default_rng(seed)
    bar = tqdm(total=repeats, desc=f"{script.name}: {fault.name}")
    while row.count < repeats:
        folder.mkdir()
        while not row.losses:
            fault.before(folder, rng)
            process, pipe = script.start(folder, fault)
            fault.outside(process)
            process.join()
            output, exit_code = read_all(pipe), process.exitcode
            if exit_code == 0:
                row.losses = compare(script, folder)
                break
            row.count += 1
            bar.update()
            row.stages[stage_of(script.name, output)] += 1
            last_line = output.rstrip().rpartition("\n")[2]
            bad_message = exit_code == 2 and (fault.sentence not in last_line or "Traceback" in output)
            if exit_code != fault.exit_code or bad_message:
                row.losses.append(f"exited with {exit_code}: {output[-1000:]}")
        fault.after(folder)
        shutil.rmtree(folder)
        if row.losses:
            break
    return row


def run_concurrently(script: Script, repeats: int, seed: int, folder: Path) -> Row:
    """Starts a second run while the first one is running."""
    row, rng = Row(script.name, "two concurrent runs"), np.random.default_rng(seed)
    for _ in tqdm(range(repeats), f"{script.name}: {row.fault}"):
        folder.mkdir()
        (first, first_pipe), moment = script.start(folder, Fault()), rng.uniform(0, 0.8 * script.seconds)
        first.join(moment)
        second, second_pipe = script.start(folder, Fault())
        second.join()
        first.join()
        row.count += 1
        first_output, second_output = read_all(first_pipe), read_all(second_pipe)
        if first.exitcode != 0:
            row.losses.append(f"the first exited with {first.exitcode}: {first_output[-1000:]}")
        if second.exitcode not in (0, 2) or (second.exitcode == 2 and "in use by another process" not in second_output):
            row.losses.append(f"the second exited with {second.exitcode}: {second_output[-1000:]}")
        row.losses += compare(script, folder)
        shutil.rmtree(folder)
        if row.losses:
            break
    return row


def compare(script: Script, folder: Path) -> list[str]:
    """Descriptions of the files that differ from those of the run without faults."""
    found = contents(folder)
    names = sorted(found.keys() | script.expected.keys())
    return [f"{name} differs" for name in names if found.get(name) != script.expected.get(name)]


def stage_of(script: str, output: str) -> str:
    """The innermost known stage of the stack in the output; "between" if there is none."""
    functions = re.findall(r'^  File ".*", line \d+ in (\w+)$', output, re.MULTILINE)
    return next((STAGES[script][name] for name in functions if name in STAGES[script]), "between")


def torture(config: Config, folder: Path) -> list[Row]:
    """Injects all faults into both scripts in a new folder, in parallel."""
    check_constants(config)
    torch.set_num_threads(1)
    importlib.import_module("mediapipe.python.solutions.face_mesh")  # slow initialisation, done once for all runs
    sync_mel(np.zeros(AUDIO_SAMPLE_RATE, np.float32))
    build_unet(MODELS, seed=0, positional_encoding=True)
    prepared = run_without_faults("datasets_process.py", prepare, folder / "prepared")
    trained = run_without_faults(
        "musetalk_trainer.py", partial(train, folder / "prepared/data/cache"), folder / "trained"
    )
    mountable = can_mount(folder)
    pairs = zip(jobs_of(prepared, config, mountable), jobs_of(trained, config, mountable), strict=True)
    jobs = [job for pair in pairs for job in pair]
    with ProcessPoolExecutor(os.cpu_count(), FORK) as pool:
        futures = [pool.submit(job, config.seed + k, folder / str(k)) for k, job in enumerate(jobs)]
        for future in futures:
            tqdm.write(str(future.result()))
        return [future.result() for future in futures]


def jobs_of(script: Script, config: Config, mountable: bool) -> Iterator[Callable[[int, Path], Row]]:
    """All faults of one script, as functions of a seed and a folder."""
    sizes = [len(content) for content in script.expected.values()]
    yield partial(inject, script, KillAnyTime(script.seconds), config.kills)
    yield partial(inject, script, KillAtWrite(), config.kills)
    yield partial(inject, script, RefuseWrite(errno.EACCES), config.faults)
    yield partial(inject, script, RefuseWrite(errno.ENOSPC), config.faults)
    yield partial(inject, script, LimitFiles(max(sizes)), config.faults)
    if mountable:
        yield partial(inject, script, FullDisk(sum(sizes)), config.faults)
    yield partial(run_concurrently, script, config.faults)


def can_mount(folder: Path) -> bool:
    """Whether this user may mount a file system, as root outside most containers."""
    probe = folder / "probe"
    probe.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", probe], capture_output=True).returncode == 0
    if mounted:
        subprocess.run(["umount", probe], check=True)
    return mounted


def table(rows: list[Row]) -> str:
    """A Markdown table of rows, followed by the stages of kills and by failures."""
    lines = ["| script | fault | count | lost |", "|---|---|---|---|"]
    lines += [f"| `{row.script}` | {row.fault} | {row.count} | {len(row.losses) or 'nothing'} |" for row in rows]
    for row in rows:
        if row.stages.total() > row.stages["between"]:
            lines.append(
                f"\n{row.script}, {row.fault}, by stage: " + ", ".join(f"{s} {n}" for s, n in row.stages.most_common())
            )
        lines += [f"\n{row.script}, {row.fault}: {loss}" for loss in row.losses]
    return "\n".join(lines)


def main(config: Config) -> None:
    """Prints the table. Raises UserError if something was lost."""
    with tempfile.TemporaryDirectory() as folder:
        rows = torture(config, Path(folder).resolve())
    print(table(rows))
    if any(row.losses for row in rows):
        raise UserError("files were lost or a message was missing; see above")


if __name__ == "__main__":
    run_script(main, tyro.cli(Config, description=__doc__))
