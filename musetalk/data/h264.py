"""Encodes images as H.264: the conversion to its pixel format, and the encoder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from musetalk.contract import VIDEO_FPS

BT709 = 1  # code of the HD colour matrix in ISO/IEC 23091-2; players guess other matrices for untagged files
X264 = {"crf": "15", "preset": "fast"}
NVENC = {"rc": "vbr", "cq": "15", "b": "0", "preset": "p5"}  # constant quality, without a limit of the bit rate


def add_h264_stream(container: av.container.OutputContainer, height: int, width: int) -> av.VideoStream:
    """Adds an H.264 stream for the `yuv420p_frames` of images of this size, encoded by an NVIDIA GPU if possible."""
    height, width = height + height % 2, width + width % 2
    name, options = ("h264_nvenc", NVENC) if nvenc_opens(height, width) else ("libx264", X264)
    stream = container.add_stream(name, rate=VIDEO_FPS, options=options)
    stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
    codec = stream.codec_context
    codec.colorspace = codec.color_primaries = codec.color_trc = BT709
    return stream


def nvenc_opens(height: int, width: int) -> bool:
    """Whether this machine's NVIDIA GPU encodes frames of this size: PyAV may have the encoder without a GPU."""
    if "h264_nvenc" not in av.codecs_available:
        return False
    codec = av.CodecContext.create("h264_nvenc", "w")
    codec.height, codec.width, codec.pix_fmt = height, width, "yuv420p"
    codec.time_base, codec.options = Fraction(1, VIDEO_FPS), NVENC
    try:
        codec.open()
    except av.FFmpegError:
        return False
    return True


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
