"""The command dubs the chosen person of a video, previews its start, and refuses what it cannot use in one sentence."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import tyro

from musetalk.cli import run_script
from musetalk.contract import AUDIO_SAMPLE_RATE, RIGID, SAMPLES_PER_FRAME, VIDEO_FPS
from musetalk.data.video import read_audio, read_frames, write_video
from musetalk.dub import DubConfig, main
from musetalk.errors import UserError
from musetalk.models.tiny_decoder import TinyDecoder, save_tiny_decoder
from musetalk.models.unet import build_unet
from musetalk.models.vae import load_vae
from musetalk.training.checkpoint import save_unet

FRAMES = 8  # their sound fills whole AAC frames


@pytest.fixture(scope="module")
def checkpoint(mini, tmp_path_factory) -> Path:
    """An untrained UNet, saved like a trained one."""
    contract = replace(RIGID, vae=load_vae(mini, torch.device("cpu"), torch.float32).fingerprint)
    unet = build_unet(mini, 0, contract.positional_encoding)
    return save_unet(tmp_path_factory.mktemp("checkpoint"), 1, unet.model.state_dict(), contract)


@pytest.fixture(scope="module")
def couple(small_clips, tmp_path_factory) -> Path:
    """A video of two people: a large face on the right, half as large a face on the left."""
    frames = []
    for frame in islice(read_frames(small_clips / "sample_00.mp4"), FRAMES):
        left = np.full_like(frame, 90)
        small = cv2.resize(frame, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
        left[: len(small), : small.shape[1]] = small
        frames.append(np.hstack([left, frame]))
    path = tmp_path_factory.mktemp("couple") / "couple.mp4"
    write_video(path, frames, np.zeros(FRAMES * SAMPLES_PER_FRAME, np.float32), AUDIO_SAMPLE_RATE)
    return path


@pytest.fixture
def dub(couple, small_clips, checkpoint, mini, tmp_path):
    """A function: constants -> the dubbed video, for a speech of FRAMES frames in the soundtrack of another video."""
    speech = tmp_path / "speech.mp4"
    write_video(
        speech,
        islice(read_frames(small_clips / "sample_01.mp4"), FRAMES),
        read_audio(small_clips / "sample_01.mp4"),
        AUDIO_SAMPLE_RATE,
    )

    def run(**constants) -> Path:
        defaults = {"video": couple, "audio": speech, "output": tmp_path / "out.mp4"}
        config = DubConfig(**defaults | {"checkpoint": checkpoint, "models_dir": mini} | constants)
        main(config)
        return config.output

    return run


def changes(video: Path, source: Path) -> tuple[float, float]:
    """Share of the values that differ by more than 40 of 255 in the left and in the right half of two videos."""
    pairs = zip(read_frames(video), read_frames(source), strict=True)
    left, right = np.split(np.array([cv2.absdiff(a, b) > 40 for a, b in pairs]), 2, axis=2)
    return left.mean(), right.mean()


@pytest.mark.parametrize(("face", "dubbed"), [(None, "right"), (1, "left"), (2, "right")])
def test_only_the_chosen_person_is_dubbed(dub, couple, capsys, face, dubbed):
    output = dub(face=face)
    left, right = changes(output, couple)
    assert (left > 0, right > 0) == (dubbed == "left", dubbed == "right")
    printed = capsys.readouterr().out
    assert ("--face 1 to 2" in printed) == (face is None)
    assert f"wrote {output}: {FRAMES} frames" in printed


def test_a_preview_is_the_start_of_the_video(dub, couple):
    assert sum(1 for _ in read_frames(dub(preview=2 / VIDEO_FPS))) == 2
    assert sum(1 for _ in read_frames(dub(preview=60.0))) == FRAMES


def test_without_an_output_the_names_of_both_inputs_are_used(dub, couple, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dub(output=None, preview=0.01)
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["couple_speech.mp4"]


def test_a_tiny_decoder_replaces_that_of_the_vae_and_its_loss_is_printed(dub, mini, tmp_path, capsys):
    vae = load_vae(mini, torch.device("cpu"), torch.float32)
    save_tiny_decoder(tmp_path / "tiny.safetensors", TinyDecoder(4), vae)
    full = list(read_frames(dub()))
    assert "tiny decoder" not in capsys.readouterr().out
    tiny = list(read_frames(dub(tiny_decoder=tmp_path / "tiny.safetensors")))
    assert any(np.abs(a.astype(int) - b).max() > 40 for a, b in zip(full, tiny, strict=True))
    assert re.search(r"tiny decoder's faces have a PSNR of \d+\.\d dB", capsys.readouterr().out)


def test_a_number_without_a_person_is_refused(dub):
    with pytest.raises(UserError, match=r"couple.mp4: face cannot be 3.* is 2;"):
        dub(face=3)


@pytest.mark.parametrize("name", ["video", "audio"])
def test_an_input_is_not_overwritten(dub, couple, tmp_path, name):
    path = couple if name == "video" else tmp_path / "speech.mp4"
    before = path.read_bytes()
    (tmp_path / "link.mp4").symlink_to(path)
    for output in (path, tmp_path / "link.mp4"):
        with pytest.raises(UserError, match=f"would replace .*{path.name}"):
            dub(output=output)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("constants", "message"),
    [
        ({"output": Path("out.avi")}, "output is out.avi.*mp4"),
        ({"audio": Path("none.wav")}, "none.wav: cannot be read"),
        ({"video": Path("none.mp4")}, "none.mp4: cannot be read"),
        ({"checkpoint": Path("none.safetensors")}, "none.safetensors is neither a file"),
        ({"face": 0}, "face cannot be 0"),
        ({"tiny_decoder": Path("none.safetensors")}, "none.safetensors cannot be read as a tiny decoder"),
        ({"preview": 0.0}, "preview cannot be 0"),
    ],
)
def test_what_cannot_be_used_is_refused(dub, tmp_path, constants, message):
    with pytest.raises(UserError, match=message):
        dub(**constants)
    assert not (tmp_path / "out.mp4").exists()


def test_the_command_line_ends_with_code_2_and_one_sentence(tmp_path, capsys):
    arguments = ["face.mp4", str(tmp_path / "none.wav"), "-o", "out.mp4"]
    with pytest.raises(SystemExit) as exit_:
        run_script(main, tyro.cli(DubConfig, args=arguments))
    assert exit_.value.code == 2
    assert "none.wav" in capsys.readouterr().err
