"""Corrupted files of a cache are read or refused in one sentence that names the file."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import safetensors.numpy
from hostile import any_value, corrupted, read_or_refuse, refusal
from hypothesis import given
from hypothesis import strategies as st

from musetalk.contract import CACHE_FIELDS, FeatureContract
from musetalk.data.cache import Cache, verify
from musetalk.data.cache_format import CLIP_RECORD, TENSORS
from musetalk.data.cache_writer import CacheWriter

CONTRACT = FeatureContract(margins=(0, 10))
METADATA = {"source": "a.mp4", "source_bytes": 9, "identity": "somebody", "start": 0, "last": True}


@pytest.fixture(scope="module")
def new_cache(tmp_path_factory, random_tensors) -> Callable[[], Path]:
    """A function that makes a cache with one clip "a" of 6 frames and 2 variants; frame 2 is unusable."""
    original = tmp_path_factory.mktemp("original")
    CacheWriter(original, CONTRACT).write("a", random_tensors(6, variants=2, unusable=[2]), METADATA)
    return lambda: Path(shutil.copytree(original, tmp_path_factory.mktemp("copy") / "cache"))


def read_all(folder: Path) -> None:
    """Reads everything that training and verification read from a cache."""
    for clip in Cache(folder).clips.values():
        for name in TENSORS:
            clip.tensor(name)
        for frame in np.flatnonzero(clip.usable):
            for variant in range(clip.variants):
                assert clip.image(int(frame), variant).shape == (256, 256, 3)
    list(verify(folder))


def black_jpeg() -> bytes:
    return cv2.imencode(".jpg", np.zeros((256, 256, 3), np.uint8))[1].tobytes()


def replace_images(folder: Path, jpeg: bytes) -> Path:
    """Replaces all images of the clip by a JPEG file. Returns the path of the clip's tensors."""
    path = folder / "clips" / "a.safetensors"
    tensors = safetensors.numpy.load(path.read_bytes())
    usable = tensors["usable"].repeat(2)
    tensors["face_jpeg"] = np.frombuffer(jpeg * int(usable.sum()), np.uint8)
    tensors["face_jpeg_offsets"] = np.cumsum([0, *(len(jpeg) * usable)])
    path.write_bytes(safetensors.numpy.save(tensors))
    return path


@given(data=st.data())
def test_corrupted_tensors_are_read_or_refused(new_cache, data):
    folder = new_cache()
    path = folder / "clips" / "a.safetensors"
    path.write_bytes(data.draw(corrupted(path.read_bytes())))
    read_or_refuse(lambda: read_all(folder), str(path))


@given(data=st.data())
def test_corrupted_images_are_read_or_refused(new_cache, data):
    folder = new_cache()
    path = replace_images(folder, data.draw(corrupted(black_jpeg())))
    read_or_refuse(lambda: read_all(folder), str(path))


@given(key=st.sampled_from([*CACHE_FIELDS, "version", "contract", "more"]), value=any_value)
def test_a_contract_with_any_value_is_read_or_refused(new_cache, key, value):
    path = (folder := new_cache()) / "contract.json"
    values = json.loads(path.read_text())
    (values["contract"] if key in CACHE_FIELDS else values)[key] = value
    path.write_text(json.dumps(values))
    read_or_refuse(lambda: read_all(folder), str(folder))
    read_or_refuse(lambda: CacheWriter(folder, CONTRACT), str(folder))


@given(key=st.sampled_from([*CLIP_RECORD, "start", "more"]), value=any_value)
def test_a_record_with_any_value_is_read_or_refused(new_cache, key, value):
    path = (folder := new_cache()) / "clips" / "a.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    read_or_refuse(lambda: read_all(folder), "a.")
    read_or_refuse(lambda: CacheWriter(folder, CONTRACT).finished(METADATA | {"identity": "another"}), "a.")


def test_a_record_that_could_not_be_written_again_is_refused(new_cache):
    """json.loads reads lists that are nested 900 deep; json.dumps with an indent exceeds Python's recursion limit."""
    path = (folder := new_cache()) / "clips" / "a.json"
    path.write_text(path.read_text().replace("{", '{"more": ' + "[" * 900 + "]" * 900 + ",", 1))
    refusal(lambda: CacheWriter(folder, CONTRACT).finished(METADATA | {"identity": "another"}), str(path))


@pytest.mark.parametrize("size", [(65500, 65500), (256, 255)], ids=str)
def test_an_image_whose_header_claims_another_size_is_refused(new_cache, size):
    """OpenCV raises an error for more than 2**30 pixels."""
    jpeg = bytearray(black_jpeg())
    start = jpeg.index(b"\xff\xc0") + 5  # of height and width in the frame header
    jpeg[start : start + 4] = struct.pack(">HH", *size)
    path = replace_images(folder := new_cache(), bytes(jpeg))
    assert "frame 4 has no readable image" in refusal(lambda: Cache(folder).clips["a"].image(4), str(path))


@pytest.mark.parametrize("name", ["..", "a\nb", "\udcff"])
def test_a_clip_with_an_unusual_name_is_read(new_cache, name):
    folder = new_cache()
    for suffix in (".json", ".safetensors"):
        (folder / "clips" / f"a{suffix}").rename(folder / "clips" / f"{name}{suffix}")
    assert list(Cache(folder).clips) == [name]
    read_all(folder)


@pytest.mark.parametrize("name", ["a.json", "a.safetensors"])
def test_a_symbolic_link_to_itself_is_refused(new_cache, name):
    path = (folder := new_cache()) / "clips" / name
    path.unlink()
    path.symlink_to(path)
    refusal(lambda: read_all(folder), str(path))
