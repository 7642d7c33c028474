"""Finds the videos of a folder, their identities, and which of them can be processed in parallel."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

from musetalk.data.cache_format import MAX_CLIP_FRAMES, clip_name, identity_of
from musetalk.data.video import MediaError, count_frames
from musetalk.errors import UserError
from musetalk.files import read_json

VIDEO_SUFFIXES = {".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv"}
PARTS_PER_JOB = 10  # each job computes the audio features of the whole video
NAME_SUFFIX = re.compile(r"(-\d{4,}|\.\w+)\Z")  # appended by the cache: index of a part or file suffix


@dataclass(frozen=True)
class Source:
    """A video below a folder, or some of its parts: it becomes a clip for each `MAX_CLIP_FRAMES`.

    frames: estimated number of frames, 0 if the file is unreadable.
    """

    path: PurePath  # relative to the folder
    identity: str
    frames: int
    first: int = 0  # part
    stop: int | None = None  # part; None: to the end


def find_sources(folder: Path) -> list[Source]:
    """Lists all videos below a folder, sorted. Raises as `find_videos` and `read_identities` do."""
    videos, identities = find_videos(folder), read_identities(folder)
    relative = [video.relative_to(folder) for video in videos]
    return [
        Source(path, identity_of(path, identities), _expected_frames(video))
        for path, video in zip(relative, videos, strict=True)
    ]


def find_videos(folder: Path) -> list[Path]:
    """Lists all videos below a folder, sorted. Symbolic links are followed, but no folder is visited twice.

    Raises MediaError if there is no such folder or no video in it, OSError for an unreadable folder.
    """
    if not folder.is_dir():
        raise MediaError("unreadable", f"{folder}: no such folder; set hdtf_dir to your folder of videos")
    videos: list[Path] = []
    visited, tops = set(), [folder]
    for top in tops:
        for here, folders, files in os.walk(top, onerror=_raise):
            if os.path.realpath(here) in visited:
                folders.clear()
                continue
            visited.add(os.path.realpath(here))
            folders.sort()
            videos += (Path(here, name) for name in files if Path(name).suffix.lower() in VIDEO_SUFFIXES)
            links = (Path(here, name) for name in folders if Path(here, name).is_symlink())
            tops += (link for link in links if not folder.resolve().is_relative_to(link.resolve()))
    if not videos:
        raise MediaError("no video", f"{folder}: contains no videos ({', '.join(sorted(VIDEO_SUFFIXES))})")
    return sorted(videos)


def _raise(error: OSError) -> None:
    raise error


def read_identities(folder: Path) -> dict[str, str]:
    """Reads identities.json of a folder of videos, {} if there is none. Raises UserError if it is invalid."""
    path = folder / "identities.json"
    identities = read_json(path) if os.path.lexists(path) else {}  # a broken link is an error
    if not all(isinstance(name, str) for name in identities.values()):
        raise UserError(f'{path}: must be an object of "path without suffix": "name of the person"')
    return identities


def _expected_frames(video: Path) -> int:
    try:
        return count_frames(video)
    except MediaError:
        return 0


def independent(sources: Sequence[Source]) -> dict[str, list[Source]]:
    """Groups sources into jobs that can run in parallel: {clip name of the first: sources}, the longest job first.

    Sources whose clip names may collide stay in one job, in order, since the first one gets the name: a source and
    another that is named like one of its parts ("a" and "a-0001") or like its rejected record ("a.mp4").
    A long video that is alone in its job becomes several jobs.
    """
    names = {clip_name(source.path) for source in sources}
    jobs = defaultdict(list)
    for source in sources:
        first = name = clip_name(source.path)
        while (shorter := NAME_SUFFIX.sub("", name)) != name:
            name = shorter
            first = name if name in names else first
        jobs[first].append(source)
    split: dict[str, list[Source]] = {}
    for name, group in jobs.items():
        pieces = [[piece] for piece in _pieces(*group)] if len(group) == 1 else [group]
        split |= {f"{name}-{piece[0].first:04d}" if piece[0].first else name: piece for piece in pieces}
    return dict(sorted(split.items(), key=lambda item: -sum(source.frames for source in item[1])))


def _pieces(source: Source) -> list[Source]:
    """Splits a video into pieces of `PARTS_PER_JOB` parts. The last one is open, since the length is an estimate."""
    length = PARTS_PER_JOB * MAX_CLIP_FRAMES
    starts = range(0, max(1, source.frames), length)
    return [
        replace(
            source,
            frames=min(length, source.frames - start),
            first=start // MAX_CLIP_FRAMES,
            stop=None if start == starts[-1] else (start + length) // MAX_CLIP_FRAMES,
        )
        for start in starts
    ]
