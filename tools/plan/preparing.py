"""Times the preparing of some videos."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from datasets_process import PASSES, PrepareConfig, prepare_videos, process_count
from musetalk.check import Finding
from musetalk.contract import VIDEO_FPS
from musetalk.data.sources import Source
from musetalk.devices import choose_device
from musetalk.errors import UserError
from tools.plan.config import PlanConfig
from tools.plan.costs import Cost

SHARE = 0.01  # of the frames of all videos


class FrameBar(tqdm):
    """A progress bar that knows when its first video began, which is after networks were loaded."""

    began = 0.0  # seconds of time.perf_counter()

    def update(self, n: float | None = 1) -> bool | None:
        self.began = self.began or time.perf_counter()
        return super().update(n)


def time_preparing(config: PlanConfig, sources: list[Source], cache: Path) -> tuple[Cost, Finding]:
    """Prepares some videos into a temporary cache. Raises UserError if none of them is usable."""
    device = str(choose_device(config.device))
    constants = PrepareConfig(config.hdtf_dir, cache, config.models_dir, device=device)
    chosen = choose_videos(constants, sources)
    threads = torch.get_num_threads()
    with FrameBar(total=PASSES * frames_of(chosen), desc="prepare", unit="frame", unit_scale=1 / PASSES) as bar:
        records = prepare_videos(constants, chosen, bar)
        seconds = time.perf_counter() - bar.began
    torch.set_num_threads(threads)  # preparing in this process sets it to 1
    clips = [record for record in records if "kind" not in record]
    if not clips:
        raise UserError(f"none of the {len(chosen)} videos that were tried is usable, such as: {records[0]['reason']}")
    frames, size = (sum(clip[key] for clip in clips) for key in ("frames", "bytes"))
    share = 3600 * config.hours * VIDEO_FPS / frames  # of the planned frames to these
    existing = sum(path.stat().st_size for path in config.hdtf_samples_dir.glob("clips/*"))
    cost = Cost(
        name="prepare",
        rate=frames / seconds,
        hours=share * seconds / 3600,
        size=share * size,
        folder=config.hdtf_samples_dir,
        missing=max(0, share * size - existing),
        work=f"{config.hours:g} h of video",
    )
    text = f"prepare: timed with {len(chosen)} of {len(sources)} videos, "
    text += f"processes: {max(1, process_count(constants, chosen))}"
    refused = Counter(record["kind"] for record in records if "kind" in record)
    return cost, Finding(text + "".join(f", refused for {kind}: {count}" for kind, count in refused.items()))


def frames_of(sources: list[Source]) -> int:
    """Returns the estimated number of frames of some videos."""
    return sum(source.frames for source in sources)


def choose_videos(config: PrepareConfig, sources: list[Source]) -> list[Source]:
    """Chooses videos at random, always the same ones: `SHARE` of the frames, for as many processes as all videos."""
    chosen: list[Source] = []
    for index in np.random.default_rng(0).permutation(len(sources)):
        chosen.append(sources[index])
        has_share = frames_of(chosen) >= SHARE * frames_of(sources)
        if has_share and process_count(config, chosen) == process_count(config, sources):
            break
    return chosen
