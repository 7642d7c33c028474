"""Boxes and crops of faces and mouths, the person in a clip, and pasting back."""

from __future__ import annotations

import multiprocessing
import resource
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path, PurePath

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from musetalk.contract import IMAGE_SIZE, MASK_TOP, RIGID, FeatureContract
from musetalk.data import crop
from musetalk.data.crop import (
    MOUTH_PADDING,
    crop_clips,
    crop_face,
    crop_mouth,
    crop_person,
    face_box,
    in_crop,
    mouth_box,
    paste_back,
    skull_size,
)
from musetalk.data.face.face import Face
from musetalk.data.video import read_frames
from musetalk.images import mask_lower_half, to_tensor, to_uint8

FRAME = (480, 640, 3)
MOVED_BY_SPEECH = [*range(17), *range(48, 68)]  # jaw and lips


def head(x: float = 300, y: float = 200, eyes: float = 90, jaw: float = 0) -> np.ndarray:
    """Landmarks (68, 2) of a frontal face whose eyes have their midpoint at x, y and are `eyes` pixels apart."""
    points = np.zeros((68, 2))
    angle = np.linspace(0, np.pi, 17)
    points[:17] = np.stack([-np.cos(angle) * 0.76, 0.1 + np.sin(angle) * (1.25 + jaw)], axis=1)
    points[17:27] = np.stack([np.linspace(-0.7, 0.7, 10), np.full(10, -0.25)], axis=1)
    points[27:31] = np.stack([np.zeros(4), [0.05, 0.22, 0.4, 0.55]], axis=1)
    points[31:36] = np.stack([np.linspace(-0.15, 0.15, 5), np.full(5, 0.65)], axis=1)
    points[36:42] = [(-0.5, 0), (-0.4, -0.05), (-0.3, -0.05), (-0.2, 0), (-0.3, 0.05), (-0.4, 0.05)]
    points[42:48] = -points[[39, 38, 37, 36, 41, 40]] * (1, -1)
    around = np.linspace(np.pi, 3 * np.pi, 12, endpoint=False)
    points[48:60] = np.stack([0.3 * np.cos(around), 0.95 + (0.12 + jaw / 2) * np.sin(around)], axis=1)
    around = np.linspace(np.pi, 3 * np.pi, 8, endpoint=False)
    points[60:68] = np.stack([0.22 * np.cos(around), 0.95 + (0.03 + jaw / 2) * np.sin(around)], axis=1)
    return (points * eyes + (x, y)).astype(np.float32)


def simple(left: float, right: float, nose: float, chin: float) -> np.ndarray:
    """Landmarks (68, 2) with these bounds, all that MuseTalk's box depends on."""
    points = np.full((68, 2), ((left + right) / 2, nose), np.float32)
    points[0, 0], points[16, 0], points[8, 1] = left, right, chin
    return points


class FakeBackend:
    """A backend that looks up the faces of a frame by the value of its first pixel."""

    def __init__(self, faces: dict[int, list[Face]]) -> None:
        self.faces, self.batches = faces, []

    def detect(self, frames):
        self.batches.append(len(frames))
        return [self.faces[int(frame[0, 0, 0])] for frame in frames]


def frame_of(k: int) -> np.ndarray:
    frame = np.random.default_rng(k).integers(256, size=FRAME, dtype=np.uint8)
    frame[0, 0] = k
    return frame


def face_at(x: float = 300, score: float = 0.9, **size) -> Face:
    points = head(x, **size)
    return Face(np.array([*points.min(axis=0), *points.max(axis=0)], np.float32), points, score)


# The box.


