"""What preparing, the sync expert and both stages of training will cost on this machine, and what would be refused.

    python musetalk_trainer.py plan --hours 40                       the built-in sample and the small networks
    python musetalk_trainer.py plan --hours 40 --hdtf-dir videos --hdtf-samples-dir data/mine --models-dir models

Prepares 1 % of the videos, and at least as many as keep all processes busy; reads samples that are not in memory, as
most will be; and runs 20 steps of each training after 5 to warm up, or as many as take two minutes. The trainings use
the cache in `hdtf_samples_dir`, or the videos just prepared if there is none. All of it is the scripts' own code.
Prints a table of what was measured and of the hours and gigabytes that follow from it, then findings: a line that
begins with "!" is something that a later command would refuse. Leaves no file behind.

A step has all losses of its preset and one batch, and counts `grad_accum_steps` times. A network of a loss that would
be refused is replaced by a random one, which takes as long. Validation, pictures and saving come on top of the hours.
The gigabytes are those of the cache, and of the states and weights that a training keeps. A sample of the expert and of
stage2 is a window of 16 frames.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import musetalk_trainer
import syncnet_trainer
from musetalk.check import Finding
from musetalk.cli import check_constants
from musetalk.data.cache import Cache
from musetalk.data.sources import Source, find_sources
from musetalk.devices import choose_device, describe
from musetalk.errors import UserError
from musetalk.files import nearest_folder
from musetalk.training.preflight import local_processes
from tools.plan.config import PlanConfig
from tools.plan.costs import Cost, check_reading, check_space, table
from tools.plan.preparing import time_preparing
from tools.plan.trainings import EXPERT, STAGES, Config, loss_networks, time_training


def main(config: PlanConfig) -> None:
    """Prints the plan. Raises UserError without usable videos, or without the networks to prepare them."""
    check_constants(config)
    if local_processes() > 1:
        raise UserError("plan measures a single process; start it with python instead of a launcher")
    try:
        costs, findings = plan(config)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; nothing was kept") from None
    print(f"\non {describe(choose_device(config.device))}\n\n{table(costs)}\n")
    for finding in findings:
        print(f"{'!' if finding.fault else ' '} {finding.text}")
    if not any(finding.fault for finding in findings):
        print("\nnothing would be refused")


def plan(config: PlanConfig) -> tuple[list[Cost], list[Finding]]:
    """Measures in a temporary folder on the disk of the cache. Returns the rows of the table, and findings."""
    sources = find_sources(config.hdtf_dir)
    findings = list(check_identities(config.hdtf_dir, sources))
    parent = nearest_folder(config.hdtf_samples_dir.absolute().parent)
    with TemporaryDirectory(prefix=".plan-", dir=parent) as temporary:
        folder = Path(temporary)
        cost, finding = time_preparing(config, sources, folder / "cache")
        costs = [cost]
        findings.append(finding)
        has_cache = (config.hdtf_samples_dir / "contract.json").exists()
        cache = Cache(config.hdtf_samples_dir if has_cache else folder / "cache")
        models_dir, sync_expert, refused = loss_networks(config, cache, folder)
        findings += refused
        expert, device = syncnet_trainer.PRESETS[EXPERT], config.device
        trainings: dict[str, Config] = {f"syncnet_{EXPERT}": replace(expert, models_dir=models_dir, device=device)}
        for name in STAGES:
            constants = musetalk_trainer.PRESETS[name]
            trainings[name] = replace(constants, models_dir=models_dir, sync_expert=sync_expert, device=device)
        for name, preset in trainings.items():
            gc.collect()
            torch.cuda.empty_cache()  # since chunk_size "auto" depends on the free memory
            try:
                costs.append(time_training(name, preset, cache, config.checkpoint_dir))
            except UserError as error:
                findings.append(Finding(f"{name}: {error} (left out of the table)", fault=True))
            except torch.OutOfMemoryError:
                text = f"{name}: the GPU has too little memory; halve batch_size and double grad_accum_steps, or set"
                findings.append(Finding(f"{text} gradient_checkpointing and ema_on_host", fault=True))
    return costs, [*findings, *check_reading(costs), *check_space(costs)]


def check_identities(folder: Path, sources: list[Source]) -> Iterator[Finding]:
    """A finding if no person can be held out."""
    if len({source.identity for source in sources}) == 1:
        advice = "add videos of other people, or name them in identities.json if there are several"
        yield Finding(f"identities: {folder} has one, so clips of it are held out instead of people; {advice}")
