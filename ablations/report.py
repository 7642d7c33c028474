"""Writes the report of the finished trainings: tables, faces and curves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from matplotlib.figure import Figure

from ablations.recipes import (
    CLOSE,
    CURVE_STEPS,
    DISCRIMINATOR_WIDTH,
    FURTHER_STEPS,
    MATERIALS,
    RECIPES,
    SEEDS,
)
from ablations.tasks import WORK, Task, cache_task
from musetalk.evaluation.pictures import rendered
from musetalk.files import atomic_write_bytes, read_json
from tools.make_mini.unet import SMALL

ACROSS = 3  # plots in a row

Results = dict[str, list[dict]]  # recipe -> for each seed {"figures", "openings"}


@dataclass(frozen=True)
class Measure:
    """A column of the table: a metric computed from the figures of a training, and its best value."""

    name: str
    about: str
    take: Callable[[dict[str, float]], float]
    best: float


MEASURES = (
    Measure("r own", "correlation of the mouth openings with the true ones", lambda f: f["r_own_audio"], 1),
    Measure("r other", "with the audio of another clip: with its openings", lambda f: f["r_other_audio"], 1),
    Measure("r source", "with the same audio: with the openings of the source", lambda f: f["r_source_audio"], 0),
    Measure("closures", "share of the true closed frames that are closed within a frame", lambda f: f["closures"], 1),
    Measure("lmd", "mouth landmark distance, relative to copying's", lambda f: f["lmd"] / f["lmd_reference"], 0),
    Measure("reference", "share of another reference's opening that is copied", lambda f: f["reference_share"], 0),
    Measure("jitter", "second difference of the lips over the truth's", lambda f: f["jitter"] / f["jitter_truth"], 1),
    Measure(
        "silence",
        "opening in silence minus that of a closed mouth, relative to the mean opening",
        lambda f: (f["opening_in_silence"] - f["opening_in_silence_reference"]) / f["opening_truth"],
        0,
    ),
    Measure(
        "sharpness", "of the mouth over the truth's", lambda f: f["sharpness_mouth"] / f["sharpness_mouth_truth"], 1
    ),
    Measure(
        "sync",
        "sync confidence by the measuring expert, relative to the truth",
        lambda f: f["sync_confidence"] / f["sync_confidence_truth"],
        1,
    ),
    Measure("PSNR", "of the mouth, dB", lambda f: f["psnr_mouth"], np.inf),
)
HEAD = f"""\
# Ablations, without LPIPS and VGG terms

Written by `make ablations`; docs/ablations.md describes the measurements. All recipes use the small networks
(`models/mini`), discriminators with {DISCRIMINATOR_WIDTH} channels instead of 64, and no LPIPS, whose weights were not
available. A step has {SMALL["batch_size"]} frames. Image losses are in every {SMALL["pixel_every"]}th step of an
untrained UNet; a trained one trains for another {FURTHER_STEPS} steps with image losses in every second.

A cell is the mean over the seeds ± half of the range. There are {len(SEEDS)} seeds where r other differs by less than
{CLOSE} from the baseline's, else one. **Bold**: better with every seed than the baseline with any; *italic*: worse with
every seed; plain: within the spread, or the baseline has one seed.

