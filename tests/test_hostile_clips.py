"""Clips of a cache from outside: tensors, pictures, names and links. See test_hostile_files.py."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from test_hostile_files import DEEP, copied, mutated, one_clip, read_all, refusal, survive

from musetalk.data.cache import Cache, encode_jpegs
from musetalk.files import folder_lock


@pytest.fixture(scope="module")
def made_cache(tmp_path_factory, random_tensors) -> Path:
    return one_clip(tmp_path_factory.mktemp("made"), random_tensors)


@pytest.fixture
def cache(made_cache, tmp_path) -> Path:
    return Path(shutil.copytree(made_cache, tmp_path / "cache"))


def safetensors_file(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A file of the format by its parts, which need not fit."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HOSTILE_SAFETENSORS = {
    "empty": b"",
    "short": b"\x01\x00",
    "length 2**63": safetensors_file({}, length=2**63),
    "length 2**64-1": safetensors_file({}, length=2**64 - 1),
    "length beyond the file": safetensors_file({"a": entry()}, b"1234", length=10**6),
    "length 0": safetensors_file(b""),
    "no json": safetensors_file(b"what?"),
    "no utf-8": safetensors_file(b'{"\xff": 1}'),
    "a list": safetensors_file([1]),
    "deep": safetensors_file(b'{"a":' * DEEP),
    "deep metadata": safetensors_file(b'{"__metadata__":' + b"[" * DEEP),
    "metadata no text": safetensors_file({"__metadata__": {"contract": 3}, "a": entry()}, b"1234"),
    "unknown dtype": safetensors_file({"a": entry("F31")}, b"1234"),
    "dtype number": safetensors_file({"a": entry(7)}, b"1234"),
    "negative size": safetensors_file({"a": entry(shape=(-1,))}, b"1234"),
    "fraction of a size": safetensors_file({"a": entry(shape=(1.5,))}, b"1234"),
    "too many sizes": safetensors_file({"a": entry(shape=(2**32, 2**32))}, b"1234"),
    "sizes overflow to 4 bytes": safetensors_file({"a": entry(shape=(2**62 + 1, 4))}, b"1234"),
    "huge size": safetensors_file({"a": entry(shape=(10**40,))}, b"1234"),
    "negative offset": safetensors_file({"a": entry(offsets=(-4, 0))}, b"1234"),
    "offsets backwards": safetensors_file({"a": entry(offsets=(4, 0))}, b"1234"),
    "offsets beyond": safetensors_file({"a": entry(offsets=(4, 8))}, b"1234"),
    "huge offsets": safetensors_file({"a": entry(shape=(2**40,), offsets=(0, 2**42))}, b"1234"),
    "overlap": safetensors_file({"a": entry(), "b": entry()}, b"1234"),
    "gap": safetensors_file({"a": entry(), "b": entry(offsets=(8, 12))}, b"123456789012"),
    "not all data": safetensors_file({"a": entry()}, b"123456789012"),
    "cut": safetensors_file({"a": entry()}, b"123"),
    "no offsets": safetensors_file({"a": {"dtype": "F32", "shape": [1]}}, b"1234"),
}


# Tensors.


def store(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    path = folder / "clips" / "a.safetensors"
    path.write_bytes(safetensors.numpy.save(tensors))
    return path


@pytest.mark.parametrize("content", HOSTILE_SAFETENSORS.values(), ids=HOSTILE_SAFETENSORS)
def test_a_hostile_file_of_tensors_is_refused_by_the_cache(cache, content):
    path = cache / "clips" / "a.safetensors"
    path.write_bytes(content)
    refusal(lambda: Cache(cache), str(path))


@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.5, 0.9, 0.999])
def test_a_clip_cut_anywhere_is_refused(cache, share):
    path = cache / "clips" / "a.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refusal(lambda: Cache(cache), str(path))


@given(data=st.data())
def test_a_clip_with_accidents_is_read_or_refused(made_cache, tmp_path_factory, data):
    folder = copied(made_cache, tmp_path_factory)
    path = folder / "clips" / "a.safetensors"
    path.write_bytes(data.draw(mutated(path.read_bytes())))
    survive(lambda: read_all(folder), str(path))


@given(data=st.data())
def test_a_clip_with_accidents_in_its_pictures_is_read_or_refused(made_cache, tmp_path_factory, data):
    folder = copied(made_cache, tmp_path_factory)
    tensors = safetensors.numpy.load((folder / "clips" / "a.safetensors").read_bytes())
    jpeg = encode_jpegs([np.full((256, 256, 3), 7, np.uint8)])[0]
    path = store_picture(folder, tensors, data.draw(mutated(jpeg.tobytes())))
    survive(lambda: read_all(folder), str(path))


@pytest.mark.parametrize(
    "shape",
    [(0, 2**40, 2**40), (0, 2**62, 1), (0, 2**60, 8), (2**40, 0, 2**40), (2**60, 2**60, 0)],
    ids=str,
)
@pytest.mark.parametrize("name", ["audio_features", "latents"])
def test_a_tensor_of_nothing_but_huge_sizes_is_refused(cache, name, shape):
    """It takes no byte of the file, so that the format allows it."""
    header, data = split(cache)
    begin, end = header[name]["data_offsets"]
    header[name] |= {"shape": (*shape, 4, 32, 32) if name == "latents" else shape, "data_offsets": [begin, begin]}
    for other in header.values():
        if other["data_offsets"][0] >= end:
            other["data_offsets"] = [offset - (end - begin) for offset in other["data_offsets"]]
    path = cache / "clips" / "a.safetensors"
    path.write_bytes(safetensors_file(header, data[:begin] + data[end:]))
    refusal(lambda: Cache(cache), str(path))


def split(cache: Path) -> tuple[dict, bytes]:
    """Header and data of the clip."""
    content = (cache / "clips" / "a.safetensors").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


OFFSETS = {
    "negative": lambda o: np.r_[-1, o[1:]],
    "decreasing": lambda o: np.r_[o[:4], o[3] - 1, o[5:]],
    "beyond the end": lambda o: np.r_[o[:-1], o[-1] + 1],
    "far beyond": lambda o: np.r_[o[:-1], 2**62],
    "the smallest": lambda o: np.r_[-(2**63), o[1:]],
    "around the whole range of int64": lambda o: np.r_[o[:7], 2**62, 2**63 - 1, -(2**63) + 2, -(2**62), o[11:]],
    "all zero": np.zeros_like,
}


@pytest.mark.parametrize("change", OFFSETS.values(), ids=OFFSETS)
def test_offsets_that_are_none_are_refused(cache, random_tensors, change):
    tensors = random_tensors(6, variants=2, unusable=[2])
    tensors["face_jpeg_offsets"] = change(tensors["face_jpeg_offsets"]).astype(np.int64)
    path = store(cache, tensors)
    assert "its pictures are not those of its usable frames" in refusal(lambda: Cache(cache), str(path))


def jpeg_of_claimed_size(height: int, width: int) -> bytes:
    """A picture of 256 x 256 whose header says another size."""
    content = bytearray(cv2.imencode(".jpg", np.zeros((256, 256, 3), np.uint8))[1].tobytes())
    start = content.index(b"\xff\xc0") + 5
    content[start : start + 4] = struct.pack(">HH", height, width)
    return bytes(content)


PICTURES = {
    "65500 x 65500": jpeg_of_claimed_size(65500, 65500),
    "10000 x 10000": jpeg_of_claimed_size(10000, 10000),
    "255 x 256": jpeg_of_claimed_size(255, 256),
    "256 x 255": jpeg_of_claimed_size(256, 255),
    "0 x 0": jpeg_of_claimed_size(0, 0),
    "a PNG": cv2.imencode(".png", np.zeros((256, 256, 3), np.uint8))[1].tobytes(),
    "a BMP": cv2.imencode(".bmp", np.zeros((256, 256, 3), np.uint8))[1].tobytes(),
    "a TIFF": cv2.imencode(".tiff", np.zeros((256, 256, 3), np.uint8))[1].tobytes(),
    "a WebP": cv2.imencode(".webp", np.zeros((256, 256, 3), np.uint8))[1].tobytes(),
    "a GIF": b"GIF89a\x00\x01\x00\x01\x00\x00\x00,\x00\x00\x00\x00\x00\x01\x00\x01\x00\x02\x02D\x01\x00;",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 256 256\n%%EndComments\n(x) run\n",
    "a header alone": jpeg_of_claimed_size(256, 256)[:20],
    "text": b"hello",
}


def store_picture(cache: Path, tensors: dict[str, np.ndarray], picture: bytes) -> Path:
    """Put a picture in the place of all of a clip."""
    usable = tensors["usable"]
    tensors["face_jpeg"] = np.frombuffer(picture * (2 * int(usable.sum())), np.uint8)
    tensors["face_jpeg_offsets"] = np.cumsum([0] + [len(picture) * int(good) for good in usable for _ in range(2)])
    return store(cache, tensors)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("picture", PICTURES.values(), ids=PICTURES)
def test_a_picture_that_is_no_jpeg_of_256_pixels_is_refused(cache, random_tensors, picture):
    path = store_picture(cache, random_tensors(6, variants=2, unusable=[2]), picture)
    assert "there is no picture of frame 4" in refusal(lambda: Cache(cache).clips["a"].image(4), str(path))


# Names and links.


@pytest.mark.parametrize(
    "name", [".", "..", ".a", "a.b", "a\nb", "\x1b[31mred", "\udcff", "\u202e", "%s{0}", "-rf", "n" * 200]
)
def test_a_clip_of_any_name_is_read(cache, name):
    for ending in (".json", ".safetensors"):
        (cache / "clips" / f"a{ending}").rename(cache / "clips" / f"{name}{ending}")
    assert list(Cache(cache).clips) == [name]
    read_all(cache)


@pytest.mark.parametrize("loop", ["clips", "clips/a.json", "clips/a.safetensors", "contract.json"])
def test_a_loop_of_links_in_a_cache_ends(cache, loop):
    path = cache / loop
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(path)
    refusal(lambda: read_all(cache), str(cache))


@pytest.mark.parametrize("kind", ["folder", "pipe"])
@pytest.mark.parametrize("name", ["clips/a.json", "clips/a.safetensors", "contract.json", "clips/b.json"])
def test_what_is_no_file_in_a_cache_is_refused(cache, name, kind):
    (cache / name).unlink(missing_ok=True)
    os.mkfifo(cache / name) if kind == "pipe" else (cache / name).mkdir()
    refusal(lambda: read_all(cache), name)


def test_a_lock_that_links_elsewhere_empties_no_file(tmp_path):
    (tmp_path / "precious").write_text("work of years")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ".lock").symlink_to(tmp_path / "precious")
    with folder_lock(tmp_path / "cache"):
        assert (tmp_path / "precious").read_text() == "work of years"
