"""Vectors of faces: those of one person are near each other, those of different people are not."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import pytest

from musetalk.data.face.face import FaceBackend, area
from musetalk.data.identities import SAME_FACE
from musetalk.data.video import read_frames
from musetalk.models.face_embedding import WEIGHTS, FaceEmbedder, load_face_embedder
from musetalk.models.weights import WeightsError
from tests.sample import sample_frames


def embed(embedder: FaceEmbedder, backend: FaceBackend, image: np.ndarray) -> np.ndarray:
    """Embeds the largest face of an image: float32 (128,)."""
    face = max(backend.detect([image])[0], key=lambda face: area(face.box))
    return embedder.embed([image], face.landmarks[None])[0]


def test_vectors_have_length_one_and_the_order_of_their_images(face_embedder, face_backend):
    images = [sample_frames(0, 40, 41)[0], sample_frames(9, 40, 41)[0]]
    landmarks = np.stack([faces[0].landmarks for faces in face_backend.detect(images)])
    vectors = face_embedder.embed(images, landmarks)
    assert vectors.shape == (2, 128) and vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1)
    assert np.array_equal(vectors[::-1], face_embedder.embed(images[::-1], landmarks[::-1]))
    assert face_embedder.embed([], np.zeros((0, 68, 2))).shape == (0, 128)


def test_a_vector_does_not_depend_on_place_size_and_angle_of_the_face(face_embedder, face_backend):
    image = sample_frames(0, 40, 41)[0]
    landmarks = face_backend.detect([image])[0][0].landmarks
    turn = cv2.getRotationMatrix2D((180, 144), 25, 1.6) + [[0, 0, 90], [0, 0, 160]]
    turned = cv2.warpAffine(image, turn, (700, 600))
    vectors = face_embedder.embed([image, turned], np.stack([landmarks, landmarks @ turn[:, :2].T + turn[:, 2]]))
    assert vectors[0] @ vectors[1] > 0.95


def test_faces_of_one_person_are_nearer_than_those_of_others(face_embedder, face_backend, clips):
    names = ("talking_c", "WDA_AlexandriaOcasioCortez_000", "talking_a", "talking_b", "portrait_hevc_1080x1920")
    frames = [next(islice(read_frames(clips / f"{name}.mp4"), 20, None)) for name in names]
    vectors = np.stack([embed(face_embedder, face_backend, frame) for frame in frames])
    assert vectors[0] @ vectors[1] > SAME_FACE + 0.2  # the same woman
    assert (np.triu(vectors[1:] @ vectors[1:].T, 1) < SAME_FACE - 0.1).all()


def test_a_file_that_is_not_the_published_one_is_refused(tmp_path: Path):
    with pytest.raises(WeightsError, match=r"python -m musetalk\.download sface/"):
        load_face_embedder(tmp_path)
    path = tmp_path / WEIGHTS
    path.parent.mkdir()
    path.write_bytes(b"something else")
    with pytest.raises(WeightsError, match="is not the published file"):
        load_face_embedder(tmp_path)
