"""The real trainer of sync experts on the small sample: what it writes, that it resumes exactly, what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args, get_type_hints

import cv2
import pytest
import safetensors
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

import syncnet_trainer
from musetalk.data.cache import CacheError
from musetalk.data.sync_dataset import SyncDataset
from musetalk.errors import TrainError, UserError
from musetalk.models.syncnet import (
    ARCHITECTURES,
    PUBLISHED,
    StableSyncNet,
    Wav2LipSyncNet,
    build_syncnet,
    find_trained,
    load_syncnet,
    save_syncnet,
)
from musetalk.models.weights import WeightsError
from musetalk.training.checkpoint import save_state
from musetalk.training.state import OPTIMIZERS
from musetalk.training.sync_check import SyncError, check_expert
from syncnet_trainer import PRESETS, SyncConfig, parse, sync_expert_loss, train

CPU = torch.device("cpu")


@pytest.fixture
def config(sample_cache, tmp_path, monkeypatch) -> SyncConfig:
    """Four steps of the demo, small, looked at by few windows."""
    monkeypatch.setattr("musetalk.training.sync_check.WINDOWS", 4)
    return replace(
        PRESETS["demo"],
        hdtf_samples_dir=sample_cache.folder,
        held_out_identities=(),
        checkpoint_dir=tmp_path / "checkpoints",
        log_dir=tmp_path / "log",
        batch_size=2,
        num_steps=4,
        warmup_steps=2,
        log_every=1,
        val_every=4,
        save_every=2,
    )


def state_of(config: SyncConfig, step: int) -> dict:
    return torch.load(config.checkpoint_dir / "syncnet_demo" / f"training-state-{step:07d}.pt", weights_only=True)


def records(config: SyncConfig) -> list[dict]:
    return [json.loads(line) for line in (config.log_dir / "syncnet_demo/stats.jsonl").read_text().splitlines()]


def assert_equal(one: dict, two: dict) -> None:
    """Every tensor to the last bit, everything else by value."""
    flat = [torch.utils._pytree.tree_flatten_with_path(values)[0] for values in (one, two)]
    assert [path for path, _ in flat[0]] == [path for path, _ in flat[1]]
    for (path, a), (_, b) in zip(*flat, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, path


# Training.


def test_files_and_records(config):
    train("demo", config)
    run_dir = config.checkpoint_dir / "syncnet_demo"
    assert sorted(path.name for path in run_dir.iterdir()) == [
        ".lock",
        "syncnet-0000002.safetensors",
        "syncnet-0000004.safetensors",
        "training-state-0000002.pt",
        "training-state-0000004.pt",
    ]
    logged = sorted(path.relative_to(config.log_dir).as_posix() for path in config.log_dir.rglob("*") if path.is_file())
    assert [name for name in logged if "tfevents" not in name] == [
        "syncnet_demo/.lock",
        "syncnet_demo/stats.jsonl",
        "syncnet_demo/sync_check/0000004.png",
        "trainer.log",
    ]
    assert len(logged) == 5
    assert [record["step"] for record in records(config)] == [1, 2, 3, 4]
    assert set(records(config)[0]) == {"step", "sync_bce", "grad_norm", "learning_rate"}
    assert set(records(config)[3]) == set(records(config)[0]) | {"accuracy", "offset", "confidence"}
    assert cv2.imread(str(config.log_dir / "syncnet_demo/sync_check/0000004.png")).shape == (400, 800, 3)
    lines = (config.log_dir / "trainer.log").read_text()
    assert all(f"saved {run_dir}/syncnet-000000{step}.safetensors" in lines for step in (2, 4))
    assert "before: accuracy" in lines and "\n -15  " in lines and "held out 1 of 3 clips" in lines

    # An expert to use: what moved and what its batch norms gathered, and its architecture in the one metadata key.
    path = run_dir / "syncnet-0000004.safetensors"
    assert_equal(*(dict(sorted(x.items())) for x in (load_file(path), state_of(config, 4)["network"])))
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata() == {"architecture": "wav2lip_narrow"}
    norm = "face_encoder.0.conv_block.1"
    assert load_file(path)[f"{norm}.num_batches_tracked"] == 4 and load_file(path)[f"{norm}.running_mean"].any()


@pytest.mark.parametrize("optimizer", ["adamw", "adamax", "adam"])
def test_two_steps_and_a_resume_equal_four_steps(config, tmp_path, optimizer):
    config = replace(config, optimizer=optimizer, grad_accum_steps=2)
    train("demo", config)
    parted = replace(config, checkpoint_dir=tmp_path / "parted", log_dir=tmp_path / "parted_log")
    # Rate and gaps depend on num_steps, so the first half is an interruption, not a shorter run.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("musetalk.training.run.save_state", interrupt_after(save_state))
        with pytest.raises(KeyboardInterrupt):
            train("demo", parted)
    assert not (parted.checkpoint_dir / "syncnet_demo/training-state-0000004.pt").exists()
    train("demo", parted)
    assert_equal(state_of(config, 4), state_of(parted, 4))
    for step in (2, 4):
        name = f"syncnet_demo/syncnet-000000{step}.safetensors"
        assert (config.checkpoint_dir / name).read_bytes() == (parted.checkpoint_dir / name).read_bytes()
    for name in ("syncnet_demo/stats.jsonl", "syncnet_demo/sync_check/0000004.png"):
        assert (config.log_dir / name).read_bytes() == (parted.log_dir / name).read_bytes()
    train("demo", parted)  # nothing is left to do
    assert (config.log_dir / name).read_bytes() == (parted.log_dir / name).read_bytes()


def interrupt_after(function):
    """The function, interrupting the run when it is done."""

    def wrapper(*args):
        function(*args)
        raise KeyboardInterrupt

    return wrapper


def test_ctrl_c_ends_it_after_a_step_that_is_saved(config, interrupt):
    run_dir = config.checkpoint_dir / "syncnet_demo"
    arguments = ["syncnet_trainer.py", "--held-out-identities", "--num-steps", 10_000, "--save-every", 3]
    arguments += ["--num-workers", 1, "--batch-size", 2]
    for name in ("hdtf_samples_dir", "checkpoint_dir", "log_dir"):
        arguments += [f"--{name.replace('_', '-')}", getattr(config, name)]
    code, words = interrupt(arguments, lambda: (run_dir / "training-state-0000003.pt").exists())
    assert code == 130 and "run the same command again" in words
    step = int(words.rpartition("stopped at step ")[2].partition(",")[0])
    assert state_of(config, step)["step"] == step >= 3


def test_it_learns_windows_by_heart(config):
    """Of a narrow expert's loss on one batch, seen again and again, little is left."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = syncnet_trainer.Accelerator(mixed_precision="no")
    state = syncnet_trainer.build_state(config, accelerator)
    data = syncnet_trainer.open_dataset(config, syncnet_trainer.Cache(config.hdtf_samples_dir), ["sample_00"], 5, 1)
    batch = torch.utils.data.default_collate([data[index] for index in range(4)])
    losses = []
    for _ in range(40):
        loss = sync_expert_loss(state.network, batch, accelerator.device)
        loss.backward()
        losses.append(loss.item())
        state.optimizer.step()
        state.optimizer.zero_grad()
    assert losses[0] > 0.6 and losses[-1] < 0.3