| metric | definition | best |
|---|---|---|
"""


def write_report() -> Path:
    """Writes the report of all results and returns its path."""
    text = HEAD + "\n".join(f"| {measure.name} | {measure.about} | {measure.best:g} |" for measure in MEASURES) + "\n"
    for name, material in MATERIALS.items():
        tasks = {recipe: measured(name, recipe) for recipe in material.recipes}
        results = {recipe: [read_json(task.result) for task in seeds] for recipe, seeds in tasks.items() if seeds}
        text += f"\n## {name}\n\n{material.about} {material.num_steps} steps.\n\n{experts(name)}"
        if "stage1" in results:  # the baseline of most recipes
            for kind, picture in (("openings", draw_openings(results)), ("curves", draw_learning(name, results))):
                atomic_write_bytes(WORK / f"{name}-{kind}.png", cv2.imencode(".png", picture)[1].tobytes())
            text += f"\n{table(results)}\n{faces(name, results)}\n"
            text += f"![mouth openings]({name}-openings.png)\n\n![learning curves]({name}-curves.png)\n"
    path = WORK / "report.md"
    atomic_write_bytes(path, text.encode())
    return path


def measured(material: str, recipe: str) -> list[Task]:
    """The finished measurements of a recipe, one for each seed."""
    tasks = [Task("measurement", (material, recipe, str(seed))) for seed in SEEDS]
    return [task for task in tasks if task.done]


def experts(material: str) -> str:
    """The checks of the sync experts."""
    lines = ""
    for architecture, minutes, seed in MATERIALS[material].experts:
        task = Task("expert", (material, architecture, minutes, seed))
        if task.done:
            check = read_json(task.result)
            video = f"{minutes} minutes" if int(minutes) else "all video"
            lines += (
                f"- Sync expert {architecture} trained on {video}, on the held-out clips: accuracy "
                f"{check['accuracy']:.2f}, audio offset {check['offset']:+d} frames, confidence "
                f"{check['confidence']:.2f}: {'refused' if check['fault'] else 'accepted'}.\n"
            )
    return lines


def table(results: Results) -> str:
    """A row for each recipe and a column for each available measure, followed by descriptions of the recipes."""
    columns = [
        measure for measure in MEASURES if any(np.isfinite(values(seeds, measure)).all() for seeds in results.values())
    ]
    lines = [
        "| recipe | seeds | " + " | ".join(measure.name for measure in columns) + " |",
        "|---" * (2 + len(columns)) + "|",
    ]
    for recipe, seeds in results.items():
        baseline = results.get(RECIPES[recipe].baseline, [])
        cells = [cell(values(seeds, measure), values(baseline, measure), measure) for measure in columns]
        lines.append(f"| {recipe} | {len(seeds)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n\n" + "".join(map(describe, results))


def describe(recipe: str) -> str:
    """The description of a recipe, its start and its baseline."""
    plan = RECIPES[recipe]
    words = [plan.about] + [f"starts from `{plan.config.start_from}`"] * bool(plan.config.start_from)
    words += [f"compared with `{plan.baseline}`"] * (plan.baseline != recipe)
    return f"- `{recipe}`: {'; '.join(words)}.\n"


def values(results: list[dict], measure: Measure) -> np.ndarray:
    """A measure for each seed, nan if it is not available."""
    return np.array([measure.take(defaultdict(lambda: np.nan, result["figures"])) for result in results])


def cell(ours: np.ndarray, baseline: np.ndarray, measure: Measure) -> str:
    """Mean and spread, marked if better or worse than the baseline with every seed."""
    text = f"{ours.mean():.3g} ± {np.ptp(ours) / 2:.2g}"
    if len(ours) == 1:
        text = f"{ours[0]:.3g}"
    if len(baseline) < len(SEEDS):
        return text
    # An infinite best value, as of PSNR: higher is better.
    a, b = (-x if np.isinf(measure.best) else np.abs(x - measure.best) for x in (ours, baseline))
    if a.max() < b.min():
        return f"**{text}**"
    return f"*{text}*" if a.min() > b.max() else text


def faces(material: str, results: Results) -> str:
    """The same frames of the truth and as generated by each recipe, with its first seed."""
    folders = {recipe: measured(material, recipe)[0].folder.name for recipe in results}
    rows = {"truth": f"{next(iter(folders.values()))}/truth.jpg"}
    rows |= {recipe: f"{folder}/prediction.jpg" for recipe, folder in folders.items()}
    lines = ["Held-out clips with a closed, a half-open and an open mouth:", "", "| | |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | ![{name}]({path}) |" for name, path in rows.items()]) + "\n"


def draw_openings(results: Results) -> np.ndarray:
    """Plots the true and generated mouth openings of the first held-out clip for each recipe. BGR uint8."""
    rows = -(-len(results) // ACROSS)
    figure = Figure(figsize=(4 * ACROSS, 2 * rows), layout="constrained")
    for index, (recipe, seeds) in enumerate(results.items(), 1):
        axis, openings = figure.add_subplot(rows, ACROSS, index), [result["openings"][0] for result in seeds]
        axis.plot(openings[0]["truth"], color="black", label="true")
        for seed, series in zip(SEEDS, openings, strict=False):
            axis.plot(series["prediction"], linewidth=0.8, label=f"seed {seed}")
        axis.set_title(f"{recipe}: {openings[0]['clip']}", fontsize=8)
        axis.tick_params(labelsize=7)
    figure.axes[0].legend(fontsize=7)
    figure.axes[0].set_ylabel("mouth opening", fontsize=7)
    figure.axes[0].set_xlabel("frame", fontsize=7)
    return rendered(figure)


def draw_learning(material: str, results: Results) -> np.ndarray:
    """Plots r over the minutes of video and over the steps of recipe stage1, with the first seed. BGR uint8."""
    plan = MATERIALS[material]
    minutes = {name: RECIPES[name].minutes for name in results if RECIPES[name].minutes in plan.minutes}
    cache = read_json(cache_task(material, "stage1").result)
    curves = {
        "minutes of video": [(minutes[name], results[name][0]) for name in minutes]
        + [(cache["minutes"], results["stage1"][0])],
        "steps": [
            (step, read_json(task.result))
            for step in CURVE_STEPS
            if (task := Task("measurement", (material, "stage1", str(SEEDS[0]), str(step)))).done
        ]
        + [(plan.num_steps, results["stage1"][0])],
    }
    figure = Figure(figsize=(8, 3), layout="constrained")
    for axes, (name, points) in zip(figure.subplots(1, 2, sharey=True), curves.items(), strict=True):
        for key, label in (("r_own_audio", "own audio"), ("r_other_audio", "another clip's"), ("chance", "chance")):
            axes.plot(
                *zip(*[(x, result["figures"][key]) for x, result in points], strict=True), marker="o", label=label
            )
        axes.set(xlabel=name, xscale="log")
        axes.legend(fontsize=7)
    figure.axes[0].set_ylabel("r")
    return rendered(figure)
