"""The real trainer on the small set: what it writes, that it resumes exactly, how it stops."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args, get_type_hints

import cv2
import numpy as np
import pytest
import safetensors
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import musetalk_trainer
from musetalk.cache import Cache, CacheError
from musetalk.contract import CONTRACTS, ContractError
from musetalk.script import UserError
from musetalk.training import OPTIMIZERS
from musetalk.weights import WeightsError
from musetalk_trainer import PRESETS, TrainConfig, TrainError, generator_step, learning_rate, parse, train


@pytest.fixture
def config(sample_cache, tmp_path) -> TrainConfig:
    """Four steps of the demo, small."""
    AcceleratorState._reset_state(reset_partial_state=True)  # one process, several runs
    return replace(
        PRESETS["demo"],
        hdtf_samples_dir=sample_cache.folder,
        checkpoint_dir=tmp_path / "checkpoints",
        log_dir=tmp_path / "log",
        batch_size=2,
        pixel_every=1,
        num_steps=4,
        warmup_steps=2,
        log_every=1,
        sample_every=4,
        save_every=2,
    )


def flat(values: object, prefix: str = "") -> dict[str, object]:
    """Nested dicts and lists as one dict of leaves."""
    if isinstance(values, dict):
        return {k: v for key, value in values.items() for k, v in flat(value, f"{prefix}/{key}").items()}
    if isinstance(values, list | tuple):
        return {k: v for i, value in enumerate(values) for k, v in flat(value, f"{prefix}/{i}").items()}
    return {prefix: values}


def state_of(config: TrainConfig, step: int) -> dict[str, object]:
    path = config.checkpoint_dir / "demo" / f"training-state-{step:07d}.pt"
    return flat(torch.load(path, weights_only=True))


def assert_equal(one: dict[str, object], two: dict[str, object]) -> None:
    """Every tensor to the last bit, everything else by value."""
    assert one.keys() == two.keys()
    for name, value in one.items():
        same = torch.equal(value, two[name]) if isinstance(value, torch.Tensor) else value == two[name]
        assert same, name


def test_files_and_records(config):
    train("demo", config)
    run_dir = config.checkpoint_dir / "demo"
    assert sorted(path.name for path in run_dir.iterdir()) == [
        ".lock",
        "training-state-0000002.pt",
        "training-state-0000004.pt",
        "unet-0000002.safetensors",
        "unet-0000004.safetensors",
    ]
    logged = sorted(path.relative_to(config.log_dir).as_posix() for path in config.log_dir.rglob("*") if path.is_file())
    assert [name for name in logged if "tfevents" not in name] == [
        "demo/.lock",
        "demo/samples/0000004.png",
        "demo/stats.jsonl",
        "trainer.log",
    ]
    assert len(logged) == 5
    lines = (config.log_dir / "trainer.log").read_text()
    assert all(f"saved {run_dir}/unet-000000{step}.safetensors" in lines for step in (2, 4))
    records = [json.loads(line) for line in (config.log_dir / "demo" / "stats.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert set(records[0]) == {"step", "latent_l1", "pixel_l1", "grad_norm", "learning_rate"}
    assert cv2.imread(str(config.log_dir / "demo/samples/0000004.png")).shape == (6 * 256, 4 * 256, 3)

    # Weights to use: plain names, the averaged weights, one metadata key.
    path = run_dir / "unet-0000004.safetensors"
    saved = load_file(path)
    state = torch.load(run_dir / "training-state-0000004.pt", weights_only=True)
    assert saved.keys() == state["unet"].keys() == state["ema"].keys()
    assert all(torch.equal(value, state["ema"][name]) for name, value in saved.items())
    assert any(not torch.equal(value, state["unet"][name]) for name, value in saved.items())
    with safetensors.safe_open(path, framework="pt") as file:
        assert list(file.metadata()) == ["contract"]


@pytest.mark.parametrize("optimizer", ["adamw", "adamax", "adam"])
def test_two_steps_and_a_resume_equal_four_steps(config, tmp_path, optimizer):
    config = replace(config, optimizer=optimizer, grad_accum_steps=2)
    train("demo", config)
    parted = replace(config, checkpoint_dir=tmp_path / "parted", log_dir=tmp_path / "parted_log")
    # The learning rate depends on num_steps, so the first half is an interruption, not a shorter run.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(musetalk_trainer, "save_state", interrupt_after(musetalk_trainer.save_state))
        with pytest.raises(KeyboardInterrupt):
            train("demo", parted)
    assert not (parted.checkpoint_dir / "demo" / "training-state-0000004.pt").exists()
    train("demo", parted)
    assert_equal(state_of(config, 4), state_of(parted, 4))
    for step in (2, 4):
        name = f"demo/unet-000000{step}.safetensors"
        assert (config.checkpoint_dir / name).read_bytes() == (parted.checkpoint_dir / name).read_bytes()
    for name in ("demo/stats.jsonl", "demo/samples/0000004.png"):
        assert (config.log_dir / name).read_bytes() == (parted.log_dir / name).read_bytes()


def interrupt_after(function):
    """The function, interrupting the run when it is done."""

    def wrapper(*args):
        function(*args)
        raise KeyboardInterrupt

    return wrapper


def test_training_lowers_the_loss(config):
    train("demo", replace(config, num_steps=40, save_every=40, batch_size=4, loss_weights={"latent_l1": 1.0}))
    records = [json.loads(line) for line in (config.log_dir / "demo" / "stats.jsonl").read_text().splitlines()]
    first, last = (np.mean([record["latent_l1"] for record in part]) for part in (records[:5], records[-5:]))
    assert last < 0.8 * first


def test_accumulation_equals_one_large_batch(config, monkeypatch):
    """Two halves of a batch move the UNet as the whole does, but for rounding."""
    states = []
    for batch_size, accumulate in ((4, 1), (2, 2)):
        run = replace(
            config,
            batch_size=batch_size,
            grad_accum_steps=accumulate,
            checkpoint_dir=config.checkpoint_dir / str(batch_size),
            num_steps=1,
        )
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setattr(musetalk_trainer, "precision", lambda: "no")
        train("demo", run)
        states.append(torch.load(run.checkpoint_dir / "demo" / "training-state-0000001.pt", weights_only=True))
    moments = [flat(state["optimizer"]["state"]) for state in states]
    for name, value in moments[0].items():
        if name.endswith("exp_avg"):
            torch.testing.assert_close(value, moments[1][name], rtol=1e-3, atol=1e-6)


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_update(config, monkeypatch):
    calls = []

    def poisoned(*args):
        terms = generator_step(*args)
        calls.append(1)
        if len(calls) == 3:
            next(args[0].unet.parameters()).grad[...] = float("nan")
            terms["pixel_l1"] = terms["pixel_l1"] * float("nan")
        return terms

    monkeypatch.setattr(musetalk_trainer, "generator_step", poisoned)
    with pytest.raises(TrainError, match=r"step 3: .*not finite: pixel_l1\).*sample_0\d, frame \d+") as error:
        train("demo", config)
    assert str(config.checkpoint_dir) in str(error.value)
    good = state_of(config, 2)
    assert all(value.isfinite().all() for value in good.values() if isinstance(value, torch.Tensor))
    monkeypatch.undo()
    train("demo", config)  # and it goes on from there
    assert (config.checkpoint_dir / "demo" / "training-state-0000004.pt").exists()


def test_frozen_networks_stay_frozen(config, monkeypatch):
    seen = []

    def watched(state, vae, *rest):
        seen.append(vae.autoencoder)
        return generator_step(state, vae, *rest)

    monkeypatch.setattr(musetalk_trainer, "generator_step", watched)
    train("demo", replace(config, num_steps=1))
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in seen[0].parameters())


def test_each_term_alone_trains(config, tmp_path):
    for name in ("latent_l1", "pixel_l1"):
        run = replace(config, loss_weights={name: 1.0}, log_dir=tmp_path / name, checkpoint_dir=tmp_path / name)
        train("demo", replace(run, num_steps=1))
        record = json.loads((run.log_dir / "demo" / "stats.jsonl").read_text())
        assert set(record) == {"step", name, "grad_norm", "learning_rate"}
        assert record["grad_norm"] > 0


def test_image_losses_are_taken_every_nth_step(config):
    train("demo", replace(config, pixel_every=2))
    records = [json.loads(line) for line in (config.log_dir / "demo" / "stats.jsonl").read_text().splitlines()]
    assert ["pixel_l1" in record for record in records] == [False, True, False, True]


def test_learning_rate_rises_then_falls():
    config = TrainConfig(learning_rate=1.0, final_learning_rate=0.2, warmup_steps=4, num_steps=104)
    rates = [learning_rate(step, config) for step in range(105)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0 and rates[54] == pytest.approx(0.6) and rates[104] == pytest.approx(0.2)
    assert all(a >= b for a, b in zip(rates[4:], rates[5:], strict=False))


def test_command_line():
    assert parse([]) == ("demo", PRESETS["demo"])
    preset, config = parse(["stage1", "--batch-size", "3", "--loss-weights.latent-l1", "2"])
    assert preset == "stage1" and config.batch_size == 3 and config.loss_weights == {"latent_l1": 2.0, "pixel_l1": 1.0}
    with pytest.raises(TrainError, match="no preset 'stage9'"):
        parse(["stage9"])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"loss_weights": {}}, TrainError, "weight over 0"),
        ({"loss_weights": {"pixel_l1": 0.0}}, TrainError, "weight over 0"),
        ({"pixel_every": 2, "loss_weights": {"pixel_l1": 1.0}}, TrainError, "pixel_every must be 1 where latent_l1"),
        ({"hdtf_samples_dir": Path("nowhere")}, CacheError, "nowhere is no cache.*datasets_process.py"),
        ({"models_dir": Path("nowhere")}, WeightsError, "nowhere/sd-vae-ft-mse/config.json is missing; get it from"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(config, change, error, message):
    with pytest.raises(error, match=message):
        train("demo", replace(config, **change))


NO_PATH = ["data", "", None, 3, b"data"]
NO_COUNT = [0, -1, 1.0, True, "1", None, float("nan"), 10**13]
NO_NUMBER = [True, "1", None, (1.0,), float("nan"), float("inf"), -1e-9]
UNFIT = {
    "hdtf_samples_dir": NO_PATH,
    "checkpoint_dir": NO_PATH,
    "log_dir": NO_PATH,
    "models_dir": NO_PATH,
    "contract": ["v2", "", None, 1],
    "held_out": [*NO_NUMBER, 0.0, 0, 1.0, 1, 1.5],
    "num_workers": [-1, 513, 1.0, True, "4", None],
    "batch_size": NO_COUNT,
    "grad_accum_steps": NO_COUNT,
    "loss_weights": [
        {"pixel": 1.0},
        {"latent_l1": 1.0, "lpips": 1.0},
        *({"latent_l1": 1.0, "pixel_l1": weight} for weight in NO_NUMBER),
        {1: 1.0},
        ["latent_l1"],
        None,
        1.0,
    ],
    "pixel_every": NO_COUNT,
    "chunk_size": NO_COUNT,
    "optimizer": ["sgd", "AdamW", "", None, 1],
    "learning_rate": [*NO_NUMBER, 0.0, 0],
    "warmup_steps": [-1, 1.0, True, "1", None, 10**13],
    "final_learning_rate": NO_NUMBER,
    "weight_decay": NO_NUMBER,
    "betas": [(0.9,), (0.9, 0.99, 0.999), (), [0.9, 0.99], 0.9, None, (1.0, 0.9), (0.9, float("nan")), (-0.1, 0.9)],
    "max_grad_norm": [*NO_NUMBER, 0.0, 0],
    "ema_decay": [*NO_NUMBER, 1.0, 1, 1.5],
    "ema_every": NO_COUNT,
    "gradient_checkpointing": [0, 1, "yes", None],
    "num_steps": NO_COUNT,
    "log_every": NO_COUNT,
    "sample_every": NO_COUNT,
    "save_every": NO_COUNT,
    "keep_states": NO_COUNT,
    "seed": [-1, 2**32, 1.0, True, "1", None],
}


@pytest.mark.parametrize("name", [constant.name for constant in fields(TrainConfig)])
def test_an_unfit_constant_is_refused_by_name_before_anything_is_done(name, tmp_path, monkeypatch):
    """A constant without an entry in UNFIT fails."""
    monkeypatch.chdir(tmp_path)
    for stage in ("Accelerator", "Cache", "load_vae", "build_unet", "own_folder", "RunLog"):
        monkeypatch.setattr(musetalk_trainer, stage, lambda *_, **__: pytest.fail("it went on"))
    for preset, config in PRESETS.items():
        for value in UNFIT[name]:
            with pytest.raises(UserError, match=rf"^{name}(\.\w+)?(\.\[key\])? must .*, not ") as caught:
                train(preset, replace(config, **{name: value}))
            assert str(caught.value).endswith(repr(value)) or isinstance(value, tuple | dict)
    assert not list(tmp_path.iterdir())


def test_the_choices_of_constants_are_those_there_are():
    kinds = get_type_hints(TrainConfig)
    assert get_args(kinds["contract"]) == tuple(CONTRACTS)
    assert get_args(kinds["optimizer"]) == tuple(OPTIMIZERS)
    terms, _ = get_args(kinds["loss_weights"])
    assert all(get_args(terms) == tuple(config.loss_weights) for config in PRESETS.values())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_larger_than_the_data_is_refused_before_a_network_is_loaded(config, monkeypatch, accumulate):
    """Of the three clips of 30 frames one is held out."""

    def reached(*_):
        raise InterruptedError

    monkeypatch.setattr(musetalk_trainer, "load_vae", reached)
    config = replace(config, grad_accum_steps=accumulate)
    with pytest.raises(TrainError, match=r"^batch_size x grad_accum_steps is 62, but .* has 60 samples to train on"):
        train("demo", replace(config, batch_size=62 // accumulate))
    with pytest.raises(InterruptedError):
        train("demo", replace(config, batch_size=60 // accumulate))
    assert not config.checkpoint_dir.exists() and not config.log_dir.exists()


def test_another_contract_than_that_of_the_state_is_refused(config):
    train("demo", replace(config, num_steps=2, sample_every=2))
    with pytest.raises(ContractError, match="window_edge = 'zero', but 'clamp' is asked for"):
        train("demo", replace(config, contract="musetalk_v1"))


def test_audio_features_of_another_width_are_refused(config, mini, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "sd-vae-ft-mse").symlink_to(mini / "sd-vae-ft-mse")
    (tmp_path / "models" / "musetalk").mkdir()
    text = (mini / "musetalk" / "musetalk.json").read_text()
    (tmp_path / "models/musetalk/musetalk.json").write_text(text.replace('dim": 64', 'dim": 32'))
    with pytest.raises(TrainError, match="has cross_attention_dim 32, but the audio features in .* are 64 wide"):
        train("demo", replace(config, models_dir=tmp_path / "models"))


def test_a_cache_of_another_vae_is_refused(config, sample_cache, tmp_path):
    folder = tmp_path / "cache"
    (folder / "clips").mkdir(parents=True)
    for path in (sample_cache.folder / "clips").iterdir():
        (folder / "clips" / path.name).symlink_to(path)
    text = (sample_cache.folder / "contract.json").read_text()
    (folder / "contract.json").write_text(text.replace(sample_cache.contract.vae, "0123456789abcdef"))
    assert len(Cache(folder).clips) == 3
    with pytest.raises(ContractError, match="vae = '0123456789abcdef'"):
        train("demo", replace(config, hdtf_samples_dir=folder))
