"""Split of one speaker's videos in time: the last ones for validation, those before them for a final table."""

from __future__ import annotations

from typing import NamedTuple

from musetalk.contract import VIDEO_FPS
from musetalk.data.cache import Cache
from musetalk.errors import UserError

LEAST = 3  # videos: to train on, for the table, for validation


class TailSplit(NamedTuple):
    """The names of the clips for each purpose."""

    train: list[str]
    table: list[str]  # used neither in training nor in validation; the first clip of each video
    validation: list[str]
    note: str  # a sentence for the log


def split_tail(cache: Cache, share: float) -> TailSplit:
    """Splits clips by video, in order of name: the last ones with `share` of the usable frames validate a training.

    As many before them, so at least one too, are for a table of base and result; all others are to train on. Clips of
    one video stay together. A video whose first minute is not in the cache is always one to train on, since the
    evaluation needs that minute. Raises UserError if there are fewer than `LEAST` videos.
    """
    videos: dict[str, list[str]] = {}  # source -> names of its clips
    for name in sorted(cache.clips):
        videos.setdefault(cache.clips[name].metadata["source"], []).append(name)
    left = [clips for clips in videos.values() if not cache.clips[clips[0]].metadata.get("start")]
    if len(left) < LEAST:
        raise UserError(
            f"{cache.folder} has {len(left)} videos, but this training needs one to train on, one for validation and "
            f"one for the final table; cut the video into at least {LEAST} files, better one every 10 seconds, and run "
            "datasets_process.py on these"
        )
    frames = {name: int(clip.usable.sum()) for name, clip in cache.clips.items()}
    wanted = share * sum(frames.values())

    def take_last(keep: int) -> list[list[str]]:
        """Moves the last videos out of `left`, one or more, until they have the wanted frames; leaves `keep`."""
        taken = [left.pop()]
        while len(left) > keep and sum(frames[name] for clips in taken for name in clips) < wanted:
            taken.insert(0, left.pop())
        return taken

    validation = [name for clips in take_last(keep=2) for name in clips]
    table = take_last(keep=1)
    held_out = {*validation, *(name for clips in table for name in clips)}
    train = [name for name in sorted(cache.clips) if name not in held_out]
    first_clips = [clips[0] for clips in table]
    minutes = {
        kind: sum(frames[name] for name in names) / VIDEO_FPS / 60
        for kind, names in {"train": train, "validation": validation}.items()
    }
    note = (
        f"one speaker: trained on {minutes['train']:.1f} minutes, stopped by {minutes['validation']:.1f} minutes "
        f"({', '.join(validation)}), and kept for the final table: {', '.join(first_clips)}"
    )
    return TailSplit(train, first_clips, validation, note)
