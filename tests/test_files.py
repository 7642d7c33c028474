"""Atomic writes, JSON and folder locks, tested with real failures of the operating system."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hostile import refusal

from musetalk.files import append_line, atomic_write, atomic_write_bytes, folder_lock, read_json

ROOT = Path(__file__).parents[1]


@contextmanager
def disk_full_after(size: int) -> Iterator[None]:
    """Limits the size of files in bytes, so that a write fails half way, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))  # Python ignores SIGXFSZ
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# Atomic writes.


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "deeper" / "file"
    with atomic_write(path) as partial:
        partial.write_text("half")
        assert partial.parent == path.parent and partial.name.endswith(".partial") and not path.exists()
        partial.write_text("whole")
    assert path.read_text() == "whole" and names(tmp_path) == ["new/deeper/file"]


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), OSError("no number")], ids=repr)
def test_an_error_in_the_block_passes_through_and_leaves_the_old_file(tmp_path, error):
    atomic_write_bytes(tmp_path / "file", b"old")
    with pytest.raises(type(error)) as caught, atomic_write(tmp_path / "file") as partial:
        partial.write_text("half")
        raise error
    assert caught.value is error
    assert (tmp_path / "file").read_text() == "old" and names(tmp_path) == ["file"]


@pytest.mark.parametrize("save", [None, torch.save], ids=["bytes", "torch"])
def test_a_full_disk_is_reported_with_the_final_name_and_leaves_the_old_file(tmp_path, save):
    """torch.save hides the system's error behind a RuntimeError when it closes its archive."""
    path = tmp_path / "file"
    atomic_write_bytes(path, b"old")
    with disk_full_after(5000), pytest.raises(OSError) as caught, atomic_write(path) as partial:
        with open(partial, "wb") as file:
            save(torch.zeros(20_000), file) if save else file.write(bytes(20_000))
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_an_error_about_another_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, atomic_write(tmp_path / "file"):
        open(tmp_path / "source")
    assert caught.value.filename == str(tmp_path / "source") and names(tmp_path) == []


@pytest.mark.parametrize(
    ("place", "number", "named"), [("file/new", errno.EEXIST, "file"), ("folder", errno.EISDIR, "folder")]
)
def test_a_path_that_cannot_be_a_file_is_named(tmp_path, place, number, named):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError) as caught:
        atomic_write_bytes(tmp_path / place, b"content")
    assert (caught.value.errno, caught.value.filename) == (number, str(tmp_path / named))
    assert names(tmp_path) == ["file"]


def test_any_text_can_be_appended(tmp_path):
    for line in ("one", "J\u00fcrgen", "\udcff"):
        append_line(tmp_path / "log", line)
    assert (tmp_path / "log").read_text(encoding="utf-8") == "one\nJ\u00fcrgen\n\\udcff\n"


def test_a_line_that_does_not_fit_on_the_disk_names_the_file(tmp_path):
    append_line(tmp_path / "log", "first")
    with disk_full_after(100), pytest.raises(OSError) as caught:
        append_line(tmp_path / "log", "x" * 1000)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "log"))
    assert (tmp_path / "log").read_text().startswith("first\n")


# JSON.


@pytest.mark.parametrize(
    ("content", "values"),
    [
        (b'{"a": [1, 2]}', {"a": [1, 2]}),
        (b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
        ('{"J\u00fcrgen": 1}'.encode(), {"J\u00fcrgen": 1}),
        (rb'{"a": "\udcff"}', {"a": "\udcff"}),
    ],
    ids=["ASCII", "byte order mark", "UTF-8", "undecodable name"],
)
def test_a_json_object_is_read(tmp_path, content, values):
    (tmp_path / "a.json").write_bytes(content)
    assert read_json(tmp_path / "a.json") == values


@pytest.mark.parametrize(
    "content",
    [b'{"a": 1', b'{"a": "\xff"}', b"[" * 100_000, b"[1]"],
    ids=["truncated", "not UTF-8", "nested too deeply", "a list"],
)
def test_a_file_without_a_json_object_is_refused_in_one_sentence(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    refusal(lambda: read_json(tmp_path / "a.json"), str(tmp_path / "a.json"))


def test_an_unreadable_json_file_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    for name in ("missing", "folder", "loop"):
        refusal(lambda name=name: read_json(tmp_path / name), str(tmp_path / name))


# Folder locks.

OWNER = """
import os, sys, time
from pathlib import Path
from musetalk.files import folder_lock
with folder_lock(Path(sys.argv[1])):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(600)
"""


def test_a_lock_belongs_to_one_process_until_it_ends(tmp_path):
    """Also if the process is killed and leaves a child, such as a worker of a data loader, and an unfinished file."""
    folder = tmp_path / "new" / "folder"
    owner = subprocess.Popen([sys.executable, "-c", OWNER, folder], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    child = int(owner.stdout.readline())
    try:
        (folder / "deeper").mkdir()
        (folder / "deeper" / f"a.json.{owner.pid}.partial").write_text("half")
        assert "is in use by another process" in refusal(lambda: folder_lock(folder).__enter__(), str(folder))
        assert names(folder) == [".lock", f"deeper/a.json.{owner.pid}.partial"]
        owner.kill()
        owner.wait()
        os.kill(child, 0)  # raises ProcessLookupError if the child has ended
        with folder_lock(folder) as lock:
            assert lock == folder / ".lock" and names(folder) == [".lock"]
    finally:
        owner.kill()
        os.kill(child, signal.SIGKILL)
        owner.stdout.close()


def test_a_folder_can_be_locked_again(tmp_path):
    for _ in range(2):
        with folder_lock(tmp_path):
            (tmp_path / "file").touch()
    assert names(tmp_path) == [".lock", "file"]


def test_only_temporary_files_of_atomic_write_are_removed(tmp_path):
    others = ["deeper/video.mp4.partial", "deeper/1234.partial", "a.json.12x.partial"]
    (tmp_path / "deeper").mkdir()
    for name in [*others, "deeper/a.json.1234.partial", "b.safetensors.7.partial"]:
        (tmp_path / name).touch()
    with folder_lock(tmp_path):
        assert names(tmp_path) == sorted([".lock", *others])


def test_a_lock_that_links_to_another_file_does_not_truncate_it(tmp_path):
    (tmp_path / "precious").write_text("work of years")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / ".lock").symlink_to(tmp_path / "precious")
    with folder_lock(tmp_path / "folder"):
        assert (tmp_path / "precious").read_text() == "work of years"


def test_a_path_that_cannot_be_a_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(OSError) as caught, folder_lock(path):
            pytest.fail("there is no such folder")
        assert caught.value.filename == str(path)
