"""Reading and writing video: frames by time, audio on the clock of the video, refused files."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from musetalk.contract import AUDIO_SAMPLE_RATE, SAMPLES_PER_FRAME, VIDEO_FPS
from musetalk.data.video import (
    MediaError,
    count_frames,
    read_audio,
    read_frames,
    write_video,
)
from musetalk.images import batched

BITS, BLOCK = 12, 8  # bits of the number encoded in a picture; pixels per bit
NTSC, FILM = Fraction(30_000, 1001), Fraction(24)


def numbered(k: int) -> np.ndarray:
    """A picture (32, 128, 3) that encodes k in black and white blocks."""
    bits = [0, *((k >> b) & 1 for b in range(BITS)), 1, 0, 1]
    row = np.repeat(np.array(bits, np.uint8) * 200 + 20, BLOCK)
    return np.repeat(np.tile(row, (32, 1))[..., None], 3, axis=2)


def number(picture: np.ndarray) -> int:
    """The number that `numbered` encoded."""
    blocks = picture.reshape(len(picture), -1, BLOCK, 3).mean(axis=(0, 2, 3))[1 : 1 + BITS]
    return sum(int(level > 120) << b for b, level in enumerate(blocks))


def numbers(*args) -> list[int]:
    return [number(picture) for picture in read_frames(*args)]


def smooth(k: int, height: int = 96, width: int = 128) -> np.ndarray:
    """A picture of smooth colours that change with k."""
    y, x = np.mgrid[:height, :width]
    channels = [np.sin(x / 31 + k / 9), np.cos(y / 27 - k / 7), np.sin((x + y) / 43 + k / 11)]
    return np.round(127.5 + 90 * np.stack(channels, axis=-1)).astype(np.uint8)


def psnr(x: np.ndarray, y: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.mean((x.astype(float) - y) ** 2))


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(x, y)[0, 1])


@pytest.fixture(scope="module")
def counted(tmp_path_factory, write_source) -> Path:
    """A video of 60 numbered pictures at 25 per second with a key frame every 12."""
    return write_source(tmp_path_factory.mktemp("counted") / "counted.mp4", [numbered(k) for k in range(60)])


# Writing.


def test_a_written_video_reads_back_as_the_same_pictures_and_sound(tmp_path, voice):
    pictures, sound = [smooth(k) for k in range(30)], voice(1.2)
    path = tmp_path / "new" / "out.mp4"
    assert write_video(path, iter(pictures), sound, AUDIO_SAMPLE_RATE) == 30
    frames = list(read_frames(path))
    assert len(frames) == count_frames(path) == 30
    assert min(psnr(*pair) for pair in zip(frames, pictures, strict=True)) >= 40
    audio = read_audio(path)
    assert audio.dtype == np.float32 and abs(len(audio) - len(sound)) <= 1024  # the last block of AAC
    assert correlation(audio[: len(sound)], sound[: len(audio)]) > 0.99
    assert [p.name for p in path.parent.iterdir()] == ["out.mp4"]


def test_the_edges_of_an_odd_size_are_doubled(tmp_path):
    picture = smooth(0, 95, 127)
    write_video(tmp_path / "odd.mp4", [picture] * 3, np.zeros(9, np.float32), AUDIO_SAMPLE_RATE)
    for frame in read_frames(tmp_path / "odd.mp4"):
        assert frame.shape == (96, 128, 3) and psnr(frame[:95, :127], picture) > 36
        assert np.abs(frame[94].astype(int) - frame[95]).mean() < 4


def test_saturated_colours_are_kept(tmp_path):
    """A wrong colour matrix shifts saturated colours by ten levels and more."""
    colours = [(0, 0, 255), (0, 255, 0), (255, 0, 0), (0, 200, 255), (128, 128, 128)]
    picture = np.concatenate([np.full((64, 32, 3), colour, np.uint8) for colour in colours], axis=1)
    write_video(tmp_path / "colours.mp4", [picture] * 2, np.zeros(9, np.float32), AUDIO_SAMPLE_RATE)
    frame = next(read_frames(tmp_path / "colours.mp4"))
    for index, colour in enumerate(colours):
        np.testing.assert_allclose(frame[16:48, 32 * index + 8 : 32 * index + 24].mean(axis=(0, 1)), colour, atol=5)


@pytest.mark.parametrize("seconds", [0.3, 3.0])
def test_sound_is_cut_or_filled_with_silence_to_the_length_of_the_video(tmp_path, voice, seconds):
    write_video(tmp_path / "out.mp4", [smooth(0)] * 25, voice(seconds), AUDIO_SAMPLE_RATE)
    audio = read_audio(tmp_path / "out.mp4")
    assert abs(len(audio) - 25 * SAMPLES_PER_FRAME) <= 1024
    if seconds < 1:
        assert np.abs(audio[round(0.4 * AUDIO_SAMPLE_RATE) :]).max() < 0.01
        assert np.abs(audio[: round(0.3 * AUDIO_SAMPLE_RATE)]).max() > 0.05


def test_audio_at_a_rate_that_is_no_multiple_of_the_frame_rate_is_kept(tmp_path):
    rate = 22_050
    time = np.arange(2 * rate) / rate
    tone = (0.3 * np.sin(2 * np.pi * (300 + 200 * time) * time)).astype(np.float32)
    write_video(tmp_path / "out.mp4", [smooth(0)] * 50, tone, rate)
    audio = read_audio(tmp_path / "out.mp4", rate)
    assert correlation(audio[: len(tone)], tone[: len(audio)]) > 0.99


def test_no_frames_are_refused_and_leave_no_file(tmp_path):
    with pytest.raises(ValueError, match="no frame"):
        write_video(tmp_path / "none.mp4", [], np.zeros(9, np.float32), AUDIO_SAMPLE_RATE)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_earlier_file(tmp_path):
    def failing():
        yield smooth(0)
        raise RuntimeError("lost")

    (tmp_path / "out.mp4").write_bytes(b"earlier")
    with pytest.raises(RuntimeError, match="lost"):
        write_video(tmp_path / "out.mp4", failing(), np.zeros(9, np.float32), AUDIO_SAMPLE_RATE)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("out.mp4", b"earlier")]


# Resampling to 25 frames per second.


@pytest.mark.parametrize(("rate", "seconds"), [(FILM, 4), (NTSC, 20), (Fraction(60), 4)], ids=str)
def test_each_frame_is_the_source_frame_nearest_in_time(tmp_path, write_source, rate, seconds):
    """Within 20 s, 30000 / 1001 frames per second fall behind 30 by more than half a frame."""
    count = int(seconds * rate)
    path = write_source(tmp_path / "source.mp4", [numbered(k) for k in range(count)], rate=rate, keyframe_every=100)
    shown = np.array(numbers(path))
    assert abs(len(shown) - count * VIDEO_FPS / rate) <= 0.5
    times = np.arange(len(shown)) / VIDEO_FPS
    distance = np.abs(shown / float(rate) - times)
    at_end = times > (count - 1) / rate  # after the last source frame
    assert distance[~at_end].max() <= 0.5 / rate + 1e-9
    assert (shown[at_end] == count - 1).all() and at_end.sum() <= 1


def test_each_frame_is_the_nearest_at_a_variable_rate(tmp_path, write_source):
    gaps = np.random.default_rng(0).choice([1, 2, 3, 4, 10], 100)  # hundredths of a second
    times = [Fraction(int(t), 100) for t in np.cumsum([0, *gaps])]
    path = write_source(tmp_path / "source.mp4", [numbered(k) for k in range(len(times))], times)
    shown = numbers(path)
    distances = np.abs(np.array(times, float)[None] - np.arange(len(shown))[:, None] / VIDEO_FPS)
    np.testing.assert_allclose(distances[np.arange(len(shown)), shown], distances.min(axis=1), atol=1e-4)
    assert len(shown) / VIDEO_FPS >= times[-1] - Fraction(1, VIDEO_FPS)


SLICES = [(0, 5), (11, 14), (13, 26), (40, None), (7, 7), (59, None), (60, None), (500, None)]


@pytest.mark.parametrize("rate", [FILM, NTSC, Fraction(60)], ids=str)
def test_a_slice_equals_that_part_of_the_whole(tmp_path, write_source, rate):
    path = write_source(tmp_path / "source.mp4", [numbered(k) for k in range(int(2.4 * rate))], rate=rate)
    whole = numbers(path)
    for start, stop in SLICES:
        assert numbers(path, start, stop) == whole[start:stop], (start, stop)


@pytest.mark.parametrize(
    ("suffix", "codec"), [("mkv", "libx264"), ("avi", "mpeg4"), ("webm", "libvpx-vp9"), ("mpg", "mpeg2video")]
)
def test_slices_of_other_containers_are_exact(tmp_path, write_source, suffix, codec):
    """Some seek by decoding time, or only roughly."""
    path = write_source(tmp_path / f"source.{suffix}", [numbered(k) for k in range(60)], codec=codec)
    assert numbers(path) == list(range(60))
    for start, stop in SLICES:
        assert numbers(path, start, stop) == list(range(60))[start:stop], (start, stop)


def test_a_video_with_a_late_first_picture_starts_with_it(tmp_path, write_source):
    times = [Fraction(k, 25) + Fraction(3, 10) for k in range(30)]
    path = write_source(tmp_path / "late.mkv", [numbered(k) for k in range(30)], times)
    assert numbers(path) == list(range(30))
    assert numbers(path, 20, 23) == [20, 21, 22]


def test_a_single_picture_is_one_frame(tmp_path, write_source):
    assert numbers(write_source(tmp_path / "one.mp4", [numbered(9)])) == [9]


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_frames_are_rotated_by_the_flag_of_the_file(tmp_path, write_source, quarters):
    """quarters: clockwise quarter turns, as a matrix of ISO/IEC 14496-12 8.3.2."""
    picture = smooth(0, 64, 96)
    picture[:16, :16] = 255
    path = write_source(tmp_path / "source.mp4", [picture] * 3)
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 44
    one = 1 << 16
    a, b, c, d = [(0, one, -one, 0), (-one, 0, 0, -one), (0, -one, one, 0)][quarters - 1]
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    frame = next(read_frames(path))
    upright = np.rot90(picture, -quarters)
    assert frame.shape == upright.shape and psnr(frame, upright) > 25


def test_pictures_of_another_size_are_left_out(tmp_path):
    """Some recordings change their size; crops have one."""
    path = tmp_path / "sizes.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for k in range(20):
            size = (48, 64) if k < 10 or k >= 15 else (24, 32)
            jpeg = cv2.imencode(".jpg", np.full((*size, 3), 10 * k, np.uint8))[1].tobytes()
            packet = av.Packet(jpeg)
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, k, k, Fraction(1, 25)
            container.mux(packet)
    frames = list(read_frames(path))
    assert len(frames) == 20 and {frame.shape for frame in frames} == {(48, 64, 3)}


# Audio.


def test_audio_that_starts_after_the_video_is_padded(tmp_path, write_source, voice):
    sound, start = voice(1.0), Fraction(1, 7)
    first = round(start * AUDIO_SAMPLE_RATE)
    path = write_source(tmp_path / "late.mkv", [numbered(k) for k in range(50)], audio=sound, audio_start=start)
    audio = read_audio(path)
    assert np.abs(audio[: first - 2000]).max(initial=0) < 0.01
    shifted = {k: audio[first + k : first + k + 12_000] for k in range(-1200, 1201, 16)}
    best = max(shifted, key=lambda k: correlation(shifted[k], sound[:12_000]))
    assert abs(best) <= 32  # 2 ms
    assert correlation(shifted[best], sound[:12_000]) > 0.95


def test_audio_before_the_first_picture_is_cut(tmp_path, write_source, voice):
    sound = voice(2.0)
    times = [Fraction(k, 25) + Fraction(1, 2) for k in range(25)]
    path = write_source(tmp_path / "early.mkv", [numbered(k) for k in range(25)], times, audio=sound)
    audio = read_audio(path)
    assert abs(len(audio) - 24_000) <= 2048
    shifts = {k: correlation(audio[1200:20_000], sound[9200 + k : 28_000 + k]) for k in range(-640, 641, 16)}
    assert abs(max(shifts, key=shifts.get)) <= 32


def test_audio_after_a_gap_in_the_time_stamps_is_placed_by_its_time(tmp_path):
    rate = AUDIO_SAMPLE_RATE
    with av.open(str(tmp_path / "gap.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=rate, layout="mono")
        for level, begin in ((3000, 0), (30_000, 3 * rate)):
            frame = av.AudioFrame.from_ndarray(np.full((1, rate), level, np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = rate, begin, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    audio = read_audio(tmp_path / "gap.mkv")
    assert abs(len(audio) - 4 * rate) <= 32
    assert abs(int(np.argmax(audio > 0.5)) - 3 * rate) <= 32
    assert np.abs(audio[rate + 100 : 3 * rate - 100]).max() == 0


def write_stereo(path: Path, left: np.ndarray, right: np.ndarray, rate: int) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=rate, layout="stereo")
        both = (32767 * np.stack([left, right], axis=1)).astype(np.int16).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(both, format="s16", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def test_stereo_is_resampled_and_averaged_to_mono(tmp_path):
    rate, seconds = 44_100, 1.5
    time = np.arange(round(rate * seconds)) / rate
    left, right = np.sin(2 * np.pi * 300 * time), np.sin(2 * np.pi * 710 * time)
    audio = read_audio(write_stereo(tmp_path / "stereo.wav", 0.25 * left, 0.25 * right, rate))
    assert abs(len(audio) - seconds * AUDIO_SAMPLE_RATE) <= 2
    time = np.arange(len(audio)) / AUDIO_SAMPLE_RATE
    expected = (np.sin(2 * np.pi * 300 * time) + np.sin(2 * np.pi * 710 * time)) / 8
    np.testing.assert_allclose(audio[200:-200], expected[200:-200], atol=0.02)


def test_loud_stereo_is_not_clipped(tmp_path):
    tone = 0.95 * np.sin(2 * np.pi * 300 * np.arange(16_000) / 44_100)
    audio = read_audio(write_stereo(tmp_path / "loud.wav", tone, tone, 44_100))
    assert 0.9 < np.abs(audio).max() <= 1


def test_video_and_audio_of_real_clips_have_one_length(clips):
    for name in ("talking_a", "talking_b", "talking_c"):
        path = clips / f"{name}.mp4"
        assert abs(len(read_audio(path)) / AUDIO_SAMPLE_RATE - sum(1 for _ in read_frames(path)) / VIDEO_FPS) < 0.3


# Files that cannot be used.


@pytest.fixture
def audio_file(tmp_path, voice) -> Path:
    """A file without video."""
    sound = voice(0.5)
    return write_stereo(tmp_path / "audio.mkv", sound, sound, AUDIO_SAMPLE_RATE)


@pytest.mark.parametrize("content", [b"this is no video\n" * 50, 700, None], ids=["text", "truncated", "missing"])
def test_an_unreadable_file_is_refused_by_name(tmp_path, counted, content):
    path = tmp_path / "video.mp4"
    if content is not None:
        path.write_bytes(counted.read_bytes()[:700] if content == 700 else content)
    for read in (lambda: next(read_frames(path)), lambda: count_frames(path), lambda: read_audio(path)):
        with pytest.raises(MediaError) as caught:
            read()
        assert caught.value.kind == "unreadable" and str(caught.value).startswith(f"{path}: ")


def test_a_file_without_video_is_refused_as_video(audio_file):
    assert len(read_audio(audio_file)) == 8000
    for read in (lambda: next(read_frames(audio_file)), lambda: count_frames(audio_file)):
        with pytest.raises(MediaError) as caught:
            read()
        assert caught.value.kind == "no video" and str(caught.value).startswith(f"{audio_file}: ")


def test_a_file_without_audio_is_refused_as_audio(counted):
    with pytest.raises(MediaError) as caught:
        read_audio(counted)
    assert caught.value.kind == "no audio" and str(caught.value).startswith(f"{counted}: ")


# Batches.


@pytest.mark.parametrize(("count", "size"), [(0, 3), (6, 3), (7, 3), (2, 3)])
def test_batches_hold_all_items_in_order_and_only_the_last_is_shorter(count, size):
    batches = list(batched(iter(range(count)), size))
    assert sum(batches, []) == list(range(count))
    assert all(len(batch) == size for batch in batches[:-1]) and all(batches)
