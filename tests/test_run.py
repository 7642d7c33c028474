"""A tiny run: when it saves, what it keeps on disk, and what is refused at the start."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from musetalk.errors import UserError
from musetalk.training.checkpoint import load_latest_state, save_state
from musetalk.training.distributed import start_processes
from musetalk.training.preflight import bytes_of, check_shared_memory, state_bytes, workers_that_fit
from musetalk.training.run import open_run
from tests.ranks import Config, Numbers, make_state, train

MB = 10**6


@pytest.fixture
def config(tmp_path) -> Config:
    return Config(tmp_path / "states", tmp_path / "log")


def make_steps(config: Config, *, stop_after: int = 0, weights: dict | None = None) -> dict:
    """Trains, saving an empty file of weights after each step if `weights` are given. Returns the newest state."""
    with open_run("tiny", config, make_state(), start_processes("cpu"), weights) as run:
        for step in train(run):
            if weights is not None:
                path = run.folder / f"unet-{step:07d}.safetensors"
                path.touch()
                run.keep_weights(path)
            if step == stop_after:
                break
    return load_latest_state(config.checkpoint_dir / "tiny")[1]


def names(config: Config) -> list[str]:
    return sorted(path.name for path in (config.checkpoint_dir / "tiny").glob("*-*"))


def test_no_worker_outlives_a_run(config):
    """Even if something still refers to its batches, such as a frame in a reference cycle."""
    with open_run("tiny", replace(config, num_workers=2), make_state(), start_processes("cpu")) as run:
        batches = run.batches(Numbers())
        next(batches)
        assert len(multiprocessing.active_children()) == 2
    assert not multiprocessing.active_children()
    assert next(batches, None) is None


# Saves.


def test_a_run_saved_by_time_and_cut_off_ends_as_one_that_was_not(config, tmp_path):
    whole = make_steps(config)
    assert names(config) == ["training-state-0000006.pt"]
    parted = replace(config, checkpoint_dir=tmp_path / "parted", save_minutes=1e-9, keep_states=1)
    assert make_steps(parted, stop_after=4)["step"] == 3  # of the fourth step nothing was saved
    again = make_steps(parted)
    assert names(parted) == ["training-state-0000006.pt"]
    assert torch.equal(again["network"]["weight"], whole["network"]["weight"])
    assert all(torch.equal(again["optimizer"]["state"][0][k], v) for k, v in whole["optimizer"]["state"][0].items())


def test_saves_by_time_count_from_the_last_save_of_any_kind(config, monkeypatch):
    """A step takes a minute."""
    clock = iter(range(0, 10**6, 60))
    monkeypatch.setattr("musetalk.training.run.time", SimpleNamespace(monotonic=lambda: next(clock)))
    saved = []
    monkeypatch.setattr(
        "musetalk.training.run.save_state", lambda _, step, *__: (saved.append(step), save_state(_, step, *__))
    )
    make_steps(replace(config, num_steps=12, save_every=5, save_minutes=3))
    assert saved[0] == 3 and 5 in saved and 12 in saved and len(saved) < 8


def test_a_state_that_was_resumed_from_does_not_keep_its_file_open(config):
    make_steps(replace(config, num_steps=2))
    state = make_state()
    with open_run("tiny", config, state, start_processes("cpu")):
        assert state.step == 2
        assert str(config.checkpoint_dir) not in Path("/proc/self/maps").read_text()


# What is kept.


def test_the_newest_weights_are_kept_and_one_in_some(config):
    make_steps(replace(config, keep_weights=2, keep_weights_every=2), weights={})
    assert names(config)[1:] == [f"unet-000000{step}.safetensors" for step in (2, 4, 5, 6)]


def test_weights_that_the_run_did_not_write_are_never_deleted(config):
    folder = config.checkpoint_dir / "tiny"
    others = ["unet-best.safetensors", "unet-1.safetensors", "unet-0000001.pth", "my-unet-0000001.safetensors"]
    later = "unet-0000009.safetensors"  # of a run from whose end somebody went back
    folder.mkdir(parents=True)
    for name in (*others, later):
        (folder / name).touch()
    make_steps(config, weights={})
    assert names(config) == sorted([*others, later, "unet-0000006.safetensors", "training-state-0000006.pt"])


# What is checked at the start.


@pytest.fixture
def room(monkeypatch):
    """A function that sets the free bytes of every disk."""
    return lambda free: monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))


def test_the_size_of_a_state_is_known_before_the_first_update(config):
    state = make_state()
    before = state_bytes(state)
    with open_run("tiny", config, state, start_processes("cpu")) as run:
        list(train(run))
    steps_taken = 2 * 4  # Adam's count for each of two parameters, in float32
    assert state_bytes(state) - steps_taken == before == bytes_of(state.as_dict()) - steps_taken
    assert before == 3 * 4 * 4  # four parameters in float32, each with two moments


@pytest.mark.parametrize(
    ("change", "needed"),
    [
        ({}, 3 * 48 + (1 + 1) * MB),
        ({"keep_states": 9}, 6 * 48 + 2 * MB),  # there are no more steps than six
        ({"keep_weights": 9, "save_every": 2}, 3 * 48 + 3 * MB),
        ({"keep_weights_every": 2, "save_every": 1}, 3 * 48 + (2 + 3) * MB),
    ],
)
def test_a_disk_without_room_for_what_is_kept_is_refused(config, room, change, needed):
    config = replace(config, save_every=1) if "save_every" not in change else config
    config, weights = replace(config, **change), {"w": torch.zeros(MB, dtype=torch.uint8)}
    room(needed)
    with open_run("tiny", config, make_state(), start_processes("cpu"), weights):
        pass
    room(needed - 1)
    said = f"^{config.checkpoint_dir / 'tiny'} needs another .* GB of disk space .*, but 0.0. GB are free; free some"
    with pytest.raises(UserError, match=said), open_run("tiny", config, make_state(), start_processes("cpu"), weights):
        pass


def test_files_of_the_run_that_are_there_already_count(config, room):
    config = replace(config, num_steps=100, save_every=50)
    make_steps(config, stop_after=51)
    make_steps(config)
    sizes = [path.stat().st_size for path in (config.checkpoint_dir / "tiny").glob("*.pt")]
    assert len(sizes) == 2
    room(0)
    with open_run("tiny", replace(config, num_steps=101), make_state(), start_processes("cpu")):
        pass  # a state of a kilobyte is counted as 56 bytes, and two are there


def test_shared_memory_that_cannot_hold_the_batches_is_refused(config, room, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    sample, needed = {"image": torch.zeros(MB, dtype=torch.uint8), "where": "a"}, 2 * (8 * 2 + 1) * 32 * MB
    room(needed)
    check_shared_memory(sample, 32, 8, 2)
    room(needed - 1)
    with pytest.raises(
        UserError, match="^/dev/shm must hold 1088 MB .*--ipc=host or --shm-size=3g, or set num_workers"
    ):
        check_shared_memory(sample, 32, 8, 2)
    check_shared_memory(sample, 32, 0, 2)
    with (
        pytest.raises(UserError, match="^/dev/shm"),
        open_run("tiny", config, make_state(), start_processes("cpu")) as run,
    ):
        run.config.num_workers = 10**9
        list(train(run))


@pytest.mark.parametrize(("cores", "processes", "workers"), [(16, 1, 8), (16, 4, 4), (2, 1, 2), (2, 4, 0)])
def test_workers_fit_the_cores_that_this_process_may_use(monkeypatch, cores, processes, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert workers_that_fit() == workers
