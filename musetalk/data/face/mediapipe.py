"""MediaPipe's face detector and face mesh (Apache-2.0), whose weights are part of its wheel.

The full-range detector finds faces of any size, and the mesh is applied to each face; both in static mode, so that
frames are independent. https://ai.google.dev/edge/mediapipe (models: BlazeFace, Attention Mesh)
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import cv2
import numpy as np

from musetalk.data.face.face import Face

# Points of the 468-point mesh for dlib's 68; a pair is averaged. Nose point 29 is the mean of 195 and 5:
# point 5 alone sits lower than dlib's and would move MuseTalk's crop.
JAW = (127, 234, 93, 132, 58, 136, 150, 176, 152, 400, 379, 365, 288, 361, 323, 454, 356)
BROWS = (70, 63, 105, 66, 107, 336, 296, 334, 293, 300)
NOSE = (168, 197, (195, 5), 4, 98, 97, 2, 326, 327)
EYES = (33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380)
OUTER_LIPS = (61, 40, 37, 0, 267, 270, 291, 321, 314, 17, 84, 91)
INNER_LIPS = (78, 81, 13, 311, 308, 402, 14, 178)
MESH_TO_68 = [p if isinstance(p, tuple) else (p, p) for p in (*JAW, *BROWS, *NOSE, *EYES, *OUTER_LIPS, *INNER_LIPS)]

MIN_SCORE = 0.5  # of both networks
MESH_VIEW = 2.0  # side of the mesh's input square, relative to the detected face


class MediapipeFaceMesh:
    """Stateless face backend on the CPU, about 10 ms per face."""

    def __init__(self) -> None:
        os.environ.setdefault("GLOG_minloglevel", "2")  # hides start-up messages
        from mediapipe.python.solutions import face_detection, face_mesh

        self.detector = face_detection.FaceDetection(model_selection=1, min_detection_confidence=MIN_SCORE)
        self.mesh = face_mesh.FaceMesh(
            static_image_mode=True, max_num_faces=1, refine_landmarks=True, min_detection_confidence=MIN_SCORE
        )

    def detect(self, frames: Sequence[np.ndarray]) -> list[list[Face]]:
        """Detects the faces of each frame. frames: BGR uint8 (H, W, 3), of any size."""
        return [self._detect_one(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)) for frame in frames]

    def _detect_one(self, image: np.ndarray) -> list[Face]:
        """Detects the faces of an RGB image (H, W, 3)."""
        size = np.array([image.shape[1], image.shape[0]])  # width, height
        faces = []
        for detection in self.detector.process(image).detections or ():
            relative = detection.location_data.relative_bounding_box
            corner = np.array([relative.xmin, relative.ymin]) * size
            extent = np.array([relative.width, relative.height]) * size
            landmarks = self._landmarks(image, corner + extent / 2, MESH_VIEW * extent.max())
            if landmarks is not None:
                box = np.concatenate([corner, corner + extent]).astype(np.float32)
                faces.append(Face(box, landmarks, float(detection.score[0])))
        return faces

    def _landmarks(self, image: np.ndarray, centre: np.ndarray, side: float) -> np.ndarray | None:
        """Returns the landmarks of the face in a square of an image, float32 (68, 2) in pixels, or None."""
        height, width = image.shape[:2]
        side = max(2, round(side))
        left, top = np.round(centre - side / 2).astype(int)
        x1, y1, x2, y2 = max(0, left), max(0, top), min(width, left + side), min(height, top + side)
        if x2 <= x1 or y2 <= y1:
            return None
        borders = y1 - top, top + side - y2, x1 - left, left + side - x2  # black outside the image
        view = cv2.copyMakeBorder(image[y1:y2, x1:x2], *borders, cv2.BORDER_CONSTANT)
        meshes = self.mesh.process(view).multi_face_landmarks
        if not meshes:
            return None
        points = np.array([(point.x, point.y) for point in meshes[0].landmark])
        points = points * side + (left, top)
        return points[np.array(MESH_TO_68)].mean(axis=1).astype(np.float32)
