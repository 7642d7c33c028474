"""Video and audio files with unusual time stamps, sizes, names and bytes: read correctly or refused as MediaError."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from hostile import corrupted
from hypothesis import given
from hypothesis import strategies as st
from scipy.io import wavfile

from musetalk.contract import AUDIO_SAMPLE_RATE, SAMPLES_PER_FRAME, VIDEO_FPS
from musetalk.data.video import MediaError, count_frames, read_audio, read_frames, write_video
from tests.test_hostile_videos import write_film
from tests.test_video import numbered, numbers

ROOT = Path(__file__).parents[1]
MAX_GROWTH = 20 << 10  # KB of memory per minute of audio
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


# Time stamps.


@pytest.mark.parametrize(("codec", "b_frames", "count"), [("libx264", 3, 60), ("libx264", 3, 1), ("mpeg4", 2, 60)])
def test_frames_of_avi_are_in_order_although_it_stores_decoding_times_only(tmp_path, codec, b_frames, count):
    audio = np.zeros(count * SAMPLES_PER_FRAME, np.float32)
    audio[count // 2 * SAMPLES_PER_FRAME :] = 0.5
    pictures = [numbered(k) for k in range(count)]
    options = {"bf": str(b_frames)}
    path = write_film(tmp_path / "old.avi", pictures, audio, codec=codec, options=options, sound_codec="pcm_s16le")
    assert numbers(path) == list(range(count))
    assert abs(int(np.argmax(read_audio(path) > 0.2)) - count // 2 * SAMPLES_PER_FRAME) <= 32


def test_audio_stays_in_sync_if_a_stream_starts_between_key_frames(tmp_path):
    """The first frames cannot be decoded, but their audio can."""
    beep = np.zeros(150 * SAMPLES_PER_FRAME, np.float32)
    beep[100 * SAMPLES_PER_FRAME : 101 * SAMPLES_PER_FRAME] = 0.5
    path = write_film(tmp_path / "cut.ts", [numbered(k) for k in range(150)], beep, keyframe_every=40)
    content = path.read_bytes()
    path.write_bytes(content[len(content) // 188 // 5 * 188 :])  # without a fifth of its packets
    shown = numbers(path)
    assert shown == list(range(shown[0], 150)) and shown[0] > 0
    first_loud = int(np.argmax(np.abs(read_audio(path)) > 0.2))
    assert abs(first_loud - (100 - shown[0]) * SAMPLES_PER_FRAME) <= 0.1 * SAMPLES_PER_FRAME


def test_a_video_with_a_gap_of_more_than_30_seconds_is_refused(tmp_path):
    path = write_film(tmp_path / "late.mkv", [numbered(k) for k in range(3)], times=[0, 31, 31.04])
    with pytest.raises(MediaError, match=r"its video jumps from second 0\.0 to 31\.0") as refused:
        list(read_frames(path))
    assert refused.value.kind == "gap in time"


def write_packets(path: Path, times: np.ndarray) -> Path:
    """Writes 20 ms of audio at each of the given times in seconds."""
    piece, tick = AUDIO_SAMPLE_RATE // 50, Fraction(1, AUDIO_SAMPLE_RATE)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=AUDIO_SAMPLE_RATE, layout="mono")
        for time in times:
            frame = av.AudioFrame.from_ndarray(np.full((1, piece), 9000, np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.time_base, frame.pts = AUDIO_SAMPLE_RATE, tick, round(time / tick)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def test_audio_with_pauses_is_kept_and_audio_of_almost_only_gaps_is_refused(tmp_path):
    """Recorded calls have no packets in pauses; but wrong time stamps would create days of silence."""
    quiet = read_audio(write_packets(tmp_path / "call.mkv", np.arange(100) * 0.4))
    assert abs(len(quiet) / AUDIO_SAMPLE_RATE - 39.62) < 0.01 and np.count_nonzero(quiet) <= 100 * 320
    with pytest.raises(MediaError, match="almost only of gaps") as refused:
        read_audio(write_packets(tmp_path / "broken.mkv", np.arange(100) * 20.0))
    assert refused.value.kind == "gap in time"


OPEN_GOP = "keyint=12:min-keyint=12:bframes=4:b-adapt=0:open-gop=1"  # frames shown before a key frame need the last one


@pytest.mark.parametrize(
    ("suffix", "codec", "options"),
    [
        ("mp4", "libx265", {"x265-params": f"log-level=0:{OPEN_GOP}"}),
        ("mkv", "libx264", {"x264-params": OPEN_GOP}),
        ("mp4", "libx264", {"x264-params": "keyint=12:intra-refresh=1"}),  # no key frame after the first
    ],
)
def test_slices_are_exact_without_closed_groups_of_pictures(tmp_path, suffix, codec, options):
    path = write_film(tmp_path / f"clip.{suffix}", [numbered(k) for k in range(60)], codec=codec, options=options)
    for start in range(0, 60, 3):
        assert numbers(path, start, start + 2) == list(range(start, start + 2)), start


def test_a_slice_is_exact_if_the_index_is_broken(tmp_path):
    path = write_film(tmp_path / "clip.mp4", [numbered(k) for k in range(60)])
    content = bytearray(path.read_bytes())
    at = content.index(b"stss") + 12
    content[at : at + 4] = (1 << 31).to_bytes(4, "big")  # number of the first key frame
    path.write_bytes(content)
    with av.open(str(path)) as container, pytest.raises(PermissionError):
        container.seek(10_000, stream=container.streams.video[0])
    assert numbers(path, 30, 33) == [30, 31, 32]


# Audio formats.


def adts(path: Path, rate: int, layout: str) -> bytes:
    """Returns a second of a 300 Hz tone as a raw AAC stream."""
    tone = 0.3 * np.sin(2 * np.pi * 300 * np.arange(rate) / rate)
    with av.open(str(path), "w", format="adts") as container:
        stream = container.add_stream("aac", rate=rate, layout=layout)
        channels = np.stack([tone] * (1 if layout == "mono" else 2)).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(channels, format="fltp", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path.read_bytes()


@pytest.mark.parametrize(("rate", "layout"), [(16_000, "stereo"), (44_100, "mono")])
def test_channels_and_sample_rate_may_change_within_a_file(tmp_path, rate, layout):
    """As in broadcasts, between programmes and advertisements."""
    path = tmp_path / "both.aac"
    path.write_bytes(adts(tmp_path / "first", 16_000, "mono") + adts(tmp_path / "second", rate, layout))
    audio = read_audio(path)
    assert abs(len(audio) / AUDIO_SAMPLE_RATE - 2.1) < 0.15
    for second in (0, 1):
        spectrum = np.abs(np.fft.rfft(audio[second * 16_000 + 4000 :][:8000]))
        assert abs(int(spectrum.argmax()) * 2 - 300) <= 4 and spectrum.max() > 500


@pytest.mark.parametrize(
    ("offset", "value", "reason"),
    [
        (22, (9).to_bytes(2, "little"), "cannot be mixed to one channel"),
        (24, (1 << 30).to_bytes(4, "little"), "invalid sample rate of 1073741824 Hz"),
    ],
)
def test_an_impossible_audio_header_is_refused_before_memory_is_allocated(tmp_path, offset, value, reason):
    path = tmp_path / "audio.wav"
    wavfile.write(path, AUDIO_SAMPLE_RATE, np.ones(9 * 2000, np.int16))
    content = bytearray(path.read_bytes())
    content[offset : offset + len(value)] = value
    path.write_bytes(content)
    with pytest.raises(MediaError, match=reason) as refused:
        read_audio(path)
    assert refused.value.kind == "unreadable"


# Frames and names.


def test_frames_that_are_too_large_for_memory_are_refused(tmp_path):
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
        ((0, 0, 0, 0), 0),  # not a rotation
        ((65_532, 1144, -1144, 65_532), 0),  # by 1 degree
        ((1144, 65_532, -65_532, 1144), -1),  # by 89 degrees, clockwise
    ],
)
def test_a_rotation_is_rounded_to_quarter_turns(tmp_path, matrix, quarters):
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:24] = 255
    path = write_film(tmp_path / "turned.mp4", [picture] * 2, options={"crf": "1"}, rotation=90)
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 44
    a, b, c, d = matrix
    for index, entry in enumerate((a, b, 0, c, d, 0, 0, 0, 1 << 30)):
        content[start + 4 * index : start + 4 * index + 4] = entry.to_bytes(4, "big", signed=True)
    path.write_bytes(content)
    np.testing.assert_allclose(next(read_frames(path)), np.rot90(picture, quarters), atol=20)


# Memory.


@pytest.mark.slow
def test_memory_grows_little_with_the_length_of_the_audio(tmp_path, mini, voice):
    """Reads VmHWM, since getrusage includes the memory of the parent process before it started the child."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux, which reports the peak memory of a process")
    paths = [str(tmp_path / f"{minutes}.wav") for minutes in (1, 6)]
    for path, minutes in zip(paths, (1, 6), strict=True):
        wavfile.write(path, AUDIO_SAMPLE_RATE, np.tile(voice(60), minutes))
    command = [sys.executable, "-c", MEASURE, str(mini), *paths]
    peaks = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert int(peaks[1]) - int(peaks[0]) <= 5 * MAX_GROWTH


