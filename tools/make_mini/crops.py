"""Face crops of videos: those to train on, and those of the people held out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from musetalk.data.crop import crop_face, face_box, in_crop
from musetalk.data.face import load_face_backend
from musetalk.data.face.face import FaceBackend
from musetalk.data.face.tracking import follow_person
from musetalk.data.video import read_frames
from tools.make_mini.config import Config

HELD_OUT = ("talking_b", "portrait_hevc_1080x1920", "person_3", "person_5", "person_l8")


def training_crops(config: Config, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Crops of all people not held out: BGR uint8 (N, 256, 256, 3), landmarks (N, 68, 2)."""
    backend = load_face_backend("mediapipe", Path(), "cpu")
    paths = [path for path in sorted(config.clips.rglob("*.mp4")) if path.stem not in HELD_OUT]
    sources = [islice(read_frames(path), 0, None, config.frame_step) for path in paths]
    images, points = [], []
    for frames in tqdm(sources, "crops", unit="clip"):
        for frame, landmarks, box in face_boxes(frames, backend, config.max_margin, rng):
            for crop in (box, wider_box(box, frame.shape, config, rng)):
                images.append(crop_face(frame, crop))
                points.append(in_crop(landmarks, crop))
    return np.stack(images), np.stack(points)


def held_out_crops(config: Config) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Crops of the held-out people: for each clip images (N, 256, 256, 3), landmarks (N, 68, 2)."""
    backend, rng = load_face_backend("mediapipe", Path(), "cpu"), np.random.default_rng(config.seed)
    crops = {}
    for path in sorted(path for path in config.clips.rglob("*.mp4") if path.stem in HELD_OUT):
        frames = islice(read_frames(path), 0, None, config.held_out_frame_step)
        faces = list(face_boxes(frames, backend, config.max_margin, rng))
        images = np.stack([crop_face(frame, box) for frame, _, box in faces])
        crops[path.stem] = images, np.stack([in_crop(landmarks, box) for _, landmarks, box in faces])
    return crops


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
