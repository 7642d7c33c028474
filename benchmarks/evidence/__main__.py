"""Runs the ablations of the training recipe.

    python -m benchmarks.evidence                               all unfinished tasks, then the report
    python -m benchmarks.evidence measurement sample stage1 1   a single task

Takes hours, in tasks of at most ten minutes, one per core at a time. Stop it at any time and run it again to resume:
the result of each task is kept in results/. results.md is the report of all results.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Annotated

import tyro
from tqdm import tqdm

from benchmarks import ROOT
from benchmarks.evidence.pieces import KINDS, WORK, Piece
from benchmarks.evidence.recipes import MATERIALS, SEEDS
from benchmarks.evidence.report import write_report
from musetalk.cli import run_script
from musetalk.errors import UserError

MAX_SECONDS = 570  # of a process, which then saves its state; the next one resumes


@dataclass
class EvidenceConfig:
    """The task to run; by default all."""

    piece: Annotated[tuple[str, ...], tyro.conf.Positional] = ()  # its kind and arguments


def main(config: EvidenceConfig) -> None:
    """Runs a task, or all unfinished ones."""
    if config.piece:
        kind, *subject = config.piece
        if kind not in KINDS:
            raise UserError(f"the kind of a task must be one of {', '.join(KINDS)}, not {kind!r}")
        Piece(kind, tuple(subject)).finish()
        return
    for name, material in MATERIALS.items():
        if not material.available:
            print(f"{name}: skipped, because {material.videos} does not exist")
    pending, locks = measurements(), {}
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=len(pending), unit="recipe") as bar:
            for piece in pool.map(partial(work, locks=locks), pending):
                bar.set_postfix_str(piece.name)
                bar.update()
    finally:
        print(f"wrote {write_report()}")


def measurements() -> list[Piece]:
    """The unfinished measurements, seed by seed."""
    pieces = [
        Piece("measurement", (name, recipe, str(seed)))
        for seed in SEEDS
        for name, material in MATERIALS.items()
        for recipe in material.recipes
        if material.available
    ]
    return [piece for piece in pieces if not piece.done and not piece.ruled_out]


def work(piece: Piece, locks: dict[str, Lock]) -> Piece:
    """Runs a task and its dependencies, each in its own process. Raises UserError if one fails."""
    with locks.setdefault(piece.name, Lock()):  # other threads that depend on it wait
        for dependency in [] if piece.done else piece.needs:
            work(dependency, locks)
        while not piece.done and not piece.ruled_out:
            run(piece)
    return piece


def run(piece: Piece) -> None:
    """Runs a task; if it can be resumed, for at most `MAX_SECONDS`."""
    log = WORK / f"{piece.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.evidence", piece.kind, *piece.subject]
    with open(log, "a") as file:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
        try:
            code = process.wait(MAX_SECONDS if piece.resumable else None)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
            return
    if code:
        raise UserError(f"the task {piece.name} failed; see {log}")


if __name__ == "__main__":
    run_script(main, tyro.cli(EvidenceConfig, description=__doc__))
