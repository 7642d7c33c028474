"""Measures the cost of training, the cache and inference, and compares it with targets.

    python -m benchmarks                             all figures
    python -m benchmarks loader_ratio train_gib_b32  some figures
    python -m benchmarks --cache data/mine           figures of the cache for an existing cache

Prints a table, with a note under each figure that misses its target, then one line of JSON for each figure.
benchmarks/README.md explains the figures.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from benchmarks.figures import FIGURES, Figure
from benchmarks.workplace import UnavailableError, Workplace
from musetalk.cli import run_script
from musetalk.errors import UserError

NAMES = [figure.name for figure in FIGURES]


@dataclass
class BenchmarkConfig:
    """The figures to measure, and the cache to measure them on."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()  # names of figures; by default all
    cache: Path | None = None  # by default a cache of the first seconds of some clips


def main(config: BenchmarkConfig) -> None:
    """Prints each figure as soon as it is measured."""
    if unknown := set(config.names) - set(NAMES):
        raise UserError(f"unknown figure {', '.join(sorted(unknown))}; choose from {', '.join(NAMES)}")
    lines = []
    print(f"{'name':<34}{'value':>12} {'unit':<9}{'target':<12}ok")
    with tempfile.TemporaryDirectory() as folder:
        workplace = Workplace(Path(folder), config.cache)
        for figure in FIGURES:
            if figure.name in (config.names or NAMES):
                lines.append(show(figure, workplace))
    print("\n".join(lines))


def show(figure: Figure, workplace: Workplace) -> str:
    """Measures a figure and prints its row. Returns its JSON, with a null value if it cannot be measured here."""
    record: dict = {"name": figure.name, "value": None, "unit": figure.unit, "target": figure.target, "ok": None}
    note = ""
    try:
        value, note = figure.measure(workplace)
        record |= {"value": round(value, 4), "ok": figure.holds(value)}
    except UnavailableError as error:
        note = f"not measured: {error}"
    shown = "-" if record["value"] is None else f"{record['value']:.6g}"
    verdict = {True: "yes", False: "NO", None: "-"}[record["ok"]]
    print(f"{figure.name:<34}{shown:>12} {figure.unit:<9}{figure.target:<12}{verdict}", flush=True)
    if note and not record["ok"]:
        print("    " + note.replace("\n", "\n    "), flush=True)
    return json.dumps(record)


if __name__ == "__main__":
    run_script(main, tyro.cli(BenchmarkConfig, description=__doc__))
