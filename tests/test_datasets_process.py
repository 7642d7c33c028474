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
        assert len(clip) == 30 and clip.usable.all() and clip.identity == "grid_s1"
        assert clip.tensor("landmarks").dtype == np.float32
        assert clip.tensor("audio_features").shape == (60, 5, 128)
        assert clip.tensor("mel").shape == (30 * 80 // 25 + 1, 80)
        assert 0.9 < clip.tensor("latents").astype(np.float32).std() < 2
        size = (sample_cache.folder / "clips" / f"{clip.name}.safetensors").stat().st_size
        assert size / len(clip) < 45_000
    assert sample_cache.contract.face_backend == "mediapipe"
    sheet = cv2.imread(str(sample_cache.folder / "contact_sheet.png"))
    assert sheet.shape == (3 * 128, 8 * 128, 3)


def test_runs_give_the_same_bytes_and_completed_clips_are_skipped(small_clips, sample_cache, tmp_path, monkeypatch):
    config = PrepareConfig(hdtf_dir=small_clips, hdtf_samples_dir=tmp_path)
    prepare(config)
    expected = contents(tmp_path)
    assert expected == contents(sample_cache.folder)
    monkeypatch.setattr(datasets_process, "read_audio", None)  # fails if a clip is processed again
    prepare(config)
    assert contents(tmp_path) == expected


def test_an_interrupted_run_is_resumed(small_clips, sample_cache, tmp_path, monkeypatch):
    config = PrepareConfig(hdtf_dir=small_clips, hdtf_samples_dir=tmp_path)
    clip_tensors, calls = datasets_process.clip_tensors, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return clip_tensors(*args)

    monkeypatch.setattr(datasets_process, "clip_tensors", interrupted)
    with pytest.raises(SystemExit) as exit_info:
        run_script(prepare, config)
    assert exit_info.value.code == 130
    assert [path.name for path in (tmp_path / "clips").glob("*.json")] == ["sample_00.json"]
    prepare(config)
    assert contents(tmp_path) == contents(sample_cache.folder)


def test_unusable_videos_are_recorded_and_the_others_are_cached(small_clips, tmp_path, capsys):
    videos = tmp_path / "videos"
    (videos / "deeper folder").mkdir(parents=True)
    source = small_clips / "sample_00.mp4"
    shutil.copy(source, videos / "deeper folder" / "it's me.mp4")
    shutil.copy(source, videos / "deeper folder" / "it's me.mov")
    (videos / "text.mp4").write_text("not a video")
    gray = [np.full((96, 96, 3), 90, np.uint8)] * 10
    write_video(videos / "nobody.mp4", gray, np.zeros(6400, np.float32), 16_000)
    (videos / "notes.txt").write_text("neither a video nor named like one")

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


def test_a_last_part_without_usable_frames_is_rejected(small_clips, tmp_path, monkeypatch):
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

    # A missing part is prepared again with the same bytes.
    for path in (tmp_path / "cache" / "clips").glob("sample_00-0002.*"):
        path.unlink()
    prepare(config)
    assert contents(tmp_path / "cache") == whole


def test_a_missing_folder_of_videos_is_named_with_its_constant(tmp_path):
    with pytest.raises(MediaError, match="nowhere: no such folder; set hdtf_dir"):
        prepare(PrepareConfig(hdtf_dir=tmp_path / "nowhere", hdtf_samples_dir=tmp_path / "cache"))
    assert not list(tmp_path.iterdir())


def test_missing_weights_are_named_with_their_source(small_clips, tmp_path):
    with pytest.raises(WeightsError, match="nowhere/sd-vae-ft-mse/.* is missing; get it from"):
        prepare(PrepareConfig(hdtf_dir=small_clips, hdtf_samples_dir=tmp_path / "cache", models_dir=Path("nowhere")))
    assert [path.name for path in tmp_path.rglob("*")] == ["cache", ".lock"]


INVALID = {
    "hdtf_dir": ["videos", None],
    "hdtf_samples_dir": [None],
    "models_dir": [3],
    "contract": ["v2", None],
    "bbox_shift": [1001, 0.0, True],
    "margins": [(-1,), (0, 0.5), 0],
    "encode_dtype": ["int8", None],
    "face_backend": ["eyes"],
    "device": ["gpu", ""],
    "num_workers": [-1, True],
    "verify": ["yes", 1],
    "identities": ["no", 0],
    "held_out": [0.0, 1.0, "half"],
}


@pytest.mark.parametrize("name", [constant.name for constant in fields(PrepareConfig)])
def test_an_invalid_constant_is_refused_by_name_first(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for stage in ("start_worker", "map_jobs", "find_sources", "folder_lock", "verify_cache", "compare_faces"):
        monkeypatch.setattr(datasets_process, stage, lambda *_: pytest.fail("the run started"))
    for value in INVALID[name]:
        with pytest.raises(UserError, match=rf"^{name}(\.\d)? (cannot be|must) ") as caught:
            prepare(replace(PrepareConfig(), **{name: value}))
        assert repr(value) in str(caught.value) or isinstance(value, tuple)
    assert not list(tmp_path.iterdir())


def test_the_choices_of_constants_are_complete():
    kinds = get_type_hints(PrepareConfig)
    assert get_args(kinds["contract"]) == tuple(CONTRACTS)
    assert get_args(kinds["face_backend"]) == tuple(FACE_BACKENDS)


def test_an_output_path_that_is_a_file_is_refused(small_clips, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit) as exit_info:
        run_script(prepare, PrepareConfig(hdtf_dir=small_clips, hdtf_samples_dir=tmp_path / "file"))
    assert exit_info.value.code == 2
    assert str(tmp_path / "file") in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_a_cache_of_another_contract_is_refused(small_clips, sample_cache):
    config = PrepareConfig(hdtf_dir=small_clips, hdtf_samples_dir=sample_cache.folder, contract="musetalk_v15")
    with pytest.raises(ContractError, match="crop = 'rigid', but 'nose_centred'"):
        prepare(config)


def test_a_folder_without_usable_videos_is_refused(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "text.mp4").write_text("no video")
    with pytest.raises(CacheError, match="no video is usable; the reasons are in .*rejected"):
        prepare(PrepareConfig(hdtf_dir=tmp_path / "videos", hdtf_samples_dir=tmp_path / "cache"))


@pytest.mark.parametrize("name", FACE_BACKENDS)
def test_the_contract_names_the_source_of_the_landmarks(name, mini, monkeypatch):
    monkeypatch.setattr(datasets_process, "load_face_backend", lambda name, *_: name)
    models = datasets_process.load_models(PrepareConfig(models_dir=mini, face_backend=name, device="cpu"))
    assert models.backend == name and models.contract.face_backend == {"mmpose": "dwpose"}.get(name, name)


@pytest.mark.parametrize(
    ("contract", "requested", "supported", "expected"),
    [
        ("rigid", "", True, "bfloat16"),
        ("rigid", "", False, "float32"),
        ("rigid", "bfloat16", False, "bfloat16"),
        ("musetalk_v15", "", True, "float32"),
    ],
)
def test_bfloat16_is_the_default_only_where_the_device_supports_it(
    contract, requested, supported, expected, mini, monkeypatch
):
    monkeypatch.setattr(datasets_process, "supports_bf16", lambda device: supported)
    config = PrepareConfig(models_dir=mini, contract=contract, encode_dtype=requested, device="cpu")
    models = datasets_process.load_models(config)
    assert models.contract.encode_dtype == expected
    assert models.vae.autoencoder.dtype is getattr(torch, expected)


# Several processes.


@pytest.mark.slow
def test_two_processes_give_the_same_bytes_as_one(small_clips, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets_process, "MIN_FRAMES_PER_PROCESS", 1)
    videos = tmp_path / "videos"
    shutil.copytree(small_clips, videos)
    (videos / "deeper").mkdir()
    shutil.copy(videos / "sample_02.mp4", videos / "deeper" / "again.mov")  # the first source of this clip name
    shutil.copy(videos / "sample_01.mp4", videos / "deeper__again.mp4")
    shutil.copy(videos / "sample_00.mp4", videos / "deeper__again.mp4.mp4")  # the name of the rejected one before
    (videos / "text.mp4").write_text("not a video")
    config = PrepareConfig(hdtf_dir=videos, hdtf_samples_dir=tmp_path / "cache")
    prepare(replace(config, num_workers=1))
    expected = contents(config.hdtf_samples_dir)
    shutil.rmtree(config.hdtf_samples_dir)
    prepare(replace(config, num_workers=2))
    assert contents(config.hdtf_samples_dir) == expected
    assert {json.loads(expected[name])["kind"] for name in expected if name.startswith("rejected")} == {
        "same name",
        "unreadable",
    }


@pytest.mark.slow
def test_a_run_with_a_killed_process_is_resumed(small_clips, sample_cache, tmp_path, monkeypatch):
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


# Verification and interruption.


def test_corrupted_clips_are_reported_and_prepared_again(small_clips, sample_cache, tmp_path, capsys):
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
    with pytest.raises(SystemExit) as exit_info:
        run_script(prepare, check)
    assert exit_info.value.code == 2
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


def test_only_a_cache_can_be_verified(tmp_path):
    with pytest.raises(CacheError, match="is not a cache"):
        prepare(PrepareConfig(hdtf_samples_dir=tmp_path / "none", verify=True))
    assert not list(tmp_path.iterdir())


def check_interrupted(folder: Path, code: int, output: str) -> None:
    """Checks the exit code, the output and the files of an interrupted run."""
    assert code == 130 and "Traceback" not in output
    assert output.endswith("\ninterrupted; run the same command again to resume\n")
    assert "contact_sheet.png" not in contents(folder) and not list(folder.rglob("*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_after_ctrl_c_the_same_command_resumes(small_clips, sample_cache, tmp_path, interrupt, processes):
    folder = tmp_path / "cache"
    clips = folder / "clips"
    arguments = ["--hdtf-dir", small_clips, "--hdtf-samples-dir", folder]
    command = [ROOT / "datasets_process.py", *arguments] if processes == 1 else ["-c", TWO_PROCESSES, *arguments[1::2]]
    check_interrupted(folder, *interrupt(command, lambda: clips.is_dir() and any(clips.glob("*.json"))))
    prepare(tyro.cli(PrepareConfig, args=list(map(str, arguments))))
    assert contents(folder) == contents(sample_cache.folder)


@pytest.mark.slow
def test_sigterm_ends_a_run_like_ctrl_c(small_clips, tmp_path):
    """Clusters send it to the first process only."""
    arguments = ["datasets_process.py", "--hdtf-dir", small_clips, "--hdtf-samples-dir", tmp_path / "cache"]
    with open(tmp_path / "output", "w") as output:
        process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=output, stderr=output)
        while not (tmp_path / "cache" / "clips" / "sample_00.json").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.terminate()
    check_interrupted(tmp_path / "cache", process.wait(), (tmp_path / "output").read_text())


@pytest.mark.slow
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
