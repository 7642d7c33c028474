"""Video in and out: every output frame is the source frame nearest in time, whatever the source."""

from __future__ import annotations

import struct
from collections.abc import Callable
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from musetalk.contract import AUDIO_SAMPLE_RATE, SAMPLES_PER_FRAME, VIDEO_FPS
from musetalk.data.video import (
    MediaError,
    count_frames,
    ping_pong,
    ping_pong_index,
    read_audio,
    read_frames,
    write_video,
)
from musetalk.images import batched

BITS, BLOCK = 12, 8  # of the number that a picture carries; pixels of a bit
NTSC, FILM = Fraction(30_000, 1001), Fraction(24)


def numbered(k: int) -> np.ndarray:
    """A picture (32, 128, 3) that carries k in blocks of black and white."""
    bits = [0, *((k >> b) & 1 for b in range(BITS)), 1, 0, 1]
    row = np.repeat(np.array(bits, np.uint8) * 200 + 20, BLOCK)
    return np.repeat(np.tile(row, (32, 1))[..., None], 3, axis=2)


def number(picture: np.ndarray) -> int:
    """What `numbered` wrote."""
    blocks = picture.reshape(len(picture), -1, BLOCK, 3).mean(axis=(0, 2, 3))[1 : 1 + BITS]
    return sum(int(level > 120) << b for b, level in enumerate(blocks))


def numbers(*args) -> list[int]:
    return [number(picture) for picture in read_frames(*args)]


def smooth(k: int, height: int = 96, width: int = 128) -> np.ndarray:
    """A picture of soft colours that drift with k."""
    y, x = np.mgrid[:height, :width]
    channels = [np.sin(x / 31 + k / 9), np.cos(y / 27 - k / 7), np.sin((x + y) / 43 + k / 11)]
    return np.round(127.5 + 90 * np.stack(channels, axis=-1)).astype(np.uint8)


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.mean((one.astype(float) - other) ** 2))


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.corrcoef(one, other)[0, 1])


@pytest.fixture(scope="module")
def counted(tmp_path_factory, write_source) -> Path:
    """60 numbered pictures at 25 a second, a key frame every 12."""
    return write_source(tmp_path_factory.mktemp("counted") / "counted.mp4", [numbered(k) for k in range(60)])


# What is written is read again.


def test_a_written_video_reads_back_as_the_same_pictures_and_sound(tmp_path, voice):
    pictures, sound = [smooth(k) for k in range(30)], voice(1.2)
    path = tmp_path / "made" / "out.mp4"
    assert write_video(path, iter(pictures), sound, AUDIO_SAMPLE_RATE) == 30
    again = list(read_frames(path))
    assert len(again) == count_frames(path) == 30
    assert min(psnr(*pair) for pair in zip(again, pictures, strict=True)) >= 40
    heard = read_audio(path)
    assert heard.dtype == np.float32 and abs(len(heard) - len(sound)) <= 1024  # the last block of AAC
    assert correlation(heard[: len(sound)], sound[: len(heard)]) > 0.99
    assert [p.name for p in path.parent.iterdir()] == ["out.mp4"]


@pytest.mark.parametrize(("height", "width"), [(95, 128), (96, 127), (95, 127), (17, 33)])
def test_an_odd_edge_is_doubled(tmp_path, height, width):
    picture = smooth(0, height, width)
    write_video(tmp_path / "odd.mp4", [picture] * 3, np.zeros(9, np.float32), AUDIO_SAMPLE_RATE)
    for again in read_frames(tmp_path / "odd.mp4"):
        assert again.shape == (height + height % 2, width + width % 2, 3)
        assert psnr(again[:height, :width], picture) > 36
        assert np.abs(again[height - 1].astype(int) - again[-1]).mean() < 4


