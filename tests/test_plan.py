"""The plan: what it measures with small networks, what it finds, and that it leaves nothing behind."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path, PurePath

import pytest
import torch

import musetalk_trainer
import syncnet_trainer
from datasets_process import PrepareConfig, process_count
from musetalk.check import Finding
from musetalk.data.sources import Source
from musetalk.errors import UserError
from musetalk.models.lpips import VGG16, Heads
from musetalk.models.syncnet import build_syncnet, save_syncnet
from tools.plan.command import PlanConfig, check_identities, main, plan
from tools.plan.costs import Cost, check_reading, check_space, table
from tools.plan.preparing import choose_videos, time_preparing
from tools.plan.trainings import EXPERT, loss_networks

TRAININGS = [f"syncnet_{EXPERT}", "stage1", "stage2"]
SOURCE = Source(PurePath("sample_00.mp4"), "grid_s1", 30)


@pytest.fixture
def config(small_clips, mini, tmp_path, monkeypatch) -> PlanConfig:
    """A plan with `small_clips` and no cache, in which networks of losses and batches are small."""
    widths = (4,) * 5
    for module in ("musetalk.models.lpips", "tools.plan.trainings"):
        monkeypatch.setattr(f"{module}.VGG16", partial(VGG16, widths))
        monkeypatch.setattr(f"{module}.Heads", partial(Heads, widths))
    for name in ("stage1", "stage2"):
        small = replace(musetalk_trainer.PRESETS[name], batch_size=1, discriminator_width=4, num_workers=0)
        monkeypatch.setitem(musetalk_trainer.PRESETS, name, small)
    expert = replace(syncnet_trainer.PRESETS[EXPERT], architecture="latentsync_narrow", batch_size=2, num_workers=0)
    monkeypatch.setitem(syncnet_trainer.PRESETS, EXPERT, expert)
    monkeypatch.setattr("tools.plan.trainings.STEPS", 2)
    return PlanConfig(40, small_clips, tmp_path / "data/cache", mini, tmp_path / "checkpoints", "cpu")


def costs_of(*rates: float, folder: Path = Path(), missing: float = 0.0) -> list[Cost]:
    return [Cost("stage1", rate, 1.0, missing, folder, missing, "steps", cold_rate=10.0) for rate in rates]


def test_a_plan_without_a_cache_measures_all_and_leaves_nothing(config, tmp_path):
    costs, findings = plan(config)
    assert [cost.name for cost in costs] == ["prepare", *TRAININGS]
    assert all(cost.rate > 0 and cost.hours > 0 and cost.size > 0 for cost in costs)
    assert all(cost.cold_rate > 0 and cost.memory is None for cost in costs[1:])
    lines = table(costs).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["prepare", *TRAININGS, "all"]
    assert "250,000 steps of 1 samples" in lines[4] and "20,000 steps of 8 samples" in lines[5]
    faults = [finding.text for finding in findings if finding.fault]
    assert any(text.startswith("stage1, stage2: ") and "vgg/vgg16-397923af.pth is missing" in text for text in faults)
    assert any(text.startswith("stage2: ") and "syncnet/latentsync_syncnet.pt is missing" in text for text in faults)
    assert not list(tmp_path.iterdir())


def test_the_hours_and_the_cache_are_proportional_to_the_hours_of_video(config, tmp_path):
    sizes = []
    for hours in (20, 40):
        cost, _ = time_preparing(replace(config, hours=hours), [SOURCE], tmp_path / f"cache{hours}")
        sizes.append(cost.size)
        assert cost.hours == pytest.approx(hours * 25 / cost.rate)
    assert sizes[1] == 2 * sizes[0]


def test_an_existing_cache_counts_as_room_and_is_used(config, sample_cache, tmp_path, monkeypatch):
    config = replace(config, hdtf_samples_dir=sample_cache.folder)
    cost, _ = time_preparing(config, [SOURCE], tmp_path / "cache")
    size = sum(path.stat().st_size for path in (sample_cache.folder / "clips").iterdir())
    assert cost.missing == cost.size - size
    used = []
    monkeypatch.setattr("tools.plan.command.time_training", lambda name, _, cache, __: used.append(cache.folder))
    monkeypatch.setattr("tools.plan.command.check_reading", lambda _: [])
    monkeypatch.setattr("tools.plan.command.check_space", lambda _: [])
    plan(config)
    assert used == 3 * [sample_cache.folder]


def test_networks_that_would_be_accepted_are_used_themselves(config, sample_cache, mini, tmp_path, monkeypatch):
    models = tmp_path / "models"
    (models / "vgg").mkdir(parents=True)
    torch.save(VGG16((4,) * 5).state_dict(), models / "vgg/vgg16-397923af.pth")
    torch.save(Heads((4,) * 5).state_dict(), models / "vgg/lpips.pth")
    expert = save_syncnet(tmp_path, 1, build_syncnet("latentsync_narrow", 0).state_dict(), "latentsync_narrow")
    stage2 = replace(musetalk_trainer.PRESETS["stage2"], sync_expert=str(expert))
    monkeypatch.setitem(musetalk_trainer.PRESETS, "stage2", stage2)
    config = replace(config, models_dir=models)
    models_dir, sync_expert, (finding,) = loss_networks(config, sample_cache, tmp_path / "temporary")
    assert models_dir == models and sync_expert != str(expert)
    assert finding.fault and "the sync expert cannot be trusted on these faces" in finding.text
    monkeypatch.setattr("musetalk.evaluation.sync_check.MIN_ACCURACY", 0.0)
    monkeypatch.setattr("musetalk.evaluation.sync_check.MAX_BIAS", 15)
    _, sync_expert, (finding,) = loss_networks(config, sample_cache, tmp_path / "temporary")
    assert sync_expert == str(expert) and not finding.fault


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("no room"), "stage1: no room"),
        (torch.OutOfMemoryError(), "stage1: the GPU has too little memory"),
    ],
)
def test_a_training_that_would_be_refused_is_left_out(config, sample_cache, monkeypatch, error, message):
    def refuse(name: str, *_: object) -> Cost:
        if name == "stage1":
            raise error
        return costs_of(1.0)[0]

    monkeypatch.setattr("tools.plan.command.time_preparing", lambda *_: (costs_of(1.0)[0], Finding("prepare")))
    monkeypatch.setattr("tools.plan.command.loss_networks", lambda config, *_: (config.models_dir, "", []))
    monkeypatch.setattr("tools.plan.command.time_training", refuse)
    costs, findings = plan(replace(config, hdtf_samples_dir=sample_cache.folder))
    assert len(costs) == 3
    assert [finding.text[: len(message)] for finding in findings if finding.fault] == [message]


def test_one_percent_of_the_videos_keeps_all_processes_busy(tmp_path):
    sources = [Source(PurePath(f"{index}.mp4"), str(index), 1000) for index in range(1000)]
    config = PrepareConfig(num_workers=4)
    chosen = choose_videos(config, sources)
    assert len(chosen) == 10 == len(set(chosen)) and chosen != sources[:10]
    assert chosen == choose_videos(config, sources)
    few = choose_videos(config, sources[:8])
    assert len(few) == 4 == process_count(config, few)
    assert choose_videos(config, [SOURCE]) == [SOURCE]


def test_a_row_has_rates_memory_hours_and_gigabytes():
    (cost,) = costs_of(0.03964)
    row = table([cost._replace(memory=3 << 30, cold_rate=1020.4)]).splitlines()[2]
    assert row.split() == "stage1 0.0396 samples/s 1,020 samples/s 3.0 GiB 1.0 0.0 GB steps".split()


def test_a_slow_disk_a_full_disk_and_a_single_person_are_found(tmp_path):
    assert not list(check_reading(costs_of(9.0)))
    (finding,) = check_reading(costs_of(9.0, 11.0))
    assert "stage1: 10 samples/s are read from the disk, 11 are trained on" in finding.text
    assert not list(check_space(costs_of(1.0, folder=tmp_path)))
    (finding,) = check_space(costs_of(1.0, 2.0, folder=tmp_path / "new/folder", missing=1e18))
    assert finding.fault and "another 2000000000.0 GB are needed" in finding.text
    assert "sample has one" in next(check_identities(Path("sample"), [SOURCE])).text
    assert not list(check_identities(Path("sample"), [SOURCE, replace(SOURCE, identity="other")]))


def test_bad_input_is_refused_in_a_sentence(config, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="contains no videos"):
        main(replace(config, hdtf_dir=tmp_path / "empty"))
    (tmp_path / "empty/text.mp4").write_text("no video")
    with pytest.raises(UserError, match="none of the 1 videos that were tried is usable, such as: .*text.mp4"):
        main(replace(config, hdtf_dir=tmp_path / "empty"))
    with pytest.raises(UserError, match="hours cannot be 0"):
        musetalk_trainer.main(["plan", "--hours", "0"])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="start it with python"):
        main(config)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_an_interrupted_plan_leaves_nothing(config, tmp_path, monkeypatch):
    def interrupt(*_: object) -> None:
        assert list(tmp_path.glob(".plan-*/cache/clips/*.json"))
        raise KeyboardInterrupt

    monkeypatch.setattr("tools.plan.command.loss_networks", interrupt)
    with pytest.raises(KeyboardInterrupt, match="nothing was kept"):
        main(config)
    assert not list(tmp_path.iterdir())
