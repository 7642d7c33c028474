"""Which videos are found, and what becomes of those that are odd, change, or have one name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path, PurePath

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tqdm import tqdm

import datasets_process
import musetalk.data.crop
from datasets_process import PrepareConfig, load_models, prepare_all
from musetalk.data.cache import Cache, CacheWriter, clip_name
from musetalk.data.sources import Source, find_sources, find_videos, independent, read_identities
from musetalk.data.video import read_audio, read_frames, write_video
from musetalk.errors import UserError


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_videos_are_found_in_all_subfolders_in_order(tmp_path):
    for name in ("b.MP4", "a/z.mov", "a/b/c.mkv", "d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [path.relative_to(tmp_path).as_posix() for path in find_videos(tmp_path)] == [
        "a/b/c.mkv",
        "a/z.mov",
        "b.MP4",
    ]


def test_links_are_followed_but_into_no_folder_twice(tmp_path):
    folder, outside = tmp_path / "videos", tmp_path / "outside"
    for path in (
        folder / "b" / "1.mp4",
        folder / "x.mp4" / "2.mp4",
        outside / "deeper" / "3.mp4",
        tmp_path / "other" / "4.mp4",
    ):
        path.parent.mkdir(parents=True)
        path.touch()
    for link, target in {
        "a": "b",  # beside it, found under its own name
        "b/itself": ".",
        "b/parent": "..",
        "b/above": "../..",
        "loop": "loop",
        "ping": "pong",
        "pong": "ping",
        "far": "../outside",
        "z/again": "../../outside/deeper",
        "m/other": "../../other",  # the first of two in the order of names
        "k/other": "../../other",
        "file.mp4": "b/1.mp4",
        "nothing.mp4": "nowhere.mp4",
        "round.mp4": "round.mp4",
    }.items():
        (folder / link).parent.mkdir(exist_ok=True)
        (folder / link).symlink_to(target)
    (outside / "back").symlink_to(folder)
    found = ["b/1.mp4", "far/deeper/3.mp4", "file.mp4", "k/other/4.mp4", "nothing.mp4", "round.mp4", "x.mp4/2.mp4"]
    assert [path.relative_to(folder).as_posix() for path in find_videos(folder)] == found
    (tmp_path / "link").symlink_to(folder)
    assert [path.relative_to(tmp_path / "link").as_posix() for path in find_videos(tmp_path / "link")] == found


def test_identities_must_be_names(tmp_path):
    (tmp_path / "identities.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match="identities.json: must be an object of"):
        read_identities(tmp_path)


def test_sources_have_their_person_and_their_length(small_clips):
    names = ["sample_00.mp4", "sample_01.mp4", "sample_02.mp4"]
    assert find_sources(small_clips) == [Source(PurePath(name), "astronaut", 30) for name in names]


# Which sources can be prepared at the same time.


def names_of(*groups: str) -> list[list[str]]:
    """Groups of the sources of these names, as `independent` makes them of all."""
    sources = [Source(PurePath(name), "", 0) for name in sorted(name for group in groups for name in group.split())]
    return sorted([source.path.as_posix() for source in group] for group in independent(sources).values())


@pytest.mark.parametrize(
    "groups",
    [
        ("a.mp4", "b.mp4", "a/b.mp4"),
        ("a.mov a.mp4", "b.mp4"),
        ("a/b.mp4 a__b.mp4", "a/c.mp4"),
        ("x-0000.mp4 x.mp4", "y-0000.mp4", "y-0001.mp4"),  # of y itself there is none
        ("x-0000.mp4 x-0000-0001.mov x.mp4", "x-1.mp4"),
        ("a.mp4 a.mp4.mkv", "b.mp4.mkv"),
        ("a.mp4 a-0001.MOV.mkv",),
    ],
)
def test_sources_whose_clips_can_have_one_name_stay_together_in_order(groups):
    assert names_of(*groups) == sorted(sorted(group.split()) for group in groups)


@given(names=st.sets(st.from_regex(r"[ab](__a|/a|-0000|-1234|\.mov){0,3}\.(mp4|mov)", fullmatch=True), max_size=8))
def test_no_two_groups_can_want_one_name(names):
    sources = [Source(PurePath(name), "", len(name)) for name in sorted(names)]
    groups = list(independent(sources).values())
    assert sorted(source.path.as_posix() for group in groups for source in group) == sorted(names)
    assert all(group == sorted(group, key=lambda source: source.path.as_posix()) for group in groups)
    lengths = [sum(source.frames for source in group) for group in groups]
    assert lengths == sorted(lengths, reverse=True)
    wanted = []
    for group in groups:
        plain = {clip_name(source.path, part) for source in group for part in (None, 0, 1234)}
        wanted.append(plain | {name + source.path.suffix for name in plain for source in group})
    assert len(set().union(*wanted)) == sum(map(len, wanted))


# What becomes of sources that are odd, change or meet.


@pytest.fixture(scope="module")
def tools() -> datasets_process.Models:
    return load_models(PrepareConfig(device="cpu"))


@pytest.fixture
def prepared(tools, tmp_path, capsys) -> Callable[..., dict[str, str]]:
    """A function that prepares `tmp_path / "videos"`: each record's source or, of a refused one, source and kind."""

    def run(cache: str = "cache") -> dict[str, str]:
        videos, folder = tmp_path / "videos", tmp_path / cache
        writer = CacheWriter(folder, tools.contract)
        with tqdm() as bar:
            prepare_all(videos, writer, tools, find_sources(videos), bar)
        assert "Traceback" not in capsys.readouterr().err
        records = {path.relative_to(folder): json.loads(path.read_text()) for path in folder.glob("*/*.json")}
        return {
            path.with_suffix("").as_posix(): f"{record['source']} {record.get('kind', '')}".strip()
            for path, record in records.items()
        }

    return run