def test_colours_survive_at_full_strength(tmp_path):
    """A wrong colour matrix shifts saturated colours by ten levels and more."""
    colours = [(0, 0, 255), (0, 255, 0), (255, 0, 0), (0, 200, 255), (128, 128, 128)]
    picture = np.concatenate([np.full((64, 32, 3), colour, np.uint8) for colour in colours], axis=1)
    write_video(tmp_path / "colours.mp4", [picture] * 2, np.zeros(9, np.float32), AUDIO_SAMPLE_RATE)
    again = next(read_frames(tmp_path / "colours.mp4"))
    for index, colour in enumerate(colours):
        np.testing.assert_allclose(again[16:48, 32 * index + 8 : 32 * index + 24].mean(axis=(0, 1)), colour, atol=5)


@pytest.mark.parametrize("seconds", [0.3, 3.0])
def test_sound_is_cut_or_filled_with_silence_to_the_length_of_the_video(tmp_path, voice, seconds):
    write_video(tmp_path / "out.mp4", [smooth(0)] * 25, voice(seconds), AUDIO_SAMPLE_RATE)
    heard = read_audio(tmp_path / "out.mp4")
    assert abs(len(heard) - 25 * SAMPLES_PER_FRAME) <= 1024
    if seconds < 1:
        assert np.abs(heard[round(0.4 * AUDIO_SAMPLE_RATE) :]).max() < 0.01
        assert np.abs(heard[: round(0.3 * AUDIO_SAMPLE_RATE)]).max() > 0.05


def test_a_sample_rate_that_no_frame_divides_keeps_its_sound(tmp_path):
    rate = 22_050
    tone = (0.3 * np.sin(2 * np.pi * (300 + 200 * np.arange(2 * rate) / rate) * np.arange(2 * rate) / rate)).astype(
        "f4"
    )
    write_video(tmp_path / "out.mp4", [smooth(0)] * 50, tone, rate)
    heard = read_audio(tmp_path / "out.mp4", rate)
    assert correlation(heard[: len(tone)], tone[: len(heard)]) > 0.99


def test_nothing_to_write_is_refused_and_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="no frame"):
        write_video(tmp_path / "none.mp4", [], np.zeros(9, np.float32), AUDIO_SAMPLE_RATE)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_half_way_leaves_the_file_that_was_there(tmp_path):
    def failing():
        yield smooth(0)
        raise RuntimeError("lost")

    (tmp_path / "out.mp4").write_bytes(b"earlier")
    with pytest.raises(RuntimeError, match="lost"):
        write_video(tmp_path / "out.mp4", failing(), np.zeros(9, np.float32), AUDIO_SAMPLE_RATE)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("out.mp4", b"earlier")]


# Every frame is the nearest one.


@pytest.mark.parametrize(
    "rate", [FILM, Fraction(24_000, 1001), Fraction(25), NTSC, Fraction(30), Fraction(50), Fraction(60)], ids=str
)
def test_frame_k_shows_the_source_frame_nearest_to_its_time_over_20_seconds(tmp_path, write_source, rate):
    count = int(20 * rate)
    path = write_source(tmp_path / "source.mp4", [numbered(k) for k in range(count)], rate=rate, keyframe_every=100)
    shown = np.array(numbers(path))
    assert abs(len(shown) - count * VIDEO_FPS / rate) <= 0.5
    wanted = np.arange(len(shown)) / VIDEO_FPS
    away = np.abs(shown / float(rate) - wanted)
    at_end = wanted > (count - 1) / rate  # beyond the last picture there is no nearer one
    assert away[~at_end].max() <= 0.5 / rate + 1e-9
    assert (shown[at_end] == count - 1).all() and at_end.sum() <= 1


@given(seed=st.integers(0, 5))
def test_frame_k_is_nearest_at_a_variable_rate_too(tmp_path_factory, write_source, seed):
    rng = np.random.default_rng(seed)
    gaps = rng.choice([1, 2, 3, 4, 10], 60)  # hundredths of a second
    times = [Fraction(int(t), 100) for t in np.cumsum([0, *gaps])]
    path = write_source(
        tmp_path_factory.mktemp("variable") / "source.mp4", [numbered(k) for k in range(len(times))], times
    )
    away = np.abs(np.array(times, float)[None] - np.arange(len(shown := numbers(path)))[:, None] / VIDEO_FPS)
    chosen = away[np.arange(len(shown)), shown]
    np.testing.assert_allclose(chosen, away.min(axis=1), atol=1e-4)
    assert len(shown) / VIDEO_FPS >= times[-1] - Fraction(1, VIDEO_FPS)


