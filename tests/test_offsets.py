"""Audio offsets of clips whose audio features contain the opening of the mouth, some frames late."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from musetalk.contract import RIGID, ContractError
from musetalk.data.cache import CacheError, verify
from musetalk.data.cache_writer import CacheWriter
from musetalk.data.offsets import MIN_CONFIDENCE, OffsetsConfig, main

LIPS = slice(65, 68)  # the lower points of the inner lips

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path, random_tensors) -> Write:
    """A function: cache, clip, offset of its audio -> the folder of the cache with this clip added."""

    def make(
        cache: str, clip: str, offset: int | None, *, frames: int = 75, still: bool = False, width: int = 60
    ) -> Path:
        """offset: None for audio of another mouth. still: whether the mouth does not move."""
        rng = np.random.default_rng([ord(letter) for letter in clip])
        gaps = np.zeros(frames) if still else np.convolve(rng.random(frames + 4), np.ones(5) / 5, "valid")
        tensors = random_tensors(frames, width=width)
        tensors["landmarks"][:] = 0
        tensors["landmarks"][:, 45, 0] = 100  # distance of the eye corners
        tensors["landmarks"][:, LIPS, 1] = 50 * gaps[:, None]
        audio_gaps = rng.random(frames) if offset is None else np.roll(gaps, offset)
        tensors["audio_features"] = 0.001 * rng.standard_normal((2 * frames, 2, width)).astype(np.float16)
        tensors["audio_features"][:, 1, 0] += np.repeat(audio_gaps, 2).astype(np.float16)
        metadata = {"source": f"{clip}.mp4", "source_bytes": 9, "identity": clip.split("-")[0], "last": True}
        CacheWriter(tmp_path / cache, RIGID).write(clip, tensors, metadata | {"scores": {"faces": 1}})
        return tmp_path / cache

    return make


@pytest.fixture
def in_sync(write) -> Path:
    """A cache of clips in sync."""
    return [write("in_sync", f"studio-{number}", 0) for number in range(8)][0]


def records(folder: Path) -> dict[str, tuple[int, dict]]:
    """Clip -> its audio offset and its scores."""
    values = {path.stem: json.loads(path.read_text()) for path in (folder / "clips").glob("*.json")}
    return {name: (record["audio_offset"], record["scores"]) for name, record in values.items()}


def test_planted_offsets_are_found(write, in_sync):
    for offset in range(-15, 16):
        folder = write("cache", f"person{offset}", offset)
    main(OffsetsConfig(folder, in_sync))
    assert {name: offset for name, (offset, _) in records(folder).items()} == {f"person{k}": k for k in range(-15, 16)}
    assert list(verify(folder)) == [None] * 31


def test_where_no_offset_is_clear_it_stays_0_and_a_second_run_writes_the_same(write, in_sync, capsys):
    write("cache", "late", 5)
    write("cache", "foreign", None)
    write("cache", "still", 5, still=True)
    folder = write("cache", "short", 5, frames=35)
    main(OffsetsConfig(folder, in_sync))
    first = records(folder)
    assert {name: offset for name, (offset, _) in first.items()} == {"late": 5, "foreign": 0, "still": 0, "short": 0}
    scored = {name for name, (_, scores) in first.items() if "sync_confidence" in scores}
    assert scored == {"late", "foreign"} and all(scores["faces"] == 1 for _, scores in first.values())
    assert first["late"][1]["sync_confidence"] > MIN_CONFIDENCE > first["foreign"][1]["sync_confidence"]
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[-1] for row in rows[-3:]] == ["1", "1", "2"] and rows[-3][0] == "+5"

    main(OffsetsConfig(folder, in_sync))
    assert records(folder) == first


def test_clips_of_an_identity_share_an_offset_unless_their_own_is_clearly_another(write, in_sync):
    """Ten short clips are enough together."""
    for number in range(10):
        write("cache", f"words-{number}", 3, frames=35)
    write("cache", "words-long", 3)
    folder = write("cache", "words-other", -4)
    main(OffsetsConfig(folder, in_sync))
    offsets = {name: offset for name, (offset, _) in records(folder).items()}
    assert offsets.pop("words-other") == -4 and set(offsets.values()) == {3}


def test_it_learns_from_the_cache_itself_without_another(write):
    for number in range(8):
        write("cache", f"a{number}", 0)
    folder = write("cache", "late", 6)
    main(OffsetsConfig(folder))
    assert [records(folder)[name][0] for name in ("a1", "late")] == [0, 6]


def test_bad_caches(write, in_sync):
    with pytest.raises(CacheError, match="no clip to learn from"):
        main(OffsetsConfig(in_sync, write("still", "still", 0, still=True)))
    for cache, encoder in ((in_sync, "0" * 16), (write("other", "other", 0), "1" * 16)):
        path = cache / "contract.json"
        contract = json.loads(path.read_text())
        contract["contract"]["audio_encoder"] = encoder
        path.write_text(json.dumps(contract))
    with pytest.raises(ContractError, match="audio_encoder"):
        main(OffsetsConfig(in_sync, cache))
    assert {offset for offset, _ in records(in_sync).values()} == {0}