def test_a_step_is_the_mean_over_its_pairs(config, sample_cache):
    """-log of the cosine for a window's own mel, -log of 1 minus the cosine for other mel."""
    expert = build_syncnet("wav2lip_narrow", 0).eval()
    data = SyncDataset(
        sample_cache, ["sample_01"], seed=0, slots=3, frames=5, num_steps=9, gaps=(9, 3), other_clips=0.5
    )
    items = [data[index] for index in range(3)]
    losses = []
    for item in items:
        images = item["images"].flip(-1).permute(0, 3, 1, 2)[None] / 127.5 - 1
        for mel, sign in ((item["mel"], 1), (item["other_mel"], -1)):
            face_embedding, audio_embedding = expert.embed(images, mel[None].float())
            cosine = (face_embedding * audio_embedding).sum()
            losses.append(-torch.log(cosine if sign > 0 else 1 - cosine))
    batch = torch.utils.data.default_collate(items)
    loss = sync_expert_loss(expert, batch, CPU)
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
    loss.backward()
    gradient = expert.face_encoder[0].conv_block[0].weight.grad
    expert.zero_grad()
    torch.stack(losses).mean().backward()
    torch.testing.assert_close(gradient, expert.face_encoder[0].conv_block[0].weight.grad, rtol=1e-3, atol=1e-6)


