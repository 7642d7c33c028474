"""The scripts under test: how they are run in a process of their own, and the files they must write."""

from __future__ import annotations

import faulthandler
import fcntl
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

import datasets_process
import musetalk.data.crop
import musetalk_trainer
from musetalk.cli import run_script
from musetalk.contract import AUDIO_SAMPLE_RATE, SAMPLES_PER_FRAME
from musetalk.data.video import read_audio, read_frames, write_video
from musetalk.errors import UserError
from tools.torture.faults import Fault

MODELS = Path(__file__).parents[2] / "models" / "mini"
SAMPLE = Path(__file__).parents[2] / "sample"
CLIPS = ("s1_bbbs4n", "s1_bbie9s")  # of the small sample
SAMPLE_FRAMES, CLIP_FRAMES = 14, 8  # of each, and of its parts
NOT_COMPARED = re.compile(r"\.lock|trainer\.log|events\.out\..*")  # empty files, and files with timestamps
PIPE_BYTES = 1 << 20
FORK = get_context("fork")  # runs start from this process, without importing everything again
# Functions in which a script can be killed -> stage in the report.
STAGES = {
    "datasets_process.py": {
        "load_models": "load",
        "read_audio": "audio",
        "audio_features": "audio",
        "sync_mel": "audio",
        "detect": "find faces",
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


def cut_sample(folder: Path) -> None:
    """Writes the beginnings of two clips of the built-in sample, which show one identity."""
    folder.mkdir()
    shutil.copy(SAMPLE / "identities.json", folder)
    for name in CLIPS:
        source = SAMPLE / f"{name}.mp4"
        audio = read_audio(source)[: SAMPLE_FRAMES * SAMPLES_PER_FRAME]
        write_video(folder / source.name, read_frames(source, 0, SAMPLE_FRAMES), audio, AUDIO_SAMPLE_RATE)


def prepare(videos: Path) -> None:
    """Runs datasets_process.py on the small sample."""
    datasets_process.MAX_CLIP_FRAMES = musetalk.data.crop.MAX_CLIP_FRAMES = CLIP_FRAMES
    run_script(datasets_process.main, datasets_process.PrepareConfig(hdtf_dir=videos, models_dir=MODELS, num_workers=1))


def train(cache: Path) -> None:
    """Runs a few steps of musetalk_trainer.py with the preset demo."""
    config = replace(
        musetalk_trainer.PRESETS["demo"],
        hdtf_samples_dir=cache,
        held_out_identities=(f"{CLIPS[1]}-0000",),
        models_dir=MODELS,
        start_from="",
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


def compare(script: Script, folder: Path) -> list[str]:
    """Descriptions of the files that differ from those of the run without faults."""
    found = contents(folder)
    names = sorted(found.keys() | script.expected.keys())
    return [f"{name} differs" for name in names if found.get(name) != script.expected.get(name)]


def stage_of(script: str, output: str) -> str:
    """The innermost known stage of the stack in the output; "between" if there is none."""
    functions = re.findall(r'^  File ".*", line \d+ in (\w+)$', output, re.MULTILINE)
    return next((STAGES[script][name] for name in functions if name in STAGES[script]), "between")
