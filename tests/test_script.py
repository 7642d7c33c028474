"""How a script ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from musetalk.cache import CacheError
from musetalk.contract import ContractError
from musetalk.script import UserError, run_script
from musetalk.video import MediaError
from musetalk.weights import WeightsError

ROOT = Path(__file__).parents[1]


def failing(error: BaseException):
    def main(config):
        raise error

    return main


def test_a_script_that_works_gets_its_config_and_returns():
    seen = []
    assert run_script(seen.append, "config") is None
    assert seen == ["config"]


@pytest.mark.parametrize(
    "error",
    [
        UserError("a.mp4: is too short; take a longer one"),
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
    assert printed.out == "" and printed.err.strip() == str(error) and "Traceback" not in printed.err


def test_a_file_that_the_system_refuses_is_named(capsys, tmp_path):
    def main(config):
        open(tmp_path / "none.txt")

    with pytest.raises(SystemExit) as left:
        run_script(main, None)
    assert left.value.code == 2
    assert capsys.readouterr().err.strip() == f"{tmp_path / 'none.txt'}: No such file or directory"


def test_an_interruption_says_how_to_go_on_and_leaves_with_130(capsys):
    with pytest.raises(SystemExit) as left:
        run_script(failing(KeyboardInterrupt()), None)
    assert left.value.code == 130
    assert "run the same command again" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), AssertionError("x"), OSError("x"), SystemExit(7)])
def test_what_a_programmer_must_mend_passes_through(capsys, error):
    with pytest.raises(type(error)) as raised:
        run_script(failing(error), None)
    assert raised.value is error
    assert capsys.readouterr().err == ""


def test_without_the_library_that_opencv_needs_the_error_says_how_to_get_it():
    code = "import sys; sys.modules['cv2'] = None; import musetalk"  # as Python says when libGL is not there
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode != 0 and "apt-get install libgl1" in ran.stderr.splitlines()[-1]
