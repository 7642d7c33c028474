"""Clip names, identities, completed clips of a source, and verification of a cache."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path, PurePath

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from musetalk.contract import FeatureContract
from musetalk.data.cache import Cache, CacheError, verify
from musetalk.data.cache_format import CLIP_RECORD, TENSORS, clip_name, identity_of
from musetalk.data.cache_writer import CacheWriter
from musetalk.data.video import MediaError

CONTRACT = FeatureContract()
ABSENT = "absent"


def metadata(source: str = "a.mp4", **changes) -> dict:
    """Metadata of a source."""
    return {"source": source, "source_bytes": 9, "identity": "somebody", "start": 0, "last": True} | changes


@pytest.fixture
def writer(tmp_path) -> CacheWriter:
    return CacheWriter(tmp_path / "cache", CONTRACT)


@pytest.fixture
def write(writer, random_tensors):
    """A function that writes a clip of a source."""

    def write(clip: str, source: str = "a.mp4", **changes) -> dict:
        return writer.write(clip, random_tensors(2, seed=sum(clip.encode())), metadata(source, **changes))

    return write


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {"contract.json"}


# Names.


@pytest.mark.parametrize(
    ("source", "part", "name"),
    [
        ("a.mp4", None, "a"),
        ("people/a.mp4", None, "people__a"),
        ("x/y/a.b.mov", None, "x__y__a.b"),
        ("people/a.mp4", 0, "people__a-0000"),
        ("a.mp4", 12, "a-0012"),
        ("a.mp4", 10_000, "a-10000"),
        ("a\n\x1b.mp4", None, r"a\n\x1b"),
        ("\udcff.mp4", 1, r"\udcff-0001"),
        ("...mp4", None, ".."),
        ("J\u00fcrgen.mp4", None, "J\u00fcrgen"),
        ("n" * 200 + ".mp4", None, "n" * 200),
    ],
)
def test_clip_names(source, part, name):
    assert clip_name(PurePath(source), part) == name


def test_a_very_long_name_is_shortened_to_its_hash_and_end():
    names = [clip_name(PurePath(start + "\u00fc" * 110 + ".mp4"), 3) for start in "ab"]
    assert names[0] != names[1] and all(name.endswith("-" + "\u00fc" * 50 + "-0003") for name in names)
    assert clip_name(PurePath("a" * 201)) != clip_name(PurePath("a" * 202))


any_name = st.text(st.characters(exclude_characters="/\0"), min_size=1).filter(lambda name: name not in (".", ".."))


@given(folders=st.lists(any_name, max_size=5), name=any_name, times=st.integers(1, 40), part=st.integers(0, 99_999))
def test_any_video_name_gives_a_valid_file_name(folders, name, times, part):
    source = PurePath(*folders, name * times + ".mp4")
    for clip in (clip_name(source), clip_name(source, part)):
        file = f"{clip}.safetensors.1234567.partial"
        assert PurePath(file).name == file and len(os.fsencode(file)) <= 255 and len(f"{clip}.".splitlines()) == 1
        assert Path(f"{clip}.json").stem == clip


@pytest.mark.parametrize(
    ("source", "identity"),
    [
        ("WDA_BernieSanders_000.mp4", "WDA_BernieSanders"),
        ("RD_Radio1_000.mp4", "RD_Radio1"),
        ("hdtf/train/WRA_A_B_C_123.mp4", "WRA_A_B_C"),
        ("WDA_BernieSanders.mp4", "WDA_BernieSanders"),
        ("WDA_BernieSanders_0000.mp4", "WDA_BernieSanders_0000"),
        ("XWDA_Bernie_000.mp4", "XWDA_Bernie_000"),
        ("people/a.mp4", "people/a"),
        ("talks/talk.1.mp4", "talks/talk.1"),
    ],
)
def test_identities_from_file_names(source, identity):
    assert identity_of(PurePath(source), {"elsewhere": "x"}) == identity


def test_identities_json_overrides_file_names():
    identities = {"WDA_BernieSanders_000": "Bernie", "people/a": "Anna"}
    assert identity_of(PurePath("WDA_BernieSanders_000.mp4"), identities) == "Bernie"
    assert identity_of(PurePath("people/a.mp4"), identities) == "Anna"
    assert identity_of(PurePath("a.mp4"), identities) == "a"


@pytest.mark.parametrize("odd", ["J\u00fcrgen", "a\nb", "\udcff", "\U0001f642" * 40, "\x1b[2J"])
def test_unusual_names_in_records_are_read_unchanged(writer, write, odd):
    source = f"{odd}/{odd}.mp4"
    clip = clip_name(PurePath(source))
    written = write(clip, source, identity=odd)
    assert writer.finished(metadata(source, identity=odd)) == [written]
    assert Cache(writer.folder).clips[clip].identity == odd
    assert Cache(writer.folder).clips[clip].metadata["source"] == source
    if odd.isprintable():
        assert odd in (writer.folder / "clips" / f"{clip}.json").read_text(encoding="utf-8")


# Completed clips of a source.


def test_the_completed_clips_of_a_source_are_listed_in_order(writer, write):
    source = metadata("people/a.mp4")
    assert writer.finished(source) == []
    first = write("people__a-0000", "people/a.mp4", last=False)
    assert writer.finished(source) == [first]
    second = writer.reject("people__a-0001", source | {"last": False}, "no face", "no face was found")
    third = write("people__a-0002", "people/a.mp4")
    assert CacheWriter(writer.folder, CONTRACT).finished(source) == [first, second, third]
    assert (second["kind"], second["reason"]) == ("no face", "no face was found")
    assert writer.finished(metadata("a.mp4")) == [] == writer.finished(metadata("people/a-0000x.mp4"))


def test_a_gap_ends_the_completed_clips(writer, write):
    for part in (0, 2):
        write(f"a-{part:04d}", last=part == 2)
    assert len(writer.finished(metadata())) == 1


def test_a_rejected_source_is_complete_and_not_a_clip(writer, write):
    write("b", "b.mp4")
    writer.reject("a", metadata(), "no audio", "a.mp4: has no audio track")
    assert [record["kind"] for record in writer.finished(metadata())] == ["no audio"]
    assert list(Cache(writer.folder).clips) == ["b"]
    assert files(writer.folder) == {"clips/b.json", "clips/b.safetensors", "rejected/a.json"}


@pytest.mark.parametrize("changed", ["another.mp4", "a.mov"])
def test_a_clip_of_another_source_is_not_overwritten(writer, write, changed):
    write("a")
    before = (writer.folder / "clips" / "a.json").read_bytes()
    with pytest.raises(MediaError, match=f"{changed}: .*a.json belongs to a.mp4; rename one of them") as caught:
        write("a", changed)
    assert caught.value.kind == "same name"
    assert (writer.folder / "clips" / "a.json").read_bytes() == before


@pytest.mark.parametrize(
    ("clip", "first", "second"),
    [
        ("a__b", "a/b.mp4", "a__b.mp4"),
        ("a__b", "a__b.mp4", "a/b.mp4"),
        ("x-0000", "x.mp4", "x-0000.mp4"),  # a part of a long video, and a video of that name
        ("x-0000-0001", "x-0000.mp4", "x-0000-0001.mp4"),
        ("a", "a.mp4", "a.mov"),
    ],
)
def test_a_source_whose_clip_name_is_taken_is_rejected_before_processing(writer, write, clip, first, second):
    part = clip != clip_name(PurePath(first))
    if clip.endswith("-0001"):
        write("x-0000-0000", first, last=False)
    written = write(clip, first, last=not part)
    with pytest.raises(MediaError) as caught:
        writer.finished(metadata(second))
    assert caught.value.kind == "same name" and "rename one of them" in str(caught.value)
    assert writer.finished(metadata(first))[-1] == written


def test_a_rejection_keeps_the_record_of_another_source(writer, write):
    written = write("a__b", "a/b.mp4")
    writer.reject("c__d", metadata("c/d.mp4"), "no audio", "none")
    for clip in ("a__b", "c__d"):
        writer.reject(clip, metadata(f"{clip}.mp4"), "unreadable", "is no file")
    assert writer.finished(metadata("a/b.mp4")) == [written]
    assert writer.finished(metadata("c/d.mp4"))[0]["kind"] == "no audio"
    assert {name for name in files(writer.folder) if name.startswith("rejected")} == {
        "rejected/a__b.mp4.json",
        "rejected/c__d.json",
        "rejected/c__d.mp4.json",
    }


def test_clips_of_a_file_whose_size_changed_are_deleted(writer, write):
    write("b", "b.mp4")
    write("a-0000", last=False)
    writer.reject("a-0001", metadata(last=False), "no face", "none")
    write("a-0002")
    assert writer.finished(metadata(source_bytes=10)) == []
    assert files(writer.folder) == {"clips/b.json", "clips/b.safetensors"}
    assert writer.finished(metadata()) == []


def test_an_interrupted_deletion_is_completed_by_the_next_run(writer, write, monkeypatch):
    """If the first part were deleted first, the others would never be found again."""
    for part in range(3):
        write(f"a-{part:04d}", last=part == 2)
    unlink, deleted = Path.unlink, []

    def interrupted(path, missing_ok=False):
        if len(deleted) == 2:
            raise KeyboardInterrupt
        deleted.append(path)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", interrupted)
    with pytest.raises(KeyboardInterrupt):
        writer.finished(metadata(source_bytes=10))
    monkeypatch.undo()
    assert len(writer.finished(metadata())) == 2
    assert writer.finished(metadata(source_bytes=10)) == [] and files(writer.folder) == set()


def test_a_changed_identity_is_written_to_every_record(writer, write):
    write("a-0000", last=False)
    writer.reject("a-0001", metadata(last=False), "no face", "none")
    write("a-0002", identity="somebody else")
    tensors = (writer.folder / "clips" / "a-0000.safetensors").read_bytes()
    found = writer.finished(metadata(identity="somebody else"))
    assert [record["identity"] for record in found] == ["somebody else"] * 3
    assert found == writer.finished(metadata(identity="somebody else"))
    assert {clip.identity for clip in Cache(writer.folder).clips.values()} == {"somebody else"}
    assert (writer.folder / "clips" / "a-0000.safetensors").read_bytes() == tensors


# Invalid records.

INVALID = {str: [None, 3], int: ["9", 9.0, True, -1], bool: [None, 1]}
INVALID_SCORES = [[0.5], {"sharpness": "high"}, {"sharpness": math.nan}]


@pytest.mark.parametrize(
    ("place", "name", "value"),
    [("clips", name, value) for name, kind in CLIP_RECORD.items() for value in [ABSENT, *INVALID[kind]]]
    + [("rejected", name, value) for name in ("kind", "reason") for value in [ABSENT, 3]]
    + [("clips", "scores", value) for value in INVALID_SCORES]
    + [("clips", "audio_offset", 0.5)],
)
def test_a_record_with_an_invalid_field_is_named(writer, write, place, name, value):
    if place == "clips":
        write("a")
    else:
        writer.reject("a", metadata(), "no face", "none")
    path = writer.folder / place / "a.json"
    record = json.loads(path.read_text())
    del record[name]
    path.write_text(json.dumps(record if value is ABSENT else record | {name: value}))
    with pytest.raises(CacheError) as caught:
        writer.finished(metadata())
    assert str(caught.value) == f"{path} has no valid {name}; delete it and run datasets_process.py again"
    if place == "clips":
        with pytest.raises(CacheError, match=f"a.json has no valid {name}"):
            Cache(writer.folder)


# Verification.


@pytest.fixture
def faults(writer, write):
    """A cache of three clips, and a function that verifies it."""
    for clip in "abc":
        write(clip, f"{clip}.mp4")
    return lambda: [None if fault is None else str(fault) for fault in verify(writer.folder)]


def test_an_intact_cache_has_no_errors(faults):
    assert faults() == [None, None, None]


@pytest.mark.parametrize("name", TENSORS)
def test_a_flipped_bit_in_any_tensor_is_found(writer, faults, name):
    path = writer.folder / "clips" / "b.safetensors"
    content = bytearray(path.read_bytes())
    data = 8 + int.from_bytes(content[:8], "little")  # after the header's length and the header
    begin, end = json.loads(content[8:data])[name]["data_offsets"]
    content[data + (begin + end) // 2] ^= 1
    path.write_bytes(content)
    found = faults()
    assert [fault is None for fault in found] == [True, False, True]
    assert found[1].startswith(str(path)) and "delete b.json" in found[1]
    if name not in ("usable", "face_jpeg_offsets"):  # read when a clip is opened
        assert found[1].startswith(f"{path} is corrupted")
        assert list(Cache(writer.folder).clips) == ["a", "b", "c"]


@pytest.mark.parametrize("change", ["missing", "empty", "longer", "header"])
def test_a_replaced_tensor_file_is_found(writer, faults, change):
    path = writer.folder / "clips" / "c.safetensors"
    content = path.read_bytes()
    if change == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "longer": content + b"\0", "header": b"\xff" + content[1:]}[change])
    found = faults()
    assert found[:2] == [None, None] and found[2].startswith(str(path)) and "delete c.json" in found[2]


def test_swapped_tensor_files_are_found(writer, faults):
    path = writer.folder / "clips" / "a.safetensors"
    path.write_bytes((writer.folder / "clips" / "b.safetensors").read_bytes())
    assert Cache(writer.folder).clips["a"].usable.all()
    (only,) = (fault for fault in faults() if fault)
    assert only.startswith(f"{path} is corrupted")


def test_a_folder_that_is_not_a_cache_cannot_be_verified(tmp_path):
    with pytest.raises(CacheError, match="is not a cache"):
        list(verify(tmp_path))


def test_a_corrupted_clip_can_be_written_again(writer, write, faults, random_tensors):
    (writer.folder / "clips" / "a.safetensors").write_bytes(b"broken")
    (writer.folder / "clips" / "a.json").unlink()
    assert writer.finished(metadata()) == []
    write("a")
    assert faults() == [None, None, None]
    np.testing.assert_array_equal(
        Cache(writer.folder).clips["a"].tensor("mel"), random_tensors(2, seed=ord("a"))["mel"]
    )
