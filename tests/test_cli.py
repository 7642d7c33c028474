"""Checks of constants, exit codes, error messages and stop signals of a script."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from musetalk.cli import (
    Count,
    CountOrZero,
    Decay,
    Pixels,
    Positive,
    PositiveOrZero,
    Seed,
    Share,
    Shift,
    Workers,
    check_constants,
    run_script,
    stop_requests,
)
from musetalk.contract import ContractError
from musetalk.data.cache import CacheError
from musetalk.data.video import MediaError
from musetalk.errors import UserError, printable
from musetalk.models.weights import WeightsError

ROOT = Path(__file__).parents[1]
NAN, INFINITY = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def thread_excepthook(monkeypatch):
    """Restores the hook that a script sets for its whole process, which is that of the tests here."""
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)


def failing(error: BaseException):
    def main(config):
        raise error

    return main


# Printable messages.


@given(text=st.text(st.characters(categories=["Cc", "Cs", "Zl", "Zp", "L", "So"]) | st.sampled_from("\\n\x1b")))
def test_a_message_is_one_line_that_can_be_encoded(text):
    line = printable(text)
    assert len(f"{line}.".splitlines()) == 1 and line.isprintable()
    assert line.encode() and line or not text
    assert printable(line) == line
    assert all(char in line for char in text if char.isprintable())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x1b[2J\x07", r"\x1b[2J\x07"),
        ("\udcff\x85", r"\udcff\x85"),
        ("\u2028\u2029", r"\u2028\u2029"),
        (r"J\u00fcrgen 你好 🙂 C:\new", r"J\u00fcrgen 你好 🙂 C:\new"),
        ("Jürgen", "Jürgen"),
    ],
)
def test_unprintable_characters_become_escapes(text, expected):
    assert printable(text) == expected == str(UserError(text)) == str(MediaError("kind", text))


# Constants.


@dataclass
class Constants:
    """One of each type."""

    count: Count = 1
    count_or_zero: CountOrZero = 0
    seed: Seed = 0
    positive: Positive = 0.5
    positive_or_zero: PositiveOrZero = 0.0
    workers: Workers = 0
    share: Share = 0.5
    decay: Decay = 0.0
    pixels: Pixels = 0
    shift: Shift = -1
    pair: tuple[Decay, Decay] = (0.0, 0.5)


def test_each_type_accepts_values_within_its_bounds():
    check_constants(Constants())
    check_constants(Constants(10**12, 10**12, 2**32 - 1, 1e30, 1e30, 512, 0.999, 0.999, 1000, 1000))
    check_constants(Constants(positive=3, positive_or_zero=0, decay=0))  # int is accepted for float
    check_constants(Constants(shift=-1000, share=1e-9))


INTEGERS = {"count": 1, "count_or_zero": 0, "seed": 0, "workers": 0, "pixels": 0, "shift": -1000}
FLOATS = ("positive", "positive_or_zero", "share", "decay")
ABOVE = {"count": 10**12 + 1, "seed": 2**32, "workers": 513, "pixels": 1001, "shift": 1001, "share": 1.0, "decay": 1.0}
BELOW = {name: least - 1 for name, least in INTEGERS.items()} | dict.fromkeys(FLOATS, -0.001)


@pytest.mark.parametrize(
    ("name", "value"),
    [*BELOW.items(), *ABOVE.items(), ("positive", 0.0), ("share", 0.0)]
    + [(name, value) for name in INTEGERS for value in (True, 1.0, "1", None)]
    + [(name, value) for name in FLOATS for value in (True, "1", None, NAN)]
    + [(name, INFINITY) for name in ("positive", "positive_or_zero")],
)
def test_an_invalid_number_is_refused_by_name_and_value(name, value):
    with pytest.raises(UserError) as caught:
        check_constants(replace(Constants(), **{name: value}))
    assert str(caught.value).startswith(f"{name} cannot be {value!r}: ")


@pytest.mark.parametrize(
    ("value", "start"),
    [
        ((0.5,), "pair.1 cannot be (0.5,): "),
        ((0.5, 0.5, 0.5), "pair cannot be (0.5, 0.5, 0.5): "),
        ((0.5, 1.0), "pair.1 cannot be 1.0: "),
        ((False, 0.5), "pair.0 cannot be False: "),
        (0.5, "pair cannot be 0.5: "),
    ],
)
def test_an_invalid_tuple_is_refused_by_name_and_index(value, start):
    with pytest.raises(UserError) as caught:
        check_constants(Constants(pair=value))
    assert str(caught.value).startswith(start)


def test_the_first_invalid_constant_is_named():
    with pytest.raises(UserError, match="^seed "):
        check_constants(Constants(seed=-1, workers=-1))


# Exit codes.


def test_a_script_gets_its_config_and_returns():
    calls = []
    assert run_script(calls.append, "config") is None
    assert calls == ["config"]


@pytest.mark.parametrize(
    "error",
    [
        UserError("a.mp4: is too short; take a longer one"),
        UserError("a\n\x1b\udcff.mp4: is too short"),
        CacheError("a.json cannot be read"),
        ContractError("crop must be one of two"),
        WeightsError("tiny.pt is missing"),
        MediaError("no audio", "a.mp4: has no audio track"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_user_errors_are_one_sentence_and_exit_code_2(capsys, error):
    with pytest.raises(SystemExit) as exited:
        run_script(failing(error), None)
    assert exited.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err == f"\n{error}\n" and "Traceback" not in printed.err


def test_system_errors_name_the_file(capsys, tmp_path):
    def main(config):
        open(tmp_path / "none\n.txt")

    with pytest.raises(SystemExit) as exited:
        run_script(main, None)
    assert exited.value.code == 2
    assert capsys.readouterr().err == f"\n{tmp_path}/none\\n.txt: No such file or directory\n"


FULL = "No space left on device: free some space and run the same command again"


@pytest.mark.parametrize(
    ("error", "start"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a\n.json"), rf"a\n.json: {FULL}"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), FULL),
        (OSError(errno.EIO, os.strerror(errno.EIO), "disk"), "disk: Input/output error"),
        (OSError(errno.EIO, os.strerror(errno.EIO)), "Input/output error"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), "a: Permission denied: grant this user"),
        (FileExistsError(errno.EEXIST, "File exists", "a"), "a: File exists: a file is in the place of a folder"),
        (
            IsADirectoryError(errno.EISDIR, "Is a directory", "a"),
            "a: Is a directory: a folder is in the place",
        ),
    ],
)
def test_system_errors_say_what_to_do(capsys, error, start):
    with pytest.raises(SystemExit) as exited:
        run_script(failing(error), None)
    assert exited.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[1].startswith(start)


@pytest.mark.parametrize("message", ["", "stopped at step 3, which is saved"])
def test_an_interruption_says_how_to_resume_and_exits_with_130(capsys, message):
    with pytest.raises(SystemExit) as exited:
        run_script(failing(KeyboardInterrupt(*filter(None, [message]))), None)
    assert exited.value.code == 130
    assert capsys.readouterr().err == f"\n{message or 'interrupted; run the same command again to resume'}\n"


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), AssertionError("x"), OSError("x"), SystemExit(7)])
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
def handlers(monkeypatch):
    """The SIGTERMs that reach the default handlers of this test; that of Ctrl-C is Python's."""
    received = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    yield received
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("patient", [False, True])
def test_signals_are_requests_and_a_second_ctrl_c_interrupts_if_not_patient(capsys, handlers, first, patient):
    with stop_requests(patient=patient) as stopping:
        assert stopping() is False
        os.kill(os.getpid(), first)
        assert stopping() is True
        again = "" if patient else "; Ctrl-C again to stop at once"
        assert capsys.readouterr().err == f"\nstopping after this step{again}\n"
        os.kill(os.getpid(), signal.SIGTERM)
        with stopping.patience():
            os.kill(os.getpid(), signal.SIGINT)
        with nullcontext() if patient else pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stopping() is True and handlers == [] and capsys.readouterr().err == ""


@pytest.mark.parametrize("error", [None, UserError("x"), KeyboardInterrupt()])
def test_the_handlers_are_restored(handlers, error):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        with stop_requests():
            assert signal.getsignal(signal.SIGTERM) is not before[1]
            if error:
                raise error
    except (UserError, KeyboardInterrupt) as caught:
        assert caught is error
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    os.kill(os.getpid(), signal.SIGTERM)
    assert handlers == [signal.SIGTERM]


def test_missing_system_libraries_of_opencv_are_reported():
    code = "import sys; sys.modules['cv2'] = None; import musetalk"  # raises ImportError, like a missing libGL
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode != 0 and "apt-get install libgl1" in ran.stderr.splitlines()[-1]
