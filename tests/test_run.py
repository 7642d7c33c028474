"""The lifecycle of a run: saves, the files it keeps, and what it refuses at the start."""

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
from musetalk.training.checkpoint import load_latest_state
from musetalk.training.distributed import start_processes
from musetalk.training.preflight import (
    bytes_of,
    check_shared_memory,
    chunk_that_fits,
    missing_bytes,
    state_bytes,
    workers_that_fit,
)
from musetalk.training.run import open_run
from tests.ranks import Config, Numbers, make_state, train

MB = 10**6


@pytest.fixture
def config(tmp_path) -> Config:
    return Config(tmp_path / "states", tmp_path / "log")


def train_tiny(config: Config, *, stop_after: int = 0, weights: dict | None = None) -> dict:
    """Trains and returns the newest state. With `weights`, writes an empty file of weights after each step."""

    def save(folder: Path, step: int, *_: object) -> Path:
        path = folder / f"unet-{step:07d}.safetensors"
        path.touch()
        return path

    with open_run("tiny", config, make_state(), start_processes("cpu"), weights) as run:
        for step in train(run):
            if weights is not None:
                run.save_weights(save, weights, None)
            if step == stop_after:
                break
    return load_latest_state(config.checkpoint_dir / "tiny")[1]


def names(config: Config) -> list[str]:
    return sorted(path.name for path in (config.checkpoint_dir / "tiny").glob("*-*"))


def test_no_worker_outlives_a_run(config):
    """Even if an object still refers to its batches."""
    with open_run("tiny", replace(config, num_workers=2), make_state(), start_processes("cpu")) as run:
        batches = run.batches(Numbers())
        next(batches)
        assert len(multiprocessing.active_children()) == 2
    assert not multiprocessing.active_children()
    assert next(batches, None) is None


# Saves.


def test_a_run_resumed_from_a_save_by_time_equals_an_uninterrupted_one(config, tmp_path):
    whole = train_tiny(config)
    assert names(config) == ["training-state-0000006.pt"]
    cut_off = replace(config, checkpoint_dir=tmp_path / "cut_off", save_minutes=1e-9, keep_states=1)
    assert train_tiny(cut_off, stop_after=4)["step"] == 3  # the fourth step was not saved
    resumed = train_tiny(cut_off)
    assert names(cut_off) == ["training-state-0000006.pt"]
    assert torch.equal(resumed["network"]["weight"], whole["network"]["weight"])
    assert all(torch.equal(resumed["optimizer"]["state"][0][k], v) for k, v in whole["optimizer"]["state"][0].items())


def test_every_save_restarts_the_interval_of_saves_by_time(config):
    with open_run("tiny", replace(config, save_minutes=1), make_state(), start_processes("cpu")) as run:
        assert not run.overdue()
        run.saved_at -= 60
        assert run.overdue()
        run.save_state()
        assert not run.overdue()


def test_a_resumed_run_does_not_keep_the_file_of_its_state_open(config):
    train_tiny(replace(config, num_steps=2))
    state = make_state()
    with open_run("tiny", config, state, start_processes("cpu")):
        assert state.step == 2
        assert str(config.checkpoint_dir) not in Path("/proc/self/maps").read_text()


# Files that are kept.


def test_the_newest_weights_and_those_of_every_nth_step_are_kept(config):
    train_tiny(replace(config, keep_weights=2, keep_weights_every=2), weights={})
    assert names(config)[1:] == [f"unet-000000{step}.safetensors" for step in (2, 4, 5, 6)]


def test_weights_that_the_run_did_not_write_are_never_deleted(config):
    folder = config.checkpoint_dir / "tiny"
    others = ["unet-best.safetensors", "unet-1.safetensors", "unet-0000001.pth", "my-unet-0000001.safetensors"]
    later = "unet-0000009.safetensors"  # of a step that this run does not reach
    folder.mkdir(parents=True)
    for name in (*others, later):
        (folder / name).touch()
    train_tiny(config, weights={})
    assert names(config) == sorted([*others, later, "unet-0000006.safetensors", "training-state-0000006.pt"])


# Checks at the start.


@pytest.fixture
def set_free(monkeypatch):
    """A function that sets the free bytes of every disk."""
    return lambda free: monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))


