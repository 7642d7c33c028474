"""The check of a sync expert, tested with fake experts whose cosines are known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from musetalk.contract import RIGID
from musetalk.data.audio import mel_start
from musetalk.data.cache import Cache, CacheError
from musetalk.data.cache_writer import CacheWriter, JpegBuffer
from musetalk.evaluation.sync_check import (
    MAX_OFFSET,
    OFFSETS,
    SyncCheck,
    SyncError,
    check_expert,
    evaluating,
    offset_sweep,
    sync_confidence,
    sync_offset,
)
from musetalk.models.syncnet import SyncNet, Wav2LipSyncNet
from tests.conftest import assert_equal

FRAMES, STEP = 60, 4  # frames of a clip; grey levels between consecutive frames
ANGLE = 0.2  # radians between the embeddings of consecutive frames
MELS = mel_start(FRAMES) + 1


def make_image(clip: int, frame: int) -> np.ndarray:
    """An image whose blue value encodes the clip, and red the frame."""
    return np.full((256, 256, 3), (80 * clip, 0, STEP * frame), np.uint8)


def make_mel(clip: int) -> np.ndarray:
    """Mel whose first bin encodes the mel frame in 64ths, and the last the clip."""
    mel = np.zeros((MELS, 80), np.float16)
    mel[:, 0], mel[:, -1] = np.arange(MELS) / 64, clip
    return mel


class FakeExpert(SyncNet):
    """Reads clip and frame from faces and mel; embeds them as a vector rotated by `angle` a frame in the clip's plane.

    The cosine of faces and mel is cos(angle x distance in frames from offset `bias`), and 0 for different clips.
    """

    def __init__(self, bias: int = 0, angle: float = ANGLE) -> None:
        super().__init__(frames=5, image_size=96)
        self.weight = nn.Parameter(torch.zeros(1))
        self.bias, self.angle = bias, angle

    def embed_faces(self, images: torch.Tensor) -> torch.Tensor:
        first = (images[:, 0, :, 128, 128] + 1) * 127.5  # RGB
        return self._vectors(first[:, 2] / 80, (first[:, 0] / STEP).round() + self.bias)

    def embed_mel(self, mel: torch.Tensor) -> torch.Tensor:
        return self._vectors(mel[:, 0, -1], mel[:, 0, 0] * 64 / 3.2)

    def _vectors(self, clips: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
        planes = nn.functional.one_hot(clips.round().long(), 3)[:, :, None]  # (B, 3, 1)
        rotated = torch.stack([torch.cos(self.angle * moments), torch.sin(self.angle * moments)], dim=1)
        return (planes * rotated[:, None]).flatten(1)


@pytest.fixture(scope="module")
def make_cache_of(tmp_path_factory, random_tensors) -> Callable[[dict[str, int]], Cache]:
    """A function: numbers of frames by clip name -> a cache of `make_image` and `make_mel`."""

    def make(clips: dict[str, int]) -> Cache:
        folder = tmp_path_factory.mktemp("cache")
        writer = CacheWriter(folder, RIGID)
        for index, (name, frames) in enumerate(clips.items()):
            jpegs, offsets = JpegBuffer([make_image(index, frame) for frame in range(frames)]).tensors()
            tensors = random_tensors(frames) | {"face_jpeg": jpegs, "face_jpeg_offsets": offsets}
            tensors["mel"] = make_mel(index)[: mel_start(frames) + 1]
            metadata = {"source": f"{name}.mp4", "source_bytes": 9, "identity": name, "last": True}
            writer.write(name, tensors, metadata)
        return Cache(folder)

    return make


@pytest.fixture(scope="module")
def cache(make_cache_of) -> Cache:
    return make_cache_of({"a": FRAMES, "b": FRAMES, "c": 30})


def expected_similarities(starts: range, bias: int) -> np.ndarray:
    """Mean cosine at each offset k by definition: 16 mel frames from int(80 (frame + k) / 25) on, if present."""
    similarities = []
    for offset in range(-15, 16):
        begins = [(int(80 * (frame + offset) / 25), frame) for frame in starts if frame + offset >= 0]
        cosines = [np.cos(ANGLE * (begin / 3.2 - frame - bias)) for begin, frame in begins if begin + 16 <= MELS]
        similarities.append(np.mean(cosines) if cosines else np.nan)
    return np.array(similarities)


# The sweep.


@pytest.mark.parametrize("bias", [-15, 0, 7])
def test_the_offset_is_that_of_the_highest_similarity(cache, bias):
    check = check_expert(FakeExpert(bias), cache, ["a"], seed=0)
    np.testing.assert_allclose(check.similarities, expected_similarities(range(56), bias), atol=1e-5)
    assert check.offset == sync_offset(check.similarities) == bias
    assert check.windows == 56


def test_a_sweep_can_start_within_a_clip(cache):
    images = np.stack([cache.clips["a"].image(frame) for frame in range(20, 32)])
    similarities = offset_sweep(FakeExpert(2), images, make_mel(0), first=20)
    assert similarities.shape == (31,) and sync_offset(similarities) == 2
    np.testing.assert_allclose(similarities, expected_similarities(range(20, 28), 2), atol=1e-5)


def test_similarities_beyond_the_audio_are_nan():
    similarities = offset_sweep(FakeExpert(), np.stack([make_image(0, frame) for frame in range(5)]), make_mel(0))
    np.testing.assert_allclose(similarities, expected_similarities(range(1), 0), atol=1e-5)
    assert np.isnan(similarities[:MAX_OFFSET]).all() and not np.isnan(similarities[MAX_OFFSET:]).any()
    assert sync_offset(similarities) == 0
    with pytest.raises(AssertionError):
        offset_sweep(FakeExpert(), np.stack([make_image(0, 0)] * 4), make_mel(0))


def test_offset_and_confidence_by_hand():
    similarities = np.full(31, 0.25)
    similarities[[0, 1]] = np.nan
    similarities[18] = 0.75
    assert sync_offset(similarities) == 3 and sync_confidence(similarities) == 0.5
    assert OFFSETS.tolist() == list(range(-15, 16))


# The check.


@pytest.fixture
def few(monkeypatch) -> None:
    monkeypatch.setattr("musetalk.evaluation.sync_check.WINDOWS", 30)


def test_a_perfect_expert_has_accuracy_1(cache, few):
    """The cosine is at least cos(0.2 x 0.32) in sync, at most cos(0.2 x 5.6) = 0.44 from 6 frames off."""
    for bias in (0, 8):
        check = check_expert(FakeExpert(bias), cache, ["a", "b", "c"], seed=0)
        assert check.accuracy == 1.0 and check.offset == bias


def test_an_expert_insensitive_to_offsets_is_correct_on_other_clips(cache, few):
    """The cosine 15 frames off is still cos(0.05 x 15) = 0.73: with one clip half is correct, with two clips 3/4."""
    assert check_expert(FakeExpert(angle=0.05), cache, ["a"], seed=0).accuracy == 0.5
    check = check_expert(FakeExpert(angle=0.05), cache, ["a", "b"], seed=0)
    assert check.accuracy == 0.75 and check.windows == 30


def test_the_check_is_deterministic_and_leaves_the_network_unchanged(cache, few):
    expert = FakeExpert(angle=0.13)  # misclassifies some pairs, 6 to 8 frames off
    accuracies = [check_expert(expert, cache, ["a", "b"], seed).accuracy for seed in (1, 1, 2)]
    assert accuracies[0] == accuracies[1] != accuracies[2] and 0.75 < accuracies[0] < 1
    torch.manual_seed(0)
    expert = Wav2LipSyncNet(1)  # with batch norms
    before = {name: tensor.clone() for name, tensor in expert.state_dict().items()}
    check_expert(expert, cache, ["c"], seed=0)
    assert_equal(expert.state_dict(), before)
    with pytest.raises(RuntimeError, match="within"), evaluating(expert):
        assert not expert.training
        raise RuntimeError("within")
    assert expert.training


def test_windows_are_spread_evenly_from_the_first_to_the_last(make_cache_of, monkeypatch):
    cache = make_cache_of({"a": 60, "b": 60})
    monkeypatch.setattr("musetalk.evaluation.sync_check.WINDOWS", 9)
    read = []
    monkeypatch.setattr(
        type(cache.clips["a"]), "image", lambda clip, frame, _: read.append((clip.name, frame)) or make_image(0, frame)
    )
    assert check_expert(FakeExpert(), cache, ["a", "b"], seed=0).windows == 9
    # Of 112 windows those of index 0, 13.9, 27.8, ... 111; the second clip starts at index 56.
    starts = [("a", k) for k in (0, 13, 27, 41, 55)] + [("b", k - 56) for k in (69, 83, 97, 111)]
    assert read == [(name, start + k) for name, start in starts for k in range(5)]


def test_clips_shorter_than_a_window_are_refused(make_cache_of):
    with pytest.raises(CacheError, match="5 usable frames"):
        check_expert(FakeExpert(), make_cache_of({"a": 4}), ["a"], seed=0)


def test_accuracy_without_negative_pairs_is_0(make_cache_of):
    check = check_expert(FakeExpert(), make_cache_of({"a": 9}), ["a"], seed=0)
    assert check.accuracy == 0 and check.offset == 0 and check.windows == 5
    assert np.isnan(check.similarities[[0, 10, 20, 30]]).all() and not np.isnan(check.similarities[11:20]).any()
    assert "nan" in str(check)


def test_outputs_that_are_not_finite_are_refused(cache):
    with pytest.raises(SyncError, match="not finite"):
        check_expert(FakeExpert(angle=float("nan")), cache, ["c"], seed=0)


# The result of a check.


def result_of(offset: int, accuracy: float) -> SyncCheck:
    similarities = np.full(31, 0.25)
    similarities[offset + 15] = 0.875
    return SyncCheck(accuracy, similarities, 99)


def test_an_offset_of_up_to_one_frame_is_applied():
    for offset in (-1, 0, 1):
        assert result_of(offset, 0.8).require(allow=False) == offset and result_of(offset, 0.8).fault() == ""


@pytest.mark.parametrize(("offset", "accuracy"), [(2, 1.0), (-2, 1.0), (1, 0.79)])
def test_an_unfit_expert_is_refused_unless_allowed(offset, accuracy):
    with pytest.raises(
        SyncError, match=rf"accuracy {accuracy:.2f}.*{offset:+d} frames.*unfit_expert".replace("+", r"\+")
    ):
        result_of(offset, accuracy).require(allow=False)
    assert result_of(offset, accuracy).require(allow=True) == (offset if abs(offset) <= 1 else 0)


def test_the_table_has_a_row_for_each_offset():
    lines = str(result_of(3, 0.912)).splitlines()
    assert [int(line.split()[0]) for line in lines[1:-1]] == list(range(-15, 16))
    assert "-15   0.250" in lines[1] and "+3   0.875" in lines[19]
    for value in ("0.912", "+3 frames", "0.625", "99 windows"):
        assert value in lines[-1]


def test_the_plot_marks_the_best_offset():
    early, late = (result_of(offset, 0.9).draw() for offset in (-3, 3))
    assert late.dtype == np.uint8 and late.shape == (400, 800, 3) and late.flags.c_contiguous
    red_columns = [np.argmax(((x[..., 2].astype(int) - x[..., 0]) > 100).sum(0)) for x in (early, late)]
    assert red_columns[0] < 400 < red_columns[1]
