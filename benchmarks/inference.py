"""Figures of inference without its networks: its overhead, its speed, and whether memory grows with the length."""

from __future__ import annotations

import io
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr
from itertools import cycle, islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from scipy.io import wavfile

from benchmarks.silent import silent_pipeline
from benchmarks.timings import ratio
from benchmarks.workplace import Measured, UnavailableError, Workplace, repeat
from musetalk.contract import AUDIO_SAMPLE_RATE, IMAGE_SIZE
from musetalk.data.video import read_audio, read_frames, write_video

OUTPUT_SAMPLE_RATE = 48_000
SECONDS = 10, 120  # of video and audio
DUBBED_SECONDS = 5
MIB = 1 << 20
STATUS = Path("/proc/self/status")


def pipeline_overhead(workplace: Workplace) -> Measured:
    """CPU time of inference without its networks, divided by that of decoding and encoding the same video."""
    video, output, pipeline = workplace.video, workplace.folder / "out.mp4", silent_pipeline()

    def ours() -> None:
        with redirect_stderr(io.StringIO()):
            pipeline(video, video, output)

    def baseline() -> None:
        write_video(output, read_frames(video), read_audio(video, OUTPUT_SAMPLE_RATE), OUTPUT_SAMPLE_RATE)

    return ratio(ours, baseline)


def pipeline_wall_ratio(workplace: Workplace) -> Measured:
    """Time of dubbing without the networks, divided by that of decoding, blending and encoding one after the other.

    Measures wall-clock time, so the machine must be idle.
    """
    video, output, pipeline = workplace.folder / "long.mp4", workplace.folder / "out.mp4", silent_pipeline()
    repeat(workplace.video, video, DUBBED_SECONDS)
    with redirect_stderr(io.StringIO()):
        prepared = pipeline.prepare(video)
    count, sound = len(prepared.faces), np.zeros(0, np.float32)
    features = np.zeros((2 * count, *pipeline.audio_encoder.shape), np.float16)
    crop, short = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8), list(read_frames(workplace.video))

    def ours() -> None:
        write_video(output, pipeline.frames(prepared, features, count), sound, OUTPUT_SAMPLE_RATE)

    def in_turn() -> None:
        for _ in read_frames(video):
            pass
        frames = list(islice(cycle(short), count))  # those of the video, which repeats them
        for index, frame in enumerate(frames):
            prepared.paste(frame, crop, index)
        write_video(output, frames, sound, OUTPUT_SAMPLE_RATE)

    return ratio(ours, in_turn, repeats=3, clock=time.perf_counter)


def inference_memory_ratio(workplace: Workplace) -> Measured:
    """Peak memory of a process that lip-syncs two minutes of video without its networks, divided by that for 10 s."""
    if not STATUS.is_file():
        raise UnavailableError(f"this system has no {STATUS}")
    peaks = []
    for seconds in SECONDS:
        video, audio = (workplace.folder / f"{seconds} s.{extension}" for extension in ("mp4", "wav"))
        repeat(workplace.video, video, seconds)
        wavfile.write(audio, AUDIO_SAMPLE_RATE, np.zeros(seconds * AUDIO_SAMPLE_RATE, np.int16))
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            peaks.append(pool.submit(peak, video, audio, workplace.folder / "out.mp4").result())
    short, long = peaks
    return Measured(long / short, f"{long / MIB:.0f} MiB over {short / MIB:.0f} MiB")


def peak(video: Path, audio: Path, output: Path) -> int:
    """Peak memory of this process in bytes, after inference without its networks."""
    torch.set_num_threads(1)
    with redirect_stderr(io.StringIO()):
        silent_pipeline()(video, audio, output)
    # getrusage would include the parent process.
    kilobytes = next(line.split()[1] for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(kilobytes) << 10