def test_the_other_kind_of_expert_trains_too(config):
    """16 frames a window; batches may be of one, since nothing in it looks across windows."""
    train("demo", replace(config, architecture="latentsync_narrow", num_steps=1, batch_size=1))
    network = load_syncnet(Path("nowhere"), str(config.checkpoint_dir / "syncnet_demo"), CPU)
    assert isinstance(network, StableSyncNet) and network.frames == 16
    assert set(records(config)[0]) > {"accuracy", "offset"}


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_update(config, monkeypatch):
    steps = []

    def poisoned(expert, *rest):
        steps.append(1)
        return sync_expert_loss(expert, *rest) * (float("nan") if len(steps) == 3 else 1)

    monkeypatch.setattr(syncnet_trainer, "sync_expert_loss", poisoned)
    with pytest.raises(TrainError, match=r"step 3: .*not finite .*sample_0\d, frame \d+; .*") as error:
        train("demo", config)
    assert str(config.checkpoint_dir) in str(error.value)
    assert all(value.isfinite().all() for value in state_of(config, 2)["network"].values())
    monkeypatch.undo()
    train("demo", config)  # and it goes on from there
    assert state_of(config, 4)["step"] == 4


# Starting from another expert.


@pytest.fixture
def models(tmp_path) -> Path:
    """A models folder with "Wav2Lip's own", which is untrained."""
    folder = tmp_path / "models"
    (folder / "syncnet").mkdir(parents=True)
    torch.save({"state_dict": build_syncnet("wav2lip", 5).state_dict()}, folder / "syncnet/lipsync_expert.pth")
    return folder


def test_it_starts_from_an_expert_of_its_own(config, tmp_path):
    begin = build_syncnet("wav2lip_narrow", 9)
    save_syncnet(tmp_path / "before", 7, begin, "wav2lip_narrow")
    run = replace(config, start_from=str(tmp_path / "before"), num_steps=1, learning_rate=1e-12)
    train("demo", run)
    weights = state_of(run, 1)["network"]
    name = "face_encoder.0.conv_block.0.weight"
    torch.testing.assert_close(weights[name], begin.state_dict()[name])
    assert not torch.equal(weights[name], build_syncnet("wav2lip_narrow", run.seed).state_dict()[name])
    with pytest.raises(WeightsError, match="does not fit Wav2LipSyncNet: .*wrongly shaped"):
        train("demo", replace(run, architecture="wav2lip"))
    with pytest.raises(WeightsError, match="does not fit StableSyncNet: .*looks like Wav2Lip's SyncNet"):
        train("demo", replace(run, architecture="latentsync_narrow"))


def test_it_starts_from_a_published_one(config, models):
    run = replace(
        config, architecture="wav2lip", models_dir=models, start_from="syncnet/lipsync_expert.pth", learning_rate=1e-12
    )
    train("demo", replace(run, num_steps=1))
    name = "audio_encoder.13.conv_block.0.weight"
    torch.testing.assert_close(state_of(run, 1)["network"][name], build_syncnet("wav2lip", 5).state_dict()[name])


# The check alone.


