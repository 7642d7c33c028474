"""The real script on real and made-up videos: what it writes, what it refuses, that it goes on where it stopped."""

from __future__ import annotations

import json
import multiprocessing
import re
import shutil
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args, get_type_hints

import cv2
import numpy as np
import pytest
import torch
import tyro
from tqdm import tqdm

import datasets_process
import musetalk.data.crop
from datasets_process import PrepareConfig
from datasets_process import main as prepare
from musetalk.cli import run_script
from musetalk.contract import CONTRACTS, RIGID, SAMPLES_PER_FRAME, ContractError
from musetalk.data.audio import audio_features, audio_windows
from musetalk.data.cache import Cache, CacheError, Clip
from musetalk.data.dataset import read_windows
from musetalk.data.face import FACE_BACKENDS
from musetalk.data.video import MediaError, read_audio, read_frames, write_video
from musetalk.errors import UserError
from musetalk.models.audio_encoder import load_audio_encoder
from musetalk.models.weights import WeightsError

ROOT = Path(__file__).parents[1]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_cache_of_the_sample(sample_cache):
    assert sorted(path for path in contents(sample_cache.folder) if not path.startswith("clips")) == [
        ".lock",
        "contact_sheet.png",
        "contract.json",
    ]
    assert list(sample_cache.clips) == ["sample_00", "sample_01", "sample_02"]
    for clip in sample_cache.clips.values():
        assert len(clip) == 30 and clip.usable.all() and clip.identity == "astronaut"
        assert clip.tensor("landmarks").dtype == np.float32
        assert clip.tensor("audio_features").shape == (60, 5, 64)
        assert clip.tensor("mel").shape == (30 * 80 // 25 + 1, 80)
        assert 0.9 < clip.tensor("latents").astype(np.float32).std() * 1 < 1.6
        size = (sample_cache.folder / "clips" / f"{clip.name}.safetensors").stat().st_size
        assert size / len(clip) < 45_000
    assert sample_cache.contract.face_backend == "mediapipe"
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
    clip_tensors, calls = datasets_process.clip_tensors, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return clip_tensors(*args)

    monkeypatch.setattr(datasets_process, "clip_tensors", interrupted)
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


def check_audio(clip: Clip, source: Path, models_dir: Path) -> None:
    """Checks that a clip has the source's audio, and at each usable frame the audio window that inference computes."""
    start, samples = SAMPLES_PER_FRAME * clip.metadata["start"], SAMPLES_PER_FRAME * (len(clip) + 30)
    padded = np.pad(read_audio(source), (SAMPLES_PER_FRAME * 15, samples))
    np.testing.assert_array_equal(clip.tensor("audio") / np.float32(2**15), padded[start : start + samples])
    features = audio_features(read_audio(source), load_audio_encoder(models_dir, "cpu"), RIGID)
    for edge in ("zero", "clamp"):
        contract = replace(RIGID, window_edge=edge)
        for frame in np.flatnonzero(clip.usable):
            window = audio_windows(features, [clip.metadata["start"] + frame], contract)
            np.testing.assert_array_equal(read_windows(clip, frame, frame + 1, contract), window)


def test_audio_longer_than_the_video_is_used_at_its_end(small_clips, write_source, voice, mini, tmp_path):
    (tmp_path / "videos").mkdir()
    pictures = list(read_frames(small_clips / "sample_00.mp4"))[:10]
    source = write_source(tmp_path / "videos" / "a.mp4", pictures, audio=voice(0.8))
    prepare(PrepareConfig(hdtf_dir=tmp_path / "videos", hdtf_samples_dir=tmp_path / "cache"))
    clip = Cache(tmp_path / "cache").clips["a"]
    assert len(clip) == 10 and clip.usable.all() and clip.rows("audio_features") == 24
    check_audio(clip, source, mini)


def test_a_last_part_that_is_all_edge_is_refused(small_clips, tmp_path, monkeypatch):
    for module in (datasets_process, musetalk.data.crop):
        monkeypatch.setattr(module, "MAX_CLIP_FRAMES", 28)
    (tmp_path / "videos").mkdir()
    shutil.copy(small_clips / "sample_00.mp4", tmp_path / "videos")
    config = PrepareConfig(hdtf_dir=tmp_path / "videos", hdtf_samples_dir=tmp_path / "cache")
    prepare(config)
    assert [len(clip) for clip in Cache(tmp_path / "cache").clips.values()] == [28]
    record = json.loads((tmp_path / "cache" / "rejected" / "sample_00-0001.json").read_text())
    assert record["kind"] == "too short" and record["last"]
    assert "sample_00.mp4: no face with audio more than 2 frames after second 1" in record["reason"]


def test_a_long_video_becomes_several_clips(small_clips, mini, tmp_path, monkeypatch):
    for module in (datasets_process, musetalk.data.crop):
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
    assert [clip.metadata["start"] for clip in clips.values()] == [0, 12, 24]
    assert {clip.identity for clip in clips.values()} == {"sample_00"}

    # A window reaches two frames back, which are in the clip before, and two ahead, whose features are kept.
    assert [clip.rows("audio_features") for clip in clips.values()] == [28, 28, 12]
    assert [np.flatnonzero(~clip.usable).tolist() for clip in clips.values()] == [[], [0, 1], [0, 1]]
    for clip in clips.values():
        check_audio(clip, videos / "sample_00.mp4", mini)

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
    with pytest.raises(MediaError, match="contains no videos"):
        prepare(PrepareConfig(models_dir=mini))
    assert made == [Path("data/sample")]
    assert "rendering the built-in sample (set hdtf_dir" in capsys.readouterr().out


def test_without_its_folder_of_videos_it_says_which_constant_to_set(tmp_path):
    with pytest.raises(MediaError, match="nowhere: no such folder; set hdtf_dir"):
        prepare(PrepareConfig(hdtf_dir=tmp_path / "nowhere", hdtf_samples_dir=tmp_path / "cache"))
    assert not list(tmp_path.iterdir())


def test_without_weights_it_says_where_to_get_them(small_clips, tmp_path):
    with pytest.raises(WeightsError, match="nowhere/sd-vae-ft-mse/.* is missing; get it from"):
        prepare(PrepareConfig(hdtf_dir=small_clips, hdtf_samples_dir=tmp_path / "cache", models_dir=Path("nowhere")))
    assert [path.name for path in tmp_path.rglob("*")] == ["cache", ".lock"]


NO_PATH = ["videos", "", None, 3, b"videos"]
UNFIT = {
    "hdtf_dir": NO_PATH,
    "hdtf_samples_dir": NO_PATH,
    "models_dir": NO_PATH,
    "contract": ["v2", "", "Rigid", None, 1, ["rigid"]],
    "bbox_shift": [1001, -1001, 0.0, True, "0", None, float("nan")],
    "margins": [(-1,), (1001,), (0, 0.5), (True,), ("0",), [0], 0, None, "0"],
    "encode_dtype": ["int8", "float16", None, 32],
    "face_backend": ["eyes", "", None, 1],
    "device": ["gpu", "", "meta", None, 0],
    "num_workers": [-1, 513, 1.0, True, "4", None],
    "verify": ["yes", 1, 0, None],
}


@pytest.mark.parametrize("name", [constant.name for constant in fields(PrepareConfig)])
def test_an_unfit_constant_is_refused_by_name_before_anything_is_done(name, tmp_path, monkeypatch):
    """A constant without an entry in UNFIT fails."""
    monkeypatch.chdir(tmp_path)
    for stage in ("start_worker", "map_jobs", "find_sources", "make_sample", "folder_lock", "verify_cache"):
        monkeypatch.setattr(datasets_process, stage, lambda *_: pytest.fail("it went on"))
    for value in UNFIT[name]:
        with pytest.raises(UserError, match=rf"^{name}(\.\d)? (cannot be|must) ") as caught:
            prepare(replace(PrepareConfig(), **{name: value}))
        assert repr(value) in str(caught.value) or isinstance(value, tuple)
    assert not list(tmp_path.iterdir())


def test_the_choices_of_constants_are_those_there_are():
    kinds = get_type_hints(PrepareConfig)
    assert get_args(kinds["contract"]) == tuple(CONTRACTS)
    assert get_args(kinds["face_backend"]) == tuple(FACE_BACKENDS)
    for name in get_args(kinds["encode_dtype"]):
        assert not name or replace(RIGID, encode_dtype=name).encode_dtype == name


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
    with pytest.raises(CacheError, match="no video is usable; the reasons are in .*rejected"):
        prepare(PrepareConfig(hdtf_dir=tmp_path / "videos", hdtf_samples_dir=tmp_path / "cache"))


@pytest.mark.parametrize("name", FACE_BACKENDS)
def test_the_contract_says_whose_landmarks_made_the_boxes(name, mini, monkeypatch):
    monkeypatch.setattr(datasets_process, "load_face_backend", lambda *given: given[0])
    tools = datasets_process.load_models(PrepareConfig(models_dir=mini, face_backend=name, device="cpu"))
    assert tools.backend == name and tools.contract.face_backend == {"mmpose": "dwpose"}.get(name, name)


@pytest.mark.parametrize(
    ("contract", "asked", "known", "made"),
    [
        ("rigid", "", True, "bfloat16"),
        ("rigid", "", False, "float32"),
        ("rigid", "bfloat16", False, "bfloat16"),
        ("musetalk_v15", "", True, "float32"),
    ],
)
def test_bfloat16_is_only_chosen_where_the_device_computes_in_it(contract, asked, known, made, mini, monkeypatch):
    monkeypatch.setattr(datasets_process, "supports_bf16", lambda device: known)
    config = PrepareConfig(models_dir=mini, contract=contract, encode_dtype=asked, device="cpu")
    tools = datasets_process.load_models(config)
    assert tools.contract.encode_dtype == made
    assert tools.vae.autoencoder.dtype is getattr(torch, made)


# Several processes.


def test_two_processes_give_the_same_bytes_as_one_whatever_is_bad_or_has_one_name(small_clips, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets_process, "MIN_FRAMES_PER_PROCESS", 1)
    videos = tmp_path / "videos"
    shutil.copytree(small_clips, videos)
    (videos / "deeper").mkdir()
    shutil.copy(videos / "sample_02.mp4", videos / "deeper" / "again.mov")  # the first of this name
    shutil.copy(videos / "sample_01.mp4", videos / "deeper__again.mp4")
    shutil.copy(videos / "sample_00.mp4", videos / "deeper__again.mp4.mp4")  # as the one before is when refused
    (videos / "text.mp4").write_text("this is no video")
    config = PrepareConfig(hdtf_dir=videos, hdtf_samples_dir=tmp_path / "cache")
    prepare(replace(config, num_workers=1))
    made = contents(config.hdtf_samples_dir)
    shutil.rmtree(config.hdtf_samples_dir)
    prepare(replace(config, num_workers=2))
    assert contents(config.hdtf_samples_dir) == made
    assert {json.loads(made[name])["kind"] for name in made if name.startswith("rejected")} == {
        "same name",
        "unreadable",
    }


def test_a_killed_process_loses_nothing(small_clips, sample_cache, tmp_path, monkeypatch):
    class Killing(tqdm):
        def update(self, count=1):
            before = self.n
            super().update(count)
            if before <= 20 < self.n:
                multiprocessing.active_children()[0].kill()

    monkeypatch.setattr(datasets_process, "MIN_FRAMES_PER_PROCESS", 1)
    monkeypatch.setattr(datasets_process, "tqdm", Killing)
    config = PrepareConfig(hdtf_dir=small_clips, hdtf_samples_dir=tmp_path, num_workers=2)
    with pytest.raises(UserError, match="was killed while processing sample_0"):
        prepare(config)
    monkeypatch.setattr(datasets_process, "tqdm", tqdm)
    prepare(config)
    assert contents(tmp_path) == contents(sample_cache.folder)


TWO_PROCESSES = """
import sys
from pathlib import Path
import datasets_process
from musetalk.cli import run_script
datasets_process.MIN_FRAMES_PER_PROCESS = 1
config = datasets_process.PrepareConfig(*map(Path, sys.argv[1:]), num_workers=2)
run_script(datasets_process.main, config)
"""


# Verifying, and mending what it finds.


def test_a_cache_is_verified_and_mended_by_the_same_command(small_clips, sample_cache, tmp_path, capsys):
    folder = tmp_path / "cache"
    shutil.copytree(sample_cache.folder, folder)
    config = PrepareConfig(hdtf_dir=small_clips, hdtf_samples_dir=folder)
    check = replace(config, verify=True)
    run_script(prepare, check)
    assert capsys.readouterr().out == f"{folder}: all 3 clips are intact\n"

    record, tensors = folder / "clips" / "sample_01.json", folder / "clips" / "sample_01.safetensors"
    content = bytearray(tensors.read_bytes())
    content[len(content) // 2] ^= 1
    tensors.write_bytes(content)
    (folder / "clips" / "sample_02.safetensors").unlink()
    with pytest.raises(SystemExit) as leaving:
        run_script(prepare, check)
    assert leaving.value.code == 2
    printed = capsys.readouterr()
    assert [line.partition(" ")[0] for line in printed.out.splitlines()] == [
        str(tensors),
        str(folder / "clips" / "sample_02.safetensors"),
    ]
    assert f"{folder}: 2 of 3 clips are corrupted; delete the records named above" in printed.err

    record.unlink()
    (folder / "clips" / "sample_02.json").unlink()
    prepare(config)
    assert contents(folder) == contents(sample_cache.folder)
    run_script(prepare, check)


def test_without_a_cache_there_is_nothing_to_verify(tmp_path):
    with pytest.raises(CacheError, match="is not a cache"):
        prepare(PrepareConfig(hdtf_samples_dir=tmp_path / "none", verify=True))
    assert not list(tmp_path.iterdir())


def ended_well(folder: Path, code: int, words: str) -> dict[str, bytes]:
    """Check how an interrupted run has ended; gives what it left."""
    assert code == 130 and "Traceback" not in words
    assert words.endswith("\ninterrupted; run the same command again to resume\n")
    left = contents(folder)
    assert "contact_sheet.png" not in left and not [name for name in left if name.endswith(".partial")]
    return left


@pytest.mark.parametrize("processes", [1, 2])
def test_after_ctrl_c_the_same_command_ends_as_if_there_had_been_none(
    small_clips, sample_cache, tmp_path, interrupt, processes
):
    folder = tmp_path / "cache"
    clips = folder / "clips"
    arguments = ["--hdtf-dir", small_clips, "--hdtf-samples-dir", folder]
    command = [ROOT / "datasets_process.py", *arguments] if processes == 1 else ["-c", TWO_PROCESSES, *arguments[1::2]]
    ended_well(folder, *interrupt(command, lambda: clips.is_dir() and any(clips.glob("*.json"))))
    prepare(tyro.cli(PrepareConfig, args=list(map(str, arguments))))
    assert contents(folder) == contents(sample_cache.folder)


def test_the_sigterm_of_a_cluster_is_as_ctrl_c(small_clips, tmp_path):
    """It comes to the first process alone."""
    arguments = ["datasets_process.py", "--hdtf-dir", small_clips, "--hdtf-samples-dir", tmp_path / "cache"]
    with open(tmp_path / "words", "w") as words:
        process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=words, stderr=words)
        while not (tmp_path / "cache" / "clips" / "sample_00.json").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.terminate()
    ended_well(tmp_path / "cache", process.wait(), (tmp_path / "words").read_text())


def test_real_clips(clips, tmp_path):
    """Part of the clips of ../shared: HEVC, variable frame rate, MPEG-4 Part 2, no audio, a subfolder."""
    videos = tmp_path / "videos"
    (videos / "people").mkdir(parents=True)
    shutil.copy(clips / "identities.json", videos)
    for name in ("talking_a", "WDA_AlexandriaOcasioCortez_000", "cartoon_no_audio", "people/person_7"):
        shutil.copy(clips / f"{name}.mp4", videos / f"{name}.mp4")
    prepare(PrepareConfig(hdtf_dir=videos, hdtf_samples_dir=tmp_path / "cache"))
    cache = Cache(tmp_path / "cache")
    assert list(cache.clips) == ["WDA_AlexandriaOcasioCortez_000", "people__person_7", "talking_a"]
    assert [len(clip) for clip in cache.clips.values()] == [200, 316, 153]
    assert all(clip.usable.mean() >= 0.95 for clip in cache.clips.values())
    assert cache.clips["WDA_AlexandriaOcasioCortez_000"].identity == "WDA_AlexandriaOcasioCortez"
    refused = json.loads((tmp_path / "cache" / "rejected" / "cartoon_no_audio.json").read_text())
    assert refused["kind"] == "no audio" and "has no audio track" in refused["reason"]
    sizes = [clip.metadata["bytes"] for clip in cache.clips.values()]
    assert sum(sizes) / sum(len(clip) for clip in cache.clips.values()) < 45_000
