"""Runs a script with faults until it completes, and compares its files with those of a run without faults."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tools.torture.faults import Fault
from tools.torture.scripts import Script, compare, read_all, stage_of


@dataclass
class Row:
    """The results of one kind of fault in one script."""

    script: str
    fault: str
    count: int = 0  # faults
    stages: Counter = field(default_factory=Counter)  # stages in which the script was killed
    losses: list[str] = field(default_factory=list)  # descriptions of failures


def inject(script: Script, fault: Fault, repeats: int, seed: int, folder: Path) -> Row:
    """Runs a script with faults until it completes, and repeats until there were `repeats` faults."""
    row, rng = Row(script.name, fault.name), np.random.default_rng(seed)
    bar = tqdm(total=repeats, desc=f"{script.name}: {fault.name}")
    while row.count < repeats:
        folder.mkdir()
        while not row.losses:
            fault.before(folder, rng)
            process, pipe = script.start(folder, fault)
            fault.outside(process)
            process.join()
            output, exit_code = read_all(pipe), process.exitcode
            if exit_code == 0:
                row.losses = compare(script, folder)
                break
            row.count += 1
            bar.update()
            row.stages[stage_of(script.name, output)] += 1
            last_line = output.rstrip().rpartition("\n")[2]
            bad_message = exit_code == 2 and (fault.sentence not in last_line or "Traceback" in output)
            if exit_code != fault.exit_code or bad_message:
                row.losses.append(f"exited with {exit_code}: {output[-1000:]}")
        fault.after(folder)
        shutil.rmtree(folder)
        if row.losses:
            break
    return row


def run_concurrently(script: Script, repeats: int, seed: int, folder: Path) -> Row:
    """Starts a second run while the first one is running."""
    row, rng = Row(script.name, "two concurrent runs"), np.random.default_rng(seed)
    for _ in tqdm(range(repeats), f"{script.name}: {row.fault}"):
        folder.mkdir()
        (first, first_pipe), moment = script.start(folder, Fault()), rng.uniform(0, 0.8 * script.seconds)
        first.join(moment)
        second, second_pipe = script.start(folder, Fault())
        second.join()
        first.join()
        row.count += 1
        first_output, second_output = read_all(first_pipe), read_all(second_pipe)
        if first.exitcode != 0:
            row.losses.append(f"the first exited with {first.exitcode}: {first_output[-1000:]}")
        if second.exitcode not in (0, 2) or (second.exitcode == 2 and "in use by another process" not in second_output):
            row.losses.append(f"the second exited with {second.exitcode}: {second_output[-1000:]}")
        row.losses += compare(script, folder)
        shutil.rmtree(folder)
        if row.losses:
            break
    return row
