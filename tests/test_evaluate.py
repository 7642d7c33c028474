"""The evaluation tells good videos from bad ones, judges weights like videos, and names what it cannot measure."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from musetalk.data.video import read_audio, read_frames, write_video
from musetalk.errors import UserError
from musetalk.evaluate import EvaluateConfig, load_candidates, main
from musetalk.evaluation.comparison import Comparison
from musetalk.models.inception import Inception
from musetalk.models.syncnet_v2 import SyncNetV2
from musetalk.models.trained_unet import load_trained_unet
from musetalk.training.checkpoint import save_unet

SAMPLE_RATE = 16_000
UNET = "musetalk/unet.safetensors"


def rewrite(source: Path, target: Path, change) -> None:
    """Writes a video with each frame changed and the same sound."""
    write_video(target, [change(frame) for frame in read_frames(source)], read_audio(source), SAMPLE_RATE)


def blur_and_enlarge(frame: np.ndarray) -> np.ndarray:
    return cv2.resize(cv2.GaussianBlur(frame, (9, 9), 0), None, fx=1.5, fy=1.5)


@pytest.fixture(scope="module")
def cache(make_cache) -> Path:
    return make_cache("rigid").folder


@pytest.fixture
def evaluate(small_clips, cache, tmp_path):
    """A function: constants -> the figures, by protocol, row and column, and the whole JSON."""

    def evaluate(**constants) -> tuple[dict, dict]:
        main(EvaluateConfig(small_clips, output=tmp_path / "out", cache=cache, **constants))
        document = json.loads((tmp_path / "out/evaluation.json").read_text())
        return document["figures"], document

    return evaluate


@pytest.fixture
def finished(small_clips, tmp_path) -> tuple[Path, Path]:
    """Two folders of videos: copies of the true ones, and blurred ones, of which one also speaks another's audio."""
    copies, blurred = tmp_path / "copies", tmp_path / "blurred"
    for clip in sorted(small_clips.glob("*.mp4")):
        rewrite(clip, copies / clip.name, lambda frame: frame)
        rewrite(clip, blurred / clip.name, blur_and_enlarge)
    rewrite(small_clips / "sample_02.mp4", blurred / "sample_00_sample_02.mp4", lambda frame: frame)
    return copies, blurred


def test_finished_videos_of_two_programs_are_compared(evaluate, finished, tmp_path, capsys):
    figures, document = evaluate(videos=finished)
    own, cross = figures["reconstruction"], figures["cross"]
    means = {row: {column: x["mean"] for column, x in columns.items()} for row, columns in (own | cross).items()}
    assert means["psnr"]["copies"] > 35 > means["psnr"]["blurred"]
    assert means["ssim"]["copies"] > means["ssim"]["blurred"]
    assert means["lmd"]["copies"] < means["lmd"]["blurred"] < means["lmd"]["copying"]
    assert means["sharpness_mouth"]["truth"] > means["sharpness_mouth"]["blurred"]
    assert means["r_own_audio"]["copies"] > 0.97 < means["r_own_audio"]["truth"]
    (r,) = (value for value in document["values"]["cross"]["r_other_audio"]["blurred"] if value is not None)
    assert r > 0.9  # of the one that speaks another's audio
    assert "copies" not in cross["r_other_audio"]  # no such videos
    low, high = document["differences"]["blurred - copies"]["reconstruction"]["psnr"]
    assert low < high < 0
    printed = capsys.readouterr().out
    assert "copies against copying, better: psnr (reconstruction)" in printed
    assert "blurred against copies, worse: psnr (reconstruction)" in printed
    assert (tmp_path / "out/evaluation.txt").read_text() in printed
    assert cv2.imread(str(tmp_path / "out/evaluation.png")).shape == (2 * 4 * 128, 8 * 128, 3)


def test_weights_and_musetalks_own_are_judged_in_one_run(evaluate, mini, tmp_path):
    models = tmp_path / "models"
    models.mkdir()
    for path in mini.iterdir():
        (models / path.name).symlink_to(path)
    unet, _ = load_trained_unet(mini / UNET, mini, None)
    (models / "musetalkV15").mkdir()
    torch.save(unet.model.state_dict(), models / "musetalkV15/unet.pth")
    (models / "musetalkV15/musetalk.json").write_bytes((mini / "musetalk/musetalk.json").read_bytes())
    figures, document = evaluate(checkpoint=(models / UNET,), models_dir=models, clips=2, frames=5)
    for column in ("unet", "MuseTalk 1.5"):
        assert {"psnr", "lmd", "csim"} <= {
            row for row, columns in figures["reconstruction"].items() if column in columns
        }
        assert column in figures["cross"]["csim"] and column in figures["silence"]["opening"]
    assert figures["reconstruction"]["psnr"]["unet"] != figures["reconstruction"]["psnr"]["MuseTalk 1.5"]
    assert "chance" in figures["cross"] and "MuseTalk 1.5 - unet" in document["differences"]
    assert figures["reconstruction"]["csim"]["copying"]["mean"] > figures["reconstruction"]["csim"]["truth"]["mean"]


