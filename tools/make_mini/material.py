"""The videos that the small set is made from, and the people held out from all of it.

    python -m tools.make_mini.material

Links the videos of the corpus and of the test clips into two folders of `work_dir`, for datasets_process.py:

    videos/           people to train on and validation people (the recipe is chosen, and training stopped, on these)
    test_videos/      test people, measured once at the end

held_out.py names the validation and the test people. Most of the corpus shows one man, GRID's speaker s1: of him,
clips are held out, as the identities grid_s1_validation and grid_s1_test.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

from musetalk.cli import run_script
from musetalk.data.cache_format import identity_of
from musetalk.files import atomic_write_bytes, read_json
from tools.make_mini.held_out import HELD_OUT

LEFT_OUT = ("grid_unk", "cartoon")  # unknown speakers, who may be others of the corpus; a drawn face without audio
# Prefixes of identities whose material is freely licensed, and of those known to be in sync
FREE = ("grid_", "anitalker_", "gen_")
IN_SYNC = ("grid_", "person_", "gen_")


@dataclass(frozen=True)
class MaterialConfig:
    """Where the videos are, and where they are linked; override on the command line."""

    corpus: Path = Path("../shared/corpus")  # has SOURCES.tsv: file and identity of each video
    clips: Path = Path("../shared/clips")  # more videos, and identities.json
    work_dir: Path = Path("data/mini")


@dataclass(frozen=True)
class Video:
    """A video, its person, and the set it belongs to: "train", "validation" or "test"."""

    path: Path
    identity: str
    split: str

    @property
    def free(self) -> bool:
        """Whether its licence allows any use."""
        return self.identity.startswith(FREE)


def main(config: MaterialConfig) -> None:
    """Links the videos into the two folders and counts them."""
    videos = list(find_videos(config))
    for folder, splits in (("videos", ("train", "validation")), ("test_videos", ("test",))):
        chosen = [video for video in videos if video.split in splits]
        identities = {}
        for video in chosen:
            link = config.work_dir / folder / video.identity / video.path.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(video.path.resolve())
            identities[f"{video.identity}/{video.path.stem}"] = video.identity
        content = json.dumps(identities, indent=1) + "\n"
        atomic_write_bytes(config.work_dir / folder / "identities.json", content.encode())
        print(f"{config.work_dir / folder}: {len(chosen)} videos of {len(set(identities.values()))} identities")


def find_videos(config: MaterialConfig) -> Iterator[Video]:
    """The videos of the corpus and of the clips in the order of their paths, except those left out."""
    with open(config.corpus / "SOURCES.tsv", newline="") as file:
        sources = [(config.corpus / row["file"], row["identity"]) for row in csv.DictReader(file, delimiter="\t")]
    names = read_json(config.clips / "identities.json")
    paths = sorted(config.clips.rglob("*.mp4"))
    sources += [(path, identity_of(Path(path.name), names)) for path in paths]
    for path, identity in sources:
        if identity.startswith(LEFT_OUT):
            continue
        split = split_of(path, identity)
        held_out_clip = identity == "grid_s1" and split != "train"
        yield Video(path, f"{identity}_{split}" if held_out_clip else identity, split)


def split_of(path: Path, identity: str) -> str:
    """The set that a video belongs to."""
    for split, names in HELD_OUT.items():
        if identity in names["identities"] or (identity == "grid_s1" and path.stem in names["grid_s1"]):
            return split
    return "train"


if __name__ == "__main__":
    run_script(main, tyro.cli(MaterialConfig, description=__doc__))
