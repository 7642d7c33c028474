"""Landmarks -> box -> face crop of 256 x 256, and back into the frame. Images are BGR uint8 (H, W, 3)."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import PurePath
from typing import BinaryIO

import cv2
import numpy as np
import torch
from torch.nn import functional

from musetalk.contract import IMAGE_SIZE, FeatureContract
from musetalk.data.cache_format import MAX_CLIP_FRAMES, clip_name
from musetalk.data.face.face import Face, FaceBackend, area
from musetalk.data.face.tracking import follow_person, people
from musetalk.images import batched

DETECT_BATCH = 16  # frames per call of the detector
MAX_FACES = 4  # the largest ones of a frame, among which tracking chooses the person
MIN_FACE = 32  # source pixels, minimum width and height of a crop
NOSE_POINT = 29  # of the 68 landmarks, low on the bridge of the nose
NOSE_TIP = 30
EYE_CORNERS = (36, 45)  # the outer ones
JAW, LIPS, INNER_LIPS = slice(0, 17), slice(48, 68), slice(60, 68)
LIP_PAIRS = ((61, 67), (62, 66), (63, 65))  # upper and lower points of the inner lips
# Gap of the inner lips, in distances of the outer eye corners, below which a mouth is closed. On GRID, lips that touch
# measure 0.0005 to 0.01 and speech 0.05 to 0.2; few frames lie between. 0.02 is about 2 mm.
CLOSED = 0.02
RIGID_HALF_WIDTH, RIGID_HALF_HEIGHT = 0.82, 1.25  # of the "rigid" box, in skull sizes; contains a wide open mouth
MOUTH_PADDING = 0.15  # on either side of a mouth in its box, relative to its width
MOUTH_SIZE = (64, 128)  # pixels, height and width of a mouth crop


@dataclass(frozen=True)
class StoredFace(Face):
    """A face of a clip, and its number among all faces whose crops are stored."""

    number: int


@dataclass(frozen=True)
class Person:
    """One person of a clip of T frames, cropped in K margin variants.

    faces: T faces, None where the person is not detected.
    boxes: int32 (T, K, 4) in source pixels, zero where there is no face.
    people: the most people detected in one frame.
    file: the crops of all faces of the clip, in an unnamed temporary file: those of a minute take 300 MB.
    """

    faces: list[StoredFace | None]
    boxes: np.ndarray
    people: int
    file: BinaryIO

    def crops(self) -> Iterator[list[np.ndarray] | None]:
        """Yields the K crops of each frame, BGR uint8 (256, 256, 3), None where there is no face."""
        shape = self.boxes.shape[1], IMAGE_SIZE, IMAGE_SIZE, 3
        for face in self.faces:
            if face is None:
                yield None
            else:
                self.file.seek(face.number * math.prod(shape))
                yield list(np.frombuffer(self.file.read(math.prod(shape)), np.uint8).reshape(shape))


def crop_person(
    frames: Iterable[np.ndarray],
    backend: FaceBackend,
    contract: FeatureContract,
    choice: int | StoredFace | None = None,
) -> Person:
    """Detects, tracks and crops one person of a clip in one pass over its frames, BGR uint8 (H, W, 3).

    choice: None for the main person, a number from 1 on for one of the `people` of the clip (no face in any frame if
    there are fewer), or a face of the person in an earlier frame.
    All faces of a frame are cropped at once, since tracking chooses the person only after the last frame. A face too
    small or too far outside the frame for any of its boxes is ignored.
    """
    # One block for the numbers of all faces: small arrays allocated between frames fragment the heap, so that each
    # frame takes new memory, 4 GB for a minute of 1280 x 720.
    numbers, counts, shapes, dtype = bytearray(), [], [], None
    file = tempfile.TemporaryFile()
    for batch in batched(frames, DETECT_BATCH):
        for frame, faces in zip(batch, backend.detect(batch), strict=True):
            counts.append(0)
            shapes.append(frame.shape[:2])
            for face in sorted(faces, key=lambda face: area(face.box), reverse=True)[:MAX_FACES]:
                if (boxes := _boxes(face, frame.shape, contract)) is not None:
                    dtype = face.landmarks.dtype
                    values = np.concatenate([face.box, face.landmarks.ravel(), [face.score]], dtype=np.float64)
                    numbers += values.tobytes()
                    file.writelines(crop_face(frame, box).data for box in boxes)
                    counts[-1] += 1
    rows = enumerate(np.frombuffer(numbers).reshape(-1, 4 + 2 * 68 + 1))
    candidates = [
        [
            StoredFace(row[:4].astype(dtype), row[4:-1].astype(dtype).reshape(68, 2), float(row[-1]), number)
            for number, row in islice(rows, count)
        ]
        for count in counts
    ]
    found = people(candidates)
    person: list[StoredFace | None]
    if choice is None:
        person = follow_person(candidates)
    elif isinstance(choice, StoredFace):
        _, *person = follow_person([[choice], *candidates], choice)
    elif 1 <= choice <= len(found):
        person = follow_person(candidates, found[choice - 1])
    else:
        person = [None] * len(candidates)
    person_boxes = np.zeros((len(person), len(contract.margins), 4), np.int32)
    for index, main_face in enumerate(person):
        if main_face and (boxes := _boxes(main_face, shapes[index], contract)):
            person_boxes[index] = boxes
    return Person(person, person_boxes, len(found), file)


def _boxes(face: Face, frame_shape: Sequence[int], contract: FeatureContract) -> list[np.ndarray] | None:
    """Returns the crop boxes (4,) of a face in the contract's K margin variants, None if any variant has none."""
    boxes = [
        face_box(face.landmarks, frame_shape, contract.bbox_shift, margin, contract.crop) for margin in contract.margins
    ]
    found = [box for box in boxes if box is not None]
    return found if len(found) == len(boxes) else None


