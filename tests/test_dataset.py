"""Samples are functions of (seed, step, slot), references follow their rule, and no identity is in both sets."""

from __future__ import annotations

import tracemalloc
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from benchmarks.reading import sparse_cache
from musetalk.contract import RIGID, FeatureContract
from musetalk.data.audio import audio_windows
from musetalk.data.cache import Cache, CacheError
from musetalk.data.cache_writer import CacheWriter
from musetalk.data.crop import crop_person, mouth_box
from musetalk.data.dataset import (
    FaceDataset,
    Sample,
    read_windows,
    split_clips,
    unit_hash,
)
from musetalk.data.references import face_shapes, pose_matched_candidates
from musetalk.data.sync_dataset import SyncDataset
from musetalk.data.video import read_frames
from musetalk.errors import UserError

CONTRACT = FeatureContract(margins=(0, 10, 20))
GAP = 5  # default min_reference_gap
UNUSABLE = {"a": [0, 7, 8, 19], "b": [], "short": []}
FRAMES = {"a": 24, "b": 14, "short": GAP}  # no two frames of "short" are GAP apart


def metadata_of(name: str) -> dict:
    return {"source": f"{name}.mp4", "source_bytes": 9, "identity": name, "last": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, random_tensors) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    writer = CacheWriter(folder, CONTRACT)
    for seed, (name, frames) in enumerate(FRAMES.items()):
        tensors = random_tensors(frames, variants=3, unusable=UNUSABLE[name], seed=seed)
        writer.write(name, tensors, metadata_of(name))
    return folder


@pytest.fixture(scope="module")
def cache(folder) -> Cache:
    return Cache(folder)


def open_dataset(cache: Cache, clips=("a", "b", "short"), contract=CONTRACT, **options) -> FaceDataset:
    return FaceDataset(cache, clips, contract, **({"seed": 3, "slots": 4} | options))


# Drawing.


references = st.sampled_from(["random", "pose_and_mouth", "adjacent"])


@given(
    step=st.integers(0, 10**6),
    slot=st.integers(0, 64),
    seed=st.integers(0, 99),
    frames=st.integers(1, 3),
    references=references,
)
def test_a_sample_depends_only_on_seed_step_and_slot(folder, cache, step, slot, seed, frames, references):
    used = open_dataset(cache, seed=seed, frames=frames, references=references, slots=4)
    for earlier in range(3):
        used.draw(earlier, earlier)
    fresh = open_dataset(Cache(folder), seed=seed, frames=frames, references=references, slots=8)
    assert used.draw(step, slot) == fresh.draw(step, slot)


def test_another_seed_step_or_slot_gives_other_samples(cache):
    def draw_eight(seed=3, step=0, slot=0):
        return [open_dataset(cache, seed=seed).draw(step + 100 * k, slot) for k in range(8)]

    series = [draw_eight(), draw_eight(seed=4), draw_eight(step=1), draw_eight(slot=1), draw_eight(slot=2)]
    assert all(x != y for k, x in enumerate(series) for y in series[:k])


@given(
    step=st.integers(0, 10**6),
    slot=st.integers(0, 9),
    frames=st.integers(1, 4),
    gap=st.integers(1, 9),
    references=st.sampled_from(["random", "pose_and_mouth"]),
)
def test_all_frames_are_usable_and_references_are_far_away(cache, step, slot, frames, gap, references):
    sample = open_dataset(cache, frames=frames, min_reference_gap=gap, references=references).draw(step, slot)
    usable = cache.clips[sample.clip].usable
    window = range(sample.start, sample.start + frames)
    assert len(sample.references) == len(sample.reference_variants) == frames
    assert usable[list(window)].all() and usable[list(sample.references)].all()
    assert all(abs(reference - frame) >= gap for reference, frame in zip(sample.references, window, strict=True))
    assert {sample.variant, *sample.reference_variants} <= set(range(3))


def test_windows_references_and_variants_are_drawn_uniformly(cache):
    dataset = open_dataset(cache)
    samples = [dataset.draw(step, slot) for step in range(1000) for slot in range(4)]
    windows = [(sample.clip, sample.start) for sample in samples]
    expected = {(name, k) for name in ("a", "b") for k in range(FRAMES[name]) if k not in UNUSABLE[name]}
    counts = np.array([windows.count(window) for window in sorted(expected)])
    mean = 4000 / len(expected)
    assert set(windows) == expected
    assert counts.min() > 0.6 * mean and counts.max() < 1.5 * mean
    assert np.bincount([sample.variant for sample in samples]).min() > 1200
    references = {sample.references[0] for sample in samples if (sample.clip, sample.start) == ("b", 2)}
    assert references == set(range(2 + GAP, 14))


