"""Face crops of videos: those to train on, and those of the people held out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from musetalk.data.crop import crop_face, face_box, in_crop
from musetalk.data.face import load_face_backend
from musetalk.data.face.face import FaceBackend
from musetalk.data.face.tracking import follow_person
from musetalk.data.video import count_frames, read_frames
from tools.make_mini.config import Config
from tools.make_mini.material import find_videos


def training_crops(config: Config, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Crops of the people to train on: BGR uint8 (N, 256, 256, 3), landmarks (N, 68, 2).

    Of each identity `frames_per_identity` frames in two crops each: MuseTalk's, and a wider one.
    """
    images, points = [], []
    groups = faces_by_identity(config, "train", config.frames_per_identity, rng)
    for faces in tqdm(groups.values(), "crops", unit="identity"):
        for frame, landmarks, box in faces:
            for crop in (box, wider_box(box, frame.shape, config, rng)):
                images.append(crop_face(frame, crop))
                points.append(in_crop(landmarks, crop))
    return np.stack(images), np.stack(points)


def validation_crops(config: Config) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Crops of the validation people: for each identity images (N, 256, 256, 3), landmarks (N, 68, 2)."""
    rng, crops = np.random.default_rng(config.seed), {}
    for identity, faces in faces_by_identity(config, "validation", config.validation_frames, rng).items():
        found = list(faces)
        images = np.stack([crop_face(frame, box) for frame, _, box in found])
        crops[identity] = images, np.stack([in_crop(landmarks, box) for _, landmarks, box in found])
    return crops


def faces_by_identity(
    config: Config, split: str, count: int, rng: np.random.Generator
) -> dict[str, Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """The faces, see `face_boxes`, in about `count` evenly spaced frames of each identity of a split."""
    backend = load_face_backend("mediapipe", Path(), "cpu")
    groups: dict[str, list[Path]] = defaultdict(list)
    for video in find_videos(config.material):
        if video.split == split:
            groups[video.identity].append(video.path)
    return {
        identity: (
            face
            for frames in spaced_frames(paths, count)
            for face in face_boxes(frames, backend, config.max_margin, rng)
        )
        for identity, paths in groups.items()
    }


def spaced_frames(paths: Sequence[Path], count: int) -> Iterator[list[np.ndarray]]:
    """`count` evenly spaced frames of some videos, BGR uint8 (H, W, 3), in a list for each video."""
    lengths = [count_frames(path) for path in paths]
    positions = np.unique(np.linspace(0, sum(lengths) - 1, count).astype(int))
    for path, start, length in zip(paths, np.cumsum([0, *lengths]), lengths, strict=False):
        wanted = set(positions - start)
        if wanted.intersection(range(length)):
            yield [frame for index, frame in enumerate(read_frames(path)) if index in wanted]


def face_boxes(
    frames: Iterable[np.ndarray], backend: FaceBackend, max_margin: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Frames that show the person, with landmarks (68, 2) and MuseTalk's box (4,) at a random margin."""
    frames = list(frames)
    for frame, face in zip(frames, follow_person(backend.detect(frames)), strict=True):
        if face is None:
            continue
        box = face_box(face.landmarks, frame.shape, 0, int(rng.integers(max_margin + 1)))
        if box is not None:
            yield frame, face.landmarks, box


def wider_box(box: np.ndarray, frame_shape: tuple[int, ...], config: Config, rng: np.random.Generator) -> np.ndarray:
    """A random larger box around a box int32 (4,), off-centre but inside the frame."""
    height, width = frame_shape[:2]
    size = (box[2:] - box[:2]) * rng.uniform(1, config.max_zoom_out)
    centre = (box[:2] + box[2:]) / 2 + size * rng.uniform(-config.max_shift, config.max_shift, 2)
    corners = np.concatenate([centre - size / 2, centre + size / 2])
    return np.clip(corners.round(), 0, [width, height, width, height]).astype(np.int32)
