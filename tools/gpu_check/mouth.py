"""Estimates the mouth openings of one person from face crops, without a landmark detector."""

from __future__ import annotations

import cv2
import numpy as np

from musetalk.contract import MASK_TOP

SIZE = 32, 16  # width and height in pixels of the input
RIDGE = 0.1  # relative to the mean variance of the pixels


class MouthReader:
    """Ridge regression from the pixels of the lower half of a crop to the mouth opening."""

    def __init__(self, images: np.ndarray, openings: np.ndarray) -> None:
        """images: BGR uint8 (N, 256, 256, 3) of one person. openings: float (N,), measured by landmarks."""
        pixels = self._pixels(images)
        self.mean, self.offset = pixels.mean(axis=0), openings.mean()
        centred = pixels - self.mean
        covariance = centred.T @ centred
        ridge = RIDGE * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
        self.weight = np.linalg.solve(covariance + ridge, centred.T @ (openings - self.offset))

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Estimated mouth openings (T,) of images BGR uint8 (T, 256, 256, 3)."""
        return (self._pixels(images) - self.mean) @ self.weight + self.offset

    @staticmethod
    def _pixels(images: np.ndarray) -> np.ndarray:
        """Grey values float64 (N, 512) in [0, 1]."""
        halves = (cv2.cvtColor(image[MASK_TOP:], cv2.COLOR_BGR2GRAY) for image in images)
        return np.stack([cv2.resize(half, SIZE, interpolation=cv2.INTER_AREA).ravel() for half in halves]) / 255.0