@pytest.mark.parametrize(
    ("points", "options", "box"),
    [
        ((100, 200, 150, 250), {}, (100, 50, 200, 250)),
        ((100.9, 200.9, 150.9, 250.9), {}, (100, 50, 200, 250)),  # rounded down
        ((100, 200, 150, 250), {"bbox_shift": 7}, (100, 64, 200, 250)),  # 157 -+ 93
        ((100, 200, 150, 250), {"bbox_shift": -7}, (100, 36, 200, 250)),
        ((100, 200, 150, 250), {"margin": 10}, (100, 50, 200, 260)),  # v1.5
        ((100, 200, 150, 250), {"bbox_shift": 7, "margin": 10}, (100, 64, 200, 260)),
        ((100, 200, 60, 250), {}, (100, 0, 200, 250)),  # above the frame
        ((100, 200, 350, 475), {"margin": 10}, (100, 225, 200, 480)),  # below it
        ((100, 200, 350, 500), {}, (100, 200, 200, 480)),
        ((-20, 700, 150, 250), {}, (0, 50, 640, 250)),
    ],
)
def test_musetalks_box_in_worked_examples(points, options, box):
    found = face_box(simple(*points), FRAME, **options)
    assert tuple(found) == box and found.dtype == np.int32


@pytest.mark.parametrize(
    "points",
    [(150, 150, 150, 250), (100, 200, 250, 250), (700, 800, 150, 250), (-90, -9, 150, 250), (100, 200, -90, -50)],
)
def test_an_empty_box_is_none(points):
    assert face_box(simple(*points), FRAME) is None


def test_a_shift_beyond_the_chin_leaves_no_box():
    assert face_box(simple(100, 200, 150, 250), FRAME, bbox_shift=100) is None


def test_nose_point_29_is_the_middle_row_of_both_boxes():
    points = head()
    for recipe in ("nose_centred", "rigid"):
        x1, y1, x2, y2 = face_box(points, FRAME, crop=recipe)
        assert (y1 + y2) / 2 == int(points[29, 1])
        assert x1 < points[:17, 0].min() + 1 and points[:17, 0].max() - 1 < x2 and points[:, 1].max() - 1 < y2


def test_the_rigid_box_in_a_worked_example():
    """Eyes 100 pixels apart, no yaw: 164 x 250 pixels around point 29, plus the margin at the bottom."""
    points = head(300, 200, 100)
    assert tuple(face_box(points, FRAME, crop="rigid")) == (218, 115, 382, 365)
    assert tuple(face_box(points, FRAME, bbox_shift=5, margin=9, crop="rigid")) == (218, 120, 382, 379)


@given(
    moves=st.lists(st.tuples(st.floats(-30, 30), st.floats(-30, 60)), min_size=37, max_size=37),
    shift=st.integers(-5, 5),
    margin=st.integers(0, 20),
)
def test_the_rigid_box_does_not_depend_on_jaw_and_mouth(moves, shift, margin):
    still, moved = head(), head()
    moved[MOVED_BY_SPEECH] += np.array(moves, np.float32)
    boxes = [face_box(points, FRAME, shift, margin, "rigid") for points in (still, moved)]
    np.testing.assert_array_equal(*boxes)


def test_musetalks_box_grows_with_the_opening_of_the_jaw():
    heights = [np.diff(face_box(head(jaw=jaw), FRAME)[[1, 3]])[0] for jaw in (0, 0.1, 0.2)]
    assert heights == sorted(set(heights))


def test_a_wide_open_mouth_is_inside_the_rigid_box():
    points = head(jaw=0.3)
    assert points[48:68, 1].max() < face_box(points, FRAME, crop="rigid")[3]


@given(yaw=st.floats(-60, 60), roll=st.floats(-30, 30), eyes=st.floats(20, 200))
def test_the_skull_size_is_invariant_to_rotation(yaw, roll, eyes):
    """A rigid 3-D head under orthographic projection; the nose tip is half an eye distance in front of the eyes."""
    corners = np.array([[-0.5, 0, 0], [0.5, 0, 0], [0, 0.5, 0.5]]) * eyes
    a, b = np.radians([yaw, roll])
    turn = np.array([[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]])
    tilt = np.array([[np.cos(b), -np.sin(b)], [np.sin(b), np.cos(b)]])
    points = np.zeros((68, 2))
    points[[36, 45, 30]] = (corners @ turn.T)[:, :2] @ tilt.T + 300
    assert skull_size(points) == pytest.approx(eyes, rel=1e-6)


