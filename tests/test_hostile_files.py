"""JSON files from outside: whatever they hold, it is read, or there is one sentence that names the file.

What the tests of all hostile files have in common is here, too.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from musetalk.contract import ALL_FIELDS, CACHE_FIELDS, FeatureContract
from musetalk.data.cache import (
    CLIP_RECORD,
    REJECTED_RECORD,
    TENSORS,
    Cache,
    CacheWriter,
    Clip,
    read_contract,
    verify,
)
from musetalk.errors import UserError
from musetalk.files import MAX_JSON, read_json
from musetalk.training.log import RunLog

CONTRACT = FeatureContract(margins=(0, 10))
ABOUT = {"source": "a.mp4", "source_bytes": 9, "identity": "somebody", "start": 0, "last": True}
DEEP = 10**5


def refusal(read: Callable[[], object], name: str) -> str:
    """What a reader says against a file, in one line that names it."""
    with pytest.raises(UserError) as caught:
        read()
    message = str(caught.value)
    assert name in message and len(message.splitlines()) == 1
    return message


def survive(read: Callable[[], object], name: str) -> None:
    """Read, or be refused in one line that names the file."""
    try:
        read()
    except UserError as error:
        assert name in str(error) and len(str(error).splitlines()) == 1


@st.composite
def mutated(draw, content: bytes) -> bytes:
    """The bytes after some accidents: bits flipped, pieces cut out, put in or doubled."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        if not content:
            break
        # Headers are where the meaning is.
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


# A cache of a clip.


def one_clip(folder: Path, random_tensors: Callable) -> Path:
    """A cache of one clip "a" of 6 frames and 2 variants, frame 2 unusable."""
    CacheWriter(folder, CONTRACT).write("a", random_tensors(6, variants=2, unusable=[2]), ABOUT)
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
    """Everything that training reads of a cache, and what verifying reads."""
    for clip in Cache(folder).clips.values():
        for name in TENSORS:
            clip.tensor(name)
        for frame in np.flatnonzero(clip.usable):
            for variant in range(clip.variants):
                assert clip.image(int(frame), variant).shape == (256, 256, 3)
    list(verify(folder))


# What can stand in the place of any value of a JSON file.
HUGE = (10**9, 2**53, 2**63, 10**40, 10**400)
ODD = (*HUGE, -1, -(10**9), 0, 1.5, 1e300, -0.0, math.nan, math.inf, True, None, "", "x" * 9999, "\u2028\n\x00\ud800")
anything = st.recursive(
    st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
NESTED = ("[" * 900 + "]" * 900, '{"a":' * 900 + "1" + "}" * 900)  # just within what Python reads


# JSON.


HOSTILE_JSON = {
    "empty": b"",
    "nul": b"\0",
    "text": b"hello",
    "page": b"<!DOCTYPE html><html></html>",
    "half": b'{"a": 1',
    "list": b"[1]",
    "string": b'"a"',
    "nan": b"NaN",
    "number": b"7",
    "no utf-8": b'{"a": "\xff"}',
    "half utf-16": '{"a": 1}'.encode("utf-16")[:-1],
    "deep lists": b"[" * DEEP,
    "deep objects": b'{"a":' * DEEP,
    "many digits": b'{"a": ' + b"9" * 5000 + b"}",
    "two objects": b"{}{}",
    "large": b'{"a": "' + b"x" * MAX_JSON + b'"}',
    "zip": b"PK\x03\x04" + bytes(99),
    "pickle": b"\x80\x04}.",
}


@pytest.mark.parametrize("content", HOSTILE_JSON.values(), ids=HOSTILE_JSON)
@pytest.mark.parametrize("name", ["a.json", "contract.json", "identities.json", "clips/a.json"])
def test_what_is_no_json_object_is_refused_by_every_reader(tmp_path, name, content):
    from musetalk.data.sources import read_identities  # heavy

    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    readers = {
        "contract.json": read_contract,
        "identities.json": read_identities,
        "clips/a.json": lambda f: Clip(f, "a"),
    }
    refusal(lambda: readers.get(name, lambda _: read_json(path))(tmp_path), str(path))


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to itself", "link to nothing", "device"])
def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path, kind):
    path = tmp_path / "a.json"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"link to itself": path, "link to nothing": "none", "device": "/dev/zero"}[kind])
    refusal(lambda: read_json(path), str(path))


