"""The real script on real and made-up videos: what it writes, what it refuses, that it goes on where it stopped."""

import json
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

import datasets_process
import musetalk.crop
from datasets_process import PrepareConfig, find_videos, read_identities
from datasets_process import main as prepare
from musetalk.cache import Cache, CacheError
from musetalk.contract import ContractError
from musetalk.script import run_script
from musetalk.video import MediaError, read_audio, read_frames, write_video
from musetalk.weights import WeightsError


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_cache_of_the_sample(sample_cache):
    assert sorted(path for path in contents(sample_cache.folder) if not path.startswith("clips")) == [
        "contact_sheet.png",
        "contract.json",
    ]
    assert list(sample_cache.clips) == ["sample_00", "sample_01", "sample_02"]
    for clip in sample_cache.clips.values():
        assert len(clip) == 30 and clip.usable.all() and clip.identity == "astronaut"
        assert clip.tensor("audio_features").shape == (60, 5, 64)
        assert clip.tensor("mel").shape == (30 * 80 // 25 + 1, 80)
        assert 0.9 < clip.tensor("latents").astype(np.float32).std() * 1 < 1.6
        size = (sample_cache.folder / "clips" / f"{clip.name}.safetensors").stat().st_size
        assert size / len(clip) < 45_000
    sheet = cv2.imread(str(sample_cache.folder / "contact_sheet.png"))
    assert sheet.shape == (3 * 128, 8 * 128, 3)


def test_two_runs_give_the_same_bytes_and_a_third_does_nothing(small_clips, sample_cache, tmp_path, monkeypatch):
    config = PrepareConfig(hdtf_dir=small_clips, hdtf_samples_dir=tmp_path)
    prepare(config)
    made = contents(tmp_path)
    assert made == contents(sample_cache.folder)
    monkeypatch.setattr(datasets_process, "read_audio", None)  # would fail if anything were made again
    prepare(config)
    assert contents(tmp_path) == made


def test_it_goes_on_after_an_interruption(small_clips, sample_cache, tmp_path, monkeypatch):
    config = PrepareConfig(hdtf_dir=small_clips, hdtf_samples_dir=tmp_path)
    encode_jpegs, calls = datasets_process.encode_jpegs, []

    def interrupted(images):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode_jpegs(images)

    monkeypatch.setattr(datasets_process, "encode_jpegs", interrupted)
    with pytest.raises(SystemExit) as leaving:
        run_script(prepare, config)
    assert leaving.value.code == 130
    assert [path.name for path in (tmp_path / "clips").glob("*.json")] == ["sample_00.json"]
    prepare(config)
    assert contents(tmp_path) == contents(sample_cache.folder)


def test_bad_videos_are_recorded_and_the_rest_is_cached(small_clips, tmp_path, capsys):
    videos = tmp_path / "videos"
    (videos / "deeper folder").mkdir(parents=True)
    source = small_clips / "sample_00.mp4"
    shutil.copy(source, videos / "deeper folder" / "it's me.mp4")
    shutil.copy(source, videos / "deeper folder" / "it's me.mov")
    (videos / "text.mp4").write_text("this is no video")
    gray = [np.full((96, 96, 3), 90, np.uint8)] * 10
    write_video(videos / "nobody.mp4", gray, np.zeros(6400, np.float32), 16_000)
    (videos / "notes.txt").write_text("not a video, and not named like one")

    cache_dir = tmp_path / "cache"
    prepare(PrepareConfig(hdtf_dir=videos, hdtf_samples_dir=cache_dir))
    cache = Cache(cache_dir)
    assert list(cache.clips) == ["deeper folder__it's me"]
    assert cache.clips["deeper folder__it's me"].identity == "deeper folder/it's me"
    refused = {path.stem: json.loads(path.read_text()) for path in (cache_dir / "rejected").iterdir()}
    assert {name: record["kind"] for name, record in refused.items()} == {
        "text": "unreadable",
        "nobody": "no face",
        "deeper folder__it's me.mp4": "same name",
    }
    assert refused["text"]["reason"].startswith(f"{videos / 'text.mp4'}: cannot be read")
    printed = capsys.readouterr().out
    for outcome in ("cached", "refused: no face", "refused: same name", "refused: unreadable"):
        assert re.search(rf"^{outcome} +1$", printed, re.MULTILINE)
    assert contents(videos)["deeper folder/it's me.mp4"] == source.read_bytes()


def test_frames_without_face_or_audio_are_unusable(small_clips, tmp_path):
    frames = list(read_frames(small_clips / "sample_00.mp4"))
    frames[4:7] = [np.full_like(frames[0], 90)] * 3
    audio = read_audio(small_clips / "sample_00.mp4")
    write_video(tmp_path / "videos" / "gaps.mp4", frames, audio, 16_000)
    prepare(PrepareConfig(hdtf_dir=tmp_path / "videos", hdtf_samples_dir=tmp_path / "cache"))
    clip = Cache(tmp_path / "cache").clips["gaps"]
    assert list(np.flatnonzero(~clip.usable)) == [4, 5, 6]
    assert not clip.tensor("latents", 4, 7).any() and not clip.tensor("boxes", 4, 7).any()
    assert clip.tensor("latents", 3, 4).any()
    with pytest.raises(CacheError, match="frame 5"):
        clip.image(5)


def test_a_long_video_becomes_several_clips(small_clips, tmp_path, monkeypatch):
    for module in (datasets_process, musetalk.crop):
        monkeypatch.setattr(module, "MAX_CLIP_FRAMES", 12)
    videos = tmp_path / "videos"
    videos.mkdir()
    shutil.copy(small_clips / "sample_00.mp4", videos)
    config = PrepareConfig(hdtf_dir=videos, hdtf_samples_dir=tmp_path / "cache")
    prepare(config)
    whole = contents(tmp_path / "cache")
    clips = Cache(tmp_path / "cache").clips
    assert {name: len(clip) for name, clip in clips.items()} == {
        "sample_00-0000": 12,
        "sample_00-0001": 12,
        "sample_00-0002": 6,
    }
    assert [clip.about["start"] for clip in clips.values()] == [0, 12, 24]
    assert {clip.identity for clip in clips.values()} == {"sample_00"}
    assert clips["sample_00-0001"].tensor("audio_features").shape[0] == 24

    # A part that is lost is made again, to the same bytes.
    for path in (tmp_path / "cache" / "clips").glob("sample_00-0002.*"):
        path.unlink()
    prepare(config)
    assert contents(tmp_path / "cache") == whole


def test_without_videos_of_ones_own_the_sample_is_made(mini, tmp_path, monkeypatch, capsys):
    made = []

    def fake_sample(folder):
        made.append(folder)
        folder.mkdir(parents=True)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets_process, "make_sample", fake_sample)
    with pytest.raises(MediaError, match="no video in it"):
        prepare(PrepareConfig(models_dir=mini))
    assert made == [Path("data/sample")]
    assert "making the built-in sample (set hdtf_dir" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hdtf_dir": Path("nowhere")}, MediaError, "nowhere: there is no such folder; set hdtf_dir"),
        ({"models_dir": Path("nowhere")}, WeightsError, "nowhere/sd-vae-ft-mse/config.json is missing; get it from"),
        ({"contract": "v2"}, ContractError, "contract must be one of rigid"),
        ({"face_backend": "eyes"}, ValueError, "face_backend must be"),
        ({"margins": (-1,)}, ContractError, "margins must be"),
        ({"encode_dtype": "int8"}, ContractError, "encode_dtype must be one of float32"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(small_clips, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        prepare(PrepareConfig(**{"hdtf_dir": small_clips, "hdtf_samples_dir": tmp_path} | change))
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_a_file_is_one_sentence(small_clips, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit) as leaving:
        run_script(prepare, PrepareConfig(hdtf_dir=small_clips, hdtf_samples_dir=tmp_path / "file"))
    assert leaving.value.code == 2
    assert str(tmp_path / "file") in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_a_cache_made_under_other_rules_is_refused(small_clips, sample_cache):
    config = PrepareConfig(hdtf_dir=small_clips, hdtf_samples_dir=sample_cache.folder, contract="musetalk_v15")
    with pytest.raises(ContractError, match="crop = 'rigid', but 'nose_centred'"):
        prepare(config)


def test_nothing_usable_ends_in_a_sentence(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "text.mp4").write_text("no video")
    with pytest.raises(CacheError, match="no video could be used; the reasons are in .*rejected"):
        prepare(PrepareConfig(hdtf_dir=tmp_path / "videos", hdtf_samples_dir=tmp_path / "cache"))


def test_identities_must_be_names(tmp_path):
    (tmp_path / "identities.json").write_text('{"a": 1}')
    with pytest.raises(MediaError, match='identities.json: must be one object of "path without ending"'):
        read_identities(tmp_path)


def test_videos_are_found_in_all_subfolders_in_order(tmp_path):
    for name in ("b.MP4", "a/z.mov", "a/b/c.mkv", "d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [path.relative_to(tmp_path).as_posix() for path in find_videos(tmp_path)] == [
        "a/b/c.mkv",
        "a/z.mov",
        "b.MP4",
    ]


def test_real_clips(clips, tmp_path):
    """Part of the clips of ../shared: HEVC, variable frame rate, MPEG-4 Part 2, no audio, a subfolder."""
    videos = tmp_path / "videos"
    (videos / "people").mkdir(parents=True)
    shutil.copy(clips / "identities.json", videos)
    for name in ("talking_a", "WDA_AlexandriaOcasioCortez_000", "cartoon_no_audio", "people/person_7"):
        shutil.copy(clips / f"{name}.mp4", videos / f"{name}.mp4")
    prepare(PrepareConfig(hdtf_dir=videos, hdtf_samples_dir=tmp_path / "cache", encode_dtype="bfloat16"))
    cache = Cache(tmp_path / "cache")
    assert list(cache.clips) == ["WDA_AlexandriaOcasioCortez_000", "people__person_7", "talking_a"]
    assert [len(clip) for clip in cache.clips.values()] == [200, 316, 153]
    assert all(clip.usable.mean() >= 0.95 for clip in cache.clips.values())
    assert cache.clips["WDA_AlexandriaOcasioCortez_000"].identity == "WDA_AlexandriaOcasioCortez"
    refused = json.loads((tmp_path / "cache" / "rejected" / "cartoon_no_audio.json").read_text())
    assert refused["kind"] == "no audio" and "has no audio track" in refused["reason"]
    sizes = [clip.about["bytes"] for clip in cache.clips.values()]
    assert sum(sizes) / sum(len(clip) for clip in cache.clips.values()) < 45_000
