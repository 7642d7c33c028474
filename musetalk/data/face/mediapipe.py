"""MediaPipe's face landmarks in torch: a detector of faces of any size, and a mesh for each face.

Three networks of MediaPipe 0.10.21 (Apache-2.0, weights converted by tools/convert_mediapipe.py), connected as in its
face detection and face mesh solutions for still images: https://ai.google.dev/edge/mediapipe (models: BlazeFace,
Attention Mesh). A frame's result does not depend on other frames.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import nn

from musetalk.data.face.attention_mesh import AttentionMesh
from musetalk.data.face.blazeface import FullRangeDetector, ShortRangeDetector
from musetalk.data.face.face import Face, overlap
from musetalk.images import batched
from musetalk.models.weights import freeze, load_strictly, read_tensors

WEIGHTS = Path(__file__).with_name("mediapipe.safetensors")

# Points of the 468-point mesh for dlib's 68; a pair is averaged. Nose point 29 is the mean of 195 and 5:
# point 5 alone sits lower than dlib's and would move MuseTalk's crop.
JAW = (127, 234, 93, 132, 58, 136, 150, 176, 152, 400, 379, 365, 288, 361, 323, 454, 356)
BROWS = (70, 63, 105, 66, 107, 336, 296, 334, 293, 300)
NOSE = (168, 197, (195, 5), 4, 98, 97, 2, 326, 327)
EYES = (33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380)
OUTER_LIPS = (61, 40, 37, 0, 267, 270, 291, 321, 314, 17, 84, 91)
INNER_LIPS = (78, 81, 13, 311, 308, 402, 14, 178)
MESH_TO_68 = [p if isinstance(p, tuple) else (p, p) for p in (*JAW, *BROWS, *NOSE, *EYES, *OUTER_LIPS, *INNER_LIPS)]

BATCH = 8  # images of a network at once
MIN_PRESENCE = 0.5  # minimum score of a face, from the mesh
SAME_FACE_IOU = 0.3  # minimum overlap of detections of one face, which are averaged
FACE_VIEW = 2.0  # side of the square in which a face is detected again, relative to its first box
MESH_VIEW = 1.5  # side of the mesh's square, relative to the second box

Network = FullRangeDetector | ShortRangeDetector | AttentionMesh


class Square(NamedTuple):
    """A square of an image: centre in pixels, side in pixels, and clockwise rotation in radians."""

    centre: np.ndarray
    side: float
    angle: float = 0.0

    def to_image(self, points: np.ndarray) -> np.ndarray:
        """Converts points (..., 2) relative to the square, in [0, 1], to pixels of the image."""
        cosine, sine = math.cos(self.angle), math.sin(self.angle)
        x, y = np.moveaxis(self.side * (points - 0.5), -1, 0)
        return self.centre + np.stack([cosine * x - sine * y, sine * x + cosine * y], axis=-1)

    def cut(self, image: np.ndarray, size: int, border: int) -> np.ndarray:
        """Resamples the square from an image (H, W, 3) to (size, size, 3) as MediaPipe does: bilinear, not filtered.

        border: OpenCV's mode outside the image.
        """
        corners = cv2.boxPoints((self.centre.tolist(), (self.side, self.side), math.degrees(self.angle)))
        target = np.array([(0, size), (0, 0), (size, 0), (size, size)], np.float32)
        matrix = cv2.getPerspectiveTransform(corners, target)
        return cv2.warpPerspective(image, matrix, (size, size), flags=cv2.INTER_LINEAR, borderMode=border)


class MediapipeFaceMesh:
    """Stateless face backend."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.full_range, self.short_range, self.mesh = FullRangeDetector(), ShortRangeDetector(), AttentionMesh()
        networks = nn.ModuleDict({"full_range": self.full_range, "short_range": self.short_range, "mesh": self.mesh})
        load_strictly(networks, read_tensors(WEIGHTS), WEIGHTS)
        freeze(networks.to(device, torch.float32).to(memory_format=torch.channels_last))  # type: ignore[call-overload]

    def detect(self, frames: Sequence[np.ndarray]) -> list[list[Face]]:
        """Detects the faces of each frame. frames: BGR uint8 (H, W, 3), of any size.

        A face found by the full-range detector counts if the short-range detector and the mesh find it, too.
        """
        candidates = [
            (index, points[:2], score)
            for index, faces in enumerate(self._detections(self.full_range, frames))
            for points, score in faces
        ]
        views = [
            view(frames[index], box.mean(axis=0), FACE_VIEW * np.ptp(box, axis=0).max()) for index, box, _ in candidates
        ]
        second = self._detections(self.short_range, [image for image, _ in views])
        kept = [
            (*candidate, *view, mesh_square(faces[0][0]))
            for candidate, view, faces in zip(candidates, views, second, strict=True)
            if faces
        ]
        meshes = self._meshes([image for *_, image, _, _ in kept], [square for *_, square in kept])
        result: list[list[Face]] = [[] for _ in frames]
        for (index, box, score, _, corner, _), mesh in zip(kept, meshes, strict=True):
            if mesh is not None:
                landmarks = (mesh + corner)[np.array(MESH_TO_68)].mean(axis=1)
                result[index].append(Face(box.ravel().astype(np.float32), landmarks.astype(np.float32), score))
        return result

    def _detections(
        self, detector: FullRangeDetector | ShortRangeDetector, images: Sequence[np.ndarray]
    ) -> list[list[tuple[np.ndarray, float]]]:
        """Detects the faces of BGR images (H, W, 3): points (8, 2) in pixels and score of each, best first."""
        squares = [Square(np.array([image.shape[1], image.shape[0]]) / 2, max(image.shape[:2])) for image in images]
        outputs = self._outputs(detector, images, squares, cv2.BORDER_CONSTANT)
        return [
            [(square.to_image(points), score) for points, score in merge(faces, scores, detector.min_score)]
            for square, (faces, scores) in zip(squares, outputs, strict=True)
        ]

    def _meshes(self, images: Sequence[np.ndarray], squares: Sequence[Square]) -> list[np.ndarray | None]:
        """Finds the mesh of the face in a square of each BGR image: (468, 2) in pixels, None without a face."""
        outputs = self._outputs(self.mesh, images, squares, cv2.BORDER_REPLICATE)
        return [
            square.to_image(mesh) if score > MIN_PRESENCE else None
            for square, (mesh, score) in zip(squares, outputs, strict=True)
        ]

    @torch.no_grad()
    def _outputs(
        self, network: Network, images: Sequence[np.ndarray], squares: Sequence[Square], border: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Applies a network to a square of each BGR image and yields its two outputs for each."""
        for batch in batched(list(zip(images, squares, strict=True)), BATCH):
            crops = [
                cv2.cvtColor(square.cut(image, network.size, border), cv2.COLOR_BGR2RGB) for image, square in batch
            ]
            if len(crops) == 1:
                crops *= 2  # torch computes a single image in another way, which changes the last bits
            pixels = torch.from_numpy(np.stack(crops)).to(self.device).permute(0, 3, 1, 2)
            points, scores = network((pixels / 255).contiguous(memory_format=torch.channels_last))
            yield from zip(points.cpu().numpy()[: len(batch)], scores.cpu().numpy(), strict=False)


def merge(points: np.ndarray, scores: np.ndarray, min_score: float) -> list[tuple[np.ndarray, float]]:
    """Averages overlapping detections of at least min_score, weighted by their scores. points: (N, 8, 2), scores: (N,).

    Returns points and highest score of each face, best first. Source: BlazeFace, section 5.
    """
    faces = []
    remaining = np.argsort(-scores, kind="stable")[: np.count_nonzero(scores >= min_score)]
    while len(remaining):
        best, boxes = remaining[0], points[:, :2].reshape(-1, 4)
        same = np.array([overlap(boxes[best], boxes[other]) > SAME_FACE_IOU for other in remaining])
        same[0] = True
        group = remaining[same]
        faces.append((np.average(points[group], axis=0, weights=scores[group]), float(scores[best])))
        remaining = remaining[~same]
    return faces


def view(image: np.ndarray, centre: np.ndarray, side: float) -> tuple[np.ndarray, np.ndarray]:
    """Cuts an upright square with integer corners from an image, black outside it. Returns it and its corner (2,)."""
    side = max(2, round(side))
    left, top = np.round(centre - side / 2).astype(int)
    height, width = image.shape[:2]
    x1, y1, x2, y2 = max(0, left), max(0, top), min(width, left + side), min(height, top + side)
    borders = y1 - top, top + side - y2, x1 - left, left + side - x2
    inner = image[y1:y2, x1:x2]
    square = cv2.copyMakeBorder(inner, *borders, cv2.BORDER_CONSTANT) if any(borders) else inner
    return square, np.array([left, top])


def mesh_square(points: np.ndarray) -> Square:
    """The square of the mesh: about the box of a face (8, 2), upright with respect to the eyes."""
    (x1, y1), (x2, y2) = points[2:4]
    low, high = points[:2]
    return Square((low + high) / 2, MESH_VIEW * (high - low).max(), math.atan2(y2 - y1, x2 - x1))
