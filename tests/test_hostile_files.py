"""Broken and foreign JSON files are read or rejected in one sentence that names the file.

Also holds the helpers that all tests of hostile files share.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from musetalk.contract import ALL_FIELDS, CACHE_FIELDS, FeatureContract
from musetalk.data.cache import TENSORS, Cache, CacheWriter, Clip, read_contract, verify
from musetalk.errors import UserError
from musetalk.files import read_json
from musetalk.training.log import RunLog

CONTRACT = FeatureContract(margins=(0, 10))
METADATA = {"source": "a.mp4", "source_bytes": 9, "identity": "somebody", "start": 0, "last": True}
DEEP = 10**5


def refusal(read: Callable[[], object], name: str) -> str:
    """Returns the error message of a reader: one line that names the file."""
    with pytest.raises(UserError) as caught:
        read()
    message = str(caught.value)
    assert name in message and len(message.splitlines()) == 1
    return message


def survive(read: Callable[[], object], name: str) -> None:
    """Checks that a reader succeeds or raises UserError in one line that names the file."""
    try:
        read()
    except UserError as error:
        assert name in str(error) and len(str(error).splitlines()) == 1


@st.composite
def mutated(draw, content: bytes) -> bytes:
    """Corrupts bytes: flips bits, overwrites, cuts, inserts and duplicates."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        if not content:
            break
        # Headers matter most.
        start = draw(st.integers(0, len(content) - 1) | st.integers(0, min(len(content), 2000) - 1))
        stop = min(len(content), start + draw(st.sampled_from([1, 2, 8, 100, 10_000, len(content)])))
        match draw(st.sampled_from(["flip", "set", "cut", "insert", "double"])):
            case "flip":
                content[start] ^= 1 << draw(st.integers(0, 7))
            case "set":
                content[start : start + 8] = draw(st.binary(min_size=1, max_size=8))
            case "cut":
                del content[start:stop]
            case "insert":
                content[start:start] = draw(st.binary(max_size=20) | st.integers(-(2**63), 2**63 - 1).map(_int64))
            case "double":
                content[start:start] = content[start:stop]
    return bytes(content)


def _int64(number: int) -> bytes:
    return struct.pack("<q", number)


# A cache with one clip.


def one_clip(folder: Path, random_tensors: Callable) -> Path:
    """Writes a cache with one clip "a" of 6 frames and 2 variants, frame 2 unusable."""
    CacheWriter(folder, CONTRACT).write("a", random_tensors(6, variants=2, unusable=[2]), METADATA)
    return folder


@pytest.fixture(scope="module")
def made_cache(tmp_path_factory, random_tensors) -> Path:
    return one_clip(tmp_path_factory.mktemp("made"), random_tensors)


@pytest.fixture
def cache(made_cache, tmp_path) -> Path:
    return Path(shutil.copytree(made_cache, tmp_path / "cache"))


def copied(folder: Path, tmp_path_factory) -> Path:
    return Path(shutil.copytree(folder, tmp_path_factory.mktemp("copy") / "cache"))


def read_all(folder: Path) -> None:
    """Reads everything that training and verification read from a cache."""
    for clip in Cache(folder).clips.values():
        for name in TENSORS:
            clip.tensor(name)
        for frame in np.flatnonzero(clip.usable):
            for variant in range(clip.variants):
                assert clip.image(int(frame), variant).shape == (256, 256, 3)
    list(verify(folder))


# Values to put in place of any value of a JSON file.
HUGE = (10**9, 2**53, 2**63, 10**40, 10**400)
ODD = (*HUGE, -1, -(10**9), 0, 1.5, 1e300, -0.0, math.nan, math.inf, True, None, "", "x" * 9999, "\u2028\n\x00\ud800")
anything = st.recursive(
    st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
NESTED = ("[" * 900 + "]" * 900, '{"a":' * 900 + "1" + "}" * 900)  # just within the limit of Python


# JSON.

HOSTILE_JSON = {
    "empty": b"",
    "a page": b"<!DOCTYPE html><html></html>",
    "truncated": b'{"a": 1',
    "a list": b"[1]",
    "not UTF-8": b'{"a": "\xff"}',
    "deeply nested": b"[" * DEEP,
    "many digits": b'{"a": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("content", HOSTILE_JSON.values(), ids=HOSTILE_JSON)
@pytest.mark.parametrize("name", ["contract.json", "identities.json", "clips/a.json"])
def test_every_reader_rejects_a_file_that_is_not_a_json_object(tmp_path, name, content):
    from musetalk.data.sources import read_identities  # heavy

    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    readers = {
        "contract.json": read_contract,
        "identities.json": read_identities,
        "clips/a.json": lambda folder: Clip(folder, "a"),
    }
    refusal(lambda: readers[name](tmp_path), str(path))


@pytest.mark.parametrize("kind", ["folder", "link to itself", "link to nothing"])
def test_an_unreadable_path_is_rejected(tmp_path, kind):
    path = tmp_path / "a.json"
    if kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"link to itself": path, "link to nothing": "none"}[kind])
    refusal(lambda: read_json(path), str(path))