def test_variants_of_a_window_and_its_references_are_independent(cache):
    dataset = open_dataset(cache, frames=2)
    samples = [dataset.draw(step, slot) for step in range(500) for slot in range(4)]
    variants = np.array([(sample.variant, *sample.reference_variants) for sample in samples])
    counts = np.bincount(variants @ (9, 3, 1), minlength=27)
    assert counts.min() > 0.5 * 2000 / 27 and counts.max() < 1.6 * 2000 / 27


def test_windows_of_three_frames_have_no_unusable_frame(cache):
    dataset = open_dataset(cache, frames=3)
    starts = {sample.start for step in range(800) if (sample := dataset.draw(step, 0)).clip == "a"}
    assert starts == {k for k in range(22) if not {k, k + 1, k + 2} & set(UNUSABLE["a"])}


def test_frames_without_a_possible_reference_are_not_drawn(tmp_path, random_tensors):
    """Of 8 frames, 3 and 4 have no frame at a distance of 5."""
    CacheWriter(tmp_path, CONTRACT).write("c", random_tensors(8, variants=3), metadata_of("c"))
    dataset = open_dataset(Cache(tmp_path), ["c"])
    assert {dataset.draw(step, 0).start for step in range(300)} == {0, 1, 2, 5, 6, 7}
    with pytest.raises(CacheError, match="4 consecutive usable frames"):
        open_dataset(Cache(tmp_path), ["c"], frames=4)


def test_only_the_given_clips_are_drawn(cache):
    dataset = open_dataset(cache, ["b"])
    assert {dataset.draw(step, 0).clip for step in range(50)} == {"b"}


@pytest.mark.parametrize("options", [{"clips": ["short"]}, {"clips": []}, {"clips": ["b"], "frames": 15}])
def test_a_cache_without_a_window_is_refused(cache, options):
    with pytest.raises(CacheError, match=f"{options.get('frames', 1)} consecutive usable frames") as caught:
        open_dataset(cache, **options)
    assert str(cache.folder) in str(caught.value)


@pytest.mark.parametrize(("margins", "variants"), [((20,), {2}), ((20, 10), {1, 2}), ((0, 10, 20), {0, 1, 2})])
def test_the_margins_of_the_contract_select_the_variants(cache, margins, variants):
    dataset = open_dataset(cache, contract=FeatureContract(margins=margins))
    samples = [dataset.draw(step, 0) for step in range(60)]
    assert {sample.variant for sample in samples} == variants
    assert {sample.reference_variants[0] for sample in samples} == variants


def test_little_is_kept_in_memory_for_a_frame(tmp_path):
    """64 workers that read 100 hours, 9 million frames, fit into 2 GB if each keeps 3.5 bytes a frame."""
    folder = sparse_cache(tmp_path / "cache", 300)  # 5 hours, without contents

    def open_and_draw() -> tuple[FaceDataset, SyncDataset]:
        cache = Cache(folder)
        names, options = list(cache.clips), {"references": "pose_and_mouth", "frames": 2, "mel_frames": 16}
        faces = open_dataset(cache, names, contract=cache.contract, **options)
        sync = SyncDataset(cache, names, seed=0, slots=1, frames=5, num_steps=9, gaps=(15, 3), other_clips=0.2)
        for step in range(150):
            faces.draw(step, 0), sync.draw(step, 0)
        return faces, sync

    open_and_draw()  # loads what a process loads once
    tracemalloc.start()
    faces, _ = open_and_draw()
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 3.5 * sum(map(len, faces.cache.clips.values()))


# References.


def test_adjacent_references_are_the_nearest_usable_frames(cache):
    dataset = open_dataset(cache, references="adjacent")
    samples = [dataset.draw(step, slot) for step in range(500) for slot in range(4)]
    references = {}
    for sample in samples:
        references.setdefault((sample.clip, sample.start), set()).add(sample.references[0])
    assert references["short", 0] == {1} and references["b", 5] == {4, 6}
    assert references["a", 1] == {2} and references["a", 6] == {5} and references["a", 20] == {21}