def test_a_check_alone_trains_nothing(config, models, capsys, monkeypatch):
    """An untrained expert is refused when its table has been shown."""
    for stage in ("build_state", "open_run", "save_syncnet"):
        monkeypatch.setattr(syncnet_trainer, stage, lambda *_: pytest.fail("it trained"))
    run = replace(config, check_only=True, models_dir=models, start_from="syncnet/lipsync_expert.pth")
    with pytest.raises(SyncError, match="cannot be trusted on these faces"):
        train("demo", run)
    shown = capsys.readouterr().out
    assert f"syncnet/lipsync_expert.pth, on 1 clips of {config.hdtf_samples_dir}" in shown and shown.count("\n") == 34
    assert [path.name for path in config.log_dir.rglob("*") if path.is_file()] == ["sync_check.png"]
    assert not config.checkpoint_dir.exists()
    with pytest.raises(WeightsError, match="syncnet_demo is no sync expert"):
        train("demo", replace(run, start_from=""))  # there is none of this preset yet


def test_a_check_alone_is_of_the_newest_of_the_preset(config, capsys, monkeypatch):
    train("demo", config)
    before = records(config)
    monkeypatch.setattr("musetalk.training.sync_check.MIN_ACCURACY", 0)
    monkeypatch.setattr("musetalk.training.sync_check.MAX_BIAS", 15)
    capsys.readouterr()
    train("demo", replace(config, check_only=True))
    shown = capsys.readouterr().out
    assert f"accuracy {before[-1]['accuracy']:.3f}" in shown and str(config.checkpoint_dir / "syncnet_demo") in shown
    assert records(config) == before


# Loading.


@pytest.mark.parametrize("name", ["wav2lip_narrow", "latentsync_narrow"])
def test_a_saved_expert_is_loaded_bit_by_bit_by_file_and_by_folder(tmp_path, name):
    for step in (3, 20, 100):
        network = build_syncnet(name, step)
        path = save_syncnet(tmp_path / "run", step, network, name)
    shutil.copy(path, tmp_path / "renamed.safetensors")
    (tmp_path / "run" / "syncnet-9999999.safetensors.5.partial").touch()
    for place in (tmp_path / "run", path, tmp_path / "renamed.safetensors"):
        loaded = load_syncnet(Path("nowhere"), str(place), CPU)
        assert_equal(loaded.state_dict(), network.state_dict())
        assert not loaded.training and not any(x.requires_grad for x in loaded.parameters())
    assert find_trained(tmp_path / "run") == path
    assert (
        load_syncnet(Path("nowhere"), str(path), CPU, torch.bfloat16).state_dict().keys() == loaded.state_dict().keys()
    )


def test_an_untrained_expert_depends_on_its_seed_alone():
    torch.manual_seed(1)
    one = build_syncnet("wav2lip_narrow", 4).state_dict()
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    assert_equal(one, build_syncnet("wav2lip_narrow", 4).state_dict())
    torch.manual_seed(1)
    assert torch.equal(state, torch.random.get_rng_state())
    name = "face_encoder.0.conv_block.0.weight"
    assert not torch.equal(one[name], build_syncnet("wav2lip_narrow", 5).state_dict()[name])


@pytest.mark.parametrize(
    ("name", "frames", "parameters"),
    [
        ("wav2lip", 5, 16_435_072),
        ("wav2lip_narrow", 5, 1_035_616),
        ("latentsync", 16, 371_766_496),
        ("latentsync_attention", 16, 401_306_080),
        ("latentsync_narrow", 16, 16_341_664),
    ],
)
def test_the_architectures_that_have_a_name(name, frames, parameters):
    with torch.device("meta"), torch.no_grad():
        network = ARCHITECTURES[name]()
        images, mel = torch.empty(2, frames, 3, 256, 256), torch.empty(2, network.mel_frames, 80)
        faces, heard = network(images, mel)
    assert faces.shape == heard.shape and sum(x.numel() for x in network.parameters()) == parameters
    assert len(ARCHITECTURES) == 5 and set(PUBLISHED.values()) < set(ARCHITECTURES)


def write(path: Path, tensors: dict, metadata: dict | None) -> Path:
    save_file(tensors, path, metadata)
    return path