def test_talking_a_at_its_variable_rate_is_read_by_time(clips):
    path = clips / "talking_a.mp4"
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        source = [(float(f.pts * stream.time_base), f.to_ndarray(format="bgr24")) for f in container.decode(stream)]
    times = np.array([time for time, _ in source])
    times -= times[0]
    assert np.diff(times).std() > 0.001  # it is variable
    frames = list(read_frames(path))
    assert abs(len(frames) / VIDEO_FPS - times[-1]) < 0.1
    for k in range(0, len(frames) - 3, 10):
        away = np.abs(times - k / VIDEO_FPS)
        nearest = np.flatnonzero(away < away.min() + 1e-4)
        assert any(np.array_equal(frames[k], source[i][1]) for i in nearest)


SLICES = [
    (0, 5),
    (1, 3),
    (11, 14),
    (12, 13),
    (13, 26),
    (30, 31),
    (40, None),
    (7, 7),
    (59, None),
    (60, None),
    (500, None),
]


@pytest.mark.parametrize("rate", [Fraction(25), FILM, NTSC, Fraction(30), Fraction(50), Fraction(60)], ids=str)
def test_a_slice_is_that_part_of_the_whole_at_any_rate(tmp_path, write_source, rate):
    path = write_source(tmp_path / "source.mp4", [numbered(k) for k in range(int(2.4 * rate))], rate=rate)
    whole = numbers(path)
    for start, stop in SLICES:
        assert numbers(path, start, stop) == whole[start:stop], (start, stop)


@pytest.mark.parametrize(
    ("ending", "codec"),
    [
        ("mkv", "libx264"),
        ("mov", "mpeg4"),
        ("avi", "mpeg4"),
        ("webm", "libvpx-vp9"),
        ("wmv", "wmv2"),
        ("flv", "libx264"),
        ("ts", "libx264"),
        ("mpg", "mpeg2video"),
    ],
)
def test_whole_and_slices_of_other_containers_are_right(tmp_path, write_source, ending, codec):
    """They find their key frames in other ways: by decoding time, or by a guess."""
    path = write_source(tmp_path / f"source.{ending}", [numbered(k) for k in range(60)], codec=codec)
    assert numbers(path) == list(range(60))
    wrong = {(start, stop): numbers(path, start, stop)[:3] for start, stop in SLICES}
    wrong = {(start, stop): seen for (start, stop), seen in wrong.items() if seen != list(range(60))[start:stop][:3]}
    assert wrong == {}


def test_a_slice_of_a_real_clip_is_that_part_of_the_whole(clips):
    path = clips / "talking_b.mp4"
    whole = list(islice(read_frames(path), 40))
    np.testing.assert_array_equal(list(read_frames(path, 33, 40)), whole[33:])


def test_a_video_that_begins_late_begins_with_its_first_picture(tmp_path, write_source):
    times = [Fraction(k, 25) + Fraction(3, 10) for k in range(30)]
    path = write_source(tmp_path / "late.mkv", [numbered(k) for k in range(30)], times)
    assert numbers(path) == list(range(30))
    assert numbers(path, 20, 23) == [20, 21, 22]


def test_one_picture_is_one_frame(tmp_path, write_source):
    assert numbers(write_source(tmp_path / "one.mp4", [numbered(9)])) == [9]


# Orientation.


@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_the_rotation_flag_turns_the_picture_as_players_do(tmp_path, write_source, quarters):
    """quarters: clockwise turns that the file asks for, in the matrix of ISO/IEC 14496-12 8.3.2."""
    picture = smooth(0, 64, 96)
    picture[:16, :16] = 255
    path = write_source(tmp_path / "source.mp4", [picture] * 3)
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 44
    one = 1 << 16
    a, b, c, d = [(one, 0, 0, one), (0, one, -one, 0), (-one, 0, 0, -one), (0, -one, one, 0)][quarters]
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    turned = next(read_frames(path))
    upright = np.rot90(picture, -quarters)
    assert turned.shape == upright.shape and psnr(turned, upright) > 25


