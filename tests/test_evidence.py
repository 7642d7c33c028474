"""The ablations: every recipe can be trained, clips are held out, and the report compares them correctly."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

import musetalk_trainer
from benchmarks.evidence import __main__ as program
from benchmarks.evidence import pieces, report
from benchmarks.evidence.__main__ import EvidenceConfig, main
from benchmarks.evidence.pieces import AdjacentReferences, Piece, split
from benchmarks.evidence.recipes import FRAMES, MATERIALS, RECIPES, SEEDS, Material
from benchmarks.evidence.report import Measure, cell, write_report
from musetalk.errors import UserError
from musetalk.models.trained_unet import find_unet, read_unet_contract

LOW, HIGH = Measure("", "", dict.get, 0), Measure("", "", dict.get, np.inf)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Redirects all files to a temporary folder."""
    monkeypatch.setattr(pieces, "WORK", tmp_path / "work")
    monkeypatch.setattr(pieces, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "FOLDER", tmp_path)
    return tmp_path


def write_unfit_expert(material: str) -> None:
    """Writes the result of a sync expert that failed its check."""
    path = Piece("expert", (material, "1")).result
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"accuracy": 0.53, "offset": 14, "confidence": 0.1, "fault": "it guesses"}))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_steps_and_frames_of_its_baseline(name):
    config, baseline = RECIPES[name].config, RECIPES[RECIPES[name].baseline].config
    musetalk_trainer.check_config(config)
    frames, baseline_frames = (c.batch_size * c.grad_accum_steps * c.frames for c in (config, baseline))
    assert frames == baseline_frames and frames % FRAMES == 0
    assert config.num_steps == baseline.num_steps and config.pixel_every == baseline.pixel_every
    assert RECIPES[name].after == RECIPES[RECIPES[name].baseline].after
    assert config.loss_weights["lpips"] == 0


@pytest.mark.parametrize("material", MATERIALS)
def test_every_baseline_is_trained(material):
    recipes = MATERIALS[material].recipes
    assert {RECIPES[name].baseline for name in recipes} <= set(recipes) <= RECIPES.keys()


def test_the_same_clips_are_held_out_with_every_seed(sample_cache, monkeypatch):
    monkeypatch.setitem(MATERIALS, "sample", replace(MATERIALS["sample"], held_out=("sample_01",)))
    for seed in SEEDS:
        train, held, note = split("sample", sample_cache, 0.5, seed)
        assert held == ["sample_01"] and set(train) == sample_cache.clips.keys() - {"sample_01"}
        assert "sample_01" in note


def test_adjacent_references_are_the_nearest_usable_frames(sample_cache):
    dataset = AdjacentReferences(sample_cache, list(sample_cache.clips), sample_cache.contract, seed=0, slots=4)
    for step in range(10):
        sample = dataset.draw(step, 0)
        clip = sample_cache.clips[sample.clip]
        reference = sample.references[0]
        assert reference != sample.start and clip.usable[reference]
        between = slice(min(reference, sample.start) + 1, max(reference, sample.start))
        assert not clip.usable[between].any()


def test_a_training_that_starts_from_another_is_measured_and_reported(root, sample_cache, monkeypatch):
    """From an untrained UNet through the real trainer to the report, without positional encoding and expert."""
    short = {"num_steps": 1, "pixel_every": 1, "batch_size": 1, "positional_encoding": False}
    first = replace(RECIPES["stage1"], config=replace(RECIPES["stage1"].config, **short))
    then = replace(RECIPES["adversarial"], config=replace(RECIPES["adversarial"].config, **short, adaptive_every=0))
    monkeypatch.setitem(RECIPES, "stage1", first)
    monkeypatch.setitem(RECIPES, "further", then)
    monkeypatch.setitem(MATERIALS, "sample", Material("A few.", root, ("sample_01",), ("stage1", "further")))
    monkeypatch.setattr(pieces, "FRAMES_MEASURED", 6)
    shutil.copytree(sample_cache.folder, Piece("cache", ("sample", "rigid")).folder)
    write_unfit_expert("sample")
    last = Piece("measurement", ("sample", "further", "1"))
    assert [piece.kind for piece in last.needs if not piece.ruled_out] == ["expert", "training"]
    for kind, recipe in (("training", "stage1"), ("training", "further"), ("measurement", "further")):
        main(EvidenceConfig((kind, "sample", recipe, "1")))

    weights = pieces.weights_folder("sample", "further", "1")
    assert not read_unet_contract(find_unet(weights)).positional_encoding
    result = json.loads(last.result.read_text())
    assert len(result["openings"][0]["prediction"]) == 6 and result["figures"]["psnr_mouth"] > 5
    assert last.done and not Piece("measurement", ("sample", "further", "2")).done
    text = write_report().read_text()
    assert f"| {result['figures']['psnr_mouth']:.3g} ± 0 |" in text and "starts from `stage1`" in text
    assert (root / "sample.png").exists() and (root / "results/truth-sample.jpg").exists()


def test_dependencies_are_run_once_and_first(root, monkeypatch):
    """Runs threads with tasks that only write their results."""
    done = []

    def run(piece: Piece) -> None:
        assert all(dependency.done or dependency.ruled_out for dependency in piece.needs)
        done.append(piece)
        for path in (piece.result, piece.folder.with_suffix(".done")):
            path.parent.mkdir(exist_ok=True)
            path.write_text('{"fault": ""}')

    monkeypatch.setattr(program, "run", run)
    monkeypatch.setattr(program, "write_report", lambda: "")
    monkeypatch.setitem(MATERIALS, "clips", replace(MATERIALS["clips"], videos=root / "nowhere"))
    main(EvidenceConfig())
    kinds = Counter(piece.kind for piece in done)
    assert kinds == {
        "cache": 2,
        "expert": 2,
        "decoder": 1,
        "training": 3 * len(RECIPES),
        "measurement": 3 * len(RECIPES),
    }
    assert len(set(done)) == len(done)
    main(EvidenceConfig())
    assert sum(kinds.values()) == len(done)


def test_only_what_is_better_with_every_seed_is_marked_better():
    low, high = np.array([1.0, 1.1, 1.2]), np.array([1.3, 1.4, 1.5])
    assert cell(low, high, LOW) == "**1.1 ± 0.1**" and cell(high, low, LOW) == "*1.4 ± 0.1*"
    assert cell(low, high, HIGH).startswith("*1") and cell(high, low, HIGH).startswith("**")
    assert cell(low, low + 0.15, LOW) == "1.1 ± 0.1"
    assert cell(-low, high, LOW).startswith("**")  # closer to 0
    assert cell(low[:2], high, LOW) == "1.05 ± 0.05"  # a seed is missing


def test_an_unfit_expert_rules_out_its_recipes(root):
    assert not pieces.unfit("clips")
    write_unfit_expert("clips")
    assert pieces.unfit("clips") and Piece("training", ("clips", "sync", "1")).ruled_out
    assert Piece("expert", ("clips", "2")).ruled_out and not Piece("training", ("clips", "stage1", "1")).ruled_out
    assert "accuracy 0.53, audio offset +14 frames" in report.experts("clips")


def test_unknown_tasks_are_refused():
    with pytest.raises(UserError, match="not 'bake'"):
        main(EvidenceConfig(("bake", "sample")))
