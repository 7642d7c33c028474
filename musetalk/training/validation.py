"""Validation of a UNet on held-out clips: metrics of its images, and probes of what its mouths follow.

Each metric is also computed for the truth (the true faces through the VAE, an upper bound) and for the reference (a
single true frame throughout, a lower bound). The probes measure whether the mouth follows the audio, as it should, or
the reference frame, and whether it is closed in silence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from matplotlib.figure import Figure

from musetalk.contract import MASK_TOP, SAMPLES_PER_FRAME
from musetalk.data.audio import audio_features, audio_windows
from musetalk.data.cache import Cache, CacheError, Clip
from musetalk.data.crop import crop_mouth, in_crop, mouth_box
from musetalk.data.dataset import FaceDataset, read_windows
from musetalk.data.face import load_face_backend
from musetalk.data.face.face import Face, FaceBackend
from musetalk.images import batched, to_tensor, to_uint8
from musetalk.inference.metrics import (
    correlation,
    detect_in_crops,
    finite_mean,
    mouth_jitter,
    mouth_landmark_distance,
    mouth_opening,
    psnr,
    ssim,
)
from musetalk.inference.pipeline import LipSyncPipeline
from musetalk.models.syncnet import SyncNet
from musetalk.training.log import RunLog, SilentLog, rendered
from musetalk.training.sync_check import offset_sweep, sync_confidence, sync_offset

BATCH = 8  # frames generated at once
MIN_FRAMES = 5  # of a window
GAP = 5  # frames between a window and its reference frames
GRID_ROWS = 6  # frames in a sample grid
MOMENTS = 8  # frames of a window in the image
COLUMNS = ("", "_truth", "_reference")  # suffixes of the names of a metric

Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Window:
    """Consecutive usable frames [start, stop) of a clip, and two reference frames outside: mouth closed and mouth open.

    openings: float (stop - start,), true mouth openings of the window.
    """

    clip: Clip
    start: int
    stop: int
    closed: int
    open: int
    openings: np.ndarray


@dataclass(frozen=True)
class ClipResult:
    """The images generated for a window of F frames from different inputs.

    The inputs are "prediction" (its own audio, closed reference), "other audio", "other reference" and "silence".
    """

    window: Window
    truth: np.ndarray  # BGR uint8 (F, 256, 256, 3)
    images: dict[str, np.ndarray]  # by input, BGR uint8 (F, 256, 256, 3)
    openings: dict[str, np.ndarray]  # by input, mouth openings (F,), nan where no face is detected
    target_openings: np.ndarray  # (F,), true mouth openings for the other audio


@dataclass(frozen=True)
class Validation:
    """Metrics and probes averaged over clips, by name.

    Each metric also has its bounds as `<name>_truth` and `<name>_reference`.
    """

    figures: dict[str, float]
    results: list[ClipResult]

    def __str__(self) -> str:
        """A table of the metrics and a list of the probes."""
        metrics = [name for name in self.figures if f"{name}_truth" in self.figures]
        lines = [f"{'held-out clips':<16}{'prediction':>12}{'truth':>12}{'reference':>12}"]
        lines += [
            f"{name:<16}" + "".join(f"{self.figures[name + column]:>12.4g}" for column in COLUMNS) for name in metrics
        ]
        probes = self.figures.keys() - {name + column for name in metrics for column in COLUMNS}
        return "\n".join(lines + [f"{name:<28}{self.figures[name]:>12.4g}" for name in self.figures if name in probes])

    def report(self, step: int, log: RunLog | SilentLog) -> None:
        """Writes a table, the figures and images to the log."""
        log.line(f"step {step}, on held-out clips\n{self}")
        log.store(step, {f"val_{name}": value for name, value in self.figures.items() if math.isfinite(value)})
        log.picture(step, draw_faces(self.results), "validation")
        log.picture(step, draw_curves(self.results), "mouths")
        log.curves()


@dataclass
class Validator:
    """Validates a pipeline on held-out clips, any number of times.

    Raises WeightsError if there is no audio encoder, CacheError if no clip is long enough.
    """

    pipeline: LipSyncPipeline
    cache: Cache
    clips: Sequence[str]  # names of held-out clips
    frames: int = 50  # most frames of a clip
    most: int = 4  # clips
    distance: Distance | None = None  # LPIPS
    expert: SyncNet | None = None

    def __post_init__(self) -> None:
        _ = self.pipeline.audio_encoder  # loads it
        chosen = [self.cache.clips[name] for name in self.clips[:: -(-len(self.clips) // self.most)]]
        self.windows = [window for clip in chosen if (window := choose_window(clip, self.frames))]
        if not self.windows:
            raise CacheError(
                f"{self.cache.folder}: no held-out clip has {MIN_FRAMES + 2 * GAP} consecutive usable frames to "
                "validate on; prepare longer videos"
            )

    @cached_property
    def backend(self) -> FaceBackend:
        """Detects landmarks in face crops."""
        return load_face_backend("mediapipe", self.pipeline.models_dir, self.pipeline.device)

    def __call__(self) -> Validation:
        """Generates images for each window and averages their metrics and probes."""
        metrics, probes, results = [], [], []
        for window, other in zip(self.windows, self.windows[1:] + self.windows[:1], strict=True):
            truth = np.stack([window.clip.image(frame) for frame in range(window.start, window.stop)])
            other_audio, target_openings = self._other_audio(window, other)
            images = {
                "prediction": self._generate(window, window.closed),
                "other audio": self._generate(window, window.closed, other_audio),
                "other reference": self._generate(window, window.open),
                "silence": self._generate(window, window.closed, self._silence(window.stop - window.start)),
            }
            openings = {name: self._openings(generated) for name, generated in images.items()}
            results.append(ClipResult(window, truth, images, openings, target_openings))
            metrics.append(self._measure(window, truth, images["prediction"]))
            probes.append(self._probe(results[-1]))
        figures = {
            name: finite_mean(np.array([values[name] for values in rows]))
            for rows in (metrics, probes)
            for name in rows[0]
        }
        return Validation(figures, results)

    def _generate(self, window: Window, reference: int, audio: np.ndarray | None = None) -> np.ndarray:
        """Images BGR uint8 (F, 256, 256, 3) of a window for a reference frame and audio (F, W, D), default its own."""
        clip, start, stop = window.clip, window.start, window.stop
        audio = read_windows(clip, start, stop, self.pipeline.contract) if audio is None else audio
        masked = clip.tensor("masked_latents", start, stop)[:, 0]
        references = np.repeat(clip.tensor("latents", reference, reference + 1)[:, 0], len(masked), axis=0)
        images = [
            self.pipeline.generate(masked[i], references[i], audio[i]) for i in batched(range(len(masked)), BATCH)
        ]
        return np.concatenate(images)

    def _other_audio(self, window: Window, other: Window) -> tuple[np.ndarray, np.ndarray]:
        """Audio (F, W, D) of another window and its true mouth openings (F,); repeats if it is shorter.

        If there is only one window, its own audio, shifted by half its length.
        """
        index = np.arange(window.stop - window.start)
        index = (index + (len(index) // 2 if other is window else 0)) % (other.stop - other.start)
        return read_windows(other.clip, other.start, other.stop, self.pipeline.contract)[index], other.openings[index]

    def _silence(self, count: int) -> np.ndarray:
        """Audio windows (count, W, D) of digital silence."""
        samples = np.zeros(count * SAMPLES_PER_FRAME, np.float32)
        features = audio_features(samples, self.pipeline.audio_encoder, self.pipeline.contract)
        return audio_windows(features, range(count), self.pipeline.contract)

    def _openings(self, images: np.ndarray) -> np.ndarray:
        """Mouth openings (F,) in face crops, nan where no face is detected."""
        return np.array([mouth_opening(face) for face in detect_in_crops(images, self.backend)])

    def _measure(self, window: Window, truth: np.ndarray, prediction: np.ndarray) -> dict[str, float]:
        """The metrics of a window for all columns. truth, prediction: BGR uint8 (F, 256, 256, 3)."""
        clip, start, stop = window.clip, window.start, window.stop
        latents = torch.from_numpy(clip.tensor("latents", start, stop)[:, 0]).to(self.pipeline.device)
        with torch.no_grad():
            decoded = [to_uint8(self.pipeline.vae.decode(batch.float())) for batch in latents.split(BATCH)]
        reference = np.repeat(clip.image(window.closed)[None], len(truth), axis=0)
        geometry = zip(clip.tensor("landmarks", start, stop), clip.tensor("boxes", start, stop)[:, 0], strict=True)
        boxes = torch.from_numpy(np.stack([mouth_box(landmarks, box) for landmarks, box in geometry]))
        true_mouths = to_uint8(crop_mouth(to_tensor(truth), boxes))
        true_faces = detect_in_crops(truth, self.backend)
        metrics = {}
        for column, images in zip(COLUMNS, (prediction, np.concatenate(decoded), reference), strict=True):
            pairs = {"": (images, truth), "_mouth": (to_uint8(crop_mouth(to_tensor(images), boxes)), true_mouths)}
            for region, (x, y) in pairs.items():
                metrics[f"psnr{region}{column}"] = float(np.mean([psnr(a, b) for a, b in zip(x, y, strict=True)]))
                metrics[f"ssim{region}{column}"] = float(np.mean([ssim(a, b) for a, b in zip(x, y, strict=True)]))
                if self.distance:
                    metrics[f"lpips{region}{column}"] = self._lpips(self.distance, x, y)
            faces = detect_in_crops(images, self.backend)
            metrics[f"lmd{column}"] = mouth_landmark_distance(faces, true_faces)
            metrics[f"jitter{column}"] = mouth_jitter(faces)
            if self.expert and len(images) >= self.expert.frames:
                sync = sync_figures(self.expert, window, images)
                metrics |= {f"{name}{column}": value for name, value in sync.items()}
        return metrics

    @torch.no_grad()
    def _lpips(self, distance: Distance, x: np.ndarray, y: np.ndarray) -> float:
        """Mean LPIPS of images BGR uint8 (F, H, W, 3)."""
        device = self.pipeline.device
        pairs = zip(to_tensor(x).split(BATCH), to_tensor(y).split(BATCH), strict=True)
        return float(torch.cat([distance(a.to(device), b.to(device)) for a, b in pairs]).mean())

    def _probe(self, result: ClipResult) -> dict[str, float]:
        """The probes of a window: which audio or reference frame the generated mouth follows."""
        window, openings = result.window, result.openings
        closed, open_ = true_openings(window.clip, [window.closed, window.open])
        change = finite_mean(openings["other reference"]) - finite_mean(openings["prediction"])
        return {
            "r_own_audio": correlation(openings["prediction"], window.openings),
            "r_other_audio": correlation(openings["other audio"], result.target_openings),
            "r_source_audio": correlation(openings["other audio"], window.openings),
            "reference_share": float(change / max(open_ - closed, 1e-6)),
            "opening_in_silence": finite_mean(openings["silence"]),
            "opening_closed": float(closed),
            "opening_mean": finite_mean(window.openings),
        }


def choose_window(clip: Clip, frames: int) -> Window | None:
    """The start of the longest run of usable frames of a clip, at most `frames` and at most half of its usable frames.

    None if it has fewer than `MIN_FRAMES` frames, or fewer than two usable frames at least `GAP` away from it.
    """
    usable = np.flatnonzero(clip.usable)
    runs = np.split(usable, np.flatnonzero(np.diff(usable) > 1) + 1)
    run = max(runs, key=len)
    run = run[: min(frames, len(usable) // 2)]
    candidates = usable[(usable <= run[0] - GAP) | (usable >= run[-1] + GAP)] if len(run) else run
    if len(run) < MIN_FRAMES or len(candidates) < 2:
        return None
    openings = true_openings(clip, candidates)
    closed, open_ = int(candidates[openings.argmin()]), int(candidates[openings.argmax()])
    return Window(clip, int(run[0]), int(run[-1]) + 1, closed, open_, true_openings(clip, run))


def sync_figures(expert: SyncNet, window: Window, images: np.ndarray) -> dict[str, float]:
    """Sync confidence and offset of images BGR uint8 (F, 256, 256, 3) of a window."""
    similarities = offset_sweep(expert, images, window.clip.tensor("mel"), window.clip.audio_frame(window.start))
    return {"sync_confidence": sync_confidence(similarities), "sync_offset": float(sync_offset(similarities))}


def true_openings(clip: Clip, frames: Iterable[int]) -> np.ndarray:
    """Mouth openings in usable frames of a clip, measured in crop coordinates."""
    landmarks, boxes = clip.tensor("landmarks"), clip.tensor("boxes")[:, 0]
    faces = [Face(np.zeros(4), in_crop(landmarks[frame], boxes[frame]), 1.0) for frame in frames]
    return np.array([mouth_opening(face) for face in faces])


def draw_faces(results: Sequence[ClipResult]) -> np.ndarray:
    """Frames of each result, BGR uint8: a row of the truth, then a row for each input."""
    rows = []
    for result in results:
        moments = np.linspace(0, len(result.truth) - 1, MOMENTS).astype(int)
        rows += [np.hstack(list(images[moments])) for images in (result.truth, *result.images.values())]
    return np.vstack(rows)


def draw_curves(results: Sequence[ClipResult]) -> np.ndarray:
    """Mouth openings over time, BGR uint8, a row for each result: own audio on the left, other audio on the right."""
    figure = Figure(figsize=(12, 2.2 * len(results)), layout="constrained")
    axes = figure.subplots(len(results), 2, squeeze=False)
    for result, (left, right) in zip(results, axes, strict=True):
        left.plot(result.window.openings, color="black", label="true mouth")
        left.plot(result.openings["prediction"], label="prediction")
        left.plot(result.openings["silence"], linewidth=0.8, label="silence")
        left.set_title(result.window.clip.name, fontsize=8)
        right.plot(result.target_openings, color="black", label="true mouth of that audio")
        right.plot(result.openings["other audio"], label="prediction")
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