# Sound.


@pytest.mark.parametrize("start", [Fraction(1, 2), Fraction(1, 7)])
def test_sound_that_starts_later_than_the_picture_is_padded(tmp_path, write_source, voice, start):
    sound, late = voice(1.0), round(start * AUDIO_SAMPLE_RATE)
    path = write_source(tmp_path / "late.mkv", [numbered(k) for k in range(50)], audio=sound, audio_start=start)
    heard = read_audio(path)
    assert np.abs(heard[: late - 2000]).max(initial=0) < 0.01
    pieces = {shift: heard[late + shift : late + shift + 12_000] for shift in range(-1200, 1201, 16)}
    best = max(pieces, key=lambda shift: correlation(pieces[shift], sound[:12_000]))
    assert abs(best) <= 32  # 2 ms
    assert correlation(pieces[best], sound[:12_000]) > 0.95


def test_sound_before_the_first_picture_is_cut(tmp_path, write_source, voice):
    sound = voice(2.0)
    times = [Fraction(k, 25) + Fraction(1, 2) for k in range(25)]
    path = write_source(tmp_path / "early.mkv", [numbered(k) for k in range(25)], times, audio=sound)
    heard = read_audio(path)
    assert abs(len(heard) - 24_000) <= 2048
    shifts = {
        s: correlation(heard[1200:20_000], sound[8000 + 1200 + s :][: 20_000 - 1200]) for s in range(-640, 641, 16)
    }
    assert abs(max(shifts, key=shifts.get)) <= 32


