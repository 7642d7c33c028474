"""Figures of reading a cache: its memory and opening time at 100 hours, and samples that are not in the page cache."""

from __future__ import annotations

import json
import math
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.timings import ratio
from benchmarks.workplace import Measured, UnavailableError, Workplace
from musetalk.contract import RIGID
from musetalk.data.cache import Cache, forget_clips
from musetalk.data.cache_format import MAX_CLIP_FRAMES, TENSORS, json_bytes
from musetalk.data.cache_writer import CacheWriter
from musetalk.data.dataset import FaceDataset
from musetalk.data.tensor_file import DTYPES

CLIPS = 6000  # of a minute: 100 hours, 9 million frames
DRAWN = 20_000  # samples
WORKERS = 64
READ = 20  # samples, cold and warm
GB, MB = 1e9, 1e6
MEMORY, IO = Path("/proc/self/smaps_rollup"), Path("/proc/self/io")


def sparse_cache(folder: Path, clips: int) -> Path:
    """Writes a cache of clips of a minute without contents, in sparse files of 20 KB each. Each has its own identity.

    All frames are usable, with empty latents and audio, equal faces, and images that cannot be decoded.
    """
    CacheWriter(folder, RIGID)
    (folder / "clips").mkdir()
    frames = MAX_CLIP_FRAMES
    sizes: dict[str | int, int] = {"T": frames, "K": 1, "N": frames, "T K + 1": frames + 1}
    sizes.update({"640 (T + 30)": 640 * (frames + 30), "F": 2 * frames, "S": 5, "D": 384, "M": 3 * frames})
    contents = {"usable": np.ones(frames, bool), "face_jpeg_offsets": np.arange(frames + 1)}
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    header, starts, end = {}, {}, 0
    for name, (scalar, shape) in TENSORS.items():
        dtype, lengths = np.dtype(scalar), [sizes.get(size, size) for size in shape]
        starts[name], end = end, end + math.prod(map(int, lengths)) * dtype.itemsize
        header[name] = {"dtype": kinds[dtype], "shape": lengths, "data_offsets": [starts[name], end]}
    text = json.dumps(header).encode()
    record = {"source_bytes": 1, "last": True, "start": 0, "device": "cpu", "frames": frames, "usable_frames": frames}
    for clip in (f"clip_{index:05d}" for index in range(clips)):
        with open(folder / "clips" / f"{clip}.safetensors", "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            first = file.tell()
            for name, array in contents.items():
                file.seek(first + starts[name])
                file.write(array.tobytes())
            file.truncate(first + end)
        own = {"source": f"{clip}.mp4", "identity": clip, "bytes": first + end, "sha256": "0" * 64}
        (folder / "clips" / f"{clip}.json").write_bytes(json_bytes(record | own))
    return folder


def open_dataset(folder: Path) -> FaceDataset:
    """Opens a cache for samples with the references that read most."""
    cache = Cache(folder)
    return FaceDataset(cache, list(cache.clips), cache.contract, seed=0, slots=1, references="pose_and_mouth")


def reader_gb_64_workers(workplace: Workplace) -> Measured:
    """Memory of 64 workers of a loader that draw samples from a cache of 100 hours, in GB.

    Measured in one process that opens the cache and draws: a forked worker has no more than this to itself even if it
    writes to every object of the cache. File pages, which the system shares and frees, do not count.
    """
    if not MEMORY.is_file():
        raise UnavailableError(f"this system has no {MEMORY}")
    folder = sparse_cache(workplace.folder / "100 hours", CLIPS)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        growth = pool.submit(memory_growth, folder).result()
    return Measured(WORKERS * growth / GB, f"{growth / MB:.1f} MB each")


def memory_growth(folder: Path) -> int:
    """Bytes of memory that opening a cache and drawing samples adds to this process."""
    before = private_bytes()
    dataset = open_dataset(folder)
    for step in range(DRAWN):
        dataset.draw(step, 0)
    return private_bytes() - before


def private_bytes() -> int:
    """Memory of this process that is not shared with others and not of a file, in bytes."""
    lines = MEMORY.read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("Private_Dirty"))) << 10


def cache_open_ratio(workplace: Workplace) -> Measured:
    """CPU time to open a clip of a cache of 6,000, divided by that of a cache of 600: 1 if it is linear."""
    large, small = (sparse_cache(workplace.folder / f"{clips} clips", clips) for clips in (CLIPS, CLIPS // 10))
    value, note = ratio(lambda: Cache(large), lambda: [Cache(small) for _ in range(10)])
    return Measured(value, f"{note} for {CLIPS} clips")


def cold_read_mb(workplace: Workplace) -> Measured:
    """Megabytes read from the disk for a sample of which nothing is in the page cache."""
    megabytes, _, _ = read_cold(workplace)
    return Measured(megabytes)


def cold_read_ratio(workplace: Workplace) -> Measured:
    """Elapsed time to read a sample from the disk, divided by that from the page cache."""
    _, cold, warm = read_cold(workplace)
    return Measured(cold / warm, f"{1 / cold:.0f} samples/s cold, {1 / warm:.0f} warm")


def read_cold(workplace: Workplace) -> tuple[float, float, float]:
    """Reads samples of clips of a minute, each from the disk and then from the page cache.

    Returns megabytes read from the disk and median seconds, cold and warm, of a sample.
    """
    cache = workplace.long_cache
    dataset = open_dataset(cache.folder)
    times, before = [], disk_bytes()
    for index in range(READ):
        forget_clips(cache.clips.values())
        start = time.perf_counter()
        dataset[index]
        middle = time.perf_counter()
        dataset[index]
        times.append((middle - start, time.perf_counter() - middle))
    megabytes = (disk_bytes() - before) / READ / MB
    if not megabytes:
        raise UnavailableError(f"the files in {cache.folder} cannot be removed from the page cache")
    cold, warm = (median(values) for values in zip(*times, strict=True))
    return megabytes, cold, warm


def disk_bytes() -> int:
    """Bytes that this process has read from a disk."""
    if not IO.is_file():
        raise UnavailableError(f"this system has no {IO}")
    return int(next(line.split()[1] for line in IO.read_text().splitlines() if line.startswith("read_bytes")))
