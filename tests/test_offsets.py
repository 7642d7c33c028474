"""Audio offsets of clips, measured by a fake expert whose cosine is highest at the true offset."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from musetalk.contract import RIGID
from musetalk.data.audio import mel_start
from musetalk.data.cache import Cache, CacheWriter, JpegBuffer, verify
from musetalk.training.offsets import offset_table, write_offsets
from musetalk.training.sync_check import check_expert
from tests.test_sync_check import FakeExpert, make_image

# Clip -> frames, planted offset, the clip that its audio claims to be of.
CLIPS = {"studio/late": (60, 5, 0), "studio/early": (60, -5, 0), "home/foreign": (60, 0, 1), "home/short": (35, 5, 0)}


@pytest.fixture
def folder(tmp_path, random_tensors) -> Path:
    writer = CacheWriter(tmp_path, RIGID)
    for name, (frames, offset, spoken) in CLIPS.items():
        jpegs, ends = JpegBuffer([make_image(0, frame) for frame in range(frames)]).tensors()
        tensors = random_tensors(frames, mels=mel_start(frames) + 1)
        mel = tensors["mel"]
        mel[:, 0], mel[:, -1] = (np.arange(len(mel)) - mel_start(offset)) / 64, spoken
        tensors |= {"face_jpeg": jpegs, "face_jpeg_offsets": ends}
        metadata = {"source": f"{name}.mp4", "source_bytes": 9, "identity": name, "last": True}
        writer.write(name.replace("/", "__"), tensors, metadata | {"scores": {"faces": 1}})
    return tmp_path


def records(folder: Path) -> dict[str, tuple[int, dict]]:
    """Clip -> its audio offset and its scores."""
    values = {path.stem: json.loads(path.read_text()) for path in (folder / "clips").glob("*.json")}
    return {name: (record["audio_offset"], record["scores"]) for name, record in values.items()}


def test_offsets_are_written_where_they_are_certain_and_a_second_run_writes_the_same(folder):
    results = write_offsets(FakeExpert(), Cache(folder))
    first = records(folder)
    assert {name: offset for name, (offset, _) in first.items()} == {
        "studio__late": 5,
        "studio__early": -5,
        "home__foreign": 0,
        "home__short": 0,
    }
    assert {name: set(scores) for name, (_, scores) in first.items()} == {
        "studio__late": {"faces", "sync_confidence"},
        "studio__early": {"faces", "sync_confidence"},
        "home__foreign": {"faces", "sync_confidence"},
        "home__short": {"faces"},
    }
    assert first["studio__late"][1]["sync_confidence"] > 0.2 > abs(first["home__foreign"][1]["sync_confidence"])
    assert list(verify(folder)) == [None] * 4
    write_offsets(FakeExpert(), Cache(folder))
    assert records(folder) == first

    # A row for each folder: clips, written, quantiles of offsets, unsure, too short.
    rows = {line.split()[0]: line.split()[1:] for line in offset_table(results).splitlines()[2:]}
    assert rows["studio"] == ["2", "2", "-4.0", "+0.0", "+4.0", "0", "0"]
    assert rows["home"] == ["2", "0", "-", "-", "-", "1", "1"]
    assert rows["all"] == ["4", "2", "-4.0", "+0.0", "+4.0", "1", "1"]


def test_an_expert_finds_corrected_clips_in_sync(folder):
    expert, names = FakeExpert(), ["studio__late", "studio__early"]
    assert [check_expert(expert, Cache(folder), [name], seed=0).offset for name in names] == [5, -5]
    write_offsets(expert, Cache(folder))
    assert [check_expert(expert, Cache(folder), [name], seed=0).offset for name in names] == [0, 0]
