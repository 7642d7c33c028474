"""Measure what things cost and hold it against the targets.

    python -m benchmarks                             all figures
    python -m benchmarks loader_ratio train_gib_b32  some
    python -m benchmarks --cache data/mine           the cache's figures of a cache that is there

Prints a table, with a note under each figure that misses its target, and then each figure as JSON in a line of its own.
What they mean is in benchmarks/README.md.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from benchmarks.figures import FIGURES, Figure
from benchmarks.workplace import NotHereError, Workplace
from musetalk.cli import run_script
from musetalk.errors import UserError

NAMES = [figure.name for figure in FIGURES]


@dataclass
class BenchmarkConfig:
    """Which figures, and of what."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()  # of figures; none is all
    cache: Path | None = None  # a cache to look at; none is one of the first seconds of some clips


def main(config: BenchmarkConfig) -> None:
    """Measure, and print each figure as soon as it is there."""
    if unknown := set(config.names) - set(NAMES):
        raise UserError(f"there is no figure {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    lines = []
    print(f"{'name':<34}{'value':>12} {'unit':<9}{'target':<12}ok")
    with tempfile.TemporaryDirectory() as folder:
        workplace = Workplace(Path(folder), config.cache)
        for figure in FIGURES:
            if figure.name in (config.names or NAMES):
                lines.append(show(figure, workplace))
    print("\n".join(lines))


def show(figure: Figure, workplace: Workplace) -> str:
    """Measure a figure and print its row. Returns its line of JSON, in which what cannot be measured here is null."""
    record = {"name": figure.name, "value": None, "unit": figure.unit, "target": figure.target, "ok": None}
    note = ""
    try:
        value, note = figure.measure(workplace)
        record |= {"value": round(value, 4), "ok": figure.holds(value)}
    except NotHereError as error:
        note = f"not measured: {error}"
    shown = "-" if record["value"] is None else f"{record['value']:.6g}"
    verdict = {True: "yes", False: "NO", None: "-"}[record["ok"]]
    print(f"{figure.name:<34}{shown:>12} {figure.unit:<9}{figure.target:<12}{verdict}", flush=True)
    if note and not record["ok"]:
        print("    " + note.replace("\n", "\n    "), flush=True)
    return json.dumps(record)


if __name__ == "__main__":
    run_script(main, tyro.cli(BenchmarkConfig, description=__doc__))