def test_the_size_of_a_state_is_computed_before_the_first_update(config):
    state = make_state()
    before = state_bytes(state)
    with open_run("tiny", config, state, start_processes("cpu")) as run:
        list(train(run))
    counts = 2 * 4  # Adam's step, float32, of each of two tensors
    assert state_bytes(state) - counts == before == bytes_of(state.as_dict()) - counts
    assert before == 3 * 4 * 4  # four parameters in float32 with two moments each


@pytest.mark.parametrize(
    ("change", "needed"),
    [
        ({}, 3 * 48 + (1 + 1) * MB),
        ({"keep_states": 9}, 6 * 48 + 2 * MB),  # the run has only six steps
        ({"keep_weights_every": 2}, 3 * 48 + (2 + 3) * MB),
    ],
)
def test_a_disk_without_space_for_the_files_to_keep_is_refused(config, set_free, change, needed):
    config, weights = replace(config, save_every=1, **change), {"w": torch.zeros(MB, dtype=torch.uint8)}
    set_free(needed)
    with open_run("tiny", config, make_state(), start_processes("cpu"), weights):
        pass
    set_free(needed - 1)
    message = f"^{config.checkpoint_dir / 'tiny'} needs another .* GB of disk space"
    with (
        pytest.raises(UserError, match=message),
        open_run("tiny", config, make_state(), start_processes("cpu"), weights),
    ):
        pass


def test_existing_files_of_the_run_count_as_free_space(config, set_free):
    config = replace(config, num_steps=100, save_every=50)
    train_tiny(config, stop_after=51)
    train_tiny(config)
    sizes = [path.stat().st_size for path in (config.checkpoint_dir / "tiny").glob("*.pt")]
    assert len(sizes) == 2
    set_free(0)
    with open_run("tiny", replace(config, num_steps=101), make_state(), start_processes("cpu")):
        pass


def test_weights_in_two_files_count_once_a_step_and_as_often_as_they_are_saved(config, tmp_path):
    config, state = replace(config, num_steps=100, save_every=10), make_state()
    weights = {name: torch.zeros(size, dtype=torch.uint8) for name, size in (("plain", MB), ("adapter", 1000))}
    states = 3 * state_bytes(state)
    assert missing_bytes(tmp_path, config, state, weights) == states + 2 * (MB + 1000)
    assert missing_bytes(tmp_path, config, state, weights, weights_every=100) == states + MB + 1000
    for name, size in (("unet-0000050", MB), ("adapter-0000050", 1000)):
        (tmp_path / f"{name}.safetensors").write_bytes(bytes(size))
    assert missing_bytes(tmp_path, config, state, weights) == states + MB + 1000


def test_shared_memory_too_small_for_the_batches_is_refused(set_free, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    sample, needed = {"image": torch.zeros(MB, dtype=torch.uint8), "where": "a"}, 2 * (8 * 2 + 1) * 32 * MB
    set_free(needed)
    check_shared_memory(sample, 32, 8, 2)
    set_free(needed - 1)
    check_shared_memory(sample, 32, 0, 2)
    with pytest.raises(UserError, match="^/dev/shm must hold 1088 MB .*--shm-size=3g, or set num_workers"):
        check_shared_memory(sample, 32, 8, 2)


@pytest.mark.parametrize(("cores", "processes", "workers"), [(16, 1, 8), (16, 4, 4), (2, 1, 2), (2, 4, 0)])
def test_the_default_number_of_workers_fits_the_cores_of_this_process(monkeypatch, cores, processes, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert workers_that_fit() == workers


@pytest.mark.parametrize(("free_gib", "fits"), [(4, 1), (24, 7), (80, 63)])
def test_the_chunk_size_fits_the_free_memory_of_a_gpu(monkeypatch, free_gib, fits):
    """0.9 of the memory, less 0.25 GiB a sample for the UNet, in parts of 0.9 GiB; a CPU decodes one by one."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free_gib * 2**30, 80 * 2**30))
    choose = {"samples": 60, "checkpointing": False}
    assert chunk_that_fits(torch.device("cuda"), make_state(), **choose) == fits
    assert chunk_that_fits(torch.device("cpu"), make_state(), **choose) == 1
