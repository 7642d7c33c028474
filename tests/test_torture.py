"""A short run of fault injection, and a test that it detects losses. In separate processes, because it forks."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow

CARELESS = """
import sys
from pathlib import Path
import numpy as np
from tools.torture.faults import KillAtWrite, RefuseWrite
from tools.torture.inject import inject
from tools.torture.scripts import run_without_faults

def main():
    for name in "abc":
        with open(name, "a") as file:  # writes again after a restart
            file.write(name)

folder = Path(sys.argv[1])
script = run_without_faults("datasets_process.py", main, folder / "expected")
print(inject(script, KillAtWrite(), 20, 0, folder / "killed").losses)
print(inject(script, RefuseWrite(13), 20, 0, folder / "refused").losses)
"""


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_nothing_is_lost_by_faults():
    ran = run("-m", "tools.torture", "--kills", "1", "--faults", "1")
    assert ran.returncode == 0, ran.stdout
    rows = re.findall(r"^\| `(\w+\.py)` \| (.+) \| (\d+) \| (.+) \|$", ran.stdout, re.MULTILINE)
    assert {script for script, *_ in rows} == {"datasets_process.py", "musetalk_trainer.py"}
    assert len(rows) >= 2 * 6 and all(int(count) >= 1 and lost == "nothing" for *_, count, lost in rows)


def test_losses_are_detected(tmp_path: Path):
    ran = run("-c", CARELESS, str(tmp_path))
    killed, refused = ran.stdout.splitlines()
    assert re.fullmatch(r"\['[abc] differs'.*\]", killed), ran.stderr
    assert "exited with 1" in refused and "Traceback" in refused