def crop_clips(
    source: PurePath,
    frames: Iterable[np.ndarray],
    backend: FaceBackend,
    contract: FeatureContract,
    part: int = 0,
    *,
    number: int | None = None,
) -> Iterator[tuple[str, Person, bool]]:
    """Splits a video into clips of at most a minute and crops each. Yields name, person, and whether it is the last.

    source: relative path of the video, for the names. frames: from the first frame of `part` on.
    number: of the person, in the first clip that shows at least as many `people`; later clips follow that person. By
    default the main person of each clip.
    """
    frames = iter(frames)
    choice: int | StoredFace | None = number
    ahead = list(islice(frames, 1))
    while ahead:
        person = crop_person(chain(ahead, islice(frames, MAX_CLIP_FRAMES - 1)), backend, contract, choice)
        if number is not None:
            choice = next((face for face in reversed(person.faces) if face), choice)
        ahead = list(islice(frames, 1))
        yield clip_name(source, part if part or ahead else None), person, not ahead
        part += 1


def face_box(
    landmarks: np.ndarray, frame_shape: Sequence[int], bbox_shift: int = 0, margin: int = 0, crop: str = "nose_centred"
) -> np.ndarray | None:
    """Computes the crop box of a face, vertically centred at nose point 29.

    crop "nose_centred" is MuseTalk's: bounded by the outermost landmarks on the left, right and bottom. Its height
    follows the jaw, which a network learns to read instead of the audio. "rigid" is ours: sized by the eyes only.
    landmarks: (68, 2) in source pixels. frame_shape: (H, W, ...).
    bbox_shift: source pixels by which the mask border moves down. margin: source pixels added at the bottom.
    Returns int32 (4,) x1, y1, x2, y2, half-open and inside the frame, or None if it is smaller than `MIN_FACE`.
    Source of "nose_centred": MuseTalk, get_landmark_and_bbox (v1.0) and its extra_margin (v1.5). If the box is empty
    or starts left of the frame, MuseTalk uses the S3FD detector's box; here an empty box is no face, and others are
    clipped to the frame.
    """
    points = landmarks.astype(np.int32)  # truncated, as in MuseTalk
    centre = int(points[NOSE_POINT, 1]) + bbox_shift
    if crop == "rigid":
        size = float(skull_size(landmarks))
        middle = landmarks[list(EYE_CORNERS), 0].mean()
        left, right = round(middle - RIGID_HALF_WIDTH * size), round(middle + RIGID_HALF_WIDTH * size)
        half = round(RIGID_HALF_HEIGHT * size)
    else:
        left, right = int(points[:, 0].min()), int(points[:, 0].max())
        half = int(points[:, 1].max()) - centre
    box = np.array([left, centre - half, right, centre + half + margin])
    height, width = frame_shape[:2]
    box = np.clip(box, 0, [width, height, width, height]).astype(np.int32)
    return box if min(box[2] - box[0], box[3] - box[1]) >= MIN_FACE else None


