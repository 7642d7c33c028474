"""Figures that are ratios of times: the original's way, or a floor, and ours in turn on the same machine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path, PurePath
from statistics import median
from unittest.mock import patch

import numpy as np
import torch

from benchmarks import original
from benchmarks.silent import recalling_backend, silent_vae
from benchmarks.workplace import Measured, NotHereError, Workplace, cut, prepare_quietly
from datasets_process import PrepareConfig
from musetalk.contract import IMAGE_SIZE, RIGID
from musetalk.data.cache import encode_jpegs
from musetalk.data.crop import crop_clips, face_box
from musetalk.data.dataset import FaceDataset
from musetalk.data.face.mediapipe import MediapipeFaceMesh
from musetalk.data.video import read_frames
from musetalk.devices import supports_bf16
from musetalk.models.vae import load_vae

REPEATS = 5
SAMPLES = 200  # read by each side in turn
ENCODED = 2  # images that a full-size VAE encodes in turn
PREPARED_SECONDS, PREPARED_FRAMES = (0.2, 1.0), 6  # of two clips by us, frames by the original


def ratio(
    theirs: Callable[[], object],
    ours: Callable[[], object],
    repeats: int = REPEATS,
    clock: Callable[[], float] = time.process_time,
) -> Measured:
    """How often our time goes into theirs: the median of some turns, after one that does not count.

    With the CPU's own clock, of all threads, other work on the machine makes little difference.
    """
    torch.set_num_threads(1)  # of several, those that wait would count
    turns = []
    for _ in range(1 + repeats):
        begin = clock()
        theirs()
        middle = clock()
        ours()
        turns.append((middle - begin, clock() - middle))
    theirs_took, ours_took = (1000 * median(times) for times in zip(*turns[1:], strict=True))
    return Measured(median(a / b for a, b in turns[1:]), f"{theirs_took:.0f} ms over {ours_took:.0f} ms")


def loader_ratio(workplace: Workplace) -> Measured:
    """Training samples of the original's files over as many of a cache, of the same minutes of video, in CPU time."""
    folder, cache = workplace.folder / "original", workplace.long_cache
    original.write_samples(folder, cache)
    clips, rng = sorted(folder.iterdir()), np.random.default_rng(0)
    dataset = FaceDataset(cache, list(cache.clips), cache.contract, seed=0, slots=1, min_reference_gap=1)
    return ratio(
        lambda: [original.read_sample(clips, rng) for _ in range(SAMPLES)],
        lambda: [dataset[index] for index in range(SAMPLES)],
    )


def preprocess_nonmodel_ratio(workplace: Workplace) -> Measured:
    """All but the networks of preparing the frames of a video of 720 lines, in CPU time."""
    video, backend, vae = workplace.video, recalling_backend(), silent_vae()
    first = next(read_frames(video))
    box = face_box(backend.detect([first])[0][0].landmarks, first.shape)
    folder = workplace.folder / "crops"
    folder.mkdir()

    def ours() -> None:
        for name, cropped, _ in crop_clips(PurePath(video.name), read_frames(video), backend, RIGID):
            vae.encode_clip(name, cropped.crops, RIGID)
            encode_jpegs(image for images in cropped.crops for image in images)

    return ratio(lambda: list(original.crop_frames(video, box, folder)), ours)


def vae_encode_cpu_ratio(workplace: Workplace) -> Measured:
    """Images in float32 over ours in bfloat16 and channels_last, both one by one, by a full-size VAE on one thread."""
    require_bf16()
    device = torch.device("cpu")
    theirs = load_vae(workplace.models("full"), device, torch.float32, torch.contiguous_format)
    ours = load_vae(workplace.models("full"), device, torch.bfloat16)
    images = (torch.rand(ENCODED, 3, IMAGE_SIZE, IMAGE_SIZE) * 2 - 1).split(1)
    with torch.no_grad():
        return ratio(lambda: [*map(theirs.encode, images)], lambda: [*map(ours.encode, images)], repeats=3)


def preprocess_ratio(workplace: Workplace) -> Measured:
    """What one more frame takes with a full-size VAE on all cores: alone in float32, over our script's on two clips.

    In time that passes, so the machine must have nothing else to do.
    """
    require_bf16()
    models, folder = workplace.models("full"), workplace.folder / "prepared"
    few, many = (cut(workplace.clips[-2:], workplace.folder / f"{x} s", x) for x in PREPARED_SECONDS)
    vae = load_vae(models, torch.device("cpu"), torch.float32, torch.contiguous_format)
    backend, video = MediapipeFaceMesh(), next(many.iterdir())
    frame = next(read_frames(video))
    box = face_box(backend.detect([frame])[0][0].landmarks, frame.shape)
    folder.mkdir()

    @torch.no_grad()
    def theirs() -> float:
        torch.set_num_threads(os.cpu_count())
        begin = time.perf_counter()
        for images in islice(original.crop_frames(video, box, folder), PREPARED_FRAMES):
            backend.detect([frame])
            for image in images:
                vae.encode(image)
        return (time.perf_counter() - begin) / PREPARED_FRAMES

    def ours(videos: Path) -> tuple[int, float]:
        begin = time.perf_counter()
        with patch("datasets_process.MIN_FRAMES_PER_PROCESS", 1):  # as for larger data
            cache = prepare_quietly(PrepareConfig(videos, folder / videos.name, models))
        return sum(map(len, cache.clips.values())), time.perf_counter() - begin

    before, (start, started), (end, ended), after = theirs(), ours(few), ours(many), theirs()
    original_took, ours_took = (before + after) / 2, (ended - started) / (end - start)
    return Measured(original_took / ours_took, f"{original_took:.2f} s over {ours_took:.2f} s")


def require_bf16() -> None:
    """Raises NotHereError where the CPU does not compute in bfloat16."""
    if not supports_bf16("cpu"):
        raise NotHereError("this CPU does not compute in bfloat16")