# Corruption.


@pytest.fixture(scope="module")
def intact(tmp_path_factory, voice) -> dict[str, bytes]:
    """Suffix -> content of a small file."""
    folder = tmp_path_factory.mktemp("intact")
    pictures, audio = [numbered(k) for k in range(12)], voice(12 / VIDEO_FPS)
    write_video(folder / "a.mp4", pictures, audio, AUDIO_SAMPLE_RATE)
    write_film(folder / "a.avi", pictures, audio, sound_codec="pcm_s16le")
    write_film(folder / "a.ts", pictures, audio)
    wavfile.write(folder / "a.wav", AUDIO_SAMPLE_RATE, (audio * 32_767).astype(np.int16))
    return {path.suffix: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".ts", ".wav"])
@given(data=st.data())
def test_a_corrupted_file_is_read_in_part_or_refused(intact, tmp_path_factory, suffix, data):
    path = tmp_path_factory.mktemp("corrupted") / f"a{suffix}"
    path.write_bytes(data.draw(corrupted(intact[suffix])))
    readers = {
        "count": lambda: 0 * count_frames(path),  # what a corrupted header says, without a bound
        "frames": lambda: sum(1 for _ in read_frames(path)),
        "slice": lambda: sum(1 for _ in read_frames(path, 5, 8)),
        "audio": lambda: len(read_audio(path)) // SAMPLES_PER_FRAME,
    }
    for name, read in readers.items():
        try:
            assert read() <= 40 * VIDEO_FPS * 12, name
        except MediaError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