def test_what_is_no_trained_expert_is_refused_in_a_sentence(tmp_path):
    weights = Wav2LipSyncNet(8).state_dict()
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.safetensors").write_text("no weights")
    torch.save(weights, tmp_path / "torch.pth")
    refused = {
        tmp_path / "nowhere": "is no sync expert: name a file of the models folder .*lipsync_expert.pth",
        tmp_path / "empty": "is no sync expert: name",
        tmp_path / "text.safetensors": "cannot be read as a sync expert",
        tmp_path / "torch.pth": "cannot be read as a sync expert",
        write(tmp_path / "bare.safetensors", weights, None): "its architecture is None, not one of wav2lip, ",
        write(tmp_path / "odd.safetensors", weights, {"architecture": "x" * 999}): r"architecture is 'x+\.\.\.x+'",
        write(tmp_path / "other.safetensors", weights, {"architecture": "wav2lip"}): "wrongly shaped",
        write(tmp_path / "cut.safetensors", {"a": torch.ones(1)}, {"architecture": "wav2lip_narrow"}): "186 missing",
    }
    for place, said in refused.items():
        with pytest.raises(WeightsError, match=said) as caught:
            load_syncnet(Path("nowhere"), str(place), CPU)
        assert str(place) in str(caught.value) and len(str(caught.value)) < 600
    with pytest.raises(WeightsError, match="nowhere/syncnet/lipsync_expert.pth is missing; get it from"):
        load_syncnet(Path("nowhere"), "syncnet/lipsync_expert.pth", CPU)


# States.


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("optimizer"), "not a state of this training, it lacks optimizer; delete it"),
        (lambda s: s.update(architecture="latentsync"), "architecture = 'latentsync', not 'wav2lip_narrow'"),
        (lambda s: s.update(optimizer_name="sgd"), "optimizer_name = 'sgd', not 'adam'"),
        (lambda s: s.update(step=-1), "invalid step"),
        (lambda s: s.update(step=True), "invalid step"),
        (lambda s: s.update(optimizer={"state": {0: 1}}), "holds no state of this optimizer"),
        (lambda s: s["network"].pop(next(iter(s["network"]))), "does not fit Wav2LipSyncNet: 1 missing"),
        (lambda s: s.update(network=[1]), "holds no weights by name, but a list"),
    ],
    ids=["missing", "architecture", "optimizer", "negative", "bool", "moments", "weights", "list"],
)
def test_a_state_of_something_else_is_refused(config, change, said):
    train("demo", replace(config, num_steps=2, val_every=2))
    state = state_of(config, 2)
    change(state)
    path = config.checkpoint_dir / "syncnet_demo/training-state-0000002.pt"
    torch.save(state, path)
    with pytest.raises(WeightsError, match=said) as caught:
        train("demo", config)
    assert str(path) in str(caught.value)


# Constants.


def test_command_line():
    assert parse([]) == ("demo", PRESETS["demo"])
    preset, config = parse(["latentsync", "--batch-size", "3", "--gaps", "9", "4", "--check-only"])
    assert preset == "latentsync" and config.batch_size == 3 and config.gaps == (9, 4) and config.check_only
    assert not PRESETS["latentsync"].check_only
    with pytest.raises(UserError, match="one of demo, wav2lip, latentsync, not 'stage1'"):
        parse(["stage1"])


def test_the_choices_of_constants_are_those_there_are():
    kinds = get_type_hints(SyncConfig)
    assert get_args(kinds["architecture"]) == tuple(ARCHITECTURES)
    assert get_args(kinds["optimizer"]) == tuple(OPTIMIZERS)


