"""Draw docs/blend.png: where a generated face shows. `python -m tools.draw_blend`

The portrait is the NASA photograph of Eileen Collins that scikit-image carries (public domain). Its classes are drawn
from its landmarks, as a face parser would see them; the generated face is the crop itself, tinted.
"""

from pathlib import Path

import cv2
import numpy as np
from skimage import data

from musetalk.blend import crop_square, face_alpha, face_square, parsed_alpha
from musetalk.crop import crop_face, face_box, paste_back
from musetalk.face import load_face_backend
from musetalk.models.face_parser import CLASSES, INPUT_SIZE

GREEN, WHITE, PANEL = (60, 170, 60), (255, 255, 255), 248  # px


def draw_classes(landmarks: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Indices of CLASSES, uint8 (512, 512), in the square around the box of a face with landmarks (68, 2)."""
    left, top, side = face_square(box)
    points = (landmarks - (left, top)) * INPUT_SIZE / side
    brows, wide, turn = points[17:27], np.ptp(points[:17, 0]), np.linspace(0, 2 * np.pi, 40)
    classes = np.zeros((INPUT_SIZE, INPUT_SIZE), np.uint8)
    for name, outline in {
        "hair": brows.mean(axis=0) + 0.8 * wide * np.stack([np.cos(turn), np.sin(turn)], axis=1),
        "neck": np.concatenate([points[5:12], points[[11, 5]] + (0, wide)]),
        "skin": np.concatenate([points[:17], brows[[9, 7, 2, 0]] - (0, 0.25 * wide)]),
        "nose": points[[27, *range(31, 36)]],
        "upper_lip": points[[*range(48, 55), *range(64, 59, -1)]],
        "lower_lip": points[[*range(54, 60), 48, 60, *range(67, 63, -1)]],
        "mouth": points[60:68],
    }.items():
        cv2.fillPoly(classes, [np.round(outline).astype(np.int32)], CLASSES.index(name))
    return classes


def main() -> None:
    """Draw the three ways side by side: where the generated face shows, and the result."""
    frame = cv2.resize(data.astronaut()[:320, 64:384, ::-1], None, fx=3, fy=3, interpolation=cv2.INTER_CUBIC)
    [[face]] = load_face_backend("mediapipe", Path(), "cpu").detect([frame])
    box = face_box(face.landmarks, frame.shape, crop="rigid")
    classes, side = draw_classes(face.landmarks, box), face_square(box)[2]
    generated = crop_face(frame, box) // 2 + np.uint8(GREEN) // 2
    alphas = [face_alpha(face.landmarks, box), *(parsed_alpha(classes, box, blend) for blend in ("raw", "jaw"))]
    rows = [[cv2.resize(cv2.applyColorMap(13 * classes, cv2.COLORMAP_TURBO), (side, side))], [crop_square(frame, box)]]
    for row, under, over in zip(rows, (0 * frame, frame), (0 * generated + 255, generated), strict=True):
        row += [crop_square(paste_back(under, over, box, alpha), box) for alpha in alphas]
    view = slice(side // 6, -side // 6)
    picture = cv2.vconcat([cv2.hconcat([square[view, view] for square in row]) for row in rows])
    picture = cv2.resize(picture, (4 * PANEL, 2 * PANEL), interpolation=cv2.INTER_AREA)
    for column, name in enumerate(("classes", "landmarks", "raw", "jaw")):
        cv2.putText(picture, name, (column * PANEL + 8, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.6, WHITE, 1, cv2.LINE_AA)
    cv2.imwrite("docs/blend.png", picture)


if __name__ == "__main__":
    main()
