"""Where a generated face shows in the frame: the lower face, feathered, nothing at the edges of its box."""

from __future__ import annotations

import cv2
import numpy as np

JAW = slice(0, 17)  # of the 68 landmarks
FEATHER = 0.05  # width of the soft edge, in box widths


def face_alpha(landmarks: np.ndarray, box: np.ndarray) -> np.ndarray:
    """How much of a generated crop shows at each pixel of its box.

    landmarks: (68, 2) and box: (4,) in source pixels. Returns float32 (y2 - y1, x2 - x1) in [0, 1]: 1 below the
    middle of the box inside the jaw line, fading out over the feather, exactly 0 at the edges of the box.
    """
    x1, y1, x2, y2 = (int(value) for value in box)
    height, width = y2 - y1, x2 - x1
    radius = max(1, round(FEATHER * width))
    face = np.zeros((height, width), np.float32)
    hull = cv2.convexHull(np.round(landmarks[JAW] - (x1, y1)).astype(np.int32))
    cv2.fillConvexPoly(face, hull, 1.0)
    face = cv2.dilate(face, np.ones((radius, radius)))  # the generated jaw may be a little lower
    face[: height // 2] = 0
    border = radius + 1  # the blur reaches as far as the radius
    face[-border:] = face[:, :border] = face[:, -border:] = 0
    return cv2.GaussianBlur(face, (2 * radius + 1, 2 * radius + 1), 0)
