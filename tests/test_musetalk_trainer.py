"""The real trainer with the small networks: the files it writes, exact resume, refusals."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
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
from musetalk.data.dataset import FaceDataset, References
from musetalk.errors import UserError
from musetalk.evaluation.sync_check import SyncError
from musetalk.inference.pipeline import LipSyncPipeline
from musetalk.models.lpips import VGG16, Heads
from musetalk.models.syncnet import build_syncnet, save_syncnet
from musetalk.models.trained_unet import read_unet_contract
from musetalk.models.unet import build_unet
from musetalk.models.weights import WeightsError
from musetalk.training.checkpoint import save_unet
from musetalk.training.state import OPTIMIZERS, load_silence
from musetalk_trainer import LOSSES, PRESETS, TrainConfig, TrainError, parse, train, weights
from tests.conftest import interrupted_after_a_save


@pytest.fixture
def config(sample_cache, tmp_path, monkeypatch) -> TrainConfig:
    """Four steps of preset demo in small batches, without validation."""
    monkeypatch.setattr("musetalk_trainer.BOUNDS_SAMPLES", 2)
    return replace(
        PRESETS["demo"],
        hdtf_samples_dir=sample_cache.folder,
        held_out_identities=(),
        start_from="",
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
def one_step(config) -> TrainConfig:
    """A single step on latents, the fastest training."""
    return replace(config, num_steps=1, sample_every=2, loss_weights=weights(latent_l1=1.0))


@pytest.fixture
def every_loss(config, tmp_path) -> TrainConfig:
    """Three steps on windows of five frames with all losses but LPIPS, whose network is slow."""
    tensors = build_syncnet("wav2lip_narrow", 0).state_dict()
    expert = save_syncnet(tmp_path / "expert", 1, tensors, "wav2lip_narrow").parent
    return replace(
        config,
        loss_weights={name: 0.5 for name in LOSSES} | {"lpips": 0.0},
        frames=5,
        batch_size=1,
        grad_accum_steps=2,
        num_steps=3,
        adversarial_start=1,
        adaptive_every=1,
        discriminator_width=4,
        sync_expert=str(expert),
        unfit_expert=True,
    )


def records_of(config: TrainConfig) -> list[dict]:
    """The records after the first step."""
    records = [json.loads(line) for line in (config.log_dir / "demo/stats.jsonl").read_text().splitlines()]
    return [record for record in records if record["step"]]


def log_of(config: TrainConfig) -> str:
    return (config.log_dir / "trainer.log").read_text()


def flat(values: object, prefix: str = "") -> dict[str, object]:
    """Nested dicts and lists as one dict of leaves."""
    if isinstance(values, list | tuple):
        values = dict(enumerate(values))
    if isinstance(values, dict):
        return {k: v for key, value in values.items() for k, v in flat(value, f"{prefix}/{key}").items()}
    return {prefix: values}


def state_of(config: TrainConfig, step: int) -> dict[str, object]:
    path = config.checkpoint_dir / "demo" / f"training-state-{step:07d}.pt"
    return flat(torch.load(path, weights_only=True))


# Files and resuming.


def test_a_run_writes_states_weights_records_and_pictures(config):
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
    assert all(f"saved {run_dir}/unet-000000{step}.safetensors" in log_of(config) for step in (2, 4))
    records = records_of(config)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert set(records[0]) == {"step", "latent_l1", "pixel_l1", "grad_norm", "learning_rate"}
    assert cv2.imread(str(config.log_dir / "demo/samples/0000004.png")).shape == (6 * 256, 4 * 256, 3)

    # Weights to use: plain names, averaged, one metadata key.
    path = run_dir / "unet-0000004.safetensors"
    saved = load_file(path)
    state = torch.load(run_dir / "training-state-0000004.pt", weights_only=True)
    assert saved.keys() == state["unet"].keys() == state["ema"].keys()
    assert all(torch.equal(value, state["ema"][name]) for name, value in saved.items())
    assert any(not torch.equal(value, state["unet"][name]) for name, value in saved.items())
    with safetensors.safe_open(path, framework="pt") as file:
        assert list(file.metadata()) == ["contract"]


def test_silence_is_that_of_the_audio_encoder_of_the_cache(one_step, sample_cache):
    silence = load_silence(one_step.models_dir, sample_cache, torch.device("cpu"))
    assert silence.shape == (2, 1500, *next(iter(sample_cache.clips.values())).tensor("audio_features").shape[1:])
    assert silence.dtype == np.float16 and np.isfinite(silence).all() and (silence[0] != silence[1]).any()
    other = replace(sample_cache.contract, audio_encoder="0" * 16)
    with pytest.raises(ContractError, match="audio_encoder"):
        load_silence(one_step.models_dir, SimpleNamespace(contract=other, folder="old"), torch.device("cpu"))


def test_a_training_hears_silence(one_step, monkeypatch):
    """With any mouth counted as closed, since the sample hardly closes it."""
    monkeypatch.setattr("musetalk.data.dataset.CLOSED", 9.0)
    losses = []
    for share in (0.0, 0.999):
        root = one_step.checkpoint_dir / str(share)
        config = replace(one_step, silence_share=share, checkpoint_dir=root, log_dir=root / "log")
        train("demo", config)
        losses.append(records_of(config)[0]["latent_l1"])
    assert np.isfinite(losses).all() and losses[0] != losses[1]


def test_an_interrupted_run_resumes_exactly_with_all_losses(every_loss, tmp_path):
    train("demo", every_loss)
    parted = replace(every_loss, checkpoint_dir=tmp_path / "parted", log_dir=tmp_path / "parted_log")
    with interrupted_after_a_save():
        train("demo", parted)
    assert not (parted.checkpoint_dir / "demo/training-state-0000003.pt").exists()
    train("demo", parted)
    whole, resumed = state_of(every_loss, 3), state_of(parted, 3)
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]) if isinstance(value, torch.Tensor) else value == resumed[name], name
    for name in ("unet-0000002.safetensors", "unet-0000003.safetensors"):
        assert (every_loss.checkpoint_dir / "demo" / name).read_bytes() == (
            parted.checkpoint_dir / "demo" / name
        ).read_bytes()
    for name in ("stats.jsonl", "samples/0000003.png"):
        assert (every_loss.log_dir / "demo" / name).read_bytes() == (parted.log_dir / "demo" / name).read_bytes()
    assert (every_loss.log_dir / "demo/sync_check/0000000.png").is_file()

    # Adversarial losses count from the second step on, and the discriminators learn.
    disc_terms = {name + suffix for name in ("adv_d", "adv_g", "feat_match") for suffix in ("", "_mouth")}
    first, *others = records_of(every_loss)
    assert first.keys() >= {"latent_l1", "pixel_l1", "sync"} and not first.keys() & disc_terms
    assert all(record.keys() >= disc_terms | {"adaptive_weight", "adaptive_weight_mouth"} for record in others)
    assert whole["/adaptive_weights/face"] > 0 and whole["/adaptive_weights/mouth"] > 0
    before = state_of(every_loss, 2)
    for region in ("face", "mouth"):
        names = [name for name in whole if name.startswith(f"/gan_losses/{region}/network") and "original" in name]
        assert names and all(not torch.equal(before[name], whole[name]) for name in names)
        assert len(whole[names[0]]) == every_loss.discriminator_width


def test_a_state_of_another_training_is_refused(every_loss):
    train("demo", replace(every_loss, num_steps=1))
    for change, message in (
        ({"loss_weights": weights(latent_l1=1.0, pixel_l1=1.0)}, "other discriminators; set loss_weights"),
        ({"adaptive_every": 0}, "adaptive_every"),
        ({"discriminator_width": 8}, "training-state-0000001.pt"),
        ({"optimizer": "adamax", "weight_decay": 0.0}, "optimizer = 'adamw', not 'adamax'"),
    ):
        with pytest.raises(WeightsError, match=message):
            train("demo", replace(every_loss, **change))


def test_a_non_finite_gradient_stops_the_run_or_skips_the_step(config, monkeypatch):
    calls = []
    generator_loss = Objective.generator_loss

    def poison_third_call(*args, **options):
        loss, terms, images = generator_loss(*args, **options)
        calls.append(1)
        if len(calls) == 3:
            loss, terms["pixel_l1"] = loss * float("nan"), terms["pixel_l1"] * float("nan")
        return loss, terms, images

    monkeypatch.setattr(Objective, "generator_loss", poison_third_call)
    with pytest.raises(TrainError, match=r"step 3: .*not finite: pixel_l1\).*sample_0\d, frame \d+") as error:
        train("demo", config)
    assert str(config.checkpoint_dir) in str(error.value)
    assert all(value.isfinite().all() for value in state_of(config, 2).values() if isinstance(value, torch.Tensor))
    calls[:] = [1, 1]  # the resumed run starts with the third step
    train("demo", replace(config, on_nonfinite="skip"))
    assert re.search(r"skipped: step 3: .*not finite: pixel_l1\)", log_of(config))
    assert all(value.isfinite().all() for value in state_of(config, 4).values() if isinstance(value, torch.Tensor))


def test_gradient_accumulation_equals_a_larger_batch(config, monkeypatch):
    monkeypatch.setattr("musetalk.training.distributed.precision", lambda _: "no")
    states = []
    for batch_size, accumulate in ((4, 1), (2, 2)):
        AcceleratorState._reset_state(reset_partial_state=True)
        sizes = {"batch_size": batch_size, "grad_accum_steps": accumulate, "num_steps": 1}
        run = replace(config, **sizes, checkpoint_dir=config.checkpoint_dir / str(batch_size))
        train("demo", run)
        states.append(state_of(run, 1))
    for name in (name for name in states[0] if name.endswith("exp_avg")):
        torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_training_lowers_the_loss(config):
    latents = weights(latent_l1=1.0)
    train("demo", replace(config, num_steps=40, save_every=40, batch_size=4, loss_weights=latents))
    losses = [record["latent_l1"] for record in records_of(config)]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_image_losses_are_taken_in_every_nth_step(config):
    train("demo", replace(config, pixel_every=2))
    assert ["pixel_l1" in record for record in records_of(config)] == [False, True, False, True]


# Networks and weights.


def test_a_sync_expert_that_cannot_be_trusted_is_refused(every_loss):
    with pytest.raises(UserError, match="the sync expert cannot be trusted on these faces.*unfit_expert"):
        train("demo", replace(every_loss, unfit_expert=False))
    assert not list((every_loss.checkpoint_dir / "demo").glob("*.*t*"))
    with pytest.raises(TrainError, match=r"^frames must be 5, .* not 6"):
        train("demo", replace(every_loss, frames=6))


def test_lpips_without_its_weights_is_refused_with_their_place_and_source(config):
    with pytest.raises(WeightsError, match=r"models/mini/vgg/vgg16-397923af.pth is missing; get it from https://"):
        train("demo", replace(config, loss_weights=weights(latent_l1=1.0, lpips=0.1)))


@pytest.mark.slow
def test_lpips_trains_with_its_weights(one_step, mini, tmp_path):
    models = tmp_path / "models"
    (models / "vgg").mkdir(parents=True)
    for folder in mini.iterdir():
        (models / folder.name).symlink_to(folder.resolve())
    torch.manual_seed(0)
    torch.save(VGG16().state_dict(), models / "vgg/vgg16-397923af.pth")
    torch.save({name: tensor.abs() for name, tensor in Heads().state_dict().items()}, models / "vgg/lpips.pth")
    train("demo", replace(one_step, models_dir=models, batch_size=1, loss_weights=weights(lpips=1.0)))
    (record,) = records_of(one_step)
    assert record["lpips"] > 0 and record["grad_norm"] > 0


def test_stage2_starts_from_the_weights_of_stage1(one_step, sample_cache):
    run = replace(one_step, learning_rate=1e-12, warmup_steps=0)
    train("stage1", run)
    train("stage2", replace(run, start_from="stage1"))
    path = run.checkpoint_dir / "stage1/unet-0000001.safetensors"
    assert f"starts from {path}" in log_of(run)
    state = torch.load(run.checkpoint_dir / "stage2/training-state-0000001.pt", weights_only=True)
    for name, tensor in load_file(path).items():
        torch.testing.assert_close(state["unet"][name], tensor, atol=1e-6, rtol=1e-4)
    save_unet(run.checkpoint_dir / "stage1", 3, load_file(path), replace(sample_cache.contract, window_edge="clamp"))
    with pytest.raises(ContractError, match="stage1/unet-0000003.safetensors was made with window_edge = 'clamp'"):
        train("stage3", replace(run, start_from="stage1"))


def test_published_weights_are_loaded_under_the_named_contract(one_step, mini, tmp_path):
    unet = build_unet(mini, 3, positional_encoding=True)
    torch.save(unet.model.state_dict(), tmp_path / "unet.pth")
    run = replace(one_step, start_from=str(tmp_path / "unet.pth"), learning_rate=1e-12)
    train("demo", run)
    saved = state_of(run, 1)
    for name, tensor in unet.model.state_dict().items():
        torch.testing.assert_close(saved[f"/unet/{name}"], tensor, atol=1e-6, rtol=1e-4)
    assert "unet.pth, which carries no contract" in log_of(run)
    with pytest.raises(WeightsError, match="nothing is neither a file nor a folder with unet-<step>"):
        train("other", replace(run, start_from="nothing"))


def test_the_positional_encoding_is_part_of_the_contract(one_step):
    without = replace(one_step, positional_encoding=False)
    train("demo", without)
    path = without.checkpoint_dir / "demo/unet-0000001.safetensors"
    assert not read_unet_contract(path).positional_encoding
    assert not LipSyncPipeline.from_checkpoint(path, without.models_dir).unet.positions.any()
    with pytest.raises(ContractError, match="False, but True is requested; set positional_encoding to False"):
        train("demo", one_step)


# Validation.


def test_a_new_run_reports_what_its_losses_start_below_and_cannot_fall_under(config):
    run = replace(config, num_steps=2)
    train("demo", run)
    bounds = json.loads((config.log_dir / "demo/stats.jsonl").read_text().splitlines()[0])
    assert bounds["step"] == bounds["latent_l1_floor"] == 0
    assert 0 < bounds["pixel_l1_floor"] < bounds["pixel_l1_ceiling"] and bounds["latent_l1_ceiling"] > 0
    assert "ceiling: copying" in log_of(run)
    train("demo", config)  # resumes
    assert log_of(config).count("ceiling: copying") == 1


def test_validation_after_the_last_step_records_figures_and_pictures(one_step):
    train("demo", replace(one_step, val_every=1000))
    _, record = records_of(one_step)
    for name in ("psnr", "ssim", "psnr_mouth", "ssim_mouth", "sharpness"):
        assert all(f"val_{name}{column}" in record for column in ("", "_vae", "_reference"))
    assert record["val_lmd_vae"] < record["val_lmd_reference"]
    assert record["val_psnr_vae"] > record["val_psnr_reference"] > record["val_psnr"]
    for kind in ("validation", "mouths"):
        assert cv2.imread(str(one_step.log_dir / "demo" / kind / "0000001.png")) is not None
    assert (one_step.log_dir / "demo/curves.png").is_file()


def test_a_validation_that_cannot_work_is_refused_before_the_first_step(config, monkeypatch):
    monkeypatch.setattr("musetalk.evaluation.windows.MIN_FRAMES", 30)
    with pytest.raises(CacheError, match="no held-out clip has 40 consecutive usable frames"):
        train("demo", replace(config, val_every=1000))
    assert not config.checkpoint_dir.exists()


# --check.


def test_check_tests_the_expert_and_trains_nothing(every_loss, capsys):
    run = replace(every_loss, start_from="stage1", check=True, val_every=1000)
    train("stage2", run)
    printed = capsys.readouterr().out
    assert "stage1 has no weights yet" in printed and "accuracy" in printed and "UNet of" in printed
    assert cv2.imread(str(run.log_dir / "stage2/sync_check.png")).shape == (400, 800, 3)
    with pytest.raises(SyncError, match="cannot be trusted"):
        train("stage2", replace(run, unfit_expert=False))
    assert not run.checkpoint_dir.exists() and len(list(run.log_dir.rglob("*.*"))) == 1


def test_check_reads_existing_weights_to_start_from(config, sample_cache, mini):
    run = replace(config, start_from="stage1", check=True)
    unet = build_unet(mini, 3, positional_encoding=True)
    save_unet(run.checkpoint_dir / "stage1", 1, unet.model.state_dict(), sample_cache.contract)
    train("stage2", run)
    with pytest.raises(ContractError, match="positional_encoding = True, but False is requested"):
        train("stage2", replace(run, positional_encoding=False))
    assert [path.name for path in run.checkpoint_dir.iterdir()] == ["stage1"]


# Constants.


def test_command_line():
    assert parse([]) == ("demo", PRESETS["demo"])
    preset, config = parse(["stage1", "--batch-size", "3", "--loss-weights.latent-l1", "2"])
    assert preset == "stage1" and config.batch_size == 3
    assert config.loss_weights == weights(latent_l1=2.0, pixel_l1=1.0, lpips=0.1)
    assert parse(["--held-out-identities", "a", "b"])[1].held_out_identities == ("a", "b")
    assert parse(["--held-out-identities"])[1].held_out_identities == ()
    with pytest.raises(UserError, match="preset must be one of .*, not 'stage9'"):
        parse(["stage9"])


def test_choices_of_constants_match_the_code():
    kinds = get_type_hints(TrainConfig)
    assert get_args(kinds["contract"]) == tuple(CONTRACTS)
    assert get_args(kinds["optimizer"]) == tuple(OPTIMIZERS)
    assert kinds["references"] == References
    terms, _ = get_args(kinds["loss_weights"])
    assert all(get_args(terms) == tuple(config.loss_weights) for config in PRESETS.values())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hdtf_samples_dir", "data"),
        ("held_out", 1.0),
        ("held_out_identities", "sample_05"),
        ("references", "near"),
        ("batch_size", 0),
        ("batch_size", 2.0),
        ("learning_rate", float("nan")),
        ("loss_weights", {"pixel": 1.0}),
        ("loss_weights", {"latent_l1": -1.0}),
        ("discriminator_width", 0),
        ("discriminator_betas", (1.0, 0.9)),
        ("ema_decay", 1.0),
        ("seed", -1),
    ],
)
def test_an_invalid_constant_is_refused_by_name_before_anything_is_done(name, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"^{name}(\.\w+)?(\.\[key\])? cannot be "):
        train("stage1", replace(PRESETS["stage1"], **{name: value}))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"loss_weights": {}}, TrainError, "weight over 0"),
        ({"loss_weights": {"pixel_l1": 0.0}}, TrainError, "weight over 0"),
        ({"pixel_every": 2, "loss_weights": {"pixel_l1": 1.0}}, TrainError, "pixel_every must be 1 .* latent_l1"),
        ({"optimizer": "adamax"}, TrainError, "weight_decay must be 0 with adamax"),
        ({"hdtf_samples_dir": Path("nowhere")}, CacheError, "nowhere is not a cache.*datasets_process.py"),
        ({"held_out_identities": ("nobody",)}, UserError, "held_out_identities names 'nobody', which is none of the 3"),
        ({"models_dir": Path("nowhere")}, WeightsError, "nowhere/sd-vae-ft-mse/.* is missing; get it from"),
        ({"contract": "musetalk_v1"}, ContractError, "crop = 'rigid', but 'nose_centred' is requested"),
    ],
)
def test_constants_that_cannot_work_are_refused(config, change, error, message):
    with pytest.raises(error, match=message):
        train("demo", replace(config, **change))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_larger_than_the_data_is_refused_before_networks_are_loaded(config, monkeypatch, accumulate):
    """One of the three clips of 30 frames is held out."""

    def interrupt(*_):
        raise InterruptedError

    monkeypatch.setattr(musetalk_trainer, "load_pixel_vae", interrupt)
    config = replace(config, grad_accum_steps=accumulate)
    message = r"^batch_size x grad_accum_steps x processes is 62, but .* has 60 samples to train on"
    with pytest.raises(TrainError, match=message):
        train("demo", replace(config, batch_size=62 // accumulate))
    with pytest.raises(InterruptedError):
        train("demo", replace(config, batch_size=60 // accumulate))
    assert not config.checkpoint_dir.exists() and not config.log_dir.exists()


def test_named_clips_are_held_out_and_references_are_as_chosen(one_step, monkeypatch):
    samples = []
    draw = FaceDataset.draw

    def record(dataset, *arguments):
        samples.append((dataset.slots, draw(dataset, *arguments)))
        return samples[-1][1]

    monkeypatch.setattr(FaceDataset, "draw", record)
    changes = {"held_out_identities": ("sample_00", "sample_02"), "references": "adjacent", "batch_size": 3}
    train("demo", replace(one_step, **changes))
    assert "held out 2 of 3 clips (all clips show one identity): sample_00, sample_02" in log_of(one_step)
    trained = [sample for slots, sample in samples if slots == 3]  # the others are held out
    assert {sample.clip for sample in trained} == {"sample_01"}
    assert all(abs(sample.references[0] - sample.start) == 1 for sample in trained)


def test_audio_features_of_another_width_are_refused(config, mini, tmp_path):
    (tmp_path / "models/musetalk").mkdir(parents=True)
    (tmp_path / "models/sd-vae-ft-mse").symlink_to(mini / "sd-vae-ft-mse")
    text = (mini / "musetalk/musetalk.json").read_text()
    (tmp_path / "models/musetalk/musetalk.json").write_text(text.replace('dim": 128', 'dim": 32'))
    with pytest.raises(WeightsError, match="5 states of width 128, but the UNet expects 5 of width 32"):
        train("demo", replace(config, models_dir=tmp_path / "models"))


def test_a_cache_of_another_vae_is_refused(config, sample_cache, tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "clips").symlink_to(sample_cache.folder / "clips")
    text = (sample_cache.folder / "contract.json").read_text()
    (folder / "contract.json").write_text(text.replace(sample_cache.contract.vae, "0123456789abcdef"))
    assert len(Cache(folder).clips) == 3
    with pytest.raises(ContractError, match="vae = '0123456789abcdef'"):
        train("demo", replace(config, hdtf_samples_dir=folder))
