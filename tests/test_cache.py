"""Reading and writing clips of a cache, interrupted writes, and files that do not fit."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import safetensors.numpy

from musetalk.contract import CACHE_FIELDS, IMAGE_SIZE, ContractError, FeatureContract
from musetalk.data.cache import Cache, CacheError, Clip, read_contract
from musetalk.data.cache_format import TENSORS, VERSION
from musetalk.data.cache_writer import CacheWriter, JpegBuffer

METADATA = {"source": "a.mp4", "source_bytes": 9, "identity": "somebody", "start": 0, "last": True}
CONTRACT = FeatureContract(margins=(0, 10), vae="abc")
ONE_MARGIN = FeatureContract()


@pytest.fixture
def folder(tmp_path, random_tensors) -> Path:
    """A cache of one clip "a" of 6 frames, one of them unusable."""
    writer = CacheWriter(tmp_path / "cache", CONTRACT)
    writer.write("a", random_tensors(6, variants=2, unusable=[2]), METADATA)
    return tmp_path / "cache"


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def psnr(x: np.ndarray, y: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.mean((x.astype(float) - y) ** 2))


# Round trip.


@pytest.mark.parametrize(("frames", "variants", "unusable"), [(1, 1, []), (5, 3, [1, 4]), (3, 1, [0, 1, 2])])
def test_a_written_clip_is_read_unchanged(tmp_path, random_tensors, frames, variants, unusable):
    tensors = random_tensors(frames, variants=variants, unusable=unusable, features=frames + 2, mels=4, width=6)
    contract = replace(CONTRACT, margins=tuple(range(variants)))
    record = CacheWriter(tmp_path, contract).write("a__b", tensors, METADATA)
    clip, content = Cache(tmp_path).clips["a__b"], (tmp_path / "clips" / "a__b.safetensors").read_bytes()
    assert len(clip) == frames and clip.variants == variants and clip.identity == "somebody"
    numbers = {"frames": frames, "usable_frames": frames - len(unusable), "bytes": len(content)}
    digest = hashlib.sha256(content).hexdigest()
    assert record == METADATA | numbers | {"sha256": digest, "scores": {}, "audio_offset": 0}
    assert clip.metadata == record
    for name, (dtype, _) in TENSORS.items():
        assert clip.tensor(name).dtype == dtype
        np.testing.assert_array_equal(clip.tensor(name), tensors[name])
        np.testing.assert_array_equal(clip.tensor(name, 1, 3), tensors[name][1:3])
    np.testing.assert_array_equal(clip.usable, tensors["usable"])


def test_scores_and_the_audio_offset_of_a_clip_are_read(tmp_path, random_tensors):
    metadata = METADATA | {"scores": {"sharpness": 0.5, "faces": 2}, "audio_offset": -3}
    CacheWriter(tmp_path, ONE_MARGIN).write("a", random_tensors(2), metadata)
    found = Cache(tmp_path).clips["a"].metadata
    assert (found["scores"], found["audio_offset"]) == ({"sharpness": 0.5, "faces": 2}, -3)


def test_a_clip_made_before_audio_scores_and_offset_existed_is_read(folder, random_tensors):
    tensors = random_tensors(6, variants=2)
    del tensors["audio"]
    (folder / "clips" / "a.safetensors").write_bytes(safetensors.numpy.save(tensors))
    path = folder / "clips" / "a.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({name: record[name] for name in record if name not in ("scores", "audio_offset")}))
    clip = Cache(folder).clips["a"]
    assert (clip.metadata["scores"], clip.metadata["audio_offset"]) == ({}, 0)
    assert len(clip.tensor("latents")) == 6
    with pytest.raises(CacheError, match="a.safetensors has no tensor audio; delete a.json"):
        clip.tensor("audio")


def test_every_image_belongs_to_its_frame_and_variant(tmp_path, random_tensors):
    levels = [[20, 40], [None, None], [60, 80], [100, 120]]  # grey levels; the second frame is unusable
    images = [
        None if level is None else np.full((IMAGE_SIZE, IMAGE_SIZE, 3), level, np.uint8)
        for frame in levels
        for level in frame
    ]
    jpegs, offsets = JpegBuffer(images).tensors()
    tensors = random_tensors(4, variants=2, unusable=[1])
    CacheWriter(tmp_path, CONTRACT).write("a", tensors | {"face_jpeg": jpegs, "face_jpeg_offsets": offsets}, METADATA)
    clip = Cache(tmp_path).clips["a"]
    for frame, variant in np.ndindex(4, 2):
        if frame == 1:
            with pytest.raises(CacheError, match="a.safetensors: .*frame 1"):
                clip.image(frame, variant)
        else:
            assert np.abs(clip.image(frame, variant).astype(int) - levels[frame][variant]).max() <= 1


def test_empty_tensors_are_read(tmp_path, random_tensors):
    """A part of a video after the end of its audio has no audio features."""
    CacheWriter(tmp_path, ONE_MARGIN).write("a", random_tensors(2, features=0, mels=0, unusable=[0, 1]), METADATA)
    clip = Cache(tmp_path).clips["a"]
    assert clip.tensor("audio_features").shape == (0, 2, 3)
    assert clip.tensor("mel").shape == (0, 80) and clip.tensor("face_jpeg").shape == (0,)


def test_the_same_input_gives_the_same_bytes(tmp_path, random_tensors):
    contents = []
    for name in ("one", "two"):
        tensors = random_tensors(4, seed=5)
        shuffled = dict(sorted(tensors.items(), reverse=name == "two"))
        CacheWriter(tmp_path / name, CONTRACT).write("a", shuffled, METADATA)
        contents.append({path: (tmp_path / name / path).read_bytes() for path in files(tmp_path / name)})
    assert contents[0] == contents[1]
    assert set(contents[0]) == {"contract.json", "clips/a.json", "clips/a.safetensors"}


def test_arrays_of_any_memory_layout_are_stored_by_value(tmp_path, random_tensors):
    tensors = random_tensors(3)
    odd = tensors | {"latents": np.asfortranarray(tensors["latents"]), "mel": tensors["mel"][::-1][::-1]}
    CacheWriter(tmp_path, ONE_MARGIN).write("a", odd, METADATA)
    clip = Cache(tmp_path).clips["a"]
    np.testing.assert_array_equal(clip.tensor("latents"), tensors["latents"])
    np.testing.assert_array_equal(clip.tensor("mel"), tensors["mel"])


def test_images_keep_their_detail_and_colour():
    """Quality 90 without chroma subsampling, which would lose the red and green columns."""
    from skimage.data import astronaut

    crop = np.ascontiguousarray(astronaut()[0:256, 96:352, ::-1])
    edges = crop.copy()
    edges[:, ::2] = (30, 30, 220)
    edges[:, 1::2] = (30, 150, 30)
    for image, minimum in ((crop, 35), (edges, 30)):
        jpeg, _ = JpegBuffer([image]).tensors()
        assert psnr(cv2.imdecode(jpeg, cv2.IMREAD_COLOR), image) >= minimum
    content = JpegBuffer([crop]).tensors()[0].tobytes()
    header = content[content.index(b"\xff\xc0") :]  # the frame's header; 0x11 is a component at full size
    assert [header[11 + 3 * component] for component in range(3)] == [0x11] * 3
    assert len(content) < 45_000


# Interrupted writes.


@pytest.fixture
def full_disk(monkeypatch) -> Callable[[int], None]:
    """A function that lets the rename of a given index fail."""

    def fail_at(index: int) -> None:
        rename, calls = os.replace, []

        def fail_once(*paths):
            calls.append(paths)
            if len(calls) - 1 == index:
                raise OSError(errno.ENOSPC, "No space left on device")
            return rename(*paths)

        monkeypatch.setattr(os, "replace", fail_once)

    return fail_at


@pytest.mark.parametrize("failing_call", [0, 1])
def test_an_interrupted_clip_is_ignored_and_written_again(full_disk, folder, random_tensors, failing_call):
    writer, tensors = CacheWriter(folder, CONTRACT), random_tensors(4, variants=2)
    full_disk(failing_call)
    with pytest.raises(OSError, match="No space"):
        writer.write("b", tensors, METADATA)
    assert not (folder / "clips" / "b.json").exists() and list(Cache(folder).clips) == ["a"]
    assert writer.finished(METADATA | {"source": "b.mp4"}) == []
    writer.write("b", tensors, METADATA)
    assert files(folder) == {
        "contract.json",
        *(f"clips/{name}.{kind}" for name in "ab" for kind in ("json", "safetensors")),
    }
    np.testing.assert_array_equal(Cache(folder).clips["b"].tensor("mel"), tensors["mel"])


def test_an_interrupted_contract_leaves_no_cache(full_disk, tmp_path):
    full_disk(0)
    with pytest.raises(OSError, match="No space"):
        CacheWriter(tmp_path, CONTRACT)
    with pytest.raises(CacheError, match="is not a cache"):
        Cache(tmp_path)
    CacheWriter(tmp_path, CONTRACT)
    assert read_contract(tmp_path) == CONTRACT


# Invalid files.


def broken(name: str, tensors: dict[str, np.ndarray], fault: str) -> dict[str, np.ndarray]:
    array = tensors[name]
    changed = {
        "dtype": array.astype(np.uint16),
        "one axis more": array[None],
        "one axis less": array.reshape(-1) if array.ndim > 1 else array[:1].reshape(()),
        "one row more": np.concatenate([array, array[:1]]),
    }
    return tensors | {name: changed[fault].copy()}


FAULTS = [(name, "dtype") for name in TENSORS] + [
    ("latents", "one axis more"),
    ("latents", "one axis less"),
    *((name, "one row more") for name, (_, shape) in TENSORS.items() if shape[0] not in ("N", "F", "M")),
]


@pytest.mark.parametrize(("name", "fault"), FAULTS)
def test_a_tensor_that_does_not_fit_is_refused_when_written_and_when_read(folder, random_tensors, name, fault):
    tensors = broken(name, random_tensors(6, variants=2), fault)
    with pytest.raises(CacheError, match="^b: tensor "):
        CacheWriter(folder, CONTRACT).write("b", tensors, METADATA)
    assert files(folder) == {"contract.json", "clips/a.json", "clips/a.safetensors"}
    path = folder / "clips" / "a.safetensors"
    path.write_bytes(safetensors.numpy.save(tensors))
    with pytest.raises(CacheError, match=f"^{path}: tensor "):
        Clip(folder, "a")


@pytest.mark.parametrize("name", ["latents", "usable", "boxes", "depth"])
def test_a_missing_or_unknown_tensor_is_refused_by_name(folder, random_tensors, name):
    tensors = random_tensors(6, variants=2)
    if name in tensors:
        del tensors[name]
    else:
        tensors[name] = tensors["mel"]
    with pytest.raises(CacheError, match=f"^b: .*{name}"):
        CacheWriter(folder, CONTRACT).write("b", tensors, METADATA)
    path = folder / "clips" / "a.safetensors"
    path.write_bytes(safetensors.numpy.save(tensors))
    with pytest.raises(CacheError, match=f"^{path}: .*{name}"):
        Cache(folder)


@pytest.mark.parametrize("fault", ["missing", "empty", "truncated", "text"])
def test_an_unreadable_tensor_file_is_named(folder, fault):
    path = folder / "clips" / "a.safetensors"
    content = path.read_bytes()
    path.write_bytes({"missing": b"", "empty": b"", "truncated": content[:-9], "text": b"text" * 99}[fault])
    if fault == "missing":
        path.unlink()
    with pytest.raises(CacheError) as caught:
        Cache(folder)
    assert str(path) in str(caught.value) and "a.json" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[1]", b"{}"], ids=repr)
@pytest.mark.parametrize("name", ["contract.json", "clips/a.json"])
def test_an_unreadable_json_file_is_named(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises((CacheError, ContractError), match=str(folder)):
        Cache(folder)


@pytest.mark.parametrize("contract", [None, {}, [1], {"fps": 25}, CONTRACT.as_dict(CACHE_FIELDS) | {"crop": "square"}])
def test_an_invalid_contract_is_refused(folder, contract):
    (folder / "contract.json").write_text(json.dumps({"version": VERSION, "contract": contract}))
    with pytest.raises(ContractError, match=str(folder)):
        Cache(folder)


def test_an_undecodable_image_is_named_when_it_is_read(folder, random_tensors):
    tensors = random_tensors(6, variants=2)
    tensors["face_jpeg"][:] = 7
    (folder / "clips" / "a.safetensors").write_bytes(safetensors.numpy.save(tensors))
    with pytest.raises(CacheError, match="a.safetensors: .*frame 4"):
        Cache(folder).clips["a"].image(4)


def test_an_image_of_another_size_is_refused_when_it_is_read(tmp_path, random_tensors):
    tensors = random_tensors(1)
    tensors["face_jpeg"], tensors["face_jpeg_offsets"] = JpegBuffer([np.zeros((64, 64, 3), np.uint8)]).tensors()
    CacheWriter(tmp_path, ONE_MARGIN).write("a", tensors, METADATA)
    with pytest.raises(CacheError, match="a.safetensors: .*frame 0"):
        Cache(tmp_path).clips["a"].image(0)


@pytest.mark.parametrize("change", ["another usable frame", "a frame less", "shifted", "backwards", "beyond the end"])
def test_images_that_do_not_match_the_usable_frames_are_refused(folder, random_tensors, change):
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


def test_a_clip_with_more_variants_than_the_contract_is_refused(folder, random_tensors):
    CacheWriter(folder, CONTRACT).write("b", random_tensors(2, variants=3), METADATA)
    with pytest.raises(CacheError, match="b.safetensors has 3 margin variants, .*; delete b.json"):
        Cache(folder)


def test_a_folder_without_contract_or_clips_is_named(tmp_path):
    with pytest.raises(CacheError, match=f"{tmp_path}/none is not a cache"):
        Cache(tmp_path / "none")
    CacheWriter(tmp_path / "empty", CONTRACT)
    with pytest.raises(CacheError, match=f"{tmp_path}/empty has no clips"):
        Cache(tmp_path / "empty")


@pytest.mark.parametrize("version", [VERSION + 1, 0, None, "1"])
def test_another_version_is_refused(folder, version):
    values = json.loads((folder / "contract.json").read_text())
    (folder / "contract.json").write_text(json.dumps(values | {"version": version}))
    with pytest.raises(CacheError, match=f"{folder} .*version {version}, this code reads version {VERSION}"):
        Cache(folder)


# The contract.


def test_a_cache_stores_the_cache_fields_of_its_contract(tmp_path):
    contract = replace(CONTRACT, crop="rigid", posterior="sample", window_edge="clamp", positional_encoding=False)
    CacheWriter(tmp_path, contract)
    found = read_contract(tmp_path)
    assert found.as_dict(CACHE_FIELDS) == contract.as_dict(CACHE_FIELDS)
    assert (found.window_edge, found.positional_encoding) == ("zero", True)


@pytest.mark.parametrize(
    ("change", "values"),
    [
        ({"vae": "xyz"}, ("'abc'", "'xyz'")),
        ({"bbox_shift": 5}, ("0", "5")),
        ({"margins": (0,)}, ("(0,)", "(0, 10)")),
        ({"margins": (0, 10, 20)}, ("(0, 10)", "(0, 10, 20)")),
    ],
)
def test_writing_under_another_contract_is_refused(folder, change, values):
    with pytest.raises(ContractError) as caught:
        CacheWriter(folder, replace(CONTRACT, **change))
    assert all(part in str(caught.value) for part in (next(iter(change)), *values))
    assert read_contract(folder) == CONTRACT


def test_clips_can_be_added_under_other_model_fields(folder, random_tensors):
    writer = CacheWriter(folder, replace(CONTRACT, window_edge="clamp", positional_encoding=False))
    writer.write("b", random_tensors(2, variants=2), METADATA)
    assert list(Cache(folder).clips) == ["a", "b"]


def test_the_listing_depends_on_the_names_lengths_and_offsets_of_clips(tmp_path, random_tensors):
    def listing(name: str, **lengths: int) -> str:
        for clip, frames in lengths.items():
            CacheWriter(tmp_path / name, CONTRACT).write(clip, random_tensors(frames, variants=2), METADATA)
        return Cache(tmp_path / name).listing()

    assert listing("one", a=6, b=7) == listing("same", b=7, a=6)
    assert len({Cache(tmp_path / "one").listing(), listing("longer", a=6, b=8), listing("renamed", a=6, c=7)}) == 3
    before = listing("two", a=6)
    Cache(tmp_path / "two").clips["a"].write_offset(2, {})
    assert Cache(tmp_path / "two").listing() != before
