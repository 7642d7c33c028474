"""The real trainer on the small set: the files it writes, exact resume, stopping."""

from __future__ import annotations

import json
import re
import sys
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
from losses.objective import Objective
from musetalk.contract import CONTRACTS, ContractError
from musetalk.data.cache import Cache, CacheError
from musetalk.errors import UserError
from musetalk.inference.pipeline import LipSyncPipeline
from musetalk.models.lpips import VGG16, Heads
from musetalk.models.syncnet import build_syncnet, save_syncnet
from musetalk.models.trained_unet import read_unet_contract
from musetalk.models.unet import build_unet
from musetalk.models.weights import WeightsError
from musetalk.training.checkpoint import save_state, save_unet
from musetalk.training.state import OPTIMIZERS
from musetalk.training.step import scheduled_rate
from musetalk.training.sync_check import SyncError
from musetalk_trainer import (
    LOSSES,
    PRESETS,
    TrainConfig,
    TrainError,
    parse,
    train,
    weights,
)


@pytest.fixture
def config(sample_cache, tmp_path) -> TrainConfig:
    """Four steps of the demo, small, not validated."""
    return replace(
        PRESETS["demo"],
        hdtf_samples_dir=sample_cache.folder,
        held_out_identities=(),
        checkpoint_dir=tmp_path / "checkpoints",
        log_dir=tmp_path / "log",
        batch_size=2,
        pixel_every=1,
        num_steps=4,
        warmup_steps=2,
        log_every=1,
        sample_every=4,
        val_every=0,
        save_every=2,
    )


@pytest.fixture
def expert(tmp_path) -> str:
    """An untrained sync expert that sees five frames."""
    return str(save_syncnet(tmp_path / "expert", 1, build_syncnet("wav2lip_narrow", 0), "wav2lip_narrow").parent)


@pytest.fixture
def every_loss(config, expert) -> TrainConfig:
    """Windows of five frames, with narrow discriminators and all losses but LPIPS, whose network is slow."""
    return replace(
        config,
        loss_weights={name: 0.5 for name in LOSSES} | {"lpips": 0.0},
        frames=5,
        batch_size=1,
        grad_accum_steps=2,
        adversarial_start=1,
        adaptive_every=2,
        discriminator_width=4,
        sync_expert=expert,
        unfit_expert=True,
    )


def records_of(config: TrainConfig, preset: str = "demo") -> list[dict]:
    return [json.loads(line) for line in (config.log_dir / preset / "stats.jsonl").read_text().splitlines()]


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
    decay = 1e-2 if optimizer == "adamw" else 0.0
    config = replace(config, optimizer=optimizer, weight_decay=decay, grad_accum_steps=2)
    train("demo", config)
    parted = replace(config, checkpoint_dir=tmp_path / "parted", log_dir=tmp_path / "parted_log")
    # The learning rate depends on num_steps, so the first half is an interruption, not a shorter run.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("musetalk.training.run.save_state", interrupt_after(save_state))
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


