"""Runs the ablations of the training recipe, which takes hours.

    python -m ablations                             all unfinished tasks, one per core at a time, then the report
    python -m ablations training-one-stage1-1       a single task: kind, material and arguments

To resume, run the same command again: finished tasks are kept, and a task ends or saves its state within ten minutes.
Everything is in data/ablations: report.md (tables, faces and curves), results/ by task, and a log for each task.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated

import tyro
from tqdm import tqdm

from ablations.report import write_report
from ablations.tasks import ROOT, WORK, Task, stages
from musetalk.cli import run_script
from musetalk.errors import UserError

MAX_SECONDS = 570  # of a process, which then saves its state; the next one resumes


@dataclass
class AblationsConfig:
    """The task to run."""

    task: Annotated[str, tyro.conf.Positional] = ""  # its name; "": all


def main(config: AblationsConfig) -> None:
    """Runs a task, or all unfinished ones and the report."""
    if config.task:
        find_task(config.task).run()
        return
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=sum(map(len, stages())), unit="task") as bar:
            for stage in stages():
                for task in pool.map(finish, stage):
                    bar.set_postfix_str(task.name)
                    bar.update()
    finally:
        print(f"wrote {write_report()}")


def find_task(name: str) -> Task:
    """Raises UserError if there is no such task."""
    for stage in stages():
        for task in stage:
            if task.name == name:
                return task
    raise UserError(f"{name!r} is not a task of the ablations; name one like {task.name}")


def finish(task: Task) -> Task:
    """Runs a task in processes of its own until it is done. Raises UserError if one fails."""
    log = WORK / f"{task.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    while not task.done and not task.ruled_out:
        with open(log, "a") as file:
            command, environment = [sys.executable, "-m", "ablations", task.name], os.environ | {"OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
            try:
                code = process.wait(MAX_SECONDS if task.resumable else None)
            except subprocess.TimeoutExpired:
                process.terminate()
                process.wait()
                continue
        if code:
            raise UserError(f"the task {task.name} failed; see {log}")
    return task


if __name__ == "__main__":
    run_script(main, tyro.cli(AblationsConfig, description=__doc__))
