"""The videos of a folder: which there are, who is in them, and which of them must be prepared one after another."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from musetalk.data.cache import clip_name, identity_of
from musetalk.data.video import MediaError, count_frames
from musetalk.errors import UserError
from musetalk.files import read_json

VIDEO_ENDINGS = {".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv"}
NAME_ENDING = re.compile(r"(-\d{4,}|\.\w+)\Z")  # what the cache may add to a name: a part, the ending of a file


@dataclass(frozen=True)
class Source:
    """A video below a folder.

    frames: how many there should be by its own word, 0 where it cannot be read: for progress bars, not for logic.
    """

    path: PurePath  # below the folder
    identity: str
    frames: int


def find_sources(folder: Path) -> list[Source]:
    """All videos below a folder, sorted. Raises as `find_videos` and `read_identities` do."""
    videos, identities = find_videos(folder), read_identities(folder)
    relative = [video.relative_to(folder) for video in videos]
    return [
        Source(path, identity_of(path, identities), _expected_frames(video))
        for path, video in zip(relative, videos, strict=True)
    ]


def find_videos(folder: Path) -> list[Path]:
    """All videos below a folder, sorted; links are followed, but into no folder twice.

    Raises MediaError where there is no folder or no video, OSError for a folder that cannot be read.
    """
    if not folder.is_dir():
        raise MediaError("unreadable", f"{folder}: there is no such folder; set hdtf_dir to your folder of videos")
    found, visited, tops = [], set(), [folder]
    for top in tops:
        for here, folders, files in os.walk(top, onerror=_raise):
            if os.path.realpath(here) in visited:
                folders.clear()
                continue
            visited.add(os.path.realpath(here))
            folders.sort()
            found += (Path(here, name) for name in files if Path(name).suffix.lower() in VIDEO_ENDINGS)
            links = (Path(here, name) for name in folders if Path(here, name).is_symlink())
            tops += (link for link in links if not folder.resolve().is_relative_to(link.resolve()))
    if not found:
        raise MediaError("no video", f"{folder}: no video in it ({', '.join(sorted(VIDEO_ENDINGS))})")
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error


def read_identities(folder: Path) -> dict[str, str]:
    """identities.json of a folder of videos, {} where there is none. Raises UserError where it is unfit."""
    path = folder / "identities.json"
    identities = read_json(path) if os.path.lexists(path) else {}  # a link to nothing is a fault
    if not all(isinstance(name, str) for name in identities.values()):
        raise UserError(f'{path}: must be one object of "path without ending": "name of the person"')
    return identities


def _expected_frames(video: Path) -> int:
    try:
        return count_frames(video)
    except MediaError:
        return 0


def independent(sources: Sequence[Source]) -> dict[str, list[Source]]:
    """Sources that can be prepared at the same time, by name, the longest first.

    Those whose clips could want the same name stay together in their order, since the first of them gets it: a source
    and any that is called as one of its parts, "a" and "a-0001", or as it is when refused, "a.mp4".
    """
    names = {clip_name(source.path) for source in sources}
    together = defaultdict(list)
    for source in sources:
        first = name = clip_name(source.path)
        while (shorter := NAME_ENDING.sub("", name)) != name:
            name = shorter
            first = name if name in names else first
        together[first].append(source)
    return dict(sorted(together.items(), key=lambda item: -sum(source.frames for source in item[1])))
