"""Measures the small model on people that it was not trained on: the tables of models/mini/README.md.

    python -m tools.make_mini.measure --cache data/mini/test_cache

Clips of GRID and those of other people are measured apart, at most 12 clips of each, with each identity once before any
twice. docs/validation.md says what the rows mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import tyro

from musetalk.cli import run_script
from musetalk.data.cache import Cache
from musetalk.evaluation.pictures import draw_curves, draw_faces
from musetalk.evaluation.validation import Validator
from musetalk.inference.pipeline import LipSyncPipeline

CLIPS, FRAMES = 12, 75  # at most


@dataclass(frozen=True)
class MeasureConfig:
    """The model and the people; override on the command line."""

    cache: Path
    checkpoint: Path = Path("models/mini/musetalk/unet.safetensors")
    models_dir: Path = Path("models/mini")
    pictures: Path = Path("output")  # folder for faces and curves


def main(config: MeasureConfig) -> None:
    """Prints a table for each group of people and writes its pictures."""
    cache = Cache(config.cache)
    pipeline = LipSyncPipeline.from_checkpoint(config.checkpoint, config.models_dir)
    groups: dict[str, list[str]] = {"grid": [], "others": []}
    for name, clip in cache.clips.items():
        groups["grid" if clip.identity.startswith("grid_") else "others"].append(name)
    config.pictures.mkdir(parents=True, exist_ok=True)
    for group, names in groups.items():
        validation = Validator(pipeline, cache, names, CLIPS, FRAMES)()
        print(f"{group}\n{validation}", flush=True)
        for kind, draw in (("faces", draw_faces), ("curves", draw_curves)):
            cv2.imwrite(str(config.pictures / f"{group}_{kind}.png"), draw(validation.results))


if __name__ == "__main__":
    run_script(main, tyro.cli(MeasureConfig, description=__doc__))
