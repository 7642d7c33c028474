"""Evaluates candidates on the clips of a cache: the same windows, measures and baselines for all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
import torch
from tqdm import tqdm

from musetalk.data.cache import Clip
from musetalk.evaluation.candidates import OTHER, OWN, SILENCE, Candidate
from musetalk.evaluation.comparison import COPYING, CROSS, RECONSTRUCTION, SILENT, TRUTH, Comparison
from musetalk.evaluation.frechet_distance import MIN_FRAMES, frechet_distance
from musetalk.evaluation.measures import BATCH, Measures, aspect_ratios, chance_level
from musetalk.evaluation.metrics import Faces, correlation, finite_mean, lip_leak
from musetalk.evaluation.validation import SHIFTS
from musetalk.evaluation.windows import MIN_FRAMES as MIN_WINDOW
from musetalk.evaluation.windows import Window, true_openings
from musetalk.images import to_tensor
from musetalk.models.inception import Inception

MOMENTS = 8  # frames of a clip in the picture
SIDE = 128  # pixels of a face in the picture

Rows = dict[str, dict[str, float]]  # by protocol and row


@dataclass
class Evaluator:
    """Evaluates candidates on windows of clips. Frame k of window i speaks the audio of frame k of `others[i]`."""

    windows: list[Window]
    others: list[Clip | None]
    candidates: Sequence[Candidate]
    measures: Measures
    inception: Inception | None = None
    features: dict[str, list[np.ndarray]] = field(default_factory=dict, init=False)  # of Inception, by column
    strips: dict[str, list[np.ndarray]] = field(default_factory=dict, init=False)  # faces of each clip, by column

    def __call__(self, notes: Sequence[str] = ()) -> Comparison:
        """Measures all candidates. notes: for the reader of the result."""
        columns = [TRUTH, COPYING, *(candidate.name for candidate in self.candidates)]
        clips = [window.clip for window in self.windows]
        comparison = Comparison([clip.name for clip in clips], [clip.identity for clip in clips], columns, [*notes])
        pairs = list(zip(self.windows, self.others, strict=True))
        for index, (window, other) in enumerate(tqdm(pairs, "evaluate", unit="clip")):
            for column, protocols in self._evaluate(window, other).items():
                for protocol, rows in protocols.items():
                    for row, value in rows.items():
                        comparison.store(protocol, row, column, index, value)
        self._add_fid(comparison)
        return comparison

    def _evaluate(self, window: Window, other: Clip | None) -> dict[str, Rows]:
        """The figures of a window by column."""
        truth = self.measures.detect(window.images())
        copied = self.measures.copied(window)
        columns = {
            TRUTH: self._rows(window, other and window.clip, {OWN: truth, OTHER: truth}, truth),
            COPYING: self._rows(window, other, {OWN: copied, OTHER: copied, SILENCE: copied}, truth),
        }
        columns[TRUTH].setdefault(CROSS, {})["chance"] = chance_level(window, self.windows)
        for candidate in self.candidates:
            images = candidate(window, other)
            faces = {kind: self.measures.detect(x) for kind, x in images.items()}
            columns[candidate.name] = self._rows(window, other, faces, truth)
            shown = faces.get(OWN) or faces.get(OTHER)
            self._keep(candidate.name, shown.images if shown else np.zeros_like(truth.images), OWN in faces)
        self._keep(TRUTH, truth.images, True)
        self._keep(COPYING, copied.images, True)
        return columns

    def _rows(self, window: Window, other: Clip | None, faces: dict[str, Faces], truth: Faces) -> Rows:
        """The figures of the faces of a window by what they speak. truth: the true faces."""
        rows: Rows = {}
        if own := faces.get(OWN):
            rows[RECONSTRUCTION] = self.measures(window, own, None if own is truth else truth)
            for shift in SHIFTS:
                if len(truth.images) >= shift + MIN_WINDOW:
                    r = correlation(own.openings[:-shift], window.openings[shift:])
                    rows[RECONSTRUCTION][f"r_shift_{shift}"] = r
        spoken = faces.get(OTHER)
        if spoken and other:
            rows[CROSS] = self.measures.any_audio(window, spoken, other)
            if spoken is not truth:
                target = openings_at(other, window.start, window.stop)
                rows[CROSS]["r_other_audio"] = correlation(spoken.openings, target)
        if silent := faces.get(SILENCE):
            leak = lip_leak(aspect_ratios(silent.found))
            rows[SILENT] = {"opening": finite_mean(silent.openings), "lip_leak": leak}
        return rows

    def _keep(self, column: str, images: np.ndarray, own: bool) -> None:
        """Keeps a strip of faces for the picture and, of faces that speak their own audio, the features for FID."""
        moments = np.linspace(0, len(images) - 1, MOMENTS).astype(int)
        strip = [cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA) for image in images[moments]]
        self.strips.setdefault(column, []).append(np.hstack(strip))
        if self.inception and own:
            with torch.no_grad():
                batches = to_tensor(images).split(BATCH)
                features = [self.inception(batch.to(self.measures.device)).double().cpu().numpy() for batch in batches]
            self.features.setdefault(column, []).extend(features)

    def _add_fid(self, comparison: Comparison) -> None:
        """Computes FID of all frames of each candidate, or notes why not."""
        if not self.inception:
            return
        features = {column: np.concatenate(batches) for column, batches in self.features.items()}
        count = len(features[TRUTH])
        if count < MIN_FRAMES:
            comparison.notes.append(f"not measured: fid; of fewer than {MIN_FRAMES} frames it is noise: {count}")
            return
        comparison.notes.append(f"fid: measured on {count} frames")
        for column, x in features.items():
            if column != TRUTH and len(x) == count:
                comparison.fid[column] = frechet_distance(x, features[TRUTH])

    def picture(self, comparison: Comparison) -> np.ndarray:
        """The median and the worst clip of the first candidate, with a row of each column.

        By LMD, or by r with another clip's audio if no video speaks its own. BGR uint8 (H, W, 3).
        """
        name, values = self.candidates[0].name, comparison.values
        badness = values.get(RECONSTRUCTION, {}).get("lmd", {}).get(name)
        if badness is None:
            badness = -values[CROSS]["r_other_audio"][name]
        order = np.argsort(badness)[: max(1, np.isfinite(badness).sum())]
        chosen = order[(len(order) - 1) // 2], order[-1]
        return np.vstack([self.strips[column][index] for index in chosen for column in comparison.columns])


def openings_at(clip: Clip, start: int, stop: int) -> np.ndarray:
    """True mouth openings in frames [start, stop) of a clip: (stop - start,), nan where a frame is not usable."""
    frames = np.arange(start, min(stop, len(clip)))
    frames = frames[clip.usable[frames]]
    openings = np.full(stop - start, math.nan)
    openings[frames - start] = true_openings(clip, frames)
    return openings
