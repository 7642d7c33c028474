"""The deterministic figures meet their targets, and measurements are correct."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import ROOT, figures, original, timings, workplace
from benchmarks.__main__ import BenchmarkConfig, main
from benchmarks.memory import LiveStorages
from benchmarks.training import fake_tensors, training, zero_batch
from benchmarks.workplace import Measured, UnavailableError, Workplace
from musetalk.contract import FeatureContract, sync_mel_frames
from musetalk.data.cache import Cache
from musetalk.data.cache_writer import CacheWriter
from musetalk.data.dataset import FaceDataset, Sample
from musetalk.errors import UserError
from musetalk.images import mask_lower_half, to_tensor
from musetalk_trainer import PRESETS, weights

pytestmark = pytest.mark.slow

FIGURES = {figure.name: figure for figure in figures.FIGURES}
SMALL = replace(
    PRESETS["demo"],
    models_dir=ROOT / "models" / "mini",
    batch_size=2,
    chunk_size=1,
    pixel_every=1,
    loss_weights=weights(latent_l1=1.0, pixel_l1=1.0, adv_g=0.1, feat_match=0.1, adv_g_mouth=0.1, feat_match_mouth=0.1),
)


@pytest.fixture
def cache(tmp_path, random_tensors) -> Cache:
    """A random clip with features of Whisper tiny's width."""
    writer = CacheWriter(tmp_path / "cache", FeatureContract())
    metadata = {"source": "a.mp4", "source_bytes": 1, "identity": "a", "last": True}
    writer.write("a", random_tensors(9, states=5, width=384, mels=30, unusable=[4]), metadata)
    return Cache(tmp_path / "cache")


# The figures.


@pytest.mark.parametrize(
    "name",
    [
        "train_tflop_per_sample",
        "train_tflop_per_sample_tiny_decoder",
        "train_gib_b32",
        "train_gib_b32_ckpt",
        "train_gib_b32_chunk16",
        "train_gib_b32_ema",
        "stage2_gib_2x16",
        "personal_gib_b4",
        "adapter_mb",
        "stage1_operators_per_sample",
        "stage2_operators_per_sample",
        "stage2_all_reduces",
        "stage1_host_copies",
        "preprocess_vae_encodes_per_frame",
    ],
)
def test_the_figure_meets_its_target(name, tmp_path):
    value, note = FIGURES[name].measure(Workplace(tmp_path))
    assert FIGURES[name].holds(value), f"{name} is {value}, not {FIGURES[name].target}\n{note}"


def test_the_size_of_a_real_cache_meets_its_target(clips, tmp_path, monkeypatch):
    monkeypatch.setattr(workplace, "SECONDS", 0.4)
    place = Workplace(tmp_path)
    place.clips = [clips / name for name in ("talking_b.mp4", "people/person_5.mp4", "cartoon_no_audio.mp4")]
    assert sorted(place.cache.clips) == ["person_5", "talking_b"]
    assert next(iter(place.cache.clips.values())).tensor("audio_features").shape[1:] == (5, 384)
    for name in ("cache_bytes_per_frame", "cache_files_per_clip"):
        value, _ = FIGURES[name].measure(place)
        assert FIGURES[name].holds(value), value


# The measurements.


def test_storages_are_counted_once_while_alive():
    with LiveStorages() as storages:
        a = torch.zeros(256)  # 1024 bytes
        view = a[:10].view(2, 5)
        b = torch.ones(128, dtype=torch.float16)  # 256 bytes
        assert (storages.current, storages.peak) == (1280, 1280)
        del b
        assert storages.current == 1024
        del a
        assert storages.current == 1024  # kept alive by the view
        c = view + torch.zeros(5)  # 40 bytes, and 20 released at once
        assert (storages.current, storages.peak) == (1064, 1280)
        del view, c
        assert storages.current == 0
        assert storages.at_peak.total() == 1280
        assert all(origin.startswith("tests/test_benchmarks.py test_storages") for origin in storages.at_peak)
        storages.restart()
        torch.zeros(4)
        assert (storages.peak, storages.at_peak.total()) == (16, 16)


def test_a_step_takes_the_same_memory_with_fake_and_real_tensors():
    config = replace(SMALL, gradient_checkpointing=True)
    peaks = []
    with fake_tensors(), LiveStorages() as storages, training(config) as run:
        storages.restart()
        run.step(2)
        peaks.append(storages.peak)
    with LiveStorages() as storages, training(config) as run:
        before = storages.current
        storages.restart()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as allocator:
            run.step(2)
        peaks.append(storages.peak)
    assert peaks[0] == peaks[1]
    events = [event for event in allocator.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]).max()
    assert 1 <= allocated / (peaks[1] - before) < 1.1  # the workspace of kernels is not counted


