"""Irregular time stamps, sizes and bytes: no drift, constant memory, and only MediaError is raised."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import wavfile

from musetalk.contract import AUDIO_SAMPLE_RATE, SAMPLES_PER_FRAME, VIDEO_FPS
from musetalk.data.video import MediaError, count_frames, read_audio, read_frames, write_video
from tests.test_hostile_videos import film
from tests.test_video import numbered, numbers

ROOT = Path(__file__).parents[1]
TILES, TILE = 4, 12  # a tiny picture is 4 x 4 bits of 12 pixels
GROWTH = 20 << 10  # KB of memory allowed per minute of audio
MEASURE = """
import sys
from pathlib import Path
import torch
from musetalk.data.audio import audio_features, sync_mel
from musetalk.contract import CONTRACTS
from musetalk.models.audio_encoder import load_audio_encoder
from musetalk.data.video import read_audio

torch.set_num_threads(1)
encoder = load_audio_encoder(Path(sys.argv[1]), "cpu")
for path in sys.argv[2:]:
    audio = read_audio(path)
    assert len(sync_mel(audio)) // 80 == len(audio_features(audio, encoder, CONTRACTS["rigid"])) // 50 > 50
    print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


# Time.


def tiny(k: int) -> np.ndarray:
    """A frame of 48 x 48 that encodes a 16-bit number."""
    bits = np.array([k >> b & 1 for b in range(TILES**2)], np.uint8).reshape(TILES, TILES)
    return np.repeat(np.kron(bits * 200 + 20, np.ones((TILE, TILE), np.uint8))[..., None], 3, axis=2)


