"""Where a generated face shows in its frame: in the lower half of its box, with a feathered border.

The face is outlined by its landmarks, which needs no weights, or as in MuseTalk by a face parser.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import cv2
import numpy as np
from PIL import Image

from musetalk.data.crop import JAW
from musetalk.models.face_parser import CLASSES

ParserBlend = Literal["raw", "jaw", "musetalk_v1"]
Blend = Literal["landmarks", ParserBlend]

FEATHER = 0.05  # radius of the Gaussian around the landmarks, in box widths

SKIN, NOSE = CLASSES.index("skin"), CLASSES.index("nose")
MOUTH = tuple(CLASSES.index(name) for name in ("mouth", "upper_lip", "lower_lip"))


class Recipe(NamedTuple):
    """How a mask is made from the classes of a face parser."""

    expand: float  # side of the square that the parser sees, in longer sides of the box
    blur: float  # kernel size of the Gaussian, in sides of the square
    classes: tuple[int, ...]  # that show
    with_jaw: bool = False  # the skin shows too, as `grow_jaw` shapes it


RECIPES: dict[ParserBlend, Recipe] = {
    "raw": Recipe(1.5, 0.05, (SKIN, *MOUTH)),
    "jaw": Recipe(1.5, 0.05, MOUTH, with_jaw=True),
    "musetalk_v1": Recipe(1.2, 0.1, tuple(range(SKIN, 1 + CLASSES.index("lower_lip")))),
}

# How MuseTalk v1.5 shapes the skin
GROWTH_UP, GROWTH_ASIDE, GROWTH_DOWN = 16, 10, 6  # of the skin, in pixels of the class map
CHEEKS = 90  # where they begin, in pixels of the class map from its middle column
CHEEK_KERNEL = (35, 3)  # width and height in pixels of the class map; cheeks are eroded by it twice


def face_alpha(landmarks: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The share of a generated crop in each pixel of its box, from the landmarks of the frame's face.

    landmarks: (68, 2) and box: (4,) in source pixels. Returns float32 (y2 - y1, x2 - x1) in [0, 1]: 1 below the middle
    of the box inside the jaw line, which covers the frame's own chin; 0 at the left, right and upper edges. The lower
    edge may cut the feather.
    """
    x1, y1, x2, y2 = (int(value) for value in box)
    height, width = y2 - y1, x2 - x1
    radius = max(1, round(FEATHER * width))
    jaw = np.round(landmarks[JAW] - (x1, y1)).astype(np.int32)
    bottom = max(height, jaw[:, 1].max() + radius // 2 + 2)  # the blur takes less than a tenth from the chin
    mask = np.zeros((bottom, width), np.uint8)
    cv2.fillConvexPoly(mask, cv2.convexHull(jaw), 255)
    mask = cv2.dilate(mask, np.ones((2 * radius + 1, radius)))  # the feather begins below the chin
    mask[:, : radius + 1] = mask[:, -radius - 1 :] = 0
    return feather(mask, height // 2, radius)[:height]


def parsed_alpha(classes: np.ndarray, box: np.ndarray, blend: ParserBlend) -> np.ndarray:
    """The share of a generated crop in each pixel of its box, from a face parser's view of the square around the box.

    classes: indices of CLASSES, uint8 (512, 512), of `crop_square`. box: (4,) in source pixels.
    blend: "raw" shows skin and mouth. "jaw" reshapes the skin, which grows below the chin and shrinks at the cheeks.
    "musetalk_v1" shows all of the face, with a wider feather.
    Returns float32 (y2 - y1, x2 - x1) in [0, 1], fading to 0 above the middle of the box. Its other edges may cut the
    feather.
    Source: MuseTalk's FaceParsing and get_image. "jaw" and "raw" are those of its offline script in 2025 for v1.5 and
    v1 weights (its real-time script blurs by 0.1); "musetalk_v1" is that of v1.0 as released in 2024.
    """
    x1, y1, x2, y2 = (int(value) for value in box)
    left, top, side = face_square(box, blend)
    recipe = RECIPES[blend]
    shown = np.isin(classes, recipe.classes)
    if recipe.with_jaw:
        shown |= grow_jaw(classes == SKIN) & (classes != NOSE)
    mask = Image.fromarray(shown.astype(np.uint8) * 255).resize((side, side), Image.Resampling.BICUBIC)
    mask = np.array(mask.crop((x1 - left, y1 - top, x2 - left, y2 - top)))
    return feather(mask, len(mask) // 2, int(recipe.blur * side / 2))


def face_square(box: np.ndarray, blend: ParserBlend) -> tuple[int, int, int]:
    """The square around the middle of a box that a face parser sees: its left, top and side in source pixels."""
    x1, y1, x2, y2 = (int(value) for value in box)
    half = int(max(x2 - x1, y2 - y1) // 2 * RECIPES[blend].expand)
    return (x1 + x2) // 2 - half, (y1 + y2) // 2 - half, 2 * half


def crop_square(frame: np.ndarray, box: np.ndarray, blend: ParserBlend) -> np.ndarray:
    """The square around a box, BGR uint8 (side, side, 3), black where it is outside the frame (H, W, 3)."""
    left, top, side = face_square(box, blend)
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


def feather(mask: np.ndarray, top: int, radius: int) -> np.ndarray:
    """Blurs what a mask, uint8 (h, w), shows from row `top` down; outside it is 0. Returns float32 in [0, 1]."""
    mask[:top] = 0
    size = 2 * radius + 1
    return cv2.GaussianBlur(mask, (size, size), 0, borderType=cv2.BORDER_CONSTANT) / np.float32(255)
