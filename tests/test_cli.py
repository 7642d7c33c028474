"""Checks of constants, error messages, exit codes and stop signals of a script."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from musetalk.cli import (
    Count,
    Decay,
    Positive,
    Seed,
    Share,
    Shift,
    Workers,
    check_constants,
    run_script,
    stop_requests,
)
from musetalk.data.video import MediaError
from musetalk.errors import UserError, printable

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def thread_excepthook(monkeypatch):
    """Restores the hook for exceptions of threads, which a script sets for its whole process."""
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)


def failing(error: BaseException):
    def main(config):
        raise error

    return main


# Printable messages.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\nb\r\tc\u2028", r"a\nb\r\tc\u2028"),
        ("\x1b[2J\x07", r"\x1b[2J\x07"),
        ("\udcff\x85", r"\udcff\x85"),  # an undecodable file name
        (r"J\u00fcrgen 你好 🙂 C:\new", r"J\u00fcrgen 你好 🙂 C:\new"),
    ],
)
def test_unprintable_characters_become_escapes(text, expected):
    assert printable(text) == expected == str(UserError(text)) == str(MediaError("kind", text))


# Constants.


@dataclass
class Constants:
    count: Count = 1
    seed: Seed = 0
    positive: Positive = 0.5
    workers: Workers = 0
    share: Share = 0.5
    decay: Decay = 0.0
    shift: Shift = -1
    pair: tuple[Decay, Decay] = (0.0, 0.5)


def test_constants_within_their_bounds_are_accepted():
    check_constants(Constants())
    check_constants(Constants(10**12, 2**32 - 1, 1e30, 512, 0.999, 0.999, 1000))
    check_constants(Constants(positive=3, decay=0, shift=-1000))  # int is accepted for float


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("count", 0),
        ("count", True),
        ("count", 1.0),
        ("count", "1"),
        ("count", None),
        ("seed", 2**32),
        ("workers", 513),
        ("shift", -1001),
        ("positive", 0.0),
        ("positive", float("nan")),
        ("positive", float("inf")),
        ("share", 1.0),
        ("decay", -0.001),
        ("decay", "0.5"),
        ("pair", 0.5),
        ("pair", (0.5, 1.0)),
    ],
)
def test_an_invalid_constant_is_refused_by_name_and_value(name, value):
    start = "pair.1 cannot be 1.0" if value == (0.5, 1.0) else f"{name} cannot be {value!r}"
    with pytest.raises(UserError, match=f"^{re.escape(start)}: "):
        check_constants(replace(Constants(), **{name: value}))


# Exit codes.


def exit_of(main: Callable, capsys) -> tuple[int, str]:
    """Exit code and stderr of a script that fails; it prints nothing to stdout."""
    with pytest.raises(SystemExit) as exited:
        run_script(main, None)
    printed = capsys.readouterr()
    assert printed.out == ""
    return exited.value.code, printed.err


@pytest.mark.parametrize(
    "error", [UserError("a\n\x1b\udcff.mp4: is too short"), MediaError("no audio", "a.mp4: has no audio track")]
)
def test_user_errors_are_one_line_and_exit_code_2(capsys, error):
    assert exit_of(failing(error), capsys) == (2, f"\n{error}\n")


def test_system_errors_name_the_file(capsys, tmp_path):
    code, printed = exit_of(lambda _: open(tmp_path / "none\n.txt"), capsys)
    assert code == 2 and printed == f"\n{tmp_path}/none\\n.txt: No such file or directory\n"


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, ": free some space and run the same command again"),
        (errno.EACCES, ": grant this user read and write access"),
        (errno.EEXIST, ": a file is in the place of a folder"),
        (errno.EISDIR, ": a folder is in the place of a file"),
        (errno.EIO, "\n"),
    ],
)
@pytest.mark.parametrize("file", ["a", None])
def test_system_errors_say_what_to_do(capsys, number, advice, file):
    code, printed = exit_of(failing(OSError(number, os.strerror(number), file)), capsys)
    assert code == 2 and len(printed.splitlines()) == 2
    assert printed.startswith(f"\n{'a: ' if file else ''}{os.strerror(number)}{advice}")


@pytest.mark.parametrize("message", [(), ("stopped at step 3",)])
def test_an_interruption_says_how_to_resume_and_exits_with_130(capsys, message):
    (expected,) = message or ("interrupted; run the same command again to resume",)
    assert exit_of(failing(KeyboardInterrupt(*message)), capsys) == (130, f"\n{expected}\n")


@pytest.mark.parametrize("error", [ValueError("x"), OSError("x"), SystemExit(7)])
def test_other_errors_are_raised(capsys, error):
    with pytest.raises(type(error)) as raised:
        run_script(failing(error), None)
    assert raised.value is error
    assert capsys.readouterr().err == ""


def test_undecodable_file_names_can_be_printed(capsys):
    run_script(print, "\udcff.mp4")
    assert capsys.readouterr().out == "\\udcff.mp4\n"


@pytest.mark.parametrize(("error", "printed"), [(OSError(errno.ENOSPC, "full"), False), (ValueError("x"), True)])
def test_threads_print_no_traceback_of_system_errors(capsys, error, printed):
    run_script(lambda config: None, None)
    thread = threading.Thread(target=failing(error), args=[None])
    thread.start()
    thread.join()
    assert ("Traceback" in capsys.readouterr().err) == printed


# Stop signals.


@pytest.fixture
def handlers():
    """Installs a handler of SIGTERM; returns the signals that reach it. The handler of Ctrl-C is Python's."""
    received = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    yield received
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("patient", [False, True])
def test_signals_request_a_stop_and_a_second_ctrl_c_interrupts_unless_patient(capsys, handlers, first, patient):
    with stop_requests(patient=patient) as stopping:
        assert stopping() is False
        os.kill(os.getpid(), first)
        assert stopping() is True
        assert ("Ctrl-C again to stop at once" in capsys.readouterr().err) != patient
        os.kill(os.getpid(), signal.SIGTERM)
        with stopping.patience():
            os.kill(os.getpid(), signal.SIGINT)
        with nullcontext() if patient else pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stopping() is True and handlers == [] and capsys.readouterr().err == ""


@pytest.mark.parametrize("error", [None, KeyboardInterrupt()])
def test_the_handlers_are_restored(handlers, error):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) if error else nullcontext(), stop_requests():
        if error:
            raise error
    assert signal.getsignal(signal.SIGINT) is before
    os.kill(os.getpid(), signal.SIGTERM)
    assert handlers == [signal.SIGTERM]


def test_missing_system_libraries_of_opencv_are_reported():
    code = "import sys; sys.modules['cv2'] = None; import musetalk"  # the import fails, as without libGL
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode != 0 and "apt-get install libgl1" in ran.stderr.splitlines()[-1]