@pytest.mark.parametrize("value", [None, 3, "", "x\n", []], ids=repr)
def test_identities_must_be_text(tmp_path, value):
    from musetalk.data.sources import read_identities  # heavy

    (tmp_path / "identities.json").write_text(json.dumps({"a": "somebody", "b": value}))
    if isinstance(value, str):
        assert read_identities(tmp_path)["b"] == value
    else:
        assert "must be an object" in refusal(lambda: read_identities(tmp_path), str(tmp_path / "identities.json"))


# Contracts.


@pytest.mark.parametrize("name", ["margins", "bbox_shift"])
def test_a_contract_with_an_absurd_number_of_pixels_is_rejected(name):
    values = CONTRACT.as_dict(ALL_FIELDS) | {name: [0, 1001] if name == "margins" else -1001}
    assert "at most 1000" in refusal(lambda: FeatureContract.from_dict(values, ALL_FIELDS, "here"), "here")


@pytest.mark.parametrize("values", [None, [], "x", {1: 2}, {"x" * 10**6: 1}], ids=lambda v: repr(v)[:20])
def test_a_value_that_is_not_a_contract_is_rejected_in_a_short_sentence(values):
    assert len(refusal(lambda: FeatureContract.from_dict(values, ALL_FIELDS, "here"), "here")) < 500


@settings(max_examples=25)
@given(key=st.sampled_from([*CACHE_FIELDS, "version", "contract", "more"]), value=anything)
def test_a_cache_with_any_contract_is_opened_or_rejected(made_cache, tmp_path_factory, key, value):
    folder = copied(made_cache, tmp_path_factory)
    values = json.loads((folder / "contract.json").read_text())
    (values if key in ("version", "contract", "more") else values["contract"])[key] = value
    (folder / "contract.json").write_text(json.dumps(values))
    survive(lambda: read_all(folder), str(folder))
    survive(lambda: CacheWriter(folder, CONTRACT), str(folder))


# Records.


def sum_up(records: list[dict]) -> str:
    """Uses records as the report of datasets_process.py does."""
    cached = [record for record in records if "kind" not in record]
    assert sum(record.get("frames", 0) for record in records) >= 0
    if not cached:
        return ", ".join(sorted({record["kind"] for record in records}))
    total, usable, size = (sum(record[key] for record in cached) for key in ("frames", "usable_frames", "bytes"))
    return f"{usable} of {total} frames, {total / 25:.0f} s, {size / total:.0f} bytes a frame"


@pytest.mark.parametrize("nested", NESTED, ids=["lists", "objects"])
def test_a_nested_record_is_rejected_before_it_is_rewritten(cache, nested):
    path = cache / "clips" / "a.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"more": "PLACE"}).replace('"PLACE"', nested))
    refusal(lambda: CacheWriter(cache, CONTRACT).finished(METADATA | {"identity": "another"}), str(path))


@pytest.mark.parametrize("frames", [0, 5, 10**9])
def test_a_record_with_another_number_of_frames_is_rejected(cache, frames):
    path = cache / "clips" / "a.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"frames": frames}))
    refusal(lambda: Cache(cache), "clips/a.")


@settings(max_examples=25)
@given(field=st.sampled_from([*METADATA, "frames", "usable_frames", "bytes", "sha256", "more"]), value=anything)
def test_a_record_with_any_value_is_accepted_or_rejected(made_cache, tmp_path_factory, field, value):
    folder = copied(made_cache, tmp_path_factory)
    path = folder / "clips" / "a.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    survive(lambda: read_all(folder), "a.")
    survive(lambda: sum_up(CacheWriter(folder, CONTRACT).finished(METADATA | {"identity": "another"})), "a.")


# Statistics of a run.


@pytest.mark.parametrize(
    "line",
    ["", "{", "[]", "{}", '{"step": NaN}', '{"step": "x"}', '{"step": ' + "[" * DEEP],
    ids=range(7),
)
def test_an_invalid_line_of_statistics_is_dropped_or_kept(tmp_path, line):
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "stats.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 9}}\n')
    RunLog(tmp_path, "run", 5).board.close()
    lines = path.read_text().splitlines()
    assert lines[0] == '{"step": 1}' and set(lines[1:]) <= {line}
