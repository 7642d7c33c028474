"""The training set of sync experts: windows of faces with their own mel and with other, ever closer mel."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from musetalk.contract import FeatureContract
from musetalk.data.audio import mel_start
from musetalk.data.cache import Cache, CacheError
from musetalk.data.cache_writer import CacheWriter
from musetalk.data.sync_dataset import SyncDataset, SyncSample, frames_with_audio, read_mel, sync_window_starts

CONTRACT = FeatureContract(margins=(0, 10))
# Clip -> frames, unusable frames, mel frames. "cut" has mel for 21 windows only, "short" for 5.
CLIPS = {"a": (60, [0, 30, 31], 193), "b": (40, [], 129), "cut": (60, [], 81), "short": (9, [], 29)}


@pytest.fixture(scope="module")
def cache(tmp_path_factory, random_tensors) -> Cache:
    folder = tmp_path_factory.mktemp("cache")
    writer = CacheWriter(folder, CONTRACT)
    for seed, (name, (frames, unusable, mels)) in enumerate(CLIPS.items()):
        metadata = {"source": f"{name}.mp4", "source_bytes": 9, "identity": name, "last": True}
        writer.write(name, random_tensors(frames, variants=2, unusable=unusable, mels=mels, seed=seed), metadata)
    return Cache(folder)


def dataset(cache: Cache, clips=("a", "b", "cut"), **options) -> SyncDataset:
    defaults = {"seed": 3, "slots": 4, "frames": 5, "num_steps": 100, "gaps": (15, 3), "other_clips": 0.25}
    return SyncDataset(cache, clips, **(defaults | options))


# Windows.


def test_windows_have_usable_frames_and_all_their_mel(cache):
    """The last window of 60 frames starts at 55, its mel at 176 = int(3.2 x 55), at most 193 - 16."""
    assert sync_window_starts(cache.clips["a"], 5).tolist() == [*range(1, 26), *range(32, 56)]
    assert sync_window_starts(cache.clips["b"], 5).tolist() == list(range(36))
    # With 81 mel frames, a window of 16 starts at 65 at most: frame 20 starts at 64, frame 21 at 67.
    assert sync_window_starts(cache.clips["cut"], 5).tolist() == list(range(21))
    assert sync_window_starts(cache.clips["short"], 5).tolist() == list(range(5))
    assert sync_window_starts(cache.clips["short"], 10).tolist() == []


@pytest.mark.parametrize("frames", [5, 29, 30, 400])
def test_audio_as_long_as_its_video_has_mel_for_every_window(frames):
    """The cache keeps 3.2 mel frames per frame, rounded down, and one more."""

    class Clip(list):
        def rows(self, _: str) -> int:
            return 80 * frames // 25 + 1

        def audio_frame(self, frame: np.ndarray) -> np.ndarray:
            return frame

    for window in (1, 5, 16):
        assert len(frames_with_audio(Clip(range(frames)), window)) >= frames - window + 1


def test_clips_without_room_for_other_mel_are_left_out_or_refused(cache):
    data = dataset(cache, CLIPS, gaps=(15, 3))
    assert data.names == ["a", "b", "cut"]
    for name, count in (("a", 56), ("b", 36), ("cut", 21)):
        assert frames_with_audio(cache.clips[name], 5).tolist() == list(range(count))
    assert dataset(cache, CLIPS, gaps=(15, 2)).names == list(CLIPS)  # of 5 windows the middle one has mel 2 frames away
    for clips, gaps in ((["short"], (15, 3)), ([], (3, 3)), (["cut"], (11, 11))):
        with pytest.raises(CacheError, match=f"mel at least {gaps[1]} frames away"):
            dataset(cache, clips, gaps=gaps)


# Sampling.


@given(step=st.integers(0, 10**6), slot=st.integers(0, 64), seed=st.integers(0, 99))
def test_a_sample_depends_on_seed_step_and_slot_alone(cache, step, slot, seed):
    data = dataset(cache, seed=seed, slots=4)
    for earlier in range(3):
        data.draw(earlier, earlier)
    assert data.draw(step, slot) == dataset(Cache(cache.folder), seed=seed, slots=9).draw(step, slot)


def test_another_seed_step_or_slot_gives_other_samples(cache):
    def samples(seed=3, step=0, slot=0):
        return [dataset(cache, seed=seed).draw(step + 100 * k, slot) for k in range(8)]

    series = [samples(), samples(seed=4), samples(step=1), samples(slot=1)]
    assert all(x != y for k, x in enumerate(series) for y in series[:k])


@given(step=st.integers(0, 150), slot=st.integers(0, 9))
def test_other_mel_is_complete_and_of_another_clip_or_far_enough_away(cache, step, slot):
    data = dataset(cache)
    sample = data.draw(step, slot)
    assert sample.start in sync_window_starts(cache.clips[sample.clip], 5)
    assert sample.other_start in frames_with_audio(cache.clips[sample.other_clip], 5)
    if sample.other_clip == sample.clip:
        room = (len(frames_with_audio(cache.clips[sample.clip], 5)) - 1) // 2
        assert abs(sample.other_start - sample.start) >= min(room, data.gap(step)) >= 3


def test_the_gap_shrinks_linearly_to_its_last_value(cache):
    data = dataset(cache, num_steps=120)
    assert [data.gap(step) for step in (0, 10, 60, 119, 120, 10**9)] == [15, 14, 9, 3, 3, 3]


def test_closer_mel_of_the_same_clip_is_drawn_more_often(cache):
    """Around frame 18 of 36 with a gap of 3: four times as often 3 or 4 frames away as 12 or 16."""
    data = dataset(cache, ["b"], gaps=(3, 3))
    offsets = [
        sample.other_start - 18
        for step in range(400)
        for slot in range(30)
        if (sample := data.draw(step, slot)).start == 18
    ]
    counts = {offset: offsets.count(offset) for offset in set(offsets)}
    assert set(counts) == set(range(-18, 18)) - set(range(-2, 3))
    near, far = (sum(counts[k] + counts[-k] for k in ks) for ks in ((3, 4), (12, 16)))
    assert 3 < near / far < 5.5


def test_shares_of_other_clips_windows_variants_and_mirrors(cache):
    data = dataset(cache)
    samples = [data.draw(step, slot) for step in range(1000) for slot in range(4)]
    pairs = [(sample.clip, sample.other_clip) for sample in samples if sample.other_clip != sample.clip]
    assert 0.22 < len(pairs) / 4000 < 0.28
    assert set(pairs) == set(permutations(data.names, 2))
    assert 0.46 < np.mean([sample.mirrored for sample in samples]) < 0.54
    assert 0.46 < np.mean([sample.variant for sample in samples]) < 0.54
    counts = [[(s.clip, s.start) for s in samples].count(("b", start)) for start in range(36)]  # of 49 + 36 + 21
    assert min(counts) > 0.4 * 4000 / 106 and max(counts) < 1.8 * 4000 / 106


def test_a_single_clip_is_paired_with_its_own_mel(cache):
    data = dataset(cache, ["a"], other_clips=0.9)
    assert {data.draw(step, 0).other_clip for step in range(50)} == {"a"}


# Reading.


def test_a_sample_holds_images_and_mel_of_the_cache(cache):
    item = dataset(cache).read(SyncSample("a", 9, 1, False, "b", 20))
    clip = cache.clips["a"]
    assert item["images"].shape == (5, 256, 256, 3) and item["images"].dtype == torch.uint8
    for k in range(5):
        np.testing.assert_array_equal(item["images"][k], clip.image(9 + k, 1))
    # 3.2 mel frames per frame: from int(28.8) and 64 on.
    np.testing.assert_array_equal(item["mel"], clip.tensor("mel", 28, 44))
    np.testing.assert_array_equal(item["other_mel"], cache.clips["b"].tensor("mel", 64, 80))
    assert item["mel"].dtype == item["other_mel"].dtype == torch.float16
    assert item["where"] == "a, frame 9"


def test_a_mirrored_sample_has_mirrored_images_and_the_same_mel(cache, monkeypatch):
    image = np.tile(np.arange(256, dtype=np.uint8)[:, None], (256, 1, 3))
    monkeypatch.setattr(type(cache.clips["b"]), "image", lambda *_: image)  # the cache has images of one colour
    plain, mirrored = (dataset(cache).read(SyncSample("b", 3, 0, mirror, "b", 20)) for mirror in (False, True))
    np.testing.assert_array_equal(plain["images"][4], image)
    np.testing.assert_array_equal(mirrored["images"][4], image[:, ::-1])
    assert torch.equal(plain["mel"], mirrored["mel"]) and torch.equal(plain["other_mel"], mirrored["other_mel"])


def test_mel_of_the_last_window_is_complete(cache):
    clip = cache.clips["b"]
    assert read_mel(clip, 35, 5).shape == (16, 80) and mel_start(35) == 112
    np.testing.assert_array_equal(read_mel(clip, 35, 5), clip.tensor("mel")[112:128])


def test_batches_hold_samples_in_the_order_of_their_slots(cache):
    data = dataset(cache, slots=4)
    batch = next(iter(torch.utils.data.DataLoader(data, batch_size=4, sampler=range(4, 8))))
    assert batch["images"].shape == (4, 5, 256, 256, 3) and batch["mel"].shape == (4, 16, 80)
    for slot in range(4):
        expected = data.read(data.draw(1, slot))
        assert torch.equal(batch["other_mel"][slot], expected["other_mel"])
        assert batch["where"][slot] == expected["where"]
    assert len(data) > 10**12
