"""The tools that make the small set: who is held out, and the speech that the audio encoder is distilled from."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from tools.make_mini.audio_encoder import SEGMENT, EncoderConfig, draw_segment
from tools.make_mini.crops import spaced_frames
from tools.make_mini.held_out import HELD_OUT
from tools.make_mini.material import MaterialConfig, find_videos
from tools.make_mini.material import main as link_material


@pytest.fixture
def corpus(tmp_path) -> MaterialConfig:
    """Empty files in the layout of the corpus and of the clips, with people of each split."""
    config = MaterialConfig(tmp_path / "corpus", tmp_path / "clips", tmp_path / "work")
    test_clip, validation_clip = (HELD_OUT[split]["grid_s1"][0] for split in ("test", "validation"))
    rows = [("grid/s1/aaaa1a.mp4", "grid_s1"), (f"grid/s1/{test_clip}.mp4", "grid_s1")]
    rows += [(f"grid/s1/{validation_clip}.mpg", "grid_s1"), ("grid/others/unk.mpg", "grid_unk_a")]
    rows += [(f"vlogs/{split}.mp4", HELD_OUT[split]["identities"][1]) for split in HELD_OUT]
    for file, _ in rows:
        (config.corpus / file).parent.mkdir(parents=True, exist_ok=True)
        (config.corpus / file).touch()
    lines = ["file\tkind\tidentity", *(f"{file}\treal\t{identity}" for file, identity in rows)]
    (config.corpus / "SOURCES.tsv").write_text("\n".join(lines) + "\n")
    config.clips.mkdir()
    for name in ("talking_c", "talking_a", "cartoon_no_audio"):
        (config.clips / f"{name}.mp4").touch()
    (config.clips / "identities.json").write_text('{"talking_c": "WDA_AlexandriaOcasioCortez"}')
    return config


def test_nobody_is_held_out_twice():
    names = [name for split in HELD_OUT.values() for group in split.values() for name in group]
    assert max(Counter(names).values()) == 1


def test_people_and_clips_of_grid_s1_are_split(corpus):
    splits = {video.path.name: (video.identity, video.split) for video in find_videos(corpus)}
    assert splits == {
        "aaaa1a.mp4": ("grid_s1", "train"),
        f"{HELD_OUT['test']['grid_s1'][0]}.mp4": ("grid_s1_test", "test"),
        f"{HELD_OUT['validation']['grid_s1'][0]}.mpg": ("grid_s1_validation", "validation"),
        "validation.mp4": (HELD_OUT["validation"]["identities"][1], "validation"),
        "test.mp4": (HELD_OUT["test"]["identities"][1], "test"),
        "talking_a.mp4": ("talking_a", "train"),
        "talking_c.mp4": ("WDA_AlexandriaOcasioCortez", "test"),
    }


def test_test_people_are_linked_into_a_folder_of_their_own(corpus):
    link_material(corpus)
    link_material(corpus)  # again: replaces the links
    linked, held_out = (
        {path.name for path in (corpus.work_dir / folder).rglob("*.mp*")} for folder in ("videos", "test_videos")
    )
    assert held_out == {"test.mp4", "talking_c.mp4", f"{HELD_OUT['test']['grid_s1'][0]}.mp4"}
    assert len(linked) == 4 and not linked & held_out


def test_frames_are_spaced_over_all_videos_of_a_person(tmp_path, write_source):
    picture = np.zeros((32, 32, 3), np.uint8)
    paths = [write_source(tmp_path / f"{k}.mp4", [picture] * count) for k, count in enumerate((5, 10, 5))]
    assert [len(frames) for frames in spaced_frames(paths, 4)] == [1, 2, 1]
    assert sum(len(frames) for frames in spaced_frames(paths, 20)) == 20


def test_segments_of_speech_have_30_seconds_and_pauses():
    rng = np.random.default_rng(0)
    speech = [0.1 * np.ones(n, np.float32) for n in (16_000, 160_000)]
    config = EncoderConfig(noisy_share=0.0)
    segments = [draw_segment(speech, config, rng) for _ in range(4)]
    assert all(segment.shape == (SEGMENT,) and segment.dtype == np.float32 for segment in segments)
    assert any((segment == 0).mean() > 0.02 for segment in segments)  # digital silence
    assert all(np.abs(segment).max() <= 1 for segment in segments)
