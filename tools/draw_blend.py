"""Draws the images of blending in docs/.

    python -m tools.draw_blend ../shared/corpus/grid/others/grid_s31_bgix8n.mpg

docs/blend.png: masks of a generated face, on the NASA photograph of Eileen Collins that scikit-image includes (public
domain). The classes of the face parser are drawn from landmarks; the generated face is the crop itself, tinted.
docs/blend_jaw.png: faces whose generated jaw is higher or lower than that of the frame. Two frames of a GRID clip
(M. Cooke, J. Barker, S. Cunningham, X. Shao 2006, CC BY 4.0) serve as each other's generated face.
"""

import sys
from pathlib import Path

import cv2
import numpy as np
from skimage import data

from musetalk.data.crop import crop_face, face_box, paste_back
from musetalk.data.face import load_face_backend
from musetalk.data.face.face import Face
from musetalk.data.video import read_frames
from musetalk.inference.blend import crop_square, face_alpha, face_square, parsed_alpha
from musetalk.models.face_parser import CLASSES, INPUT_SIZE

GREEN, WHITE = (60, 170, 60), (255, 255, 255)
PANEL, HEADER = 248, 28  # px
JAW_IMAGE = "docs/blend_jaw.png"
DROPPED, CLOSED = 45, 59  # frames of the clip with a dropped jaw and a closed mouth


def draw_classes(landmarks: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Indices of CLASSES, uint8 (512, 512), in the square around the box of a face with landmarks (68, 2)."""
    left, top, side = face_square(box, "jaw")
    points = (landmarks - (left, top)) * INPUT_SIZE / side
    brows, width, angle = points[17:27], np.ptp(points[:17, 0]), np.linspace(0, 2 * np.pi, 40)
    classes = np.zeros((INPUT_SIZE, INPUT_SIZE), np.uint8)
    for name, outline in {
        "hair": brows.mean(axis=0) + 0.8 * width * np.stack([np.cos(angle), np.sin(angle)], axis=1),
        "neck": np.concatenate([points[5:12], points[[11, 5]] + (0, width)]),
        "skin": np.concatenate([points[:17], brows[[9, 7, 2, 0]] - (0, 0.25 * width)]),
        "nose": points[[27, *range(31, 36)]],
        "upper_lip": points[[*range(48, 55), *range(64, 59, -1)]],
        "lower_lip": points[[*range(54, 60), 48, 60, *range(67, 63, -1)]],
        "mouth": points[60:68],
    }.items():
        cv2.fillPoly(classes, [np.round(outline).astype(np.int32)], CLASSES.index(name))
    return classes


def save(path: str, rows: list[list[np.ndarray]], names: tuple[str, ...]) -> None:
    """Writes rows of square panels with a header of column names."""
    header = np.zeros((HEADER, len(names) * PANEL, 3), np.uint8)
    for column, name in enumerate(names):
        cv2.putText(header, name, (column * PANEL + 8, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.6, WHITE, 1, cv2.LINE_AA)
    cv2.imwrite(path, cv2.vconcat([header, *map(cv2.hconcat, rows)]), [cv2.IMWRITE_PNG_COMPRESSION, 9])


def panel(view: np.ndarray) -> np.ndarray:
    shrinks = len(view) > PANEL
    return cv2.resize(view, (PANEL, PANEL), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)


def rigid_box(face: Face, frame: np.ndarray) -> np.ndarray:
    """The crop box of a face, int32 (4,)."""
    box = face_box(face.landmarks, frame.shape, crop="rigid")
    assert box is not None
    return box


def pasted(frame: np.ndarray, face: np.ndarray, box: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """A copy of a frame with a crop pasted back."""
    copy = frame.copy()
    paste_back(copy, face, box, alpha)
    return copy


def draw_masks() -> None:
    """Draws the masks and results of three blends side by side."""
    frame = cv2.resize(data.astronaut()[:320, 64:384, ::-1], None, fx=3, fy=3, interpolation=cv2.INTER_CUBIC)
    [[face]] = load_face_backend("mediapipe", Path(), "cpu").detect([frame])
    box = rigid_box(face, frame)
    classes, side = draw_classes(face.landmarks, box), face_square(box, "jaw")[2]
    colours = cv2.resize(cv2.applyColorMap(13 * classes, cv2.COLORMAP_TURBO), (side, side))
    generated = crop_face(frame, box) // 2 + np.array(GREEN, np.uint8) // 2
    alphas = [face_alpha(face.landmarks, box), *(parsed_alpha(classes, box, blend) for blend in ("raw", "jaw"))]
    rows = [[colours], [crop_square(frame, box, "jaw")]]
    for row, background, foreground in zip(rows, (0 * frame, frame), (0 * generated + 255, generated), strict=True):
        row += [crop_square(pasted(background, foreground, box, alpha), box, "jaw") for alpha in alphas]
    view = slice(side // 6, -side // 6)
    rows = [[panel(square[view, view]) for square in row] for row in rows]
    save("docs/blend.png", rows, ("classes", "landmarks", "raw", "jaw"))


def draw_jaw(clip: Path) -> None:
    """Draws a closed mouth blended by landmarks into a frame with a dropped jaw, and vice versa.

    The column "before" is copied from the existing image: it shows the masks of commit 4fd7059.
    """
    frames = list(read_frames(clip))
    faces = [detected[0] for detected in load_face_backend("mediapipe", Path(), "cpu").detect(frames)]

    def lower_face(frame: np.ndarray, box: np.ndarray) -> np.ndarray:
        x1, y1, x2, y2 = box
        return panel(frame[(y1 + y2) // 2 - 20 : y2 + 12, x1:x2])

    before = np.split(cv2.imread(JAW_IMAGE)[HEADER:, 2 * PANEL : 3 * PANEL], 2)
    rows: list[list[np.ndarray]] = []
    for target, source in (DROPPED, CLOSED), (CLOSED, DROPPED):
        boxes = [rigid_box(faces[index], frames[index]) for index in (target, source)]
        generated = crop_face(frames[source], boxes[1])
        blended = pasted(frames[target], generated, boxes[0], face_alpha(faces[target].landmarks, boxes[0]))
        panels = [lower_face(frames[target], boxes[0]), lower_face(frames[source], boxes[1])]
        rows.append([*panels, before[len(rows)], lower_face(blended, boxes[0])])
    save(JAW_IMAGE, rows, ("frame", "generated face", "before", "now"))


if __name__ == "__main__":
    draw_masks()
    draw_jaw(Path(sys.argv[1]))
