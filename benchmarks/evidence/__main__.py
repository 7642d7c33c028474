"""Find out which part of the recipe helps.

    python -m benchmarks.evidence                               all that is not done yet, then the report
    python -m benchmarks.evidence measurement sample stage1 1   a piece of it alone

Takes hours, in pieces of at most ten minutes, as many at once as there are cores. Stop it when you like and run it
again to go on: what came of each piece is kept in results/. The report of all that is there is results.md.
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

MOST_SECONDS = 570  # of a process; then it saves its state, and the next one goes on


@dataclass
class EvidenceConfig:
    """A piece to do alone; none is all."""

    piece: Annotated[tuple[str, ...], tyro.conf.Positional] = ()  # its kind, and what it is done to


def main(config: EvidenceConfig) -> None:
    """Do a piece, or all that there is to do."""
    if config.piece:
        kind, *subject = config.piece
        if kind not in KINDS:
            raise UserError(f"there is no piece of the kind {kind!r}; there are {', '.join(KINDS)}")
        Piece(kind, tuple(subject)).finish()
        return
    for name, material in MATERIALS.items():
        if not material.there:
            print(f"{name}: {material.videos} is not there, so nothing new is tried on it")
    left, locks = measurements(), {}
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=len(left), unit="recipe") as bar:
            for piece in pool.map(partial(work, locks=locks), left):
                bar.set_postfix_str(piece.name)
                bar.update()
    finally:
        print(f"written: {write_report()}")


def measurements() -> list[Piece]:
    """Those that are not done yet, seed by seed."""
    pieces = [
        Piece("measurement", (name, recipe, str(seed)))
        for seed in SEEDS
        for name, material in MATERIALS.items()
        for recipe in material.recipes
        if material.there
    ]
    return [piece for piece in pieces if not piece.done and not piece.ruled_out]


def work(piece: Piece, locks: dict[str, Lock]) -> Piece:
    """Do a piece and what it needs, in processes of their own. Raises UserError where one fails."""
    with locks.setdefault(piece.name, Lock()):  # others that need it wait
        for needed in [] if piece.done else piece.needs:
            work(needed, locks)
        while not piece.done and not piece.ruled_out:
            run(piece)
    return piece


def run(piece: Piece) -> None:
    """Do a piece, for ten minutes at most where it can go on later."""
    log = WORK / f"{piece.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.evidence", piece.kind, *piece.subject]
    with open(log, "a") as told:
        alone = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, cwd=ROOT, env=alone, stdout=told, stderr=told)
        try:
            code = process.wait(MOST_SECONDS if piece.goes_on else None)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
            return
    if code:
        raise UserError(f"the piece {piece.name} failed; {log} says why")


if __name__ == "__main__":
    run_script(main, tyro.cli(EvidenceConfig, description=__doc__))
