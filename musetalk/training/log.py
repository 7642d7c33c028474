"""The log of a training run: lines of text, records of figures, images."""

from __future__ import annotations

import json
import math
import re
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from matplotlib.figure import Figure
from tqdm import tqdm

from musetalk.errors import UserError
from musetalk.evaluation.pictures import draw_curves, draw_faces, rendered
from musetalk.evaluation.validation import Validation
from musetalk.files import append_line, atomic_write_bytes

COMPARED = re.compile("_(truth|vae|reference|low|high|floor|ceiling)$")  # suffixes of the bounds of a figure
CURVES_ACROSS = 4  # plots in a row of curves.png
MARKED = 30  # series with fewer points have markers
BOUNDS = {"floor": "tab:green", "ceiling": "tab:red"}  # suffixes of bounds of the whole run -> colour of their line


class RunLog:
    """The log of one run.

    <log_dir>/trainer.log                   lines of all runs, with timestamps
    <log_dir>/<run>/stats.jsonl             one record per report: {"step": ..., name: value, ...}
    <log_dir>/<run>/events.out.tfevents.*   the same for TensorBoard, if that is the tracker
    <log_dir>/<run>/curves.png              all figures over the steps
    <log_dir>/<run>/<kind>/<step>.png       images; one kind is samples
    """

    def __init__(self, log_dir: Path, run: str, step: int, tracker: str = "tensorboard") -> None:
        """step: the step the run resumes at, 0 for a new run. tracker: see `start_tracker`.

        Records of later steps are dropped, and in a new run all of them.
        """
        self.lines = log_dir / "trainer.log"
        self.folder = log_dir / run
        self.stats = self.folder / "stats.jsonl"
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.stats.exists():
            lines = self.stats.read_text(encoding="utf-8", errors="replace").splitlines()
            kept = "".join(f"{line}\n" for line in lines if step and _step(line) <= step)
            atomic_write_bytes(self.stats, kept.encode())
        self.tracker = start_tracker(tracker, log_dir, run, step)

    def line(self, text: str) -> None:
        """Prints a line above any progress bar and appends it to trainer.log."""
        tqdm.write(text)
        append_line(self.lines, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")

    def record(self, step: int, values: dict[str, float]) -> None:
        """Logs the figures of a step as a line and as a record."""
        self.line(f"step {step}  " + "  ".join(f"{name} {value:.4g}" for name, value in values.items()))
        self.store(step, values)

    def store(self, step: int, values: dict[str, float]) -> None:
        """Logs the figures of a step as a record only, in stats.jsonl and the tracker."""
        append_line(self.stats, json.dumps({"step": step} | values))
        if self.tracker:
            self.tracker.log(values, step=step)

    def picture(self, step: int, image: np.ndarray, kind: str = "samples") -> Path:
        """Writes an image of a step, BGR uint8 (H, W, 3), and returns its path."""
        path = self.folder / kind / f"{step:07d}.png"
        atomic_write_bytes(path, cv2.imencode(".png", image)[1].tobytes())
        return path

    def validation(self, step: int, validation: Validation) -> None:
        """Logs the table, the figures and the pictures of a validation."""
        self.line(f"step {step}, on held-out clips\n{validation}")
        self.store(step, {f"val_{name}": value for name, value in validation.figures.items() if math.isfinite(value)})
        self.picture(step, draw_faces(validation.results), "validation")
        self.picture(step, draw_curves(validation.results), "mouths")
        self.curves()

    def curves(self) -> Path:
        """Plots all figures over the steps, a metric and its bounds in one plot, and returns the path of the image."""
        plots: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for line in self.stats.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            for name in record.keys() - {"step"}:
                plot = plots.setdefault(COMPARED.sub("", name), {})
                plot.setdefault(name, []).append((record["step"], record[name]))
        rows = -(-len(plots) // CURVES_ACROSS)
        figure = Figure(figsize=(4 * CURVES_ACROSS, 2 * rows), layout="constrained")
        for index, (title, series) in enumerate(sorted(plots.items()), 1):
            axis = figure.add_subplot(rows, CURVES_ACROSS, index)
            axis.set_title(title, fontsize=9)
            for name, points in sorted(series.items()):
                if bound := BOUNDS.get(name.rpartition("_")[2]):
                    axis.axhline(points[-1][1], color=bound, linestyle="--", label=name)
                else:
                    axis.plot(*zip(*points, strict=True), marker="." if len(points) < MARKED else "", label=name)
            if len(series) > 1:
                axis.legend(fontsize=7)
        path = self.folder / "curves.png"
        atomic_write_bytes(path, cv2.imencode(".png", rendered(figure))[1].tobytes())
        return path

    def close(self) -> None:
        """Ends the tracker's run, which uploads what is left."""
        if self.tracker:
            self.tracker.finish()


class SilentLog:
    """The log of the processes other than the first: does nothing."""

    def _nothing(self, *_: object, **__: object) -> None:
        pass

    line = record = store = picture = validation = curves = close = _nothing


def start_tracker(kind: str, log_dir: Path, run: str, step: int) -> GeneralTracker | None:
    """Starts accelerate's tracker "tensorboard", "wandb" or "trackio"; none for "none".

    step: the step the run resumes at. Raises UserError if its package is not installed.
    """
    if kind == "none":
        return None
    if find_spec(kind) is None:
        raise UserError(f"tracker = {kind!r} needs a package that is not installed; pip install {kind}")
    options: dict[str, dict[str, Any]] = {
        "tensorboard": {"logging_dir": log_dir, "purge_step": step + 1},
        "wandb": {"dir": log_dir / run},
        "trackio": {},
    }
    tracker = LOGGER_TYPE_TO_CLASS[kind](run, **options[kind])
    tracker.start()
    return tracker


def _step(line: str) -> float:
    """The step of a record; infinity for an invalid line, such as one truncated by a full disk."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return math.inf
    return step if isinstance(step, int | float) else math.inf
