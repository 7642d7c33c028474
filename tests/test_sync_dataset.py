"""What a sync expert learns from: mel that is of a window, mel that is not, and ever nearer to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from musetalk.contract import FeatureContract
from musetalk.data.audio import mel_start
from musetalk.data.cache import Cache, CacheError, CacheWriter
from musetalk.data.sync_dataset import SyncDataset, SyncSample, frames_with_audio, read_mel, window_starts
from musetalk.models.syncnet import Wav2LipSyncNet

CONTRACT = FeatureContract(margins=(0, 10))
# Clip -> frames, unusable ones, mel frames. "quiet" has sound for its first second only, "short" for 5 windows.
CLIPS = {"a": (60, [0, 30, 31], 193), "b": (40, [], 129), "quiet": (60, [], 81), "short": (9, [], 29)}


@pytest.fixture(scope="module")
def cache(tmp_path_factory, random_tensors) -> Cache:
    folder = tmp_path_factory.mktemp("cache")
    writer = CacheWriter(folder, CONTRACT)
    for seed, (name, (frames, unusable, mels)) in enumerate(CLIPS.items()):
        about = {"source": f"{name}.mp4", "source_bytes": 9, "identity": name, "last": True}
        writer.write(name, random_tensors(frames, variants=2, unusable=unusable, mels=mels, seed=seed), about)
    return Cache(folder)


def dataset(cache: Cache, clips=("a", "b", "quiet"), **options) -> SyncDataset:
    given = {"seed": 3, "slots": 4, "frames": 5, "num_steps": 100, "gaps": (15, 3), "other_clips": 0.25}
    return SyncDataset(cache, clips, **(given | options))


# Windows.


def test_windows_are_of_usable_frames_and_have_their_mel(cache):
    """Of 60 frames, 0, 30 and 31 unusable, 193 mel frames: the last window begins at 55, its mel at 176 of 193 - 16."""
    assert window_starts(cache.clips["a"], 5).tolist() == [*range(1, 26), *range(32, 56)]
    assert window_starts(cache.clips["b"], 5).tolist() == list(range(36))
    # 81 mel frames: mel of 16 begins at 65 at most, which is frame 20 (64); frame 21 begins at 67.
    assert window_starts(cache.clips["quiet"], 5).tolist() == list(range(21))
    assert window_starts(cache.clips["short"], 5).tolist() == list(range(5))
    assert window_starts(cache.clips["short"], 10).tolist() == []


@given(frames=st.integers(1, 400), window=st.integers(1, 20))
def test_audio_as_long_as_its_video_has_mel_for_every_window(frames, window):
    """The cache keeps 3.2 mel frames for each frame, rounded down, and one more."""

    class Whole(list):
        def rows(self, _: str) -> int:
            return 80 * frames // 25 + 1

    assert frames_with_audio(Whole(range(frames)), window) >= frames - window + 1


def test_the_clips_drawn_are_those_with_room(cache):
    data = dataset(cache, CLIPS, gaps=(15, 3))
    assert data.names == ["a", "b", "quiet"] and data.mel_starts == {"a": 56, "b": 36, "quiet": 21}
    assert dataset(cache, CLIPS, gaps=(15, 2)).names == list(CLIPS)  # 5 windows: the middle one has mel 2 frames away
    for clips, gaps in ((["short"], (15, 3)), ([], (3, 3)), (["quiet"], (11, 11))):
        with pytest.raises(
            CacheError, match=rf"no clip has 5 consecutive usable frames and mel at least {gaps[1]} frames away"
        ):
            dataset(cache, clips, gaps=gaps)


# Drawing.


@given(step=st.integers(0, 10**6), slot=st.integers(0, 64), seed=st.integers(0, 99))
def test_a_sample_depends_on_seed_step_and_slot_alone(cache, step, slot, seed):
    one = dataset(cache, seed=seed, slots=4)
    for earlier in range(3):
        one.draw(earlier, earlier)
    assert one.draw(step, slot) == dataset(Cache(cache.folder), seed=seed, slots=9).draw(step, slot)


def test_another_seed_step_or_slot_gives_other_samples(cache):
    def drawn(seed=3, step=0, slot=0):
        return [dataset(cache, seed=seed).draw(step + 100 * k, slot) for k in range(8)]

    series = [drawn(), drawn(seed=4), drawn(step=1), drawn(slot=1)]
    assert all(one != other for k, one in enumerate(series) for other in series[:k])


@given(step=st.integers(0, 150), slot=st.integers(0, 9))
def test_other_mel_is_of_another_clip_or_far_enough_away_and_whole(cache, step, slot):
    data = dataset(cache)
    sample = data.draw(step, slot)
    assert sample.start in window_starts(cache.clips[sample.clip], 5)
    assert 0 <= sample.other_start < data.mel_starts[sample.other_clip]
    if sample.other_clip == sample.clip:
        room = (data.mel_starts[sample.clip] - 1) // 2
        assert abs(sample.other_start - sample.start) >= min(room, data.gap(step)) >= 3


def test_the_gap_shrinks_in_a_line_and_stays(cache):
    data = dataset(cache, num_steps=120)
    assert [data.gap(step) for step in (0, 10, 60, 119, 120, 10**9)] == [15, 14, 9, 3, 3, 3]


def test_mel_of_the_clip_is_drawn_the_more_often_the_nearer_it_is(cache):
    """From frame 18 of 36 on, with a gap of 3: four times as often 3 or 4 frames away as 12 or 16."""
    data = dataset(cache, ["b"], gaps=(3, 3))
    offsets = [
        sample.other_start - 18
        for step in range(400)
        for slot in range(40)
        if (sample := data.draw(step, slot)).start == 18
    ]
    counts = {offset: offsets.count(offset) for offset in set(offsets)}
    assert set(counts) == set(range(-18, 18)) - set(range(-2, 3))
    near, far = (sum(counts[k] + counts[-k] for k in ks) for ks in ((3, 4), (12, 16)))
    assert 3 < near / far < 5.5


def test_shares_of_other_clips_windows_variants_and_mirrors(cache):
    data = dataset(cache)
    samples = [data.draw(step, slot) for step in range(1000) for slot in range(4)]
    foreign = [sample for sample in samples if sample.other_clip != sample.clip]
    assert 0.22 < len(foreign) / 4000 < 0.28
    assert {(sample.clip, sample.other_clip) for sample in foreign} == {
        (one, other) for one in data.names for other in data.names if one != other
    }
    assert 0.46 < np.mean([sample.mirrored for sample in samples]) < 0.54
    assert 0.46 < np.mean([sample.variant for sample in samples]) < 0.54
    counts = [[(s.clip, s.start) for s in samples].count(("b", start)) for start in range(36)]  # of 49 + 36 + 21
    assert min(counts) > 0.4 * 4000 / 106 and max(counts) < 1.8 * 4000 / 106


def test_a_single_clip_has_mel_of_its_own_only(cache):
    data = dataset(cache, ["a"], other_clips=0.9)
    assert {data.draw(step, 0).other_clip for step in range(50)} == {"a"}


# Reading.


def test_what_is_read_is_what_the_cache_holds(cache):
    item = dataset(cache).read(SyncSample("a", 9, 1, False, "b", 20))
    clip = cache.clips["a"]
    assert item["images"].shape == (5, 256, 256, 3) and item["images"].dtype == torch.uint8
    for k in range(5):
        np.testing.assert_array_equal(item["images"][k], clip.image(9 + k, 1))
    # 3.2 mel frames to a frame, rounded down: 28.8 and 64.
    np.testing.assert_array_equal(item["mel"], clip.tensor("mel", 28, 44))
    np.testing.assert_array_equal(item["other_mel"], cache.clips["b"].tensor("mel", 64, 80))
    assert item["mel"].dtype == item["other_mel"].dtype == torch.float16
    assert item["where"] == "a, frame 9"


def test_a_mirrored_sample_differs_by_left_and_right_alone(cache):
    data = dataset(cache)
    clip = cache.clips["b"]
    plain, mirrored = (data.read(SyncSample("b", 3, 0, mirror, "b", 20)) for mirror in (False, True))
    picture = np.tile(np.arange(256, dtype=np.uint8)[:, None], (256, 1, 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(clip), "image", lambda *_: picture)  # those of the made-up clips are of one colour
        turned = data.read(SyncSample("b", 3, 0, True, "b", 20))
    np.testing.assert_array_equal(turned["images"][4], picture[:, ::-1])
    assert torch.equal(plain["mel"], mirrored["mel"]) and torch.equal(plain["other_mel"], mirrored["other_mel"])


def test_mel_of_the_last_window_is_whole(cache):
    clip = cache.clips["b"]
    assert read_mel(clip, 35, 5).shape == (16, 80) and mel_start(35) == 112
    np.testing.assert_array_equal(read_mel(clip, 35, 5), clip.tensor("mel")[112:128])


def test_items_make_batches_in_the_order_of_their_slots(cache):
    data = dataset(cache, slots=4)
    batch = next(iter(torch.utils.data.DataLoader(data, batch_size=4, sampler=range(4, 8))))
    assert batch["images"].shape == (4, 5, 256, 256, 3) and batch["mel"].shape == (4, 16, 80)
    for slot in range(4):
        wanted = data.read(data.draw(1, slot))
        assert torch.equal(batch["other_mel"][slot], wanted["other_mel"]) and batch["where"][slot] == wanted["where"]
    assert len(data) > 10**12


def test_a_batch_fits_the_expert(cache):
    expert = Wav2LipSyncNet(1).eval()
    data = SyncDataset(cache, ["b"], seed=0, slots=2, frames=5, num_steps=1, gaps=(3, 3), other_clips=0.5)
    item = data[0]
    images = item["images"].permute(0, 3, 1, 2).float() / 127.5 - 1
    assert expert(images[None], item["mel"][None].float())[0].shape == (1, 16)
