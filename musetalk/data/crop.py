"""Landmarks -> box -> face crop of 256 x 256, its lower half masked; and the image conventions.

On disk and in OpenCV an image is BGR uint8 (H, W, 3); in networks it is RGB float (B, 3, H, W) in [-1, 1].
Only `to_tensor` and `to_uint8` convert.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import PurePath
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch.nn import functional

from musetalk.contract import IMAGE_SIZE, FeatureContract
from musetalk.data.cache import MAX_CLIP_FRAMES, clip_name
from musetalk.data.face.face import Face, FaceBackend, area
from musetalk.data.face.tracking import follow_person
from musetalk.images import batched

DETECT_BATCH = 16  # frames given to the detector at once
MAX_FACES = 4  # of a frame, the largest: the crops of all of them are kept until it shows whose clip it is
MIN_FACE = 32  # source pixels, both sides of a crop; a smaller one shows no mouth
NOSE_POINT = 29  # low on the bridge of the nose, of the 68 landmarks
NOSE_TIP = 30
EYE_CORNERS = (36, 45)  # the outer ones
JAW, LIPS, INNER_LIPS = slice(0, 17), slice(48, 68), slice(60, 68)
RIGID_HALF_WIDTH, RIGID_HALF_HEIGHT = 0.82, 1.25  # of the "rigid" box, in skull sizes: a wide open mouth fits in
MOUTH_PADDING = 0.15  # of its width, on either side of a mouth in its box
MOUTH_SIZE = (64, 128)  # pixels, height and width of a mouth crop


class Crops(Sequence):
    """For each of T frames its K crops BGR uint8 (K, 256, 256, 3), or None.

    They are in a file without a name: those of a minute are 300 MB.
    """

    def __init__(self, variants: int) -> None:
        self.shape = variants, IMAGE_SIZE, IMAGE_SIZE, 3
        self.file = tempfile.TemporaryFile()
        self.places: list[int | None] = []  # in the file, of each frame's crops

    def put(self, images: list[np.ndarray]) -> int:
        """Write the K crops of a face to the end of the file. Returns their place."""
        place = self.file.tell()
        self.file.write(np.stack(images))
        return place

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> np.ndarray | None:
        if (place := self.places[index]) is None:
            return None
        self.file.seek(place)
        return np.frombuffer(self.file.read(math.prod(self.shape)), np.uint8).reshape(self.shape)


class SeenFace(NamedTuple):
    """A face, its K boxes and the place of its crops, in plain numbers, while frames come and go.

    Arrays would lie where frames were that have been let go of, so that the next frame has no room there and takes new
    memory: 4 GB for a minute of 1280 x 720.
    """

    box: list[float]
    landmarks: list[list[float]]
    dtype: np.dtype  # of both
    score: float
    boxes: list[list[int]]
    place: int

    @classmethod
    def of(cls, face: Face, boxes: list[np.ndarray], place: int) -> SeenFace:
        numbers = face.box.tolist(), face.landmarks.tolist(), face.landmarks.dtype, face.score
        return cls(*numbers, [box.tolist() for box in boxes], place)

    def face(self) -> Face:
        return Face(np.array(self.box, self.dtype), np.array(self.landmarks, self.dtype), self.score)


@dataclass(frozen=True)
class CroppedClip:
    """One person through T frames, in K margin variants.

    faces: T faces, None where the person is not seen. crops: of each face, None where there is none.
    boxes: int32 (T, K, 4) in source pixels, zero where there is no face.
    """

    faces: list[Face | None]
    crops: Crops
    boxes: np.ndarray


def crop_person(frames: Iterable[np.ndarray], backend: FaceBackend, contract: FeatureContract) -> CroppedClip:
    """Find and crop the main person of a clip, reading each frame once.

    frames: BGR uint8 (H, W, 3). Every face is cropped as it comes and the frame let go; who the person is shows
    at the end.
    """
    seen: list[list[SeenFace]] = []
    crops = Crops(len(contract.margins))
    for batch in batched(frames, DETECT_BATCH):
        for frame, faces in zip(batch, backend.detect(batch), strict=True):
            seen.append([])
            for face in sorted(faces, key=lambda face: area(face.box), reverse=True)[:MAX_FACES]:
                boxes = [
                    face_box(face.landmarks, frame.shape, contract.bbox_shift, margin, contract.crop)
                    for margin in contract.margins
                ]
                if all(box is not None for box in boxes):
                    seen[-1].append(SeenFace.of(face, boxes, crops.put([crop_face(frame, box) for box in boxes])))
    found = [[one.face() for one in faces] for faces in seen]
    kept = {
        id(face): one for faces, ones in zip(found, seen, strict=True) for face, one in zip(faces, ones, strict=True)
    }
    person = follow_person(found)
    boxes = np.zeros((len(person), len(contract.margins), 4), np.int32)
    for index, face in enumerate(person):
        if face is not None:
            boxes[index] = kept[id(face)].boxes
    crops.places = [None if face is None else kept[id(face)].place for face in person]
    return CroppedClip(person, crops, boxes)


def crop_clips(
    source: PurePath,
    frames: Iterable[np.ndarray],
    backend: FaceBackend,
    contract: FeatureContract,
    part: int = 0,
) -> Iterator[tuple[str, CroppedClip, bool]]:
    """Cut a video into clips of at most a minute and crop each: its name, its faces, and whether it is the last.

    source: path below the folder of videos, for the names. frames: from the first one of `part` on.
    """
    frames = iter(frames)
    ahead = list(islice(frames, 1))
    while ahead:
        cropped = crop_person(chain(ahead, islice(frames, MAX_CLIP_FRAMES - 1)), backend, contract)
        ahead = list(islice(frames, 1))
        yield clip_name(source, part if part or ahead else None), cropped, not ahead
        part += 1


def face_box(
    landmarks: np.ndarray, frame_shape: Sequence[int], bbox_shift: int = 0, margin: int = 0, crop: str = "nose_centred"
) -> np.ndarray | None:
    """The box of a face that is cropped, with nose point 29 half way down.

    crop "nose_centred" is MuseTalk's: to the outermost landmarks left, right and below. Its height tells how far the
    jaw has dropped, which a network learns to read instead of the audio. "rigid" is ours: sized by the eyes alone.
    landmarks: (68, 2) in source pixels. frame_shape: (H, W, ...).
    bbox_shift: source pixels that the border of the mask moves down. margin: source pixels added below.
    Returns int32 (4,) x1, y1, x2, y2, half-open and inside the frame, or None where it is smaller than `MIN_FACE`.
    Source of the first: MuseTalk, get_landmark_and_bbox (v1.0) and its extra_margin (v1.5). Where its box is empty or
    begins left of the frame MuseTalk takes that of another detector, S3FD; here the one is no face, the other is cut.
    """
    points = landmarks.astype(np.int32)  # without their fractions, as MuseTalk does
    centre = points[NOSE_POINT, 1] + bbox_shift
    if crop == "rigid":
        size = skull_size(landmarks)
        middle = landmarks[list(EYE_CORNERS), 0].mean()
        left, right = round(middle - RIGID_HALF_WIDTH * size), round(middle + RIGID_HALF_WIDTH * size)
        half = round(RIGID_HALF_HEIGHT * size)
    else:
        left, right = points[:, 0].min(), points[:, 0].max()
        half = points[:, 1].max() - centre
    box = np.array([left, centre - half, right, centre + half + margin])
    height, width = frame_shape[:2]
    box = np.clip(box, 0, [width, height, width, height]).astype(np.int32)
    return box if min(box[2] - box[0], box[3] - box[1]) >= MIN_FACE else None


def skull_size(landmarks: np.ndarray) -> float:
    """Distance between the outer corners of the eyes as if the head faced the camera, in source pixels.

    Turning by an angle shortens it by the cosine and moves the tip of the nose, half as far before the eyes as they
    are apart, by the sine. landmarks: (68, 2).
    """
    left, right = landmarks[list(EYE_CORNERS)]
    seen = max(float(np.linalg.norm(right - left)), 1e-6)
    aside = float((landmarks[NOSE_TIP] - (left + right) / 2) @ (right - left)) / seen
    return float(np.hypot(seen, 2 * aside))


def in_crop(landmarks: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Points (N, 2) of a frame in pixels of the 256 x 256 crop of a box, float32."""
    return ((landmarks - box[:2]) * IMAGE_SIZE / (box[2:] - box[:2])).astype(np.float32)


