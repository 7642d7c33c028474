"""Command-line helpers of the scripts: checks of constants, presets, exit codes and stop signals.

Errors that a user can fix are printed as one sentence, without a traceback.
"""

from __future__ import annotations

import errno
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, TypeVar, get_type_hints

import tyro
from annotated_types import Ge, Gt, Le, Lt
from pydantic import AllowInfNan, TypeAdapter, ValidationError

from musetalk.errors import UserError, printable

Config = TypeVar("Config")

# Types of constants.
Count = Annotated[int, Ge(1), Le(10**12)]
CountOrZero = Annotated[int, Ge(0), Le(10**12)]
Seed = Annotated[int, Ge(0), Lt(2**32)]
Positive = Annotated[float, Gt(0), AllowInfNan(False)]
PositiveOrZero = Annotated[float, Ge(0), AllowInfNan(False)]
Workers = Annotated[int, Ge(0), Le(512)]  # number of processes
Share = Annotated[float, Gt(0), Lt(1)]
ShareOrZero = Annotated[float, Ge(0), Lt(1)]
Decay = Annotated[float, Ge(0), Lt(1)]
Pixels = Annotated[int, Ge(0), Le(1000)]  # source pixels
Shift = Annotated[int, Ge(-1000), Le(1000)]  # source pixels

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# What to do about system errors.
ADVICE = {
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some space and run the same command again",
    errno.EACCES: "grant this user read and write access, or choose another path",
    errno.EPERM: "grant this user read and write access, or choose another path",
    errno.EROFS: "choose a writable path",
    errno.EEXIST: "a file is in the place of a folder; choose another path",
    errno.ENOTDIR: "a file is in the place of a folder; choose another path",
    errno.EISDIR: "a folder is in the place of a file; choose another path",
}


def check_constants(config: object) -> None:
    """Validates every field of a dataclass against its annotation. Raises UserError naming the first invalid one."""
    for name, kind in get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        try:
            TypeAdapter(kind).validate_python(value, strict=True)
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(str(part) for part in (name, *fault["loc"]))
            raise UserError(f"{where} cannot be {fault['input']!r}: {fault['msg']}") from None


def parse_preset(arguments: list[str], presets: dict[str, Config], manual: str) -> tuple[str, Config]:
    """Parses a preset ("demo" by default) and its constants. Raises UserError for an unknown preset."""
    named = arguments and not arguments[0].startswith("-")
    preset = arguments[0] if named else "demo"
    if preset not in presets:
        raise UserError(f"preset must be one of {', '.join(presets)}, not {preset!r}")
    default = presets[preset]
    return preset, tyro.cli(type(default), default=default, args=arguments[bool(named) :], description=manual)


def run_script(main: Callable[[Config], None], config: Config) -> None:
    """Runs a script's main. Exits with code 2 after an error that the user can fix, 130 after an interruption."""
    for stream in (sys.stdout, sys.stderr):
        # File names may be undecodable.
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # both are TextIOWrapper
    threading.excepthook = _thread_excepthook
    try:
        main(config)
    except UserError as error:
        sys.exit(_report(str(error), 2))
    except OSError as error:
        if error.errno is None:
            raise
        parts = (error.filename and printable(str(error.filename)), error.strerror, ADVICE.get(error.errno))
        sys.exit(_report(": ".join(part for part in parts if part), 2))
    except KeyboardInterrupt as interruption:
        sys.exit(_report(str(interruption) or "interrupted; run the same command again to resume", 130))


def _thread_excepthook(thread) -> None:
    """Hides OSErrors of threads: TensorBoard's thread also raises them in the main thread, which reports them."""
    if not isinstance(thread.exc_value, OSError):
        threading.__excepthook__(thread)


def _report(message: str, code: int) -> int:
    """Prints an error and returns the exit code."""
    print(f"\n{message}", file=sys.stderr)
    return code


class StopRequests:
    """Whether the user (Ctrl-C) or a cluster (SIGTERM) has requested the script to save its work and stop.

    Further SIGTERMs are ignored: processes may get one from the cluster and one from their launcher. A second Ctrl-C
    interrupts at once, unless the script is `patient`.
    """

    def __init__(self, *, patient: bool) -> None:
        self.patient, self.requested = patient, False

    def __call__(self) -> bool:
        return self.requested

    def receive(self, number: int, _: object = None) -> None:
        """Handles a signal."""
        if self.requested and number == signal.SIGINT and not self.patient:
            raise KeyboardInterrupt
        if not self.requested:
            again = "" if self.patient else "; Ctrl-C again to stop at once"
            print(f"\nstopping after this step{again}", file=sys.stderr)
        self.requested = True

    @contextmanager
    def patience(self) -> Iterator[None]:
        """Ignores a second Ctrl-C within the context."""
        before, self.patient = self.patient, True
        try:
            yield
        finally:
            self.patient = before


@contextmanager
def stop_requests(*, patient: bool = False) -> Iterator[StopRequests]:
    """Makes Ctrl-C and SIGTERM requests within the context; `patient` ignores a second Ctrl-C. Main thread only."""
    requests = StopRequests(patient=patient)
    before = {number: signal.signal(number, requests.receive) for number in STOP_SIGNALS}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
