"""Corrupted clips of a cache: tensors, images, names and links. See test_hostile_files.py."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hostile_files import DEEP, copied, mutated, one_clip, read_all, refusal, survive

from musetalk.data.cache import Cache, JpegBuffer
from musetalk.files import folder_lock


@pytest.fixture(scope="module")
def made_cache(tmp_path_factory, random_tensors) -> Path:
    return one_clip(tmp_path_factory.mktemp("made"), random_tensors)


@pytest.fixture
def cache(made_cache, tmp_path) -> Path:
    return Path(shutil.copytree(made_cache, tmp_path / "cache"))


def safetensors_file(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """Builds a safetensors file from parts that need not be consistent."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HOSTILE_SAFETENSORS = {
    "empty": b"",
    "length beyond the file": safetensors_file({"a": entry()}, b"1234", length=10**6),
    "length 2**64-1": safetensors_file({}, length=2**64 - 1),
    "not JSON": safetensors_file(b"what?"),
    "deep": safetensors_file(b'{"a":' * DEEP),
    "unknown dtype": safetensors_file({"a": entry("F31")}, b"1234"),
    "negative size": safetensors_file({"a": entry(shape=(-1,))}, b"1234"),
    "too many sizes": safetensors_file({"a": entry(shape=(2**32, 2**32))}, b"1234"),
    "overlap": safetensors_file({"a": entry(), "b": entry()}, b"1234"),
    "truncated": safetensors_file({"a": entry()}, b"123"),
}


# Tensors.


def store(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    path = folder / "clips" / "a.safetensors"
    path.write_bytes(safetensors.numpy.save(tensors))
    return path


@pytest.mark.parametrize("content", HOSTILE_SAFETENSORS.values(), ids=HOSTILE_SAFETENSORS)
def test_the_cache_rejects_a_corrupted_tensor_file(cache, content):
    path = cache / "clips" / "a.safetensors"
    path.write_bytes(content)
    refusal(lambda: Cache(cache), str(path))


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_a_truncated_clip_is_rejected(cache, share):
    path = cache / "clips" / "a.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refusal(lambda: Cache(cache), str(path))


@settings(max_examples=25)
@given(data=st.data())
def test_a_mutated_clip_is_read_or_rejected(made_cache, tmp_path_factory, data):
    folder = copied(made_cache, tmp_path_factory)
    path = folder / "clips" / "a.safetensors"
    path.write_bytes(data.draw(mutated(path.read_bytes())))
    survive(lambda: read_all(folder), str(path))


@settings(max_examples=25)
@given(data=st.data())
def test_a_clip_with_mutated_images_is_read_or_rejected(made_cache, tmp_path_factory, data):
    folder = copied(made_cache, tmp_path_factory)
    tensors = safetensors.numpy.load((folder / "clips" / "a.safetensors").read_bytes())
    jpeg = JpegBuffer([np.full((256, 256, 3), 7, np.uint8)]).tensors()[0]
    path = store_picture(folder, tensors, data.draw(mutated(jpeg.tobytes())))
    survive(lambda: read_all(folder), str(path))


OFFSETS = {
    "negative": lambda o: np.r_[-1, o[1:]],
    "decreasing": lambda o: np.r_[o[:4], o[3] - 1, o[5:]],
    "beyond the end": lambda o: np.r_[o[:-1], 2**62],
}


@pytest.mark.parametrize("change", OFFSETS.values(), ids=OFFSETS)
def test_invalid_offsets_are_rejected(cache, random_tensors, change):
    tensors = random_tensors(6, variants=2, unusable=[2])
    tensors["face_jpeg_offsets"] = change(tensors["face_jpeg_offsets"]).astype(np.int64)
    path = store(cache, tensors)
    assert "images do not match its usable frames" in refusal(lambda: Cache(cache), str(path))


def jpeg_of_claimed_size(height: int, width: int) -> bytes:
    """A JPEG of 256 x 256 whose header claims another size."""
    content = bytearray(cv2.imencode(".jpg", np.zeros((256, 256, 3), np.uint8))[1].tobytes())
    start = content.index(b"\xff\xc0") + 5
    content[start : start + 4] = struct.pack(">HH", height, width)
    return bytes(content)


PICTURES = {
    "65500 x 65500": jpeg_of_claimed_size(65500, 65500),
    "256 x 255": jpeg_of_claimed_size(256, 255),
    "a header alone": jpeg_of_claimed_size(256, 256)[:20],
    "text": b"hello",
}


def store_picture(cache: Path, tensors: dict[str, np.ndarray], picture: bytes) -> Path:
    """Replaces all images of a clip."""
    usable = tensors["usable"]
    tensors["face_jpeg"] = np.frombuffer(picture * (2 * int(usable.sum())), np.uint8)
    tensors["face_jpeg_offsets"] = np.cumsum([0] + [len(picture) * int(good) for good in usable for _ in range(2)])
    return store(cache, tensors)


@pytest.mark.parametrize("picture", PICTURES.values(), ids=PICTURES)
def test_an_image_of_another_size_or_format_is_rejected(cache, random_tensors, picture):
    path = store_picture(cache, random_tensors(6, variants=2, unusable=[2]), picture)
    assert "frame 4 has no readable image" in refusal(lambda: Cache(cache).clips["a"].image(4), str(path))


# Names and links.


@pytest.mark.parametrize("name", ["..", "a.b", "a\nb", "\udcff", "n" * 200])
def test_a_clip_of_any_name_is_read(cache, name):
    for ending in (".json", ".safetensors"):
        (cache / "clips" / f"a{ending}").rename(cache / "clips" / f"{name}{ending}")
    assert list(Cache(cache).clips) == [name]
    read_all(cache)


@pytest.mark.parametrize("loop", ["clips/a.json", "clips/a.safetensors"])
def test_a_symbolic_link_to_itself_is_rejected(cache, loop):
    path = cache / loop
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(path)
    refusal(lambda: read_all(cache), str(cache))


def test_a_lock_that_links_to_another_file_does_not_truncate_it(tmp_path):
    (tmp_path / "precious").write_text("work of years")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ".lock").symlink_to(tmp_path / "precious")
    with folder_lock(tmp_path / "cache"):
        assert (tmp_path / "precious").read_text() == "work of years"
