"""The state of a training: exact resume, stops on request, and broken or foreign states refused."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st

import musetalk_trainer
from musetalk.contract import RIGID, ContractError, FeatureContract
from musetalk.data.cache import Cache, CacheWriter
from musetalk.data.dataset import FaceDataset
from musetalk.data.loader import loader
from musetalk.errors import UserError
from musetalk.models.unet import build_unet
from musetalk.training.checkpoint import load_latest_state, save_state
from musetalk.training.run import resume
from musetalk.training.state import OPTIMIZERS, TrainState
from musetalk.training.step import scheduled_rate
from musetalk_trainer import TrainConfig, optimizer_step, parse, train

ROOT = Path(__file__).parents[1]


def make_state(mini: Path, optimizer: str = "adamw", seed: int = 0, steps: int = 0) -> TrainState:
    """A state of the small UNet after some updates with gradients that are its weights."""
    unet = build_unet(mini, seed, positional_encoding=True)
    state = TrainState(
        unet,
        RIGID,
        OPTIMIZERS[optimizer](unet.parameters(), 1e-3),
        optimizer,
        {name: value.clone() for name, value in unet.model.state_dict().items()},
    )
    for _ in range(steps):
        update(state)
    return state


def update(state: TrainState) -> None:
    for parameter in state.unet.parameters():
        parameter.grad = parameter.detach().clone()
    state.optimizer.step()
    state.step += 1
    state.update_ema(0.9)


def saved(state: TrainState) -> dict:
    """What the trainer saves of it, on its own memory."""
    values = state.as_dict() | {"step": state.step}
    return torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, values)


def assert_equal(one: dict, two: dict) -> None:
    """Every tensor to the last bit, everything else by value."""
    flat = [torch.utils._pytree.tree_flatten_with_path(values)[0] for values in (one, two)]
    assert [path for path, _ in flat[0]] == [path for path, _ in flat[1]]
    for (path, a), (_, b) in zip(*flat, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, path


# The learning rate.


@given(
    step=st.integers(0, 200), warmup=st.integers(0, 100), steps=st.integers(1, 150), final=st.sampled_from([0, 0.2, 1])
)
def test_the_rate_stays_between_its_bounds_and_ends_at_the_final_one(step, warmup, steps, final):
    config = SimpleNamespace(learning_rate=1.0, warmup_steps=warmup, final_learning_rate=final, num_steps=steps)
    rate = scheduled_rate(step, config)
    assert 0 <= rate <= 1 and math.isfinite(rate)
    if step < warmup:
        assert rate == pytest.approx((step + 1) / warmup)
    else:
        assert rate >= final and rate >= scheduled_rate(step + 1, config)
        assert rate == pytest.approx(final) or step < steps or steps <= warmup


# The loader.


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, random_tensors) -> FaceDataset:
    folder = tmp_path_factory.mktemp("cache")
    about = {"source": "a.mp4", "source_bytes": 9, "identity": "a", "start": 0, "last": True}
    CacheWriter(folder, FeatureContract()).write("a", random_tensors(20), about)
    return FaceDataset(Cache(folder), ["a"], FeatureContract(), seed=1, slots=4)


def test_batches_come_in_the_order_of_their_slots_from_any_step_on(dataset):
    whole = [batch["where"] for batch in loader(dataset, range(3), 2, 0)]
    assert len(whole) == 6 and sum(whole[4:], []) == [dataset[index]["where"] for index in range(8, 12)]
    assert [batch["where"] for batch in loader(dataset, range(2, 3), 2, 0)] == whole[4:]
    assert list(loader(dataset, range(3, 3), 2, 0)) == []


def test_workers_go_on_through_signals_that_are_meant_for_the_trainer(dataset):
    alone = [batch["where"] for batch in loader(dataset, range(20), 4, 0)]
    batches = iter(loader(dataset, range(20), 4, 2))
    found = [next(batches)["where"] for _ in batches._workers]  # each of them has begun
    for worker in batches._workers:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(worker.pid, number)
    found += [batch["where"] for batch in batches]
    assert found == alone


# States.


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_was_saved_is_restored_to_the_last_bit(mini, tmp_path, optimizer):
    state = make_state(mini, optimizer, steps=3)
    save_state(tmp_path, state.step, saved(state), keep=1)
    other = make_state(mini, optimizer, seed=1, steps=1)
    resume(other, tmp_path)
    assert_equal(saved(other), saved(state))
    update(state)
    update(other)
    assert_equal(saved(other), saved(state))
    fresh = make_state(mini, optimizer)
    resume(fresh, tmp_path / "none")
    assert_equal(saved(fresh), saved(make_state(mini, optimizer)))


def test_the_average_moves_faster_at_first_and_is_swapped_in_and_out(mini):
    state = make_state(mini)
    name, own = next(iter(state.unet.model.state_dict().items()))
    state.ema[name].zero_()
    state.update_ema(0.9)  # at step 0 the decay is 1 / 10
    torch.testing.assert_close(state.ema[name], 0.9 * own)
    state.step = 1000
    state.update_ema(0.5)
    torch.testing.assert_close(state.ema[name], 0.95 * own)
    before = own.clone()
    with state.averaged():
        assert torch.equal(state.unet.model.state_dict()[name], state.ema[name])
    assert torch.equal(state.unet.model.state_dict()[name], before)


@pytest.fixture(scope="module")
def whole(mini) -> dict:
    """What was saved after one update."""
    return saved(make_state(mini, steps=1))


@pytest.fixture(scope="module")
def asked(mini) -> TrainState:
    """A state to restore others to."""
    return make_state(mini)


@pytest.mark.parametrize("name", ["unet", "ema", "optimizer", "optimizer_name", "step", "contract"])
@pytest.mark.parametrize("value", ["absent", None, [], {"state": 3}, -1], ids=repr)
def test_a_state_with_an_unfit_part_is_refused_in_a_sentence(whole, asked, tmp_path, name, value):
    values = {part: whole[part] for part in whole if part != name}
    path = tmp_path / "training-state-0000001.pt"
    torch.save(values if value == "absent" else values | {name: value}, path)
    with pytest.raises(UserError) as caught:
        resume(asked, tmp_path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_the_constants_of_the_optimizer_are_those_of_this_run(mini, whole):
    """Those of the state would silently win over the command line."""
    state = make_state(mini)
    state.optimizer.param_groups[0]["weight_decay"] = 0.5
    state.restore(whole, Path("state.pt"))
    assert state.optimizer.param_groups[0]["weight_decay"] == 0.5


def test_a_state_of_another_contract_is_refused(whole, asked, tmp_path):
    save_state(tmp_path, 1, whole, keep=1)
    with pytest.raises(ContractError, match="window_edge = 'zero', but 'clamp' is asked for"):
        resume(replace(asked, contract=replace(RIGID, window_edge="clamp")), tmp_path)


# The real trainer.

STEPS = 8


def arguments(cache: Path, folder: Path) -> list[str]:
    """Of a command line: a few small steps, with states of the middle one and the last."""
    options = {
        "--hdtf-samples-dir": cache,
        "--checkpoint-dir": folder / "checkpoints",
        "--log-dir": folder / "log",
        "--num-steps": STEPS,
        "--save-every": STEPS // 2,
        "--sample-every": STEPS,
        "--val-every": 0,
        "--log-every": 1,
        "--warmup-steps": 2,
        "--batch-size": 2,
        "--pixel-every": 2,
    }
    return ["demo", "--held-out-identities", *(str(part) for option in options.items() for part in option)]


@pytest.fixture(scope="module")
def trained(make_cache, tmp_path_factory) -> tuple[TrainConfig, subprocess.CompletedProcess]:
    """A run that nothing interrupted, and what a second one on its folders said in the meantime."""
    command = arguments(make_cache("rigid").folder, tmp_path_factory.mktemp("trained"))
    AcceleratorState._reset_state(reset_partial_state=True)
    _, config = parse(command)
    second = []

    def step(*args, **options):
        if args[0].step == 2:
            script = [sys.executable, ROOT / "musetalk_trainer.py", *command]
            second.append(subprocess.run(script, cwd=ROOT, capture_output=True, text=True))
        return optimizer_step(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(musetalk_trainer, "optimizer_step", step)
        train("demo", config)
    return config, *second


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_run(config: TrainConfig, other: TrainConfig) -> None:
    """Weights, records and pictures are the same to the last bit, and so is all in the newest states."""
    logs = [
        {name: content for name, content in contents(run.log_dir / "demo").items() if "tfevents" not in name}
        for run in (config, other)
    ]
    assert logs[0] == logs[1] and logs[0].keys() == {".lock", "stats.jsonl", f"samples/{STEPS:07d}.png"}
    weights = [contents(run.checkpoint_dir / "demo") for run in (config, other)]
    assert weights[0].keys() >= {f"unet-{step:07d}.safetensors" for step in (STEPS // 2, STEPS)}
    assert all(weights[1][name] == content for name, content in weights[0].items() if name.startswith("unet"))
    states = [load_latest_state(run.checkpoint_dir / "demo")[1] for run in (config, other)]
    assert_equal(*states)


@pytest.fixture
def copied(trained, tmp_path) -> TrainConfig:
    """The run again in folders of its own."""
    config, _ = trained
    copy = replace(config, checkpoint_dir=tmp_path / "checkpoints", log_dir=tmp_path / "log")
    shutil.copytree(config.checkpoint_dir, copy.checkpoint_dir)
    shutil.copytree(config.log_dir, copy.log_dir)
    return copy


def test_a_second_trainer_on_the_same_folders_is_refused_and_disturbs_nothing(trained):
    config, second = trained
    assert second.returncode == 2 and "Traceback" not in second.stderr
    said = f"{config.checkpoint_dir / 'demo'} is in use by another process; wait until it ends, or stop it"
    assert second.stderr.splitlines()[-1] == said
    lines = (config.log_dir / "demo" / "stats.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*range(1, STEPS + 1)]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("cut off", "is not a complete training state .*; delete it"),
        ("a bit", "is corrupted .*; delete it"),
        ("lacks parts", "is not a state of this training, it lacks contract, ema; delete it"),
        ("another optimizer", "was saved with optimizer = 'adamax', not 'adamw'"),
        ("another network", "does not fit .*: 1 missing: conv_in.weight; 1 unexpected: conv_first.weight"),
    ],
)
def test_a_broken_state_is_refused_in_a_sentence_before_anything_is_written(copied, fault, message):
    path = copied.checkpoint_dir / "demo" / f"training-state-{STEPS:07d}.pt"
    content, values = bytearray(path.read_bytes()), torch.load(path, weights_only=True)
    if fault in ("cut off", "a bit"):
        content[len(content) // 2] ^= 1
        path.write_bytes(content[: len(content) // 2] if fault == "cut off" else content)
    else:
        if fault == "lacks parts":
            del values["ema"], values["contract"]
        elif fault == "another optimizer":
            values["optimizer_name"] = "adamax"
        else:
            for part in ("unet", "ema"):
                values[part]["conv_first.weight"] = values[part].pop("conv_in.weight")
        torch.save(values, path)
    before = contents(path.parents[2])
    with pytest.raises(UserError) as caught:
        train("demo", copied)
    assert re.match(f"{re.escape(str(path))} {message}", str(caught.value)) and "\n" not in str(caught.value)
    assert contents(path.parents[2]) == before


def test_after_it_is_deleted_the_run_goes_on_from_the_one_before(trained, copied):
    """And lines of the log that a full disk cut off, or that a later step wrote, are mended."""
    (copied.checkpoint_dir / "demo" / f"training-state-{STEPS:07d}.pt").unlink()
    stats = copied.log_dir / "demo" / "stats.jsonl"
    stats.write_text(stats.read_text() + '{"step": 9, "latent_l1": 0.1}\n{"step": 10, "lat')
    train("demo", copied)
    assert_same_run(copied, trained[0])


def test_after_ctrl_c_the_same_command_ends_as_if_there_had_been_none(trained, tmp_path, interrupt):
    config, _ = trained
    command = arguments(config.hdtf_samples_dir, tmp_path)
    run_dir, stats = tmp_path / "checkpoints" / "demo", tmp_path / "log" / "demo" / "stats.jsonl"
    script = [ROOT / "musetalk_trainer.py", *command, "--num-workers", "2"]
    code, words = interrupt(script, lambda: stats.exists() and stats.read_text().endswith("\n"))
    assert code == 130 and "Traceback" not in words
    assert words.count("stopping after this step; Ctrl-C again to stop at once") == 1
    step = int(re.search(r"\nstopped at step (\d+), .* run the same command again to resume\n$", words)[1])
    path, state = load_latest_state(run_dir)
    assert 0 < step < STEPS and path.name == f"training-state-{step:07d}.pt" and state["step"] == step
    AcceleratorState._reset_state(reset_partial_state=True)
    _, again = parse(command)
    train("demo", again)
    assert_same_run(again, config)


@pytest.mark.parametrize(
    "moment", ["musetalk.training.run.loader", "musetalk_trainer.optimizer_step", "musetalk_trainer.save_unet"]
)
def test_whenever_it_is_asked_to_stop_the_step_it_names_is_saved(trained, tmp_path, monkeypatch, moment):
    """Before the first step, in one, and while it saves."""
    _, config = parse([*arguments(trained[0].hdtf_samples_dir, tmp_path), "--save-every", "2"])
    AcceleratorState._reset_state(reset_partial_state=True)
    function = resolve_name(moment)

    def asked(*args, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return function(*args, **options)

    monkeypatch.setattr(moment, asked)
    with pytest.raises(KeyboardInterrupt, match=f"^stopped at step {2 if moment.endswith('save_unet') else 1}, "):
        train("demo", config)
    names = sorted(path.name for path in (tmp_path / "checkpoints" / "demo").glob("*.*t*"))
    assert names == (
        ["training-state-0000002.pt", "unet-0000002.safetensors"]
        if moment.endswith("save_unet")
        else ["training-state-0000001.pt"]
    )
