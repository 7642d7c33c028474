"""Recipes of the ablations are comparable and can be trained, and the report compares them correctly."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace

import numpy as np
import pytest

import musetalk_trainer
from ablations import report, tasks
from ablations.__main__ import AblationsConfig, main
from ablations.recipes import ALL, MATERIALS, MEASURING_EXPERT, RECIPES, SEEDS, TRAINING_EXPERT, Material
from ablations.report import Measure, cell, write_report
from ablations.tasks import Task, cache_task, choose_clips, stages
from musetalk.contract import VIDEO_FPS
from musetalk.errors import UserError
from musetalk.models.trained_unet import find_unet, read_unet_contract

LOW, HIGH = Measure("", "", dict.get, 0), Measure("", "", dict.get, np.inf)
MATERIAL_RECIPES = [(material, name) for material in MATERIALS for name in MATERIALS[material].recipes]


@pytest.fixture
def work(tmp_path, monkeypatch):
    """Redirects all files to a temporary folder."""
    for module in (tasks, report):
        monkeypatch.setattr(module, "WORK", tmp_path)
    return tmp_path


def write_result(task: Task, values: dict) -> None:
    task.result.parent.mkdir(parents=True, exist_ok=True)
    task.result.write_text(json.dumps(values))


def write_expert(expert: tuple[str, str, str], fault: str) -> None:
    """Writes the result of the check of a sync expert."""
    check = {"accuracy": 0.53, "offset": 14, "confidence": 0.1, "fault": fault}
    write_result(Task("expert", ("one", *expert)), check)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_start_and_samples_of_its_baseline(name):
    config, baseline = RECIPES[name].config, RECIPES[RECIPES[name].baseline].config
    musetalk_trainer.check_config(config)
    frames, baseline_frames = (c.batch_size * c.grad_accum_steps * c.frames for c in (config, baseline))
    assert frames == baseline_frames and config.pixel_every == baseline.pixel_every
    assert config.start_from == baseline.start_from and config.loss_weights["lpips"] == 0


@pytest.mark.parametrize("material", MATERIALS)
def test_every_baseline_and_start_is_trained(material):
    recipes = MATERIALS[material].recipes
    starts = {RECIPES[name].config.start_from for name in recipes} - {""}
    assert {RECIPES[name].baseline for name in recipes} | starts <= set(recipes) <= RECIPES.keys()


def test_tasks_come_after_those_that_they_need(work):
    order = [{task.name for task in stage} for stage in stages()]
    position = {name: index for index, stage in enumerate(order) for name in stage}
    assert len(position) == sum(map(len, order))
    for material, name in MATERIAL_RECIPES:
        training = position[f"training-{material}-{name}-1"]
        assert training < position[f"measurement-{material}-{name}-1"]
        assert training > position[cache_task(material, name).name]
        assert training > max(position[task] for task in position if task.startswith(f"expert-{material}"))
        if start := RECIPES[name].config.start_from:
            assert training > position[f"training-{material}-{start}-1"]
        if (encoder := RECIPES[name].encoder) != "small":
            assert position[cache_task(material, name).name] > position[f"models-{encoder}"]


def test_only_recipes_close_to_their_baseline_have_three_seeds(work):
    r = {"stage1": 0.5, "original": 0.46, "random_references": 0.4, "further": 0.5, "discriminators": 0.6}
    for name, value in r.items():
        write_result(Task("measurement", ("one", name, "1")), {"figures": {"r_other_audio": value}})
    trained = [task.arguments for stage in stages() for task in stage if task.kind == "training"]
    three = {(material, name) for material, name, seed in trained if seed == str(SEEDS[-1])}
    assert three == {("one", "stage1"), ("one", "original")}


@dataclass(frozen=True)
class Minute:
    """Stands for a clip of a minute."""

    name: str
    identity: str

    def __len__(self) -> int:
        return 60 * VIDEO_FPS


def test_identities_take_turns_until_the_minutes_are_full():
    clips = [Minute(f"{identity}{number}", identity) for identity in "aaaab" for number in range(3)]
    material = Material("", ("a", "b"), ("held",), 1, (), ())
    held, other = Minute("h", "held"), Minute("o", "other")
    chosen = {minutes: choose_clips([*clips, held, other], material, minutes) for minutes in (ALL, 2, 5)}
    assert set(chosen[ALL]) == {*clips, held} and all(held in found for found in chosen.values())
    assert sorted(clip.identity for clip in chosen[2]) == ["a", "b", "held"]
    assert sorted(clip.identity for clip in chosen[5]) == ["a", "a", "a", "b", "b", "held"]


@pytest.mark.slow
def test_a_training_that_starts_from_another_is_measured_and_reported(work, sample_cache, monkeypatch):
    """From the links of a cache through the real trainer to the report, without a sync expert."""
    short = {"num_steps": 1, "pixel_every": 1, "batch_size": 1, "positional_encoding": False, "adaptive_every": 0}
    for name in ("further", "stage1", "discriminators"):
        monkeypatch.setitem(RECIPES, name, replace(RECIPES[name], config=replace(RECIPES[name].config, **short)))
    recipes = ("stage1", "further", "discriminators")
    monkeypatch.setitem(MATERIALS, "one", Material("A few.", (), ("held",), 1, (), recipes))
    for module, name, value in (
        (tasks, "FURTHER_STEPS", 1),
        (tasks, "FRAMES_MEASURED", 6),
        (tasks, "CACHE", work / "c"),
    ):
        monkeypatch.setattr(module, name, value)
    shutil.copytree(sample_cache.folder, work / "c")
    record = work / "c/clips/sample_01.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"identity": "held"}))
    for name in ("cache-one-rigid-small-0", "training-one-stage1-1", "training-one-discriminators-1"):
        main(AblationsConfig(name))
    for name in ("measurement-one-discriminators-1", "measurement-one-stage1-1"):
        main(AblationsConfig(name))

    weights = tasks.weights_folder("one", "discriminators", "1")
    assert not read_unet_contract(find_unet(weights)).positional_encoding
    log = (weights.parent / "log/trainer.log").read_text()
    assert "starts from " in log and "2 clips to train on; held out 1 of 2 identities: sample_01" in log
    measurement = Task("measurement", ("one", "discriminators", "1"))
    result = json.loads(measurement.result.read_text())
    assert [clip["clip"] for clip in result["openings"]] == ["sample_01"]
    assert len(result["openings"][0]["prediction"]) == 6 and result["figures"]["psnr_mouth"] > 5
    assert f"| {result['figures']['psnr_mouth']:.3g} |" in write_report().read_text()
    assert (work / "one-openings.png").exists() and (measurement.folder / "truth.jpg").exists()


def test_only_what_is_better_with_every_seed_is_marked_better():
    low, high = np.array([1.0, 1.1, 1.2]), np.array([1.3, 1.4, 1.5])
    assert cell(low, high, LOW) == "**1.1 ± 0.1**" and cell(high, low, LOW) == "*1.4 ± 0.1*"
    assert cell(low, high, HIGH).startswith("*1") and cell(high, low, HIGH).startswith("**")
    assert cell(low, low + 0.15, LOW) == "1.1 ± 0.1"
    assert cell(-low, high, LOW).startswith("**")  # closer to 0
    assert cell(low[:1], high, LOW) == "**1**" and cell(low, high[:1], LOW) == "1.1 ± 0.1"  # a baseline of one seed


def test_recipes_with_a_sync_loss_are_skipped_unless_both_experts_are_fit(work):
    def ruled_out() -> set[str]:
        return {name for name in RECIPES if Task("training", ("one", name, "1")).ruled_out}

    assert ruled_out() == {"sync"}
    for expert in (TRAINING_EXPERT, MEASURING_EXPERT):
        write_expert(expert, "")
    assert ruled_out() == set()
    write_expert(MEASURING_EXPERT, "it guesses")
    assert ruled_out() == {"sync"}
    assert "accuracy 0.53, audio offset +14 frames" in report.experts("one")


def test_an_unknown_task_is_refused(work):
    with pytest.raises(UserError, match="'training-sample' is not a task of the ablations; name one like"):
        main(AblationsConfig("training-sample"))