@given(x=st.floats(-200, 800), y=st.floats(-200, 600), eyes=st.floats(1, 400), margin=st.integers(0, 40))
def test_a_box_is_inside_the_frame(x, y, eyes, margin):
    for recipe in ("nose_centred", "rigid"):
        box = face_box(head(x, y, eyes), FRAME, 0, margin, recipe)
        if box is not None:
            assert 0 <= box[0] < box[2] <= FRAME[1] and 0 <= box[1] < box[3] <= FRAME[0]
            assert crop_face(frame_of(0), box).shape == (IMAGE_SIZE, IMAGE_SIZE, 3)


# Mouths.


def lips(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    """Landmarks (68, 2) whose lips fill a box; the others lie elsewhere."""
    points = np.full((68, 2), -999, np.float32)
    points[48:68] = ((left + right) / 2, (top + bottom) / 2)
    points[[48, 50, 54, 67]] = (left, top), (left, top), (right, top), (right, bottom)
    return points


def test_landmarks_in_a_crop_in_a_worked_example():
    points, box = np.array([[10, 20], [60, 120], [110, 220], [35, 45]], np.float32), np.array([10, 20, 110, 220])
    found = in_crop(points, box)
    assert found.dtype == np.float32
    assert found.tolist() == [[0, 0], [128, 128], [256, 256], [64, 32]]


@pytest.mark.parametrize(
    ("mouth", "box"),
    [
        ((100, 150, 180, 170), (88, 134, 192, 186)),  # 80 wide: 104 x 52 about (140, 160)
        ((100, 150, 180, 190), (88, 144, 192, 196)),  # as high as half its width
        ((100, 130, 180, 190), (62, 121, 218, 199)),  # open: 60 high counts for 120 wide
        ((0, 150, 80, 170), (0, 134, 104, 186)),  # at the left edge
        ((200, 150, 280, 170), (152, 134, 256, 186)),  # leaves the crop at the right
        ((100, 240, 180, 260), (88, 204, 192, 256)),  # and below
        ((0, 0, 256, 100), (0, 0, 256, 128)),  # wider than the crop
    ],
)
def test_the_mouth_box_in_worked_examples(mouth, box):
    whole = np.array([0, 0, IMAGE_SIZE, IMAGE_SIZE])
    found = mouth_box(lips(*mouth), whole)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, box, atol=1e-4)
    moved = mouth_box(lips(*mouth) / 2 + np.float32(50), np.array([50, 50, 178, 178]))  # a face of half the size
    np.testing.assert_allclose(moved, box, atol=1e-4)


@given(x=st.floats(-50, 300), y=st.floats(-50, 300), width=st.floats(10, 180), height=st.floats(1, 90))
def test_the_mouth_box_contains_the_lips_and_is_inside_the_crop(x, y, width, height):
    x1, y1, x2, y2 = mouth_box(lips(x, y, x + width, y + height), np.array([0, 0, IMAGE_SIZE, IMAGE_SIZE]))
    assert 0 <= x1 < x2 <= IMAGE_SIZE and 0 <= y1 < y2 <= IMAGE_SIZE
    assert x2 - x1 == pytest.approx(2 * (y2 - y1), rel=1e-4)
    if 0 <= x and x + width <= IMAGE_SIZE and 0 <= y and y + height <= IMAGE_SIZE:
        assert x1 <= x + 1e-4 and y1 <= y + 1e-4 and x + width <= x2 + 1e-4 and y + height <= y2 + 1e-4
    wide = max(width, 2 * height) * (1 + 2 * MOUTH_PADDING)
    assert x2 - x1 == pytest.approx(min(wide, IMAGE_SIZE), rel=1e-3)