@given(content=mutated(json.dumps({"a": [1, 2.5, None, True], "b": {"c": "\u00fc" * 40}}).encode()))
def test_json_with_accidents_is_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_bytes(content)
    survive(lambda: read_json(path), str(path))


@pytest.mark.parametrize("value", [*ODD[:14], None, [], {}, ["x"]], ids=lambda value: repr(value)[:20])
def test_an_identity_that_is_no_text_is_refused(tmp_path, value):
    from musetalk.data.sources import read_identities  # heavy

    (tmp_path / "identities.json").write_text(json.dumps({"a": "somebody", "b": value}))
    assert "must be one object of" in refusal(lambda: read_identities(tmp_path), str(tmp_path / "identities.json"))


# Contracts.


@pytest.mark.parametrize("name", ALL_FIELDS)
@pytest.mark.parametrize(
    "value", [*ODD, [], [0] * 9999, [[[]]], {}, [math.nan], [-1], [10**40]], ids=lambda v: repr(v)[:20]
)
def test_any_value_of_any_field_of_a_contract_is_taken_or_refused(name, value):
    values = CONTRACT.as_dict(ALL_FIELDS) | {name: value}
    survive(lambda: FeatureContract.from_dict(json.loads(json.dumps(values)), ALL_FIELDS, "here"), "here: ")


@pytest.mark.parametrize("name", ["margins", "bbox_shift"])
@pytest.mark.parametrize("number", [1001, *HUGE])
def test_numbers_of_a_contract_that_no_picture_has_are_refused(name, number):
    values = CONTRACT.as_dict(ALL_FIELDS) | {name: [0, number] if name == "margins" else -number}
    assert "at most 1000" in refusal(lambda: FeatureContract.from_dict(values, ALL_FIELDS, "here"), "here")


@pytest.mark.parametrize(
    "values", [None, [], "x", 3, {1: 2}, {(): 1, "a": 1, None: 2}, {"x" * 10**6: 1}], ids=lambda v: repr(v)[:20]
)
def test_what_is_no_contract_is_refused_shortly_whatever_its_keys_are(values):
    assert len(refusal(lambda: FeatureContract.from_dict(values, ALL_FIELDS, "here"), "here")) < 500


@pytest.mark.parametrize("field", [*CACHE_FIELDS, "version"])
@pytest.mark.parametrize("nested", NESTED, ids=["lists", "objects"])
def test_a_deeply_nested_value_of_a_contract_is_refused_shortly(cache, field, nested):
    path = cache / "contract.json"
    values = json.loads(path.read_text())
    (values if field == "version" else values["contract"])[field] = "PLACE"
    path.write_text(json.dumps(values).replace('"PLACE"', nested))
    assert len(refusal(lambda: Cache(cache), str(cache))) < 1000


@given(key=st.sampled_from([*CACHE_FIELDS, "version", "contract", "more"]), value=anything)
def test_a_cache_with_any_contract_is_opened_or_refused(made_cache, tmp_path_factory, key, value):
    folder = copied(made_cache, tmp_path_factory)
    values = json.loads((folder / "contract.json").read_text())
    (values if key in ("version", "contract", "more") else values["contract"])[key] = value
    (folder / "contract.json").write_text(json.dumps(values))
    survive(lambda: read_all(folder), str(folder))
    survive(lambda: CacheWriter(folder, CONTRACT), str(folder))


# Records.


@pytest.mark.parametrize("field", ["source", "source_bytes", "identity", "last", "frames", "bytes", "sha256", "start"])
@pytest.mark.parametrize("value", [*ODD, [], {}, ["x"]], ids=lambda value: repr(value)[:20])
def test_any_value_in_a_record_is_taken_or_refused(cache, field, value):
    record = json.loads((cache / "clips" / "a.json").read_text()) | {field: value}
    (cache / "clips" / "a.json").write_text(json.dumps(record))
    survive(lambda: read_all(cache), "a.")
    survive(lambda: sum_up(CacheWriter(cache, CONTRACT).finished(ABOUT)), "a.")


