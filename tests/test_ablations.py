"""Recipes of the ablations are comparable and can be trained, and the report compares them correctly."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

import musetalk_trainer
from ablations import report, tasks
from ablations.__main__ import AblationsConfig, main
from ablations.recipes import FRAMES, MATERIALS, RECIPES, SEEDS, Material
from ablations.report import Measure, cell, write_report
from ablations.tasks import Task, stages
from musetalk.errors import UserError
from musetalk.models.trained_unet import find_unet, read_unet_contract

LOW, HIGH = Measure("", "", dict.get, 0), Measure("", "", dict.get, np.inf)


@pytest.fixture
def work(tmp_path, monkeypatch):
    """Redirects all files to a temporary folder."""
    for module in (tasks, report):
        monkeypatch.setattr(module, "WORK", tmp_path)
    return tmp_path


def write_unfit_expert() -> None:
    """Writes the result of a sync expert that failed its check."""
    path = Task("expert", "sample", ("1",)).result
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"accuracy": 0.53, "offset": 14, "confidence": 0.1, "fault": "it guesses"}))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_start_steps_and_frames_of_its_baseline(name):
    config, baseline = RECIPES[name].config, RECIPES[RECIPES[name].baseline].config
    musetalk_trainer.check_config(config)
    frames, baseline_frames = (c.batch_size * c.grad_accum_steps * c.frames for c in (config, baseline))
    assert frames == baseline_frames and frames % FRAMES == 0
    assert config.num_steps == baseline.num_steps and config.pixel_every == baseline.pixel_every
    assert config.start_from == baseline.start_from


@pytest.mark.parametrize("material", MATERIALS)
def test_every_baseline_and_start_is_trained(material):
    recipes = MATERIALS[material].recipes
    starts = {RECIPES[name].config.start_from for name in recipes} - {""}
    assert {RECIPES[name].baseline for name in recipes} | starts <= set(recipes) <= RECIPES.keys()


def test_tasks_come_after_those_that_they_need():
    order = [{task.name for task in stage} for stage in stages()]
    position = {name: index for index, stage in enumerate(order) for name in stage}
    assert len(position) == sum(map(len, order))
    for name, recipe in RECIPES.items():
        for seed in SEEDS:
            training = position[f"training-sample-{name}-{seed}"]
            assert training < position[f"measurement-sample-{name}-{seed}"]
            assert training > position[f"cache-sample-{recipe.config.contract}"]
            assert training > max(position["expert-sample-1"], position["decoder-sample"])
            if recipe.config.start_from:
                assert training > position[f"training-sample-{recipe.config.start_from}-{seed}"]


@pytest.mark.slow
def test_a_training_that_starts_from_another_is_measured_and_reported(work, sample_cache, monkeypatch):
    """From an untrained UNet through the real trainer to the report, without a sync expert."""
    short = {"num_steps": 1, "pixel_every": 1, "batch_size": 1, "positional_encoding": False, "adaptive_every": 0}
    for name in ("stage1", "adversarial"):
        monkeypatch.setitem(RECIPES, name, replace(RECIPES[name], config=replace(RECIPES[name].config, **short)))
    material = Material("A few.", work, ("sample_01",), ("stage1", "adversarial"))
    monkeypatch.setitem(MATERIALS, "sample", material)
    monkeypatch.setattr(tasks, "FRAMES_MEASURED", 6)
    shutil.copytree(sample_cache.folder, Task("cache", "sample", ("rigid",)).folder)
    write_unfit_expert()
    for name in ("training-sample-stage1-1", "training-sample-adversarial-1", "measurement-sample-adversarial-1"):
        main(AblationsConfig(name))

    weights = tasks.weights_folder("sample", "adversarial", "1")
    assert not read_unet_contract(find_unet(weights)).positional_encoding
    log = (weights.parent / "log/trainer.log").read_text()
    assert "starts from " in log and "held out 1 of 3 clips (all clips show one identity): sample_01" in log
    measurement = Task("measurement", "sample", ("adversarial", "1"))
    result = json.loads(measurement.result.read_text())
    assert [clip["clip"] for clip in result["openings"]] == ["sample_01"]
    assert len(result["openings"][0]["prediction"]) == 6 and result["figures"]["psnr_mouth"] > 5
    assert f"| {result['figures']['psnr_mouth']:.3g} ± 0 |" in write_report().read_text()
    assert (work / "sample.png").exists() and (measurement.folder / "truth.jpg").exists()


def test_only_what_is_better_with_every_seed_is_marked_better():
    low, high = np.array([1.0, 1.1, 1.2]), np.array([1.3, 1.4, 1.5])
    assert cell(low, high, LOW) == "**1.1 ± 0.1**" and cell(high, low, LOW) == "*1.4 ± 0.1*"
    assert cell(low, high, HIGH).startswith("*1") and cell(high, low, HIGH).startswith("**")
    assert cell(low, low + 0.15, LOW) == "1.1 ± 0.1"
    assert cell(-low, high, LOW).startswith("**")  # closer to 0
    assert cell(low[:2], high, LOW) == "1.05 ± 0.05"  # a seed is missing


def test_recipes_with_a_sync_loss_are_skipped_if_an_expert_is_unfit(work):
    skipped = {name: Task("training", "sample", (name, "1")) for name in RECIPES}
    assert not any(task.ruled_out for task in skipped.values())
    write_unfit_expert()
    skipped = {name for name, task in skipped.items() if task.ruled_out}
    assert skipped == {"sync", "stage2", "four_windows_sync"}
    assert "accuracy 0.53, audio offset +14 frames" in report.experts("sample")


def test_an_unknown_task_is_refused():
    with pytest.raises(UserError, match="'training-sample' is not a task of the ablations; name one like"):
        main(AblationsConfig("training-sample"))