def test_sound_keeps_its_time_after_a_gap(tmp_path):
    """Recordings of streams lose some, and say so in their time stamps alone."""
    rate = AUDIO_SAMPLE_RATE
    with av.open(str(tmp_path / "gap.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=rate, layout="mono")
        for level, begin in ((3000, 0), (30_000, 3 * rate)):
            frame = av.AudioFrame.from_ndarray(np.full((1, rate), level, np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = rate, begin, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    heard = read_audio(tmp_path / "gap.mkv")
    assert abs(len(heard) - 4 * rate) <= 32
    assert abs(int(np.argmax(heard > 0.5)) - 3 * rate) <= 32
    assert np.abs(heard[rate + 100 : 3 * rate - 100]).max() == 0


def write_stereo(path: Path, left: np.ndarray, right: np.ndarray, rate: int) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=rate, layout="stereo")
        both = (32767 * np.stack([left, right], axis=1)).astype(np.int16).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(both, format="s16", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def test_sound_is_resampled_and_mixed_to_one_channel(tmp_path):
    rate, seconds = 44_100, 1.5
    time = np.arange(round(rate * seconds)) / rate
    left, right = np.sin(2 * np.pi * 300 * time), np.sin(2 * np.pi * 710 * time)
    heard = read_audio(write_stereo(tmp_path / "stereo.wav", 0.25 * left, 0.25 * right, rate))
    assert abs(len(heard) - seconds * AUDIO_SAMPLE_RATE) <= 2
    now = np.arange(len(heard)) / AUDIO_SAMPLE_RATE
    mixed = (np.sin(2 * np.pi * 300 * now) + np.sin(2 * np.pi * 710 * now)) / 8
    assert correlation(heard, mixed) > 0.999
    np.testing.assert_allclose(heard[200:-200], mixed[200:-200], atol=0.02)


def test_loud_stereo_stays_within_its_range(tmp_path):
    tone = 0.95 * np.sin(2 * np.pi * 300 * np.arange(16_000) / 44_100)
    heard = read_audio(write_stereo(tmp_path / "loud.wav", tone, tone, 44_100))
    assert 0.9 < np.abs(heard).max() <= 1


def test_pictures_and_sound_of_real_clips_are_equally_long(clips):
    for name in ("talking_a", "talking_b", "talking_c"):
        path = clips / f"{name}.mp4"
        assert abs(len(read_audio(path)) / AUDIO_SAMPLE_RATE - sum(1 for _ in read_frames(path)) / VIDEO_FPS) < 0.3


# Files that cannot be used.


@pytest.fixture
def unfit(tmp_path, counted, write_source, voice) -> Callable[[str], Path]:
    """A function: what is wrong -> a file of which that is true."""

    def make(what: str) -> Path:
        path = tmp_path / f"{what}.mp4"
        if what == "text":
            path.write_text("this is no video\n" * 50)
        elif what == "empty":
            path.touch()
        elif what == "cut":
            path.write_bytes(counted.read_bytes()[:700])
        elif what == "silent":
            path.write_bytes(counted.read_bytes())
        elif what == "audio only":
            path = tmp_path / "audio.m4a"
            with av.open(str(path), "w") as container:
                stream = container.add_stream("aac", rate=AUDIO_SAMPLE_RATE, layout="mono")
                frame = av.AudioFrame.from_ndarray(voice(0.5)[None], format="fltp", layout="mono")
                frame.sample_rate = AUDIO_SAMPLE_RATE
                container.mux(stream.encode(frame))
                container.mux(stream.encode(None))
        return path

    return make


@pytest.mark.parametrize(
    ("what", "kind"),
    [
        ("text", "unreadable"),
        ("empty", "unreadable"),
        ("cut", "unreadable"),
        ("missing", "unreadable"),
        ("audio only", "no video"),
    ],
)
def test_what_is_no_video_is_refused_with_its_name_and_kind(unfit, what, kind):
    path = unfit(what)
    for read in (lambda: next(read_frames(path)), lambda: count_frames(path)):
        with pytest.raises(MediaError) as caught:
            read()
        assert caught.value.kind == kind and str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(("what", "kind"), [("text", "unreadable"), ("missing", "unreadable"), ("silent", "no audio")])
def test_what_has_no_sound_is_refused_with_its_name_and_kind(unfit, what, kind):
    path = unfit(what)
    with pytest.raises(MediaError) as caught:
        read_audio(path)
    assert caught.value.kind == kind and str(caught.value).startswith(f"{path}: ")


def test_sound_alone_is_read_without_a_picture(unfit):
    assert len(read_audio(unfit("audio only"))) >= 7000


def test_real_files_without_one_of_the_two_are_refused(clips):
    with pytest.raises(MediaError, match="no audio"):
        read_audio(clips / "cartoon_no_audio.mp4")
    with pytest.raises(MediaError, match="no video"):
        next(read_frames(clips / "speech_jfk.flac"))


def test_a_video_cut_off_in_its_middle_gives_what_is_left(tmp_path, write_source):
    whole = write_source(tmp_path / "whole.mkv", [numbered(k) for k in range(60)]).read_bytes()
    (tmp_path / "half.mkv").write_bytes(whole[: len(whole) // 2])
    shown = numbers(tmp_path / "half.mkv")
    assert 5 < len(shown) < 60 and shown == list(range(len(shown)))


# Small helpers.


@given(count=st.integers(0, 40), size=st.integers(1, 12))
def test_batches_hold_all_items_in_order_and_only_the_last_is_shorter(count, size):
    batches = list(batched(iter(range(count)), size))
    assert [item for batch in batches for item in batch] == list(range(count))
    assert all(len(batch) == size for batch in batches[:-1]) and all(batches)


@given(length=st.integers(1, 50), k=st.integers(0, 300))
def test_forth_and_back_index_runs_to_the_end_and_back(length, k):
    forth = list(range(length))
    assert ping_pong_index(k, length) == ((forth + forth[::-1]) * 400)[k]


@pytest.mark.parametrize(("length", "count"), [(60, 130), (60, 30), (7, 40), (26, 60), (1, 3)])
def test_forth_and_back_shows_the_frames_that_its_index_names(counted, length, count):
    shown = [number(picture) for picture in ping_pong(counted, length, count)]
    assert shown == [ping_pong_index(k, length) for k in range(count)]


def test_pictures_of_another_size_within_a_video_are_left_out(tmp_path):
    """Some recordings change their size; a crop could not follow that."""
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
