"""Dubbing clips with each other's audio, and the correlation of their mouths with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from musetalk.evaluation import cross_dub as module
from musetalk.evaluation.cross_dub import correlation_with_audio, cross_dub, pooled_correlation

CLIPS = [Path(f"{name}.mp4") for name in "abc"]
TRUTH = {"a": [0, 1, 0, 2], "b": [3, 0, 1, 0], "c": [0, 0, 5, 1, 7]}  # mouth openings; c is longer


@pytest.fixture
def openings(monkeypatch) -> dict[str, list[float]]:
    """The mouth openings that are measured in each file, by its path."""
    measured = {f"{name}.mp4": values for name, values in TRUTH.items()}
    monkeypatch.setattr(module, "read_frames", str)
    monkeypatch.setattr(module, "mouth_openings", lambda path, _: np.array(measured[path], float))
    return measured


def test_each_clip_is_dubbed_with_the_audio_of_the_next(tmp_path):
    calls = []
    dubbed = cross_dub(lambda *paths: calls.append(paths), CLIPS, tmp_path)
    assert dubbed == [tmp_path / clip for clip in CLIPS]
    assert calls == [(CLIPS[k], CLIPS[(k + 1) % 3], dubbed[k]) for k in range(3)]


def test_mouths_that_follow_the_audio_correlate_by_1_and_chance_is_that_of_true_clips(openings):
    dubbed = [Path("out") / clip for clip in CLIPS]
    for path, speaker in zip(dubbed, "bca", strict=True):
        openings[str(path)] = TRUTH[speaker]
    r, chance = correlation_with_audio(dubbed, CLIPS, None)
    pairs = [(x, y) for x in "abc" for y in "abc" if x != y]
    x, y = (np.concatenate([TRUTH[pair[side]][:4] for pair in pairs]) for side in (0, 1))
    assert r == pytest.approx(1)
    assert chance == pytest.approx(np.corrcoef(x, y)[0, 1])


def test_mouths_that_repeat_the_source_video_do_not_count_as_following(openings):
    dubbed = [Path("out") / clip for clip in CLIPS]
    for path, name in zip(dubbed, "abc", strict=True):
        openings[str(path)] = TRUTH[name]
    assert correlation_with_audio(dubbed, CLIPS, None)[0] < 0.5


def test_pooling_keeps_differences_between_clips():
    """Within each pair the correlation is -1, but the pair that is open has its mouth open in both series."""
    pairs = [(np.array([0.0, 1.0]), np.array([1.0, 0.0])), (np.array([10.0, 11.0, 5.0]), np.array([11.0, 10.0]))]
    assert pooled_correlation(pairs) == pytest.approx(np.corrcoef([0, 1, 10, 11], [1, 0, 11, 10])[0, 1])
