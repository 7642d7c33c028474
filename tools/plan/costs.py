"""The table of a plan, and the disks that are too small for it."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from musetalk.check import GIB, Finding
from musetalk.files import nearest_folder
from musetalk.training.preflight import GB


class Cost(NamedTuple):
    """A row of the table: what was measured, and what follows."""

    name: str
    rate: float  # frames of preparing, samples of a training, a second
    hours: float
    size: float  # bytes in the folder in the end
    folder: Path
    missing: float  # those of these bytes that are not in the folder yet
    work: str
    cold_rate: float | None = None  # samples a second that are read from the disk; None: not measured
    memory: int | None = None  # most bytes of tensors on the GPU; None: not measured


def check_reading(costs: list[Cost]) -> Iterator[Finding]:
    """A finding for each training that takes samples faster than they are read from the disk."""
    for cost in costs:
        if cost.cold_rate is not None and cost.cold_rate < cost.rate:
            rates = f"{digits(cost.cold_rate)} samples/s are read from the disk, {digits(cost.rate)} are trained on"
            yield Finding(f"{cost.name}: {rates}; use a faster disk, a larger num_workers, or memory for the cache")


def check_space(costs: list[Cost]) -> Iterator[Finding]:
    """A finding for each disk that is too small for what is planned on it."""
    disks: dict[int, list[Cost]] = defaultdict(list)
    for cost in costs:
        disks[nearest_folder(cost.folder).stat().st_dev].append(cost)
    for planned in disks.values():
        needed, free = sum(cost.missing for cost in planned), shutil.disk_usage(nearest_folder(planned[0].folder)).free
        if needed > free:
            parts = ", ".join(f"{cost.missing / GB:.1f} for {cost.folder}" for cost in planned)
            advice = "free some, keep fewer files (keep_states, keep_weights), or choose folders on another disk"
            text = f"disk: another {needed / GB:.1f} GB are needed ({parts}), but {free / GB:.1f} GB are free"
            yield Finding(f"{text}; {advice}", fault=True)


def digits(value: float) -> str:
    """A positive number with three digits, or as a whole number if it has more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(costs: list[Cost]) -> str:
    """The costs as lines of text, and their sums."""
    rows = [
        ("", "measured", "", "", "estimated", "", ""),
        ("", "rate", "reads cold", "GPU memory", "hours", "disk", "for"),
    ]
    for cost in costs:
        unit = "frames/s" if cost.name == "prepare" else "samples/s"
        cold_rate = "-" if cost.cold_rate is None else f"{digits(cost.cold_rate)} samples/s"
        memory = "-" if cost.memory is None else f"{cost.memory / GIB:.1f} GiB"
        figures = f"{digits(cost.rate)} {unit}", cold_rate, memory, f"{cost.hours:,.1f}", f"{cost.size / GB:.1f} GB"
        rows.append((cost.name, *figures, cost.work))
    hours, size = sum(cost.hours for cost in costs), sum(cost.size for cost in costs)
    rows.append(("all", "", "", "", f"{hours:,.1f}", f"{size / GB:.1f} GB", ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells, work in rows:
        aligned = (cell.rjust(width) for cell, width in zip(cells, widths[1:-1], strict=True))
        lines.append("   ".join([name.ljust(widths[0]), *aligned, work]).rstrip())
    return "\n".join(lines)
