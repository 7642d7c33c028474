"""How a script begins, with its constants checked, and how it ends: by an error, a signal, or well."""

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
def own_hook_for_threads(monkeypatch):
    """A script sets one for its process, which here is that of the tests."""
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)


def failing(error: BaseException):
    def main(config):
        raise error

    return main


# What is said.


@given(text=st.text(st.characters(categories=["Cc", "Cs", "Zl", "Zp", "L", "So"]) | st.sampled_from("\\n\x1b")))
def test_what_is_said_is_one_line_that_can_be_encoded(text):
    said = printable(text)
    assert len(f"{said}.".splitlines()) == 1 and said.isprintable()
    assert said.encode() and said or not text
    assert printable(said) == said
    assert all(char in said for char in text if char.isprintable())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x1b[2J\x07", r"\x1b[2J\x07"),
        ("\udcff\x85", r"\udcff\x85"),
        ("\u2028\u2029", r"\u2028\u2029"),
        (r"J\u00fcrgen 你好 🙂 C:\new", r"J\u00fcrgen 你好 🙂 C:\new"),
        ("Jürgen", "Jürgen"),
    ],
)
def test_what_a_terminal_would_not_show_becomes_an_escape(text, said):
    assert printable(text) == said == str(UserError(text)) == str(MediaError("kind", text))


# Constants.


@dataclass
class Constants:
    """One of each kind."""

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


def test_each_kind_takes_what_is_within_its_bounds():
    check_constants(Constants())
    check_constants(Constants(10**12, 10**12, 2**32 - 1, 1e30, 1e30, 512, 0.999, 0.999, 1000, 1000))
    check_constants(Constants(positive=3, positive_or_zero=0, decay=0))  # whole numbers are numbers
    check_constants(Constants(shift=-1000, share=1e-9))


INTEGERS = {"count": 1, "count_or_zero": 0, "seed": 0, "workers": 0, "pixels": 0, "shift": -1000}
FLOATS = ("positive", "positive_or_zero", "share", "decay")
ABOVE = {"count": 10**12 + 1, "seed": 2**32, "workers": 513, "pixels": 1001, "shift": 1001, "share": 1.0, "decay": 1.0}
BELOW = {name: least - 1 for name, least in INTEGERS.items()} | dict.fromkeys(FLOATS, -0.001)


@pytest.mark.parametrize(
    ("name", "value", "must"),
    [(name, value, f"greater than or equal to {value + 1}") for name, value in BELOW.items() if name in INTEGERS]
    + [(name, BELOW[name], "greater than") for name in FLOATS]
    + [(name, 0.0, "greater than 0") for name in ("positive", "share")]
    + [(name, value, "less than") for name, value in ABOVE.items()]
    + [(name, value, "a valid integer") for name in INTEGERS for value in (True, 1.0, "1", None, NAN, (1,))]
    + [(name, value, "a valid number") for name in FLOATS for value in (True, "1", None, (0.5,), {})]
    + [(name, value, "a finite number") for name in ("positive", "positive_or_zero") for value in (NAN, INFINITY)]
    + [(name, NAN, "less than 1") for name in ("share", "decay")],
)
def test_a_number_that_is_unfit_is_refused_by_name_and_value(name, value, must):
    with pytest.raises(UserError) as caught:
        check_constants(replace(Constants(), **{name: value}))
    assert str(caught.value).startswith(f"{name} must be {must}") and str(caught.value).endswith(f", not {value!r}")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ((0.5,), "pair.1 must be given, not (0.5,)"),
        ((0.5, 0.5, 0.5), "pair must have at most 2 items, not 3, not (0.5, 0.5, 0.5)"),
        ((0.5, 1.0), "pair.1 must be less than 1, not 1.0"),
        ((False, 0.5), "pair.0 must be a valid number, not False"),
        ([0.5, 0.5], "pair must be a valid tuple, not [0.5, 0.5]"),
        (0.5, "pair must be a valid tuple, not 0.5"),
    ],
)
def test_a_tuple_that_is_unfit_is_refused_by_name_and_place(value, message):
    with pytest.raises(UserError) as caught:
        check_constants(Constants(pair=value))
    assert str(caught.value) == message


