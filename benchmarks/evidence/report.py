"""The report of the trainings that are done: tables, faces and curves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from matplotlib.figure import Figure

from benchmarks import ROOT
from benchmarks.evidence.pieces import Piece
from benchmarks.evidence.recipes import (
    DISCRIMINATOR_WIDTH,
    FRAMES,
    FURTHER_STEPS,
    MATERIALS,
    MEASURING_EXPERT,
    PIXEL_EVERY,
    RECIPES,
    SEEDS,
    STEPS,
    TRAINING_EXPERT,
)
from musetalk.files import atomic_write_bytes, read_json
from musetalk.training.log import rendered

FOLDER = ROOT / "benchmarks/evidence"
ACROSS = 3  # plots beside each other

Results = dict[str, list[dict]]  # of each recipe's seeds: {"figures", "openings"}


@dataclass(frozen=True)
class Measure:
    """A column: what is taken of a training's figures, and the value that is best."""

    name: str
    about: str
    take: Callable[[dict[str, float]], float]
    best: float


MEASURES = (
    Measure("lmd", "distance of the lips from the true ones, in distances of the eyes", lambda f: f["lmd"], 0),
    Measure("r own", "correlation of the mouth's opening with the true one", lambda f: f["r_own_audio"], 1),
    Measure("r other", "the same with the audio of another clip and its mouth", lambda f: f["r_other_audio"], 1),
    Measure("r unheard", "then with the video's own mouth, whose audio is not given", lambda f: f["r_source_audio"], 0),
    Measure("reference", "share of the mouth of another reference that shows", lambda f: f["reference_share"], 0),
    Measure("jitter", "second difference of the lips over the truth's", lambda f: f["jitter"] / f["jitter_truth"], 1),
    Measure(
        "silence",
        "how much further open than closed without a sound, in mean openings",
        lambda f: (f["opening_in_silence"] - f["opening_closed"]) / f["opening_mean"],
        0,
    ),
    Measure(
        "sync",
        "confidence of the measuring expert, over its confidence in the truth",
        lambda f: f["sync_confidence"] / f["sync_confidence_truth"],
        1,
    ),
    Measure("offset", "frames, by the measuring expert", lambda f: f["sync_offset"], 0),
    Measure("PSNR", "of the mouth, dB", lambda f: f["psnr_mouth"], np.inf),
    Measure("SSIM", "of the mouth", lambda f: f["ssim_mouth"], 1),
)
HEAD = f"""\
# What helps

Written by `make evidence`; [README.md](README.md) says how it is measured. Small networks (`models/mini`), LPIPS
at 0 in all recipes since its weights were not there, discriminators with {DISCRIMINATOR_WIDTH} channels instead of 64.
A step has {FRAMES} frames, or four times as many where it has four windows. An untrained UNet makes {STEPS} steps, with
losses on images in every {PIXEL_EVERY}th; a trained one another {FURTHER_STEPS}, with losses on images in each.

A cell is the mean over the seeds and, after ±, half of the way from the lowest to the highest. **Bold** is better with
each seed than the baseline with any, *italic* worse in the same way; what is plain is within the spread.

| measure | what it is | best |
|---|---|---|
"""


def write_report() -> Path:
    """Write all anew from what is in results/. Returns where it is."""
    text = HEAD + "\n".join(f"| {one.name} | {one.about} | {one.best:g} |" for one in MEASURES) + "\n"
    for name, material in MATERIALS.items():
        found = {recipe: results_of(name, recipe) for recipe in material.recipes}
        found = {recipe: results for recipe, results in found.items() if results}
        text += f"\n## {name}\n\n{material.about}\n\n{experts(name)}"
        if found:
            atomic_write_bytes(FOLDER / f"{name}.png", cv2.imencode(".png", draw_openings(found))[1].tobytes())
            text += f"\n{table(found)}\n{faces(name, found)}\n![openings of mouths]({name}.png)\n"
    path = FOLDER / "results.md"
    atomic_write_bytes(path, text.encode())
    return path


def results_of(material: str, recipe: str) -> list[dict]:
    """What came of a recipe, of each seed that is done."""
    paths = [Piece("measurement", (material, recipe, str(seed))).result for seed in SEEDS]
    return [read_json(path) for path in paths if path.exists()]


