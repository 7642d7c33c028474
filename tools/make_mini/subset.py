"""Links the clips of some people from a cache into a cache of its own, which is then complete and takes no space.

python -m tools.make_mini.subset in_sync --cache data/mini/cache --folder data/mini/in_sync
python -m tools.make_mini.subset free --cache data/mini/cache --folder data/mini/free
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from musetalk.cli import run_script
from musetalk.data.cache import Cache, Clip
from tools.make_mini.held_out import VALIDATION
from tools.make_mini.material import FREE, IN_SYNC

PEOPLE = {"free": FREE, "in_sync": IN_SYNC}  # prefixes of their identities


@dataclass(frozen=True)
class SubsetConfig:
    """Which people, from where to where."""

    people: Annotated[Literal["free", "in_sync"], tyro.conf.Positional]
    cache: Path
    folder: Path


def main(config: SubsetConfig) -> None:
    """Links the clips of the people: "free" with all validation people, "in_sync" without any."""
    count = link_clips(
        Cache(config.cache),
        config.folder,
        lambda clip: (
            config.people == "free" if clip.identity in VALIDATION else clip.identity.startswith(PEOPLE[config.people])
        ),
    )
    print(f"{config.folder}: {count} clips")


def link_clips(cache: Cache, folder: Path, wanted: Callable[[Clip], bool]) -> int:
    """Links the wanted clips into a new folder and returns their number. Their records are copies."""
    (folder / "clips").mkdir(parents=True)
    shutil.copy(cache.folder / "contract.json", folder)
    clips = [clip for clip in cache.clips.values() if wanted(clip)]
    for clip in clips:
        os.link(clip.path, folder / "clips" / clip.path.name)
        shutil.copy(clip.path.with_suffix(".json"), folder / "clips")
    return len(clips)


if __name__ == "__main__":
    run_script(main, tyro.cli(SubsetConfig, description=__doc__))
