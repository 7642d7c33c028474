"""Training on several processes equals training on one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from musetalk.data.loader import SlotSampler
from musetalk.errors import TrainError
from musetalk.training.distributed import start_processes

ROOT = Path(__file__).parents[1]


@given(
    batch=st.integers(1, 3),
    world_size=st.integers(1, 4),
    parts=st.integers(1, 3),
    begin=st.integers(0, 5),
    count=st.integers(0, 3),
)
def test_a_micro_step_has_the_same_slots_for_any_world_size(batch, world_size, parts, begin, count):
    whole, steps = batch * world_size, range(begin, begin + count)
    one = list(SlotSampler(whole * parts, steps, whole))
    shares = [list(SlotSampler(whole * parts, steps, batch, rank, world_size)) for rank in range(world_size)]
    assert one == list(range(begin * whole * parts, (begin + count) * whole * parts))
    for part in range(count * parts):
        gathered = [item for share in shares for item in share[part * batch : (part + 1) * batch]]
        assert gathered == one[part * whole : (part + 1) * whole]


def run(processes: int, *arguments: object) -> None:
    """Runs tests/processes.py on a number of processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    many = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"] * (processes > 1)
    command = [sys.executable, *many, "-m", "tests.processes", *map(str, arguments)]
    ran = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def state(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of the one training state in a folder."""
    (path,) = folder.rglob(f"training-state-{step:07d}.pt")
    return tensors(torch.load(path, weights_only=True))


def tensors(value: object, prefix: str = "") -> dict[str, torch.Tensor]:
    if isinstance(value, dict):
        return {name: x for key, inner in value.items() for name, x in tensors(inner, f"{prefix}/{key}").items()}
    return {prefix: value} if isinstance(value, torch.Tensor) else {}


@pytest.mark.slow
@pytest.mark.parametrize("what", ["unet", "wav2lip_narrow", "latentsync_narrow"])
def test_two_processes_equal_one_and_can_be_resumed_on_one(sample_cache, tmp_path, what):
    """Three steps with gradient accumulation in float64: a UNet with discriminators and adaptive weights, and sync
    experts with batch norms over all processes. Only the first process is asked to stop."""
    run(1, what, sample_cache.folder, tmp_path / "one", 4, 3, "float64")
    run(2, what, sample_cache.folder, tmp_path / "two", 2, 2, "float64")
    run(1, what, sample_cache.folder, tmp_path / "two", 4, 1, "float64")
    one, two = (state(tmp_path / name, 3) for name in ("one", "two"))
    assert one.keys() == two.keys() and len(one) > 100
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-8, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.slow
def test_gradients_of_two_processes_equal_those_of_one_in_float32(sample_cache, tmp_path):
    for processes in (1, 2):
        run(processes, "unet", sample_cache.folder, tmp_path / str(processes), 4 // processes, 1, "float32")
    one, two = ({name: x for name, x in state(tmp_path / name, 1).items() if name.endswith("exp_avg")} for name in "12")
    assert one.keys() == two.keys() and len(one) > 50
    norm = torch.cat([value.flatten() for value in one.values()]).norm()
    difference = torch.cat([(two[name] - value).flatten() for name, value in one.items()]).norm()
    assert norm > 0 and difference / norm < 1e-5


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_other_distributed_backends_are_refused(monkeypatch, name):
    from accelerate import DistributedType

    class Shared:
        distributed_type = DistributedType[name]

    monkeypatch.setattr("musetalk.training.distributed.Accelerator", lambda **_: Shared())
    with pytest.raises(TrainError, match=f"^{name} is not supported: start it with python, torchrun or accel"):
        start_processes("auto")