def test_the_first_constant_that_is_unfit_is_named():
    with pytest.raises(UserError, match="^seed must"):
        check_constants(Constants(seed=-1, workers=-1))


# How a script ends.


def test_a_script_that_works_gets_its_config_and_returns():
    seen = []
    assert run_script(seen.append, "config") is None
    assert seen == ["config"]


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
def test_what_a_user_can_mend_is_one_sentence_and_code_2(capsys, error):
    with pytest.raises(SystemExit) as left:
        run_script(failing(error), None)
    assert left.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err == f"\n{error}\n" and "Traceback" not in printed.err


def test_a_file_that_the_system_refuses_is_named(capsys, tmp_path):
    def main(config):
        open(tmp_path / "none\n.txt")

    with pytest.raises(SystemExit) as left:
        run_script(main, None)
    assert left.value.code == 2
    assert capsys.readouterr().err == f"\n{tmp_path}/none\\n.txt: No such file or directory\n"


FULL = "No space left on device: free some space and run the same command again"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a\n.json"), rf"a\n.json: {FULL}"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), FULL),
        (OSError(errno.EIO, os.strerror(errno.EIO), "disk"), "disk: Input/output error"),
        (OSError(errno.EIO, os.strerror(errno.EIO)), "Input/output error"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), "a: Permission denied: allow this user to read"),
        (FileExistsError(errno.EEXIST, "File exists", "a"), "a: File exists: a file is where a folder should be"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "a"), "a: Is a directory: a folder is where a file"),
    ],
)
def test_an_error_of_the_system_is_told_with_what_to_do(capsys, error, said):
    with pytest.raises(SystemExit) as left:
        run_script(failing(error), None)
    assert left.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[1].startswith(said)


@pytest.mark.parametrize("message", ["", "stopped at step 3, which is saved"])
def test_an_interruption_says_how_to_go_on_and_leaves_with_130(capsys, message):
    with pytest.raises(SystemExit) as left:
        run_script(failing(KeyboardInterrupt(*filter(None, [message]))), None)
    assert left.value.code == 130
    assert capsys.readouterr().err == f"\n{message or 'interrupted; run the same command again to go on'}\n"


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), AssertionError("x"), OSError("x"), SystemExit(7)])
def test_what_a_programmer_must_mend_passes_through(capsys, error):
    with pytest.raises(type(error)) as raised:
        run_script(failing(error), None)
    assert raised.value is error
    assert capsys.readouterr().err == ""


def test_no_name_of_a_file_ends_a_script_that_prints_it(capsys):
    run_script(print, "\udcff.mp4")
    assert capsys.readouterr().out == "\\udcff.mp4\n"


@pytest.mark.parametrize(("error", "told"), [(OSError(errno.ENOSPC, "full"), False), (ValueError("x"), True)])
def test_a_thread_is_silent_about_what_the_main_thread_says_as_well(capsys, error, told):
    run_script(lambda config: None, None)
    thread = threading.Thread(target=failing(error), args=[None])
    thread.start()
    thread.join()
    assert ("Traceback" in capsys.readouterr().err) == told


# Stopping.


@pytest.fixture
def handlers(monkeypatch):
    """What has come in of the signals to stop when nobody else takes them; Ctrl-C is Python's own."""
    seen = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    yield seen
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("patient", [False, True])
def test_signals_ask_to_stop_and_only_a_second_ctrl_c_interrupts_without_patience(capsys, handlers, first, patient):
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
def test_afterwards_signals_act_as_before(handlers, error):
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


def test_without_the_library_that_opencv_needs_the_error_says_how_to_get_it():
    code = "import sys; sys.modules['cv2'] = None; import musetalk"  # as Python says when libGL is not there
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode != 0 and "apt-get install libgl1" in ran.stderr.splitlines()[-1]
