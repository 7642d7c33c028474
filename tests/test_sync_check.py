"""The check of a sync expert, held against experts whose every cosine is known."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from musetalk.contract import RIGID
from musetalk.data.audio import mel_start
from musetalk.data.cache import Cache, CacheError, CacheWriter, encode_jpegs
from musetalk.models.syncnet import SyncNet, Wav2LipSyncNet
from musetalk.training.sync_check import (
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

FRAMES, STEP = 60, 4  # of a clip; grey levels from one frame to the next
ANGLE = 0.2  # radians by which faces or mel of a frame differ from those of the next
MELS = mel_start(FRAMES) + 1


def picture(clip: int, frame: int) -> np.ndarray:
    """Blue tells the clip, red the frame."""
    return np.full((256, 256, 3), (80 * clip, 0, STEP * frame), np.uint8)


def made_up_mel(clip: int) -> np.ndarray:
    """The first bin tells the mel frame in 64ths, the last the clip."""
    mel = np.zeros((MELS, 80), np.float16)
    mel[:, 0], mel[:, -1] = np.arange(MELS) / 64, clip
    return mel


class Planted(SyncNet):
    """Reads frame and clip off faces and mel. They are turned by ANGLE a frame in a plane of the clip's own: the cosine
    is that of ANGLE x how far the mel is from `bias` frames after the faces, and 0 for two clips."""

    def __init__(self, bias: int = 0, angle: float = ANGLE, constant: bool = False) -> None:
        super().__init__(frames=5, image_size=96)
        self.weight = nn.Parameter(torch.zeros(1))
        self.bias, self.angle, self.constant, self.modes = bias, angle, constant, set()

    def embed_faces(self, images: torch.Tensor) -> torch.Tensor:
        first = (images[:, 0, :, 128, 128] + 1) * 127.5  # RGB
        return self._vectors(first[:, 2] / 80, (first[:, 0] / STEP).round() + self.bias)

    def embed_mel(self, mel: torch.Tensor) -> torch.Tensor:
        return self._vectors(mel[:, 0, -1], mel[:, 0, 0] * 64 / 3.2)

    def _vectors(self, clips: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
        self.modes.add((self.training, torch.is_grad_enabled()))
        if self.constant:
            return nn.functional.normalize(torch.ones(len(clips), 6), dim=1)
        planes = nn.functional.one_hot(clips.round().long(), 3)[:, :, None]  # (B, 3, 1)
        turned = torch.stack([torch.cos(self.angle * moments), torch.sin(self.angle * moments)], dim=1)
        return (planes * turned[:, None]).flatten(1)


@pytest.fixture(scope="module")
def make_cache_of(tmp_path_factory, random_tensors) -> Callable[[dict[str, int]], Cache]:
    """A function: clips and their frames -> a cache of pictures and mel that tell what they are."""

    def make(clips: dict[str, int]) -> Cache:
        folder = tmp_path_factory.mktemp("cache")
        writer = CacheWriter(folder, RIGID)
        for index, (name, frames) in enumerate(clips.items()):
            jpegs, offsets = encode_jpegs([picture(index, frame) for frame in range(frames)])
            tensors = random_tensors(frames) | {"face_jpeg": jpegs, "face_jpeg_offsets": offsets}
            tensors["mel"] = made_up_mel(index)[: mel_start(frames) + 1]
            about = {"source": f"{name}.mp4", "source_bytes": 9, "identity": name, "last": True}
            writer.write(name, tensors, about)
        return Cache(folder)

    return make


@pytest.fixture(scope="module")
def cache(make_cache_of) -> Cache:
    return make_cache_of({"a": FRAMES, "b": FRAMES, "c": 30})


def by_hand(starts: range, bias: int) -> np.ndarray:
    """Mean cosine at each offset, from the definition: mel from int(80 (frame + k) / 25) on, 16 frames if there are."""
    similarities = []
    for offset in range(-15, 16):
        begins = [(int(80 * (frame + offset) / 25), frame) for frame in starts if frame + offset >= 0]
        cosines = [np.cos(ANGLE * (begin / 3.2 - frame - bias)) for begin, frame in begins if begin + 16 <= MELS]
        similarities.append(np.mean(cosines) if cosines else np.nan)
    return np.array(similarities)


# The sweep.


@pytest.mark.parametrize("bias", [-15, -4, -1, 0, 1, 7, 15])
def test_an_offset_of_k_is_audio_that_is_k_frames_later(cache, bias):
    """An expert that wants the audio of k frames later is said to hear best at k; each cosine is the one by hand."""
    found = check_expert(Planted(bias), cache, ["a"], seed=0)
    np.testing.assert_allclose(found.similarities, by_hand(range(56), bias), atol=1e-5)
    assert found.offset == sync_offset(found.similarities) == bias
    assert found.windows == 56


def test_the_sweep_of_frames_is_that_of_their_clip(cache):
    images = np.stack([cache.clips["a"].image(frame) for frame in range(20, 32)])
    found = offset_sweep(Planted(2), images, made_up_mel(0), first=20)
    assert found.shape == (31,) and sync_offset(found) == 2
    np.testing.assert_allclose(found, by_hand(range(20, 28), 2), atol=1e-5)


def test_a_single_window_of_the_beginning_has_no_audio_before_it():
    found = offset_sweep(Planted(), np.stack([picture(0, frame) for frame in range(5)]), made_up_mel(0))
    np.testing.assert_allclose(found, by_hand(range(1), 0), atol=1e-5)
    assert np.isnan(found[:MAX_OFFSET]).all() and not np.isnan(found[MAX_OFFSET:]).any()
    assert sync_offset(found) == 0
    with pytest.raises(AssertionError):
        offset_sweep(Planted(), np.stack([picture(0, 0)] * 4), made_up_mel(0))


def test_offset_and_confidence_by_hand():
    similarities = np.full(31, 0.25)
    similarities[[0, 1]] = np.nan
    similarities[18] = 0.75
    assert sync_offset(similarities) == 3 and sync_confidence(similarities) == 0.5
    assert OFFSETS.tolist() == list(range(-15, 16))


# The check.


@pytest.fixture
def few(monkeypatch) -> None:
    monkeypatch.setattr("musetalk.training.sync_check.WINDOWS", 30)


def test_a_perfect_expert_is_right_about_every_pair(cache, few):
    """In sync the cosine is at least cos(0.2 x 0.32); 6 frames off it is at most cos(0.2 x 5.6), 0.44."""
    for bias in (0, 1, -1, 8):
        found = check_expert(Planted(bias), cache, ["a", "b", "c"], seed=0)
        assert found.accuracy == 1.0 and found.offset == bias


def test_an_expert_that_tells_no_times_apart_is_right_about_other_clips(cache, few):
    """15 frames off the cosine is still cos(0.05 x 15): with one clip half of all is right, with two three quarters."""
    assert check_expert(Planted(angle=0.05), cache, ["a"], seed=0).accuracy == 0.5
    found = check_expert(Planted(angle=0.05), cache, ["a", "b"], seed=0)
    assert found.accuracy == 0.75 and found.windows == 30


def test_an_expert_that_always_says_the_same_is_a_coin(cache, few):
    found = check_expert(Planted(constant=True), cache, ["a", "b"], seed=0)
    assert found.accuracy == 0.5 and found.confidence == pytest.approx(0, abs=1e-6)


def test_an_expert_of_the_wrong_sign_is_right_about_what_is_not_in_sync(cache):
    class Against(Planted):
        def embed_mel(self, mel):
            return -super().embed_mel(mel)

    found = check_expert(Against(angle=0.1), cache, ["a"], seed=0)  # from 0 to 15 frames: -1 .. -cos(1.5)
    assert found.accuracy == 0.5 and np.nanmax(found.similarities) < 0.1 and abs(found.offset) == 15


def test_the_check_is_the_same_for_a_seed_and_leaves_the_network_as_it_was(cache, few):
    expert = Planted(angle=0.13)  # wrong about some: 6 to 8 frames off
    found = [check_expert(expert, cache, ["a", "b"], seed) for seed in (1, 1, 2, 3)]
    assert found[0].accuracy == found[1].accuracy and 0.75 < found[0].accuracy < 1
    assert len({one.accuracy for one in found}) > 1
    assert expert.modes == {(False, False)}  # neither in training mode nor with gradients
    assert expert.training and torch.is_grad_enabled()
    check_expert(expert.eval(), cache, ["a"], 0)
    assert not expert.training


def test_batch_norms_gather_nothing_while_they_are_checked(cache):
    torch.manual_seed(0)
    expert = Wav2LipSyncNet(1)
    before = {name: tensor.clone() for name, tensor in expert.state_dict().items()}
    check_expert(expert, cache, ["c"], seed=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in expert.state_dict().items())
    with pytest.raises(RuntimeError, match="within"), evaluating(expert):
        assert not expert.training
        raise RuntimeError("within")
    assert expert.training


def test_at_most_256_windows_are_looked_at_from_the_first_to_the_last(make_cache_of, monkeypatch):
    cache = make_cache_of({"a": 60, "b": 60})
    monkeypatch.setattr("musetalk.training.sync_check.WINDOWS", 9)
    read = []
    monkeypatch.setattr(
        type(cache.clips["a"]), "image", lambda clip, frame, _: read.append((clip.name, frame)) or picture(0, frame)
    )
    assert check_expert(Planted(), cache, ["a", "b"], seed=0).windows == 9
    # Of the 112 places numbers 0, 13.9, 27.8, ... 111; the second clip begins with number 56.
    starts = [("a", k) for k in (0, 13, 27, 41, 55)] + [("b", k - 56) for k in (69, 83, 97, 111)]
    assert read == [(name, start + k) for name, start in starts for k in range(5)]


def test_clips_that_are_too_short_are_refused(make_cache_of):
    cache = make_cache_of({"a": 4})
    for clips in (["a"], []):
        with pytest.raises(CacheError, match="no clip has 5 usable frames in a row"):
            check_expert(Planted(), cache, clips, seed=0)


def test_a_clip_without_audio_far_enough_away_gives_no_accuracy(make_cache_of):
    found = check_expert(Planted(), make_cache_of({"a": 9}), ["a"], seed=0)
    assert found.accuracy == 0 and found.offset == 0 and found.windows == 5
    assert np.isnan(found.similarities[[0, 10, 20, 30]]).all() and not np.isnan(found.similarities[11:20]).any()
    assert "nan" in str(found)


def test_weights_that_are_no_numbers_are_refused(cache):
    expert = Wav2LipSyncNet(1)
    nn.init.constant_(expert.audio_encoder[0].conv_block[0].weight, float("nan"))
    with pytest.raises(SyncError, match="is no number"):
        check_expert(expert, cache, ["c"], seed=0)


# What follows from it.


def made(offset: int, accuracy: float) -> SyncCheck:
    similarities = np.full(31, 0.25)
    similarities[offset + 15] = 0.875
    return SyncCheck(accuracy, similarities, 99)


@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_a_frame_off_is_applied(offset):
    assert made(offset, 0.8).require(allow=False) == offset and made(offset, 0.8).fault() == ""


@pytest.mark.parametrize(("offset", "accuracy"), [(2, 1.0), (-2, 1.0), (15, 0.9), (0, 0.79), (1, 0.0), (-9, 0.5)])
def test_an_expert_that_cannot_be_trusted_is_refused_unless_that_is_allowed(offset, accuracy):
    check = made(offset, accuracy)
    with pytest.raises(SyncError) as caught:
        check.require(allow=False)
    said = str(caught.value)
    assert f"accuracy {accuracy:.2f}" in said and f"{offset:+d} frames" in said and "unfit_expert" in said
    assert check.require(allow=True) == (offset if abs(offset) <= 1 else 0)


def test_the_table_has_a_row_for_each_offset():
    lines = str(made(3, 0.912)).splitlines()
    assert len(lines) == 33
    assert lines[1] == " -15   0.250  " + "#" * 10 and lines[19] == "  +3   0.875  " + "#" * 35
    assert lines[-1] == made(3, 0.912).summary()
    assert re.search(r"accuracy 0.912, .*\+3 frames later, confidence 0.625, of 99 windows", lines[-1])


def test_the_curve_is_drawn():
    picture, other = made(3, 0.9).draw(), made(-3, 0.9).draw()
    assert picture.dtype == np.uint8 and picture.shape == (400, 800, 3) and picture.flags.c_contiguous
    blue, _, red = picture.reshape(-1, 3).astype(int).T
    assert ((blue - red) > 100).any() and ((red - blue) > 100).any()  # the curve, the line of the best offset
    columns = [np.argmax(((x[..., 2].astype(int) - x[..., 0]) > 100).sum(0)) for x in (picture, other)]
    assert columns[0] > 400 > columns[1]
