"""Tries to lose something: kills, full disks, denied writes and two runs at once, on the real scripts.

    python -m tools.torture                            all of it, as in docs/robustness.md
    python -m tools.torture --kills 1 --faults 1       a short form

Each script is run once undisturbed on a small copy of the built-in sample. Then it is disturbed again and again in one
folder, started anew each time by the same command, until it gets through; what is there must then be, byte for byte,
what the undisturbed run left, and a script that could say something must have said one sentence.
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
SAMPLE_CLIPS, SAMPLE_FRAMES, CLIP_FRAMES = 2, 14, 8  # of the small sample; its clips are cut in two
NOT_COMPARED = re.compile(r"\.lock|trainer\.log|events\.out\..*")  # what holds times of the clock or nothing
PIPE_BYTES = 1 << 20
FORK = get_context("fork")  # a life begins where this process is, so that it need not import everything again
WRITES = {"open", "os.mkdir", "os.rename", "os.remove"}  # what Python calls the operations that change a disk
# Functions in which a script can be killed -> what the report calls them.
STAGES = {
    "datasets_process.py": {
        "load_models": "load",
        "render_frames": "sample",
        "write_video": "sample",
        "read_audio": "hear",
        "audio_features": "hear",
        "sync_mel": "hear",
        "detect": "find faces",
        "crop_person": "crop",
        "encode_clip": "encode",
        "encode_jpegs": "write",
        "atomic_write": "write",
        "atomic_write_bytes": "write",
        "finished": "go on",
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
    """How much to do."""

    kills: Count = 200  # of each script, at random moments, and as many at file operations
    faults: Count = 40  # of each other kind, of each script
    seed: Seed = 0


@dataclass
class Row:
    """What one kind of disturbance did to one script."""

    script: str
    what: str
    times: int = 0  # disturbances
    stages: Counter = field(default_factory=Counter)  # where kills struck
    losses: list[str] = field(default_factory=list)  # what went wrong, in words


@dataclass(frozen=True)
class Victim:
    """A script with its constants, what an undisturbed run leaves, and the seconds it takes."""

    script: str
    main: Callable[[], None]
    truth: dict[str, bytes] = field(default_factory=dict)
    seconds: float = 0

    def start(self, folder: Path, disturbance: Disturbance) -> tuple[BaseProcess, int]:
        """A run in a folder, by a process of its own, when it has begun; and the end of a pipe with what it says."""
        (said, saying), (begun, beginning) = os.pipe(), os.pipe()
        fcntl.fcntl(saying, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        process = FORK.Process(target=self._live, args=(folder, saying, beginning, disturbance))
        process.start()
        os.close(saying)
        os.close(beginning)
        read_all(begun)  # ends when the process has begun its script, or is dead
        return process, said

    def _live(self, folder: Path, saying: int, beginning: int, disturbance: Disturbance) -> None:
        os.chdir(folder)
        os.dup2(saying, 1)
        os.dup2(saying, 2)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1) for number in (1, 2))
        faulthandler.register(signal.SIGUSR1, all_threads=False)
        disturbance.inside(folder)
        os.close(beginning)
        self.main()


def prepare() -> None:
    """datasets_process.py on a small sample, which it makes first."""
    musetalk.data.sample.SEEDS, musetalk.data.sample.NUM_FRAMES = (
        musetalk.data.sample.SEEDS[:SAMPLE_CLIPS],
        SAMPLE_FRAMES,
    )
    datasets_process.MAX_CLIP_FRAMES = musetalk.data.crop.MAX_CLIP_FRAMES = CLIP_FRAMES
    run_script(datasets_process.main, datasets_process.PrepareConfig(models_dir=MODELS, num_workers=1))


def train(cache: Path) -> None:
    """A few steps of musetalk_trainer.py, preset demo."""
    config = replace(
        musetalk_trainer.PRESETS["demo"],
        hdtf_samples_dir=cache,
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


def undisturbed(script: str, main: Callable[[], None], folder: Path) -> Victim:
    """A victim that has been run once."""
    folder.mkdir()
    victim, begun = Victim(script, main), time.monotonic()
    process, said = victim.start(folder, Disturbance())
    process.join()
    words = read_all(said)
    if process.exitcode:
        raise UserError(f"{script} does not run undisturbed: {words}")
    return replace(victim, truth=contents(folder), seconds=time.monotonic() - begun)


def contents(folder: Path) -> dict[str, bytes]:
    """What the files below a folder hold, but for those with times in them."""
    return {
        path.relative_to(folder).as_posix(): b"".join(leaves(torch.load(path, weights_only=True)))
        if path.suffix == ".pt"  # equal values may be pickled in more than one way
        else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not NOT_COMPARED.fullmatch(path.name)
    }


def leaves(value: object) -> Iterator[bytes]:
    """The values in nested dicts and lists, to the last bit, in order."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield str(name).encode()
            yield from leaves(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from leaves(part)
    else:
        yield value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode()


def read_all(pipe: int) -> str:
    """What was said into a pipe."""
    with open(pipe, errors="replace") as file:
        return file.read()


class Disturbance:
    """What is done to one life of a script: by itself nothing."""

    what = "nothing"
    exit_code = 0  # of a life that was disturbed
    sentence = ""  # what a script must say that leaves with 2

    def before(self, folder: Path, rng: np.random.Generator) -> None:
        """Draw what will happen. Called before each life."""

    def inside(self, folder: Path) -> None:
        """Called in the script's process, before its main."""

    def outside(self, process: BaseProcess) -> None:
        """Called when the process has begun."""

    def after(self, folder: Path) -> None:
        """Called before the folder is removed."""


class KillAnyTime(Disturbance):
    """SIGKILL after a time drawn evenly from one and a half times the duration of an undisturbed run."""

    what, exit_code = "kill -9 at a random moment", -signal.SIGKILL

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def before(self, folder: Path, rng: np.random.Generator) -> None:
        self.moment = rng.uniform(0, 1.5 * self.seconds)

    def outside(self, process: BaseProcess) -> None:
        process.join(self.moment)
        if process.is_alive():
            os.kill(process.pid, signal.SIGUSR1)  # it says where it is
            time.sleep(0.01)
            process.kill()


class AtWrite(Disturbance):
    """Something at the n-th operation that changes the disk, in place of it."""

    def before(self, folder: Path, rng: np.random.Generator) -> None:
        self.left = int(rng.integers(1, 50))

    def inside(self, folder: Path) -> None:
        def hook(event: str, arguments: tuple) -> None:
            if event in WRITES and self.left > 0 and _changes(event, arguments, folder):
                self.left -= 1
                if not self.left:
                    self.strike(os.fspath(arguments[0]))

        sys.addaudithook(hook)

    def strike(self, path: str) -> None:
        """What happens at the operation on this path."""


class KillAtWrite(AtWrite):
    """SIGKILL just before it."""

    what, exit_code = "kill -9 at a file operation", -signal.SIGKILL

    def strike(self, path: str) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class RefuseWrite(AtWrite):
    """An error of the system instead of it."""

    exit_code = 2

    def __init__(self, number: int) -> None:
        self.number, self.sentence = number, os.strerror(number)
        self.what = f"{errno.errorcode[number]} at a file operation"

    def strike(self, path: str) -> None:
        raise OSError(self.number, self.sentence, path)


class LimitFiles(Disturbance):
    """No file can grow beyond a size: the write at that byte fails, in whatever library it is."""

    what, exit_code, sentence = "a write fails at a random byte (file size limit)", 2, os.strerror(errno.EFBIG)

    def __init__(self, largest: int) -> None:
        self.largest = largest  # bytes of a file of an undisturbed run

    def before(self, folder: Path, rng: np.random.Generator) -> None:
        self.limit = int(np.exp(rng.uniform(0, np.log(4 * self.largest))))  # as often small as large

    def inside(self, folder: Path) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.RLIM_INFINITY))