NO_PATH = ["data", "", None, 3, b"data"]
NO_COUNT = [0, -1, 1.0, True, "1", None, float("nan"), 10**13]
NO_COUNT_OR_ZERO = [-1, 1.0, True, "1", None, 10**13]
NO_NUMBER = [True, "1", None, (1.0,), float("nan"), float("inf"), -1e-9]
UNFIT = {
    "hdtf_samples_dir": NO_PATH,
    "checkpoint_dir": NO_PATH,
    "log_dir": NO_PATH,
    "models_dir": NO_PATH,
    "architecture": ["syncnet", "", None, 1],
    "start_from": [None, 1, Path("a")],
    "held_out": [*NO_NUMBER, 0.0, 0, 1.0, 1, 1.5],
    "held_out_identities": ["sample_05", ["sample_05"], None, (1,)],
    "num_workers": [-1, 513, 1.0, True, "4"],
    "prefetch": NO_COUNT,
    "batch_size": NO_COUNT,
    "grad_accum_steps": NO_COUNT,
    "gaps": [(3,), (15, 3, 1), (), [15, 3], 3, None, (15, 0), (0, 3), (15.0, 3)],
    "other_clips": [*NO_NUMBER, 0.0, 1.0],
    "optimizer": ["sgd", "AdamW", "", None, 1],
    "learning_rate": [*NO_NUMBER, 0.0, 0],
    "warmup_steps": NO_COUNT_OR_ZERO,
    "final_learning_rate": NO_NUMBER,
    "weight_decay": NO_NUMBER,
    "betas": [(0.9,), (0.9, 0.99, 0.999), (), [0.9, 0.99], 0.9, None, (1.0, 0.9), (0.9, float("nan")), (-0.1, 0.9)],
    "max_grad_norm": [*NO_NUMBER, 0.0, 0],
    "on_nonfinite": ["go on", "", None, True],
    "device": ["gpu", "", "cuda:1", "meta", None, 0],
    "check_only": [0, 1, "yes", None],
    "num_steps": NO_COUNT,
    "log_every": NO_COUNT,
    "val_every": NO_COUNT,
    "save_every": NO_COUNT,
    "save_minutes": NO_NUMBER,
    "keep_states": NO_COUNT,
    "keep_weights": NO_COUNT,
    "keep_weights_every": NO_COUNT_OR_ZERO,
    "seed": [-1, 2**32, 1.0, True, "1", None],
}


@pytest.mark.parametrize("name", [constant.name for constant in fields(SyncConfig)])
def test_an_unfit_constant_is_refused_by_name_before_anything_is_done(name, tmp_path, monkeypatch):
    """A constant without an entry in UNFIT fails."""
    monkeypatch.chdir(tmp_path)
    for stage in ("start_processes", "Cache", "build_syncnet", "load_syncnet", "open_run"):
        monkeypatch.setattr(syncnet_trainer, stage, lambda *_, **__: pytest.fail("it went on"))
    for preset, config in PRESETS.items():
        for value in UNFIT[name]:
            with pytest.raises(UserError, match=rf"^{name}(\.\w+)? (cannot be|must) "):
                train(preset, replace(config, **{name: value}))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hdtf_samples_dir": Path("nowhere")}, CacheError, "nowhere is not a cache.*datasets_process.py"),
        ({"start_from": "nowhere"}, WeightsError, "nowhere is no sync expert"),
        ({"weight_decay": 1e-2}, TrainError, "weight_decay must be 0 with adam,"),
        ({"batch_size": 1}, TrainError, "batch_size must be 2 or more for wav2lip_narrow"),
        ({"batch_size": 53}, TrainError, "batch_size x grad_accum_steps x processes is 53, but .* has 52 windows"),
        ({"gaps": (15, 13)}, CacheError, "mel at least 13 frames away"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(config, change, error, message):
    """Of the three clips of 26 windows one is held out."""
    with pytest.raises(error, match=message):
        train("demo", replace(config, **change))
    assert not config.checkpoint_dir.exists() and not config.log_dir.exists()


def test_what_was_trained_passes_through_the_check_of_the_other_trainer(config, sample_cache):
    """By the name of its folder, in the precision of frozen networks: an expert of four steps is worth nothing."""
    train("demo", config)
    expert = load_syncnet(config.models_dir, str(config.checkpoint_dir / "syncnet_demo"), CPU, torch.bfloat16)
    found = check_expert(expert, sample_cache, list(sample_cache.clips), config.seed)
    assert 0 <= found.accuracy <= 1 and found.windows == 4 and found.similarities.shape == (31,)
    assert found.require(allow=True) in (-1, 0, 1)
