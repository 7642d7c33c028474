"""Video and audio files in and out: 25 frames a second, 16 kHz mono, all through PyAV (no ffmpeg program).

Time 0 is the presentation time of the first picture; audio is shifted to it.
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
from musetalk.errors import UserError
from musetalk.files import atomic_write

EXACT_SEEK = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")  # formats that seek to a key frame before the time asked for
LOST_SOUND = Fraction(1, 20)  # s, a gap between pieces of sound that is no rounding of their times
LONGEST_GAP = 30  # s without a picture or a sound; a longer one is a broken time stamp, and would fill the memory
LONGEST_RETURN = 1  # s that a time stamp may lie before the last one
SAMPLE_RATES = (4000, 768_000)  # Hz; any other is a broken header, and could make hours of sound of a small file
MOST_PIXELS = 1 << 26  # of a picture, twice what 8K has; several of more would fill the memory
FULL_SCALE = np.float32(2**15)  # of 16-bit sound
LONGEST_SHOWN = 1  # s that the last picture can stay
BT709 = 1  # code of the HD colour matrix in ISO/IEC 23091-2; untagged files would be guessed differently


class MediaError(UserError):
    """A video or audio file cannot be used. The message names the file and why.

    kind: a word or two that refusals are counted by, such as "no audio".
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def file_size(path: str | Path) -> int:
    """Bytes of a file. Raises MediaError for what is none, such as a link to nothing, or a pipe, which never ends."""
    if not Path(path).is_file():
        raise MediaError("unreadable", f"{path}: is no file that can be read")
    return Path(path).stat().st_size


@contextmanager
def _open(path: str | Path) -> Iterator[av.container.InputContainer]:
    """Open a file for reading; nothing in it, nor in its name, can make another file be opened. Raises MediaError."""
    file_size(path)
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "rb"))
            options = {"protocol_whitelist": "none"}
            container = stack.enter_context(av.open(file, options=options, metadata_errors="replace"))
        except (av.FFmpegError, OSError) as error:
            raise MediaError(
                "unreadable", f"{path}: cannot be read as video or audio ({error.strerror or error})"
            ) from error
        yield container


def _stream(container: av.container.InputContainer, kind: str, path: str | Path) -> av.stream.Stream:
    """The first stream of a kind ("video", "audio") that is no cover picture. Raises MediaError where there is none."""
    streams = (stream for stream in container.streams if stream.type == kind)
    stream = next((stream for stream in streams if Disposition.attached_pic not in stream.disposition), None)
    if stream is None:
        raise MediaError(f"no {kind}", f"{path}: has no {kind} track")
    return stream


def _upright(frame: av.VideoFrame) -> np.ndarray:
    """The picture as a person sees it: BGR uint8 (H, W, 3), turned by the file's rotation flag."""
    quarters = round(frame.rotation / 90) if abs(frame.rotation) <= 180 else 0  # beyond it the flag is no rotation
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="bgr24"), quarters))


def _decoded(
    container: av.container.InputContainer, stream: av.stream.Stream, path: str | Path
) -> Iterator[tuple[av.Packet, list[av.frame.Frame]]]:
    """Packets of a stream, each with what comes out of it; undecodable ones are skipped, as players do."""
    try:
        for packet in container.demux(stream):
            if packet.is_corrupt:  # cut off; a decoder of several threads would lose the frames before it too
                continue
            try:
                frames = packet.decode()
            except av.InvalidDataError:
                continue
            yield packet, frames
    except IndexError:
        return  # PyAV's own, after the last frame of a file in which another stream began late
    except (av.FFmpegError, OSError) as error:
        raise MediaError("unreadable", f"{path}: broken {stream.type} ({error.strerror or error})") from error


def _source_frames(
    container: av.container.InputContainer, stream: av.stream.Stream, path: str | Path
) -> Iterator[av.VideoFrame]:
    """Frames in presentation order."""
    avi = container.format.name == "avi"  # knows when its pictures are decoded, but not when they are shown
    begin = delay = shown = None
    for packet, frames in _decoded(container, stream, path):
        begin = packet.dts if begin is None else begin
        for frame in frames:
            if avi and frame.dts is None:  # one of the last
                frame.pts = begin if shown is None else shown + 1
            elif avi:
                delay = frame.dts - begin if delay is None else delay
                frame.pts = frame.dts - delay
            shown = frame.pts
            if shown is not None:
                yield frame