def test_two_steps_and_a_resume_equal_four_steps_with_every_loss(every_loss, tmp_path):
    train("demo", every_loss)
    parted = replace(every_loss, checkpoint_dir=tmp_path / "parted", log_dir=tmp_path / "parted_log")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("musetalk.training.run.save_state", interrupt_after(save_state))
        with pytest.raises(KeyboardInterrupt):
            train("demo", parted)
    train("demo", parted)
    whole = state_of(every_loss, 4)
    assert_equal(whole, state_of(parted, 4))
    assert {name.split("/")[1] for name in whole} == {
        *(
            "unet",
            "optimizer",
            "optimizer_name",
            "ema",
            "gan_losses",
            "adaptive_weights",
            "sync_offset",
            "step",
            "contract",
        )
    }
    assert (every_loss.log_dir / "demo/stats.jsonl").read_bytes() == (parted.log_dir / "demo/stats.jsonl").read_bytes()
    assert (every_loss.log_dir / "demo/sync_check/0000000.png").is_file()

    # Adversarial losses count from the second step on, and the discriminators learn.
    own, adv_terms = {"adv_d", "adv_d_mouth"}, {"adv_g", "adv_g_mouth", "feat_match", "feat_match_mouth"}
    for record in records_of(every_loss):
        assert record.keys() >= {"latent_l1", "pixel_l1", "sync"}
        assert bool(record.keys() & (own | adv_terms)) == (record["step"] > 1)
        assert record["step"] == 1 or record.keys() >= own | adv_terms | {"adaptive_weight", "adaptive_weight_mouth"}
    assert whole["/adaptive_weights/face"] > 0 and whole["/adaptive_weights/mouth"] > 0
    before = state_of(every_loss, 2)
    for region in ("face", "mouth"):
        names = [name for name in whole if name.startswith(f"/gan_losses/{region}/network") and "original" in name]
        assert names and all(not torch.equal(before[name], whole[name]) for name in names)
    assert "accuracy" in (every_loss.log_dir / "trainer.log").read_text()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"loss_weights": weights(latent_l1=1.0, pixel_l1=1.0)}, "other discriminators; set loss_weights"),
        ({"adaptive_every": 0}, "adaptive_every"),
        ({"optimizer": "adamax", "weight_decay": 0.0}, "optimizer = 'adamw', not 'adamax'"),
    ],
)
def test_a_state_of_other_losses_is_refused(every_loss, change, said):
    train("demo", replace(every_loss, num_steps=2, sample_every=3))
    with pytest.raises(WeightsError, match=said):
        train("demo", replace(every_loss, **change))


def test_an_expert_that_cannot_tell_is_refused_before_a_step_is_made(every_loss):
    with pytest.raises(UserError, match="the sync expert cannot be trusted on these faces.*unfit_expert"):
        train("demo", replace(every_loss, unfit_expert=False))
    assert not list((every_loss.checkpoint_dir / "demo").glob("*.*t*"))


def test_an_expert_of_another_window_is_refused(every_loss):
    with pytest.raises(TrainError, match=r"^frames must be 5, .* not 6"):
        train("demo", replace(every_loss, frames=6))


def test_lpips_without_its_weights_is_refused_with_their_place_and_source(config):
    with pytest.raises(WeightsError, match=r"models/mini/vgg/vgg16-397923af.pth is missing; get it from https://"):
        train("demo", replace(config, loss_weights=weights(latent_l1=1.0, lpips=0.1)))


def test_lpips_trains_where_its_weights_are(config, mini, tmp_path):
    models = tmp_path / "models"
    (models / "vgg").mkdir(parents=True)
    for folder in mini.iterdir():
        (models / folder.name).symlink_to(folder.resolve())
    torch.manual_seed(0)
    torch.save(VGG16().state_dict(), models / "vgg/vgg16-397923af.pth")
    torch.save({name: tensor.abs() for name, tensor in Heads().state_dict().items()}, models / "vgg/lpips.pth")
    run = replace(config, models_dir=models, num_steps=1, batch_size=1, sample_every=2, loss_weights=weights(lpips=1.0))
    train("demo", run)
    (record,) = records_of(run)
    assert record["lpips"] > 0 and record["grad_norm"] > 0


