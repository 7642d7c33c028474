"""A folder of unusual and broken videos and names, run through the real script: each is cached or rejected."""

from __future__ import annotations

import io
import os
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from av.stream import Disposition

from datasets_process import PrepareConfig
from datasets_process import main as prepare
from musetalk.contract import AUDIO_SAMPLE_RATE, SAMPLES_PER_FRAME
from musetalk.data.cache import Cache, Clip, verify
from musetalk.data.crop import MIN_FACE
from musetalk.data.video import write_video
from musetalk.errors import printable
from musetalk.files import read_json
from tests.sample import sample_audio, sample_frames

GREY = 90  # of a frame without a face
FRAME_SIZE, MIDDLE, HEAD = 384, 192, 90  # pixels: of square frames, column of the nose, radius of a turning head
YAW = 90 - np.abs(np.linspace(-90, 90, 30))  # degrees: away and back
HIDDEN = range(6, 12)  # frames in which the larger of two people is hidden

# Usable files: number of frames, and the unusable ones among them.
CACHED: dict[str, tuple[int, Sequence[int]]] = {
    "plain": (4, ()),
    "sound cut short": (20, range(10, 20)),
    "sound goes on": (3, ()),
    "leaves for a second": (41, range(8, 33)),
    "two, the smaller left": (8, ()),
    "two, the smaller right": (8, ()),
    "two, the larger hidden": (18, HIDDEN),
    "turned by 90": (4, ()),
    "turned by 180": (4, ()),
    "turned by 270": (4, ()),
    "10 bits": (4, ()),
    "10 bits hevc": (4, ()),
    "full colour": (4, ()),
    "grey": (4, ()),
    "odd": (4, ()),
    "odd old": (4, ()),
    "b-frames": (4, ()),
    "stream": (4, ()),
    "web": (4, ()),
    "cover first": (4, ()),
    "one picture": (1, ()),
    "title in latin-1": (2, ()),
    "people__a__talk": (2, ()),
    "people__b__talk": (2, ()),
    "link out of the folder": (2, ()),
    "linked folder__inside": (2, ()),
    "folder.mp4__inside": (2, ()),
}
# Rejected files: kind, and words of the reason.
REFUSED = {
    "empty": ("unreadable", "cannot be read as video or audio"),
    "text": ("unreadable", "cannot be read as video or audio"),
    "names another file": ("unreadable", "cannot be read as video or audio"),
    "end cut off": ("unreadable", "cannot be read as video or audio"),
    "link to nothing": ("unreadable", "cannot be read"),
    "link to itself": ("unreadable", "cannot be read"),
    "sound only": ("no video", "has no video track"),
    "sound with a cover": ("no video", "has no video track"),
    "no sound": ("no audio", "has no audio track"),
    "nobody": ("no face", f"no face of at least {MIN_FACE} pixels was found"),
    "20 pixels": ("no face", f"no face of at least {MIN_FACE} pixels was found"),
    "picture after 100 s": ("gap in time", "its video jumps from second 0.1 to 100.1"),
    "picture after 3 h": ("gap in time", "its video jumps from second 0.1 to 10800.1"),
    "sound after 100 s": ("gap in time", "its audio jumps from second 0.0 to 100.0"),
    "two recordings": ("gap in time", "its audio jumps"),
    "people__c.mp4": ("same name", "rename one of them"),
}
# File names, all of the same two frames -> clip names.
NAMES = {
    b"with  space.mp4": "with  space",
    b'it\'s "quoted" `$HOME`.mp4': 'it\'s "quoted" `$HOME`',
    "😀 👩‍👩‍👧.mp4".encode(): "😀 👩‍👩‍👧",
    "Имя 名前 اسم.mp4".encode(): "Имя 名前 اسم",
    b"new\nline.mp4": r"new\nline",
    b"\x1b[31mred\x07.mp4": r"\x1b[31mred\x07",
    b"-rf.mp4": "-rf",
    b"..mp4": ".",
    b"...mp4": "..",
    b"100%s #1 %2F.mp4": "100%s #1 %2F",
    b"http:x?y=1.mp4": "http:x?y=1",
    b"bad\xff.mp4": r"bad\udcff",
    b"..\\..\\up.mp4": r"..\..\up",
    b"a..__..__b.mp4": "a..__..__b",
    b"UPPER.MP4": "UPPER",
    b"Mixed.MoV": "Mixed",
    b"people/c.mp4": "people__c",
}
LONG_NAME = "/".join(["d" * 100] * 4 + ["y" * 246 + ".mp4"])