@pytest.fixture
def cut(small_clips, tmp_path, monkeypatch) -> Callable[[str, int], None]:
    """A function that writes a video of so many frames; of more than 4, several clips are made."""
    for module in (datasets_process, musetalk.data.crop):
        monkeypatch.setattr(module, "MAX_CLIP_FRAMES", 4)
    frames = list(read_frames(small_clips / "sample_00.mp4", 0, 7))
    audio = read_audio(small_clips / "sample_00.mp4")
    return lambda name, count: write_video(tmp_path / "videos" / name, frames[:count], audio, 16_000)


def test_odd_things_among_videos_are_refused_and_the_rest_is_cached(cut, prepared, tmp_path):
    cut("x.mp4/it is.mp4", 2)
    cut("a\n\x1b[2J.mp4", 2)
    videos = tmp_path / "videos"
    (videos / "link.mp4").symlink_to("x.mp4/it is.mp4")
    (videos / "nothing.mp4").symlink_to("nowhere.mp4")
    (videos / "round.mp4").symlink_to("round.mp4")
    expected = {
        "clips/x.mp4__it is": "x.mp4/it is.mp4",
        "clips/link": "link.mp4",
        r"clips/a\n\x1b[2J": "a\n\x1b[2J.mp4",
        "rejected/nothing": "nothing.mp4 unreadable",
        "rejected/round": "round.mp4 unreadable",
    }
    assert prepared() == expected
    (videos / "nowhere.mp4").symlink_to("link.mp4")  # and the link to nothing is one to something
    del expected["rejected/nothing"]
    assert prepared() == expected | {"clips/nowhere": "nowhere.mp4", "clips/nothing": "nothing.mp4"}


def test_of_sources_of_one_name_the_first_keeps_it(cut, prepared):
    for name, count in {"a/b.mp4": 2, "a__b.mp4": 2, "x.mp4": 7, "x-0000.mp4": 2}.items():
        cut(name, count)
    expected = {
        "clips/a__b": "a/b.mp4",
        "rejected/a__b.mp4": "a__b.mp4 same name",
        "clips/x-0000": "x-0000.mp4",
        "rejected/x.mp4": "x.mp4 same name",
    }
    assert prepared() == expected == prepared()


def test_a_source_that_comes_later_takes_no_name_that_is_there(cut, prepared, tmp_path):
    cut("a__b.mp4", 2)
    cut("x.mp4", 7)
    before = {"clips/a__b": "a__b.mp4", "clips/x-0000": "x.mp4", "clips/x-0001": "x.mp4"}
    assert prepared() == before
    made = contents(tmp_path / "cache")
    cut("a/b.mp4", 2)
    cut("x-0000.mp4", 2)
    later = {"rejected/a__b.mp4": "a/b.mp4 same name", "rejected/x-0000.mp4": "x-0000.mp4 same name"}
    assert prepared() == before | later == prepared()
    assert contents(tmp_path / "cache").items() >= made.items()


def test_a_source_of_another_size_is_made_again_and_its_old_parts_are_gone(cut, prepared, tmp_path):
    cut("other.mp4", 2)
    cut("x.mp4", 7)
    assert prepared() == {"clips/other": "other.mp4", "clips/x-0000": "x.mp4", "clips/x-0001": "x.mp4"}
    cut("x.mp4", 3)
    assert prepared() == {"clips/other": "other.mp4", "clips/x": "x.mp4"} == prepared("fresh")
    assert contents(tmp_path / "cache") == contents(tmp_path / "fresh")
    (tmp_path / "videos" / "x.mp4").write_text("no video any more")
    assert prepared() == {"clips/other": "other.mp4", "rejected/x": "x.mp4 unreadable"}


def test_an_identity_given_later_is_taken_up_without_encoding_again(cut, prepared, tmp_path, monkeypatch):
    cut("x.mp4", 7)
    (tmp_path / "videos" / "no.mp4").write_text("no video")
    prepared()
    (tmp_path / "videos" / "identities.json").write_text('{"x": "Anna", "no": "Jo"}')
    prepared("fresh")
    monkeypatch.setattr(datasets_process, "read_audio", lambda path: pytest.fail("it was made again"))
    prepared()
    assert contents(tmp_path / "cache") == contents(tmp_path / "fresh")
    assert {clip.identity for clip in Cache(tmp_path / "cache").clips.values()} == {"Anna"}
