"""Alpha masks that blend a generated face crop into its frame.

A mask covers the face in the lower half of the box, with a feathered border. The face is outlined by its landmarks,
which needs no weights, or by a face parser as in MuseTalk.
"""

from __future__ import annotations

import zlib
from typing import Literal, NamedTuple

import cv2
import numpy as np
from PIL import Image

from musetalk.data.crop import JAW
from musetalk.models.face_parser import CLASSES

ParserBlend = Literal["raw", "jaw", "musetalk_v1"]
Blend = Literal["landmarks", ParserBlend]

FEATHER = 0.05  # radius of the Gaussian for masks from landmarks, in box widths

SKIN, NOSE = CLASSES.index("skin"), CLASSES.index("nose")
MOUTH = tuple(CLASSES.index(name) for name in ("mouth", "upper_lip", "lower_lip"))


class Recipe(NamedTuple):
    """Parameters of a mask from a face parser's classes."""

    expand: float  # side of the parser's square input, relative to the longer side of the box
    blur: float  # kernel size of the Gaussian, relative to the side of the square
    classes: tuple[int, ...]  # in the mask
    with_jaw: bool = False  # add the skin as reshaped by `grow_jaw`


RECIPES: dict[ParserBlend, Recipe] = {
    "raw": Recipe(1.5, 0.05, (SKIN, *MOUTH)),
    "jaw": Recipe(1.5, 0.05, MOUTH, with_jaw=True),
    "musetalk_v1": Recipe(1.2, 0.1, tuple(range(SKIN, 1 + CLASSES.index("lower_lip")))),
}

# Morphology of the skin in MuseTalk v1.5, in pixels of the class map
GROWTH_UP, GROWTH_ASIDE, GROWTH_DOWN = 16, 10, 6  # dilation of the skin
CHEEKS = 90  # distance of the cheeks from the middle column
CHEEK_KERNEL = (35, 3)  # width and height; the cheeks are eroded twice


