"""How a script begins and ends: its constants are checked before anything expensive; what its user can mend is one
sentence with exit code 2 and no traceback; an interruption says how to go on."""

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

# Kinds of constants.
Count = Annotated[int, Ge(1), Le(10**12)]
CountOrZero = Annotated[int, Ge(0), Le(10**12)]
Seed = Annotated[int, Ge(0), Lt(2**32)]
Positive = Annotated[float, Gt(0), AllowInfNan(False)]
PositiveOrZero = Annotated[float, Ge(0), AllowInfNan(False)]
Workers = Annotated[int, Ge(0), Le(512)]  # processes
Share = Annotated[float, Gt(0), Lt(1)]
Decay = Annotated[float, Ge(0), Lt(1)]
Pixels = Annotated[int, Ge(0), Le(1000)]  # of a source
Shift = Annotated[int, Ge(-1000), Le(1000)]  # pixels of a source

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# What to do about an error of the system.
ADVICE = {
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some space and run the same command again",
    errno.EACCES: "allow this user to read and write there, or choose another path",
    errno.EPERM: "allow this user to read and write there, or choose another path",
    errno.EROFS: "choose a path that can be written",
    errno.EEXIST: "a file is where a folder should be; choose another path",
    errno.ENOTDIR: "a file is where a folder should be; choose another path",
    errno.EISDIR: "a folder is where a file should be; choose another path",
}


def check_constants(config: object) -> None:
    """Hold every constant of a dataclass against its annotation. Raises UserError naming the first that is unfit."""
    for name, kind in get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        try:
            TypeAdapter(kind).validate_python(value, strict=True)
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(str(part) for part in (name, *fault["loc"]))
            must = (
                fault["msg"]
                .replace("Input should", "must")
                .replace("Tuple should", "must")
                .replace(" after validation", "")
                .replace("Field required", "must be given")
                .replace("Value error, ", "")
            )
            raise UserError(f"{where} {must}, not {fault['input']!r}") from None


def parse_preset(arguments: list[str], presets: dict[str, Config], manual: str) -> tuple[str, Config]:
    """Preset ("demo" where none is named) and constants of a command line. Raises UserError for an unknown preset."""
    named = arguments and not arguments[0].startswith("-")
    preset = arguments[0] if named else "demo"
    if preset not in presets:
        raise UserError(f"there is no preset {preset!r}; there are {', '.join(presets)}")
    default = presets[preset]
    return preset, tyro.cli(type(default), default=default, args=arguments[bool(named) :], description=manual)


def run_script(main: Callable[[Config], None], config: Config) -> None:
    """Run a script's main. Leaves with exit code 2 for what its user can mend, 130 when interrupted."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # no name of a file ends a run
    threading.excepthook = _quiet_thread
    try:
        main(config)
    except UserError as error:
        sys.exit(_leave(str(error), 2))
    except OSError as error:
        if error.errno is None:
            raise
        parts = (error.filename and printable(str(error.filename)), error.strerror, ADVICE.get(error.errno))
        sys.exit(_leave(": ".join(part for part in parts if part), 2))
    except KeyboardInterrupt as interruption:
        sys.exit(_leave(str(interruption) or "interrupted; run the same command again to go on", 130))


def _quiet_thread(thread) -> None:
    """TensorBoard's thread hands a failed write to the main thread as well, which says it in a sentence."""
    if not isinstance(thread.exc_value, OSError):
        threading.__excepthook__(thread)


def _leave(message: str, code: int) -> int:
    print(f"\n{message}", file=sys.stderr)
    return code


class StopRequests:
    """Whether Ctrl-C or SIGTERM, as clusters send it, has asked a script to stop: it ends when it has saved its work.

    Another SIGTERM changes nothing: a launcher forwards it to processes that a cluster has sent it to as well, and both
    follow it up with SIGKILL. A second Ctrl-C interrupts at once, unless the script is `patient`.
    """

    def __init__(self, *, patient: bool) -> None:
        self.patient, self.made = patient, False

    def __call__(self) -> bool:
        return self.made

    def receive(self, number: int, _: object = None) -> None:
        """Handles a signal."""
        if self.made and number == signal.SIGINT and not self.patient:
            raise KeyboardInterrupt
        if not self.made:
            again = "" if self.patient else "; Ctrl-C again to stop at once"
            print(f"\nstopping after this step{again}", file=sys.stderr)
        self.made = True

    @contextmanager
    def patience(self) -> Iterator[None]:
        """Within it nothing interrupts the script."""
        before, self.patient = self.patient, True
        try:
            yield
        finally:
            self.patient = before


@contextmanager
def stop_requests(*, patient: bool = False) -> Iterator[StopRequests]:
    """Within it Ctrl-C and SIGTERM are requests. patient: so is a second Ctrl-C. Only for the main thread."""
    requests = StopRequests(patient=patient)
    before = {number: signal.signal(number, requests.receive) for number in STOP_SIGNALS}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
