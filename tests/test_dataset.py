"""Samples as a function of (seed, step, slot), and a split that no person is on both sides of."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from musetalk.audio import audio_windows
from musetalk.cache import Cache, CacheError, CacheWriter
from musetalk.contract import FeatureContract
from musetalk.dataset import MIN_REFERENCE_GAP, FaceDataset, Sample, read_windows, split_clips

CONTRACT = FeatureContract(margins=(0, 10, 20))
UNUSABLE = {"a": [0, 7, 8, 19], "b": [], "short": []}
FRAMES = {"a": 24, "b": 14, "short": MIN_REFERENCE_GAP}  # no two frames of "short" are far enough apart


def about(name: str) -> dict:
    return {"source": f"{name}.mp4", "source_bytes": 9, "identity": name, "last": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, random_tensors) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    writer = CacheWriter(folder, CONTRACT)
    for seed, (name, frames) in enumerate(FRAMES.items()):
        tensors = random_tensors(frames, variants=3, unusable=UNUSABLE[name], seed=seed)
        writer.write(name, tensors, about(name))
    return folder


@pytest.fixture(scope="module")
def cache(folder) -> Cache:
    return Cache(folder)


def dataset(cache: Cache, clips=("a", "b", "short"), contract=CONTRACT, **options) -> FaceDataset:
    return FaceDataset(cache, clips, contract, **({"seed": 3, "slots": 4} | options))


# Drawing.


@given(step=st.integers(0, 10**6), slot=st.integers(0, 64), seed=st.integers(0, 99), frames=st.integers(1, 3))
def test_a_sample_depends_on_seed_step_and_slot_alone(folder, cache, step, slot, seed, frames):
    one = dataset(cache, seed=seed, frames=frames, slots=4)
    for earlier in range(3):
        one.draw(earlier, earlier)
    other = dataset(Cache(folder), seed=seed, frames=frames, slots=8)
    assert one.draw(step, slot) == other.draw(step, slot)


def test_another_seed_step_or_slot_gives_other_samples(cache):
    def drawn(seed=3, step=0, slot=0):
        return [dataset(cache, seed=seed).draw(step + 100 * k, slot) for k in range(8)]

    series = [drawn(), drawn(seed=4), drawn(step=1), drawn(slot=1), drawn(slot=2)]
    assert all(one != other for k, one in enumerate(series) for other in series[:k])
    assert dataset(cache).draw(1, 0) != dataset(cache).draw(0, 1)


@given(step=st.integers(0, 10**6), slot=st.integers(0, 9), frames=st.integers(1, 4))
def test_every_frame_drawn_is_usable_and_its_reference_is_far_away(cache, step, slot, frames):
    sample = dataset(cache, frames=frames).draw(step, slot)
    usable = cache.clips[sample.clip].usable
    drawn = range(sample.start, sample.start + frames)
    assert sample.clip in ("a", "b") and len(sample.references) == frames
    assert usable[list(drawn)].all() and usable[list(sample.references)].all()
    assert all(abs(at - frame) >= MIN_REFERENCE_GAP for at, frame in zip(sample.references, drawn, strict=True))
    assert sample.variant in range(3)


def test_every_window_reference_and_variant_is_drawn_about_equally_often(cache):
    data = dataset(cache)
    samples = [data.draw(step, slot) for step in range(1000) for slot in range(4)]
    windows = [(sample.clip, sample.start) for sample in samples]
    wanted = {(name, k) for name in ("a", "b") for k in range(FRAMES[name]) if k not in UNUSABLE[name]}
    counts = np.array([windows.count(window) for window in sorted(wanted)])
    assert set(windows) == wanted
    assert counts.sum() == 4000 and counts.min() > 0.6 * 4000 / len(wanted) and counts.max() < 1.5 * 4000 / len(wanted)
    assert np.bincount([sample.variant for sample in samples]).min() > 1200
    references = {sample.references[0] for sample in samples if (sample.clip, sample.start) == ("b", 2)}
    assert references == set(range(2 + MIN_REFERENCE_GAP, 14))


def test_windows_of_three_frames_never_hold_an_unusable_one(cache):
    data = dataset(cache, frames=3)
    starts = {sample.start for step in range(800) if (sample := data.draw(step, 0)).clip == "a"}
    assert starts == {k for k in range(22) if not {k, k + 1, k + 2} & set(UNUSABLE["a"])}


def test_a_frame_without_a_reference_is_not_drawn(tmp_path, random_tensors):
    """Of 8 frames, 3 and 4 have nothing 5 frames away."""
    CacheWriter(tmp_path, CONTRACT).write("c", random_tensors(8, variants=3), about("c"))
    data = dataset(Cache(tmp_path), ["c"])
    assert {data.draw(step, 0).start for step in range(300)} == {0, 1, 2, 5, 6, 7}
    with pytest.raises(CacheError, match="4 usable frames"):
        dataset(Cache(tmp_path), ["c"], frames=4)


def test_only_the_clips_named_are_drawn(cache):
    data = dataset(cache, ["b"])
    assert {data.draw(step, 0).clip for step in range(50)} == {"b"}


@pytest.mark.parametrize("options", [{"clips": ["short"]}, {"clips": []}, {"clips": ["b"], "frames": 15}])
def test_no_window_at_all_is_refused_with_the_folder(cache, options):
    with pytest.raises(CacheError) as caught:
        dataset(cache, **options)
    assert str(cache.folder) in str(caught.value) and f"{options.get('frames', 1)} usable frames" in str(caught.value)


@pytest.mark.parametrize(
    ("margins", "variants"), [((0,), {0}), ((20,), {2}), ((20, 10), {1, 2}), ((0, 10, 20), {0, 1, 2})]
)
def test_the_margins_of_the_contract_say_which_variants_are_drawn(cache, margins, variants):
    data = dataset(cache, contract=FeatureContract(margins=margins))
    assert {data.draw(step, 0).variant for step in range(60)} == variants


# Reading.


def test_an_item_is_the_sample_of_its_step_and_slot(cache):
    data = dataset(cache, slots=4, frames=2)
    for index in (0, 3, 4, 41):
        item, wanted = data[index], data.read(data.draw(index // 4, index % 4))
        assert item.keys() == wanted.keys() and item["where"] == wanted["where"]
        assert all(torch.equal(item[name], wanted[name]) for name in item if name != "where")
    assert len(data) > 10**12


def test_what_is_read_is_what_the_cache_holds(cache, random_tensors):
    tensors = random_tensors(24, variants=3, unusable=UNUSABLE["a"], seed=0)
    item = dataset(cache, frames=3).read(Sample("a", 9, (2, 16, 23), 1))
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in item.items() if name != "where"}
    latents = (3, 4, 32, 32), torch.float16
    assert shapes == {
        "masked_latents": latents,
        "reference_latents": latents,
        "target_latents": latents,
        "audio_window": ((3, 20, 3), torch.float16),
        "target_image": ((3, 256, 256, 3), torch.uint8),
    }
    np.testing.assert_array_equal(item["masked_latents"], tensors["masked_latents"][9:12, 1])
    np.testing.assert_array_equal(item["target_latents"], tensors["latents"][9:12, 1])
    np.testing.assert_array_equal(item["reference_latents"], tensors["latents"][[2, 16, 23], 1])
    np.testing.assert_array_equal(item["audio_window"], audio_windows(tensors["audio_features"], [9, 10, 11], CONTRACT))
    for k in range(3):
        np.testing.assert_array_equal(item["target_image"][k], cache.clips["a"].image(9 + k, 1))
    assert "a" in item["where"] and "9" in item["where"]


def test_the_model_fields_of_the_contract_shape_the_windows(cache, random_tensors):
    features = random_tensors(14, variants=3, seed=1)["audio_features"]
    contract = FeatureContract(margins=(0,), window_edge="clamp", sync_offset=2)
    item = dataset(cache, contract=contract, frames=2).read(Sample("b", 12, (0, 0), 0))
    np.testing.assert_array_equal(item["audio_window"], audio_windows(features, [12, 13], contract))
    assert (item["audio_window"][1, -2:] == torch.from_numpy(features[-1])).all()  # the last one again, both states
    np.testing.assert_array_equal(read_windows(cache.clips["b"], 12, 14, contract), item["audio_window"])


def test_samples_make_batches_and_own_their_memory(cache):
    data = dataset(cache)
    loader = torch.utils.data.DataLoader(data, batch_size=4, sampler=range(8))
    first, second = list(loader)
    assert first["target_latents"].shape == (4, 1, 4, 32, 32) and len(first["where"]) == 4
    assert torch.equal(second["target_latents"][1], data[5]["target_latents"])
    data[0]["target_latents"].zero_()
    assert torch.equal(data[0]["target_latents"], first["target_latents"][0])


# Splitting.


def with_identities(identities: dict[str, str]) -> SimpleNamespace:
    return SimpleNamespace(clips={name: SimpleNamespace(identity=identity) for name, identity in identities.items()})


clip_sets = st.dictionaries(
    st.text("abcd", min_size=1, max_size=3), st.sampled_from(["p", "q", "r", "s", "t"]), min_size=1
)


@given(identities=clip_sets, share=st.floats(0, 0.95), seed=st.integers(0, 9))
def test_no_identity_is_on_both_sides_and_no_clip_is_lost(identities, share, seed):
    train, held, note = split_clips(with_identities(identities), share, seed)
    assert sorted(train + held) == sorted(identities) and train == sorted(train) and held == sorted(held)
    sides = [{identities[name] for name in side} for side in (train, held)]
    if len(set(identities.values())) > 1:
        assert not sides[0] & sides[1]
        assert held and "identities" in note
    elif len(identities) > 1:
        assert held and "one identity" in note
    else:
        assert not held and "single clip" in note
    assert (train, held, note) == split_clips(with_identities(dict(sorted(identities.items()))), share, seed)


@given(identities=clip_sets, share=st.floats(0, 0.95), seed=st.integers(0, 9))
def test_something_is_always_left_to_train_on(identities, share, seed):
    assert split_clips(with_identities(identities), share, seed)[0]


@pytest.mark.parametrize(("share", "count"), [(0, 1), (0.1, 1), (0.2, 2), (0.25, 2), (0.5, 5)])
def test_the_share_is_of_the_identities(share, count):
    people = {f"{person}{k}": person for person in "abcdefghij" for k in range(1 + (person == "a") * 20)}
    _, held, note = split_clips(with_identities(people), share, 0)
    assert len({people[name] for name in held}) == count and f"held out {count} of 10 identities" in note


def test_the_clips_of_a_single_identity_are_held_out_whole():
    train, held, note = split_clips(with_identities(dict.fromkeys("abcd", "one")), 0.25, 0)
    assert (len(train), len(held)) == (3, 1) and "held out 1 of 4 clips" in note


def test_a_single_clip_is_not_held_out():
    assert split_clips(with_identities({"a": "one"}), 0.5, 0)[:2] == (["a"], [])


def test_another_seed_holds_out_others():
    people = {name: name for name in "abcdefghij"}
    assert len({split_clips(with_identities(people), 0.2, seed)[1][0] for seed in range(20)}) > 2


@pytest.mark.parametrize("edge", ["zero", "clamp"])
@pytest.mark.parametrize("sync_offset", [-3, 0, 5, 40])
def test_windows_read_alone_are_those_of_the_whole_clip(folder_of_one_clip, edge, sync_offset):
    clip = Cache(folder_of_one_clip).clips["one"]
    contract = FeatureContract(window_edge=edge, sync_offset=sync_offset)
    whole = audio_windows(clip.tensor("audio_features"), range(len(clip)), contract)
    for start in range(len(clip)):
        for stop in range(start + 1, min(start + 4, len(clip)) + 1):
            np.testing.assert_array_equal(read_windows(clip, start, stop, contract), whole[start:stop])


@pytest.fixture
def folder_of_one_clip(tmp_path, random_tensors):
    CacheWriter(tmp_path, FeatureContract()).write("one", random_tensors(12, features=23), about("one"))
    return tmp_path