def test_the_zero_batch_has_the_tensors_of_the_dataset(cache):
    config = replace(SMALL, frames=3, loss_weights=weights(latent_l1=1.0, sync=1.0))
    mel = {"mel_frames": sync_mel_frames(3)}
    dataset = FaceDataset(cache, ["a"], cache.contract, seed=0, slots=2, frames=3, min_reference_gap=1, **mel)
    loaded = next(iter(torch.utils.data.DataLoader(dataset, 2, sampler=range(2))))
    batch = zero_batch(config, 2, 384)
    assert batch.keys() == loaded.keys()
    for name, value in batch.items():
        if name != "where":
            assert (value.shape, value.dtype) == (loaded[name].shape, loaded[name].dtype), name
    assert len(batch["where"]) == len(loaded["where"])


def test_samples_of_the_originals_files_equal_those_of_the_cache(cache, tmp_path):
    original.write_samples(tmp_path / "original", cache)
    assert {path.name for path in (tmp_path / "original/a").iterdir()} == {*original.KINDS, "config.json"}

    class FakeRng:
        """Draws the only clip, the sixth of its eight usable frames, and the third as the reference."""

        def __init__(self) -> None:
            self.answers = {(1,): 0, (8,): 5, (1, 8): 5}

        def integers(self, *bounds: int) -> int:
            return self.answers.pop(bounds)

    theirs = original.read_sample([tmp_path / "original/a"], FakeRng())
    dataset = FaceDataset(cache, ["a"], cache.contract, seed=0, slots=1, min_reference_gap=1)
    ours = dataset.read(Sample("a", 6, (2,), 0, (0,)))
    names = ("masked_latents", "reference_latents", "target_latents", "audio_window")
    for name, value in zip(names, theirs[:4], strict=True):
        torch.testing.assert_close(value, ours[name][0].float(), rtol=0, atol=0)
    torch.testing.assert_close(theirs[4], to_tensor(ours["target_image"])[0])


def test_the_vae_inputs_of_the_original_equal_ours():
    crop = np.random.default_rng(0).integers(256, size=(256, 256, 3), dtype=np.uint8)
    ours = to_tensor(crop[None])
    torch.testing.assert_close(original.vae_input(crop, masked=False), ours)
    torch.testing.assert_close(original.vae_input(crop, masked=True), mask_lower_half(ours))


def test_a_ratio_is_the_median_after_the_warm_up():
    times = iter([0, 100, 101, 200, 206, 208, 300, 309, 312, 400, 408, 409])  # start, middle, end of each repeat
    calls = []
    measured = timings.ratio(lambda: calls.append("a"), lambda: calls.append("b"), 3, clock=lambda: next(times))
    assert measured == Measured(3, "8000 ms over 2000 ms")  # the ratios are 3, 3 and 8
    assert calls == ["a", "b"] * 4


def test_the_table_and_the_json_lines_agree(monkeypatch, capsys):
    def unavailable(_):
        raise UnavailableError("no such machine")

    met = figures.Figure("a", "x", "<=", 2, lambda _: Measured(2, "note"))
    missed = replace(met, name="b", measure=lambda _: Measured(2.5, "note"))
    monkeypatch.setattr("benchmarks.__main__.FIGURES", (met, missed, replace(met, name="c", measure=unavailable)))
    monkeypatch.setattr("benchmarks.__main__.NAMES", list("abc"))
    main(BenchmarkConfig(("a", "b", "c")))
    table, records = re.fullmatch(r"(.*?)\n(\{.*)", capsys.readouterr().out, re.DOTALL).groups()
    for line in ("a 2 x <= 2 yes", "b 2.5 x <= 2 NO", "c - x <= 2 -", "not measured: no such machine"):
        assert line.split() in [row.split() for row in table.splitlines()]
    values = [(record["value"], record["ok"]) for record in map(json.loads, records.splitlines())]
    assert values == [(2, True), (2.5, False), (None, None)]
    with pytest.raises(UserError, match="unknown figure e; choose from a, b, c"):
        main(BenchmarkConfig(("a", "e")))


def test_the_readme_lists_every_figure_and_its_target():
    lines = (ROOT / "benchmarks/README.md").read_text().splitlines()
    rows = [line.split("|") for line in lines if line.startswith("| `")]
    documented = {row[1].strip(" `"): row[2].strip() for row in rows}
    for name, figure in FIGURES.items():
        assert documented[name].replace(",", "") == figure.target, name