def write_film(
    path: Path,
    pictures: Sequence[np.ndarray],
    sound: np.ndarray | None = None,
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    times: Sequence[float] = (),
    sound_codec: str = "aac",
    sound_start: Fraction = Fraction(0),
    rotation: int = 0,
    rate: Fraction = Fraction(25),
    keyframe_every: int = 12,
    cover: np.ndarray | None = None,
) -> Path:
    """Writes a video with any codec and timing. times: seconds of each frame; sound: mono at 16 kHz."""
    tick = Fraction(1, 90_000) if times else 1 / Fraction(rate)
    with av.open(str(path), "w") as container:
        packets = [] if cover is None else add_cover(container, cover)
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt, stream.gop_size, stream.codec_context.time_base = pix_fmt, keyframe_every, tick
        if rotation:
            stream.set_display_rotation(rotation)
        if sound is not None:
            packets += add_sound(container, sound, sound_codec, sound_start)
        for index, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="bgr24")
            frame.pts, frame.time_base = round(Fraction(times[index]) / tick) if times else index, tick
            packets += stream.encode(frame)
        packets += stream.encode(None)
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            container.mux(packet)
    return path


def add_sound(container: av.container.OutputContainer, sound: np.ndarray, codec: str, start: Fraction) -> list:
    """Adds an audio track and returns its packets."""
    track = container.add_stream(codec, rate=AUDIO_SAMPLE_RATE, layout="mono")
    frame = av.AudioFrame.from_ndarray(sound[None].astype(np.float32), format="fltp", layout="mono")
    frame.sample_rate, frame.time_base = AUDIO_SAMPLE_RATE, Fraction(1, AUDIO_SAMPLE_RATE)
    frame.pts = round(start * AUDIO_SAMPLE_RATE)
    return track.encode(frame) + track.encode(None)


def add_cover(container: av.container.OutputContainer, picture: np.ndarray) -> list:
    """Adds cover art and returns its packet."""
    cover = container.add_stream("mjpeg", rate=25)
    cover.height, cover.width = picture.shape[:2]
    cover.pix_fmt, cover.disposition = "yuvj420p", Disposition.attached_pic
    packet = av.Packet(cv2.imencode(".jpg", picture)[1].tobytes())
    packet.stream, packet.pts, packet.dts, packet.time_base = cover, 0, 0, Fraction(1, 25)
    return [packet]


def squared(picture: np.ndarray) -> np.ndarray:
    """The middle of a frame of the sample, enlarged to a square of `FRAME_SIZE`."""
    return cv2.resize(picture[:, 10:298], (FRAME_SIZE, FRAME_SIZE), interpolation=cv2.INTER_CUBIC)


def turned_head(picture: np.ndarray, degrees: float) -> np.ndarray:
    """Wraps the face around a rotated cylinder: the nose is at MIDDLE + HEAD * sin(degrees)."""
    y, x = np.mgrid[: picture.shape[0], : picture.shape[1]].astype(np.float32)
    angle = np.arcsin(np.clip((x - MIDDLE) / HEAD, -1, 1)) - np.radians(degrees)
    turned = cv2.remap(picture, (MIDDLE + HEAD * angle).astype(np.float32), y, cv2.INTER_LINEAR)
    turned[:, np.abs(x[0] - MIDDLE) >= HEAD] = GREY
    return turned


def shrunk(picture: np.ndarray, size: int) -> np.ndarray:
    return cv2.resize(picture, (size, size), interpolation=cv2.INTER_AREA)


def side_by_side(large: np.ndarray, small: np.ndarray, side: str) -> np.ndarray:
    """Two people in one frame, the smaller one on a side."""
    column = np.full((FRAME_SIZE, 240, 3), GREY, np.uint8)
    column[100:320, 10:230] = shrunk(small, 220)
    return np.hstack([column, large] if side == "left" else [large, column])


@dataclass
class VideoMaker:
    """Writes videos of two people (`first`, `second`: their frames) and a voice into a folder."""

    folder: Path
    first: list[np.ndarray]
    second: list[np.ndarray]
    voice: np.ndarray

    def sound(self, frames: int) -> np.ndarray:
        return self.voice[: frames * SAMPLES_PER_FRAME]

    def write(self, name: str, pictures: Sequence[np.ndarray], **options) -> Path:
        return write_film(self.folder / name, pictures, self.sound(len(pictures)), **options)


