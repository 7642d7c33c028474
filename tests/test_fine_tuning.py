"""The presets personal and adapt: what they train, when they stop, what they keep, how they resume."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import musetalk_trainer
from musetalk.contract import ContractError
from musetalk.data.dataset import FaceDataset
from musetalk.data.rehearsal import RehearsalDataset, clips_to_rehearse
from musetalk.errors import UserError
from musetalk.models.lora import factors, merge
from musetalk.training.fine_tuning import Best, table_command
from musetalk.training.log import RunLog
from musetalk_trainer import PRESETS, TrainConfig, train, weights
from tests.conftest import ROOT, assert_equal, interrupted_after_a_save

BASE = ROOT / "models/mini/musetalk/unet.safetensors"
SMALL = {
    "models_dir": ROOT / "models/mini",
    "start_from": str(BASE),
    "loss_weights": weights(latent_l1=1.0),
    "num_workers": 0,
    "batch_size": 2,
    "warmup_steps": 0,
    "num_steps": 8,
    "val_every": 1,
    "sample_every": 100,
    "save_every": 2,
    "keep_weights": 1,
}


@pytest.fixture
def config(sample_cache, tmp_path, monkeypatch) -> TrainConfig:
    """Preset personal with the small networks, on latents, a validation after each step."""
    monkeypatch.setattr("musetalk_trainer.BOUNDS_SAMPLES", 1)
    folders = {"checkpoint_dir": tmp_path / "checkpoints", "log_dir": tmp_path / "log"}
    return replace(PRESETS["personal"], hdtf_samples_dir=sample_cache.folder, patience=2, **SMALL, **folders)


@pytest.fixture
def validations(monkeypatch) -> Callable[..., None]:
    """A function: values of `lmd` that the next validations give."""
    monkeypatch.setattr(RunLog, "validation", lambda *_: None)

    def give(*values: float) -> None:
        left = iter(values)
        validate = lambda: SimpleNamespace(figures={"lmd": next(left)})  # noqa: E731
        monkeypatch.setattr(musetalk_trainer, "Validator", lambda *_, **__: validate)

    return give


def folder_of(config: TrainConfig, preset: str = "personal") -> Path:
    return config.checkpoint_dir / preset


def state_of(config: TrainConfig, step: int) -> dict:
    return torch.load(folder_of(config) / f"training-state-{step:07d}.pt", weights_only=True)


def files_of(config: TrainConfig) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder_of(config).glob("*-*.safetensors"))}


def log_of(config: TrainConfig) -> str:
    return (config.log_dir / "trainer.log").read_text()


# Early stopping.


@pytest.mark.parametrize(
    ("values", "best", "since"),
    [
        ([0.3, 0.2, 0.25, 0.2], 2, 2),
        ([0.3, 0.2, 0.1], 3, 0),
        ([float("nan"), 0.3, float("nan")], 2, 1),
        ([float("nan"), float("nan")], 1, 1),
    ],
)
def test_the_lowest_lmd_is_the_best_and_the_first_of_equals(values, best, since):
    record = Best()
    better = [record.update(step, value) for step, value in enumerate(values, 1)]
    assert better[0] and (record.step, record.validations_since) == (best, since)
    assert [record.exhausted(patience) for patience in (0, 1, 2)] == [False, since >= 1, since >= 2]


def test_a_training_stops_by_validation_and_keeps_the_best(config, validations, small_clips):
    validations(0.3, 0.2, 0.25, 0.2)
    train("personal", config)
    assert files_of(config).keys() == {"adapter-0000002.safetensors", "unet-0000002.safetensors"}
    assert state_of(config, 4)["best"] == {"step": 2, "lmd": 0.2, "validations_since": 2}
    assert f"best: step 2, {folder_of(config)}/unet-0000002.safetensors" in log_of(config)
    assert "--names sample_01\n" in log_of(config) and "trained on 0.0 minutes" in log_of(config)

    # Running the same command again changes nothing.
    before = files_of(config)
    AcceleratorState._reset_state(reset_partial_state=True)
    train("personal", config)
    assert files_of(config) == before and log_of(config).count("done at step 4") == 2
    assert not (folder_of(config) / "training-state-0000005.pt").exists()


def test_an_interrupted_training_with_lora_and_patience_resumes_exactly(config, validations, tmp_path):
    values = 0.3, 0.2, 0.25, 0.19, 0.2, 0.2
    validations(*values)
    train("personal", config)
    parted = replace(config, checkpoint_dir=tmp_path / "parted", log_dir=tmp_path / "parted_log")
    validations(*values)
    with interrupted_after_a_save():
        train("personal", parted)
    assert [path.name for path in folder_of(parted).glob("training-*")] == ["training-state-0000002.pt"]
    AcceleratorState._reset_state(reset_partial_state=True)
    train("personal", parted)
    assert_equal(state_of(config, 6), state_of(parted, 6))
    assert files_of(config) == files_of(parted) and "unet-0000004.safetensors" in files_of(config)


# What is trained.


def test_lora_changes_the_factors_alone_and_saves_them_merged_and_apart(config, validations):
    validations(0.3, 0.2)
    train("personal", replace(config, num_steps=2))
    base, saved = load_file(BASE), state_of(config, 2)
    assert all(torch.equal(value, saved["unet"][name]) for name, value in base.items())
    assert saved["ema"].keys() == factors(saved["unet"]).keys() == saved["unet"].keys() - base.keys()
    assert len(saved["optimizer"]["state"]) == len(saved["ema"])
    adapter, merged = (load_file(folder_of(config) / f"{kind}-0000002.safetensors") for kind in ("adapter", "unet"))
    for file, expected in ((adapter, saved["ema"]), (merged, merge(base | adapter))):
        assert_equal(dict(sorted(file.items())), dict(sorted(expected.items())))
    layers = {name.partition(".lora_")[0] for name in saved["ema"]}
    assert {name for name in merged if not torch.equal(merged[name], base[name])} == {f"{x}.weight" for x in layers}


def test_attention_alone_is_trained_bit_for_bit(config, validations):
    validations(0.3)
    train("personal", replace(config, trained="attention", num_steps=1))
    base, saved = load_file(BASE), state_of(config, 1)
    changed = {name for name, value in base.items() if not torch.equal(value, saved["unet"][name])}
    assert changed == saved["ema"].keys() == {name for name in base if ".attn1." in name or ".attn2." in name}
    assert files_of(config).keys() == {"unet-0000001.safetensors"}
    with pytest.raises(UserError, match="training-state-0000001.pt was saved with another value of `trained`; set it"):
        train("personal", replace(config, trained="all"))


# Rehearsal.


class Numbered:
    """A dataset whose samples are its name and their index."""

    def __init__(self, name: str, seed: int = 0) -> None:
        self.name, self.seed, self.slots = name, seed, 10

    def __getitem__(self, index: int) -> tuple[str, int]:
        return self.name, index


def test_samples_come_from_both_caches_in_the_share_and_always_the_same():
    mixed, again = (RehearsalDataset(Numbered("new"), Numbered("old"), 0.3) for _ in range(2))
    samples = [mixed[index] for index in range(2000)]
    assert samples == [again[index] for index in range(2000)] and [index for _, index in samples] == list(range(2000))
    assert abs(sum(name == "old" for name, _ in samples) / 2000 - 0.3) < 0.04
    other = RehearsalDataset(Numbered("new", seed=1), Numbered("old", seed=1), 0.3)
    assert samples != [other[index] for index in range(2000)]


def test_people_held_out_in_either_cache_are_not_rehearsed():
    def cache_of(**identities: str) -> SimpleNamespace:
        clips = {name: SimpleNamespace(identity=identity) for name, identity in identities.items()}
        return SimpleNamespace(clips=clips, folder="data/mine")

    older = cache_of(a1="a", b1="b", c1="c", d1="d")  # by the hashes of their names, d is held out
    assert clips_to_rehearse(older, 0.15, cache_of(x="x", b2="b"), ["x"]) == ["a1", "c1"]
    assert clips_to_rehearse(older, 0.15, cache_of(b2="b", b1="b"), ["b2"]) == ["a1", "c1"]
    assert clips_to_rehearse(older, 0.15, cache_of(b2="b", b3="b"), ["b2"]) == ["a1", "b1", "c1"]
    with pytest.raises(UserError, match="^data/mine has nothing to rehearse"):
        clips_to_rehearse(cache_of(b1="b", b4="b"), 0.15, cache_of(x="x", b2="b"), ["x"])


def test_adapt_rehearses_the_identities_that_are_not_held_out(config, sample_cache, make_cache, tmp_path, monkeypatch):
    older = tmp_path / "older"
    older.mkdir()
    (older / "clips").symlink_to(sample_cache.folder / "clips")
    (older / "contract.json").write_bytes((sample_cache.folder / "contract.json").read_bytes())
    drawn = []
    read = FaceDataset.read

    def record(dataset, sample):
        drawn.append((dataset.cache.folder, dataset.slots, sample.clip))
        return read(dataset, sample)

    monkeypatch.setattr(FaceDataset, "read", record)
    settings = {"rehearsal_dir": older, "rehearsal_share": 0.5, "val_every": 0, "patience": 0}
    settings |= {"held_out_by": "identity", "trained": "all", "num_steps": 1, "batch_size": 8}
    adapt = replace(config, **settings)
    train("adapt", adapt)
    clips = {folder: {clip for where, slots, clip in drawn if (where, slots) == (folder, 8)} for folder, _, _ in drawn}
    assert clips.keys() == {sample_cache.folder, older} and all(0 < len(names) < 3 for names in clips.values())
    with pytest.raises(ContractError, match=r"musetalk_v15.* was made with crop = 'nose_centred', but 'rigid' is"):
        train("adapt", replace(adapt, rehearsal_dir=make_cache("musetalk_v15").folder))


# The table, and what is refused.


def test_the_command_names_a_contract_only_for_a_base_without_one(tmp_path):
    command = partial_command(BASE, tmp_path)
    assert "--contract" not in command and "'data/my face'" in command and command.endswith("--names a b")
    torch.save(load_file(BASE), tmp_path / "unet.pth")
    assert "--contract musetalk_v15" in partial_command(tmp_path / "unet.pth", tmp_path)


def partial_command(base: Path, folder: Path) -> str:
    names = {"cache": Path("data/my face"), "models_dir": folder, "contract": "musetalk_v15", "clips": ["a", "b"]}
    return table_command(base, folder / "unet-0000001.safetensors", **names)


@pytest.mark.parametrize(
    ("preset", "change", "message"),
    [
        ("personal", {"start_from": ""}, "^personal needs weights to start from; set start_from"),
        ("adapt", {"start_from": ""}, "^adapt needs weights to start from; set start_from"),
        ("personal", {"val_every": 0}, "^val_every must be over 0 with patience"),
        ("personal", {"held_out_identities": ("a",)}, "^held_out_identities must be ()"),
        ("personal", {"trained": "heads"}, "^trained cannot be 'heads'"),
        ("personal", {"rehearsal_dir": Path("nowhere")}, "^nowhere is not a cache"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(config, preset, change, message):
    with pytest.raises(UserError, match=message):
        train(preset, replace(config, **change))
    assert not config.checkpoint_dir.exists()