def _frames_around(
    container: av.container.InputContainer, stream: av.stream.Stream, time: int, path: str | Path
) -> Iterator[av.VideoFrame] | None:
    """Frames from one at or before a time of the stream on; None where the file's index does not lead to one."""
    try:
        container.seek(time, stream=stream)
    except (av.FFmpegError, OSError, OverflowError):
        return None
    frames = _source_frames(container, stream, path)
    first = next(frames, None)
    return None if first is None or first.pts > time else chain([first], frames)


def read_frames(path: str | Path, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
    """Frames [start, stop) of a video at 25 a second, each the source frame nearest in time.

    Yields BGR uint8 (H, W, 3), one at a time. Raises MediaError where the file is no readable video.
    """
    with _open(path) as container:
        stream = _stream(container, "video", path)
        stream.thread_type = "AUTO"
        frames = _source_frames(container, stream, path)
        first = next(frames, None)
        if first is None:
            raise MediaError("no video", f"{path}: no picture in it can be decoded")
        origin, size = first.pts, (first.height, first.width)
        if first.height * first.width > MOST_PIXELS:
            raise MediaError(
                "too large", f"{path}: its pictures of {first.width} x {first.height} pixels are too large"
            )
        frames = chain([first], frames)
        if start and container.format.name in EXACT_SEEK:
            time = origin + int(Fraction(start, VIDEO_FPS) / stream.time_base)
            frames = _frames_around(container, stream, time, path)
            if frames is None:
                yield from islice(read_frames(path, 0, stop), start, None)
                return
        frames = (frame for frame in frames if (frame.height, frame.width) == size)

        index = start
        previous, previous_time = None, None
        for frame in frames:
            time = (frame.pts - origin) * stream.time_base
            if previous is not None:
                _require_steady(path, "picture", previous_time, time)
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
            shown = min(1 / Fraction(stream.average_rate or VIDEO_FPS), LONGEST_SHOWN)
            end = max(previous_time + shown, Fraction(1, VIDEO_FPS))
            while index != stop and Fraction(2 * index + 1, 2 * VIDEO_FPS) <= end:
                yield _upright(previous)
                index += 1


def _require_steady(path: str | Path, what: str, before: Fraction, after: Fraction) -> None:
    """Raises MediaError where time makes a leap that cannot be meant, as where two recordings were put together."""
    if not -LONGEST_RETURN <= after - before <= LONGEST_GAP:
        leap = f"after second {float(before):.1f} its {what} goes on at {float(after):.1f}"
        raise MediaError("gap in time", f"{path}: {leap}; encode it anew")


def count_frames(path: Path) -> int:
    """How many frames `read_frames` should give, by the file's own word: for progress bars, not for logic."""
    with _open(path) as container:
        stream = _stream(container, "video", path)
        if stream.duration:
            return round(stream.duration * stream.time_base * VIDEO_FPS)
        return round((container.duration or 0) / av.time_base * VIDEO_FPS)


def read_audio(path: str | Path, sample_rate: int = AUDIO_SAMPLE_RATE) -> np.ndarray:
    """The first audio track as mono float32 (N,) in [-1, 1], beginning with the first picture if there is one.

    Every piece stands at its time; what is missing between pieces is silence. Channels are averaged in 16 bits, as
    Whisper's own loader does. Raises MediaError where the file has no audio that can be decoded.
    """
    origin = _first_picture_time(path)
    with _open(path) as container:
        audio = _stream(container, "audio", path)
        runs: list[tuple[Fraction, list[np.ndarray]]] = []  # when a run of sound without gaps begins, its samples
        resampler, expected, kind, heard = None, None, None, Fraction(0)
        for frame in (frame for _, frames in _decoded(container, audio, path) for frame in frames):
            time = expected or Fraction(0) if frame.pts is None else frame.pts * frame.time_base
            first = time if origin is None else min(origin, time)
            _require_steady(path, "sound", first if expected is None else expected, time)
            if not SAMPLE_RATES[0] <= frame.sample_rate <= SAMPLE_RATES[1]:
                raise MediaError("unreadable", f"{path}: says that its sound has {frame.sample_rate} samples a second")
            heard += Fraction(frame.samples, frame.sample_rate)
            if runs and time - runs[0][0] > LONGEST_GAP * (1 + heard):
                raise MediaError("gap in time", f"{path}: has hardly any sound in a long time; encode it anew")
            last_kind, kind = kind, (frame.format.name, frame.layout.name, frame.sample_rate)
            if expected is None or abs(time - expected) > LOST_SOUND or kind != last_kind:
                if resampler:
                    runs[-1][1].extend(_samples(resampler, None, path))
                resampler = av.AudioResampler(format="s16", layout="mono", rate=sample_rate)
                runs.append((time, []))
            runs[-1][1].extend(_samples(resampler, frame, path))
            expected = time + Fraction(frame.samples, frame.sample_rate)
        if resampler:
            runs[-1][1].extend(_samples(resampler, None, path))
    origin = runs[0][0] if runs and origin is None else origin
    prepare_model = [(round((begin - origin) * sample_rate), parts) for begin, parts in runs]
    length = max((at + sum(map(len, parts)) for at, parts in prepare_model), default=0)
    if length <= 0:
        raise MediaError("no audio", f"{path}: no audio in it can be decoded")
    result = np.zeros(length, np.float32)
    for at, parts in prepare_model:
        for part in parts:
            result[max(0, at) : max(0, at + len(part))] = part[max(0, -at) :] / FULL_SCALE
            at += len(part)
    return result


def _first_picture_time(path: str | Path) -> Fraction | None:
    """When the first picture that can be decoded is shown, which is late in a stream cut anywhere; None for none."""
    try:
        with _open(path) as container:
            stream = _stream(container, "video", path)
            frame = next(_source_frames(container, stream, path), None)
            return None if frame is None else frame.pts * stream.time_base
    except MediaError:
        return None


def _samples(resampler: av.AudioResampler, frame: av.AudioFrame | None, path: str | Path) -> list[np.ndarray]:
    """What comes out of the resampler for a frame, or what is left in it for None: int16 (n,). Raises MediaError."""
    try:
        return [piece.to_ndarray()[0] for piece in resampler.resample(frame)]
    except av.FFmpegError as error:  # more channels than have places, for one
        raise MediaError("unreadable", f"{path}: its sound cannot be mixed to one channel") from error


def write_video(path: Path, frames: Iterable[np.ndarray], audio: np.ndarray, sample_rate: int) -> int:
    """Write an mp4 (H.264, AAC) at 25 frames a second that appears under its name only when complete.

    frames: BGR uint8 (H, W, 3), all of one size; an odd edge is doubled, since players want even sizes.
    audio: float32 (N,) in [-1, 1], cut or filled with silence to the length of the video.
    Returns the number of frames written. Raises ValueError where there is no frame.
    """
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise ValueError(f"{path}: there is no frame to write")
    height, width = first.shape[:2]
    count = 0
    with atomic_write(path) as partial:
        with av.open(str(partial), "w", format="mp4", options={"movflags": "+faststart"}) as container:
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
    return count


def ping_pong(path: Path, length: int, count: int) -> Iterator[np.ndarray]:
    """`count` frames of a video of `length` frames that runs to its end, back to its start, and so on.

    Memory stays flat: backwards, it is read in pieces of a second.
    """

    def endless() -> Iterator[np.ndarray]:
        while True:
            yield from read_frames(path, 0, length)
            for stop in range(length, 0, -VIDEO_FPS):
                yield from reversed(list(read_frames(path, max(0, stop - VIDEO_FPS), stop)))

    return islice(endless(), count)


def ping_pong_index(k: int, length: int) -> int:
    """Which frame of the video is the k-th that `ping_pong` shows."""
    k %= 2 * length
    return k if k < length else 2 * length - 1 - k
