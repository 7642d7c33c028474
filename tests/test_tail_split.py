"""The split of one speaker's videos in time."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from musetalk.data.tail_split import split_tail
from musetalk.errors import UserError


def cache_of(videos: dict[str, list[int]], first_minute: bool = True) -> SimpleNamespace:
    """A stand-in for a cache. videos: usable frames of the clips of each video, `<video>_<part>`."""
    clips = {
        f"{video}_{part}": SimpleNamespace(
            metadata={"source": f"{video}.mp4", "start": 1500 * (part + (not first_minute))},
            usable=np.ones(count, bool),
        )
        for video, parts in reversed(videos.items())
        for part, count in enumerate(parts)
    }
    return SimpleNamespace(clips=clips, folder="data/me")


def test_the_last_tenth_stops_a_training_and_the_tenth_before_it_is_kept():
    split = split_tail(cache_of({f"{video:02d}": [100] for video in range(20)}), 0.1)
    assert split.validation == ["18_0", "19_0"] and split.table == ["16_0", "17_0"]
    assert split.train == [f"{video:02d}_0" for video in range(16)]
    assert "trained on 1.1 minutes, stopped by 0.1 minutes (18_0, 19_0)" in split.note and "16_0, 17_0" in split.note


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_every_part_has_a_video(share):
    """The table is for the evaluation, which looks at the first clip of a video."""
    split = split_tail(cache_of({"a": [50, 50], "b": [1500, 20], "c": [1500, 1500]}), share)
    assert split[:3] == (["a_0", "a_1"], ["b_0"], ["c_0", "c_1"])


def test_minutes_count_and_not_videos():
    split = split_tail(cache_of({"a": [800], "b": [10], "c": [100], "d": [10], "e": [100]}), 0.1)
    assert split[:3] == (["a_0"], ["b_0", "c_0"], ["d_0", "e_0"])


@pytest.mark.parametrize(
    "cache", [cache_of({"a": [1500] * 5, "b": [9]}), cache_of({x: [9] for x in "abcd"}, first_minute=False)]
)
def test_too_few_videos_are_refused_with_what_to_do(cache):
    with pytest.raises(UserError, match=r"^data/me has \d videos, .* cut the video into at least 3 files.*run data"):
        split_tail(cache, 0.1)
