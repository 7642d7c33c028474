"""Face landmarks in torch equal those of the mediapipe package. `make test-mmpose` installs it and runs this file."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import islice

import cv2
import numpy as np
import pytest

from musetalk.data.face import load_face_backend
from musetalk.data.face.face import Face
from musetalk.data.face.mediapipe import FACE_VIEW, MESH_TO_68, view
from musetalk.data.video import read_frames
from tests.conftest import SHARED
from tests.sample import sample_frames

pytestmark = pytest.mark.skipif(find_spec("mediapipe") is None, reason="needs mediapipe, see requirements-mmpose.txt")

CLIPS = ("talking_a", "talking_b", "WDA_AlexandriaOcasioCortez_000", "portrait_hevc_1080x1920", "cartoon_no_audio")
FRAMES = 12  # of each clip
MAX_DISTANCE, MEDIAN_DISTANCE = 0.05, 0.01  # pixels


class Oracle:
    """The published face detector and face mesh, connected as in our backend."""

    def __init__(self) -> None:
        from mediapipe.python.solutions import face_detection, face_mesh

        self.detector = face_detection.FaceDetection(model_selection=1)
        self.mesh = face_mesh.FaceMesh(static_image_mode=True, refine_landmarks=True)

    def detect(self, frame: np.ndarray) -> list[Face]:
        """Detects the faces of a BGR frame (H, W, 3)."""
        size, faces = np.array([frame.shape[1], frame.shape[0]]), []
        for detection in self.detector.process(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)).detections or ():
            relative = detection.location_data.relative_bounding_box
            corner = np.array([relative.xmin, relative.ymin]) * size
            extent = np.array([relative.width, relative.height]) * size
            image, offset = view(frame, corner + extent / 2, FACE_VIEW * extent.max())
            for mesh in self.mesh.process(cv2.cvtColor(image, cv2.COLOR_BGR2RGB)).multi_face_landmarks or ():
                points = np.array([(point.x, point.y) for point in mesh.landmark]) * len(image) + offset
                landmarks = points[np.array(MESH_TO_68)].mean(axis=1)
                faces.append(Face(np.concatenate([corner, corner + extent]), landmarks, detection.score[0]))
        return faces


def frames_of(name: str) -> list[np.ndarray]:
    if name == "sample":
        return sample_frames(0, 0, FRAMES)
    path = SHARED / "clips" / f"{name}.mp4"
    if not path.exists():
        pytest.skip(f"needs {path.name}")
    return list(islice(read_frames(path), FRAMES))


@pytest.mark.parametrize("name", ["sample", *CLIPS])
def test_landmarks_equal_those_of_mediapipe(name):
    frames, oracle = frames_of(name), Oracle()
    distances = []
    for frame, faces in zip(frames, load_face_backend("mediapipe", None, "cpu").detect(frames), strict=True):
        expected = oracle.detect(frame)
        assert len(faces) == len(expected) >= 1
        for ours, theirs in zip(faces, expected, strict=True):
            np.testing.assert_allclose(ours.box, theirs.box, atol=1e-3)
            assert ours.score == pytest.approx(theirs.score, abs=1e-5)
            distances.append(np.linalg.norm(ours.landmarks - theirs.landmarks, axis=1))
    assert np.max(distances) <= MAX_DISTANCE and np.median(distances) <= MEDIAN_DISTANCE
