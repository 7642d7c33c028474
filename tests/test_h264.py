"""The H.264 encoder is NVIDIA's where it opens, and the conversion to its pixel format is correct for any size."""

from __future__ import annotations

from types import SimpleNamespace

import av
import numpy as np
import pytest

from musetalk.data import h264

CPU_AND_GPU = {"libx264", "h264_nvenc"}


def refused() -> None:
    raise av.error.PermissionError(1, "Operation not permitted", "avcodec_open2")  # without a GPU


@pytest.mark.parametrize(
    ("codecs", "open_codec", "expected"),
    [
        ({"libx264"}, lambda: pytest.fail("opens a missing encoder"), ("libx264", h264.X264)),
        (CPU_AND_GPU, refused, ("libx264", h264.X264)),
        (CPU_AND_GPU, lambda: None, ("h264_nvenc", h264.NVENC)),
    ],
    ids=["missing", "no GPU", "GPU"],
)
def test_nvenc_is_used_where_it_opens(codecs, open_codec, expected, monkeypatch):
    tried, added = SimpleNamespace(open=open_codec), []

    def add_stream(name, rate, options):
        added.append((name, options))
        return SimpleNamespace(codec_context=SimpleNamespace())

    lookup = SimpleNamespace(create=lambda *_: tried)
    fake = SimpleNamespace(codecs_available=codecs, CodecContext=lookup, FFmpegError=av.FFmpegError)
    monkeypatch.setattr(h264, "av", fake)
    stream = h264.add_h264_stream(SimpleNamespace(add_stream=add_stream), 95, 128)
    assert added == [expected] and (stream.height, stream.width) == (96, 128)
    if codecs == CPU_AND_GPU:
        assert (tried.height, tried.width, tried.options) == (96, 128, h264.NVENC)


def test_frames_are_converted_one_by_one_and_independently():
    """The converters are shared by all frames."""
    images = [np.full((5, 7, 3), level, np.uint8) for level in (0, 128, 255)]
    frames = list(h264.yuv420p_frames(iter(images)))
    assert {(frame.height, frame.width, frame.format.name) for frame in frames} == {(6, 8, "yuv420p")}
    luma = [frame.to_ndarray()[:6] for frame in frames]
    for plane, level in zip(luma, (16, 126, 235), strict=True):  # of BT.709 in limited range
        assert np.abs(plane.astype(int) - level).max() <= 1