def face_alpha(landmarks: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Opacity of a generated crop in each pixel of its box, from the landmarks of the face in the frame.

    landmarks: (68, 2) and box: (4,) in source pixels. Returns float32 (y2 - y1, x2 - x1) in [0, 1]: 1 inside the jaw
    line below the middle of the box, which covers the original chin; 0 at the left, right and upper edges. The lower
    edge of the box may cut off the feather.
    """
    x1, y1, x2, y2 = (int(value) for value in box)
    height, width = y2 - y1, x2 - x1
    radius = max(1, round(FEATHER * width))
    jaw = np.round(landmarks[JAW] - (x1, y1)).astype(np.int32)
    # Low enough for blurring to reduce the share at the chin by less than a tenth.
    bottom = max(height, int(jaw[:, 1].max()) + radius // 2 + 2)
    top = height // 2 - radius  # above it the mask is empty
    mask = np.zeros((bottom - top, width), np.uint8)
    cv2.fillConvexPoly(mask, cv2.convexHull(jaw - (0, top)), 255)
    mask = cv2.dilate(mask, np.ones((2 * radius + 1, radius)))  # so that the feather begins below the chin
    mask[:, : radius + 1] = mask[:, -radius - 1 :] = 0
    alpha = np.zeros((height, width), np.float32)
    alpha[top:] = feather(mask, radius, radius)[: height - top]
    return alpha


def parsed_alpha(classes: np.ndarray, box: np.ndarray, blend: ParserBlend) -> np.ndarray:
    """Opacity of a generated crop in each pixel of its box, from a face parser's classes.

    classes: uint8 (512, 512), indices of CLASSES, for the image that `crop_square` returns. box: (4,) in source pixels.
    blend: "raw" masks skin and mouth; "jaw" also extends the skin below the chin and shrinks it at the cheeks;
    "musetalk_v1" masks the whole face, with a wider feather.
    Returns float32 (y2 - y1, x2 - x1) in [0, 1], fading to 0 above the middle of the box. The other edges of the box
    may cut off the feather.
    Source: FaceParsing and get_image of https://github.com/TMElyralab/MuseTalk. "jaw" and "raw" are those of its
    offline script in 2025 for v1.5 and v1 weights (its real-time script blurs by 0.1); "musetalk_v1" is that of v1.0
    as released in 2024.
    """
    x1, y1, x2, y2 = (int(value) for value in box)
    left, top, side = face_square(box, blend)
    recipe = RECIPES[blend]
    visible = np.isin(classes, recipe.classes)
    if recipe.with_jaw:
        visible |= grow_jaw(classes == SKIN) & (classes != NOSE)
    square = Image.fromarray(visible.astype(np.uint8) * 255).resize((side, side), Image.Resampling.BICUBIC)
    mask = np.array(square.crop((x1 - left, y1 - top, x2 - left, y2 - top)))
    return feather(mask, len(mask) // 2, int(recipe.blur * side / 2))


def face_square(box: np.ndarray, blend: ParserBlend) -> tuple[int, int, int]:
    """Left, top and side in source pixels of the square around a box that is the input of the face parser."""
    x1, y1, x2, y2 = (int(value) for value in box)
    half = int(max(x2 - x1, y2 - y1) // 2 * RECIPES[blend].expand)
    return (x1 + x2) // 2 - half, (y1 + y2) // 2 - half, 2 * half


def crop_square(frame: np.ndarray, box: np.ndarray, blend: ParserBlend) -> np.ndarray:
    """The `face_square` of a frame (H, W, 3): BGR uint8 (side, side, 3), black outside the frame."""
    left, top, side = face_square(box, blend)
    height, width = frame.shape[:2]
    pad_top, pad_bottom = max(-top, 0), max(top + side - height, 0)
    pad_left, pad_right = max(-left, 0), max(left + side - width, 0)
    inside = frame[top + pad_top : top + side - pad_bottom, left + pad_left : left + side - pad_right]
    return cv2.copyMakeBorder(inside, pad_top, pad_bottom, pad_left, pad_right, cv2.BORDER_CONSTANT)


def grow_jaw(skin: np.ndarray) -> np.ndarray:
    """Dilates a skin mask, bool (512, 512), by a peg that points down and erodes its cheeks, as MuseTalk v1.5."""
    rows, columns = np.indices((2 * GROWTH_UP + 1,) * 2) - GROWTH_UP
    peg = abs(columns) <= np.minimum(rows + GROWTH_DOWN, GROWTH_ASIDE)
    grown = cv2.dilate(skin.astype(np.uint8), peg.astype(np.uint8))  # cv2.dilate mirrors the kernel
    ellipse = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, CHEEK_KERNEL)
    jaw = cv2.erode(grown, ellipse, iterations=2)
    middle = slice(len(skin) // 2 - CHEEKS + 1, len(skin) // 2 + CHEEKS)
    jaw[:, middle] = grown[:, middle]
    return jaw.astype(bool)


def feather(mask: np.ndarray, top: int, radius: int) -> np.ndarray:
    """Clears a mask uint8 (h, w) above row `top` and blurs it, with zeros outside. Returns float32 (h, w) in [0, 1]."""
    mask[:top] = 0
    size = 2 * radius + 1
    return cv2.GaussianBlur(mask, (size, size), 0, borderType=cv2.BORDER_CONSTANT) / np.float32(255)


def pack_alpha(alpha: np.ndarray) -> bytes:
    """Compresses a mask of 256 levels, float32 (h, w) in [0, 1], without loss and without its empty upper rows."""
    mask = np.round(alpha * 255).astype(np.uint8)
    mask = mask[mask.any(axis=1).argmax() :]
    differences = np.diff(mask, axis=0, prepend=np.uint8(0))  # compress to half the size
    return zlib.compress(differences.tobytes(), level=1)


def unpack_alpha(packed: bytes, width: int) -> np.ndarray:
    """The lower rows (n, width) of a mask that `pack_alpha` compressed, float32 in [0, 1]; above them it is 0."""
    differences = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(-1, width)
    return np.cumsum(differences, axis=0, dtype=np.uint8) / np.float32(255)
