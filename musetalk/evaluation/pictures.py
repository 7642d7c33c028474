"""The pictures of a validation and of a training: generated faces, and their mouth openings over time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from musetalk.contract import MASK_TOP
from musetalk.data.dataset import FaceDataset
from musetalk.evaluation.metrics import Faces
from musetalk.evaluation.windows import Window
from musetalk.inference.pipeline import LipSyncPipeline

GRID_ROWS = 6  # frames in a sample grid
MOMENTS = 8  # frames of a window in the image


@dataclass(frozen=True)
class ClipResult:
    """The images generated for a window of F frames from different inputs.

    The inputs are "prediction" (its own audio, closed reference), "other audio", "other reference" and "silence".
    """

    window: Window
    truth: np.ndarray  # BGR uint8 (F, 256, 256, 3)
    faces: dict[str, Faces]  # by input
    target_openings: np.ndarray  # (F,), true mouth openings for the other audio


def draw_faces(results: Sequence[ClipResult]) -> np.ndarray:
    """Frames of each result, BGR uint8: a row of the truth, then a row for each input."""
    rows = []
    for result in results:
        moments = np.linspace(0, len(result.truth) - 1, MOMENTS).astype(int)
        rows += [
            np.hstack(list(images[moments]))
            for images in (result.truth, *(faces.images for faces in result.faces.values()))
        ]
    return np.vstack(rows)


def draw_curves(results: Sequence[ClipResult]) -> np.ndarray:
    """Mouth openings over time, BGR uint8, a row for each result: own audio on the left, other audio on the right."""
    figure = Figure(figsize=(12, 2.2 * len(results)), layout="constrained")
    axes = figure.subplots(len(results), 2, squeeze=False)
    for result, (left, right) in zip(results, axes, strict=True):
        left.plot(result.window.openings, color="black", label="true mouth")
        left.plot(result.faces["prediction"].openings, label="prediction")
        left.plot(result.faces["silence"].openings, linewidth=0.8, label="silence")
        left.set_title(result.window.clip.name, fontsize=8)
        right.plot(result.target_openings, color="black", label="true mouth of that audio")
        right.plot(result.faces["other audio"].openings, label="prediction")
        right.plot(result.window.openings, color="grey", linewidth=0.8, label="true mouth of the video")
    for axis in axes.flat:
        axis.set_ylabel("mouth opening", fontsize=7)
        axis.tick_params(labelsize=7)
    for axis in axes[0]:
        axis.legend(fontsize=7, loc="upper right")
    axes[-1][0].set_xlabel("frame", fontsize=7)
    return rendered(figure)


def draw_grid(pipeline: LipSyncPipeline, dataset: FaceDataset) -> np.ndarray:
    """A row of masked | reference | prediction | truth for each of the same few samples, BGR uint8."""
    rows = []
    for slot in range(GRID_ROWS):
        sample = dataset.draw(0, slot)
        item = dataset.read(sample)
        truth = item["target_image"][0].numpy()
        masked = truth.copy()
        masked[MASK_TOP:] = 0
        reference = dataset.cache.clips[sample.clip].image(sample.references[0], sample.reference_variants[0])
        names = ("masked_latents", "reference_latents", "audio_window")
        prediction = pipeline.generate(*(item[name].numpy() for name in names))[0]
        rows.append(np.hstack([masked, reference, prediction, truth]))
    return np.vstack(rows)


def rendered(figure: Figure) -> np.ndarray:
    """Renders a figure to an image, BGR uint8 (H, W, 3)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., 2::-1].copy()
