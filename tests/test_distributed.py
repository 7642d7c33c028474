"""Two processes begin alike or not at all, and are stopped with their state saved."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys

from musetalk.training.checkpoint import load_latest_state
from tests.conftest import ROOT


def test_two_processes_begin_alike_and_a_slow_save_outlives_signals_to_both(tmp_path):
    """One of them is asked to stop, and the other one gets signals while it saves."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tests.ranks"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run([*command, tmp_path], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    _, saved = load_latest_state(tmp_path / "tiny") or (None, {})
    assert saved.get("step") == 2 and saved["optimizer"]["state"], ran.stderr
    assert not list(tmp_path.rglob("*.partial"))

    for rank in range(2):
        weights, others, same_timeouts, saved_before_leaving = (tmp_path / f"{rank}.txt").read_text().splitlines()
        ranks = [rf"\(rank {number} on {re.escape(socket.gethostname())}\)" for number in range(2)]
        differ = "the processes cannot train as one, since they differ in"
        assert re.match(rf"{differ} weights \w{{16}} {ranks[0]}, \w{{16}} {ranks[1]}; give all nodes", weights)
        step, cache = f"step 5 {ranks[0]}, 6 {ranks[1]}", f"cache abc {ranks[0]}, xyz {ranks[1]}"
        assert re.match(f"{differ} {step}; {cache}; give all nodes", others)
        assert same_timeouts == "True" and saved_before_leaving == "1"
