"""How well a UNet does on clips that it was not trained on, and whether it listens.

Each measure stands beside that of the truth (the true faces through the VAE, the best that can be had) and of the
reference (one frame shown all the time, the least that there is). Probes ask what the mouth follows: the audio, as it
must, or the reference; and whether it is closed in silence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec

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
from musetalk.errors import UserError
from musetalk.images import batched, to_tensor, to_uint8
from musetalk.inference.metrics import (
    correlation,
    detect_in_crops,
    known_mean,
    mouth_jitter,
    mouth_landmark_distance,
    mouth_opening,
    psnr,
    ssim,
)
from musetalk.inference.pipeline import LipSyncPipeline
from musetalk.models.syncnet import SyncNet
from musetalk.training.log import RunLog, rendered
from musetalk.training.sync_check import offset_sweep, sync_confidence, sync_offset

BATCH = 8  # frames generated at once
MIN_FRAMES = 5  # of a window
GAP = 5  # frames between a window and a reference
GRID_ROWS = 6  # moments in a sample grid
MOMENTS = 8  # of a window in the picture
COLUMNS = ("", "_truth", "_reference")  # endings of a measure's names

Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Window:
    """Consecutive usable frames [start, stop) of a clip, and two others of it: with a closed and with an open mouth.

    openings: float (stop - start,), of the true mouths.
    """

    clip: Clip
    start: int
    stop: int
    closed: int
    open: int
    openings: np.ndarray


@dataclass(frozen=True)
class ClipResult:
    """What was generated for a window of F frames, by the name of what the UNet was given."""

    window: Window
    truth: np.ndarray  # BGR uint8 (F, 256, 256, 3)
    images: dict[str, np.ndarray]  # the same of "prediction", "other audio", "other reference" and "silence"
    openings: dict[str, np.ndarray]  # (F,), of the mouths in them, nan where no face is found
    given: np.ndarray  # (F,), true openings that belong to the other audio


@dataclass(frozen=True)
class Validation:
    """figures: by name; of a measure also `<name>_truth` and `<name>_reference`."""

    figures: dict[str, float]
    looks: list[ClipResult]

    def __str__(self) -> str:
        """The measures as a table, and the probes."""
        measures = [name for name in self.figures if f"{name}_truth" in self.figures]
        lines = [f"{'held out':<16}{'prediction':>12}{'truth':>12}{'reference':>12}"]
        lines += [
            f"{name:<16}" + "".join(f"{self.figures[name + column]:>12.4g}" for column in COLUMNS) for name in measures
        ]
        probes = self.figures.keys() - {name + column for name in measures for column in COLUMNS}
        return "\n".join(lines + [f"{name:<28}{self.figures[name]:>12.4g}" for name in self.figures if name in probes])

    def report(self, step: int, log: RunLog) -> None:
        """Tell of it: a table for people, figures for programs, pictures."""
        log.line(f"step {step}, on clips held out\n{self}")
        log.store(step, {f"val_{name}": value for name, value in self.figures.items() if math.isfinite(value)})
        log.picture(step, draw_faces(self.looks), "validation")
        log.picture(step, draw_curves(self.looks), "mouths")
        log.curves()


@dataclass
class Validator:
    """What is needed to validate again and again. Raises UserError where something is missing: mediapipe, a clip."""

    pipeline: LipSyncPipeline
    cache: Cache
    clips: Sequence[str]  # held out; at most `most` of them are looked at
    frames: int = 50  # at most, of a clip
    most: int = 4
    distance: Distance | None = None  # LPIPS
    expert: SyncNet | None = None

    def __post_init__(self) -> None:
        if find_spec("mediapipe") is None:
            raise UserError("validation finds mouths by mediapipe, which is not installed; pip install mediapipe")
        chosen = [self.cache.clips[name] for name in self.clips[:: -(-len(self.clips) // self.most)]]
        self.windows = [window for clip in chosen if (window := choose_window(clip, self.frames))]
        if not self.windows:
            raise CacheError(
                f"{self.cache.folder}: no clip held out has {MIN_FRAMES + 2 * GAP} usable frames in a row to validate "
                "on; prepare longer videos"
            )

    @cached_property
    def backend(self) -> FaceBackend:
        """Whose landmarks in face crops are measured, and need no weights."""
        return load_face_backend("mediapipe", self.pipeline.models_dir, "cpu")

    def __call__(self) -> Validation:
        """Generate and measure."""
        measures, probes, looks = [], [], []
        for window, other in zip(self.windows, self.windows[1:] + self.windows[:1], strict=True):
            truth = np.stack([window.clip.image(frame) for frame in range(window.start, window.stop)])
            other_audio, given = self._other_audio(window, other)
            images = {
                "prediction": self._generate(window, window.closed),
                "other audio": self._generate(window, window.closed, other_audio),
                "other reference": self._generate(window, window.open),
                "silence": self._generate(window, window.closed, self._silence(window.stop - window.start)),
            }
            openings = {name: self._openings(made) for name, made in images.items()}
            looks.append(ClipResult(window, truth, images, openings, given))
            measures.append(self._measure(window, truth, images["prediction"]))
            probes.append(self._probe(looks[-1]))
        figures = {
            name: known_mean(np.array([report[name] for report in reports]))
            for reports in (measures, probes)
            for name in reports[0]
        }
        return Validation(figures, looks)

    def _generate(self, window: Window, reference: int, audio: np.ndarray | None = None) -> np.ndarray:
        """BGR uint8 (F, 256, 256, 3) of a window's frames with one reference frame, by its own audio or (F, W, D)."""
        clip, start, stop = window.clip, window.start, window.stop
        audio = read_windows(clip, start, stop, self.pipeline.contract) if audio is None else audio
        masked = clip.tensor("masked_latents", start, stop)[:, 0]
        shown = np.repeat(clip.tensor("latents", reference, reference + 1)[:, 0], len(masked), axis=0)
        pieces = [self.pipeline.generate(masked[i], shown[i], audio[i]) for i in batched(range(len(masked)), BATCH)]
        return np.concatenate(pieces)

    def _other_audio(self, window: Window, other: Window) -> tuple[np.ndarray, np.ndarray]:
        """Audio that is not the window's, (F, W, D), and the true openings (F,) that belong to it, nan where none do.

        That of another window; of itself, where there is no other, half a window later.
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
        """Openings (F,) of the mouths in face crops, nan where no face is found."""
        return np.array([mouth_opening(face) for face in detect_in_crops(images, self.backend)])

    def _measure(self, window: Window, truth: np.ndarray, prediction: np.ndarray) -> dict[str, float]:
        """The measures of a window for all columns. truth, prediction: BGR uint8 (F, 256, 256, 3)."""
        clip, start, stop = window.clip, window.start, window.stop
        latents = torch.from_numpy(clip.tensor("latents", start, stop)[:, 0]).to(self.pipeline.vae.autoencoder.device)
        with torch.no_grad():
            pieces = [to_uint8(self.pipeline.vae.decode(piece.float())) for piece in latents.split(BATCH)]
        reference = np.repeat(clip.image(window.closed)[None], len(truth), axis=0)
        places = zip(clip.tensor("landmarks", start, stop), clip.tensor("boxes", start, stop)[:, 0], strict=True)
        boxes = torch.from_numpy(np.stack([mouth_box(landmarks, box) for landmarks, box in places]))
        mouths = to_uint8(crop_mouth(to_tensor(truth), boxes))
        faces = detect_in_crops(truth, self.backend)
        found = {}
        for column, images in zip(COLUMNS, (prediction, np.concatenate(pieces), reference), strict=True):
            pairs = {"": (images, truth), "_mouth": (to_uint8(crop_mouth(to_tensor(images), boxes)), mouths)}
            for where, (one, other) in pairs.items():
                found[f"psnr{where}{column}"] = float(np.mean([psnr(a, b) for a, b in zip(one, other, strict=True)]))
                found[f"ssim{where}{column}"] = float(np.mean([ssim(a, b) for a, b in zip(one, other, strict=True)]))
                if self.distance:
                    found[f"lpips{where}{column}"] = self._lpips(one, other)
            seen = detect_in_crops(images, self.backend)
            found[f"lmd{column}"] = mouth_landmark_distance(seen, faces)
            found[f"jitter{column}"] = mouth_jitter(seen)
            if self.expert and len(images) >= self.expert.frames:
                found |= {f"{name}{column}": value for name, value in self._sync(window, images).items()}
        return found

    @torch.no_grad()
    def _lpips(self, one: np.ndarray, other: np.ndarray) -> float:
        """Mean LPIPS of pictures BGR uint8 (F, H, W, 3)."""
        device = self.pipeline.vae.autoencoder.device
        pairs = zip(to_tensor(one).split(BATCH), to_tensor(other).split(BATCH), strict=True)
        return float(torch.cat([self.distance(a.to(device), b.to(device)) for a, b in pairs]).mean())

    def _sync(self, window: Window, images: np.ndarray) -> dict[str, float]:
        """What the expert says of pictures BGR uint8 (F, 256, 256, 3) of a window."""
        similarities = offset_sweep(self.expert, images, window.clip.tensor("mel"), window.start)
        return {"sync_confidence": sync_confidence(similarities), "sync_offset": float(sync_offset(similarities))}

    def _probe(self, look: ClipResult) -> dict[str, float]:
        """What the mouth follows."""
        window, openings = look.window, look.openings
        closed, open_ = true_openings(window.clip, [window.closed, window.open])
        moved = known_mean(openings["other reference"]) - known_mean(openings["prediction"])
        return {
            "r_own_audio": correlation(openings["prediction"], window.openings),
            "r_other_audio": correlation(openings["other audio"], look.given),
            "r_source_audio": correlation(openings["other audio"], window.openings),
            "reference_share": float(moved / max(open_ - closed, 1e-6)),
            "opening_in_silence": known_mean(openings["silence"]),
            "opening_closed": float(closed),
            "opening_mean": known_mean(window.openings),
        }


def choose_window(clip: Clip, frames: int) -> Window | None:
    """The first longest run of usable frames of a clip, of at most `frames`, that leaves two references away from it.

    None where there are fewer than `MIN_FRAMES` such frames.
    """
    usable = np.flatnonzero(clip.usable)
    runs = np.split(usable, np.flatnonzero(np.diff(usable) > 1) + 1)
    run = max(runs, key=len)
    run = run[: min(frames, len(usable) // 2)]
    away = usable[(usable <= run[0] - GAP) | (usable >= run[-1] + GAP)] if len(run) else run
    if len(run) < MIN_FRAMES or len(away) < 2:
        return None
    openings = true_openings(clip, away)
    closed, open_ = int(away[openings.argmin()]), int(away[openings.argmax()])
    return Window(clip, int(run[0]), int(run[-1]) + 1, closed, open_, true_openings(clip, run))


def true_openings(clip: Clip, frames: Sequence[int]) -> np.ndarray:
    """Openings of the mouths in usable frames of a clip, as they are in the crops."""
    landmarks, boxes = clip.tensor("landmarks"), clip.tensor("boxes")[:, 0]
    points = [in_crop(landmarks[frame], boxes[frame]) for frame in frames]
    return np.array([mouth_opening(Face(np.zeros(4), points_, 1.0)) for points_ in points])


def draw_faces(looks: Sequence[ClipResult]) -> np.ndarray:
    """Moments of each look, BGR uint8: a row of the truth and of all that was generated."""
    rows = []
    for look in looks:
        moments = np.linspace(0, len(look.truth) - 1, MOMENTS).astype(int)
        rows += [np.hstack(list(images[moments])) for images in (look.truth, *look.images.values())]
    return np.vstack(rows)


def draw_curves(looks: Sequence[ClipResult]) -> np.ndarray:
    """Openings over time, a row for each look: with its own audio, and with another one. BGR uint8."""
    figure = Figure(figsize=(12, 2.2 * len(looks)), layout="constrained")
    axes = figure.subplots(len(looks), 2, squeeze=False)
    for look, (left, right) in zip(looks, axes, strict=True):
        left.plot(look.window.openings, color="black", label="true mouth")
        left.plot(look.openings["prediction"], label="prediction")
        left.plot(look.openings["silence"], linewidth=0.8, label="in silence")
        left.set_title(look.window.clip.name, fontsize=8)
        right.plot(look.given, color="black", label="true mouth of the audio given")
        right.plot(look.openings["other audio"], label="prediction")
        right.plot(look.window.openings, color="grey", linewidth=0.8, label="true mouth of the video")
    for axis in axes.flat:
        axis.set_ylabel("mouth opening", fontsize=7)
        axis.tick_params(labelsize=7)
    for axis in axes[0]:
        axis.legend(fontsize=7, loc="upper right")
    axes[-1][0].set_xlabel("frame", fontsize=7)
    return rendered(figure)


def draw_grid(pipeline: LipSyncPipeline, shown: FaceDataset) -> np.ndarray:
    """masked | reference | prediction | truth of fixed moments, BGR uint8, a row each."""
    rows = []
    for slot in range(GRID_ROWS):
        sample = shown.draw(0, slot)
        item = shown.read(sample)
        truth = item["target_image"][0].numpy()
        masked = truth.copy()
        masked[MASK_TOP:] = 0
        reference = shown.cache.clips[sample.clip].image(sample.references[0], sample.reference_variants[0])
        names = ("masked_latents", "reference_latents", "audio_window")
        prediction = pipeline.generate(*(item[name].numpy() for name in names))[0]
        rows.append(np.hstack([masked, reference, prediction, truth]))
    return np.vstack(rows)
