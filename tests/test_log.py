"""The log of a run: lines, records, images, and the records that a resumed run keeps."""

from __future__ import annotations

import json
import re

import cv2
import numpy as np
import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from musetalk.errors import UserError
from musetalk.training.log import RunLog


@pytest.fixture
def start(tmp_path):
    """A function that opens the log of a run at a step."""
    logs = []

    def open_log(step: int, tracker: str = "tensorboard") -> RunLog:
        logs.append(RunLog(tmp_path / "log", "demo", step, tracker))
        return logs[-1]

    yield open_log
    for log in logs:
        log.close()


def stats(log: RunLog) -> list[dict]:
    return [json.loads(line) for line in log.stats.read_text().splitlines()]


def test_a_record_is_written_as_text_as_json_and_to_tensorboard(start, capsys):
    log = start(0)
    log.record(3, {"latent_l1": 0.123456789, "grad_norm": 2.0})
    assert capsys.readouterr().out == "step 3  latent_l1 0.1235  grad_norm 2\n"
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d step 3  latent_l1 0.1235  grad_norm 2\n", log.lines.read_text()
    )
    assert stats(log) == [{"step": 3, "latent_l1": 0.123456789, "grad_norm": 2.0}]
    events = EventAccumulator(str(log.folder)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("grad_norm")] == [(3, 2.0)]


def test_figures_go_to_the_chosen_tracker(start, monkeypatch):
    class Tracker(GeneralTracker):
        name, requires_logging_directory, tracker = "wandb", False, None
        figures, finished = [], False

        def __init__(self, run: str, **_) -> None:
            super().__init__()
            self.run = run

        def start(self) -> None:
            pass

        def store_init_configuration(self, values: dict) -> None:
            pass

        def log(self, values: dict, step: int, **_) -> None:
            self.figures.append((self.run, step, values))

        def finish(self) -> None:
            Tracker.finished = True

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Tracker)
    monkeypatch.setattr("musetalk.training.log.find_spec", lambda name: name)
    log = start(0, "wandb")
    log.store(3, {"latent_l1": 0.5})
    log.close()
    assert Tracker.figures == [("demo", 3, {"latent_l1": 0.5})] and Tracker.finished


def test_without_a_tracker_figures_are_in_the_record_alone(start):
    log = start(0, "none")
    log.store(3, {"latent_l1": 0.5})
    assert [path.name for path in log.folder.iterdir()] == ["stats.jsonl"]


def test_a_tracker_that_is_not_installed_is_refused(start, monkeypatch):
    monkeypatch.setattr("musetalk.training.log.find_spec", lambda _: None)
    with pytest.raises(UserError, match="tracker = 'wandb' .* pip install wandb"):
        start(0, "wandb")


def test_lines_of_all_runs_are_kept(start, tmp_path):
    start(0).line("one")
    start(0).line("J\u00fcrgen \udcff")
    lines = (tmp_path / "log" / "trainer.log").read_text(encoding="utf-8").splitlines()
    assert [line[20:] for line in lines] == ["one", "J\u00fcrgen \\udcff"]


def test_records_after_the_resumed_step_are_dropped(start):
    log = start(0)
    for step in (1, 2, 3, 4):
        log.record(step, {"latent_l1": float(step)})
    resumed = start(2)
    assert stats(resumed) == [{"step": 1, "latent_l1": 1.0}, {"step": 2, "latent_l1": 2.0}]
    resumed.record(3, {"latent_l1": 7.0})
    assert [record["latent_l1"] for record in stats(resumed)] == [1.0, 2.0, 7.0]


@pytest.mark.parametrize(
    "line",
    [b'{"step": 2, "latent_', b"", b"\xff\xfe", b"[2]", b'{"latent_l1": 0.5}', b'{"step": "2"}', b"[" * 100_000],
    ids=lambda line: line[:20],
)
def test_an_invalid_line_is_dropped_and_the_others_are_kept(start, line):
    log = start(0)
    log.record(1, {"latent_l1": 0.5})
    log.record(2, {"latent_l1": 0.25})
    valid = log.stats.read_bytes().splitlines(keepends=True)
    log.stats.write_bytes(valid[0] + line + b"\n" + valid[1])
    assert start(2).stats.read_bytes() == b"".join(valid)
    log.stats.write_bytes(b"".join(valid) + line)  # truncated by a full disk or a power cut
    resumed = start(2)
    resumed.record(3, {"latent_l1": 0.125})
    assert [record["step"] for record in stats(resumed)] == [1, 2, 3]


def test_an_image_is_named_by_its_step(start):
    image = np.random.default_rng(0).integers(256, size=(8, 6, 3), dtype=np.uint8)
    log = start(0)
    path = log.picture(12, image)
    assert path == log.folder / "samples" / "0000012.png"
    np.testing.assert_array_equal(cv2.imread(str(path)), image)


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "demo").touch()
    with pytest.raises(FileExistsError) as error:
        RunLog(tmp_path / "log", "demo", 0)
    assert error.value.filename == str(tmp_path / "log" / "demo")
