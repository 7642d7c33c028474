"""Video and audio files in and out: 25 frames a second, 16 kHz mono, all through PyAV (no ffmpeg program).

Time 0 is the presentation time of the first picture; audio is shifted to it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path

import av
import numpy as np

from musetalk.contract import AUDIO_SAMPLE_RATE, VIDEO_FPS
from musetalk.script import UserError

BT709 = 1  # code of the HD colour matrix in ISO/IEC 23091-2; untagged files would be guessed differently


class MediaError(UserError):
    """A video or audio file cannot be used. The message names the file and why.

    kind: a word or two that refusals are counted by, such as "no audio".
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def _open(path: str | Path) -> av.container.InputContainer:
    """Open a file for reading. Raises MediaError."""
    try:
        return av.open(str(path))
    except (av.FFmpegError, OSError) as error:
        raise MediaError(
            "unreadable", f"{path}: cannot be read as video or audio ({error.strerror or error})"
        ) from error


def _stream(container: av.container.InputContainer, kind: str, path: str | Path) -> av.stream.Stream:
    """The first stream of a kind ("video", "audio"). Raises MediaError where there is none."""
    stream = next((stream for stream in container.streams if stream.type == kind), None)
    if stream is None:
        raise MediaError(f"no {kind}", f"{path}: has no {kind} track")
    return stream


def _upright(frame: av.VideoFrame) -> np.ndarray:
    """The picture as a person sees it: BGR uint8 (H, W, 3), turned by the file's rotation flag."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="bgr24"), frame.rotation // 90))


def _source_frames(
    container: av.container.InputContainer, stream: av.stream.Stream, path: str | Path
) -> Iterator[av.VideoFrame]:
    """Frames in presentation order; undecodable packets are skipped, as players do."""
    try:
        for packet in container.demux(stream):
            try:
                yield from (frame for frame in packet.decode() if frame.pts is not None)
            except av.InvalidDataError:
                continue
    except (av.FFmpegError, OSError) as error:
        raise MediaError("unreadable", f"{path}: broken video ({error.strerror or error})") from error


def read_frames(path: str | Path, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
    """Frames [start, stop) of a video at 25 a second, each the source frame nearest in time.

    Yields BGR uint8 (H, W, 3), one at a time. Raises MediaError where the file is no readable video.
    """
    with _open(path) as container:
        stream = _stream(container, "video", path)
        stream.thread_type = "AUTO"
        first = next(_source_frames(container, stream, path), None)
        if first is None:
            raise MediaError("no video", f"{path}: no picture in it can be decoded")
        origin, size = first.pts, (first.height, first.width)
        container.seek(origin + int(Fraction(start, VIDEO_FPS) / stream.time_base), stream=stream)
        frames = (f for f in _source_frames(container, stream, path) if (f.height, f.width) == size)

        index = start
        previous, previous_time = None, None
        for frame in frames:
            time = (frame.pts - origin) * stream.time_base
            if previous is not None:
                picture = None  # converted once, however often it is shown
                while Fraction(index, VIDEO_FPS) <= (previous_time + time) / 2:
                    if index == stop:
                        return
                    picture = _upright(previous) if picture is None else picture
                    yield picture
                    index += 1
            previous, previous_time = frame, time
        # The last picture is shown for as long as an average one.
        if previous is not None:
            shown = 1 / Fraction(stream.average_rate or VIDEO_FPS)
            end = max(previous_time + shown, Fraction(1, VIDEO_FPS))
            while index != stop and Fraction(2 * index + 1, 2 * VIDEO_FPS) <= end:
                yield _upright(previous)
                index += 1


def count_frames(path: Path) -> int:
    """How many frames `read_frames` should give, by the file's own word: for progress bars, not for logic."""
    with _open(path) as container:
        stream = _stream(container, "video", path)
        if stream.duration:
            return round(stream.duration * stream.time_base * VIDEO_FPS)
        return round((container.duration or 0) / av.time_base * VIDEO_FPS)


