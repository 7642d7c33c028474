"""Fault injection on the real scripts: kills, full disks, denied writes and concurrent runs.

    python -m tools.torture                            the full test, as in docs/robustness.md
    python -m tools.torture --kills 1 --faults 1       a short test

Each script is run once without faults on a small copy of the built-in sample. Then it is run with faults in one folder,
resuming by the same command each time, until it completes. The files must then equal those of the run without faults,
byte for byte, and a script that was not killed must have printed one sentence.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm

from musetalk.cli import Count, Seed, check_constants, run_script
from musetalk.contract import AUDIO_SAMPLE_RATE
from musetalk.data.audio import sync_mel
from musetalk.errors import UserError
from musetalk.models.unet import build_unet
from tools.torture.faults import FullDisk, KillAnyTime, KillAtWrite, LimitFiles, RefuseWrite, can_mount
from tools.torture.inject import Row, inject, run_concurrently
from tools.torture.scripts import FORK, MODELS, Script, cut_sample, prepare, run_without_faults, train


@dataclass(frozen=True)
class Config:
    """The number of faults."""

    kills: Count = 200  # per script, at random moments, and as many at file operations
    faults: Count = 40  # per script, of each other kind
    seed: Seed = 0


def torture(config: Config, folder: Path) -> list[Row]:
    """Injects all faults into both scripts in a new folder, in parallel."""
    check_constants(config)
    torch.set_num_threads(1)
    sync_mel(np.zeros(AUDIO_SAMPLE_RATE, np.float32))
    build_unet(MODELS, seed=0, positional_encoding=True)
    cut_sample(folder / "videos")
    prepared = run_without_faults("datasets_process.py", partial(prepare, folder / "videos"), folder / "prepared")
    trained = run_without_faults(
        "musetalk_trainer.py", partial(train, folder / "prepared/data/cache"), folder / "trained"
    )
    mountable = can_mount(folder)
    pairs = zip(jobs_of(prepared, config, mountable), jobs_of(trained, config, mountable), strict=True)
    jobs = [job for pair in pairs for job in pair]
    with ProcessPoolExecutor(os.cpu_count(), FORK) as pool:
        futures = [pool.submit(job, config.seed + k, folder / str(k)) for k, job in enumerate(jobs)]
        for future in futures:
            tqdm.write(str(future.result()))
        return [future.result() for future in futures]


def jobs_of(script: Script, config: Config, mountable: bool) -> Iterator[Callable[[int, Path], Row]]:
    """All faults of one script, as functions of a seed and a folder."""
    sizes = [len(content) for content in script.expected.values()]
    yield partial(inject, script, KillAnyTime(script.seconds), config.kills)
    yield partial(inject, script, KillAtWrite(), config.kills)
    yield partial(inject, script, RefuseWrite(errno.EACCES), config.faults)
    yield partial(inject, script, RefuseWrite(errno.ENOSPC), config.faults)
    yield partial(inject, script, LimitFiles(max(sizes)), config.faults)
    if mountable:
        yield partial(inject, script, FullDisk(sum(sizes)), config.faults)
    yield partial(run_concurrently, script, config.faults)


def table(rows: list[Row]) -> str:
    """A Markdown table of rows, followed by the stages of kills and by failures."""
    lines = ["| script | fault | count | lost |", "|---|---|---|---|"]
    lines += [f"| `{row.script}` | {row.fault} | {row.count} | {len(row.losses) or 'nothing'} |" for row in rows]
    for row in rows:
        if row.stages.total() > row.stages["between"]:
            lines.append(
                f"\n{row.script}, {row.fault}, by stage: " + ", ".join(f"{s} {n}" for s, n in row.stages.most_common())
            )
        lines += [f"\n{row.script}, {row.fault}: {loss}" for loss in row.losses]
    return "\n".join(lines)


def main(config: Config) -> None:
    """Prints the table. Raises UserError if something was lost."""
    with tempfile.TemporaryDirectory() as folder:
        rows = torture(config, Path(folder).resolve())
    print(table(rows))
    if any(row.losses for row in rows):
        raise UserError("files were lost or a message was missing; see above")


if __name__ == "__main__":
    run_script(main, tyro.cli(Config, description=__doc__))
