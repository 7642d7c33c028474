"""Where a generated face shows in the frame: the lower face, feathered, nothing at the edges of its box.

The face is found by its landmarks, which needs no weights, or in one of MuseTalk's two ways by a face parser.
"""

from __future__ import annotations

from typing import Literal

import cv2
import numpy as np

from musetalk.crop import JAW
from musetalk.models.face_parser import CLASSES

Blend = Literal["landmarks", "raw", "jaw"]

FEATHER = 0.05  # width of the soft edge, in box widths

SKIN, NOSE = CLASSES.index("skin"), CLASSES.index("nose")
MOUTH = [CLASSES.index(name) for name in ("mouth", "upper_lip", "lower_lip")]

# MuseTalk's numbers
SQUARE = 1.5  # side of what the face parser sees, in longer sides of the box
KERNEL = 0.05  # size of the Gaussian, in sides of the square
GROWTH_UP, GROWTH_ASIDE, GROWTH_DOWN = 16, 10, 6  # of the skin, in pixels of the class map
CHEEKS = 90  # where they begin, in pixels of the class map from its middle column
CHEEK_KERNEL = (35, 3)  # width and height in pixels of the class map; cheeks are eroded by it twice


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
    return feather(face, radius)


def parsed_alpha(classes: np.ndarray, box: np.ndarray, blend: Literal["raw", "jaw"]) -> np.ndarray:
    """As `face_alpha`, from what a face parser sees in the square around the box.

    classes: indices of CLASSES, uint8 (512, 512), of `crop_square`. box: (4,) in source pixels.
    blend "raw" shows skin and mouth where they are. "jaw" lets the skin grow, to a point below the chin, over all but
    the nose, and narrows the cheeks.
    Source: MuseTalk, FaceParsing and get_image. There the edges of the box cut the feather, here it ends before them.
    """
    x1, y1, x2, y2 = (int(value) for value in box)
    left, top, side = face_square(box)
    skin = classes == SKIN
    if blend == "jaw":
        skin = grow_jaw(skin) & (classes != NOSE)
    face = cv2.resize((skin | np.isin(classes, MOUTH)).astype(np.float32), (side, side))
    return feather(face[y1 - top : y2 - top, x1 - left : x2 - left], int(KERNEL * side / 2))


def face_square(box: np.ndarray) -> tuple[int, int, int]:
    """The square around the middle of a box that a face parser sees: its left, top and side in source pixels."""
    x1, y1, x2, y2 = (int(value) for value in box)
    half = int(max(x2 - x1, y2 - y1) // 2 * SQUARE)
    return (x1 + x2) // 2 - half, (y1 + y2) // 2 - half, 2 * half


def crop_square(frame: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The square around a box, BGR uint8 (side, side, 3), black where it is outside the frame (H, W, 3)."""
    left, top, side = face_square(box)
    height, width = frame.shape[:2]
    above, below = max(-top, 0), max(top + side - height, 0)
    before, behind = max(-left, 0), max(left + side - width, 0)
    inside = frame[top + above : top + side - below, left + before : left + side - behind]
    return cv2.copyMakeBorder(inside, above, below, before, behind, cv2.BORDER_CONSTANT)


def grow_jaw(skin: np.ndarray) -> np.ndarray:
    """Skin, bool (512, 512), as MuseTalk v1.5 shows it: each pixel grows to a peg with its point down."""
    rows, columns = np.indices((2 * GROWTH_UP + 1,) * 2) - GROWTH_UP
    peg = abs(columns) <= np.minimum(rows + GROWTH_DOWN, GROWTH_ASIDE)
    grown = cv2.dilate(skin.astype(np.uint8), peg.astype(np.uint8))  # OpenCV's kernel says where to look: upside down
    ellipse = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, CHEEK_KERNEL)
    jaw = cv2.erode(grown, ellipse, iterations=2)
    middle = slice(len(skin) // 2 - CHEEKS + 1, len(skin) // 2 + CHEEKS)
    jaw[:, middle] = grown[:, middle]
    return jaw.astype(bool)


def feather(face: np.ndarray, radius: int) -> np.ndarray:
    """The lower half of a mask, float32 (h, w) in [0, 1], blurred as far as the radius reaches inside its edges."""
    border = radius + 1
    face[: len(face) // 2] = face[-border:] = face[:, :border] = face[:, -border:] = 0
    size = 2 * radius + 1
    return np.minimum(cv2.GaussianBlur(face, (size, size), 0), 1)  # rounding may go beyond 1
