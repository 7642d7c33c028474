"""Validation tells apart models that listen, that are deaf and that copy; its choice of windows."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from musetalk.contract import AUDIO_MARGIN, CONTRACTS, IMAGE_SIZE, SAMPLES_PER_FRAME
from musetalk.data.cache import Cache, CacheError
from musetalk.data.cache_writer import CacheWriter, JpegBuffer
from musetalk.data.crop import LIP_PAIRS
from musetalk.data.dataset import read_windows
from musetalk.data.face.face import Face
from musetalk.evaluation.measures import Measures
from musetalk.evaluation.validation import COLUMNS, ROWS, Validation, Validator
from musetalk.evaluation.windows import choose_window, choose_windows
from musetalk.images import to_tensor
from musetalk.models.audio_encoder import load_audio_encoder

FRAMES = 80  # of a clip
EYES, CORNERS = 100, 50  # pixels between the eye corners and between the lip corners

# Models that know the cache by heart. Each takes the clip and frame that masked latents, reference latents and audio
# belong to, None for audio of no frame, which is silence, and gives those of the face it shows.
MODELS = {
    "listens": lambda masked, reference, audio: audio or reference,
    "deaf": lambda masked, reference, audio: masked,
    "copies": lambda masked, reference, audio: reference,
}


@pytest.fixture
def write_clips(tmp_path, random_tensors):
    """A function: {clip: (identity, changed tensors)} -> a cache of these clips."""

    def write(clips: dict[str, tuple[str, dict[str, np.ndarray]]]) -> Cache:
        writer = CacheWriter(tmp_path / "cache", CONTRACTS["rigid"])
        for name, (identity, changed) in clips.items():
            metadata = {"source": f"{name}.mp4", "source_bytes": 1, "identity": identity, "last": True}
            writer.write(name, random_tensors(60) | changed, metadata)
        return Cache(tmp_path / "cache")

    return write


def grey_face(level: float) -> Face:
    """A face whose inner lips are a hundredth of the distance between its eyes apart for each ten grey levels."""
    points = np.zeros((68, 2), np.float32)
    points[36], points[45] = (80, 100), (80 + EYES, 100)
    points[48:] = (128, 180)
    points[60], points[64] = (100, 180), (100 + CORNERS, 180)
    for _, low in LIP_PAIRS:
        points[low] += (0, level / 1000 * EYES)
    return Face(np.array((60, 60, 200, 240), np.float32), points, 1.0)


class GreyBackend:
    """Detects `grey_face` in images of one grey level."""

    def detect(self, frames):
        return [[grey_face(frame[frame.shape[0] // 2, frame.shape[1] // 2].mean())] for frame in frames]


def speaking(levels: np.ndarray, random_tensors, seed: int) -> dict[str, np.ndarray]:
    """The tensors of a clip of grey faces. levels: integers (T,)."""
    images = [np.full((IMAGE_SIZE, IMAGE_SIZE, 3), level, np.uint8) for level in levels]
    jpegs, offsets = JpegBuffer(images).tensors()
    return random_tensors(len(levels), seed=seed) | {
        "face_jpeg": jpegs,
        "face_jpeg_offsets": offsets,
        "landmarks": np.stack([grey_face(level).landmarks for level in levels]),
        "boxes": np.tile(np.array([0, 0, IMAGE_SIZE, IMAGE_SIZE], np.int32), (len(levels), 1, 1)),
    }


@pytest.fixture
def validate(write_clips, random_tensors, mini, monkeypatch):
    """A function: name of a model -> its validation on clips of grey faces, two of each of three identities."""
    monkeypatch.setattr("musetalk.evaluation.measures.ssim", lambda *_: 1.0)  # slow
    rng, clips = np.random.default_rng(0), {}
    for index, name in enumerate(("a1", "a2", "b1", "b2", "c1", "c2")):
        levels = rng.integers(30, 200, FRAMES)
        levels[rng.permutation(FRAMES)[:20]] = 2  # closed
        clips[name] = (name[0], speaking(levels, random_tensors, seed=index))
    cache = write_clips(clips)
    faces, frames = {}, {}
    for name, clip in cache.clips.items():
        windows = read_windows(clip, 0, FRAMES, cache.contract)
        for frame in range(FRAMES):
            faces[name, frame] = clip.image(frame)
            for value in (clip.tensor("masked_latents")[frame], clip.tensor("latents")[frame], windows[frame]):
                frames[value.tobytes()] = (name, frame)

    def validate(model: str) -> Validation:
        def generate(*inputs: np.ndarray) -> np.ndarray:
            rows = zip(*([frames.get(row.tobytes()) for row in rows] for rows in inputs), strict=True)
            return np.stack([faces[MODELS[model](*row)] for row in rows])

        def decode(latents: torch.Tensor) -> torch.Tensor:
            return to_tensor(np.stack([faces[frames[row.half().numpy().tobytes()]] for row in latents]))

        pipeline = SimpleNamespace(
            generate=generate,
            vae=SimpleNamespace(decode=decode),
            contract=cache.contract,
            device=torch.device("cpu"),
            audio_encoder=load_audio_encoder(mini, torch.device("cpu")),
        )
        validator = Validator(pipeline, cache, list(cache.clips), frames=30)
        validator.measures = Measures(GreyBackend(), torch.device("cpu"))
        return validator()

    return validate


@pytest.fixture
def listening(validate) -> Validation:
    return validate("listens")


def test_a_model_that_listens_follows_the_audio_it_is_given(listening):
    x = listening.figures
    assert x["r_own_audio"] > 0.99 and x["r_other_audio"] > 0.99
    assert abs(x["r_source_audio"]) < 0.3 and abs(x["chance"]) < 0.3
    for shift in (5, 12, 25):
        assert x[f"r_shift_{shift}"] == pytest.approx(x[f"r_shift_{shift}_truth"], abs=0.01)
        assert abs(x[f"r_shift_{shift}"]) < 0.3
    assert x["closures"] == 1 and x["closed"] == x["closed_truth"] > 0
    assert x["mar_spread"] == pytest.approx(x["mar_spread_truth"]) and x["lmd"] == 0
    assert x["opening_in_silence"] < 0.02 and x["lip_leak_silence"] == 0
    assert (listening.clips, listening.identities) == (6, 3)
    assert x["r_own_audio_low"] <= x["r_own_audio"] <= x["r_own_audio_high"]


def test_a_deaf_model_that_guesses_the_truth_is_found_out(validate):
    """Its mouth stays with the video when the audio is another or shifted, and leaks in silence."""
    x = validate("deaf").figures
    assert min(x["r_own_audio"], x["r_source_audio"], *(x[f"r_shift_{shift}"] for shift in (5, 12, 25))) > 0.99
    assert x["r_other_audio"] < 0.3
    assert x["opening_in_silence"] == pytest.approx(x["opening_truth"]) and x["lip_leak_silence"] > 0.2


def test_a_model_that_copies_is_found_out(validate):
    """It never misses a closure, since it never opens its mouth: the spread and the share that it copies show it."""
    x = validate("copies").figures
    assert x["closures"] == x["closed"] == 1
    assert (
        x["mar_spread"] == pytest.approx(0, abs=1e-12)
        and x["mar_spread_truth"] > 0.01
        and x["reference_share"] == pytest.approx(1)
    )
    for name in ("lmd", "opening", "jitter"):
        assert x[name] == pytest.approx(x[f"{name}_reference"])


def test_the_table_has_every_figure(listening):
    bases = {name for row in ROWS.values() for name in row}
    suffixes = (*COLUMNS, "_low", "_high")
    assert listening.figures.keys() <= {base + suffix for base in bases for suffix in suffixes}
    table = str(listening)
    assert all(name in table for name in ("r_own_audio", "closures", "copying", "clips 6, identities 3"))
    assert "sync_confidence" not in table


# Windows.


def test_each_identity_has_a_window_before_any_has_a_second(write_clips):
    cache = write_clips({f"{who}{k}": (who, {}) for who, count in (("a", 6), ("b", 1), ("c", 3)) for k in range(count)})
    windows = choose_windows(cache, list(cache.clips), 5, 20)
    identities = [window.clip.identity for window in windows]
    assert set(identities[:3]) == {"a", "b", "c"} and set(identities[3:]) == {"a", "c"}
    assert len({window.clip.name for window in windows}) == 5
    assert all(window.stop - window.start == 20 for window in windows)
    assert len(choose_windows(cache, list(cache.clips), 99, 20)) == 10


def test_clips_that_are_too_short_leave_their_place_to_others(write_clips, random_tensors):
    few = {"usable": np.arange(60) < 8} | {
        name: value for name, value in random_tensors(60, unusable=range(8, 60)).items() if name.startswith("face")
    }
    cache = write_clips({"a": ("a", few), "b": ("b", {}), "c": ("c", {})})
    assert {window.clip.name for window in choose_windows(cache, ["a", "b", "c"], 2, 20)} == {"b", "c"}
    with pytest.raises(CacheError, match="no held-out clip has 15 consecutive usable frames"):
        choose_windows(cache, ["a"], 2, 20)


def test_silent_frames_are_those_whose_whole_audio_window_is_quiet(write_clips):
    """Quieter than a tenth of the loud frames; a click within two frames counts, and so does the clip's offset."""
    rng = np.random.default_rng(0)
    levels = np.full(60 + 2 * AUDIO_MARGIN, 1000.0)
    levels[AUDIO_MARGIN : AUDIO_MARGIN + 20] = 50
    levels[AUDIO_MARGIN + 12] = 400
    audio = (rng.standard_normal((len(levels), SAMPLES_PER_FRAME)) * levels[:, None]).astype(np.int16).ravel()
    window = choose_window(write_clips({"a": ("a", {"audio": audio})}).clips["a"], 30)
    assert (window.start, window.stop) == (0, 30)
    assert np.flatnonzero(window.silent).tolist() == [*range(2, 10), *range(15, 18)]
    window.clip.audio_offset = 3
    assert np.flatnonzero(replace(window).silent).tolist() == [*range(0, 7), *range(12, 15)]


def test_a_window_is_shifted_only_to_usable_frames(write_clips, random_tensors):
    tensors = random_tensors(60, unusable=[33, 34, 58, 59])
    window = choose_window(write_clips({"a": ("a", tensors)}).clips["a"], 30)
    assert (window.start, window.stop) == (0, 28)
    assert window.shifted(5).tolist() == [*range(28)]
    assert window.shifted(12).tolist() == [*range(21), *range(23, 28)]
    assert replace(window, start=30, stop=58).shifted(12).tolist() == [*range(16)]
    assert window.images().shape == (28, IMAGE_SIZE, IMAGE_SIZE, 3)