def test_stage_2_goes_on_from_what_stage_1_left_without_moving_files(config, sample_cache):
    run = replace(config, num_steps=2, sample_every=3, loss_weights=weights(latent_l1=1.0))
    train("stage1", run)
    train("stage2", replace(run, start_from="stage1", num_steps=1, save_every=1, learning_rate=1e-12, warmup_steps=0))
    left = load_file(run.checkpoint_dir / "stage1/unet-0000002.safetensors")
    state = torch.load(run.checkpoint_dir / "stage2/training-state-0000001.pt", weights_only=True)
    for name, tensor in left.items():
        torch.testing.assert_close(state["unet"][name], tensor, atol=1e-6, rtol=1e-4)
    assert (
        f"starts from {run.checkpoint_dir}/stage1/unet-0000002.safetensors" in (run.log_dir / "trainer.log").read_text()
    )
    other = replace(sample_cache.contract, window_edge="clamp")
    save_unet(run.checkpoint_dir / "stage1", 3, left, other)
    with pytest.raises(ContractError, match="stage1/unet-0000003.safetensors was made with window_edge = 'clamp'"):
        train("stage3", replace(run, start_from="stage1"))


def test_published_weights_are_begun_with_under_the_contract_named(config, mini, tmp_path):
    unet = build_unet(mini, 3, positional_encoding=True)
    torch.save(unet.model.state_dict(), tmp_path / "unet.pth")
    run = replace(config, start_from=str(tmp_path / "unet.pth"), num_steps=1, sample_every=2, learning_rate=1e-12)
    train("demo", run)
    saved = state_of(run, 1)
    for name, tensor in unet.model.state_dict().items():
        torch.testing.assert_close(saved[f"/unet/{name}"], tensor, atol=1e-6, rtol=1e-4)
    assert "unet.pth, which carries no contract" in (run.log_dir / "trainer.log").read_text()
    with pytest.raises(WeightsError, match="nothing is neither a file nor a folder with unet-<step>"):
        train("other", replace(run, start_from="nothing"))


def test_validation_after_the_last_step_tells_what_the_mouth_follows(config):
    run = replace(config, num_steps=1, sample_every=2, val_every=1000, loss_weights=weights(latent_l1=1.0))
    train("demo", run)
    _, record = records_of(run)
    for name in ("psnr", "ssim", "psnr_mouth", "ssim_mouth"):
        assert all(f"val_{name}{column}" in record for column in ("", "_truth", "_reference"))
    assert record["val_lmd_truth"] < record["val_lmd_reference"]
    assert record["val_psnr_truth"] > record["val_psnr_reference"] > record["val_psnr"]
    for kind in ("validation", "mouths"):
        assert cv2.imread(str(run.log_dir / "demo" / kind / "0000001.png")) is not None
    assert (run.log_dir / "demo/curves.png").is_file()
    log = (run.log_dir / "trainer.log").read_text()
    assert re.search("prediction +truth +reference\npsnr ", log)
    assert re.search(r"\nr_other_audio +\S+\nr_source_audio +\S+\nreference_share +\S+\nopening_in_silence ", log)


def test_clips_too_short_to_validate_on_are_refused_before_a_step_is_made(config, monkeypatch):
    monkeypatch.setattr("musetalk.training.validation.MIN_FRAMES", 30)
    with pytest.raises(CacheError, match="no held-out clip has 40 consecutive usable frames"):
        train("demo", replace(config, val_every=1000))
    assert not config.checkpoint_dir.exists()


def test_a_machine_without_mediapipe_is_refused_before_a_step_is_made(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "mediapipe", None)
    with pytest.raises(UserError, match="mediapipe, which is not installed"):
        train("demo", replace(config, val_every=1000))
    assert not config.checkpoint_dir.exists()


# The check of a later stage.


def test_a_later_stage_is_checked_without_the_weights_of_the_one_before(every_loss, capsys):
    """The expert is untrained: it is refused, or taken by a user who says so; nothing is trained or left to go on."""
    run = replace(every_loss, start_from="stage1", check=True, val_every=1000)
    train("stage2", run)
    printed = capsys.readouterr().out
    assert "stage1 has no weights yet" in printed and "accuracy" in printed and "UNet of" in printed
    assert cv2.imread(str(run.log_dir / "stage2/sync_check.png")).shape == (400, 800, 3)
    with pytest.raises(SyncError, match="cannot be trusted"):
        train("stage2", replace(run, unfit_expert=False))
    assert not run.checkpoint_dir.exists() and len(list(run.log_dir.rglob("*.*"))) == 1


