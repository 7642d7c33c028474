"""The GPU check runs all of its checks on a CPU with the small networks."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest

from musetalk.evaluation.windows import true_openings
from tools.gpu_check.__main__ import main
from tools.gpu_check.config import GpuCheckConfig
from tools.gpu_check.mouth import MouthReader


@pytest.mark.slow
def test_every_check_reports(sample_cache, mini, tmp_path):
    main(
        GpuCheckConfig(
            material=sample_cache.folder,
            output=tmp_path,
            models_dir=mini,
            quick=True,
            presets=("stage1",),
            chunk_sizes=(1,),
            batch_size=1,
            heights=(720,),
            learning_rates=(1e-3,),
            learn_seconds=0.0,
        )
    )
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["check"] for row in rows] == ["device", "learning", "resume", "peak", "step", "dubbing"]
    _, learning, resume, _, step, dubbing = rows
    assert learning["steps"] == 2
    assert step["finite"] == "True" and step["TFLOP"] > 0
    assert all(value == 0 for name, value in resume.items() if name.endswith("differs_by"))
    assert dubbing["generate"] > 0 and dubbing["write"] > 0
    assert cv2.imread(str(tmp_path / "learning_0.001.png")).shape == (6 * 256, 3 * 256, 3)
    assert cv2.VideoCapture(str(tmp_path / "dubbed_720.mp4")).read()[1].shape == (720, 1280, 3)


def test_mouth_openings_are_estimated_from_pixels(make_cache):
    cache = make_cache("rigid")
    train, held = [list(cache.clips.values())[index] for index in (slice(2), slice(2, None))]

    def load(clips):
        frames = [(clip, np.flatnonzero(clip.usable)) for clip in clips]
        images = [clip.image(frame) for clip, usable in frames for frame in usable]
        return np.stack(images), np.concatenate([true_openings(clip, usable) for clip, usable in frames])

    images, openings = load(held)
    assert np.corrcoef(MouthReader(*load(train))(images), openings)[0, 1] > 0.65