def experts(material: str) -> str:
    """What the sync experts are worth."""
    lines = ""
    for what, seed in (("trains", TRAINING_EXPERT), ("measures", MEASURING_EXPERT)):
        path = Piece("expert", (material, str(seed))).result
        if path.exists():
            found = read_json(path)
            verdict = "refused, so there is no recipe with a sync loss" if found["fault"] else "good enough"
            lines += (
                f"- The sync expert that {what}, on the clips held out: accuracy {found['accuracy']:.2f}, best with "
                f"audio {found['offset']:+d} frames later, confidence {found['confidence']:.2f}: {verdict}.\n"
            )
    return lines


def table(found: Results) -> str:
    """A row for each recipe, a column for each measure that could be taken; then what the recipes are."""
    columns = [
        measure for measure in MEASURES if any(np.isfinite(values(found[recipe], measure)).all() for recipe in found)
    ]
    lines = [
        "| recipe | seeds | " + " | ".join(measure.name for measure in columns) + " |",
        "|---" * (2 + len(columns)) + "|",
    ]
    for recipe, results in found.items():
        baseline = found.get(RECIPES[recipe].baseline, [])
        cells = [cell(values(results, measure), values(baseline, measure), measure) for measure in columns]
        lines.append(f"| {recipe} | {len(results)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n\n" + "".join(map(described, found))


def described(recipe: str) -> str:
    """What a recipe is, and what it is held against."""
    plan = RECIPES[recipe]
    words = [plan.about] + [f"goes on from `{plan.after}`"] * bool(plan.after)
    words += [f"held against `{plan.baseline}`"] * (plan.baseline != recipe)
    return f"- `{recipe}`: {'; '.join(words)}.\n"


def values(results: list[dict], measure: Measure) -> np.ndarray:
    """A measure with each seed, nan where it could not be taken."""
    return np.array([measure.take(defaultdict(lambda: np.nan, result["figures"])) for result in results])


def cell(here: np.ndarray, baseline: np.ndarray, measure: Measure) -> str:
    """Mean and spread, marked where they are clearly better or worse than the baseline's."""
    text = f"{here.mean():.3g} ± {np.ptp(here) / 2:.2g}"
    if len(here) < len(SEEDS) or len(baseline) < len(SEEDS):
        return text
    # Of a measure without a best value, as PSNR, more is better.
    mine, theirs = (-one if np.isinf(measure.best) else np.abs(one - measure.best) for one in (here, baseline))
    if mine.max() < theirs.min():
        return f"**{text}**"
    return f"*{text}*" if mine.min() > theirs.max() else text


def faces(material: str, found: Results) -> str:
    """The same moments by each recipe with the first seed."""
    rows = {"truth": f"results/truth-{material}.jpg"}
    for recipe in found:
        path = Piece("measurement", (material, recipe, str(SEEDS[0]))).result.with_suffix(".jpg")
        rows[recipe] = path.relative_to(FOLDER).as_posix()
    lines = ["Clips held out, mouths that are closed, half open and open:", "", "| | |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | ![{name}]({path}) |" for name, path in rows.items()]) + "\n"


def draw_openings(found: Results) -> np.ndarray:
    """Openings of the mouth of the first clip held out with its own audio, true and by each recipe. BGR uint8."""
    rows = -(-len(found) // ACROSS)
    figure = Figure(figsize=(4 * ACROSS, 2 * rows), layout="constrained")
    for place, (recipe, results) in enumerate(found.items(), 1):
        axis, seen = figure.add_subplot(rows, ACROSS, place), [result["openings"][0] for result in results]
        axis.plot(seen[0]["truth"], color="black", label="true")
        for seed, one in zip(SEEDS, seen, strict=False):
            axis.plot(one["prediction"], linewidth=0.8, label=f"seed {seed}")
        axis.set_title(f"{recipe}: {seen[0]['clip']}", fontsize=8)
        axis.tick_params(labelsize=7)
    figure.axes[0].legend(fontsize=7)
    figure.axes[0].set_ylabel("mouth opening", fontsize=7)
    figure.axes[0].set_xlabel("frame", fontsize=7)
    return rendered(figure)
