"""The cache: what is written is read, half of anything is never seen, and what does not fit is refused by name."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from musetalk.contract import CACHE_FIELDS, IMAGE_SIZE, ContractError, FeatureContract
from musetalk.data.cache import (
    TENSORS,
    VERSION,
    Cache,
    CacheError,
    CacheWriter,
    Clip,
    JpegBuffer,
    read_contract,
)
from musetalk.files import atomic_write_bytes

ABOUT = {"source": "a.mp4", "source_bytes": 9, "identity": "somebody", "start": 0, "last": True}
CONTRACT = FeatureContract(margins=(0, 10), vae="abc")
ONE_MARGIN = FeatureContract()


@pytest.fixture
def folder(tmp_path, random_tensors) -> Path:
    """A cache of one clip "a" of 6 frames, one of them unusable."""
    writer = CacheWriter(tmp_path / "cache", CONTRACT)
    writer.write("a", random_tensors(6, variants=2, unusable=[2]), ABOUT)
    return tmp_path / "cache"


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.mean((one.astype(float) - other) ** 2))


# Round trip.


@settings(max_examples=20)
@given(
    frames=st.integers(1, 5),
    variants=st.integers(1, 3),
    features=st.integers(1, 12),
    mels=st.integers(1, 9),
    width=st.integers(1, 4),
    unusable=st.sets(st.integers(1, 4)),
    seed=st.integers(0, 99),
)
def test_what_is_written_is_read(
    tmp_path_factory, random_tensors, frames, variants, features, mels, width, unusable, seed
):
    folder = tmp_path_factory.mktemp("cache")
    unusable = sorted(frame for frame in unusable if frame < frames)
    tensors = random_tensors(
        frames, variants=variants, features=features, mels=mels, width=width, unusable=unusable, seed=seed
    )
    contract = replace(CONTRACT, margins=tuple(range(variants)))
    record = CacheWriter(folder, contract).write("a__b", tensors, ABOUT)
    clip = Cache(folder).clips["a__b"]
    assert len(clip) == frames and clip.variants == variants and clip.identity == "somebody"
    assert (
        clip.metadata
        == record
        == ABOUT
        | {
            "frames": frames,
            "usable_frames": frames - len(unusable),
            "bytes": (folder / "clips" / "a__b.safetensors").stat().st_size,
            "sha256": hashlib.sha256((folder / "clips" / "a__b.safetensors").read_bytes()).hexdigest(),
        }
    )
    for name, (dtype, _) in TENSORS.items():
        whole = clip.tensor(name)
        np.testing.assert_array_equal(whole, tensors[name])
        assert whole.dtype == dtype
        for start, stop in ((0, 1), (1, 3), (2, None), (0, 0)):
            if max(start + 1, stop or 0) <= len(whole):
                np.testing.assert_array_equal(clip.tensor(name, start, stop), tensors[name][start:stop])
    np.testing.assert_array_equal(clip.usable, tensors["usable"])


def test_every_picture_is_found_in_its_frame_and_variant(tmp_path, random_tensors):
    """Each is grey of its own level; a frame in the middle has none."""
    levels = [[20, 40], None, [60, 80], [100, 120]]
    images = [
        None if pair is None else np.full((IMAGE_SIZE, IMAGE_SIZE, 3), pair[k], np.uint8)
        for pair in levels
        for k in range(2)
    ]
    jpegs, offsets = JpegBuffer(images).tensors()
    assert jpegs.dtype == np.uint8 and offsets.dtype == np.int64 and len(offsets) == 9
    assert offsets[0] == 0 and offsets[-1] == len(jpegs) and offsets[2] == offsets[3] == offsets[4]
    writer = CacheWriter(tmp_path, CONTRACT)
    tensors = random_tensors(4, variants=2, unusable=[1])
    writer.write("a", tensors | {"face_jpeg": jpegs, "face_jpeg_offsets": offsets}, ABOUT)
    clip = Cache(tmp_path).clips["a"]
    for frame, pair in enumerate(levels):
        for variant in range(2):
            if pair is None:
                with pytest.raises(CacheError, match="a.safetensors: .*frame 1"):
                    clip.image(frame, variant)
            else:
                assert np.abs(clip.image(frame, variant).astype(int) - pair[variant]).max() <= 1


def test_a_clip_without_any_face_can_be_stored(tmp_path, random_tensors):
    CacheWriter(tmp_path, ONE_MARGIN).write("a", random_tensors(3, unusable=[0, 1, 2]), ABOUT)
    clip = Cache(tmp_path).clips["a"]
    assert not clip.usable.any()
    with pytest.raises(CacheError, match="a.safetensors: .*frame 1"):
        clip.image(1)


def test_a_tensor_without_rows_is_read_as_such(tmp_path, random_tensors):
    """A part of a video after its sound has ended has no audio features."""
    CacheWriter(tmp_path, ONE_MARGIN).write("a", random_tensors(2, features=0, mels=0, unusable=[0, 1]), ABOUT)
    clip = Cache(tmp_path).clips["a"]
    assert clip.tensor("audio_features").shape == (0, 2, 3)
    assert clip.tensor("mel").shape == (0, 80) and clip.tensor("face_jpeg").shape == (0,)


def test_the_same_input_gives_the_same_bytes(tmp_path, random_tensors):
    contents = []
    for name in ("one", "two"):
        tensors = random_tensors(4, seed=5)
        shuffled = dict(sorted(tensors.items(), reverse=name == "two"))
        CacheWriter(tmp_path / name, CONTRACT).write("a", shuffled, ABOUT)
        contents.append({path: (tmp_path / name / path).read_bytes() for path in files(tmp_path / name)})
    assert contents[0] == contents[1]
    assert set(contents[0]) == {"contract.json", "clips/a.json", "clips/a.safetensors"}


def test_arrays_in_another_order_of_memory_are_stored_by_their_values(tmp_path, random_tensors):
    tensors = random_tensors(3)
    odd = tensors | {"latents": np.asfortranarray(tensors["latents"]), "mel": tensors["mel"][::-1][::-1]}
    CacheWriter(tmp_path, ONE_MARGIN).write("a", odd, ABOUT)
    clip = Cache(tmp_path).clips["a"]
    np.testing.assert_array_equal(clip.tensor("latents"), tensors["latents"])
    np.testing.assert_array_equal(clip.tensor("mel"), tensors["mel"])


def test_nothing_temporary_is_left(folder):
    assert files(folder) == {"contract.json", "clips/a.json", "clips/a.safetensors"}


def test_pictures_are_stored_close_and_with_all_their_colour():
    """Quality 90, 4:4:4: with colour at half size the red edge below would be lost."""
    from skimage.data import astronaut

    crop = np.ascontiguousarray(astronaut()[0:256, 96:352, ::-1])
    edges = crop.copy()
    edges[:, ::2] = (30, 30, 220)
    edges[:, 1::2] = (30, 150, 30)
    for image, least in ((crop, 35), (edges, 30)):
        jpeg, _ = JpegBuffer([image]).tensors()
        assert psnr(cv2.imdecode(jpeg, cv2.IMREAD_COLOR), image) >= least
    content = JpegBuffer([crop]).tensors()[0].tobytes()
    header = content[content.index(b"\xff\xc0") :]  # the frame's header; 0x11 is a component at full size
    assert [header[11 + 3 * component] for component in range(3)] == [0x11] * 3
    assert len(content) < 45_000


# Interruptions.


@pytest.mark.parametrize("failing_call", [0, 1])
def test_a_clip_cut_off_while_it_is_written_is_not_there(monkeypatch, folder, random_tensors, failing_call):
    rename, calls = os.replace, []

    def fail_once(*paths):
        calls.append(paths)
        if len(calls) - 1 == failing_call:
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(*paths)

    writer = CacheWriter(folder, CONTRACT)
    monkeypatch.setattr(os, "replace", fail_once)
    with pytest.raises(OSError, match="No space"):
        writer.write("b", random_tensors(4, variants=2), ABOUT)
    monkeypatch.undo()
    assert not (folder / "clips" / "b.json").exists()
    assert list(Cache(folder).clips) == ["a"]
    assert CacheWriter(folder, CONTRACT).finished(ABOUT | {"source": "b.mp4"}) == []
    CacheWriter(folder, CONTRACT).write("b", random_tensors(4, variants=2, seed=1), ABOUT)
    assert list(Cache(folder).clips) == ["a", "b"]
    np.testing.assert_array_equal(Cache(folder).clips["b"].tensor("mel"), random_tensors(4, variants=2, seed=1)["mel"])


def test_the_tensors_are_written_before_the_record(monkeypatch, folder, random_tensors):
    order, rename = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(Path(b).name), rename(a, b)))
    CacheWriter(folder, CONTRACT).write("b", random_tensors(4, variants=2), ABOUT)
    assert order == ["b.safetensors", "b.json"]


def test_a_contract_cut_off_while_it_is_written_leaves_no_cache(monkeypatch, tmp_path):
    def fail(*paths):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        CacheWriter(tmp_path, CONTRACT)
    monkeypatch.undo()
    with pytest.raises(CacheError, match="is not a cache"):
        Cache(tmp_path)
    CacheWriter(tmp_path, CONTRACT)
    assert read_contract(tmp_path) == CONTRACT


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "new" / "file"
    atomic_write_bytes(path, b"first")
    atomic_write_bytes(path, b"second")
    assert path.read_bytes() == b"second" and files(tmp_path) == {"new/file"}


# What does not fit.


def broken(name: str, tensors: dict[str, np.ndarray], fault: str) -> dict[str, np.ndarray]:
    array = tensors[name]
    changed = {
        "dtype": array.astype(np.uint16),
        "one axis more": array[None],
        "one axis less": array.reshape(-1) if array.ndim > 1 else array[:1].reshape(()),
        "one row more": np.concatenate([array, array[:1]]),
    }
    return tensors | {name: changed[fault].copy()}


FAULTS = [
    (name, fault)
    for name, (_, shape) in TENSORS.items()
    for fault in ("dtype", "one axis more", "one axis less", "one row more")
    if not (fault == "one row more" and shape[0] in ("N", "F", "M"))
]


@pytest.mark.parametrize(("name", "fault"), FAULTS)
def test_a_tensor_that_does_not_fit_is_refused_when_written_and_when_read(folder, random_tensors, name, fault):
    tensors = broken(name, random_tensors(6, variants=2), fault)
    writer = CacheWriter(folder, CONTRACT)
    with pytest.raises(CacheError, match="^b: tensor "):
        writer.write("b", tensors, ABOUT)
    assert files(folder) == {"contract.json", "clips/a.json", "clips/a.safetensors"}
    path = folder / "clips" / "a.safetensors"
    path.write_bytes(safetensors.numpy.save(tensors))
    with pytest.raises(CacheError) as caught:
        Clip(folder, "a")
    assert str(path) in str(caught.value) and "tensor" in str(caught.value)


@pytest.mark.parametrize("name", TENSORS)
def test_a_missing_or_unknown_tensor_is_named(folder, random_tensors, name):
    tensors = random_tensors(6, variants=2)
    writer = CacheWriter(folder, CONTRACT)
    with pytest.raises(CacheError, match=f"b: .*{name}"):
        writer.write("b", {key: array for key, array in tensors.items() if key != name}, ABOUT)
    with pytest.raises(CacheError, match="b: .*depth"):
        writer.write("b", tensors | {"depth": tensors["mel"]}, ABOUT)
    path = folder / "clips" / "a.safetensors"
    path.write_bytes(safetensors.numpy.save({key: array for key, array in tensors.items() if key != name}))
    with pytest.raises(CacheError, match=name) as caught:
        Cache(folder)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("fault", ["missing", "empty", "truncated", "text"])
def test_a_broken_file_of_tensors_is_named(folder, fault):
    path = folder / "clips" / "a.safetensors"
    content = path.read_bytes()
    path.write_bytes({"missing": b"", "empty": b"", "truncated": content[:-9], "text": b"what? " * 99}[fault])
    if fault == "missing":
        path.unlink()
    with pytest.raises(CacheError) as caught:
        Cache(folder)
    assert str(path) in str(caught.value) and "a.json" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b"3", b"{}"], ids=repr)
@pytest.mark.parametrize("name", ["contract.json", "clips/a.json"])
def test_a_broken_json_file_is_named(folder, name, content):
    """An object without what belongs in it is as broken as half an object."""
    (folder / name).write_bytes(content)
    with pytest.raises((CacheError, ContractError)) as caught:
        Cache(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "contract", [None, {}, 3, [1], {"fps": 25}, CONTRACT.as_dict(CACHE_FIELDS) | {"crop": "square"}]
)
def test_a_contract_of_other_fields_is_refused_by_name(folder, contract):
    (folder / "contract.json").write_text(json.dumps({"version": VERSION, "contract": contract}))
    with pytest.raises((CacheError, ContractError)) as caught:
        Cache(folder)
    assert str(folder) in str(caught.value)


def test_a_broken_picture_is_named_when_it_is_read(folder, random_tensors):
    tensors = random_tensors(6, variants=2)
    tensors["face_jpeg"][:] = 7
    (folder / "clips" / "a.safetensors").write_bytes(safetensors.numpy.save(tensors))
    clip = Cache(folder).clips["a"]
    with pytest.raises(CacheError, match="a.safetensors: .*frame 4"):
        clip.image(4)


def test_a_picture_of_another_size_is_broken(tmp_path, random_tensors):
    tensors = random_tensors(1)
    tensors["face_jpeg"], tensors["face_jpeg_offsets"] = JpegBuffer([np.zeros((64, 64, 3), np.uint8)]).tensors()
    CacheWriter(tmp_path, ONE_MARGIN).write("a", tensors, ABOUT)
    with pytest.raises(CacheError, match="a.safetensors: .*frame 0"):
        Cache(tmp_path).clips["a"].image(0)


@pytest.mark.parametrize("change", ["another usable frame", "a frame less", "shifted", "backwards", "beyond the end"])
def test_pictures_that_are_not_those_of_the_usable_frames_are_refused(folder, random_tensors, change):
    """Offsets must begin at 0, end at the last byte, never fall, and be apart for the usable frames alone."""
    tensors = random_tensors(6, variants=2, unusable=[2])
    usable, offsets = tensors["usable"], tensors["face_jpeg_offsets"]
    if change == "another usable frame":
        usable[2] = True
    elif change == "a frame less":
        usable[3] = False
    elif change == "shifted":
        offsets += 1
    elif change == "backwards":
        offsets[[2, 3]] = offsets[[3, 2]]
    else:
        offsets[-1] += 1
    path = folder / "clips" / "a.safetensors"
    path.write_bytes(safetensors.numpy.save(tensors))
    with pytest.raises(CacheError, match="its images do not match its usable frames; delete a.json") as caught:
        Cache(folder)
    assert str(path) in str(caught.value)


def test_a_clip_of_more_variants_than_the_contract_has_is_refused(folder, random_tensors):
    CacheWriter(folder, CONTRACT).write("b", random_tensors(2, variants=3), ABOUT)
    with pytest.raises(CacheError, match="b.safetensors has 3 margin variants, .*; delete b.json"):
        Cache(folder)


def test_a_folder_that_is_no_cache_or_has_no_clip_is_named(tmp_path):
    with pytest.raises(CacheError, match="is not a cache") as caught:
        Cache(tmp_path / "none")
    assert str(tmp_path / "none") in str(caught.value)
    CacheWriter(tmp_path / "empty", CONTRACT)
    with pytest.raises(CacheError, match="no clip") as caught:
        Cache(tmp_path / "empty")
    assert str(tmp_path / "empty") in str(caught.value)


@pytest.mark.parametrize("version", [VERSION + 1, 0, None, "1"])
def test_another_version_is_named(folder, version):
    values = json.loads((folder / "contract.json").read_text())
    (folder / "contract.json").write_text(json.dumps(values | {"version": version}))
    with pytest.raises(CacheError, match=f"version {version}, this code reads version {VERSION}") as caught:
        Cache(folder)
    assert str(folder) in str(caught.value)


# The contract.


def test_a_cache_keeps_the_cache_fields_of_its_contract(tmp_path):
    contract = replace(CONTRACT, crop="rigid", posterior="sample", window_edge="clamp", positional_encoding=False)
    CacheWriter(tmp_path, contract)
    found = read_contract(tmp_path)
    assert found.as_dict(CACHE_FIELDS) == contract.as_dict(CACHE_FIELDS)
    assert (found.window_edge, found.positional_encoding) == ("zero", True)


@pytest.mark.parametrize(
    ("change", "have", "want"),
    [
        ({"vae": "xyz"}, "'abc'", "'xyz'"),
        ({"bbox_shift": 5}, "0", "5"),
        ({"margins": (0,)}, "(0,)", "(0, 10)"),
        ({"margins": (0, 10, 20)}, "(0, 10)", "(0, 10, 20)"),
        ({"posterior": "sample"}, "'mode'", "'sample'"),
    ],
)
def test_writing_under_other_rules_is_refused(folder, change, have, want):
    with pytest.raises(ContractError) as caught:
        CacheWriter(folder, replace(CONTRACT, **change))
    assert all(part in str(caught.value) for part in (next(iter(change)), have, want))
    assert read_contract(folder) == CONTRACT


def test_writing_on_under_the_same_rules_is_allowed(folder, random_tensors):
    writer = CacheWriter(folder, replace(CONTRACT, window_edge="clamp", positional_encoding=False))
    writer.write("b", random_tensors(2, variants=2), ABOUT)
    assert list(Cache(folder).clips) == ["a", "b"]


def test_a_listing_tells_caches_of_other_clips_or_lengths_apart(tmp_path, random_tensors):
    def listing(name: str, **lengths: int) -> str:
        for clip, frames in lengths.items():
            CacheWriter(tmp_path / name, CONTRACT).write(clip, random_tensors(frames, variants=2), ABOUT)
        return Cache(tmp_path / name).listing()

    assert listing("one", a=6, b=7) == listing("same", b=7, a=6)
    assert len({Cache(tmp_path / "one").listing(), listing("longer", a=6, b=8), listing("renamed", a=6, c=7)}) == 3