def skull_size(landmarks: np.ndarray) -> np.ndarray:
    """Estimates the distance between the outer eye corners as if the head faced the camera, in source pixels.

    Turning the head by an angle scales the distance by the cosine, and shifts the tip of the nose, which lies half
    that distance in front of the eyes, by the sine. landmarks: (..., 68, 2). Returns float64 (...).
    """
    left, right = (landmarks[..., corner, :] for corner in EYE_CORNERS)
    across = right - left
    eye_distance = np.maximum(np.sqrt(_dot(across, across)).astype(np.float64), 1e-6)
    nose_shift = _dot(landmarks[..., NOSE_TIP, :] - (left + right) / 2, across) / eye_distance
    return np.hypot(eye_distance, 2 * nose_shift)


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Dot product of vectors (..., N), summed in float64 and rounded to their dtype."""
    return (a * b).sum(axis=-1, dtype=np.float64).astype(a.dtype)


def lip_gaps(landmarks: np.ndarray, unit: tuple[int, int]) -> np.ndarray:
    """Mean distance of `LIP_PAIRS` divided by the distance of two landmarks `unit`: (..., 68, 2) -> (...)."""
    upper, lower = np.transpose(LIP_PAIRS)
    gaps = np.linalg.norm(landmarks[..., lower, :] - landmarks[..., upper, :], axis=-1).mean(axis=-1)
    left, right = unit
    return gaps / np.maximum(np.linalg.norm(landmarks[..., right, :] - landmarks[..., left, :], axis=-1), 1e-6)


def in_crop(landmarks: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Converts points (N, 2) of a frame to pixels of the 256 x 256 crop of a box, float32."""
    return ((landmarks - box[:2]) * IMAGE_SIZE / (box[2:] - box[:2])).astype(np.float32)


def mouth_box(landmarks: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Computes the box of the mouth in the 256 x 256 crop of a face: float32 (4,) x1, y1, x2, y2 in crop pixels.

    Centred at the lips, padded by `MOUTH_PADDING` on either side, and half as high as wide. A mouth that is more than
    half as high as wide enlarges the box to contain it. Shifted to lie inside the crop.
    landmarks: (68, 2) and box: (4,) in source pixels.
    """
    lips = in_crop(landmarks[LIPS], box)
    low, high = lips.min(axis=0), lips.max(axis=0)
    width, height = high - low
    width = min(max(width, 2 * height) * (1 + 2 * MOUTH_PADDING), IMAGE_SIZE)
    size = np.array([width, width / 2])
    corner = np.clip((low + high - size) / 2, 0, IMAGE_SIZE - size)
    return np.concatenate([corner, corner + size]).astype(np.float32)


def crop_mouth(images: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Crops boxes (N, 4) of `mouth_box` from images (N, C, 256, 256), float32 or float64, resized to (N, C, 64, 128).

    Bilinear and differentiable. Images may have another size, as latents do; the boxes are in pixels of 256 x 256.
    """
    height, width = MOUTH_SIZE
    x1, y1, x2, y2 = boxes.to(images).T[..., None]  # (N, 1) each
    across, down = (torch.arange(n, dtype=images.dtype, device=images.device) for n in (width, height))
    x = torch.lerp(x1, x2, (across + 0.5) / width)[:, None, :]  # pixel centres
    y = torch.lerp(y1, y2, (down + 0.5) / height)[:, :, None]
    grid = torch.stack(torch.broadcast_tensors(x, y), dim=-1)  # (N, 64, 128, 2)
    return functional.grid_sample(images, 2 * grid / IMAGE_SIZE - 1, "bilinear", "border", align_corners=False)


def crop_face(frame: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Crops a box of a frame and resizes it to BGR uint8 (256, 256, 3)."""
    x1, y1, x2, y2 = box
    return cv2.resize(frame[y1:y2, x1:x2], (IMAGE_SIZE, IMAGE_SIZE), interpolation=cv2.INTER_LANCZOS4)


def paste_back(frame: np.ndarray, face: np.ndarray, box: np.ndarray, alpha: np.ndarray) -> None:
    """Pastes a crop back into its box of a frame, in place: the inverse of `crop_face`.

    face: BGR uint8 (256, 256, 3), resized bilinearly as in MuseTalk. alpha: float32 (h, x2 - x1), opacity of the face
    in [0, 1] in the lowest h rows of the box. Where alpha is 0, and above, the frame is unchanged.
    """
    x1, y1, x2, y2 = (int(value) for value in box)
    top = y2 - len(alpha)
    face = cv2.resize(face, (x2 - x1, y2 - y1), interpolation=cv2.INTER_LINEAR)[top - y1 :]
    frame[top:y2, x1:x2] = cv2.blendLinear(face, frame[top:y2, x1:x2], alpha, 1 - alpha)
