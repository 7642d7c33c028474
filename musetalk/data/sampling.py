"""Draws windows of frames for the datasets: an identity first, with a capped weight, then one of its windows.

Only the number of windows of each clip is kept. Which frames they start at is read from the clip when one is drawn:
training has a process for each core, and 1,000 hours have 90 million frames.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from musetalk.contract import VIDEO_FPS


def window_starts(usable: np.ndarray, frames: int) -> np.ndarray:
    """Returns the first frames of all windows of `frames` consecutive usable frames. usable: int (N,), ascending."""
    firsts = usable[: max(0, len(usable) - frames + 1)]
    return firsts[usable[frames - 1 :] - firsts == frames - 1]


class WindowSampler:
    """Draws an identity with a weight of its number of windows, at most the cap, then a window uniformly within it."""

    def __init__(self, counts: Mapping[str, int], identities: Mapping[str, str], cap_minutes: float) -> None:
        """counts: clip -> number of its windows, at least one. identities: clip -> identity.

        cap_minutes: an identity with more windows than these minutes have frames is drawn as if it had this many; 0:
        no cap, so that all windows are drawn equally often.
        """
        self.count = sum(counts.values())  # windows
        cap = round(60 * VIDEO_FPS * cap_minutes) or self.count
        clips: dict[str, list[str]] = {}
        for name in counts:
            clips.setdefault(identities[name], []).append(name)
        self._clips = list(clips.values())
        self._ends = [np.cumsum([counts[name] for name in names]) for names in self._clips]
        self._weight_ends = np.cumsum([min(ends[-1], cap) for ends in self._ends])

    def draw(self, rng: np.random.Generator) -> tuple[str, int]:
        """Returns a clip and the index of one of its windows."""
        identity, _ = _pick(rng, self._weight_ends)
        clip, window = _pick(rng, self._ends[identity])
        return self._clips[identity][clip], window


def _pick(rng: np.random.Generator, ends: np.ndarray) -> tuple[int, int]:
    """Draws an item of consecutive groups that end at `ends`; returns its group and its index within the group."""
    item = int(rng.integers(ends[-1]))
    group = int(np.searchsorted(ends, item, side="right"))
    return group, item - (int(ends[group - 1]) if group else 0)
