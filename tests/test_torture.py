"""A short form of `make torture`, and that it would notice a loss. In processes of their own, which fork best."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

CARELESS = """
import sys
from pathlib import Path
import numpy as np
from tools.torture import KillAtWrite, RefuseWrite, disturb, undisturbed

def main():
    for name in "abc":
        with open(name, "a") as file:  # begun again, it writes twice
            file.write(name)

folder = Path(sys.argv[1])
victim = undisturbed("datasets_process.py", main, folder / "truth")
print(disturb(victim, KillAtWrite(), 20, 0, folder / "killed").losses)
print(disturb(victim, RefuseWrite(13), 20, 0, folder / "refused").losses)
"""


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_nothing_is_lost_by_kills_full_disks_denied_writes_and_two_runs_at_once():
    ran = run("-m", "tools.torture", "--kills", "1", "--faults", "1")
    assert ran.returncode == 0, ran.stdout
    rows = re.findall(r"^\| `(\w+\.py)` \| (.+) \| (\d+) \| (.+) \|$", ran.stdout, re.MULTILINE)
    assert {script for script, *_ in rows} == {"datasets_process.py", "musetalk_trainer.py"}
    assert len(rows) >= 2 * 6 and all(int(times) >= 1 and lost == "nothing" for *_, times, lost in rows)


def test_what_a_careless_script_loses_is_noticed(tmp_path: Path):
    ran = run("-c", CARELESS, str(tmp_path))
    killed, refused = ran.stdout.splitlines()
    assert re.fullmatch(r"\['[abc] is another'.*\]", killed), ran.stderr
    assert "left with 1" in refused and "Traceback" in refused
