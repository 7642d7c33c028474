"""What a training tells: lines to read, records to plot, pictures to see."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import cv2
import numpy as np
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from musetalk.files import append_line, write_whole


class RunLog:
    """The log of one run.

    <log_dir>/trainer.log                   lines of all runs, with the time
    <log_dir>/<run>/stats.jsonl             one record a report: {"step": ..., name: value, ...}
    <log_dir>/<run>/events.out.tfevents.*   the same for TensorBoard
    <log_dir>/<run>/samples/<step>.png      pictures
    """

    def __init__(self, log_dir: Path, run: str, step: int) -> None:
        """step: where the run goes on; records of later steps, which it will make again, are dropped."""
        self.lines = log_dir / "trainer.log"
        self.folder = log_dir / run
        self.stats = self.folder / "stats.jsonl"
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.stats.exists():
            lines = self.stats.read_text(encoding="utf-8", errors="replace").splitlines()
            write_whole(self.stats, "".join(f"{line}\n" for line in lines if _step(line) <= step).encode())
        self.board = SummaryWriter(self.folder, purge_step=step + 1)

    def line(self, text: str) -> None:
        """A line for people: on the screen, past any progress bar, and in the file."""
        tqdm.write(text)
        append_line(self.lines, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")

    def record(self, step: int, values: dict[str, float]) -> None:
        """Figures of a step, for people and for programs."""
        self.line(f"step {step}  " + "  ".join(f"{name} {value:.4g}" for name, value in values.items()))
        append_line(self.stats, json.dumps({"step": step} | values))
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        self.board.flush()

    def picture(self, step: int, image: np.ndarray) -> Path:
        """A picture of a step, BGR uint8 (H, W, 3). Returns where it is."""
        path = self.folder / "samples" / f"{step:07d}.png"
        write_whole(path, cv2.imencode(".png", image)[1].tobytes())
        return path


def _step(line: str) -> float:
    """The step of a record; infinity for a line that is none, such as one that a full disk cut off."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return math.inf
    return step if isinstance(step, int | float) else math.inf