def test_a_check_reads_the_weights_that_are_there(config, sample_cache, mini):
    run = replace(config, start_from="stage1", check=True)
    unet = build_unet(mini, 3, positional_encoding=True)
    stage1 = run.checkpoint_dir / "stage1"
    save_unet(stage1, 1, unet.model.state_dict(), sample_cache.contract)
    train("stage2", run)
    with pytest.raises(ContractError, match="positional_encoding = True, but False is asked for"):
        train("stage2", replace(run, positional_encoding=False))
    with pytest.raises(WeightsError, match="nothing is neither a file"):
        train("stage2", replace(run, start_from="nothing"))
    assert [path.name for path in run.checkpoint_dir.iterdir()] == ["stage1"]


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
        monkeypatch.setattr("musetalk.training.distributed.precision", lambda _: "no")
        train("demo", run)
        states.append(torch.load(run.checkpoint_dir / "demo" / "training-state-0000001.pt", weights_only=True))
    moments = [flat(state["optimizer"]["state"]) for state in states]
    for name, value in moments[0].items():
        if name.endswith("exp_avg"):
            torch.testing.assert_close(value, moments[1][name], rtol=1e-3, atol=1e-6)


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_update(config, monkeypatch):
    calls = []
    generator_loss = Objective.generator_loss

    def poisoned(*args, **options):
        loss, terms, images = generator_loss(*args, **options)
        calls.append(1)
        if len(calls) == 3:
            loss, terms["pixel_l1"] = loss * float("nan"), terms["pixel_l1"] * float("nan")
        return loss, terms, images

    monkeypatch.setattr(Objective, "generator_loss", poisoned)
    with pytest.raises(TrainError, match=r"step 3: .*not finite: pixel_l1\).*sample_0\d, frame \d+") as error:
        train("demo", config)
    assert str(config.checkpoint_dir) in str(error.value)
    good = state_of(config, 2)
    assert all(value.isfinite().all() for value in good.values() if isinstance(value, torch.Tensor))
    with pytest.MonkeyPatch.context() as patch:  # or the step is skipped
        patch.setattr(Objective, "generator_loss", poisoned)
        calls.clear()
        other = config.checkpoint_dir.parent / "skipping"
        train("demo", replace(config, on_nonfinite="skip", checkpoint_dir=other))
        assert (other / "demo/training-state-0000004.pt").exists()
        assert re.search(r"skipped: step 3: .*not finite: pixel_l1\)", (config.log_dir / "trainer.log").read_text())
    monkeypatch.undo()
    train("demo", config)  # it resumes from there
    assert (config.checkpoint_dir / "demo" / "training-state-0000004.pt").exists()


