"""Atomic writes, JSON and folder locks, tested with real failures of the system."""

from __future__ import annotations

import errno
import json
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

from musetalk.errors import UserError
from musetalk.files import append_line, atomic_write, atomic_write_bytes, folder_lock, read_json

ROOT = Path(__file__).parents[1]
TOO_LARGE = os.strerror(errno.EFBIG)


@contextmanager
def disk_full_after(size: int) -> Iterator[None]:
    """Within it the system lets no file grow beyond this size, as a full disk would: a write fails half way."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))  # Python ignores the signal that comes with it
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# Whole files.


def test_a_file_gets_its_name_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "deeper" / "file"
    with atomic_write(path) as partial:
        partial.write_text("half")
        assert partial.parent == path.parent and partial.name.endswith(".partial") and not path.exists()
        partial.write_text("whole")
    assert path.read_text() == "whole" and names(tmp_path) == ["new/deeper/file"]


@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("x"), KeyboardInterrupt(), OSError("no number")])
def test_an_error_within_passes_through_and_leaves_the_old_file(tmp_path, error):
    atomic_write_bytes(tmp_path / "file", b"old")
    with pytest.raises(type(error)) as caught, atomic_write(tmp_path / "file") as partial:
        partial.write_text("half")
        raise error
    assert caught.value is error
    assert (tmp_path / "file").read_text() == "old" and names(tmp_path) == ["file"]


@pytest.mark.parametrize(
    "write", [atomic_write_bytes, lambda path, content: torch.save(torch.zeros(len(content)), path)]
)
def test_a_full_disk_is_reported_with_the_final_file_name(tmp_path, write):
    """torch.save hides the system's error behind a RuntimeError when it closes its archive."""
    path = tmp_path / "file"
    atomic_write_bytes(path, b"old")
    with disk_full_after(5000), pytest.raises(OSError) as caught:
        if write is atomic_write_bytes:
            write(path, bytes(20_000))
        else:
            with atomic_write(path) as partial, open(partial, "wb") as file:
                torch.save(torch.zeros(20_000), file)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert str(caught.value) == f"[Errno {errno.EFBIG}] {TOO_LARGE}: '{path}'"
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_an_error_about_another_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, atomic_write(tmp_path / "file"):
        open(tmp_path / "source")
    assert caught.value.filename == str(tmp_path / "source") and names(tmp_path) == []


def test_an_error_of_torch_that_is_none_of_the_system_stays_one(tmp_path):
    with pytest.raises(RuntimeError, match="size"), atomic_write(tmp_path / "file"):
        torch.ones(2) + torch.ones(3)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("place", "number", "named"),
    [
        ("file/new", errno.EEXIST, "file"),
        ("file/deeper/new", errno.ENOTDIR, "file/deeper"),
        ("folder", errno.EISDIR, "folder"),
        ("n" * 250, errno.ENAMETOOLONG, "n" * 250),
    ],
)
def test_a_place_where_no_file_can_be_is_named(tmp_path, place, number, named):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError) as caught:
        atomic_write_bytes(tmp_path / place, b"content")
    assert (caught.value.errno, caught.value.filename) == (number, str(tmp_path / named))
    assert names(tmp_path) == ["file"]


def test_lines_are_appended_whatever_is_in_them(tmp_path):
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
        (b'{"a": 1, "a": 2}', {"a": 2}),
        (b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
        ('{"J\u00fcrgen": 1}'.encode(), {"J\u00fcrgen": 1}),
        (rb'{"a": "\udcff"}', {"a": "\udcff"}),
    ],
    ids=["object", "same key twice", "byte order mark", "beyond ASCII", "undecodable name"],
)
def test_a_json_object_is_read(tmp_path, content, values):
    (tmp_path / "a.json").write_bytes(content)
    assert read_json(tmp_path / "a.json") == values


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as JSON: Expecting value"),
        (b'{"a": 1', "cannot be read as JSON: Expecting"),
        (b"<html>", "cannot be read as JSON: Expecting value"),
        (b'{"a": 1}{"b": 2}', "cannot be read as JSON: Extra data"),
        (b'{"a": "\xff"}', "cannot be read as JSON: 'utf-8' codec"),
        (b'{"a": ' + b"9" * 5000 + b"}", "cannot be read as JSON: Exceeds the limit"),
        (b"[" * 100_000, "cannot be read as JSON: it is nested too deeply"),
        (b'{"a": ' * 100_000 + b"1" + b"}" * 100_000, "cannot be read as JSON: it is nested too deeply"),
        (b"[1]", "is not a JSON object"),
        (b"3", "is not a JSON object"),
        (b"null", "is not a JSON object"),
    ],
    ids=lambda value: value[:12] if isinstance(value, bytes) else "",
)
def test_a_file_that_is_not_a_json_object_is_named_in_a_sentence(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_json(tmp_path / "a.json")
    assert str(caught.value).startswith(f"{tmp_path / 'a.json'} {message}") and "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "reason"), [("none", errno.ENOENT), ("folder", errno.EISDIR)])
def test_an_unreadable_json_file_is_named(tmp_path, name, reason):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError) as caught:
        read_json(tmp_path / name)
    assert str(caught.value) == f"{tmp_path / name} cannot be read: {os.strerror(reason)}"


# Folders of one process.

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


def test_a_folder_is_of_one_process_until_that_ends_however_it_ends(tmp_path):
    """The one that has it is killed and leaves a child, as a data loader's worker, and a file half written."""
    folder = tmp_path / "new" / "folder"
    owner = subprocess.Popen([sys.executable, "-c", OWNER, folder], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    child = int(owner.stdout.readline())
    try:
        (folder / "deeper").mkdir()
        (folder / "deeper" / f"a.json.{owner.pid}.partial").write_text("half")
        with pytest.raises(UserError) as caught, folder_lock(folder):
            pytest.fail("two have it")
        assert str(caught.value) == f"{folder} is in use by another process; wait until it ends, or stop it"
        assert names(folder) == [".lock", f"deeper/a.json.{owner.pid}.partial"]
        owner.kill()
        owner.wait()
        os.kill(child, 0)  # is alive
        with folder_lock(folder) as lock:
            assert lock == folder / ".lock" and names(folder) == [".lock"]
    finally:
        owner.kill()
        os.kill(child, signal.SIGKILL)
        owner.stdout.close()


def test_a_folder_can_be_had_again_and_again(tmp_path):
    for _ in range(2):
        with folder_lock(tmp_path):
            (tmp_path / "file").touch()
    assert names(tmp_path) == [".lock", "file"]


def test_only_what_a_process_left_unfinished_is_removed(tmp_path):
    """Somebody's own files may end in .partial too."""
    mine = ["deeper/video.mp4.partial", "deeper/1234.partial", "a.json.12x.partial"]
    (tmp_path / "deeper").mkdir()
    for name in [*mine, "deeper/a.json.1234.partial", "b.safetensors.7.partial"]:
        (tmp_path / name).touch()
    with folder_lock(tmp_path):
        assert names(tmp_path) == sorted([".lock", *mine])


@pytest.mark.parametrize("place", ["file", "file/folder"])
def test_a_folder_that_cannot_be_is_named(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as caught, folder_lock(tmp_path / place):
        pytest.fail("there is no such folder")
    assert caught.value.filename == str(tmp_path / place) and caught.value.errno in (errno.EEXIST, errno.ENOTDIR)


def test_a_record_written_and_read_is_the_same(tmp_path):
    values = {"source": "a\udcff\n.mp4", "last": True}
    atomic_write_bytes(tmp_path / "a.json", json.dumps(values).encode())
    assert read_json(tmp_path / "a.json") == values