def tiny_number(picture: np.ndarray) -> int:
    """Decodes the number of `tiny`."""
    levels = picture[TILE // 2 :: TILE, TILE // 2 :: TILE, 0].ravel() > 120
    return int(levels @ (1 << np.arange(TILES**2)))


@pytest.mark.parametrize("rate", [Fraction(24_000, 1001), Fraction(30_000, 1001)], ids=str)
def test_frame_times_do_not_drift(tmp_path, rate):
    count = int(30 * rate)
    pictures = [tiny(k) for k in range(count)]
    path = film(tmp_path / "long.mp4", pictures, rate=rate, options={"preset": "ultrafast"}, keyframe_every=250)
    shown = np.array([tiny_number(picture) for picture in read_frames(path)])
    assert len(shown) == round(count * VIDEO_FPS / rate) == count_frames(path)
    expected = np.arange(len(shown)) * float(rate) / VIDEO_FPS  # the number at each time
    np.testing.assert_array_equal(np.abs(shown - np.minimum(expected, count - 1)) <= 0.5 + 1e-6, True)
    late = len(shown) - 50
    assert [tiny_number(picture) for picture in read_frames(path, late)] == list(shown[late:])


@pytest.mark.parametrize(("codec", "bframes"), [("libx264", 3), ("libx264", 0), ("mpeg4", 2)])
@pytest.mark.parametrize("count", [1, 2, 60])
def test_avi_shows_its_pictures_in_order_though_it_knows_only_when_they_are_decoded(tmp_path, codec, bframes, count):
    beep = np.zeros(count * SAMPLES_PER_FRAME, np.float32)
    beep[count // 2 * SAMPLES_PER_FRAME :] = 0.5
    pictures = [numbered(k) for k in range(count)]
    options = {"bf": str(bframes)}
    path = film(tmp_path / "old.avi", pictures, beep, codec=codec, options=options, sound_codec="pcm_s16le")
    assert numbers(path) == list(range(count))
    assert abs(int(np.argmax(read_audio(path) > 0.2)) - count // 2 * SAMPLES_PER_FRAME) <= 32


@pytest.mark.parametrize("share", [0.1, 0.2, 0.4])
def test_a_stream_that_begins_between_key_frames_keeps_its_sound_in_time(tmp_path, share):
    """Its first frames cannot be decoded, but their audio can."""
    beep = np.zeros(150 * SAMPLES_PER_FRAME, np.float32)
    beep[100 * SAMPLES_PER_FRAME : 101 * SAMPLES_PER_FRAME] = 0.5
    path = film(tmp_path / "cut.ts", [numbered(k) for k in range(150)], beep, keyframe_every=40)
    content = path.read_bytes()
    path.write_bytes(content[round(len(content) // 188 * share) * 188 :])
    shown = numbers(path)
    assert shown == list(range(shown[0], 150)) and shown[0] > 0
    heard = np.abs(read_audio(path)) > 0.2
    assert abs(int(np.argmax(heard)) - (100 - shown[0]) * SAMPLES_PER_FRAME) <= 0.1 * SAMPLES_PER_FRAME


@pytest.mark.parametrize("leap", [31, 100, 36_000])
def test_a_picture_long_after_the_last_one_is_refused_instead_of_shown_until_then(tmp_path, leap):
    path = film(tmp_path / "late.mkv", [numbered(k) for k in range(3)], times=[0, leap, leap + 0.04])
    with pytest.raises(MediaError, match=f"its video jumps from second 0.0 to {leap}.0") as refused:
        list(read_frames(path))
    assert refused.value.kind == "gap in time"


def test_two_recordings_one_after_the_other_are_refused_instead_of_mixed(tmp_path, voice):
    """Their times start twice; the audio of the second would overlap the video of the first."""
    path = film(tmp_path / "twice.ts", [numbered(k) for k in range(60)], voice(2.4))
    path.write_bytes(path.read_bytes() * 2)
    for what, read in (("video", lambda: list(read_frames(path))), ("audio", lambda: read_audio(path))):
        with pytest.raises(MediaError, match=rf"its {what} jumps from second 2\.\d to 0.0"):
            read()


def write_packets(path: Path, times: np.ndarray) -> Path:
    """Sound in pieces of 20 ms that begin at these seconds."""
    piece, tick = AUDIO_SAMPLE_RATE // 50, Fraction(1, AUDIO_SAMPLE_RATE)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=AUDIO_SAMPLE_RATE, layout="mono")
        for time in times:
            frame = av.AudioFrame.from_ndarray(np.full((1, piece), 9000, np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.time_base, frame.pts = AUDIO_SAMPLE_RATE, tick, round(time / tick)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def test_sound_with_long_pauses_is_kept_and_sound_of_nothing_but_pauses_is_refused(tmp_path):
    """Calls send no packets in pauses, but wrong durations of packets would create days of silence."""
    quiet = read_audio(write_packets(tmp_path / "call.mkv", np.arange(100) * 0.4))
    assert abs(len(quiet) / AUDIO_SAMPLE_RATE - 39.62) < 0.01 and np.count_nonzero(quiet) <= 100 * 320
    with pytest.raises(MediaError, match="almost only of gaps") as refused:
        read_audio(write_packets(tmp_path / "broken.mkv", np.arange(100) * 20.0))
    assert refused.value.kind == "gap in time"


OPEN_GOP = "keyint=12:min-keyint=12:bframes=4:b-adapt=0:open-gop=1"


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        (
            "libx265",
            {"x265-params": f"log-level=0:{OPEN_GOP}"},
        ),  # pictures shown before the key frame need the last one
        ("libx264", {"x264-params": OPEN_GOP}),
        ("libx264", {"x264-params": "keyint=12:intra-refresh=1"}),  # no key frame after the first
    ],
)
@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_a_slice_is_right_where_no_key_frame_stands_alone(tmp_path, ending, codec, options):
    path = film(tmp_path / f"clip.{ending}", [numbered(k) for k in range(60)], codec=codec, options=options)
    slices = {start: numbers(path, start, start + 2) for start in range(60)}
    assert slices == {start: list(range(start, min(60, start + 2))) for start in range(60)}


def test_a_slice_is_right_where_the_index_is_broken(tmp_path):
    path = film(tmp_path / "clip.mp4", [numbered(k) for k in range(60)])
    content = bytearray(path.read_bytes())
    at = content.index(b"stss") + 12
    content[at : at + 4] = (1 << 31).to_bytes(4, "big")  # the number of the first picture that is a key frame
    path.write_bytes(content)
    with av.open(str(path)) as container, pytest.raises(PermissionError):
        container.seek(10_000, stream=container.streams.video[0])
    assert numbers(path, 30, 33) == [30, 31, 32]


# Sound that changes, or is of an unusual kind.


def adts(path: Path, rate: int, layout: str) -> bytes:
    """A second of a tone as a raw stream of AAC."""
    tone = 0.3 * np.sin(2 * np.pi * 300 * np.arange(rate) / rate)
    with av.open(str(path), "w", format="adts") as container:
        stream = container.add_stream("aac", rate=rate, layout=layout)
        channels = np.stack([tone] * (1 if layout == "mono" else 2)).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(channels, format="fltp", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path.read_bytes()


@pytest.mark.parametrize(("rate", "layout"), [(16_000, "stereo"), (44_100, "mono"), (16_000, "mono")])
def test_sound_may_change_its_channels_and_rate_on_the_way(tmp_path, rate, layout):
    """As in broadcasts, between programmes and advertisements."""
    path = tmp_path / "both.aac"
    path.write_bytes(adts(tmp_path / "one", 16_000, "mono") + adts(tmp_path / "other", rate, layout))
    heard = read_audio(path)
    assert abs(len(heard) / AUDIO_SAMPLE_RATE - 2.1) < 0.15
    for second in (0, 1):
        spectrum = np.abs(np.fft.rfft(heard[second * 16_000 + 4000 :][:8000]))
        assert abs(int(spectrum.argmax()) * 2 - 300) <= 4 and spectrum.max() > 500


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (22, (9).to_bytes(2, "little"), "cannot be mixed to one channel"),
        (24, (1).to_bytes(4, "little"), "invalid sample rate of 1 Hz"),
        (24, (1 << 30).to_bytes(4, "little"), "invalid sample rate of 1073741824 Hz"),
    ],
)
def test_a_header_that_cannot_be_true_costs_neither_time_nor_memory(tmp_path, at, value, message):
    path = tmp_path / "sound.wav"
    wavfile.write(path, AUDIO_SAMPLE_RATE, np.ones(9 * 2000, np.int16))
    content = bytearray(path.read_bytes())
    content[at : at + len(value)] = value
    path.write_bytes(content)
    with pytest.raises(MediaError, match=message) as refused:
        read_audio(path)
    assert refused.value.kind == "unreadable"


# Pictures and names.


def test_pictures_that_would_fill_the_memory_are_refused(tmp_path):
    jpeg = cv2.imencode(".jpg", np.zeros((8200, 8200), np.uint8))[1].tobytes()
    with av.open(str(tmp_path / "huge.avi"), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width = stream.height = 8200
        stream.pix_fmt = "yuvj420p"
        packet = av.Packet(jpeg)
        packet.stream, packet.pts, packet.dts, packet.time_base = stream, 0, 0, Fraction(1, 25)
        container.mux(packet)
    with pytest.raises(MediaError, match="8200 x 8200 pixels are too large") as refused:
        next(read_frames(tmp_path / "huge.avi"))
    assert refused.value.kind == "too large"


@pytest.mark.parametrize(
    ("matrix", "quarters"),
    [
        ((0, 0, 0, 0, 0), 0),  # no rotation at all
        ((65_532, 1144, -1144, 65_532), 0),  # by a degree
        ((1144, 65_532, -65_532, 1144), -1),  # by 89 degrees, clockwise
        ((-1144, 65_532, -65_532, -1144), -1),
        ((-65_532, -1144, 1144, -65_532), 2),
    ],
)
def test_a_rotation_by_odd_degrees_is_rounded_to_quarters(tmp_path, matrix, quarters):
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:24] = 255
    path = film(tmp_path / "turned.mp4", [picture] * 2, options={"crf": "1"}, rotation=90)
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 44
    a, b, c, d = matrix[:4]
    for place, number_ in enumerate((a, b, 0, c, d, 0, 0, 0, 1 << 30)):
        content[at + 4 * place : at + 4 * place + 4] = number_.to_bytes(4, "big", signed=True)
    path.write_bytes(content)
    np.testing.assert_allclose(next(read_frames(path)), np.rot90(picture, quarters), atol=20)


@pytest.mark.parametrize("name", ["Interview: part 1.mp4", "http:x.mp4", "file:y.mp4", "concat:a.mp4|b.mp4", "-"])
def test_no_relative_name_is_taken_for_the_address_of_something_else(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    film(tmp_path / "plain.mp4", [numbered(5)]).rename(name)
    assert numbers(Path(name)) == [5]


# Memory.


@pytest.mark.parametrize("models", ["mini", "real_whisper_models"])
def test_ten_minutes_of_sound_take_little_more_memory_than_one(tmp_path, voice, request, models):
    """Uses VmHWM, since getrusage includes the memory of this process before it started the other."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs a system that says how much memory was taken")
    paths = [str(tmp_path / f"{minutes}.wav") for minutes in (1, 10)]
    for path, minutes in zip(paths, (1, 10), strict=True):
        wavfile.write(path, AUDIO_SAMPLE_RATE, np.tile(voice(60), minutes))
    command = [sys.executable, "-c", MEASURE, str(request.getfixturevalue(models)), *paths]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    peaks = [int(line) for line in printed.split()]
    assert peaks[1] - peaks[0] <= 9 * GROWTH


# Any bytes.

changes = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory, voice) -> Callable:
    """A function: (ending, changes, share) -> a small file of which bytes are changed and only a share is left."""
    folder = tmp_path_factory.mktemp("damaged")
    pictures, sound = [numbered(k) for k in range(12)], voice(12 / VIDEO_FPS)
    write_video(folder / "whole.mp4", pictures, sound, AUDIO_SAMPLE_RATE)
    film(folder / "whole.avi", pictures, sound, sound_codec="pcm_s16le")
    film(folder / "whole.ts", pictures, sound)
    wavfile.write(folder / "whole.wav", AUDIO_SAMPLE_RATE, (sound * 32_767).astype(np.int16))
    with av.open(str(folder / "whole.flac"), "w") as container:
        for packet in add_sound_of(container, sound):
            container.mux(packet)

    def damage(ending: str, changes: list[tuple[float, int]], share: float, head: int) -> Path:
        content = bytearray((folder / f"whole.{ending}").read_bytes())
        begin = max(0, content.find(b"moov")) if ending == "mp4" else 0
        for place, value in changes:  # most of what can be told wrongly stands in the head
            content[begin + int(place * min(head, len(content) - begin))] = value
        path = folder / f"damaged.{ending}"
        path.write_bytes(content[: round(len(content) * share)])
        return path

    return damage


def add_sound_of(container: av.container.OutputContainer, sound: np.ndarray) -> list:
    stream = container.add_stream("flac", rate=AUDIO_SAMPLE_RATE, layout="mono")
    samples = (sound * 32_767).astype(np.int16)[None]
    frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
    frame.sample_rate, frame.pts = AUDIO_SAMPLE_RATE, 0
    return stream.encode(frame) + stream.encode(None)


@pytest.mark.parametrize("ending", ["mp4", "avi", "ts", "wav", "flac"])
@settings(max_examples=20)
@given(changes=changes, share=st.sampled_from([1, 1, 0.9, 0.5, 0.1]), head=st.sampled_from([64, 1500, 1 << 30]))
def test_a_damaged_file_is_read_in_part_or_refused(damaged, ending, changes, share, head):
    path = damaged(ending, changes, share, head)
    read = {
        "count": lambda: 0 * count_frames(path),
        "frames": lambda: sum(1 for _ in read_frames(path)),
        "slice": lambda: sum(1 for _ in read_frames(path, 5, 8)),
        "sound": lambda: len(read_audio(path)) // SAMPLES_PER_FRAME,
    }
    for what, attempt in read.items():
        try:
            assert attempt() <= 40 * VIDEO_FPS * 12, what
        except MediaError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
