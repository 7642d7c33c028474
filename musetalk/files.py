"""Atomic file writes, folder locks, JSON, and the numbered files of a run."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from musetalk.errors import UserError

PARTIAL_NAME = re.compile(r"\.\d+\.partial$")  # temporary files of atomic_write, not others that end in .partial


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path next to `path`, which is renamed to `path` when the block ends without an error.

    Temporary files end in .partial and are never read. Raises OSError that names the file.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise _with_name(error, path) from error
    except RuntimeError as error:  # torch.save hides a failed write behind one
        if not isinstance(error.__context__, OSError):
            raise
        raise _with_name(error.__context__, path) from error
    finally:
        with suppress(OSError):  # what prevented the write can prevent the removal
            partial.unlink()


def _with_name(error: OSError, path: Path) -> OSError:
    """Returns the error with the final file name in place of none or of the temporary one."""
    if error.errno is None or (error.filename and not str(error.filename).endswith(".partial")):
        return error
    return OSError(error.errno, error.strerror, str(path))


def atomic_write_bytes(path: Path, content: bytes) -> None:
    """Writes bytes to a file atomically. Raises OSError that names the file."""
    with atomic_write(path) as partial:
        partial.write_bytes(content)


def nearest_folder(path: Path) -> Path:
    """Returns a path itself if it is a folder, else the nearest folder above it that exists, as an absolute path."""
    path = path.absolute()
    return path if path.is_dir() else nearest_folder(path.parent)


def append_line(path: Path, line: str) -> None:
    """Appends a line to a text file. Raises OSError that names the file; the line may then be written in part."""
    try:
        with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{line}\n")
    except OSError as error:
        raise _with_name(error, path) from error


def read_json(path: Path) -> dict:
    """Reads a JSON object from a file. Raises UserError where the file is missing, unreadable or no JSON object."""
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise UserError(f"{path} cannot be read as JSON: it is nested too deeply") from error
    except ValueError as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a JSON object")
    return values


@contextmanager
def folder_lock(folder: Path) -> Iterator[Path]:
    """Locks a folder against other processes, and removes temporary files that a killed process left in it.

    Yields the path of the lock file. The lock belongs to this process and not to its children. Raises UserError if
    another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    with open(path, "a") as lock:  # "a": a symbolic link to another file must not truncate it
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder} is in use by another process; wait until it ends, or stop it") from None
        for leftover in folder.rglob("*.partial"):
            if PARTIAL_NAME.search(leftover.name):
                leftover.unlink()
        yield path


def saved_files(run_dir: Path, pattern: str) -> dict[int, Path]:
    """Returns the files of a run whose names match a pattern with one group, the step: {step: path}, newest first."""
    matches = {int(match[1]): path for path in run_dir.glob("*") if (match := re.fullmatch(pattern, path.name))}
    return dict(sorted(matches.items(), reverse=True))


def delete_older(path: Path, keep: int, every: int = 0) -> None:
    """Deletes the files of earlier steps that are named like this one, `<kind>-<step, 7 digits>.<suffix>`.

    Keeps the newest `keep` files including this one, and those whose step is a multiple of `every` (0: none).
    """
    kind, step = path.stem.rsplit("-", 1)
    files = saved_files(path.parent, rf"{re.escape(kind)}-(\d+){re.escape(path.suffix)}")
    earlier_steps = [earlier for earlier in files if earlier < int(step)]
    for old in earlier_steps[keep - 1 :]:
        has_our_name = files[old].name == f"{kind}-{old:07d}{path.suffix}"
        if has_our_name and (not every or old % every):
            files[old].unlink()
