"""Finding videos, grouping them into jobs, and preparing odd, changed and equally named ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path, PurePath

import pytest
from tqdm import tqdm

import datasets_process
import musetalk.data.crop
from datasets_process import PrepareConfig, load_models, prepare_all
from musetalk.data.cache import Cache
from musetalk.data.cache_writer import CacheWriter, join_pieces
from musetalk.data.sources import Source, find_sources, find_videos, independent, read_identities
from musetalk.data.video import read_audio, read_frames, write_video
from musetalk.errors import UserError


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in find_videos(folder)]


def test_videos_are_found_in_all_subfolders_in_order(tmp_path):
    for name in ("b.MP4", "a/z.mov", "a/b/c.mkv", "d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert names(tmp_path) == ["a/b/c.mkv", "a/z.mov", "b.MP4"]


def test_links_are_followed_but_no_folder_is_visited_twice(tmp_path):
    folder = tmp_path / "videos"
    for name in ("videos/b/1.mp4", "videos/x.mp4/2.mp4", "outside/deeper/3.mp4", "other/4.mp4"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    for link, target in {
        "a": "b",  # found under its own name
        "b/itself": ".",
        "b/parent": "..",
        "b/above": "../..",
        "ping": "pong",
        "pong": "ping",
        "far": "../outside",
        "z/again": "../../outside/deeper",
        "m/other": "../../other",  # found under the first of two names
        "k/other": "../../other",
        "file.mp4": "b/1.mp4",
        "nothing.mp4": "nowhere.mp4",
        "round.mp4": "round.mp4",
    }.items():
        (folder / link).parent.mkdir(exist_ok=True)
        (folder / link).symlink_to(target)
    (tmp_path / "outside" / "back").symlink_to(folder)
    expected = ["b/1.mp4", "far/deeper/3.mp4", "file.mp4", "k/other/4.mp4", "nothing.mp4", "round.mp4", "x.mp4/2.mp4"]
    assert names(folder) == expected
    (tmp_path / "link").symlink_to(folder)
    assert names(tmp_path / "link") == expected


def test_identities_must_be_names(tmp_path):
    (tmp_path / "identities.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match="identities.json: must be an object of"):
        read_identities(tmp_path)


def test_sources_have_their_identity_and_length(small_clips):
    videos = ["sample_00.mp4", "sample_01.mp4", "sample_02.mp4"]
    assert find_sources(small_clips) == [Source(PurePath(name), "grid_s1", 30) for name in videos]


@pytest.mark.parametrize(
    "groups",
    [
        ("a.mp4", "b.mp4", "a/b.mp4"),
        ("a.mov a.mp4", "b.mp4"),
        ("a/b.mp4 a__b.mp4", "a/c.mp4"),
        ("x-0000-0001.mov x-0000.mp4 x.mp4", "x-1.mp4", "y-0000.mp4", "y-0001.mp4"),  # parts of x, but there is no y
        ("a.mp4 a.mp4.mkv", "b.mp4.mkv"),
        ("a-0001.MOV.mkv a.mp4",),
    ],
)
def test_sources_whose_clips_may_have_one_name_are_one_job(groups):
    sources = [Source(PurePath(name), "", len(name)) for name in sorted(" ".join(groups).split())]
    jobs = list(independent(sources).values())
    assert sorted(" ".join(source.path.as_posix() for source in job) for job in jobs) == sorted(groups)
    lengths = [sum(source.frames for source in job) for job in jobs]
    assert lengths == sorted(lengths, reverse=True)


def test_a_long_video_that_is_alone_becomes_jobs_of_ten_minutes():
    lengths = {"short.mp4": 15_000, "long.mp4": 40_000, "x.mp4": 40_000, "x-0001.mp4": 9}
    jobs = independent([Source(PurePath(name), "", frames) for name, frames in lengths.items()])
    pieces = {name: [(source.frames, source.first, source.stop) for source in job] for name, job in jobs.items()}
    assert pieces == {
        "x": [(40_000, 0, None), (9, 0, None)],
        "short": [(15_000, 0, None)],
        "long": [(15_000, 0, 10)],
        "long-0010": [(15_000, 10, 20)],
        "long-0020": [(10_000, 20, None)],
    }


# Preparing.


@pytest.fixture(scope="module")
def models() -> datasets_process.Models:
    return load_models(PrepareConfig(device="cpu"))


@pytest.fixture
def prepare(models, tmp_path, capsys) -> Callable[..., dict[str, str]]:
    """A function: cache folder -> clip or rejected source -> its source and, if rejected, the kind of error.

    Prepares `tmp_path / "videos"`.
    """

    def run(cache: str = "cache") -> dict[str, str]:
        videos, folder = tmp_path / "videos", tmp_path / cache
        writer = CacheWriter(folder, models.contract)
        with tqdm() as bar:
            prepare_all(videos, writer, models, find_sources(videos), bar)
        assert "Traceback" not in capsys.readouterr().err
        records = {path.relative_to(folder): json.loads(path.read_text()) for path in folder.glob("*/*.json")}
        return {
            path.with_suffix("").as_posix(): f"{record['source']} {record.get('kind', '')}".strip()
            for path, record in records.items()
        }

    return run


@pytest.fixture
def write(small_clips, tmp_path, monkeypatch) -> Callable[[str, int], None]:
    """A function: path in `tmp_path / "videos"`, number of frames -> a video; clips have at most 4 frames."""
    for module in (datasets_process, musetalk.data.crop):
        monkeypatch.setattr(module, "MAX_CLIP_FRAMES", 4)
    frames = list(read_frames(small_clips / "sample_00.mp4", 0, 7))
    audio = read_audio(small_clips / "sample_00.mp4")
    return lambda name, count: write_video(tmp_path / "videos" / name, frames[:count], audio, 16_000)


def test_broken_links_are_rejected_and_odd_names_escaped(write, prepare, tmp_path):
    write("x.mp4/it is.mp4", 2)
    write("a\n\x1b[2J.mp4", 2)
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
    assert prepare() == expected
    (videos / "nowhere.mp4").symlink_to("link.mp4")  # so nothing.mp4 is no broken link any more
    del expected["rejected/nothing"]
    assert prepare() == expected | {"clips/nowhere": "nowhere.mp4", "clips/nothing": "nothing.mp4"}


def test_of_sources_with_one_clip_name_the_first_gets_it(write, prepare):
    for name, count in {"a/b.mp4": 2, "a__b.mp4": 2, "x.mp4": 7, "x-0000.mp4": 2}.items():
        write(name, count)
    expected = {
        "clips/a__b": "a/b.mp4",
        "rejected/a__b.mp4": "a__b.mp4 same name",
        "clips/x-0000": "x-0000.mp4",
        "rejected/x.mp4": "x.mp4 same name",
    }
    assert prepare() == expected == prepare()


def test_a_later_source_does_not_get_the_name_of_an_existing_clip(write, prepare, tmp_path):
    write("a__b.mp4", 2)
    before = {"clips/a__b": "a__b.mp4"}
    assert prepare() == before
    files = contents(tmp_path / "cache")
    write("a/b.mp4", 2)
    assert prepare() == before | {"rejected/a__b.mp4": "a/b.mp4 same name"}
    assert contents(tmp_path / "cache").items() >= files.items()


def test_a_changed_source_replaces_all_its_clips(write, prepare, tmp_path):
    write("other.mp4", 2)
    write("x.mp4", 7)
    assert prepare() == {"clips/other": "other.mp4", "clips/x-0000": "x.mp4", "clips/x-0001": "x.mp4"}
    write("x.mp4", 3)
    assert prepare() == {"clips/other": "other.mp4", "clips/x": "x.mp4"} == prepare("fresh")
    assert contents(tmp_path / "cache") == contents(tmp_path / "fresh")
    (tmp_path / "videos" / "x.mp4").write_text("no video")
    assert prepare() == {"clips/other": "other.mp4", "rejected/x": "x.mp4 unreadable"}


def test_pieces_of_a_video_in_any_order_give_the_bytes_of_the_whole(write, write_source, models, small_clips, tmp_path):
    """`long` has four parts. `broken` cannot be read from its second part on, but could be again from part 250 on."""
    frames, audio = list(read_frames(small_clips / "sample_00.mp4", 0, 15)), read_audio(small_clips / "sample_00.mp4")
    write_video(tmp_path / "long.mp4", frames, audio, 16_000)
    times = [Fraction(index + 1000 * (index > 5), 25) for index in range(15)]
    write_source(tmp_path / "broken.mp4", frames, times, audio=audio)

    def prepare_pieces(name: str, *sources: Source) -> dict[str, bytes]:
        writer = CacheWriter(tmp_path / name, models.contract)
        with tqdm() as bar:
            jobs = [prepare_all(tmp_path, writer, models, [source], bar) for source in reversed(sources)]
        join_pieces(writer.folder, [record for records in reversed(jobs) for record in records])
        return contents(writer.folder)

    long, broken = (Source(PurePath(name), "", 15) for name in ("long.mp4", "broken.mp4"))
    whole = prepare_pieces("whole", long, broken)
    assert {name for name in whole if name.endswith(".json")} == {
        *("contract.json", "clips/broken-0000.json", "rejected/broken-0001.json"),
        *(f"clips/long-{part:04d}.json" for part in range(4)),
    }
    bounds = [(0, 1), (1, 3), (3, 250), (250, None)]
    pieces = [replace(source, first=first, stop=stop) for source in (long, broken) for first, stop in bounds]
    assert prepare_pieces("pieces", *pieces) == whole
    for path in (tmp_path / "pieces/clips").glob("long-0001.*"):
        path.unlink()
    assert prepare_pieces("pieces", *pieces) == whole == prepare_pieces("pieces", long, broken)


def test_an_identity_given_later_is_stored_without_encoding_again(write, prepare, tmp_path, monkeypatch):
    write("x.mp4", 7)
    (tmp_path / "videos" / "no.mp4").write_text("no video")
    prepare()
    (tmp_path / "videos" / "identities.json").write_text('{"x": "Anna", "no": "Jo"}')
    prepare("fresh")
    monkeypatch.setattr(datasets_process, "read_audio", lambda path: pytest.fail("encoded again"))
    prepare()
    assert contents(tmp_path / "cache") == contents(tmp_path / "fresh")
    assert {clip.identity for clip in Cache(tmp_path / "cache").clips.values()} == {"Anna"}
