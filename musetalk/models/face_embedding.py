"""SFace: a face -> a unit vector. The cosine of two vectors tells whether they show one person.

Source: Zhong et al., SFace: Sigmoid-Constrained Hypersphere Loss for Robust Face Recognition,
https://arxiv.org/abs/2205.12010. The weights are a MobileFaceNet of OpenCV Zoo, quantized to 8 bits in blocks
(Apache-2.0). OpenCV runs it on the CPU, about 25 ms a face on one core.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from musetalk.models.sources import SOURCES
from musetalk.models.weights import WeightsError, find

WEIGHTS = "sface/face_recognition_sface_2021dec_int8bq.onnx"
WIDTH = 128  # of a vector
EYES = slice(36, 42), slice(42, 48)  # of the 68 landmarks
NOSE_TIP, LEFT_MOUTH_CORNER, RIGHT_MOUTH_CORNER = 30, 48, 54  # left and right in the image


class FaceEmbedder:
    """Embeds faces so that the vectors of one person point the same way."""

    def __init__(self, network: cv2.FaceRecognizerSF) -> None:
        self.network = network

    def embed(self, images: Sequence[np.ndarray], landmarks: np.ndarray) -> np.ndarray:
        """Embeds the face in each image: float32 (N, 128), unit vectors.

        images: N of BGR uint8 (H, W, 3), of any size, with square pixels. landmarks: (N, 68, 2) in their pixels.
        Eyes, nose and corners of the mouth are moved to the places where they were in training, in 112 x 112 pixels.
        """
        vectors = np.zeros((len(images), WIDTH), np.float32)
        for index, (image, points) in enumerate(zip(images, landmarks, strict=True)):
            eyes = [points[eye].mean(axis=0) for eye in EYES]
            five_points = [*eyes, points[NOSE_TIP], points[LEFT_MOUTH_CORNER], points[RIGHT_MOUTH_CORNER]]
            # A row of OpenCV's face detector, of which only the points are used: box, five points, score.
            row = np.concatenate([np.zeros(4), *five_points, np.ones(1)], dtype=np.float32)
            vectors[index] = self.network.feature(self.network.alignCrop(image, row[None]))[0]
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def embed_crops(self, crops: np.ndarray, boxes: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
        """Embeds face crops: float32 (N, 128), unit vectors.

        crops: BGR uint8 (N, 256, 256, 3). boxes: int (N, 4), whose proportions the faces get back. landmarks:
        (N, 68, 2), in pixels of the frame, as the boxes.
        """
        sizes = boxes[:, 2:] - boxes[:, :2]
        images = [cv2.resize(crop, size.tolist()) for crop, size in zip(crops, sizes, strict=True)]
        return self.embed(images, landmarks - boxes[:, None, :2])


def load_face_embedder(models_dir: Path) -> FaceEmbedder:
    """Loads `WEIGHTS` of a models folder.

    Raises WeightsError if the file is missing or is not the published one, with which thresholds were measured.
    """
    path = find(models_dir, WEIGHTS)
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != SOURCES[WEIGHTS].sha256:
        raise WeightsError(f"{path} is not the published file (its sha256 differs); get it from {SOURCES[WEIGHTS]}")
    return FaceEmbedder(cv2.FaceRecognizerSF.create("onnx", np.frombuffer(content, np.uint8), np.zeros(0, np.uint8)))