class FullDisk(Disturbance):
    """A disk of the folder's own (tmpfs), full at a random byte."""

    what, exit_code, sentence = "a disk full at a random byte (tmpfs)", 2, os.strerror(errno.ENOSPC)

    def __init__(self, size: int) -> None:
        self.size = size  # bytes of an undisturbed run

    def before(self, folder: Path, rng: np.random.Generator) -> None:
        used = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        size = int(rng.uniform(used, 3 * self.size))
        remount = ["-o", f"remount,size={size}"] if folder.is_mount() else ["-o", f"size={size}"]
        subprocess.run(["mount", "-t", "tmpfs", *remount, "tmpfs", folder], check=True, capture_output=True)

    def inside(self, folder: Path) -> None:
        shutil.disk_usage = lambda _: SimpleNamespace(free=sys.maxsize)  # at the start; others' files fill it later

    def after(self, folder: Path) -> None:
        subprocess.run(["umount", folder], check=True)


def _changes(event: str, arguments: tuple, folder: Path) -> bool:
    """Does an operation change something below a folder?"""
    path = arguments[0]
    if not isinstance(path, str | os.PathLike) or not os.path.abspath(path).startswith(f"{folder}/"):
        return False
    return event != "open" or bool(set(str(arguments[1])) & set("wax+"))


def disturb(victim: Victim, disturbance: Disturbance, repeats: int, seed: int, folder: Path) -> Row:
    """Disturb a script until it gets through, again and again."""
    row, rng = Row(victim.script, disturbance.what), np.random.default_rng(seed)
    bar = tqdm(total=repeats, desc=f"{victim.script}: {disturbance.what}")
    while row.times < repeats:
        folder.mkdir()
        while not row.losses:
            disturbance.before(folder, rng)
            process, pipe = victim.start(folder, disturbance)
            disturbance.outside(process)
            process.join()
            said, exit_code = read_all(pipe), process.exitcode
            if exit_code == 0:
                row.losses = compare(victim, folder)
                break
            row.times += 1
            bar.update()
            row.stages[stage_of(victim.script, said)] += 1
            last = said.rstrip().rpartition("\n")[2]
            wordless = exit_code == 2 and (disturbance.sentence not in last or "Traceback" in said)
            if exit_code != disturbance.exit_code or wordless:
                row.losses.append(f"left with {exit_code}: {said[-1000:]}")
        disturbance.after(folder)
        shutil.rmtree(folder)
        if row.losses:
            break
    return row


