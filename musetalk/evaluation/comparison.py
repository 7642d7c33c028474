"""The figures of several sides of an evaluation: means with intervals over people, and what differs for certain."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from musetalk.evaluation.metrics import bootstrap_interval, finite_mean
from musetalk.evaluation.validation import SHIFTS

TRUTH, COPYING = "truth", "copying"
RECONSTRUCTION, CROSS, SILENT = "reconstruction", "cross", "silence"
PROTOCOLS = {
    RECONSTRUCTION: "own audio, a reference frame from elsewhere in the clip",
    CROSS: "another clip's audio",
    SILENT: "digital silence",
}
CELL = 30  # characters of a column in the table

# Rows of each protocol, and whether higher (1) or lower (-1) values are better; 0: closer to the truth is better, or
# neither. The others stand in docs/evaluation.md.
SYNC = {"lse_c": 1, "lse_d": -1, "lse_offset": 0, "sync_confidence": 1, "sync_offset": 0}
LOOKS = {"csim": 1, "mar_spread": 0, "jitter": 0, "sharpness_mouth": 0}
IMAGES = {
    f"{name}{region}": better for name, better in (("psnr", 1), ("ssim", 1), ("lpips", -1)) for region in ("", "_mouth")
}
ROWS = {
    RECONSTRUCTION: IMAGES
    | {"fid": 0, "lmd": -1, "r_own_audio": 1}
    | {f"r_shift_{shift}": 0 for shift in SHIFTS}
    | SYNC
    | {"closures": 1, "closed": 0, "opening": 0, "lip_leak_pauses": -1, "sharpness": 0}
    | LOOKS,
    CROSS: {"r_other_audio": 1, "chance": 0} | SYNC | LOOKS,
    SILENT: {"opening": -1, "lip_leak": -1},
}


@dataclass
class Comparison:
    """The figures of N clips. Columns are the truth, copying and the candidates."""

    clips: list[str]  # names
    identities: list[str]  # of the clips
    columns: list[str]
    notes: list[str]  # what is not measured, and why
    # By protocol, row and column, (N,) each, nan where a clip has none.
    values: dict[str, dict[str, dict[str, np.ndarray]]] = field(default_factory=dict)
    fid: dict[str, float] = field(default_factory=dict)  # by column

    def store(self, protocol: str, row: str, column: str, index: int, value: float) -> None:
        """Stores a figure of the clip of an index."""
        columns = self.values.setdefault(protocol, {}).setdefault(row, {})
        columns.setdefault(column, np.full(len(self.clips), math.nan))[index] = value

    @property
    def groups(self) -> Sequence[str]:
        """What is resampled for intervals: identities, or clips if there is a single identity."""
        return self.identities if len(set(self.identities)) > 1 else self.clips

    def figures(self) -> Iterator[tuple[str, str, str, dict[str, float]]]:
        """Yields protocol, row, column and mean, low and high, which are the 95 % interval, of each figure."""
        for protocol, rows in ROWS.items():
            for row in rows:
                for column in self.columns:
                    values = self.values.get(protocol, {}).get(row, {}).get(column)
                    if row == "fid" and column in self.fid:
                        yield protocol, row, column, {"mean": self.fid[column]}
                    elif values is not None and np.isfinite(values).any():
                        low, high = bootstrap_interval(values, self.groups)
                        yield protocol, row, column, {"mean": finite_mean(values), "low": low, "high": high}

    def differences(self, column: str, baseline: str) -> dict[str, dict[str, tuple[float, float]]]:
        """The 95 % intervals of the paired differences to a baseline, column minus baseline, by protocol and row."""
        intervals: dict[str, dict[str, tuple[float, float]]] = {}
        for protocol, rows in ROWS.items():
            for row in rows:
                columns = self.values.get(protocol, {}).get(row, {})
                if column in columns and baseline in columns:
                    low, high = bootstrap_interval(columns[column] - columns[baseline], self.groups)
                    if not math.isnan(low):
                        intervals.setdefault(protocol, {})[row] = (low, high)
        return intervals

    def verdicts(self) -> Iterator[str]:
        """Yields for each candidate against copying and the candidates before it what is better, worse, or not shown.

        Better and worse: the interval of the paired differences excludes 0. Only rows of which more or less is better.
        """
        for index, column in enumerate(self.columns):
            if column in (TRUTH, COPYING):
                continue
            for baseline in self.columns[1:index]:
                found: dict[str, list[str]] = {"better": [], "worse": [], "not shown": []}
                for protocol, rows in self.differences(column, baseline).items():
                    for row, (low, high) in rows.items():
                        sign = ROWS[protocol][row]
                        if not sign:
                            continue
                        worst, best = sorted((sign * low, sign * high))
                        verdict = "better" if worst > 0 else "worse" if best < 0 else "not shown"
                        found[verdict].append(f"{row} ({protocol})")
                for verdict, names in found.items():
                    if names:
                        yield f"{column} against {baseline}, {verdict}: {', '.join(names)}"

    def __str__(self) -> str:
        """A table with a section for each protocol, the verdicts and the notes."""
        title = f"{len(set(self.identities))} identities, {len(self.clips)} clips"
        cells: dict[str, dict[str, dict[str, str]]] = {}
        for protocol, row, column, figure in self.figures():
            mean, *interval = (round(value, 6) + 0.0 for value in finite(figure).values())  # without -0 and 1e-17
            text = f"{mean:.4g} ({interval[0]:.3g} to {interval[1]:.3g})" if interval else f"{mean:.4g}"
            cells.setdefault(protocol, {}).setdefault(row, {})[column] = text
        lines = [_line(title, self.columns)]
        for protocol, rows in cells.items():
            lines.append(f"{protocol}: {PROTOCOLS[protocol]}")
            lines += [_line(f"  {row}", [texts.get(x, "-") for x in self.columns]) for row, texts in rows.items()]
        return "\n".join([*lines, *self.verdicts(), *self.notes])

    def as_json(self) -> dict:
        """Everything for programs: the means with intervals, the differences and the values of each clip."""
        document: dict = {
            "clips": dict(zip(self.clips, self.identities, strict=True)),
            "protocols": PROTOCOLS,
            "notes": self.notes,
            "figures": {},
            "differences": {},
            "values": {},
        }
        for protocol, row, column, figure in self.figures():
            document["figures"].setdefault(protocol, {}).setdefault(row, {})[column] = finite(figure)
        for index, column in enumerate(self.columns):
            for baseline in self.columns[1:index]:
                document["differences"][f"{column} - {baseline}"] = self.differences(column, baseline)
        for protocol, rows in self.values.items():
            for row, columns in rows.items():
                document["values"].setdefault(protocol, {})[row] = {
                    column: [value if math.isfinite(value) else None for value in values.tolist()]
                    for column, values in columns.items()
                }
        return document


def _line(name: str, cells: Sequence[str]) -> str:
    return f"{name:<24}" + "".join(f"  {cell[:CELL]:>{CELL}}" for cell in cells)


def finite(values: dict[str, float]) -> dict[str, float]:
    """The values that are finite, since JSON has no others."""
    return {name: value for name, value in values.items() if math.isfinite(value)}
