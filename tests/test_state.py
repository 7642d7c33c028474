"""Training states are restored bit for bit or refused; runs stop on request with their state saved."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from musetalk.contract import RIGID, ContractError
from musetalk.errors import UserError
from musetalk.training.checkpoint import load_latest_state, save_state
from musetalk.training.distributed import start_processes
from musetalk.training.fine_tuning import Best
from musetalk.training.run import open_run, resume
from musetalk.training.state import OPTIMIZERS, NetworkState, TrainState
from musetalk_trainer import parse, train
from tests import ranks
from tests.conftest import ROOT, assert_equal
from tests.processes import small_unet


def make_state(optimizer: str = "adamw", seed: int = 0, steps: int = 0) -> TrainState:
    """A state of a small UNet and a discriminator after some updates."""
    unet = small_unet(width=4)
    torch.manual_seed(seed)
    discriminator = nn.Linear(2, 2)
    for parameter in unet.parameters():
        parameter.data += seed
    state = TrainState(
        unet,
        RIGID,
        OPTIMIZERS[optimizer](unet.parameters(), 1e-3),
        optimizer,
        {name: value.clone() for name, value in unet.model.state_dict().items()},
        {"face": SimpleNamespace(network=discriminator, optimizer=OPTIMIZERS[optimizer](discriminator.parameters()))},
        {"face": torch.tensor(0.5 + seed)},
        sync_offset=seed,
    )
    for _ in range(steps):
        update(state)
    return state


def update(state: TrainState) -> None:
    """Makes an update whose gradients are the weights."""
    for optimizer in state.optimizers:
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = parameter.detach().clone()
        optimizer.step()
    state.step += 1
    state.update_ema(0.9)


def saved(state: TrainState | NetworkState) -> dict:
    """A copy of the values that a training saves."""
    values = state.as_dict() | {"step": state.step}
    return torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, values)


# Saving and restoring.


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_restored_state_equals_the_saved_one_now_and_after_another_update(tmp_path, optimizer):
    state = make_state(optimizer, seed=1, steps=3)
    save_state(tmp_path, state.step, saved(state), keep=1)
    restored = make_state(optimizer, steps=1)
    assert resume(restored, tmp_path)
    assert_equal(saved(restored), saved(state))
    update(state)
    update(restored)
    assert_equal(saved(restored), saved(state))


def test_without_a_saved_state_nothing_changes(tmp_path):
    state = make_state()
    assert not resume(state, tmp_path / "none")
    assert_equal(saved(state), saved(make_state()))


def test_a_state_from_before_early_stopping_has_no_best_validation():
    old = saved(make_state(steps=1))
    del old["best"]
    state = make_state()
    state.best.update(1, 0.5)
    state.restore(old, Path("state.pt"))
    assert state.best == Best()


def test_constants_of_the_optimizer_are_those_of_the_resumed_run():
    state = make_state()
    state.optimizer.param_groups[0]["weight_decay"] = 0.5
    state.restore(saved(make_state(steps=1)), Path("state.pt"))
    assert state.optimizer.param_groups[0]["weight_decay"] == 0.5


def test_the_average_follows_faster_at_first_and_is_swapped_in_and_out():
    state = make_state()
    name, own = next(iter(state.unet.model.state_dict().items()))
    state.ema[name].zero_()
    state.update_ema(0.9)  # at step 0 the decay is 1 / 10
    torch.testing.assert_close(state.ema[name], 0.9 * own)
    state.step = 1000
    state.update_ema(0.5)
    torch.testing.assert_close(state.ema[name], 0.95 * own)
    weight, average = own.clone(), state.ema[name].clone()
    with state.averaged():
        assert torch.equal(state.unet.model.state_dict()[name], average)
    assert torch.equal(state.unet.model.state_dict()[name], weight) and torch.equal(state.ema[name], average)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("ema", None, "lacks ema"),
        ("optimizer_name", "adamax", "optimizer = 'adamax', not 'adamw'"),
        ("step", -1, "invalid step"),
        ("step", True, "invalid step"),
        ("sync_offset", 16, "invalid sync_offset"),
        ("optimizer", {"state": {0: 1}}, "no state of this optimizer"),
        ("unet", [1], "holds no weights by name"),
        ("unet", {"conv_in.weight": torch.zeros(3)}, "does not fit"),
        ("ema", {}, "another value of `trained`"),
        ("best", {"step": 1}, "invalid best"),
        ("best", {"step": 1, "lmd": 0.5, "validations_since": True}, "invalid best"),
        ("gan_losses", {}, "other discriminators"),
        ("adaptive_weights", {}, "adaptive_every"),
        ("contract", [], "contract"),
    ],
    ids=str,
)
def test_a_state_of_another_training_is_refused_with_the_reason(tmp_path, key, value, reason):
    """A value of None: the key is absent."""
    values = saved(make_state(steps=1)) | {key: value}
    if value is None:
        del values[key]
    path = tmp_path / "training-state-0000001.pt"
    torch.save(values, path)
    with pytest.raises(UserError, match=reason) as caught:
        resume(make_state(), tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kind": "convolution"}, "kind = 'convolution', not 'linear'"),
        ({"step": -1}, "invalid step"),
        ({"network": {"bias": torch.zeros(1)}}, "does not fit Linear: 1 missing"),
        ({"optimizer": {"state": {0: 1}}}, "no state of this optimizer"),
    ],
)
def test_a_state_of_another_single_network_is_refused_with_the_reason(change, reason):
    with pytest.raises(UserError, match=f"^state.pt .*{reason}"):
        ranks.make_state().restore(saved(ranks.make_state()) | change, Path("state.pt"))


def test_a_state_of_another_contract_is_refused(tmp_path):
    save_state(tmp_path, 1, saved(make_state(steps=1)), keep=1)
    with pytest.raises(ContractError, match="window_edge = 'zero', but 'clamp'"):
        resume(replace(make_state(), contract=replace(RIGID, window_edge="clamp")), tmp_path)


# Runs.


@pytest.fixture
def config(tmp_path) -> ranks.Config:
    return ranks.Config(tmp_path / "states", tmp_path / "log")


def press_ctrl_c(times: int = 1) -> None:
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("moment", "step"), [("before the first step", 1), ("in a step", 3), ("in a save", 3)])
def test_a_run_stopped_at_any_moment_has_saved_the_step_that_it_names(config, moment, step):
    """In a save, of step 2, Ctrl-C is pressed twice; the run stops after the step that follows."""

    class State(NetworkState):
        def as_dict(self) -> dict:
            if moment == "in a save" and self.step == 2:
                press_ctrl_c(times=2)
            return super().as_dict()

    state = State(**vars(ranks.make_state()))
    config = replace(config, save_every=2)
    with (
        pytest.raises(KeyboardInterrupt, match=f"^stopped at step {step}, "),
        open_run("tiny", config, state, start_processes("cpu")) as run,
    ):
        if moment == "before the first step":
            press_ctrl_c()
        for done in ranks.train(run):
            if moment == "in a step" and done == 3:
                press_ctrl_c()
    assert load_latest_state(config.checkpoint_dir / "tiny")[1]["step"] == step


def in_child(function: Callable[[], None]) -> int:
    """Calls a function in another process. Returns its exit code."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join()
    return process.exitcode


