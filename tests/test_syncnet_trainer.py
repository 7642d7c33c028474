"""The trainer of sync experts on made-up clips: its files, exact resume, its loss, its check, invalid constants."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args, get_type_hints

import cv2
import pytest
import safetensors
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import syncnet_trainer
from musetalk.cli import check_constants
from musetalk.contract import FeatureContract
from musetalk.data.cache import Cache, CacheError
from musetalk.data.cache_writer import CacheWriter
from musetalk.data.sync_dataset import SyncDataset
from musetalk.errors import TrainError, UserError
from musetalk.evaluation.sync_check import SyncError
from musetalk.models.syncnet import ARCHITECTURES, StableSyncNet, build_syncnet, load_syncnet, save_syncnet
from musetalk.models.weights import WeightsError
from musetalk.training.state import OPTIMIZERS
from syncnet_trainer import PRESETS, SyncConfig, parse, sync_expert_loss, train
from tests.conftest import assert_equal

CPU = torch.device("cpu")
FRAMES = 30  # of each clip: 26 windows of 5


@pytest.fixture(scope="module")
def cache(tmp_path_factory, random_tensors) -> Cache:
    """Three clips of one identity, of which one is held out."""
    folder = tmp_path_factory.mktemp("cache")
    writer = CacheWriter(folder, FeatureContract())
    for seed, name in enumerate("abc"):
        metadata = {"source": f"{name}.mp4", "source_bytes": 9, "identity": "a", "last": True}
        writer.write(name, random_tensors(FRAMES, mels=97, seed=seed), metadata)
    return Cache(folder)


@pytest.fixture(scope="module", autouse=True)
def four_windows_per_check():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("musetalk.evaluation.sync_check.WINDOWS", 4)
        yield


def make_config(cache: Cache, folder: Path) -> SyncConfig:
    """Four small steps of a narrow expert."""
    return SyncConfig(
        hdtf_samples_dir=cache.folder,
        checkpoint_dir=folder / "checkpoints",
        log_dir=folder / "log",
        architecture="wav2lip_narrow",
        held_out_identities=("c",),
        num_workers=0,
        batch_size=2,
        learning_rate=2e-3,
        grad_accum_steps=2,
        num_steps=4,
        warmup_steps=2,
        log_every=1,
        val_every=4,
        save_every=2,
    )


@pytest.fixture
def config(cache, tmp_path) -> SyncConfig:
    return make_config(cache, tmp_path)


@pytest.fixture(scope="module")
def trained(cache, tmp_path_factory) -> SyncConfig:
    """The constants of a run without interruption; its files are not to be changed."""
    config = make_config(cache, tmp_path_factory.mktemp("trained"))
    AcceleratorState._reset_state(reset_partial_state=True)
    train("demo", config)
    return config


def state_of(config: SyncConfig, step: int) -> dict:
    return torch.load(config.checkpoint_dir / "syncnet_demo" / f"training-state-{step:07d}.pt", weights_only=True)


def records(config: SyncConfig) -> list[dict]:
    return [json.loads(line) for line in (config.log_dir / "syncnet_demo/stats.jsonl").read_text().splitlines()]


# Training.


def test_a_run_writes_its_files_and_records(trained):
    run_dir = trained.checkpoint_dir / "syncnet_demo"
    assert sorted(path.name for path in run_dir.iterdir()) == [
        ".lock",
        "syncnet-0000002.safetensors",
        "syncnet-0000004.safetensors",
        "training-state-0000002.pt",
        "training-state-0000004.pt",
    ]
    logged = {path.relative_to(trained.log_dir).as_posix() for path in trained.log_dir.rglob("*") if path.is_file()}
    assert {name for name in logged if "tfevents" not in name} == {
        "syncnet_demo/.lock",
        "syncnet_demo/stats.jsonl",
        "syncnet_demo/sync_check/0000004.png",
        "trainer.log",
    }
    assert [record["step"] for record in records(trained)] == [1, 2, 3, 4]
    assert set(records(trained)[0]) == {"step", "sync_bce", "grad_norm", "learning_rate"}
    assert set(records(trained)[3]) == set(records(trained)[0]) | {"accuracy", "offset", "confidence"}
    assert cv2.imread(str(trained.log_dir / "syncnet_demo/sync_check/0000004.png")).shape == (400, 800, 3)

    # The expert for use has the weights and batch norm statistics of the state.
    path = run_dir / "syncnet-0000004.safetensors"
    assert_equal(*(dict(sorted(x.items())) for x in (load_file(path), state_of(trained, 4)["network"])))
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata() == {"architecture": "wav2lip_narrow"}
    norm = "face_encoder.0.conv_block.1"
    assert load_file(path)[f"{norm}.num_batches_tracked"] == 8 and load_file(path)[f"{norm}.running_mean"].any()


def test_a_run_stopped_by_ctrl_c_and_resumed_equals_one_without_interruption(trained, config, monkeypatch):
    losses = []

    def interrupted(*arguments):
        losses.append(sync_expert_loss(*arguments))
        if len(losses) == 5:  # in step 3
            os.kill(os.getpid(), signal.SIGINT)
        return losses[-1]

    with monkeypatch.context() as patch:
        patch.setattr(syncnet_trainer, "sync_expert_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train("demo", config)
    assert len(losses) == 6 and state_of(config, 3)["step"] == 3
    train("demo", config)
    assert_equal(state_of(config, 4), state_of(trained, 4))
    for step in (2, 4):
        name = f"syncnet_demo/syncnet-000000{step}.safetensors"
        assert (config.checkpoint_dir / name).read_bytes() == (trained.checkpoint_dir / name).read_bytes()
    for name in ("syncnet_demo/stats.jsonl", "syncnet_demo/sync_check/0000004.png"):
        assert (config.log_dir / name).read_bytes() == (trained.log_dir / name).read_bytes()


def test_a_finished_run_has_nothing_left_to_do(trained):
    before = records(trained)
    train("demo", trained)
    assert records(trained) == before


def test_a_broken_state_is_refused_before_anything_is_written(config, tmp_path):
    path = config.checkpoint_dir / "syncnet_demo/training-state-0000002.pt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"PK")
    with pytest.raises(WeightsError, match=str(path)):
        train("demo", config)
    assert {x for x in tmp_path.rglob("*") if x.is_file() and x.name != ".lock"} == {path}


def test_a_stable_syncnet_trains_in_batches_of_one(config):
    """It has windows of 16 frames and no batch norms."""
    train("demo", replace(config, architecture="latentsync_narrow", num_steps=1, batch_size=1))
    network = load_syncnet(Path("nowhere"), str(config.checkpoint_dir / "syncnet_demo"), CPU)
    assert isinstance(network, StableSyncNet) and network.frames == 16
    assert set(records(config)[0]) > {"accuracy", "offset"}


# The loss.


def test_a_narrow_expert_learns_one_batch_by_heart(config, cache):
    state = syncnet_trainer.build_state(config, Accelerator(cpu=True, mixed_precision="no"))
    data = syncnet_trainer.open_dataset(config, cache, ["a"], 5, 1)
    batch = torch.utils.data.default_collate([data[index] for index in range(4)])
    losses = []
    for _ in range(30):
        loss = sync_expert_loss(state.network, batch, CPU)
        loss.backward()
        losses.append(loss.item())
        state.optimizer.step()
        state.optimizer.zero_grad()
    assert losses[0] > 0.6 and losses[-1] < 0.3


def test_the_loss_is_the_mean_over_pairs_computed_one_by_one(cache):
    """-log of the cosine with a window's own mel, -log of 1 minus the cosine with other mel."""
    expert = build_syncnet("wav2lip_narrow", 0).eval()
    data = SyncDataset(cache, ["b"], seed=0, slots=3, frames=5, num_steps=9, gaps=(9, 3), other_clips=0.5)
    items = [data[index] for index in range(3)]
    losses = []
    for item in items:
        images = item["images"].flip(-1).permute(0, 3, 1, 2)[None] / 127.5 - 1
        for mel, in_sync in ((item["mel"], True), (item["other_mel"], False)):
            face_embedding, audio_embedding = expert.embed(images, mel[None].float())
            cosine = (face_embedding * audio_embedding).sum()
            losses.append(-torch.log(cosine if in_sync else 1 - cosine))
    expected = torch.stack(losses).mean()
    loss = sync_expert_loss(expert, torch.utils.data.default_collate(items), CPU)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    weight = expert.face_encoder[0].conv_block[0].weight
    gradients = [torch.autograd.grad(x, weight)[0] for x in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


# Starting from another expert.


@pytest.fixture
def models(tmp_path) -> Path:
    """A models folder with Wav2Lip's published file, untrained."""
    folder = tmp_path / "models"
    (folder / "syncnet").mkdir(parents=True)
    torch.save({"state_dict": build_syncnet("wav2lip", 5).state_dict()}, folder / "syncnet/lipsync_expert.pth")
    return folder


def test_a_run_starts_from_an_expert_of_an_earlier_run(config, tmp_path):
    earlier = build_syncnet("wav2lip_narrow", 9)
    save_syncnet(tmp_path / "earlier", 7, earlier.state_dict(), "wav2lip_narrow")
    run = replace(config, start_from=str(tmp_path / "earlier"), num_steps=1, learning_rate=1e-12)
    train("demo", run)
    name = "face_encoder.0.conv_block.0.weight"
    torch.testing.assert_close(state_of(run, 1)["network"][name], earlier.state_dict()[name])
    with pytest.raises(WeightsError, match="does not fit StableSyncNet"):
        train("demo", replace(run, architecture="latentsync_narrow"))


def test_a_run_starts_from_a_published_expert(config, models):
    published = {"architecture": "wav2lip", "models_dir": models, "start_from": "syncnet/lipsync_expert.pth"}
    run = replace(config, **published, learning_rate=1e-12, num_steps=1, grad_accum_steps=1)
    train("demo", run)
    name = "audio_encoder.13.conv_block.0.weight"
    torch.testing.assert_close(state_of(run, 1)["network"][name], build_syncnet("wav2lip", 5).state_dict()[name])


# The check alone.


def test_a_check_shows_its_table_then_refuses_an_unfit_expert_and_trains_nothing(config, models, capsys):
    run = replace(config, check_only=True, models_dir=models, start_from="syncnet/lipsync_expert.pth")
    with pytest.raises(SyncError):
        train("demo", run)
    shown = capsys.readouterr().out
    assert "syncnet/lipsync_expert.pth" in shown and "\n -15  " in shown and "\n +15  " in shown
    assert [path.name for path in config.log_dir.rglob("*") if path.is_file()] == ["sync_check.png"]
    assert not config.checkpoint_dir.exists()


def test_a_check_without_a_name_is_of_the_newest_expert_of_the_preset(trained, config, capsys, monkeypatch):
    monkeypatch.setattr("musetalk.evaluation.sync_check.MIN_ACCURACY", 0)
    monkeypatch.setattr("musetalk.evaluation.sync_check.MAX_BIAS", 15)
    train("demo", replace(trained, check_only=True, log_dir=config.log_dir))
    assert f"accuracy {records(trained)[-1]['accuracy']:.3f}" in capsys.readouterr().out
    with pytest.raises(WeightsError, match="syncnet_demo is no sync expert"):
        train("demo", replace(config, check_only=True))


# Constants.


def test_the_command_line_names_a_preset_and_overrides_its_constants():
    assert parse([]) == ("demo", PRESETS["demo"])
    preset, config = parse(["latentsync", "--batch-size", "3", "--gaps", "9", "4", "--check-only"])
    assert preset == "latentsync" and config.batch_size == 3 and config.gaps == (9, 4) and config.check_only
    with pytest.raises(UserError, match="'stage1'"):
        parse(["stage1"])


def test_the_choices_of_constants_are_the_existing_ones():
    annotations = get_type_hints(SyncConfig)
    assert get_args(annotations["architecture"]) == tuple(ARCHITECTURES)
    assert get_args(annotations["optimizer"]) == tuple(OPTIMIZERS)


def test_invalid_constants_are_refused_by_name():
    """A value of another type for every constant, and -1 and NaN for every number."""
    for name, value in vars(PRESETS["wav2lip"]).items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        for invalid in (object(), *((-1, float("nan")) if is_number else ())):
            with pytest.raises(UserError, match=rf"^{name}\b"):
                check_constants(replace(PRESETS["wav2lip"], **{name: invalid}))
    assert len(vars(PRESETS["wav2lip"])) == len(fields(SyncConfig))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batch_size": 0}, UserError, "^batch_size cannot be 0"),
        ({"hdtf_samples_dir": Path("nowhere")}, CacheError, "nowhere is not a cache"),
        ({"start_from": "nowhere"}, WeightsError, "nowhere is no sync expert"),
        ({"weight_decay": 1e-2}, TrainError, "weight_decay must be 0 with adam"),
        ({"batch_size": 1}, TrainError, "batch_size must be 2 or more"),  # for batch norms
        ({"batch_size": 27}, TrainError, "is 54, but .* has 52 windows"),
        ({"gaps": (15, 13)}, CacheError, "mel at least 13 frames away"),
    ],
)
def test_constants_that_cannot_work_together_are_refused_before_anything_is_written(config, change, error, message):
    with pytest.raises(error, match=message):
        train("demo", replace(config, **change))
    assert not config.checkpoint_dir.exists() and not config.log_dir.exists()