def test_published_networks_are_used_if_they_are_there(evaluate, finished, mini, tmp_path, monkeypatch):
    _, document = evaluate(videos=finished[:1], clips=1)
    assert {note.split(";")[0] for note in document["notes"]} == {
        "not measured: lpips",
        "not measured: lse_c, lse_d, lse_offset",
        "not measured: fid",
    }
    models = tmp_path / "models"
    for folder in ("syncnet", "inception"):
        (models / folder).mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(SyncNetV2().state_dict(), models / "syncnet/syncnet_v2.model")
    torch.save(Inception().state_dict(), models / "inception/pt_inception-2015-12-05-6726825d.pth")
    (models / "sface").symlink_to(mini / "sface")
    figures, document = evaluate(videos=finished[:1], clips=1, models_dir=models)
    assert all(figures["reconstruction"]["lse_d"][column]["mean"] > 0 for column in ("truth", "copying", "copies"))
    assert "fid" not in figures["reconstruction"]
    assert any(note.startswith("not measured: fid; of fewer than 2000 frames") for note in document["notes"])
    for module in ("evaluator", "frechet_distance"):
        monkeypatch.setattr(f"musetalk.evaluation.{module}.MIN_FRAMES", 5)
    figures, _ = evaluate(videos=finished[:1], clips=1, models_dir=models)
    fid = {column: figure["mean"] for column, figure in figures["reconstruction"]["fid"].items()}
    assert fid.keys() == {"copying", "copies"} and fid["copies"] < fid["copying"]


def test_what_cannot_be_judged_is_refused_in_one_sentence(evaluate, finished, small_clips):
    with pytest.raises(UserError, match="nothing to evaluate"):
        evaluate()
    copies, _ = finished
    with pytest.raises(UserError, match="no clip 'sample_3'"):
        evaluate(videos=(copies,), names=("sample_3",))
    with pytest.raises(UserError, match=r"has no video named like a true one, such as sample_0\d\.mp4"):
        evaluate(videos=(small_clips.parent,))
    with pytest.raises(UserError, match="two sides are named copies"):
        evaluate(videos=(copies, copies))
    rewrite(small_clips / "sample_01.mp4", copies / "sample_01.mp4", lambda frame: frame[:, :200])
    with pytest.raises(UserError, match=r"sample_01\.mp4 has other proportions"):
        evaluate(videos=(copies,))
    frames = list(read_frames(small_clips / "sample_01.mp4", 0, 4))
    write_video(copies / "sample_01.mp4", frames, np.zeros(4 * 640, np.float32), SAMPLE_RATE)
    with pytest.raises(UserError, match=r"sample_01\.mp4 has fewer than"):
        evaluate(videos=(copies,))


def test_clips_that_training_holds_out_or_that_are_named_are_judged(make_cache, evaluate, finished):
    """All clips show one identity, so that clips are split."""
    _, document = evaluate(videos=finished[:1], held_out_share=0.1)
    assert len(document["clips"]) == 1
    _, document = evaluate(videos=finished[:1], names=("sample_01",))
    assert list(document["clips"]) == ["sample_01"]


def test_weights_of_one_name_are_told_apart_by_their_folders(mini, make_cache, tmp_path):
    """A contract on the command line is for weights without one, here of another contract than those with one."""
    unet, contract = load_trained_unet(mini / UNET, mini)
    paths = [save_unet(tmp_path / name, 1, unet.model.state_dict(), contract) for name in "ab"]
    torch.save(unet.model.state_dict(), tmp_path / "released.pth")
    config = EvaluateConfig(tmp_path, checkpoint=(*paths, tmp_path / "released.pth"), contract="musetalk_v15")
    candidates = load_candidates(config, [])
    assert [candidate.name for candidate in candidates] == ["a/unet-0000001", "b/unet-0000001", "released"]
    crops = [candidate.pipeline.contract.crop for candidate in candidates]
    assert crops == [contract.crop, contract.crop, "nose_centred"] and contract.crop == "rigid"


# The comparison.


def compare(**columns: list[float]) -> Comparison:
    """A comparison of the LMD of columns in six clips of three people."""
    comparison = Comparison(list("abcdef"), ["x", "x", "y", "y", "z", "z"], ["truth", "copying", *columns], [])
    for column, values in columns.items():
        for index, value in enumerate(values):
            comparison.store("reconstruction", "lmd", column, index, value)
    return comparison


def test_better_is_said_only_where_the_paired_interval_excludes_0():
    base = [0.1, 0.5, 0.2, 0.9, 0.3, 0.4]  # far more different between clips than the columns are
    slightly_lower = [value - 0.01 for value in base]
    mixed = [0.11, 0.51, 0.19, 0.89, 0.3, 0.4]
    assert list(compare(a=base, b=slightly_lower).verdicts()) == ["b against a, better: lmd (reconstruction)"]
    assert list(compare(a=slightly_lower, b=base).verdicts()) == ["b against a, worse: lmd (reconstruction)"]
    assert list(compare(a=base, b=mixed).verdicts()) == ["b against a, not shown: lmd (reconstruction)"]


def test_intervals_are_over_people_and_clips_without_a_figure_are_left_out():
    comparison = compare(a=[1.0, 1.0, 2.0, 2.0, 3.0, float("nan")])
    ((_, _, _, figure),) = comparison.figures()
    assert figure["mean"] == pytest.approx(9 / 5)
    assert 1 <= figure["low"] < 9 / 5 < figure["high"] <= 3
    assert comparison.as_json()["values"]["reconstruction"]["lmd"]["a"][-1] is None
