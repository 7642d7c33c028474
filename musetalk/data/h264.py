"""Encodes images as H.264: the conversion to its pixel format, and the encoder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from musetalk.contract import VIDEO_FPS

BT709 = 1  # code of the HD colour matrix in ISO/IEC 23091-2; players guess other matrices for untagged files
X264 = {"crf": "15", "preset": "fast"}


def add_h264_stream(container: av.container.OutputContainer, height: int, width: int) -> av.VideoStream:
    """Adds an H.264 stream for the `yuv420p_frames` of images of this size."""
    stream = container.add_stream("libx264", rate=VIDEO_FPS, options=X264)
    stream.height, stream.width, stream.pix_fmt = height + height % 2, width + width % 2, "yuv420p"
    codec = stream.codec_context
    codec.colorspace = codec.color_primaries = codec.color_trc = BT709
    return stream


def yuv420p_frames(images: Iterable[np.ndarray]) -> Iterator[av.VideoFrame]:
    """Converts images, BGR uint8 (H, W, 3) of one size, to YUV 4:2:0 and BT.709.

    Odd sizes are padded to even ones, which H.264 players require.
    Via 4:4:4: the direct conversion takes chroma from every other line (-5 dB PSNR).
    """
    to_444, to_420 = VideoReformatter(), VideoReformatter()  # one for all frames: a new one costs more than a frame
    for image in images:
        height, width = image.shape[:2]
        if height % 2 or width % 2:
            image = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        bgr = av.VideoFrame.from_numpy_buffer(np.ascontiguousarray(image), format="bgr24")
        yuv444 = to_444.reformat(bgr, format="yuv444p", dst_colorspace="ITU709")
        yield to_420.reformat(yuv444, format="yuv420p", interpolation="AREA")
