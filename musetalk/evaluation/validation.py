"""Validation of a UNet on held-out clips: what its mouths follow, their shapes, and how close its images are.

Each figure stands beside the same one of the true faces (suffix `_truth`), of the true faces through the VAE (`_vae`),
which no UNet can surpass, and of a still true frame, the reference, throughout (`_reference`), which copying gives.
docs/validation.md says what each figure means.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from musetalk.contract import SAMPLES_PER_FRAME
from musetalk.data.audio import audio_features, audio_windows
from musetalk.data.cache import Cache
from musetalk.data.dataset import read_windows
from musetalk.data.face import load_face_backend
from musetalk.evaluation.measures import BATCH, Distance, Measures, aspect_ratios, chance_level
from musetalk.evaluation.metrics import bootstrap_interval, correlation, finite_mean, lip_leak
from musetalk.evaluation.pictures import ClipResult
from musetalk.evaluation.windows import MIN_FRAMES, Window, choose_windows, true_openings
from musetalk.images import batched, to_uint8
from musetalk.inference.pipeline import LipSyncPipeline
from musetalk.models.syncnet import SyncNet

SHIFTS = (5, 12, 25)  # frames by which the audio comes too early
PICTURED = 4  # clips whose images are kept and drawn
COLUMNS = {"": "prediction", "_truth": "truth", "_vae": "VAE", "_reference": "copying"}  # by suffix of the names
INTERVALS = ("r_own_audio", "r_other_audio", "chance", "lmd")  # figures with an interval, <name>_low to <name>_high

# Rows of the table, by section. A row is left out if no clip has the figure in any column, such as sync without expert.
ROWS = {
    "what the mouth follows": (
        *("r_own_audio", "r_other_audio", "r_source_audio", "chance"),
        *(f"r_shift_{shift}" for shift in SHIFTS),
        *("sync_confidence", "sync_offset", "reference_share"),
    ),
    "shape of the mouth": (
        *("lmd", "opening", "closed", "closures", "mar_spread", "jitter"),
        *("opening_in_silence", "lip_leak_silence", "lip_leak_pauses"),
    ),
    "images": tuple(f"{name}{region}" for name in ("psnr", "ssim", "lpips", "sharpness") for region in ("", "_mouth")),
}


@dataclass(frozen=True)
class Validation:
    """Figures averaged over clips, by name, and what was generated for the first `PICTURED` clips.

    A figure is nan if no clip has it, such as `lip_leak_pauses` in clips without a pause.
    """

    figures: dict[str, float]
    results: list[ClipResult]
    clips: int
    identities: int

    def __str__(self) -> str:
        """A table with a row for each figure, in sections."""
        title = f"clips {self.clips}, identities {self.identities}"
        lines = ["".join([f"{title:<28}", *(f"{column:>11}" for column in COLUMNS.values()), "   95 % interval"])]
        for section, names in ROWS.items():
            lines.append(f"{section}:")
            for name in names:
                values = [self.figures.get(name + column, math.nan) for column in COLUMNS]
                if not all(map(math.isnan, values)):
                    bounds = [self.figures.get(name + end, math.nan) for end in ("_low", "_high")]
                    interval = "" if math.isnan(bounds[0]) else "   {:.4g} to {:.4g}".format(*bounds)
                    cells = "".join(f"{'-' if math.isnan(value) else f'{value:.4g}':>11}" for value in values)
                    lines.append(f"  {name:<26}{cells}{interval}".rstrip())
        return "\n".join(lines)


@dataclass
class Validator:
    """Validates a pipeline on held-out clips, any number of times.

    Raises WeightsError if there is no audio encoder, CacheError if no clip is long enough.
    """

    pipeline: LipSyncPipeline
    cache: Cache
    clips: Sequence[str]  # names of held-out clips
    most: int = 8  # clips
    frames: int = 50  # most frames of a clip
    distance: Distance | None = None  # LPIPS
    expert: SyncNet | None = None

    def __post_init__(self) -> None:
        _ = self.pipeline.audio_encoder  # loads it
        self.windows = choose_windows(self.cache, self.clips, self.most, self.frames)

    @cached_property
    def measures(self) -> Measures:
        backend = load_face_backend("mediapipe", self.pipeline.models_dir, self.pipeline.device)
        return Measures(backend, self.pipeline.device, self.distance, self.expert)

    def __call__(self) -> Validation:
        """Generates images for each window and averages their figures."""
        rows: list[dict[str, float]] = []
        results: list[ClipResult] = []
        for window, other in zip(self.windows, self.windows[1:] + self.windows[:1], strict=True):
            result = self._generate_all(window, other)
            row = {"chance": chance_level(window, self.windows)}
            rows.append(row | self._probe(result) | self._shifts(window) | self._measure(result))
            if len(results) < PICTURED:
                results.append(result)
        names = dict.fromkeys(name for row in rows for name in row)
        series = {name: np.array([row.get(name, math.nan) for row in rows]) for name in names}
        figures = {name: finite_mean(values) for name, values in series.items()}
        identities = [window.clip.identity for window in self.windows]
        groups = identities if len(set(identities)) > 1 else [window.clip.name for window in self.windows]
        for name in INTERVALS:
            figures[f"{name}_low"], figures[f"{name}_high"] = bootstrap_interval(series[name], groups)
        return Validation(figures, results, len(rows), len(set(identities)))

    def _generate_all(self, window: Window, other: Window) -> ClipResult:
        """Generates a window from its own audio and from the other inputs."""
        audio, target_openings = self._other_audio(window, other)
        images = {
            "prediction": self._generate(window, window.closed),
            "other audio": self._generate(window, window.closed, audio),
            "other reference": self._generate(window, window.open),
            "silence": self._generate(window, window.closed, self._silence(window.stop - window.start)),
        }
        faces = {name: self.measures.detect(generated) for name, generated in images.items()}
        return ClipResult(window, window.images(), faces, target_openings)

    def _generate(
        self,
        window: Window,
        reference: int,
        audio: np.ndarray | None = None,
        frames: Sequence[int] | np.ndarray | slice = slice(None),
    ) -> np.ndarray:
        """Images BGR uint8 (F, 256, 256, 3) of frames of a window for a reference frame and audio (F, W, D).

        audio: by default that of the window. frames: indices into the window, all by default.
        """
        clip, start, stop = window.clip, window.start, window.stop
        audio = read_windows(clip, start, stop, self.pipeline.contract) if audio is None else audio
        masked = clip.tensor("masked_latents", start, stop)[frames, 0]
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

    def _probe(self, result: ClipResult) -> dict[str, float]:
        """What the mouth follows: another audio, another reference frame, or silence."""
        window = result.window
        openings = {name: faces.openings for name, faces in result.faces.items()}
        closed, open_ = true_openings(window.clip, [window.closed, window.open])
        change = finite_mean(openings["other reference"]) - finite_mean(openings["prediction"])
        return {
            "r_other_audio": correlation(openings["other audio"], result.target_openings),
            "r_source_audio": correlation(openings["other audio"], window.openings),
            "reference_share": float(change / max(open_ - closed, 1e-6)),
            "opening_in_silence": finite_mean(openings["silence"]),
            "opening_in_silence_reference": float(closed),
            "lip_leak_silence": lip_leak(aspect_ratios(result.faces["silence"].found)),
        }

    def _shifts(self, window: Window) -> dict[str, float]:
        """Correlation with the true openings where the audio is that of `SHIFTS` frames later.

        The truth's is that of the true openings so many frames later. A shift is left out if fewer than `MIN_FRAMES`
        frames have such audio.
        """
        figures = {}
        for shift in SHIFTS:
            frames = window.shifted(shift)
            if len(frames) < MIN_FRAMES:
                continue
            later = true_openings(window.clip, window.start + frames + shift)
            audio = read_windows(window.clip, window.start + shift, window.stop + shift, self.pipeline.contract)
            images = self._generate(window, window.closed, audio[frames], frames)
            openings = self.measures.detect(images).openings
            figures[f"r_shift_{shift}"] = correlation(openings, window.openings[frames])
            figures[f"r_shift_{shift}_truth"] = correlation(later, window.openings[frames])
        return figures

    def _measure(self, result: ClipResult) -> dict[str, float]:
        """The figures of a window that all columns have."""
        window, truth = result.window, self.measures.detect(result.truth)
        decoded, copied = self.measures.detect(self._decoded(window)), self.measures.copied(window)
        columns = (result.faces["prediction"], truth, decoded, copied)
        figures: dict[str, float] = {}
        for column, faces in zip(COLUMNS, columns, strict=True):
            row = self.measures(window, faces, None if faces is truth else truth)
            figures |= {f"{name}{column}": value for name, value in row.items()}
        return figures

    @torch.no_grad()
    def _decoded(self, window: Window) -> np.ndarray:
        """The true faces of a window through the VAE, BGR uint8 (F, 256, 256, 3)."""
        latents = torch.from_numpy(window.clip.tensor("latents", window.start, window.stop)[:, 0])
        batches = latents.to(self.pipeline.device).split(BATCH)
        return np.concatenate([to_uint8(self.pipeline.vae.decode(batch.float())) for batch in batches])