def twice_at_once(victim: Victim, repeats: int, seed: int, folder: Path) -> Row:
    """Start a second run while the first one is at work."""
    row, rng = Row(victim.script, "two runs at once"), np.random.default_rng(seed)
    for _ in tqdm(range(repeats), f"{victim.script}: {row.what}"):
        folder.mkdir()
        (first, first_said), moment = victim.start(folder, Disturbance()), rng.uniform(0, 0.8 * victim.seconds)
        first.join(moment)
        second, second_said = victim.start(folder, Disturbance())
        second.join()
        first.join()
        row.times += 1
        said, second_said = read_all(first_said), read_all(second_said)
        if first.exitcode != 0:
            row.losses.append(f"the first left with {first.exitcode}: {said[-1000:]}")
        if second.exitcode not in (0, 2) or (second.exitcode == 2 and "in use by another process" not in second_said):
            row.losses.append(f"the second left with {second.exitcode}: {second_said[-1000:]}")
        row.losses += compare(victim, folder)
        shutil.rmtree(folder)
        if row.losses:
            break
    return row


def compare(victim: Victim, folder: Path) -> list[str]:
    """Files that are not what the undisturbed run left, in words."""
    have = contents(folder)
    names = sorted(have.keys() | victim.truth.keys())
    return [f"{name} is another" for name in names if have.get(name) != victim.truth.get(name)]


def stage_of(script: str, said: str) -> str:
    """The innermost known stage of the stack that was written last; "" where there is none."""
    functions = re.findall(r'^  File ".*", line \d+ in (\w+)$', said, re.MULTILINE)
    return next((STAGES[script][name] for name in functions if name in STAGES[script]), "between")


def torture(config: Config, folder: Path) -> list[Row]:
    """All disturbances of both scripts in a new folder, some at a time."""
    check_constants(config)
    torch.set_num_threads(1)
    importlib.import_module("mediapipe.python.solutions.face_mesh")  # what takes long, so that a life need not do it
    sync_mel(np.zeros(AUDIO_SAMPLE_RATE, np.float32))
    build_unet(MODELS, seed=0, positional_encoding=True)
    prepared = undisturbed("datasets_process.py", prepare, folder / "prepared")
    trained = undisturbed("musetalk_trainer.py", partial(train, folder / "prepared/data/cache"), folder / "trained")
    mountable = can_mount(folder)
    of_each = jobs_of(prepared, config, mountable), jobs_of(trained, config, mountable)
    jobs = [job for pair in zip(*of_each, strict=True) for job in pair]
    with ProcessPoolExecutor(os.cpu_count(), FORK) as pool:
        running = [pool.submit(job, config.seed + k, folder / str(k)) for k, job in enumerate(jobs)]
        for row in running:
            tqdm.write(str(row.result()))
        return [row.result() for row in running]


def jobs_of(victim: Victim, config: Config, mountable: bool) -> Iterator[Callable[[int, Path], Row]]:
    """All that is done to one script, each in a folder of its own and with a seed of its own."""
    sizes = [len(content) for content in victim.truth.values()]
    yield partial(disturb, victim, KillAnyTime(victim.seconds), config.kills)
    yield partial(disturb, victim, KillAtWrite(), config.kills)
    yield partial(disturb, victim, RefuseWrite(errno.EACCES), config.faults)
    yield partial(disturb, victim, RefuseWrite(errno.ENOSPC), config.faults)
    yield partial(disturb, victim, LimitFiles(max(sizes)), config.faults)
    if mountable:
        yield partial(disturb, victim, FullDisk(sum(sizes)), config.faults)
    yield partial(twice_at_once, victim, config.faults)


def can_mount(folder: Path) -> bool:
    """May this user make a file system? Root outside of most containers may."""
    probe = folder / "probe"
    probe.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", probe], capture_output=True).returncode == 0
    if mounted:
        subprocess.run(["umount", probe], check=True)
    return mounted


def table(rows: list[Row]) -> str:
    """Rows for people, in Markdown, and below them where kills struck."""
    lines = ["| script | what was done | times | lost |", "|---|---|---|---|"]
    lines += [f"| `{row.script}` | {row.what} | {row.times} | {len(row.losses) or 'nothing'} |" for row in rows]
    for row in rows:
        if row.stages.total() > row.stages["between"]:
            lines.append(
                f"\n{row.script}, {row.what}, by stage: " + ", ".join(f"{s} {n}" for s, n in row.stages.most_common())
            )
        lines += [f"\n{row.script}, {row.what}: {loss}" for loss in row.losses]
    return "\n".join(lines)


def main(config: Config) -> None:
    """Print the table. Raises UserError where something was lost."""
    with tempfile.TemporaryDirectory() as folder:
        rows = torture(config, Path(folder).resolve())
    print(table(rows))
    if any(row.losses for row in rows):
        raise UserError("something was lost or left without a sentence: see above")


if __name__ == "__main__":
    run_script(main, tyro.cli(Config, description=__doc__))