def heads(count: int, turns: dict[int, float] | None = None, openings: dict[int, float] | None = None) -> np.ndarray:
    """Landmarks (count, 68, 2) in pixels: eyes 100 apart, a jaw moved sideways by a turn, lips 40 wide with openings.

    turns, openings: pixels by frame.
    """
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


def shapes_of(landmarks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Jaw (T, 17) and mouth (T, 8) as x + iy."""
    return tuple(np.split(face_shapes(landmarks) @ (1, 1j), [17], axis=1))


def test_shapes_by_hand():
    jaw, mouth = shapes_of(heads(2, {1: 10}, {1: 20}))
    assert jaw.shape == (2, 17) and mouth.shape == (2, 8)
    np.testing.assert_allclose(jaw[0], np.linspace(-0.7, 0.7, 17), atol=1e-6)  # from the midpoint of the eyes
    np.testing.assert_allclose(jaw[1], np.linspace(-0.6, 0.8, 17), atol=1e-6)
    np.testing.assert_allclose(mouth[0], [-0.2, -0.1, 0, 0.1, 0.2, 0.1, 0, -0.1], atol=1e-6)
    moved = [0, -0.1j, -0.1j, -0.1j, 0, 0.1j, 0.1j, 0.1j]
    np.testing.assert_allclose(mouth[1] - mouth[0], moved, atol=1e-6)


@given(x=st.floats(-300, 300), y=st.floats(-300, 300), size=st.floats(0.2, 5), roll=st.floats(-1.5, 1.5))
def test_shapes_ignore_position_and_size_and_only_the_jaw_rolls(x, y, size, roll):
    points = heads(2, {1: 10}, {1: 20})
    rotation = size * np.array([[np.cos(roll), np.sin(roll)], [-np.sin(roll), np.cos(roll)]])
    (jaw, mouth), (moved_jaw, moved_mouth) = shapes_of(points), shapes_of(points @ rotation + (x, y))
    np.testing.assert_allclose(moved_mouth, mouth, atol=1e-4)
    np.testing.assert_allclose(moved_jaw, jaw * np.exp(1j * roll), atol=1e-4)


def test_frames_without_a_face_do_not_change_the_shapes_of_others():
    points = heads(3)
    points[1] = 0
    shapes = face_shapes(points)
    assert not shapes[1].any()
    np.testing.assert_array_equal(shapes[[0, 2]], face_shapes(points[[0, 2]]))


def test_a_matched_reference_has_the_same_pose_and_another_mouth():
    """Frames 1-4 are turned little or much, with the mouth of frame 0 or an open one. 51 % of four are three."""
    points = heads(5, {1: 1, 2: 2, 3: 60, 4: 50}, {1: 1, 2: 30, 3: 2, 4: 40})
    found = pose_matched_candidates(face_shapes(points), 0, np.array([1, 2, 3, 4]))
    assert found.tolist() == [2, 4]  # 1, 2, 4 are nearer by the jaw, 2, 3, 4 farther by the mouth
    assert pose_matched_candidates(face_shapes(points), 0, np.array([3])).tolist() == [3]


@given(seed=st.integers(0, 9999), count=st.integers(1, 300))
@example(seed=0, count=100)
def test_a_matched_reference_exists_even_if_the_mouth_moves_with_the_pose(seed, count):
    """Near poses then have near mouths: the halves only overlap because both are rounded up."""
    rng = np.random.default_rng(seed)
    turns = np.append(0, rng.permutation(count) + 1).astype(np.float32)
    candidates = rng.permutation(count) + 1
    found = pose_matched_candidates(np.tile(turns[:, None, None], (25, 2)), 0, candidates)
    assert len(found) == 2 * -(-51 * count // 100) - count >= 1
    assert set(found) <= set(candidates) and len(set(found)) == len(found)


def test_matched_references_use_the_shapes_of_the_cache_or_those_of_its_landmarks(tmp_path, random_tensors):
    """Every third frame is turned, every second has an open mouth. Older caches have no shapes."""
    turns, openings = {k: 40 + k for k in range(0, 60, 3)}, {k: 30 + k / 9 for k in range(0, 60, 2)}
    landmarks = heads(60, turns, openings)
    shapes = {"landmarks": landmarks, "face_shapes": face_shapes(landmarks)}
    tensors = random_tensors(60, variants=3, unusable=[40]) | shapes

    def draw(folder: Path) -> list[Sample]:
        CacheWriter(folder, CONTRACT).write("c", tensors, metadata_of("c"))
        dataset = open_dataset(Cache(folder), ["c"], references="pose_and_mouth")
        return [dataset.draw(step, slot) for step in range(400) for slot in range(4)]

    samples = draw(tmp_path / "new")
    del tensors["face_shapes"]
    assert draw(tmp_path / "old") == samples
    straight = [sample for sample in samples if sample.start % 3]
    assert np.mean([sample.references[0] % 3 > 0 for sample in straight]) > 0.95
    assert np.mean([(sample.references[0] - sample.start) % 2 for sample in straight]) > 0.95
    assert len({sample.references[0] for sample in samples if sample.start == 7}) > 5


@pytest.mark.slow
def test_matched_references_of_a_real_face_have_nearer_poses_and_other_mouths(clips, face_backend):
    """Compared with random references, by measures that the choice does not use: the nose and the mouth opening."""
    faces = crop_person(islice(read_frames(clips / "talking_b.mp4"), 100), face_backend, RIGID).faces
    points = np.stack([face.landmarks for face in faces if face])
    noses, openings = points[:, 30] - points[:, 27], points[:, 66, 1] - points[:, 62, 1]
    shapes = face_shapes(points)
    pose, mouth, shares = [], [], []
    for frame in range(0, len(points), 5):
        far = np.flatnonzero(np.abs(np.arange(len(points)) - frame) >= GAP)
        chosen = pose_matched_candidates(shapes, frame, far)
        pose_distance = np.linalg.norm(noses - noses[frame], axis=1)
        mouth_distance = np.abs(openings - openings[frame])
        pose.append((pose_distance[chosen].mean(), pose_distance[far].mean()))
        mouth.append((mouth_distance[chosen].mean(), mouth_distance[far].mean()))
        shares.append(len(chosen) / len(far))
    assert np.divide(*np.mean(pose, axis=0)) < 0.9 and np.divide(*np.mean(mouth, axis=0)) > 1.2
    assert 0.1 < min(shares) and max(shares) < 0.5


# The mel of a window.


def write_clip_with_mel(folder: Path, random_tensors, mels: int) -> Cache:
    """A cache of one clip of 40 frames with a number of mel frames."""
    tensors = random_tensors(40, variants=3, mels=mels)
    tensors["boxes"][:] = 0, 0, 200, 300
    CacheWriter(folder, CONTRACT).write("c", tensors, metadata_of("c"))
    return Cache(folder)


@pytest.fixture(scope="module")
def cache_with_mel(tmp_path_factory, random_tensors) -> Cache:
    return write_clip_with_mel(tmp_path_factory.mktemp("mel"), random_tensors, 129)


@given(offset=st.integers(-4, 4), step=st.integers(0, 999))
def test_the_mel_starts_with_the_window_plus_the_offset(cache_with_mel, offset, step):
    mel = cache_with_mel.clips["c"].tensor("mel")
    dataset = open_dataset(cache_with_mel, ["c"], frames=5, mel_frames=16, sync_offset=offset)
    sample = dataset.draw(step, 0)
    first = int(80 * (sample.start + offset) / 25)  # as Wav2Lip computes it
    item = dataset.read(sample)
    assert item["mel"].dtype == torch.float16 and item["mel"].shape == (16, 80) and first >= 0
    np.testing.assert_array_equal(item["mel"], mel[first : first + 16])
    assert "mel" not in open_dataset(cache_with_mel, ["c"], frames=5).read(sample)


@pytest.mark.parametrize(
    ("mels", "offset", "first", "last"),
    [
        (128, 0, 0, 35),  # 35 x 3.2 + 16 = 128
        (127, 0, 0, 34),  # int(34 x 3.2) + 16 = 124
        (129, 3, 0, 32),
        (129, -3, 3, 35),
        (16, 0, 0, 0),
    ],
)
def test_windows_with_incomplete_mel_are_not_drawn(tmp_path, random_tensors, mels, offset, first, last):
    cache = write_clip_with_mel(tmp_path, random_tensors, mels)
    dataset = open_dataset(cache, ["c"], frames=5, mel_frames=16, sync_offset=offset)
    assert dataset.starts("c").tolist() == list(range(first, last + 1))


def test_a_cache_without_complete_mel_is_refused(tmp_path, random_tensors):
    cache = write_clip_with_mel(tmp_path, random_tensors, 15)
    with pytest.raises(CacheError, match="16 mel frames"):
        open_dataset(cache, ["c"], frames=5, mel_frames=16)


# Reading.


def test_an_item_is_the_sample_of_its_step_and_slot(cache):
    dataset = open_dataset(cache, slots=4, frames=2)
    for index in (0, 3, 4, 41):
        item, expected = dataset[index], dataset.read(dataset.draw(index // 4, index % 4))
        assert item.keys() == expected.keys() and item["where"] == expected["where"]
        assert all(torch.equal(item[name], expected[name]) for name in item if name != "where")


def test_items_have_the_values_of_the_cache(cache, random_tensors):
    tensors = random_tensors(24, variants=3, unusable=UNUSABLE["a"], seed=0)
    item = open_dataset(cache, frames=3).read(Sample("a", 9, (2, 16, 23), 1, (0, 2, 1)))
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
    assert item["where"] == "a, frame 9"


def test_the_model_fields_of_the_contract_shape_the_windows(cache, random_tensors):
    features = random_tensors(14, variants=3, seed=1)["audio_features"]
    contract = FeatureContract(margins=(0,), window_edge="clamp")
    item = open_dataset(cache, contract=contract, frames=2).read(Sample("b", 12, (0, 0), 0, (0, 0)))
    np.testing.assert_array_equal(item["audio_window"], audio_windows(features, [12, 13], contract))
    assert (item["audio_window"][1, -2:] == torch.from_numpy(features[-1])).all()


@pytest.mark.parametrize("edge", ["zero", "clamp"])
def test_windows_read_in_part_equal_those_of_the_whole_clip(cache, edge):
    clip, contract = cache.clips["b"], FeatureContract(window_edge=edge)
    whole = audio_windows(clip.tensor("audio_features"), range(len(clip)), contract)
    for start in range(len(clip)):
        for stop in range(start + 1, min(start + 4, len(clip)) + 1):
            np.testing.assert_array_equal(read_windows(clip, start, stop, contract), whole[start:stop])


def test_items_form_batches_and_own_their_memory(cache):
    dataset = open_dataset(cache)
    first, second = torch.utils.data.DataLoader(dataset, batch_size=4, sampler=range(8))
    assert first["target_latents"].shape == (4, 1, 4, 32, 32) and len(first["where"]) == 4
    assert torch.equal(second["target_latents"][1], dataset[5]["target_latents"])
    dataset[0]["target_latents"].zero_()
    assert torch.equal(dataset[0]["target_latents"], first["target_latents"][0])


# Splitting.


def cache_of(identities: dict[str, str]) -> SimpleNamespace:
    """A stand-in for a cache. identities: by clip."""
    clips = {name: SimpleNamespace(identity=identity) for name, identity in identities.items()}
    return SimpleNamespace(clips=clips, folder="data/mine")


clip_sets = st.dictionaries(
    st.text("abcd", min_size=1, max_size=3), st.sampled_from(["p", "q", "r", "s", "t"]), min_size=1
)


@given(identities=clip_sets, share=st.floats(0.01, 0.99))
def test_no_identity_is_in_both_sets_and_no_clip_is_lost(identities, share):
    train, held_out, note = split_clips(cache_of(identities), share)
    assert train and sorted(train + held_out) == sorted(identities)
    if len(set(identities.values())) > 1:
        assert held_out and "identities" in note
        assert not {identities[name] for name in train} & {identities[name] for name in held_out}
    elif len(identities) > 1:
        assert held_out and "one identity" in note
    else:
        assert not held_out and "single clip" in note


@given(order=st.permutations(range(20)), count=st.integers(2, 20), share=st.floats(0.01, 0.99))
def test_more_data_in_any_order_moves_no_identity_between_the_sets(order, count, share):
    names = [f"person {k}" for k in order]
    hashes = [unit_hash(name) for name in names[:count]]
    share = min(max(share, min(hashes) + 1e-9), max(hashes))  # identities on both sides, or each side would get one
    train, held_out, _ = split_clips(cache_of({name: name for name in names[:count]}), share)
    more_train, more_held_out, _ = split_clips(cache_of({name: name for name in reversed(names)}), share)
    assert set(train) <= set(more_train) and set(held_out) <= set(more_held_out)


def test_about_the_share_of_many_identities_is_held_out():
    people = {f"person {k}": f"person {k}" for k in range(1000)}
    assert 80 < len(split_clips(cache_of(people), 0.1)[1]) < 120


def test_the_split_is_the_same_on_all_machines():
    """By the SHA-256 of the names: 0.79, 0.24, 0.18, 0.10."""
    people = {name: name for name in "abcd"}
    assert [round(unit_hash(name), 2) for name in people] == [0.79, 0.24, 0.18, 0.1]
    assert split_clips(cache_of(people), 0.2)[:2] == (["a", "b"], ["c", "d"])
    assert split_clips(cache_of(people), 0.01)[:2] == (["a", "b", "c"], ["d"])
    assert split_clips(cache_of(people), 0.99)[:2] == (["a"], ["b", "c", "d"])


def test_undecodable_names_are_split():
    assert split_clips(cache_of({"a": "\udcff", "b": "b"}), 0.1)[:2] == (["a"], ["b"])


def test_clips_are_split_if_there_is_a_single_identity():
    clips = dict.fromkeys("abcd", "one")
    assert split_clips(cache_of(clips), 0.2)[:2] == (["a", "b"], ["c", "d"])
    assert split_clips(cache_of(clips), 0.2, ["b"])[:2] == (["a", "c", "d"], ["b"])
    assert split_clips(cache_of({"a": "one"}), 0.2)[:2] == (["a"], [])


def test_named_identities_are_held_out():
    people = {"p1": "p", "p2": "p", "q1": "q", "r1": "r"}
    assert split_clips(cache_of(people), 0.9, ["p"])[:2] == (["q1", "r1"], ["p1", "p2"])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["p", "x"], "held_out_identities names 'x', which is none of the 2 identities in data/mine, such as 'p'"),
        (["p1"], "held_out_identities names 'p1'"),  # a clip
        (["p", "q"], "held_out_identities names all identities in data/mine; leave some"),
    ],
)
def test_names_that_cannot_be_held_out_are_refused(names, message):
    with pytest.raises(UserError, match=message):
        split_clips(cache_of({"p1": "p", "q1": "q"}), 0.1, names)


# Identities.


@pytest.fixture(scope="module")
def cache_of_two(tmp_path_factory, random_tensors) -> Cache:
    """Three clips of 40 frames of "many" and one of 20 of "few"."""
    writer = CacheWriter(folder := tmp_path_factory.mktemp("identities"), CONTRACT)
    for name, frames, identity in (("m0", 40, "many"), ("few", 20, "few"), ("m1", 40, "many"), ("m2", 40, "many")):
        metadata = metadata_of(name) | {"identity": identity}
        writer.write(name, random_tensors(frames, variants=3, seed=len(name)), metadata)
    return Cache(folder)


@pytest.mark.parametrize(("cap_frames", "share"), [(0, 20 / 140), (60, 20 / 80), (20, 1 / 2), (5, 1 / 2)])
def test_an_identity_is_drawn_by_its_windows_up_to_the_cap_and_its_clips_equally(cache_of_two, cap_frames, share):
    dataset = open_dataset(cache_of_two, list(cache_of_two.clips), identity_cap_minutes=cap_frames / 1500)
    windows = [(sample.clip, sample.start) for step in range(3000) if (sample := dataset.draw(step, 0))]
    clips = [clip for clip, _ in windows]
    assert abs(clips.count("few") / 3000 - share) < 0.04
    of_many = [clips.count(name) / (3000 * (1 - share)) for name in ("m0", "m1", "m2")]
    assert max(of_many) < 1 / 3 + 0.05 and min(of_many) > 1 / 3 - 0.05
    assert set(windows) == {(name, k) for name, clip in cache_of_two.clips.items() for k in range(len(clip))}


# Audio offsets.


def write_with_offset(folder: Path, tensors: dict[str, np.ndarray], offset: int, **metadata: int) -> Cache:
    CacheWriter(folder, CONTRACT).write("c", tensors, metadata_of("c") | {"audio_offset": offset} | metadata)
    return Cache(folder)


@pytest.mark.parametrize("offset", [-4, 0, 3])
def test_a_frame_goes_with_the_audio_of_the_frame_an_offset_later(tmp_path, random_tensors, offset):
    tensors = random_tensors(30, variants=3, mels=97)
    cache = write_with_offset(tmp_path, tensors, offset)
    dataset = open_dataset(cache, ["c"], frames=2, mel_frames=7, sync_offset=1)
    whole = audio_windows(tensors["audio_features"], range(30), CONTRACT)
    for start in range(5, 20):
        item = dataset.read(Sample("c", start, (0, 0), 0, (0, 0)))
        np.testing.assert_array_equal(item["audio_window"], whole[start + offset : start + offset + 2])
        first = (start + offset + 1) * 80 // 25
        np.testing.assert_array_equal(item["mel"], tensors["mel"][first : first + 7])


@pytest.mark.parametrize(
    ("offset", "start", "expected"),
    [(0, 0, range(30)), (-4, 0, range(4, 30)), (3, 0, range(27)), (-4, 750, range(6, 30)), (40, 0, range(0))],
)
def test_frames_whose_corrected_audio_is_outside_the_clip_are_not_usable(
    tmp_path, random_tensors, offset, start, expected
):
    """In a later part of a source, from frame 750 here, the context of the first two frames is not in the clip."""
    tensors = random_tensors(30, variants=3, unusable=[0, 1] if start else [])
    clip = write_with_offset(tmp_path, tensors, offset, start=start).clips["c"]
    assert np.flatnonzero(clip.usable).tolist() == list(expected)


# Silence.


SILENCE = np.random.default_rng(0).standard_normal((2, 24, 2, 3)).astype(np.float16)  # 12 frames


@pytest.fixture(scope="module")
def cache_with_lips(tmp_path_factory, random_tensors) -> Cache:
    """A clip with a closed mouth in frames 3 to 9, 15 and 16, and one whose mouth is never closed."""
    writer = CacheWriter(folder := tmp_path_factory.mktemp("lips"), CONTRACT)
    for name, closed in (("closing", [*range(3, 10), 15, 16]), ("open", [])):
        tensors = random_tensors(24, variants=3, seed=len(name))
        landmarks = tensors["landmarks"]
        landmarks[:, [36, 45]] = [[100, 100], [200, 100]]
        landmarks[:, [61, 62, 63]], landmarks[:, [67, 66, 65]] = [150, 200], [150, 203]
        landmarks[closed, 65:68] = [150, 201]
        writer.write(name, tensors, metadata_of(name))
    return Cache(folder)


@pytest.mark.parametrize(("frames", "starts"), [(1, {*range(3, 10), 15, 16}), (3, set(range(3, 8)))])
def test_samples_of_silence_are_windows_with_a_closed_mouth(cache_with_lips, frames, starts):
    options = {"frames": frames, "silence_share": 0.5, "silence": SILENCE}
    dataset = open_dataset(cache_with_lips, ["closing", "open"], **options)
    samples = [dataset.draw(step, slot) for step in range(300) for slot in range(4)]
    silent = [sample for sample in samples if sample.silence]
    assert {(sample.clip, sample.start) for sample in silent} == {("closing", start) for start in starts}
    of_closing = sum(sample.clip == "closing" for sample in samples)
    assert abs(len(silent) / of_closing - 0.5) < 0.07
    places = {(kind, first) for kind in (0, 1) for first in range(13 - frames)}
    assert {sample.silence for sample in silent} == places
    again = open_dataset(cache_with_lips, ["closing", "open"], **options)
    assert samples == [again.draw(step, slot) for step in range(300) for slot in range(4)]


def test_a_sample_of_silence_has_its_audio_and_the_frames_of_the_clip(cache_with_lips):
    dataset = open_dataset(cache_with_lips, ["closing"], frames=2, silence_share=0.5, silence=SILENCE)
    spoken = Sample("closing", 5, (15, 15), 0, (0, 0))
    silent = Sample("closing", 5, (15, 15), 0, (0, 0), silence=(1, 4))
    spoken, silent = dataset.read(spoken), dataset.read(silent)
    assert all(torch.equal(spoken[name], silent[name]) for name in set(spoken) - {"audio_window", "where"})
    np.testing.assert_array_equal(silent["audio_window"], audio_windows(SILENCE[1], [4, 5], CONTRACT))


def test_silence_is_refused_if_no_mouth_is_closed(cache_with_lips):
    with pytest.raises(CacheError, match="silence_share"):
        open_dataset(cache_with_lips, ["open"], silence_share=0.1, silence=SILENCE)
    with pytest.raises(CacheError, match="8 consecutive"):
        open_dataset(cache_with_lips, ["closing"], frames=8, silence_share=0.1, silence=SILENCE)