def read_audio(path: str | Path, sample_rate: int = AUDIO_SAMPLE_RATE) -> np.ndarray:
    """The first audio track as mono float32 (N,) in [-1, 1], beginning with the first picture if there is one.

    Raises MediaError where the file has no audio that can be decoded.
    """
    with _open(path) as container:
        audio = _stream(container, "audio", path)
        video = next((s for s in container.streams.video if s.start_time is not None), None)
        origin = video.start_time * video.time_base if video else 0
        resampler = av.AudioResampler(format="flt", layout="mono", rate=sample_rate)
        pieces, begin = [], None
        try:
            for packet in container.demux(audio):
                try:
                    frames = packet.decode()
                except av.InvalidDataError:
                    continue
                for frame in frames:
                    if begin is None and frame.pts is not None:
                        begin = frame.pts * frame.time_base
                    pieces += [piece.to_ndarray()[0] for piece in resampler.resample(frame)]
        except (av.FFmpegError, OSError) as error:
            raise MediaError("unreadable", f"{path}: broken audio ({error.strerror or error})") from error
        pieces += [piece.to_ndarray()[0] for piece in resampler.resample(None)] if pieces else []
    if not pieces:
        raise MediaError("no audio", f"{path}: no audio in it can be decoded")
    samples = np.concatenate(pieces)

    # Shift to the first picture: silence in front where audio starts later, a cut where it starts earlier.
    late = round(((begin or 0) - origin) * sample_rate)
    return np.pad(samples, (late, 0)) if late > 0 else samples[-late:]


def write_video(path: Path, frames: Iterable[np.ndarray], audio: np.ndarray, sample_rate: int) -> int:
    """Write an mp4 (H.264, AAC) at 25 frames a second that appears under its name only when complete.

    frames: BGR uint8 (H, W, 3), all of one size; an odd edge is doubled, since players want even sizes.
    audio: float32 (N,) in [-1, 1], cut or filled with silence to the length of the video.
    Returns the number of frames written. Raises ValueError where there is no frame.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise ValueError(f"{path}: there is no frame to write")
    height, width = first.shape[:2]
    count = 0
    try:
        with av.open(str(partial), "w", options={"movflags": "+faststart"}) as container:
            picture = container.add_stream("libx264", rate=VIDEO_FPS, options={"crf": "15", "preset": "fast"})
            picture.width, picture.height = width + width % 2, height + height % 2
            picture.pix_fmt = "yuv420p"
            codec = picture.codec_context
            codec.colorspace = codec.color_primaries = codec.color_trc = BT709
            sound = container.add_stream("aac", rate=sample_rate, layout="mono")

            def mux_audio(begin: int, end: int) -> None:
                """Samples [begin, end) into the file, interleaved with the pictures."""
                piece = audio[begin:end].astype(np.float32)
                piece = np.pad(piece, (0, end - begin - len(piece)))
                frame = av.AudioFrame.from_ndarray(piece[None], format="fltp", layout="mono")
                frame.sample_rate, frame.pts, frame.time_base = sample_rate, begin, Fraction(1, sample_rate)
                container.mux(sound.encode(frame))

            for image in chain([first], frames):
                image = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
                frame = av.VideoFrame.from_ndarray(image, format="bgr24")
                # By way of 4:4:4, because the direct conversion takes colour from every other line (-5 dB).
                frame = frame.reformat(format="yuv444p", dst_colorspace="ITU709")
                frame = frame.reformat(format="yuv420p", interpolation="AREA")
                frame.pts, frame.time_base = count, Fraction(1, VIDEO_FPS)
                container.mux(picture.encode(frame))
                mux_audio(count * sample_rate // VIDEO_FPS, (count + 1) * sample_rate // VIDEO_FPS)
                count += 1
            container.mux(picture.encode(None))
            container.mux(sound.encode(None))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return count


def batched(items: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` items, the last one shorter."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


def forth_and_back(path: Path, length: int, count: int) -> Iterator[np.ndarray]:
    """`count` frames of a video of `length` frames that runs to its end, back to its start, and so on.

    Memory stays flat: backwards, it is read in pieces of a second.
    """

    def endless() -> Iterator[np.ndarray]:
        while True:
            yield from read_frames(path, 0, length)
            for stop in range(length, 0, -VIDEO_FPS):
                yield from reversed(list(read_frames(path, max(0, stop - VIDEO_FPS), stop)))

    return islice(endless(), count)


def forth_and_back_index(k: int, length: int) -> int:
    """Which frame of the video is the k-th that `forth_and_back` shows."""
    k %= 2 * length
    return k if k < length else 2 * length - 1 - k
