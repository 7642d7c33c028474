"""The built-in sample: its scripts, its frames, and the agreement of lips, script and audio."""

from __future__ import annotations

import json
from itertools import combinations, islice

import numpy as np
import pytest

from musetalk.contract import SAMPLES_PER_FRAME
from musetalk.data import sample
from musetalk.data.sample import FRAME_SIZE, NUM_FRAMES, SEEDS, clip_script, make_sample, render_frames
from musetalk.data.video import count_frames, read_audio

INNER_LIPS, OUTER_EYES, CHIN = (62, 66), (36, 45), 8  # of the 68 landmarks


@pytest.fixture(scope="module")
def scripts() -> list[sample.Script]:
    return [clip_script(index) for index in range(len(SEEDS))]


@pytest.fixture(scope="module")
def frames() -> list[np.ndarray]:
    """The first three seconds of a clip."""
    return list(islice(render_frames(1), 75))


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(x, y)[0, 1])


def test_a_script_has_its_documented_shapes_and_ranges(scripts):
    for script in scripts:
        assert script.audio.dtype == script.opening.dtype == script.width.dtype == np.float32
        assert len(script.audio) == NUM_FRAMES * SAMPLES_PER_FRAME
        assert script.opening.shape == script.width.shape == script.speaking.shape == (NUM_FRAMES,)
        assert 0.1 < np.abs(script.audio).max() < 1  # neither silent nor clipped
        assert script.opening.min() >= 0 and 0.8 < script.opening.max() <= 1
        assert script.width.min() < 0.7 and script.width.max() > 0.9  # rounded and spread


def test_scripts_and_frames_are_deterministic(scripts, frames):
    again = clip_script(1)
    for name in ("audio", "opening", "width", "speaking"):
        np.testing.assert_array_equal(getattr(again, name), getattr(scripts[1], name))
    np.testing.assert_array_equal(list(islice(render_frames(1), 2)), frames[:2])


def test_clips_are_uncorrelated(scripts):
    for x, y in combinations(scripts, 2):
        assert abs(correlation(x.opening, y.opening)) <= 0.1
    assert all(script.opening.std() > 0.15 for script in scripts)


def test_in_pauses_the_mouth_is_closed_and_the_voice_silent(scripts):
    for script in scripts:
        loudness = np.sqrt((script.audio.reshape(NUM_FRAMES, SAMPLES_PER_FRAME) ** 2).mean(axis=1))
        assert 0.1 < np.mean(~script.speaking) < 0.4
        assert script.opening[~script.speaking].max() < 0.02
        assert np.median(loudness[~script.speaking]) < 0.02 * np.median(loudness[script.speaking])
        assert np.abs(np.diff(script.opening)).max() < 0.4  # a jaw does not jump


def test_the_opening_can_be_predicted_from_the_audio(scripts):
    """By a linear map from the log spectrum of [-80 ms, +120 ms), fitted on all clips but two and tested on these."""

    def spectra(script: sample.Script) -> np.ndarray:
        hops = script.audio.reshape(NUM_FRAMES * 2, -1)  # 20 ms
        power = np.abs(np.fft.rfft(hops * np.hanning(hops.shape[1]))) ** 2
        bands = np.log(np.add.reduceat(power, np.unique(np.geomspace(1, 150, 25).astype(int)), axis=1) + 1e-2)
        padded = np.pad(bands, ((4, 6), (0, 0)), mode="edge")
        return np.array([padded[2 * k : 2 * k + 10].ravel() for k in range(NUM_FRAMES)])

    inputs = [spectra(script) for script in scripts]
    train = np.concatenate(inputs[:-2])
    mean, deviation = train.mean(axis=0), train.std(axis=0)
    train = (train - mean) / deviation
    target = np.concatenate([script.opening for script in scripts[:-2]])
    ridge = 300 * np.eye(train.shape[1])
    weights = np.linalg.solve(train.T @ train + ridge, train.T @ (target - target.mean()))
    for held_out, script in zip(inputs[-2:], scripts[-2:], strict=True):
        assert correlation((held_out - mean) / deviation @ weights, script.opening) >= 0.9


def test_landmarks_measure_the_opening_of_the_script(scripts, frames, face_backend):
    assert all(frame.shape == (FRAME_SIZE, FRAME_SIZE, 3) and frame.dtype == np.uint8 for frame in frames)
    points = np.array([face.landmarks for [face] in face_backend.detect(frames[::2])])

    def distance(pair: tuple[int, int]) -> np.ndarray:
        return np.linalg.norm(points[:, pair[0]] - points[:, pair[1]], axis=1)

    measured, opening = distance(INNER_LIPS) / distance(OUTER_EYES), scripts[1].opening[:75:2]
    assert correlation(measured, opening) >= 0.95
    assert measured[~scripts[1].speaking[:75:2]].max() < 0.02
    assert measured.max() > 0.15
    assert points[:, CHIN, 1].max() < 0.95 * FRAME_SIZE  # the chin is in the frame


def test_a_sample_is_complete_or_absent(tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "SEEDS", SEEDS[:2])
    monkeypatch.setattr(sample, "NUM_FRAMES", 10)
    folder = tmp_path / "videos"
    write_video, calls = sample.write_video, []

    def fail_once(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError("disk full")
        return write_video(*args)

    monkeypatch.setattr(sample, "write_video", fail_once)
    with pytest.raises(OSError, match="disk full"):
        make_sample(folder)
    assert not folder.exists()

    clips = make_sample(folder)
    assert clips == [folder / "sample_00.mp4", folder / "sample_01.mp4"]
    assert list(tmp_path.iterdir()) == [folder]
    assert sorted(folder.iterdir()) == [folder / "identities.json", *clips]
    identities = json.loads((folder / "identities.json").read_text())
    assert identities == {"sample_00": "astronaut", "sample_01": "astronaut"}
    assert [count_frames(clip) for clip in clips] == [10, 10]
    assert abs(len(read_audio(clips[0])) - 10 * SAMPLES_PER_FRAME) <= 1024  # one AAC frame
    with pytest.raises(FileExistsError, match="videos"):
        make_sample(folder)