def test_frozen_networks_stay_frozen(config, monkeypatch):
    networks = []
    generator_loss = Objective.generator_loss

    def watched(objective, *args, **options):
        networks.append(objective.decoder(1).__self__.autoencoder)
        return generator_loss(objective, *args, **options)

    monkeypatch.setattr(Objective, "generator_loss", watched)
    train("demo", replace(config, num_steps=1))
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in networks[0].parameters())


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
    rates = [scheduled_rate(step, config) for step in range(105)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0 and rates[54] == pytest.approx(0.6) and rates[104] == pytest.approx(0.2)
    assert all(a >= b for a, b in zip(rates[4:], rates[5:], strict=False))


def test_command_line():
    assert parse([]) == ("demo", PRESETS["demo"])
    preset, config = parse(["stage1", "--batch-size", "3", "--loss-weights.latent-l1", "2"])
    assert (
        preset == "stage1"
        and config.batch_size == 3
        and config.loss_weights == weights(latent_l1=2.0, pixel_l1=1.0, lpips=0.1)
    )
    with pytest.raises(UserError, match="preset must be one of .*, not 'stage9'"):
        parse(["stage9"])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"loss_weights": {}}, TrainError, "weight over 0"),
        ({"loss_weights": {"pixel_l1": 0.0}}, TrainError, "weight over 0"),
        ({"pixel_every": 2, "loss_weights": {"pixel_l1": 1.0}}, TrainError, "pixel_every must be 1 .* latent_l1"),
        ({"optimizer": "adamax"}, TrainError, "weight_decay must be 0 with adamax"),
        ({"hdtf_samples_dir": Path("nowhere")}, CacheError, "nowhere is not a cache.*datasets_process.py"),
        ({"models_dir": Path("nowhere")}, WeightsError, "nowhere/sd-vae-ft-mse/.* is missing; get it from"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(config, change, error, message):
    with pytest.raises(error, match=message):
        train("demo", replace(config, **change))


NO_PATH = ["data", "", None, 3, b"data"]
NO_COUNT = [0, -1, 1.0, True, "1", None, float("nan"), 10**13]
NO_NUMBER = [True, "1", None, (1.0,), float("nan"), float("inf"), -1e-9]
NO_COUNT_OR_ZERO = [-1, 1.0, True, "1", None, 10**13]
NO_BETAS = [(0.9,), (0.9, 0.99, 0.999), (), [0.9, 0.99], 0.9, None, (1.0, 0.9), (0.9, float("nan")), (-0.1, 0.9)]
UNFIT = {
    "hdtf_samples_dir": NO_PATH,
    "checkpoint_dir": NO_PATH,
    "log_dir": NO_PATH,
    "models_dir": NO_PATH,
    "start_from": [None, 1, Path("checkpoints")],
    "contract": ["v2", "", None, 1],
    "positional_encoding": [0, 1, "yes", None],
    "held_out": [*NO_NUMBER, 0.0, 0, 1.0, 1, 1.5],
    "held_out_identities": ["sample_05", ["sample_05"], None, (1,)],
    "references": ["near", "", None, 1],
    "min_reference_gap": NO_COUNT,
    "frames": NO_COUNT,
    "num_workers": [-1, 513, 1.0, True, "4"],
    "prefetch": NO_COUNT,
    "batch_size": NO_COUNT,
    "grad_accum_steps": NO_COUNT,
    "loss_weights": [
        {"pixel": 1.0},
        *({"latent_l1": 1.0, "pixel_l1": weight} for weight in NO_NUMBER),
        {1: 1.0},
        ["latent_l1"],
        None,
        1.0,
    ],
    "pixel_every": NO_COUNT,
    "chunk_size": NO_COUNT,
    "tiny_decoder": [None, 1, Path("checkpoints")],
    "full_decoder_every": NO_COUNT_OR_ZERO,
    "adversarial_start": NO_COUNT_OR_ZERO,
    "adaptive_every": NO_COUNT_OR_ZERO,
    "discriminator_width": NO_COUNT,
    "discriminator_learning_rate": [*NO_NUMBER, 0.0, 0],
    "discriminator_betas": NO_BETAS,
    "sync_expert": [None, 1, Path("syncnet")],
    "unfit_expert": [0, 1, "yes", None],
    "optimizer": ["sgd", "AdamW", "", None, 1],
    "learning_rate": [*NO_NUMBER, 0.0, 0],
    "warmup_steps": NO_COUNT_OR_ZERO,
    "final_learning_rate": NO_NUMBER,
    "weight_decay": NO_NUMBER,
    "betas": NO_BETAS,
    "max_grad_norm": [*NO_NUMBER, 0.0, 0],
    "on_nonfinite": ["go on", "", None, True],
    "ema_decay": [*NO_NUMBER, 1.0, 1, 1.5],
    "ema_every": NO_COUNT,
    "gradient_checkpointing": [0, 1, "yes", None],
    "compile": [0, 1, "yes", None],
    "device": ["gpu", "", "cuda:1", "meta", None, 0],
    "check": [0, 1, "yes", None],
    "num_steps": NO_COUNT,
    "log_every": NO_COUNT,
    "sample_every": NO_COUNT,
    "val_every": NO_COUNT_OR_ZERO,
    "val_frames": NO_COUNT,
    "save_every": NO_COUNT,
    "save_minutes": NO_NUMBER,
    "keep_states": NO_COUNT,
    "keep_weights": NO_COUNT,
    "keep_weights_every": NO_COUNT_OR_ZERO,
    "seed": [-1, 2**32, 1.0, True, "1", None],
}


@pytest.mark.parametrize("name", [constant.name for constant in fields(TrainConfig)])
def test_an_unfit_constant_is_refused_by_name_before_anything_is_done(name, tmp_path, monkeypatch):
    """A constant without an entry in UNFIT fails."""
    monkeypatch.chdir(tmp_path)
    for stage in ("start_processes", "Cache", "load_pixel_vae", "build_unet", "open_run"):
        monkeypatch.setattr(musetalk_trainer, stage, lambda *_, **__: pytest.fail("it went on"))
    for preset, config in PRESETS.items():
        for value in UNFIT[name]:
            with pytest.raises(UserError, match=rf"^{name}(\.\w+)?(\.\[key\])? (cannot be|must) ") as caught:
                train(preset, replace(config, **{name: value}))
            assert repr(value) in str(caught.value) or isinstance(value, tuple | dict)
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

    monkeypatch.setattr(musetalk_trainer, "load_pixel_vae", reached)
    config = replace(config, grad_accum_steps=accumulate)
    said = r"^batch_size x grad_accum_steps x processes is 62, but .* has 60 samples to train on"
    with pytest.raises(TrainError, match=said):
        train("demo", replace(config, batch_size=62 // accumulate))
    with pytest.raises(InterruptedError):
        train("demo", replace(config, batch_size=60 // accumulate))
    assert not config.checkpoint_dir.exists() and not config.log_dir.exists()


def test_another_contract_than_that_of_the_cache_is_refused(config):
    with pytest.raises(ContractError, match="crop = 'rigid', but 'nose_centred' is asked for"):
        train("demo", replace(config, contract="musetalk_v1"))


def test_the_positional_encoding_is_a_constant_of_training_and_part_of_the_contract(config):
    without = replace(config, positional_encoding=False, num_steps=2, sample_every=2, loss_weights={"latent_l1": 1.0})
    train("demo", without)
    weights = config.checkpoint_dir / "demo/unet-0000002.safetensors"
    assert not read_unet_contract(weights).positional_encoding
    assert not LipSyncPipeline.from_checkpoint(weights, config.models_dir).unet.positions.any()
    with pytest.raises(ContractError, match="False, but True is asked for; set positional_encoding to False"):
        train("demo", replace(without, positional_encoding=True))


def test_another_contract_than_that_of_the_state_is_refused(config, monkeypatch):
    train("demo", replace(config, num_steps=2, sample_every=2))
    monkeypatch.setattr(
        musetalk_trainer, "training_contract", lambda _, cache, __: replace(cache.contract, window_edge="clamp")
    )
    with pytest.raises(ContractError, match="window_edge = 'zero', but 'clamp' is asked for"):
        train("demo", config)


def test_audio_features_of_another_width_are_refused(config, mini, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "sd-vae-ft-mse").symlink_to(mini / "sd-vae-ft-mse")
    (tmp_path / "models" / "musetalk").mkdir()
    text = (mini / "musetalk" / "musetalk.json").read_text()
    (tmp_path / "models/musetalk/musetalk.json").write_text(text.replace('dim": 64', 'dim": 32'))
    with pytest.raises(WeightsError, match="5 states of width 64, but the UNet expects 5 of width 32"):
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
