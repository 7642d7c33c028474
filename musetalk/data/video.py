"""Reads and writes video and audio files through PyAV: 25 frames per second, 16 kHz mono.

Time 0 is the presentation time of the first video frame; audio is shifted accordingly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition

from musetalk.contract import AUDIO_SAMPLE_RATE, VIDEO_FPS
from musetalk.data.h264 import add_h264_stream, yuv420p_frames
from musetalk.errors import UserError
from musetalk.files import atomic_write

EXACT_SEEK = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")  # formats that seek to a key frame before the given time
AUDIO_GAP = Fraction(1, 20)  # s; a larger gap between audio frames is missing audio, not rounded time stamps
MAX_GAP = 30  # s without a frame; a longer gap is a broken time stamp
MAX_STEP_BACK = 1  # s that a time stamp may lie before the previous one
SAMPLE_RATES = (4000, 768_000)  # Hz; anything else is a broken header
MAX_PIXELS = 1 << 26  # of a frame, twice 8K
FULL_SCALE = np.float32(2**15)  # of 16-bit audio
MAX_LAST_DURATION = Fraction(1)  # s that the last frame is shown at most


class MediaError(UserError):
    """A video or audio file is unusable. The message names the file and the reason.

    kind: category for the report, such as "no audio".
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def file_size(path: str | Path) -> int:
    """Returns the size of a file in bytes. Raises MediaError if it is missing or unreadable, such as a broken link."""
    try:
        return Path(path).stat().st_size
    except OSError as error:
        raise MediaError("unreadable", f"{path}: cannot be read ({error.strerror})") from error


@contextmanager
def _open(path: str | Path) -> Iterator[av.container.InputContainer]:
    """Opens a media file that cannot refer to other files or addresses (playlists). Raises MediaError."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "rb"))
            options = {"protocol_whitelist": "none"}
            container = stack.enter_context(av.open(file, options=options, metadata_errors="replace"))
        except (av.FFmpegError, OSError) as error:
            reason = f"{path}: cannot be read as video or audio ({error.strerror or error})"
            raise MediaError("unreadable", reason) from error
        yield container


def _stream(container: av.container.InputContainer, kind: str, path: str | Path) -> av.stream.Stream:
    """Returns the first stream of a kind ("video", "audio"), skipping cover art. Raises MediaError if there is none."""
    streams = (stream for stream in container.streams if stream.type == kind)
    stream = next((stream for stream in streams if Disposition.attached_pic not in stream.disposition), None)
    if stream is None:
        raise MediaError(f"no {kind}", f"{path}: has no {kind} track")
    return stream


def upright(frame: av.VideoFrame) -> np.ndarray:
    """Converts a frame to BGR uint8 (H, W, 3), rotated by the file's rotation flag."""
    quarters = round(frame.rotation / 90) if abs(frame.rotation) <= 180 else 0  # a larger value is not a rotation
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="bgr24"), quarters))


def _decoded(
    container: av.container.InputContainer, stream: av.stream.Stream, path: str | Path
) -> Iterator[tuple[av.Packet, list[av.frame.Frame]]]:
    """Yields the packets of a stream with their decoded frames, skipping undecodable packets as players do."""
    try:
        for packet in container.demux(stream):
            if packet.is_corrupt:  # truncated; a multi-threaded decoder would also lose the frames before it
                continue
            try:
                frames = packet.decode()
            except av.InvalidDataError:
                continue
            yield packet, frames
    except IndexError:
        return  # raised by PyAV after the last frame of a file in which another stream starts late
    except (av.FFmpegError, OSError) as error:
        raise MediaError("unreadable", f"{path}: corrupted {stream.type} ({error.strerror or error})") from error


def _source_frames(
    container: av.container.InputContainer, stream: av.stream.Stream, path: str | Path
) -> Iterator[av.VideoFrame]:
    """Yields frames in presentation order."""
    avi = container.format.name == "avi"  # stores decoding times but no presentation times
    first_dts = delay = pts = None
    for packet, frames in _decoded(container, stream, path):
        first_dts = packet.dts if first_dts is None else first_dts
        for frame in frames:
            if avi and frame.dts is None:  # flushed at the end
                frame.pts = first_dts if pts is None else pts + 1
            elif avi:
                delay = frame.dts - first_dts if delay is None else delay
                frame.pts = frame.dts - delay
            pts = frame.pts
            if pts is not None:
                yield frame