def sum_up(records: list[dict]) -> str:
    """What datasets_process.py makes of records."""
    cached = [record for record in records if "kind" not in record]
    assert sum(record.get("frames", 0) for record in records) >= 0
    if not cached:
        return ", ".join(sorted({record["kind"] for record in records}))
    total, usable, size = (sum(record[key] for record in cached) for key in ("frames", "usable_frames", "bytes"))
    return f"{usable} of {total} frames, {total / 25:.0f} s, {size / total:.0f} bytes a frame"


@pytest.mark.parametrize(
    ("place", "field"),
    [("clips", field) for field in CLIP_RECORD] + [("rejected", field) for field in REJECTED_RECORD],
)
def test_a_record_that_lacks_what_is_told_of_it_is_refused(cache, place, field):
    """Each kind of record has what the report at the end of preparing counts."""
    record = json.loads((cache / "clips" / "a.json").read_text())
    if place == "rejected":
        (cache / "clips" / "a.json").unlink()
        (cache / "rejected").mkdir()
        record = ABOUT | {"kind": "no face", "reason": "none was found"}
    del record[field]
    (cache / place / "a.json").write_text(json.dumps(record))
    assert field in refusal(lambda: CacheWriter(cache, CONTRACT).finished(ABOUT), str(cache / place / "a.json"))


@pytest.mark.parametrize("nested", NESTED, ids=["lists", "objects"])
@pytest.mark.parametrize("field", ["more", "identity", "start"])
def test_a_nested_record_is_refused_before_it_is_written_again(cache, field, nested):
    path = cache / "clips" / "a.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: "PLACE"}).replace('"PLACE"', nested))
    refusal(lambda: CacheWriter(cache, CONTRACT).finished(ABOUT | {"identity": "another"}), str(path))


@pytest.mark.parametrize("frames", [0, 5, 7, 10**9])
def test_a_record_of_another_number_of_frames_is_refused(cache, frames):
    path = cache / "clips" / "a.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"frames": frames}))
    refusal(lambda: Cache(cache), "clips/a.")


@given(field=st.sampled_from([*ABOUT, "frames", "usable_frames", "bytes", "sha256", "more"]), value=anything)
def test_a_record_with_any_value_is_taken_or_refused(made_cache, tmp_path_factory, field, value):
    folder = copied(made_cache, tmp_path_factory)
    path = folder / "clips" / "a.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    survive(lambda: read_all(folder), "a.")
    survive(lambda: sum_up(CacheWriter(folder, CONTRACT).finished(ABOUT | {"identity": "another"})), "a.")


# Statistics of a run.


@pytest.mark.parametrize(
    "line",
    ["", "{", "[]", "3", "null", "NaN", "{}", '{"step": ' + "[" * DEEP, *(json.dumps({"step": value}) for value in ODD)]
    + [f'{{"step": {nested}}}' for nested in NESTED],
    ids=lambda line: line[:20],
)
def test_hostile_statistics_are_dropped_or_kept(tmp_path, line):
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "stats.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 9}}\n')
    RunLog(tmp_path, "run", 5).board.close()
    lines = path.read_text().splitlines()
    assert lines[0] == '{"step": 1}' and set(lines[1:]) <= {line}


@given(content=mutated(b"".join(b'{"step": %d, "latent_l1": 0.5}\n' % step for step in range(40))))
@example(b'{"step": "\xff"}\n')
def test_statistics_with_accidents_are_read(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("log")
    (folder / "run").mkdir()
    (folder / "run" / "stats.jsonl").write_bytes(content)
    RunLog(folder, "run", 20).board.close()
    steps = [json.loads(line)["step"] for line in (folder / "run" / "stats.jsonl").read_text().splitlines()]
    assert all(step <= 20 for step in steps)
