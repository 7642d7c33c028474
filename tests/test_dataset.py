"""Samples as a function of (seed, step, slot), and a split that no person is on both sides of."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from musetalk.contract import RIGID, FeatureContract
from musetalk.data.audio import audio_windows
from musetalk.data.cache import Cache, CacheError, CacheWriter
from musetalk.data.crop import find_person, mouth_box
from musetalk.data.dataset import FaceDataset, Sample, face_shapes, pose_matched_candidates, read_windows, split_clips
from musetalk.data.video import read_frames

CONTRACT = FeatureContract(margins=(0, 10, 20))
GAP = 5  # FaceDataset's own
UNUSABLE = {"a": [0, 7, 8, 19], "b": [], "short": []}
FRAMES = {"a": 24, "b": 14, "short": GAP}  # no two frames of "short" are far enough apart


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


references = st.sampled_from(["random", "pose_and_mouth"])


@given(
    step=st.integers(0, 10**6),
    slot=st.integers(0, 64),
    seed=st.integers(0, 99),
    frames=st.integers(1, 3),
    references=references,
)
def test_a_sample_depends_on_seed_step_and_slot_alone(folder, cache, step, slot, seed, frames, references):
    one = dataset(cache, seed=seed, frames=frames, references=references, slots=4)
    for earlier in range(3):
        one.draw(earlier, earlier)
    other = dataset(Cache(folder), seed=seed, frames=frames, references=references, slots=8)
    assert one.draw(step, slot) == other.draw(step, slot)


def test_another_seed_step_or_slot_gives_other_samples(cache):
    def drawn(seed=3, step=0, slot=0):
        return [dataset(cache, seed=seed).draw(step + 100 * k, slot) for k in range(8)]

    series = [drawn(), drawn(seed=4), drawn(step=1), drawn(slot=1), drawn(slot=2)]
    assert all(one != other for k, one in enumerate(series) for other in series[:k])
    assert dataset(cache).draw(1, 0) != dataset(cache).draw(0, 1)


@given(
    step=st.integers(0, 10**6),
    slot=st.integers(0, 9),
    frames=st.integers(1, 4),
    gap=st.integers(1, 9),
    references=references,
)
def test_every_frame_drawn_is_usable_and_its_reference_is_far_away(cache, step, slot, frames, gap, references):
    sample = dataset(cache, frames=frames, min_reference_gap=gap, references=references).draw(step, slot)
    usable = cache.clips[sample.clip].usable
    drawn = range(sample.start, sample.start + frames)
    assert len(sample.references) == len(sample.reference_variants) == frames
    assert usable[list(drawn)].all() and usable[list(sample.references)].all()
    assert all(abs(at - frame) >= gap for at, frame in zip(sample.references, drawn, strict=True))
    assert {sample.variant, *sample.reference_variants} <= set(range(3))


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
    assert references == set(range(2 + GAP, 14))


def test_a_window_has_one_variant_and_each_of_its_references_any_other(cache):
    data = dataset(cache, frames=2)
    samples = [data.draw(step, slot) for step in range(500) for slot in range(4)]
    together = np.array([(sample.variant, *sample.reference_variants) for sample in samples])
    counts = np.bincount(together @ (9, 3, 1), minlength=27)
    assert counts.min() > 0.5 * 2000 / 27 and counts.max() < 1.6 * 2000 / 27  # independent of each other


def test_windows_of_three_frames_never_hold_an_unusable_one(cache):
    data = dataset(cache, frames=3)
    starts = {sample.start for step in range(800) if (sample := data.draw(step, 0)).clip == "a"}
    assert starts == {k for k in range(22) if not {k, k + 1, k + 2} & set(UNUSABLE["a"])}


def test_a_frame_without_a_reference_is_not_drawn(tmp_path, random_tensors):
    """Of 8 frames, 3 and 4 have nothing 5 frames away."""
    CacheWriter(tmp_path, CONTRACT).write("c", random_tensors(8, variants=3), about("c"))
    data = dataset(Cache(tmp_path), ["c"])
    assert {data.draw(step, 0).start for step in range(300)} == {0, 1, 2, 5, 6, 7}
    with pytest.raises(CacheError, match="4 consecutive usable frames"):
        dataset(Cache(tmp_path), ["c"], frames=4)


def test_only_the_clips_named_are_drawn(cache):
    data = dataset(cache, ["b"])
    assert {data.draw(step, 0).clip for step in range(50)} == {"b"}


@pytest.mark.parametrize("options", [{"clips": ["short"]}, {"clips": []}, {"clips": ["b"], "frames": 15}])
def test_no_window_at_all_is_refused_with_the_folder(cache, options):
    with pytest.raises(CacheError) as caught:
        dataset(cache, **options)
    assert str(cache.folder) in str(caught.value) and f"{options.get('frames', 1)} consecutive usable frames" in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("margins", "variants"), [((0,), {0}), ((20,), {2}), ((20, 10), {1, 2}), ((0, 10, 20), {0, 1, 2})]
)
def test_the_margins_of_the_contract_say_which_variants_are_drawn(cache, margins, variants):
    data = dataset(cache, contract=FeatureContract(margins=margins))
    samples = [data.draw(step, 0) for step in range(60)]
    assert {sample.variant for sample in samples} == variants
    assert {sample.reference_variants[0] for sample in samples} == variants


# References of the same pose with another mouth.


def heads(count: int, turns: dict[int, float] | None = None, openings: dict[int, float] | None = None) -> np.ndarray:
    """Landmarks (T, 68, 2): eyes 100 apart, a jaw moved aside by a turn, inner lips of 40 x an opening, in pixels."""
    points = np.zeros((count, 68, 2), np.float32)
    points[:, 36], points[:, 45], points[:, 30] = (0, 0), (100, 0), (50, 50)
    points[:, :17, 0] = np.linspace(-20, 120, 17)
    points[:, 60:68, 0] = [30, 40, 50, 60, 70, 60, 50, 40]
    points[:, 60:68, 1] = 80
    for frame, turn in (turns or {}).items():
        points[frame, :17, 0] += turn
    for frame, opening in (openings or {}).items():
        points[frame, [61, 62, 63], 1] -= opening / 2
        points[frame, [65, 66, 67], 1] += opening / 2
    return points


def test_shapes_by_hand():
    jaw, mouth = face_shapes(heads(2, {1: 10}, {1: 20}))
    assert jaw.shape == (2, 17) and mouth.shape == (2, 8)
    np.testing.assert_allclose(jaw[0], np.linspace(-0.7, 0.7, 17), atol=1e-6)  # from the middle between the eyes
    np.testing.assert_allclose(jaw[1], np.linspace(-0.6, 0.8, 17), atol=1e-6)
    np.testing.assert_allclose(mouth[0], [-0.2, -0.1, 0, 0.1, 0.2, 0.1, 0, -0.1], atol=1e-6)
    apart = [0, -0.1j, -0.1j, -0.1j, 0, 0.1j, 0.1j, 0.1j]
    np.testing.assert_allclose(mouth[1] - mouth[0], apart, atol=1e-6)


@given(x=st.floats(-300, 300), y=st.floats(-300, 300), size=st.floats(0.2, 5), roll=st.floats(-1.5, 1.5))
def test_place_and_size_of_a_face_change_no_shape_and_its_roll_the_jaw_alone(x, y, size, roll):
    points = heads(2, {1: 10}, {1: 20})
    turn = size * np.array([[np.cos(roll), np.sin(roll)], [-np.sin(roll), np.cos(roll)]])
    (jaw, mouth), (moved_jaw, moved_mouth) = face_shapes(points), face_shapes(points @ turn + (x, y))
    np.testing.assert_allclose(moved_mouth, mouth, atol=1e-4)
    np.testing.assert_allclose(moved_jaw, jaw * np.exp(1j * roll), atol=1e-4)


def test_every_point_of_jaw_and_inner_lips_counts_and_no_other():
    points = heads(1)
    before = face_shapes(points)
    for point in range(68):
        other = points.copy()
        other[0, point] += 3
        changed = tuple((a != b).any() for a, b in zip(before, face_shapes(other), strict=True))
        if point in (30, 36, 45):
            assert changed[0]  # place and size of the skull
        else:
            assert changed == (point <= 16, point >= 60)


def test_frames_without_a_face_have_shapes_that_nobody_looks_at():
    points = heads(3)
    points[1] = 0
    jaw, mouth = face_shapes(points)
    assert not jaw[1].any() and not mouth[1].any()
    np.testing.assert_array_equal(jaw[[0, 2]], face_shapes(points[[0, 2]])[0])


def test_a_reference_has_the_pose_of_its_frame_and_another_mouth():
    """Frames 1-4: turned little or much, with the mouth of frame 0 or open. Of four, 51 % are three."""
    points = heads(5, {1: 1, 2: 2, 3: 60, 4: 50}, {1: 1, 2: 30, 3: 2, 4: 40})
    found = pose_matched_candidates(*face_shapes(points), 0, np.array([1, 2, 3, 4]))
    assert found.tolist() == [2, 4]  # 1, 2, 4 are nearer by the jaw, 2, 3, 4 farther by the mouth
    assert pose_matched_candidates(*face_shapes(points), 0, np.array([3])).tolist() == [3]


@given(seed=st.integers(0, 9999), count=st.integers(1, 300))
@example(seed=0, count=100)
def test_there_is_a_reference_even_where_the_mouth_moves_with_the_pose(seed, count):
    """The nearer of them are then the less far: only the two roundings up to more than half leave some."""
    rng = np.random.default_rng(seed)
    turns = np.append(0, rng.permutation(count) + 1)[:, None]
    candidates = rng.permutation(count) + 1
    found = pose_matched_candidates(turns * np.ones(17), turns * np.ones(8), 0, candidates)
    assert len(found) == 2 * -(-51 * count // 100) - count >= 1
    assert set(found) <= set(candidates) and len(set(found)) == len(found)


def test_the_pose_and_mouth_of_the_landmarks_in_the_cache_choose_the_references(tmp_path, random_tensors):
    """Every third frame is turned, every second has an open mouth."""
    turns, openings = {k: 40 + k for k in range(0, 60, 3)}, {k: 30 + k / 9 for k in range(0, 60, 2)}
    tensors = random_tensors(60, variants=3, unusable=[40]) | {"landmarks": heads(60, turns, openings)}
    CacheWriter(tmp_path, CONTRACT).write("c", tensors, about("c"))
    data = dataset(Cache(tmp_path), ["c"], references="pose_and_mouth")
    drawn = [data.draw(step, slot) for step in range(400) for slot in range(4)]
    usable, shapes = np.delete(np.arange(60), 40), face_shapes(tensors["landmarks"])
    for sample in drawn:
        far = usable[np.abs(usable - sample.start) >= GAP]
        assert sample.references[0] in pose_matched_candidates(*shapes, sample.start, far)
    straight = [sample for sample in drawn if sample.start % 3]
    assert np.mean([sample.references[0] % 3 > 0 for sample in straight]) > 0.95
    assert np.mean([(sample.references[0] - sample.start) % 2 for sample in straight]) > 0.95
    everyone = {sample.references[0] for sample in drawn if sample.start == 7}
    assert len(everyone) > 5  # a choice is left


def test_real_faces_give_references_of_a_nearer_pose_with_another_mouth(clips, face_backend):
    """Against references at random, by figures that the choice does not look at: nose and opening."""
    faces = find_person(islice(read_frames(clips / "talking_b.mp4"), 100), face_backend, RIGID).faces
    points = np.stack([face.landmarks for face in faces if face])
    noses, openings = points[:, 30] - points[:, 27], points[:, 66, 1] - points[:, 62, 1]
    shapes = face_shapes(points)
    pose, mouth, shares = [], [], []
    for frame in range(0, len(points), 5):
        far = np.flatnonzero(np.abs(np.arange(len(points)) - frame) >= GAP)
        chosen = pose_matched_candidates(*shapes, frame, far)
        away = np.linalg.norm(noses - noses[frame], axis=1)
        opened = np.abs(openings - openings[frame])
        pose.append((away[chosen].mean(), away[far].mean()))
        mouth.append((opened[chosen].mean(), opened[far].mean()))
        shares.append(len(chosen) / len(far))
    assert np.divide(*np.mean(pose, axis=0)) < 0.9 and np.divide(*np.mean(mouth, axis=0)) > 1.2
    assert 0.1 < min(shares) and max(shares) < 0.5


# The mel of a window.


def heard_cache(folder: Path, random_tensors, mels: int) -> Cache:
    """A clip of 40 frames and so many mel frames."""
    tensors = random_tensors(40, variants=3, mels=mels)
    tensors["boxes"][:] = 0, 0, 200, 300
    CacheWriter(folder, CONTRACT).write("c", tensors, about("c"))
    return Cache(folder)


@pytest.fixture(scope="module")
def heard(tmp_path_factory, random_tensors) -> Cache:
    return heard_cache(tmp_path_factory.mktemp("heard"), random_tensors, 129)


@given(offset=st.integers(-4, 4), step=st.integers(0, 999))
def test_the_mel_is_of_the_time_of_the_window(heard, offset, step):
    mel = heard.clips["c"].tensor("mel")
    data = dataset(heard, ["c"], frames=5, mel_frames=16, sync_offset=offset)
    sample = data.draw(step, 0)
    first = int(80 * (sample.start + offset) / 25)  # Wav2Lip's words
    item = data.read(sample)
    assert item["mel"].dtype == torch.float16 and item["mel"].shape == (16, 80) and first >= 0
    np.testing.assert_array_equal(item["mel"], mel[first : first + 16])
    assert "mel" not in dataset(heard, ["c"], frames=5).read(sample)


@pytest.mark.parametrize(
    ("mels", "offset", "first", "last"),
    [
        (129, 0, 0, 35),  # 40 frames of sound, and one: 35 x 3.2 + 16 = 128
        (128, 0, 0, 35),
        (127, 0, 0, 34),  # int(34 x 3.2) + 16 = 124
        (129, 3, 0, 32),
        (129, -3, 3, 35),
        (16, 0, 0, 0),
    ],
)
def test_windows_whose_mel_is_not_whole_are_not_drawn(tmp_path, random_tensors, mels, offset, first, last):
    cache = heard_cache(tmp_path, random_tensors, mels)
    data = dataset(cache, ["c"], frames=5, mel_frames=16, sync_offset=offset)
    assert data.starts["c"].tolist() == list(range(first, last + 1))


def test_a_clip_with_too_little_sound_is_refused_with_the_folder(tmp_path, random_tensors):
    cache = heard_cache(tmp_path, random_tensors, 15)
    with pytest.raises(CacheError, match="16 mel frames") as caught:
        dataset(cache, ["c"], frames=5, mel_frames=16)
    assert str(tmp_path) in str(caught.value)


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
    item = dataset(cache, frames=3).read(Sample("a", 9, (2, 16, 23), 1, (0, 2, 1)))
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in item.items() if name != "where"}
    latents = (3, 4, 32, 32), torch.float16
    assert shapes == {
        "masked_latents": latents,
        "reference_latents": latents,
        "target_latents": latents,
        "audio_window": ((3, 20, 3), torch.float16),
        "target_image": ((3, 256, 256, 3), torch.uint8),
        "mouth_box": ((3, 4), torch.float32),
    }
    np.testing.assert_array_equal(item["masked_latents"], tensors["masked_latents"][9:12, 1])
    np.testing.assert_array_equal(item["target_latents"], tensors["latents"][9:12, 1])
    np.testing.assert_array_equal(item["reference_latents"], tensors["latents"][[2, 16, 23], [0, 2, 1]])
    np.testing.assert_array_equal(item["audio_window"], audio_windows(tensors["audio_features"], [9, 10, 11], CONTRACT))
    for k in range(3):
        np.testing.assert_array_equal(item["target_image"][k], cache.clips["a"].image(9 + k, 1))
        box = mouth_box(tensors["landmarks"][9 + k], tensors["boxes"][9 + k, 1])
        np.testing.assert_array_equal(item["mouth_box"][k], box)
    assert "a" in item["where"] and "9" in item["where"]


def test_the_model_fields_of_the_contract_shape_the_windows(cache, random_tensors):
    features = random_tensors(14, variants=3, seed=1)["audio_features"]
    contract = FeatureContract(margins=(0,), window_edge="clamp")
    item = dataset(cache, contract=contract, frames=2).read(Sample("b", 12, (0, 0), 0, (0, 0)))
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
def test_windows_read_alone_are_those_of_the_whole_clip(folder_of_one_clip, edge):
    clip = Cache(folder_of_one_clip).clips["one"]
    contract = FeatureContract(window_edge=edge)
    whole = audio_windows(clip.tensor("audio_features"), range(len(clip)), contract)
    for start in range(len(clip)):
        for stop in range(start + 1, min(start + 4, len(clip)) + 1):
            np.testing.assert_array_equal(read_windows(clip, start, stop, contract), whole[start:stop])


@pytest.fixture
def folder_of_one_clip(tmp_path, random_tensors):
    CacheWriter(tmp_path, FeatureContract()).write("one", random_tensors(12, features=23), about("one"))
    return tmp_path