@pytest.mark.parametrize("recipe", ["nose_centred", "rigid"])
@pytest.mark.parametrize("jaw", [0, 0.1, 0.3])
def test_the_mouth_of_a_face_is_inside_its_box(recipe, jaw):
    points = head(jaw=jaw)
    face = face_box(points, FRAME, crop=recipe)
    x1, y1, x2, y2 = mouth_box(points, face)
    seen = in_crop(points[48:68], face)
    assert ((x1, y1) < seen).all() and (seen < (x2, y2)).all()
    assert y1 > MASK_TOP


@pytest.mark.parametrize("box", [(0, 0, 128, 64), (100, 150, 228, 214), (128, 192, 256, 256)])
def test_a_mouth_of_the_crop_size_is_not_resampled(box):
    images = torch.rand(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    x1, y1, x2, y2 = box
    found = crop_mouth(images, torch.tensor([box, box], dtype=torch.float32))
    assert found.shape == (2, 3, 64, 128)
    torch.testing.assert_close(found, images[:, :, y1:y2, x1:x2], atol=1e-4, rtol=0)


@pytest.mark.parametrize("box", [(60, 140, 220, 220), (90, 150, 154, 182), (0, 128, 256, 256), (31, 77, 117, 120)])
def test_mouths_are_resized_as_by_opencv(box):
    image = torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    x1, y1, x2, y2 = box
    cut = image[0, :, y1:y2, x1:x2].permute(1, 2, 0).numpy()
    expected = cv2.resize(cut, (128, 64), interpolation=cv2.INTER_LINEAR)
    found = crop_mouth(image, torch.tensor([box]))[0].permute(1, 2, 0).numpy()
    inner = slice(2, -2)  # at the edges the box includes neighbouring pixels
    np.testing.assert_allclose(found[inner, inner], expected[inner, inner], atol=1e-4)


def test_boxes_differ_by_image_and_may_be_fractional():
    """On a ramp the value at position x is x - 0.5, since the centre of pixel 0 is at 0.5."""
    x = torch.arange(256.0).expand(256, 256)
    ramps = torch.stack([x, x.T, x + 1000]).repeat(2, 1, 1, 1)
    first, second = crop_mouth(ramps, torch.tensor([[10.25, 100, 74.25, 132], [50, 60.5, 178, 124.5]]))
    np.testing.assert_allclose(first[0, 5], 10.25 + (np.arange(128) + 0.5) / 2 - 0.5, atol=1e-3)
    np.testing.assert_allclose(first[1, :, 5], 100 + (np.arange(64) + 0.5) / 2 - 0.5, atol=1e-3)
    np.testing.assert_allclose(second[0, 5], 50 + np.arange(128), atol=1e-3)
    np.testing.assert_allclose(second[1, :, 5], 60.5 + np.arange(64), atol=1e-3)
    np.testing.assert_allclose(second[2] - second[0], 1000, atol=1e-2)


def test_gradients_of_a_mouth_are_exact_and_zero_outside_its_box():
    torch.manual_seed(0)
    boxes = torch.tensor([[10.3, 20.2, 40.9, 35.5]], dtype=torch.float64)
    patch = torch.rand(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)

    def mouths(patch):
        return crop_mouth(torch.nn.functional.pad(patch, (20, 232, 25, 227)), boxes)[:, :, ::8, ::8]

    assert torch.autograd.gradcheck(mouths, patch)

    images = torch.rand(2, 3, IMAGE_SIZE, IMAGE_SIZE, requires_grad=True)
    crop_mouth(images, torch.tensor([[60.0, 140, 188, 204], [100, 150, 150, 175]])).sum().backward()
    inside = torch.zeros(2, 1, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.bool)
    inside[0, :, 140:204, 60:188] = True
    inside[1, :, 149:176, 99:151] = True  # bilinear: one pixel more
    gradient = images.grad
    assert (gradient.masked_select(~inside) == 0).all()
    assert (gradient.masked_select(inside) > 0).all()
    assert gradient.sum(dim=(1, 2, 3)).tolist() == pytest.approx([3 * 64 * 128] * 2, rel=1e-4)


# Images.


def test_to_uint8_inverts_to_tensor_exactly():
    images = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    images = np.concatenate([images, images[:, ::-1]])
    images[..., 1] //= 2
    tensor = to_tensor(images)
    assert tensor.dtype == torch.float32 and tensor.shape == (2, 3, 16, 16)
    assert tensor.min() == -1 and tensor.max() == 1
    np.testing.assert_array_equal(to_uint8(tensor), images)
    np.testing.assert_array_equal(to_uint8(to_tensor(torch.from_numpy(images))), images)


def test_tensors_are_rgb_and_images_bgr():
    blue = np.zeros((1, 2, 2, 3), np.uint8)
    blue[..., 0] = 255
    assert to_tensor(blue)[0, :, 0, 0].tolist() == [-1, -1, 1]


def test_to_uint8_clamps_values():
    tensor = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0], requires_grad=True).expand(1, 3, 1, 5)
    assert to_uint8(tensor)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_masking_returns_a_copy_with_a_black_lower_half():
    images = torch.rand(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    before = images.clone()
    masked = mask_lower_half(images)
    assert torch.equal(images, before)
    assert torch.equal(masked[:, :, :MASK_TOP], images[:, :, :MASK_TOP]) and (masked[:, :, MASK_TOP:] == -1).all()


def reference_lanczos(image: np.ndarray) -> np.ndarray:
    """Resizes the rows of an image (H, W, 3) to 256 with Lanczos' kernel of eight pixels, without antialiasing."""
    position = (np.arange(IMAGE_SIZE) + 0.5) * len(image) / IMAGE_SIZE - 0.5
    taps = np.floor(position).astype(int)[:, None] + np.arange(-3, 5)  # (256, 8)
    distance = position[:, None] - taps
    weight = np.sinc(distance) * np.sinc(distance / 4)
    weight /= weight.sum(axis=1, keepdims=True)
    return np.einsum("rt,rtwc->rwc", weight, image[np.clip(taps, 0, len(image) - 1)])


@pytest.mark.parametrize("box", [(200, 100, 301, 220), (0, 0, 640, 480), (384, 224, 640, 480), (1, 2, 600, 60)])
def test_crops_are_resized_as_by_musetalk(box):
    """With Lanczos' kernel of eight source pixels at any scale, so that a large face is not antialiased."""
    frame, (x1, y1, x2, y2) = frame_of(3), box
    expected = reference_lanczos(frame[y1:y2, x1:x2].astype(np.float64))
    expected = reference_lanczos(expected.swapaxes(0, 1)).swapaxes(0, 1)
    found = crop_face(frame, np.array(box))
    assert np.abs(found - np.clip(expected, 0, 255)).max() <= 2  # OpenCV's weights have 11 bits
    if (x2 - x1, y2 - y1) == (IMAGE_SIZE, IMAGE_SIZE):
        np.testing.assert_array_equal(found, frame[y1:y2, x1:x2])


# Pasting back.


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """A smooth image, which resizing to a crop and back changes little."""
    y, x = np.mgrid[: FRAME[0], : FRAME[1]]
    channels = [np.sin(x / 40), np.cos(y / 35), np.sin((x - y) / 50)]
    return np.round(127.5 + 100 * np.stack(channels, axis=-1)).astype(np.uint8)


@pytest.mark.parametrize("box", [(200, 100, 400, 380), (0, 0, 640, 480), (10, 20, 111, 99)])
def test_pasting_back_inverts_cropping(picture, box):
    face = crop_face(picture, np.array(box))
    assert face.shape == (IMAGE_SIZE, IMAGE_SIZE, 3) and face.dtype == np.uint8
    x1, y1, x2, y2 = box
    back = picture.copy()
    paste_back(back, face, np.array(box), np.ones((y2 - y1, x2 - x1), np.float32))
    assert np.abs(back.astype(int) - picture).max() <= 6
    outside = np.ones(FRAME[:2], bool)
    outside[y1:y2, x1:x2] = False
    assert back.dtype == np.uint8 and np.array_equal(back[outside], picture[outside])


def test_the_frame_is_unchanged_where_alpha_is_zero(picture):
    back, box = picture.copy(), np.array([200, 100, 400, 380])
    alpha = np.zeros((280, 200), np.float32)
    alpha[100:200, 50:150] = 1
    alpha[200:220, 50:150] = 0.25
    paste_back(back, np.full((IMAGE_SIZE, IMAGE_SIZE, 3), 200, np.uint8), box, alpha)
    inside = back[100:380, 200:400]
    np.testing.assert_array_equal(inside[alpha == 0], picture[100:380, 200:400][alpha == 0])
    assert (inside[alpha == 1] == 200).all()
    quarter = picture[100:380, 200:400][alpha == 0.25] * 0.75 + 50
    np.testing.assert_allclose(inside[alpha == 0.25], quarter, atol=0.51)


# The person in a clip.


def numbered_frames(numbers) -> list[np.ndarray]:
    return [frame_of(k) for k in numbers]


def test_the_largest_person_is_cropped_in_every_variant():
    contract = FeatureContract(margins=(0, 10), bbox_shift=2)
    backend = FakeBackend({0: [face_at(100, eyes=15), face_at(eyes=40)], 1: []})
    frames = numbered_frames([0, 0, 1, 0])
    person = crop_person(iter(frames), backend, contract)
    crops = list(person.crops())
    for values in (person.faces, crops):
        assert [value is None for value in values] == [False, False, True, False]
    assert person.boxes.shape == (4, 2, 4) and person.boxes.dtype == np.int32 and (person.boxes[2] == 0).all()
    for variant, margin in enumerate(contract.margins):
        box = face_box(face_at(eyes=40).landmarks, FRAME, 2, margin)
        np.testing.assert_array_equal(person.boxes[3, variant], box)
        np.testing.assert_array_equal(crops[3][variant], crop_face(frames[3], box))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_faces_found_equal_the_detected_ones(dtype):
    faces = [face_at(300 + k / 3, score=1 / 3) for k in range(20)]
    faces = [Face(face.box.astype(dtype), face.landmarks.astype(dtype) / 3, face.score) for face in faces]
    person = crop_person(numbered_frames(range(20)), FakeBackend(dict(enumerate([face] for face in faces))), RIGID)
    for found, face in zip(person.faces, faces, strict=True):
        assert found.score == face.score and found.landmarks.dtype == found.box.dtype == dtype
        np.testing.assert_array_equal(found.landmarks, face.landmarks)
        np.testing.assert_array_equal(found.box, face.box)


def test_a_face_that_cannot_be_cropped_is_ignored():
    frames = numbered_frames([0, 0])
    person = crop_person(frames, FakeBackend({0: [face_at(x=1500)]}), FeatureContract())
    assert person.faces == [None, None] and list(person.crops()) == [None, None]


@pytest.mark.parametrize("count", [1, 16, 40])
def test_the_detector_gets_every_frame_once_in_small_batches(count):
    backend = FakeBackend({0: []})
    crop_person(numbered_frames([0] * count), backend, FeatureContract())
    assert sum(backend.batches) == count and max(backend.batches) <= crop.DETECT_BATCH


@pytest.mark.parametrize(
    ("count", "part", "expected"),
    [
        (0, 0, []),
        (1, 0, [("a__b", 1, True)]),
        (5, 0, [("a__b", 5, True)]),
        (6, 0, [("a__b-0000", 5, False), ("a__b-0001", 1, True)]),
        (12, 0, [("a__b-0000", 5, False), ("a__b-0001", 5, False), ("a__b-0002", 2, True)]),
        (2, 3, [("a__b-0003", 2, True)]),
    ],
)
def test_a_long_source_is_split_into_numbered_clips(monkeypatch, count, part, expected):
    monkeypatch.setattr(crop, "MAX_CLIP_FRAMES", 5)
    backend = FakeBackend({k: [face_at(300 + k)] for k in range(count)})
    frames = numbered_frames(range(count))
    found, nose_positions = [], []
    for name, person, last in crop_clips(PurePath("a/b.mp4"), frames, backend, RIGID, part):
        start = len(nose_positions)
        found.append((name, len(person.faces), last))
        nose_positions += [face.landmarks[29, 0] for face in person.faces]
        for frame, boxes, images in zip(frames[start:], person.boxes, person.crops(), strict=False):
            np.testing.assert_array_equal(images[0], crop_face(frame, boxes[0]))
    assert found == expected
    assert nose_positions == [300 + k for k in range(count)]  # no frame is lost or repeated


@pytest.mark.parametrize(("number", "sizes"), [(1, {40}), (2, {20}), (None, {40, 60})])
def test_a_person_of_a_number_is_followed_through_all_clips(monkeypatch, number, sizes):
    """The numbered people of the second clip are others than those of the first."""
    monkeypatch.setattr(crop, "MAX_CLIP_FRAMES", 5)
    left, right, passer_by = face_at(150, eyes=40), face_at(450, eyes=20), face_at(300, y=400, eyes=60)
    found = {k: [right, left] if k < 5 else [left, passer_by, right] for k in range(10)}
    clips = crop_clips(PurePath("a.mp4"), numbered_frames(range(10)), FakeBackend(found), RIGID, number=number)
    faces = [face for _, person, _ in clips for face in person.faces]
    assert len(faces) == 10 and {np.ptp(face.landmarks[[36, 45], 0]) for face in faces} == sizes


@pytest.mark.parametrize("number", [0, 3])
def test_nobody_is_cropped_in_clips_with_fewer_people_than_the_number(number):
    backend = FakeBackend({0: [face_at(150), face_at(450)], 1: [face_at(150)]})
    person = crop_person(numbered_frames([1, 0, 1]), backend, RIGID, number)
    assert person.faces == [None] * 3 and person.people == 2 and list(person.crops()) == [None] * 3


def test_a_clip_is_complete_before_the_next_one_is_read(monkeypatch):
    monkeypatch.setattr(crop, "MAX_CLIP_FRAMES", 5)
    read = []

    def frames():
        for index in range(20):
            read.append(index)
            yield frame_of(0)

    _, person, _ = next(crop_clips(PurePath("a.mp4"), frames(), FakeBackend({0: [face_at()]}), RIGID))
    assert len(read) == 6  # one frame ahead tells whether the clip is the last
    assert len(list(person.crops())) == 5


def measure_growth(count: int) -> int:
    """Returns the bytes by which this process grows while it finds a person in frames of 720p, after the first 50."""

    class AlwaysFound:
        def detect(self, frames):
            return [[face_at()] for _ in frames]

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def frames():
        for index in range(count):
            yield np.full((720, 1280, 3), index % 256, np.uint8)
            sizes.append(resident_bytes())

    sizes: list[int] = []
    assert len(crop_person(frames(), AlwaysFound(), RIGID).faces) == count
    return sizes[-1] - sizes[50]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_no_frame_is_kept_while_a_person_is_found():
    """250 frames of 2.8 MB each; a tenth of their size is allowed for batches and numbers."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(measure_growth, 300).result() < 250 * 2.8e6 / 10


def test_the_nose_is_in_the_middle_of_real_crops(clips, face_backend):
    frames = list(islice(read_frames(clips / "talking_b.mp4"), 6))
    person = crop_person(frames, face_backend, RIGID)
    assert all(face is not None for face in person.faces)
    for face, (x1, y1, x2, y2) in zip(person.faces, person.boxes[:, 0], strict=True):
        assert abs(face.landmarks[29, 1] - (y1 + y2) / 2) <= 1.5
        mouth = face.landmarks[48:68]
        assert (mouth > (x1, (y1 + y2) / 2)).all() and (mouth < (x2, y2)).all()
    first = next(person.crops())
    assert cv2.Laplacian(first[0], cv2.CV_64F).var() > 5  # a picture
