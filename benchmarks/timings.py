"""Figures that are ratios of times, alternating the original's code, or a baseline, with ours on the same machine."""

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
from benchmarks.silent import SilentBackend, silent_vae
from benchmarks.workplace import Measured, UnavailableError, Workplace, cut, prepare_quietly
from datasets_process import PrepareConfig
from musetalk.contract import IMAGE_SIZE, RIGID
from musetalk.data.cache_writer import JpegBuffer
from musetalk.data.crop import crop_clips, face_box
from musetalk.data.dataset import FaceDataset
from musetalk.data.face.face import FaceBackend
from musetalk.data.face.mediapipe import MediapipeFaceMesh
from musetalk.data.video import read_frames
from musetalk.devices import supports_bf16
from musetalk.models.vae import load_vae

REPEATS = 5
SAMPLES = 200  # read per repeat
ENCODED = 2  # images encoded per repeat by a full-size VAE
PREPARED_SECONDS, PREPARED_FRAMES = (0.2, 1.0), 6  # seconds of two clips for ours, frames for the original


def ratio(
    theirs: Callable[[], object],
    ours: Callable[[], object],
    repeats: int = REPEATS,
    clock: Callable[[], float] = time.process_time,
) -> Measured:
    """Their time divided by ours, the median of several alternating repeats after a warm-up.

    By default in CPU time of all threads, which other processes hardly affect.
    """
    torch.set_num_threads(1)  # waiting threads would count
    times = []
    for _ in range(1 + repeats):
        start = clock()
        theirs()
        middle = clock()
        ours()
        times.append((middle - start, clock() - middle))
    their_ms, our_ms = (1000 * median(values) for values in zip(*times[1:], strict=True))
    return Measured(median(a / b for a, b in times[1:]), f"{their_ms:.0f} ms over {our_ms:.0f} ms")


def loader_ratio(workplace: Workplace) -> Measured:
    """CPU time of reading samples from the original's files, divided by that of reading as many from a cache."""
    folder, cache = workplace.folder / "original", workplace.long_cache
    original.write_samples(folder, cache)
    clips, rng = sorted(folder.iterdir()), np.random.default_rng(0)
    dataset = FaceDataset(cache, list(cache.clips), cache.contract, seed=0, slots=1, min_reference_gap=1)
    return ratio(
        lambda: [original.read_sample(clips, rng) for _ in range(SAMPLES)],
        lambda: [dataset[index] for index in range(SAMPLES)],
    )


def preprocess_nonmodel_ratio(workplace: Workplace) -> Measured:
    """CPU time of preparing the frames of a 720p video without the networks, the original's divided by ours."""
    video, backend, vae = workplace.video, SilentBackend(), silent_vae()
    _, box = first_face(video, backend)
    folder = workplace.folder / "crops"
    folder.mkdir()

    def ours() -> None:
        for name, person, _ in crop_clips(PurePath(video.name), read_frames(video), backend, RIGID):
            jpegs = JpegBuffer()
            vae.encode_clip(name, jpegs.passing(person.crops(), 1), RIGID)

    return ratio(lambda: list(original.crop_frames(video, box, folder)), ours)


def vae_encode_cpu_ratio(workplace: Workplace) -> Measured:
    """CPU time of a full-size VAE encoder in float32, divided by ours in bfloat16 and channels_last; batch size 1."""
    require_bf16()
    device = torch.device("cpu")
    theirs = load_vae(workplace.models("full"), device, torch.float32, torch.contiguous_format)
    ours = load_vae(workplace.models("full"), device, torch.bfloat16)
    images = (torch.rand(ENCODED, 3, IMAGE_SIZE, IMAGE_SIZE) * 2 - 1).split(1)
    with torch.no_grad():
        return ratio(lambda: [*map(theirs.encode, images)], lambda: [*map(ours.encode, images)], repeats=3)


def preprocess_ratio(workplace: Workplace) -> Measured:
    """Time of one more frame with a full-size VAE on all cores, the original's in float32 divided by our script's.

    Measures wall-clock time, so the machine must be idle.
    """
    require_bf16()
    models, folder = workplace.models("full"), workplace.folder / "prepared"
    short, long = (cut(workplace.clips[-2:], workplace.folder / f"{x} s", x) for x in PREPARED_SECONDS)
    vae = load_vae(models, torch.device("cpu"), torch.float32, torch.contiguous_format)
    backend, video = MediapipeFaceMesh(torch.device("cpu")), next(long.iterdir())
    frame, box = first_face(video, backend)
    folder.mkdir()

    @torch.no_grad()
    def theirs() -> float:
        torch.set_num_threads(os.cpu_count() or 1)
        start = time.perf_counter()
        for images in islice(original.crop_frames(video, box, folder), PREPARED_FRAMES):
            backend.detect([frame])
            for image in images:
                vae.encode(image)
        return (time.perf_counter() - start) / PREPARED_FRAMES

    def ours(videos: Path) -> tuple[int, float]:
        start = time.perf_counter()
        with patch("datasets_process.MIN_FRAMES_PER_PROCESS", 1):  # as for longer videos
            cache = prepare_quietly(PrepareConfig(videos, folder / videos.name, models))
        return sum(map(len, cache.clips.values())), time.perf_counter() - start

    before, (short_frames, short_s), (long_frames, long_s), after = theirs(), ours(short), ours(long), theirs()
    their_s, our_s = (before + after) / 2, (long_s - short_s) / (long_frames - short_frames)
    return Measured(their_s / our_s, f"{their_s:.2f} s over {our_s:.2f} s")


def first_face(video: Path, backend: FaceBackend) -> tuple[np.ndarray, np.ndarray]:
    """The first frame of a video, BGR uint8 (H, W, 3), and the box of its face, int32 (4,)."""
    frame = next(read_frames(video))
    box = face_box(backend.detect([frame])[0][0].landmarks, frame.shape)
    assert box is not None
    return frame, box


def require_bf16() -> None:
    """Raises UnavailableError if the CPU does not support bfloat16."""
    if not supports_bf16("cpu"):
        raise UnavailableError("this CPU does not support bfloat16")
