"""Which videos show one person, and the proposal of identities.json that follows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from datasets_process import PrepareConfig
from datasets_process import main as prepare
from musetalk.contract import RIGID
from musetalk.data import identities
from musetalk.data.cache import Cache, CacheError
from musetalk.data.cache_writer import CacheWriter
from musetalk.data.identities import PROPOSAL, cluster_faces, compare_faces, embed_videos, join_names
from musetalk.data.sources import find_sources, read_identities
from musetalk.errors import UserError
from musetalk.models.face_embedding import FaceEmbedder
from musetalk_trainer import PRESETS
from tests.sample import CLIPS, sample_frames

# Video -> identity in the cache, face.
VIDEOS = {
    "a/1.mp4": ("ann", "A"),
    "a/2.mp4": ("ann", "A"),
    "b.mp4": ("b", "A"),
    "WDA_Cleo_000.mp4": ("WDA_Cleo", "C"),
    "news/1.mp4": ("news", "D"),
    "news/2.mp4": ("news", "E"),
}


def planted(faces: Sequence[str]) -> np.ndarray:
    """Unit vectors of faces, cosine 0.9 for one letter and 0 for different ones: float32 (N, 40)."""
    vectors = np.zeros((len(faces), 40), np.float32)
    for index, face in enumerate(faces):
        vectors[index, ord(face) - ord("A")], vectors[index, 20 + index] = 0.9**0.5, 0.1**0.5
    return vectors


@pytest.fixture
def make_videos(tmp_path, random_tensors, monkeypatch) -> Callable[[Mapping[str, tuple[str, str]]], tuple[Path, Path]]:
    """A function: videos as in VIDEOS -> the folder of (empty) videos and that of their cache, with planted faces."""

    def make(videos: Mapping[str, tuple[str, str]]) -> tuple[Path, Path]:
        folder, writer = tmp_path / "videos", CacheWriter(tmp_path / "cache", RIGID)
        for path, (identity, _) in videos.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).touch()
            metadata = {"source": path, "source_bytes": 0, "identity": identity, "last": True}
            writer.write(path[:-4].replace("/", "__"), random_tensors(3), metadata)
        vectors = dict(zip(videos, planted([face for _, face in videos.values()]), strict=True))
        monkeypatch.setattr(identities, "embed_videos", lambda *_: vectors)
        monkeypatch.setattr(identities, "load_face_embedder", lambda _: None)
        return folder, writer.folder

    return make


def test_faces_are_clustered():
    faces = "AABCBAACDD"
    labels = cluster_faces(planted(list(faces)))
    assert len(set(zip(labels, faces, strict=True))) == len(set(labels)) == len(set(faces))
    assert cluster_faces(planted(["A"])).tolist() == [0]


def test_names_are_joined_directly_and_through_others():
    names, labels = ["a", "b", "b", "c", "d", "d", "e"], np.array([0, 0, 1, 1, 2, 3, 4])
    assert join_names(names, labels) == [["a", "b", "c"]]
    assert join_names(["x", "y"], np.array([0, 1])) == []


def test_a_proposal_joins_names_and_is_what_the_script_reads(make_videos, capsys):
    folder, cache = make_videos(VIDEOS)
    mine = '{"b": "b", "other/video": "else"}'
    (folder / "identities.json").write_text(mine)
    compare_faces(cache, folder, Path(), 0.1)
    assert (folder / "identities.json").read_text() == mine
    assert "one face: ann, b\n" in (printed := capsys.readouterr().out)
    assert "2 faces in one identity, which is kept: news\n" in printed and "WDA_Cleo" not in printed

    (folder / PROPOSAL).replace(folder / "identities.json")
    assert read_identities(folder)["other/video"] == "else"
    names = {source.path.as_posix(): source.identity for source in find_sources(folder)}
    assert names == {path: "ann" if path == "b.mp4" else name for path, (name, _) in VIDEOS.items()}


@pytest.mark.parametrize("faces, warned", [("AAB", True), ("ABB", False), ("ABC", False)])
def test_a_face_on_both_sides_of_the_split_is_warned_of(faces, warned, make_videos, capsys):
    names = ("p0", "p1", "p4")  # only the first has a hash below 0.3
    folder, cache = make_videos({f"{n}.mp4": (n, face) for n, face in zip(names, faces, strict=True)})
    compare_faces(cache, folder, Path(), 0.3)
    printed = capsys.readouterr().out
    assert ("warning" in printed) == warned
    assert not warned or "in training (p1) and held out (p0)" in printed
    assert (folder / PROPOSAL).exists() == (len(set(faces)) < 3)


def test_the_split_is_that_of_training():
    assert {preset.held_out for preset in PRESETS.values()} == {PrepareConfig().held_out}


def test_videos_are_embedded_with_landmarks_in_pixels_of_the_face(tmp_path, random_tensors):
    class Embedder(FaceEmbedder):
        def embed(self, images: Sequence[np.ndarray], landmarks: np.ndarray) -> np.ndarray:
            sizes = tensors["boxes"][:, 0, 2:] - tensors["boxes"][:, 0, :2]
            assert [image.shape for image in images] == [(h, w, 3) for w, h in sizes[[2, 4, 5]]]
            assert np.allclose(landmarks + tensors["boxes"][[2, 4, 5], :1, :2], tensors["landmarks"][[2, 4, 5]])
            return np.eye(4, dtype=np.float32)[[0, 1, 1]]

    writer = CacheWriter(tmp_path, RIGID)
    metadata = {"source": "a.mp4", "source_bytes": 0, "identity": "a", "last": True}
    writer.write("none", random_tensors(2, unusable=[0, 1]), metadata | {"source": "none.mp4"})
    with pytest.raises(CacheError, match="no clip has a usable frame"):
        embed_videos(Cache(tmp_path), Embedder(None))
    tensors = random_tensors(8, unusable=[0])
    for part in range(2):
        writer.write(f"a-{part:04d}", tensors, metadata)
    vectors = embed_videos(Cache(tmp_path), Embedder(None))
    assert vectors.keys() == {"a.mp4"}
    assert np.allclose(vectors["a.mp4"], np.array([1, 2, 0, 0]) / 5**0.5)


def test_a_folder_without_the_videos_is_refused(make_videos, tmp_path):
    _, cache = make_videos(VIDEOS)
    with pytest.raises(UserError, match="has none of the videos in .*; set hdtf_dir"):
        compare_faces(cache, tmp_path, Path(), 0.1)


def test_the_sample_shows_one_man(face_embedder, face_backend):
    frames = [sample_frames(index, 40, 41)[0] for index in range(len(CLIPS))]
    landmarks = np.stack([faces[0].landmarks for faces in face_backend.detect(frames)])
    labels = cluster_faces(face_embedder.embed(frames, landmarks))
    assert len(labels) == 28 and len(set(labels.tolist())) == 1


def test_the_script_joins_two_names_of_one_man(small_clips, sample_cache, face_embedder, mini, tmp_path, capsys):
    videos = shutil.copytree(small_clips, tmp_path / "videos")
    cache = shutil.copytree(sample_cache.folder, tmp_path / "cache")
    config = PrepareConfig(hdtf_dir=videos, hdtf_samples_dir=cache, models_dir=mini, identities=True)
    prepare(config)
    assert capsys.readouterr().out == "videos: 3, identities: 1, after joining those with one face: 1\n"
    assert not (videos / PROPOSAL).exists()
    record = cache / "clips" / "sample_01.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"identity": "someone"}))
    prepare(config)
    assert json.loads((videos / PROPOSAL).read_text()) == dict.fromkeys(sample_cache.clips, "grid_s1")