def _frames_around(
    container: av.container.InputContainer, stream: av.stream.Stream, time: int, path: str | Path
) -> Iterator[av.VideoFrame] | None:
    """Yields frames starting at or before a time of the stream; None if the file's index does not allow it."""
    try:
        container.seek(time, stream=stream)
    except (av.FFmpegError, OSError, OverflowError):
        return None
    frames = _source_frames(container, stream, path)
    first = next(frames, None)
    return None if first is None or first.pts > time else chain([first], frames)


def read_frames(path: str | Path, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
    """Reads frames [start, stop) of a video resampled to 25 per second, each the source frame nearest in time.

    Yields BGR uint8 (H, W, 3), a new array for each frame. Raises MediaError if the file is not a readable video.
    """
    yield from map(upright, resampled_frames(path, start, stop))


def resampled_frames(path: str | Path, start: int = 0, stop: int | None = None) -> Iterator[av.VideoFrame]:
    """The frames of `read_frames` as they are decoded, which take half the memory of BGR. Some may be the same."""
    with _open(path) as container:
        stream = _stream(container, "video", path)
        stream.thread_type = "AUTO"
        frames = _source_frames(container, stream, path)
        first = next(frames, None)
        if first is None:
            raise MediaError("no video", f"{path}: no video frame can be decoded")
        origin, size = first.pts, (first.height, first.width)
        if first.height * first.width > MAX_PIXELS:
            raise MediaError("too large", f"{path}: its frames of {first.width} x {first.height} pixels are too large")
        frames = chain([first], frames)
        if start and container.format.name in EXACT_SEEK:
            time = origin + int(Fraction(start, VIDEO_FPS) / stream.time_base)
            found = _frames_around(container, stream, time, path)
            if found is None:
                yield from islice(resampled_frames(path, 0, stop), start, None)
                return
            frames = found
        frames = (frame for frame in frames if (frame.height, frame.width) == size)

        index = start
        previous, previous_time = None, Fraction(0)
        for frame in frames:
            time = (frame.pts - origin) * stream.time_base
            if previous is not None:
                _require_steady(path, "video", previous_time, time)
                while Fraction(index, VIDEO_FPS) <= (previous_time + time) / 2:
                    if index == stop:
                        return
                    yield previous
                    index += 1
            previous, previous_time = frame, time
        # The last frame is shown for the average frame duration.
        if previous is not None:
            duration = min(1 / Fraction(stream.average_rate or VIDEO_FPS), MAX_LAST_DURATION)
            end = max(previous_time + duration, Fraction(1, VIDEO_FPS))
            while index != stop and Fraction(2 * index + 1, 2 * VIDEO_FPS) <= end:
                yield previous
                index += 1


def _require_steady(path: str | Path, what: str, before: Fraction, after: Fraction) -> None:
    """Raises MediaError where time stamps jump, as in concatenated recordings."""
    if not -MAX_STEP_BACK <= after - before <= MAX_GAP:
        jump = f"its {what} jumps from second {float(before):.1f} to {float(after):.1f}"
        raise MediaError("gap in time", f"{path}: {jump}; re-encode it")


def count_frames(path: Path) -> int:
    """Estimates the number of frames of `read_frames` from the file's header. Only for progress bars."""
    with _open(path) as container:
        stream = _stream(container, "video", path)
        if stream.duration:
            return round(stream.duration * stream.time_base * VIDEO_FPS)
        return round((container.duration or 0) / av.time_base * VIDEO_FPS)


def read_audio(path: str | Path, sample_rate: int = AUDIO_SAMPLE_RATE) -> np.ndarray:
    """Reads the first audio track as mono float32 (N,) in [-1, 1], starting at the first video frame if there is one.

    Audio frames are placed at their time stamps, and gaps are silent. Channels are averaged in 16 bits, as in
    Whisper's loader. Raises MediaError if the file has no decodable audio.
    """
    origin = _first_frame_time(path)
    with _open(path) as container:
        stream = _stream(container, "audio", path)
        runs: list[tuple[Fraction, list[np.ndarray]]] = []  # start and samples of each run of audio without gaps
        resampler, expected, duration = None, None, Fraction(0)
        kind: tuple[str, str, int] | None = None  # sample format, layout and rate of the last frame
        for frame in (frame for _, frames in _decoded(container, stream, path) for frame in frames):
            time = expected or Fraction(0) if frame.pts is None else frame.pts * frame.time_base
            first = time if origin is None else min(origin, time)
            _require_steady(path, "audio", first if expected is None else expected, time)
            if not SAMPLE_RATES[0] <= frame.sample_rate <= SAMPLE_RATES[1]:
                raise MediaError("unreadable", f"{path}: invalid sample rate of {frame.sample_rate} Hz")
            duration += Fraction(frame.samples, frame.sample_rate)
            if runs and time - runs[0][0] > MAX_GAP * (1 + duration):
                raise MediaError("gap in time", f"{path}: its audio consists almost only of gaps; re-encode it")
            last_kind, kind = kind, (frame.format.name, frame.layout.name, frame.sample_rate)
            if expected is None or abs(time - expected) > AUDIO_GAP or kind != last_kind:
                if resampler:
                    runs[-1][1].extend(_samples(resampler, None, path))
                resampler = av.AudioResampler(format="s16", layout="mono", rate=sample_rate)
                runs.append((time, []))
            runs[-1][1].extend(_samples(resampler, frame, path))
            expected = time + Fraction(frame.samples, frame.sample_rate)
        if resampler:
            runs[-1][1].extend(_samples(resampler, None, path))
    if origin is None:
        origin = runs[0][0] if runs else Fraction(0)
    placed_runs = [(round((begin - origin) * sample_rate), blocks) for begin, blocks in runs]
    length = max((offset + sum(map(len, blocks)) for offset, blocks in placed_runs), default=0)
    if length <= 0:
        raise MediaError("no audio", f"{path}: no audio can be decoded")
    audio = np.zeros(length, np.float32)
    for offset, blocks in placed_runs:
        for block in blocks:
            audio[max(0, offset) : max(0, offset + len(block))] = block[max(0, -offset) :] / FULL_SCALE
            offset += len(block)
    return audio


def _first_frame_time(path: str | Path) -> Fraction | None:
    """Returns the time of the first decodable video frame (late in a truncated stream), None if there is none."""
    try:
        with _open(path) as container:
            stream = _stream(container, "video", path)
            frame = next(_source_frames(container, stream, path), None)
            return None if frame is None else frame.pts * stream.time_base
    except MediaError:
        return None


def _samples(resampler: av.AudioResampler, frame: av.AudioFrame | None, path: str | Path) -> list[np.ndarray]:
    """Resamples a frame, or flushes the resampler for None: arrays int16 (n,). Raises MediaError."""
    try:
        return [resampled.to_ndarray()[0] for resampled in resampler.resample(frame)]
    except av.FFmpegError as error:  # such as an unknown channel layout
        raise MediaError("unreadable", f"{path}: its audio cannot be mixed to one channel") from error


def write_video(path: Path, frames: Iterable[np.ndarray], audio: np.ndarray, sample_rate: int) -> int:
    """Writes an mp4 (H.264, AAC) at 25 frames per second, atomically.

    frames: BGR uint8 (H, W, 3), all of one size; odd sizes are padded to even ones.
    audio: float32 (N,) in [-1, 1], truncated or padded with silence to the length of the video.
    Returns the number of frames written. Raises ValueError if there is no frame.
    """
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise ValueError(f"{path}: there are no frames to write")
    count = 0
    with atomic_write(path) as partial:
        with av.open(str(partial), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            video_stream = add_h264_stream(container, *first.shape[:2])
            audio_stream = container.add_stream("aac", rate=sample_rate, layout="mono")

            def mux_audio(begin: int, end: int) -> None:
                """Writes samples [begin, end), interleaved with the video."""
                samples = audio[begin:end].astype(np.float32)
                samples = np.pad(samples, (0, end - begin - len(samples)))
                frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
                frame.sample_rate, frame.pts, frame.time_base = sample_rate, begin, Fraction(1, sample_rate)
                container.mux(audio_stream.encode(frame))

            for frame in yuv420p_frames(chain([first], frames)):
                frame.pts, frame.time_base = count, Fraction(1, VIDEO_FPS)
                container.mux(video_stream.encode(frame))
                mux_audio(count * sample_rate // VIDEO_FPS, (count + 1) * sample_rate // VIDEO_FPS)
                count += 1
            container.mux(video_stream.encode(None))
            container.mux(audio_stream.encode(None))
    return count
