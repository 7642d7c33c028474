"""Face landmarks in torch: equal to stored ones of the mediapipe package, whatever the batch."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from musetalk.data.face.attention_mesh import AttentionMesh
from musetalk.data.face.blazeface import FullRangeDetector, ShortRangeDetector
from musetalk.data.face.face import overlap
from musetalk.data.face.mediapipe import Square, merge
from tests.sample import sample_frames

# Landmarks of the mediapipe package 0.10.21 for `tilted_frames`, by test_mediapipe_oracle.py's oracle.
STORED = Path(__file__).with_name("mediapipe_landmarks.json")


@pytest.fixture(scope="module")
def frames() -> list[np.ndarray]:
    return tilted_frames()


def tilted_frames() -> list[np.ndarray]:
    """A face upright, tilted by 25 degrees to either side, and cut by the frame's edge."""
    (frame,) = sample_frames(0, 5, 6)
    height, width = frame.shape[:2]
    turns = [cv2.getRotationMatrix2D((width / 2, height / 2), angle, 1) for angle in (25, -25)]
    return [frame, *(cv2.warpAffine(frame, turn, (width, height)) for turn in turns), frame[:, width // 3 :].copy()]


def test_landmarks_equal_those_of_mediapipe(frames, face_backend):
    for faces, expected in zip(face_backend.detect(frames), json.loads(STORED.read_text()), strict=True):
        [face] = faces
        distance = np.linalg.norm(face.landmarks - expected, axis=1)
        assert distance.max() <= 0.05 and np.median(distance) <= 0.01


def test_a_face_does_not_depend_on_the_batch(frames, face_backend):
    together = face_backend.detect(frames * 3)
    for index, frame in enumerate(frames):
        [alone] = face_backend.detect([frame])
        for face, other in zip(alone, together[index], strict=True):
            assert np.array_equal(face.landmarks, other.landmarks) and np.array_equal(face.box, other.box)


def test_all_faces_of_a_frame_are_found(frames, face_backend):
    blank = np.zeros_like(frames[0])
    nobody, alone, both = face_backend.detect([blank, np.hstack([blank, frames[0]]), np.hstack([frames[0], frames[1]])])
    assert nobody == [] and len(alone) == 1 and len(both) == 2
    left, right = sorted(both, key=lambda face: face.box[0])
    assert left.box[2] < frames[0].shape[1] < right.box[0]
    assert overlap(alone[0].box - [360, 0, 360, 0], left.box) > 0.8


def test_networks_have_the_published_number_of_parameters():
    counts = {
        network: sum(parameter.numel() for parameter in network().parameters())
        for network in (FullRangeDetector, ShortRangeDetector, AttentionMesh)
    }
    assert counts == {FullRangeDetector: 508_308, ShortRangeDetector: 101_390, AttentionMesh: 996_361}


@pytest.mark.parametrize("network", [FullRangeDetector, ShortRangeDetector, AttentionMesh])
def test_outputs_are_relative_to_the_input(network):
    torch.manual_seed(0)
    images = torch.rand(2, 3, network.size, network.size)
    points, scores = network()(images)
    assert points.shape[-1] == 2 and scores.shape == points.shape[: scores.ndim]
    assert scores.min() >= 0 and scores.max() <= 1


def test_a_square_maps_its_corners_into_the_image():
    square = Square(np.array([50.0, 40.0]), 20.0, np.pi / 2)  # a quarter turn clockwise
    corners = square.to_image(np.array([[0.0, 0.0], [1.0, 0.0]]))
    np.testing.assert_allclose(corners, [[60, 30], [60, 50]], atol=1e-9)


def test_overlapping_detections_are_averaged_by_score():
    box = np.zeros((8, 2))
    box[1] = 10
    faces = merge(np.stack([box, box + 1, box + 100, box]), np.array([0.6, 0.9, 0.7, 0.3]), 0.5)
    assert [score for _, score in faces] == [0.9, 0.7]
    np.testing.assert_allclose(faces[0][0][0], 0.9 / 1.5)
