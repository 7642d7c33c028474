"""Two processes: they train as one or are refused, and a signal to one of them stops both after a save."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from musetalk.training.checkpoint import load_latest_state
from tests.conftest import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder that two processes of tests/ranks.py have written to."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tests.ranks"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run([*command, folder], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert (folder / "0.json").exists() and (folder / "1.json").exists(), ran.stderr
    return folder


@pytest.fixture(params=[0, 1])
def seen(request, folder) -> dict:
    """What a process saw."""
    return json.loads((folder / f"{request.param}.json").read_text())


def test_processes_that_differ_are_refused_with_what_differs(seen):
    assert "differ in weights" in seen["other weights"]
    for name in ("step 5 (rank 0", "6 (rank 1", "cache abc (rank 0", "xyz (rank 1"):
        assert name in seen["other step and cache"]
    assert "weights" not in seen["other step and cache"]


def test_an_update_is_by_the_clipped_mean_of_all_gradients(seen):
    """The mean of (2, 0) and (4, 8) is (3, 4), whose norm is 5."""
    updated, norm, skipped = seen["step"]
    assert norm == 5 and updated == pytest.approx([-0.6, -0.8], abs=1e-6) and skipped == ""


def test_a_gradient_that_is_not_finite_in_one_process_skips_the_step_in_all(seen):
    unchanged, _, skipped = seen["skipped"]
    assert unchanged == [0, 0]
    assert "terms not finite: loss" in skipped and "sample 0; sample 1" in skipped


def test_a_signal_to_one_process_stops_both_after_a_slow_save_that_signals_do_not_interrupt(folder, seen):
    assert seen["saved before exit"] == ["training-state-0000002.pt"]
    _, saved = load_latest_state(folder / "tiny")
    assert saved["step"] == 2 and saved["optimizer"]["state"]
    assert not list(folder.rglob("*.partial"))
