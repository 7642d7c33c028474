"""Files from outside take no more memory than they could fill, measured in a process that has little."""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from test_hostile_clips import HOSTILE_SAFETENSORS, PICTURES, store_picture
from test_hostile_files import one_clip, read_all, refusal

from musetalk.files import read_json


def limit_memory() -> None:
    """Let this process take no more than 2 GB over what it has."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (2 << 30), resource.RLIM_INFINITY))


@pytest.fixture(scope="module")
def small_process():
    """A process of its own that has little memory."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=limit_memory) as pool:
        yield pool


READERS = {
    "clip": read_all,
    "json": lambda folder: read_json(folder / "a.json"),
}


def memory_taken(reader: str, folder: Path) -> tuple[str, int]:
    """What a reader says against a file, and by how many MB it raised the most memory that this process ever took."""
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message = refusal(lambda: READERS[reader](folder), str(folder))
    return message, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10


@pytest.fixture
def said(small_process) -> Callable[[str, Path], str]:
    """A function: reader, folder -> what it says against a file there, having taken no memory to speak of."""

    def measure(reader: str, folder: Path) -> str:
        message, taken = small_process.submit(memory_taken, reader, folder).result()
        assert taken < (400 if reader == "json" else 100)
        return message

    return measure


def test_no_picture_takes_more_memory_than_its_file_could_fill(said, tmp_path, random_tensors):
    one_clip(tmp_path, random_tensors)
    store_picture(tmp_path, random_tensors(6, variants=2, unusable=[2]), PICTURES["65500 x 65500"])
    assert "there is no picture" in said("clip", tmp_path)


@pytest.mark.parametrize("name", ["length 2**63", "length beyond the file", "huge offsets", "too many sizes", "deep"])
def test_no_clip_takes_more_memory_than_it_could_fill(said, tmp_path, random_tensors, name):
    one_clip(tmp_path, random_tensors)
    (tmp_path / "clips" / "a.safetensors").write_bytes(HOSTILE_SAFETENSORS[name])
    assert "a.safetensors" in said("clip", tmp_path)


@pytest.mark.parametrize(
    "content", [b"[" + b"[]," * 5_000_000 + b"[]]", b'{"a":' * 10**6, bytes(10**8)], ids=["many", "deep", "large"]
)
def test_no_json_takes_more_memory_than_the_largest_allowed(said, tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    assert "a.json" in said("json", tmp_path)