def mouth_box(landmarks: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The box of a mouth in the 256 x 256 crop of a face: float32 (4,) x1, y1, x2, y2 in pixels of the crop.

    About the middle of the lips, `MOUTH_PADDING` wider on either side and half as high as wide; the height of a mouth
    that is open wider counts for half its width, so that all of it is inside. Moved into the crop where it would leave
    it. landmarks: (68, 2) and box: (4,) in source pixels.
    """
    lips = in_crop(landmarks[LIPS], box)
    low, high = lips.min(axis=0), lips.max(axis=0)
    width, height = high - low
    width = min(max(width, 2 * height) * (1 + 2 * MOUTH_PADDING), IMAGE_SIZE)
    size = np.array([width, width / 2])
    corner = np.clip((low + high - size) / 2, 0, IMAGE_SIZE - size)
    return np.concatenate([corner, corner + size]).astype(np.float32)


def crop_mouth(images: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Boxes (N, 4) of `mouth_box` stretched to (N, 3, 64, 128), from images (N, 3, 256, 256), float32 or float64.

    Bilinear; gradients flow to the pixels of the boxes alone.
    """
    height, width = MOUTH_SIZE
    x1, y1, x2, y2 = boxes.to(images).T[..., None]  # (N, 1) each
    across, down = (torch.arange(n, dtype=images.dtype, device=images.device) for n in (width, height))
    x = torch.lerp(x1, x2, (across + 0.5) / width)[:, None, :]  # of the middles of the pixels
    y = torch.lerp(y1, y2, (down + 0.5) / height)[:, :, None]
    grid = torch.stack(torch.broadcast_tensors(x, y), dim=-1)  # (N, 64, 128, 2)
    return functional.grid_sample(images, 2 * grid / IMAGE_SIZE - 1, "bilinear", "border", align_corners=False)


def crop_face(frame: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The box of a frame stretched to BGR uint8 (256, 256, 3)."""
    x1, y1, x2, y2 = box
    return cv2.resize(frame[y1:y2, x1:x2], (IMAGE_SIZE, IMAGE_SIZE), interpolation=cv2.INTER_LANCZOS4)


def paste_back(frame: np.ndarray, face: np.ndarray, box: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """A copy of the frame with a crop put back into its box: the inverse of `crop_face`.

    face: BGR uint8 (256, 256, 3), resized bilinearly as in MuseTalk. alpha: float32 (y2 - y1, x2 - x1), how much of the
    face shows, in [0, 1]. Where alpha is 0 the frame's own bytes stay.
    """
    x1, y1, x2, y2 = box
    face = cv2.resize(face, (int(x2 - x1), int(y2 - y1)), interpolation=cv2.INTER_LINEAR)
    result = frame.copy()
    below = result[y1:y2, x1:x2]
    blended = below + alpha[..., None] * (face.astype(np.float32) - below)
    result[y1:y2, x1:x2] = np.round(blended).astype(np.uint8)
    return result
