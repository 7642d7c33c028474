"""Files that are whole or not there, whatever happens meanwhile, and folders that one process at a time writes to."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from musetalk.errors import UserError

MAX_JSON = 16 << 20  # bytes; more is no file of ours
PARTIAL_NAME = re.compile(r"\.\d+\.partial$")  # as atomic_write gives; others' own files may end so too


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Gives a path beside `path` to write to; the file gets its name when the block ends without an error.

    No reader takes what ends in .partial. Raises OSError that names the file.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise _named(error, path) from error
    except RuntimeError as error:
        if not isinstance(error.__context__, OSError):
            raise
        raise _named(error.__context__, path) from error  # torch's way to say that a write failed
    finally:
        with suppress(OSError):  # what kept it from being written can keep it from being removed
            partial.unlink()


def _named(error: OSError, path: Path) -> OSError:
    """The error with the name of a file that people know, where the system named none or the partial one."""
    if error.errno is None or (error.filename and not str(error.filename).endswith(".partial")):
        return error
    return OSError(error.errno, error.strerror, str(path))


def atomic_write_bytes(path: Path, content: bytes) -> None:
    """Write a file of these bytes."""
    with atomic_write(path) as partial:
        partial.write_bytes(content)


def append_line(path: Path, line: str) -> None:
    """Add a line to a file of text. Raises OSError that names the file; then a part of the line may be in it."""
    try:
        with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{line}\n")
    except OSError as error:
        raise _named(error, path) from error


def read_json(path: Path) -> dict:
    """The JSON object of a file. Raises UserError saying what the file is instead."""
    try:
        # A pipe under the name of a file, which nobody may ever write to, is read as empty.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            content = file.read(MAX_JSON + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > MAX_JSON:
        raise UserError(f"{path} is larger than any JSON file of this project ({MAX_JSON >> 20} MB)")
    try:
        values = json.loads(content)
    except RecursionError as error:
        raise UserError(f"{path} cannot be read as JSON: it is nested too deeply") from error
    except ValueError as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no JSON object")
    return values


@contextmanager
def folder_lock(folder: Path) -> Iterator[Path]:
    """Within it no other process that asks may write to the folder; what a killed one left unfinished is removed.

    Gives the path of the lock, which goes with the process, not with its children. Raises UserError where another
    process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    with open(path, "a") as lock:  # a link to a file elsewhere must not empty it
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder} is in use by another process; wait until it ends, or stop it") from None
        for left in folder.rglob("*.partial"):
            if PARTIAL_NAME.search(left.name):
                left.unlink()
        yield path


def saved_files(run_dir: Path, pattern: str) -> dict[int, Path]:
    """Returns the files of a run whose names fit a pattern with one group, the step: by step, the newest first."""
    found = {int(match[1]): path for path in run_dir.glob("*") if (match := re.fullmatch(pattern, path.name))}
    return dict(sorted(found.items(), reverse=True))


def delete_older(path: Path, keep: int, every: int = 0) -> None:
    """Deletes files named like this one, `<kind>-<step, 7 digits>.<ending>`, but for earlier steps.

    The newest `keep`, this one among them, stay, and those of steps that are multiples of `every`; 0: of none.
    """
    kind, step = path.stem.rsplit("-", 1)
    files = saved_files(path.parent, rf"{re.escape(kind)}-(\d+){re.escape(path.suffix)}")
    earlier = [other for other in files if other < int(step)]
    for old in earlier[keep - 1 :]:
        ours = files[old].name == f"{kind}-{old:07d}{path.suffix}"
        if ours and (not every or old % every):
            files[old].unlink()
