"""Playing a video forwards and backwards: the order of its frames, and how many are decoded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from test_video import number, numbered

from musetalk.data import ping_pong as ping_pong_module
from musetalk.data import video
from musetalk.data.ping_pong import ping_pong, ping_pong_index

LENGTH, KEYFRAME_EVERY = 60, 12


@pytest.fixture(scope="module")
def counted(tmp_path_factory, write_source) -> Path:
    """A video of numbered pictures at 25 per second."""
    pictures = [numbered(k) for k in range(LENGTH)]
    return write_source(tmp_path_factory.mktemp("counted") / "counted.mp4", pictures, keyframe_every=KEYFRAME_EVERY)


@pytest.fixture
def play(counted, monkeypatch) -> Callable:
    """A function: length, count, frames of a block -> the numbers that are shown, and how many frames are decoded."""
    frame_bytes = ping_pong_module._bytes(next(video.resampled_frames(counted)))
    source_frames, decoded = video._source_frames, []

    def record(*args):
        for frame in source_frames(*args):
            decoded.append(frame)
            yield frame

    monkeypatch.setattr(video, "_source_frames", record)

    def run(length: int, count: int, block: int) -> tuple[list[int], int]:
        monkeypatch.setattr(ping_pong_module, "BLOCK_BYTES", block * frame_bytes)
        decoded.clear()
        return [number(picture) for picture in ping_pong(counted, length, count)], len(decoded)

    return run


def test_the_index_goes_forwards_and_backwards():
    assert [ping_pong_index(k, 3) for k in range(8)] == [0, 1, 2, 2, 1, 0, 0, 1]


@pytest.mark.parametrize("block", [1, 7, 25, 100])
@pytest.mark.parametrize(("length", "count"), [(60, 200), (26, 60), (60, 31), (1, 3)])
def test_frames_are_those_of_the_index(play, length, count, block):
    shown, _ = play(length, count, block)
    assert shown == [ping_pong_index(k, length) for k in range(count)]


def test_a_video_of_one_block_is_decoded_once(play):
    for count in (LENGTH, 2 * LENGTH, 20 * LENGTH):
        _, decoded = play(LENGTH, count, LENGTH)
        assert decoded <= LENGTH + 2  # opened once more to see how large a frame is


def test_a_longer_video_is_decoded_at_most_once_a_turn_and_to_the_next_key_frame_once_a_block(play):
    block, turns = 20, 6
    _, decoded = play(LENGTH, turns * LENGTH, block)
    blocks = turns * (LENGTH // block - 1)  # decoded again: all but those at the turns
    assert decoded <= blocks * (block + KEYFRAME_EVERY) + block + 2
    assert decoded < turns * LENGTH


def test_arrays_are_new_even_if_a_frame_is_shown_again(play, counted):
    frames = ping_pong(counted, 2, 8)
    for frame in frames:
        assert frame.max() > 100  # not one that was cleared below
        frame[:] = 0