def make_broken(videos: VideoMaker) -> None:
    folder, faces = videos.folder, videos.first
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("not a video\n" * 50)
    (folder / "names another file.mp4").write_text("ffconcat version 1.0\nfile plain.mp4\n")
    whole = videos.write("whole.mp4", faces, options={"preset": "ultrafast"}).read_bytes()
    (folder / "whole.mp4").unlink()
    assert whole.index(b"moov") > whole.index(b"mdat")
    (folder / "end cut off.mp4").write_bytes(whole[: len(whole) * 3 // 4])
    write_video(folder / "whole.mp4", faces, videos.sound(len(faces)), AUDIO_SAMPLE_RATE)
    whole = (folder / "whole.mp4").read_bytes()
    (folder / "whole.mp4").unlink()
    assert whole.index(b"moov") < whole.index(b"mdat")
    (folder / "middle cut off.mp4").write_bytes(whole[: len(whole) * 7 // 10])
    (folder / "notes.txt").write_text("neither a video nor named like one")

    for name, covers in (("sound only.mp4", []), ("sound with a cover.mp4", faces[:1])):
        with av.open(str(folder / name), "w") as container:
            packets = [packet for picture in covers for packet in add_cover(container, picture)]
            for packet in packets + add_sound(container, videos.sound(10), "aac", Fraction(0)):
                container.mux(packet)
    write_film(folder / "no sound.mp4", faces[:3])
    write_film(folder / "sound cut short.mkv", faces[:20], videos.sound(10), sound_codec="pcm_s16le")
    write_film(folder / "sound goes on.mp4", faces[:3], videos.sound(100))
    content = videos.write("title in latin-1.mp4", faces[:2]).read_bytes()
    assert content.count(b"Lavf") == 1
    (folder / "title in latin-1.mp4").write_bytes(content.replace(b"Lavf", b"L\xe4vf"))


def make_faces(videos: VideoMaker) -> None:
    first, second = videos.first, videos.second
    nobody = np.full_like(first[0], GREY)
    videos.write("plain.mp4", first[:4])
    videos.write("nobody.mp4", [nobody] * 5)
    videos.write("leaves for a second.mp4", first[:8] + [nobody] * 25 + first[8:16])
    videos.write("turns away.mp4", [turned_head(*pair) for pair in zip(first, YAW, strict=True)])
    small = nobody.copy()
    small[160:208, 160:208] = shrunk(first[0], 48)  # the face is 0.42 of a frame of the sample
    videos.write("20 pixels.mp4", [small] * 3)
    for side in ("left", "right"):
        pairs = zip(first[:8], second[:8], strict=True)
        videos.write(f"two, the smaller {side}.mp4", [side_by_side(*pair, side) for pair in pairs])
    larger = [nobody if k in HIDDEN else first[k] for k in range(18)]
    videos.write(
        "two, the larger hidden.mp4", [side_by_side(*p, "left") for p in zip(larger, second[:18], strict=True)]
    )


def make_formats(videos: VideoMaker) -> None:
    faces = videos.first[:4]
    for degrees in (90, 180, 270):
        videos.write(f"turned by {degrees}.mp4", [np.rot90(f, -degrees // 90).copy() for f in faces], rotation=degrees)
    videos.write("10 bits.mp4", faces, pix_fmt="yuv420p10le")
    videos.write(
        "10 bits hevc.mp4", faces, codec="libx265", pix_fmt="yuv420p10le", options={"x265-params": "log-level=0"}
    )
    videos.write("full colour.mp4", faces, pix_fmt="yuv444p")
    videos.write("grey.mp4", faces, pix_fmt="gray")
    odd = [face[:381, :383] for face in faces]
    videos.write("odd.mkv", odd, codec="ffv1", pix_fmt="bgr0")
    videos.write("odd old.avi", odd, codec="mpeg4", sound_codec="pcm_s16le")
    videos.write("b-frames.avi", faces, options={"bf": "3"}, sound_codec="pcm_s16le")
    videos.write("stream.ts", faces)
    videos.write("web.webm", faces, codec="libvpx-vp9", options={"cpu-used": "8"}, sound_codec="libopus")
    videos.write("cover first.mp4", faces, cover=np.zeros_like(faces[0]))


def make_times(videos: VideoMaker) -> None:
    faces = videos.first[:4]
    videos.write("one picture.mp4", faces[:1])
    for name, late in (("picture after 100 s.mp4", 100), ("picture after 3 h.mp4", 3 * 3600)):
        write_film(videos.folder / name, faces, videos.sound(4), times=[0, 0.04, 0.08, 0.12 + late])
    write_film(videos.folder / "sound after 100 s.mkv", faces, videos.sound(4), sound_start=Fraction(100))
    stream = videos.write("once.ts", videos.first).read_bytes()
    (videos.folder / "two recordings.ts").write_bytes(stream * 2)
    (videos.folder / "once.ts").unlink()


def make_names(videos: VideoMaker, outside: Path) -> None:
    folder = videos.folder
    face = outside / "inside.mp4"
    write_video(face, videos.first[:2], videos.sound(2), AUDIO_SAMPLE_RATE)
    places = [folder / os.fsdecode(name) for name in NAMES] + [folder / LONG_NAME, folder / "people__c.mp4"]
    places += [folder / "people" / "a" / "talk.mp4", folder / "people" / "b" / "talk.mp4"]
    for place in (*places, folder / "folder.mp4" / "inside.mp4"):
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(face, place)
    (folder / "link out of the folder.mp4").symlink_to(face)
    (folder / "link to nothing.mp4").symlink_to(outside / "nothing.mp4")
    (folder / "link to itself.mp4").symlink_to(folder / "link to itself.mp4")
    (folder / "linked folder").symlink_to(outside)
    (folder / "people" / "up").symlink_to(folder)


def state(folder: Path) -> dict[str, tuple]:
    """Mode, size, time and content of everything below a folder."""
    found = {}
    for here, folders, files in os.walk(folder):
        for path in (Path(here, name) for name in folders + files):
            status = path.lstat()
            content = path.read_bytes() if path.is_file() else os.readlink(path) if path.is_symlink() else None
            found[str(path.relative_to(folder))] = (status.st_mode, status.st_size, status.st_mtime_ns, content)
    return found


@dataclass
class Prepared:
    """Input and output of the script."""

    root: Path
    before: dict[str, tuple]
    clips: dict[str, Clip]
    refused: dict[str, dict]
    printed: str


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Prepared:
    root = tmp_path_factory.mktemp("hostile")
    videos, outside = root / "videos", root / "outside"
    videos.mkdir()
    outside.mkdir()
    first, second = ([squared(frame) for frame in sample_frames(index, 0, len(YAW))] for index in range(2))
    maker = VideoMaker(videos, first, second, sample_audio(0, 0, 74))
    for make in (make_broken, make_faces, make_formats, make_times):
        make(maker)
    make_names(maker, outside)
    before = state(root)
    with redirect_stdout(io.StringIO()) as printed:
        prepare(PrepareConfig(hdtf_dir=videos, hdtf_samples_dir=root / "cache"))
    refused = {path.stem: read_json(path) for path in (root / "cache" / "rejected").iterdir()}
    return Prepared(root, before, Cache(root / "cache").clips, refused, printed.getvalue())


def box_middles(clip: Clip) -> np.ndarray:
    """Centre columns of the boxes of usable frames."""
    return clip.tensor("boxes")[clip.usable, 0][:, [0, 2]].mean(axis=1)


def test_every_file_is_either_cached_or_rejected(prepared):
    long = {name for name in prepared.clips if name.endswith("y" * 90)}
    assert len(long) == 1
    others = {"middle cut off", "turns away"} | long
    assert prepared.clips.keys() == CACHED.keys() | set(NAMES.values()) | others
    assert prepared.refused.keys() == REFUSED.keys()
    for record in [*prepared.refused.values(), *(clip.metadata for clip in prepared.clips.values())]:
        assert os.path.lexists(prepared.root / "videos" / record["source"]) and record["last"]


@pytest.mark.parametrize("name", REFUSED)
def test_a_rejected_file_has_a_reason_of_one_line(prepared, name):
    record = prepared.refused[name]
    kind, words = REFUSED[name]
    assert record["kind"] == kind and words in record["reason"]
    assert printable(record["reason"]) == record["reason"] and record["source"] in record["reason"]
    assert f"refused: {record['reason']}\n" in prepared.printed


@pytest.mark.parametrize("name", CACHED)
def test_a_usable_file_is_cached_and_its_unusable_frames_are_marked(prepared, name):
    clip = prepared.clips[name]
    frames, unusable = CACHED[name]
    assert len(clip) == frames and list(np.flatnonzero(~clip.usable)) == list(unusable)


def test_any_file_name_gives_a_valid_clip_name(prepared):
    for source, name in NAMES.items():
        clip = prepared.clips[name]
        assert len(clip) == 2 and clip.usable.all() and os.fsencode(clip.metadata["source"]) == source
    cache = prepared.root / "cache"
    for path in cache.rglob("*"):
        assert path.parent in (cache, cache / "clips", cache / "rejected")
        assert printable(path.name) == path.name and len(path.name.encode()) <= 255


def test_the_summary_counts_files_by_reason(prepared):
    table = prepared.printed.split("count\n")[1].split("\n\n")[0]
    rows = dict(re.findall(r"^(.*?) +(\d+)$", table.split("refused for the reasons")[0], re.MULTILINE))
    kinds = Counter(f"refused: {record['kind']}" for record in prepared.refused.values())
    assert {name: int(count) for name, count in rows.items() if count} == kinds | {"cached": len(prepared.clips)}
    records = [clip.metadata for clip in prepared.clips.values()]
    usable, frames = (sum(record[key] for record in records) for key in ("usable_frames", "frames"))
    assert f"{usable} of {frames} frames usable" in prepared.printed


def test_the_sources_are_unchanged_and_nothing_is_written_outside_the_cache(prepared):
    after = state(prepared.root)
    assert {path: after[path] for path in after if path.split(os.sep)[0] != "cache"} == prepared.before


def test_the_cache_can_be_verified(prepared):
    assert list(verify(prepared.root / "cache")) == [None] * len(prepared.clips)


def test_a_second_run_changes_nothing(prepared):
    made = state(prepared.root / "cache")
    with redirect_stdout(io.StringIO()) as printed:
        prepare(PrepareConfig(hdtf_dir=prepared.root / "videos", hdtf_samples_dir=prepared.root / "cache"))
    assert printed.getvalue().split("count\n")[1] == prepared.printed.split("count\n")[1]
    again = state(prepared.root / "cache")
    assert again.keys() == made.keys()
    for path in made:
        assert again[path][3] == made[path][3]
        assert again[path] == made[path] or not path.startswith("clips")


def test_a_truncated_file_is_cached_up_to_its_end(prepared):
    clip = prepared.clips["middle cut off"]
    assert 10 <= len(clip) < len(YAW) and clip.usable[:8].all()


def test_a_turning_head_is_followed_until_its_face_is_hidden(prepared):
    clip = prepared.clips["turns away"]
    assert len(clip) == len(YAW)
    assert clip.usable[YAW < 40].all() and not clip.usable[YAW > 80].any()
    noses = clip.tensor("landmarks")[clip.usable, 30, 0]
    assert np.abs(noses - (MIDDLE + HEAD * np.sin(np.radians(YAW[clip.usable])))).max() < HEAD / 6
    left, top, right, bottom = clip.tensor("boxes")[clip.usable, 0].T
    assert ((left < noses) & (noses < right)).all()
    assert (right - left).min() > 90 and (bottom - top).min() > 150


@pytest.mark.parametrize(
    ("name", "middle"),
    [
        ("two, the smaller left", 240 + MIDDLE),
        ("two, the smaller right", MIDDLE),
        ("two, the larger hidden", 240 + MIDDLE),
    ],
)
def test_the_larger_of_two_people_is_followed_in_all_frames(prepared, name, middle):
    middles = box_middles(prepared.clips[name])
    assert np.abs(middles - middle).max() < 12
    assert max(abs(a - b) for a, b in pairwise(middles)) < 6


@pytest.mark.parametrize(
    "name",
    [f"turned by {degrees}" for degrees in (90, 180, 270)]
    + ["10 bits", "10 bits hevc", "full colour", "grey", "odd", "odd old", "b-frames", "stream", "web", "cover first"],
)
def test_the_face_is_at_the_same_place_in_every_format(prepared, name):
    plain, clip = prepared.clips["plain"], prepared.clips[name]
    away = np.linalg.norm(clip.tensor("landmarks") - plain.tensor("landmarks"), axis=-1)
    assert away.mean() < 2.5 and away.max() < 10
    for frame in range(4):
        first, second = (cv2.cvtColor(c.image(frame), cv2.COLOR_BGR2GRAY).ravel() for c in (plain, clip))
        assert np.corrcoef(first, second)[0, 1] > 0.9