def test_a_second_run_on_the_same_folders_is_refused(config):
    def second() -> None:
        with pytest.raises(UserError, match="in use by another process"), open_run("tiny", *arguments):
            pass

    arguments = config, ranks.make_state(), start_processes("cpu")
    with open_run("tiny", *arguments):
        assert in_child(second) == 0
    assert in_child(second) == 1  # it raises nothing once the run has ended


# The script.

STEPS = 8


def command_line(cache: Path, folder: Path) -> list[str]:
    """A few small steps of stage 1 without LPIPS, with a state of each fourth."""
    options = {
        "--models-dir": "models/mini",
        "--loss-weights.lpips": 0.0,
        "--hdtf-samples-dir": cache,
        "--checkpoint-dir": folder / "checkpoints",
        "--log-dir": folder / "log",
        "--num-steps": STEPS,
        "--save-every": 4,
        "--sample-every": STEPS,
        "--val-every": 0,
        "--log-every": 1,
        "--warmup-steps": 2,
        "--batch-size": 2,
        "--pixel-every": 2,
    }
    return ["stage1", *(str(part) for option in options.items() for part in option)]


def outputs(folder: Path) -> dict[str, bytes]:
    """The files that a run leaves, except logs with times and states, whose layout may differ."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    varying = ("trainer.log", "tfevents", "training-state")
    return {name: path.read_bytes() for name, path in files.items() if not any(part in name for part in varying)}


@pytest.mark.slow
def test_the_script_stopped_by_ctrl_c_and_run_again_equals_a_run_without_interruption(
    sample_cache, tmp_path, interrupt
):
    """As people do it, with workers; the other run has none."""
    lines = [command_line(sample_cache.folder, tmp_path / name) for name in ("whole", "stopped")]
    stats = tmp_path / "stopped/log/stage1/stats.jsonl"
    script = [ROOT / "musetalk_trainer.py", *lines[1], "--num-workers", "2"]
    code, printed = interrupt(script, lambda: stats.exists() and stats.read_text().endswith("\n"))
    assert code == 130 and "Traceback" not in printed
    step = int(re.search(r"\nstopped at step (\d+), .* run the same command again to resume\n$", printed)[1])
    assert 0 < step < STEPS and load_latest_state(tmp_path / "stopped/checkpoints/stage1")[1]["step"] == step
    for line in lines:
        AcceleratorState._reset_state(reset_partial_state=True)
        train(*parse(line))
    assert outputs(tmp_path / "whole") == outputs(tmp_path / "stopped")
    states = [load_latest_state(tmp_path / name / "checkpoints/stage1")[1] for name in ("whole", "stopped")]
    assert_equal(*states)
