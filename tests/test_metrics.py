"""Metrics of generated faces against values worked out by hand."""

from __future__ import annotations

from itertools import islice

import cv2
import numpy as np
import pytest

from musetalk.contract import CONTRACTS
from musetalk.data.crop import crop_person, in_crop
from musetalk.data.face.face import Face
from musetalk.data.video import read_frames
from musetalk.evaluation.metrics import (
    CROP_BORDER,
    bootstrap_interval,
    closures,
    correlation,
    detect_in_crops,
    lip_leak,
    mouth_aspect_ratio,
    mouth_jitter,
    mouth_landmark_distance,
    mouth_opening,
    mouth_openings,
    psnr,
    sharpness,
    ssim,
)


def face(gaps: tuple[float, float, float], eyes: float, shift: float = 0, box: tuple = (0, 0, 100, 100)) -> Face:
    """A face with given gaps between the inner lips and a given distance between the outer eye corners, in pixels."""
    points = np.zeros((68, 2), np.float32)
    points[36], points[45] = (10, 20), (10 + eyes, 20)
    for x, gap, up, low in zip((20, 30, 40), gaps, (61, 62, 63), (67, 66, 65), strict=True):
        points[up], points[low] = (x, 70), (x, 70 + gap)
    return Face(np.array(box, np.float32), points + np.float32(shift), 0.9)


def test_mouth_opening_by_hand():
    x = face((6, 9, 3), eyes=60)
    rotation = np.array([[0.8, -0.6], [0.6, 0.8]], np.float32)
    moved = Face(x.box, 3.5 * x.landmarks @ rotation + 11, x.score)
    assert mouth_opening(x) == pytest.approx(0.1) == mouth_opening(moved)
    assert np.isnan(mouth_opening(None))
    assert np.isfinite(mouth_opening(face((1, 1, 1), eyes=0)))


def test_mouth_openings_are_those_of_one_person():
    """Other frames show a smaller face too, or no face."""
    small = face((50, 50, 50), eyes=10, box=(300, 0, 320, 20))

    class FakeBackend:
        def detect(self, frames):
            return [[] if frame[0, 0, 0] == 2 else [small, face((k := frame[0, 0, 0], k, k), 50)] for frame in frames]

    frames = [np.full((4, 4, 3), k, np.uint8) for k in range(60)]
    openings = mouth_openings(frames, FakeBackend())
    assert openings.shape == (60,) and np.isnan(openings[2])
    np.testing.assert_allclose(np.delete(openings, 2), np.delete(np.arange(60), 2) / 50, rtol=1e-5)


def test_correlation_by_hand():
    a = np.array([1.0, 2, 3, 4])
    assert correlation(a, 5 * a - 3) == pytest.approx(1)
    assert correlation(a, -a) == pytest.approx(-1)
    assert correlation(np.array([1.0, 2, 3]), np.array([1.0, 3, 2])) == pytest.approx(0.5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_correlation_uses_the_common_length_and_finite_pairs():
    a = np.array([1, np.nan, 3, 4, 9, np.inf, 5, -90])
    b = np.array([2, 7, np.nan, 8, 18, 1, 10])
    assert correlation(a, b) == correlation(b, a) == pytest.approx(1)
    assert np.isnan(correlation(a[:1], b)) and np.isnan(correlation(np.full(3, 2.0), b))


# Faces in crops.


def test_detect_in_crops_returns_the_largest_face_in_pixels_of_the_crop():
    inputs = []

    class FakeBackend:
        def detect(self, frames):
            inputs.extend(frames)
            large = face((1, 1, 1), eyes=50, shift=CROP_BORDER, box=(70, 80, 300, 310))
            return [[face((9, 9, 9), eyes=9), large] if frame.any() else [] for frame in frames]

    crops = np.zeros((60, 256, 256, 3), np.uint8)
    crops[:57] = 7
    faces = detect_in_crops(crops, FakeBackend())
    assert [face is None for face in faces] == 57 * [False] + 3 * [True]
    np.testing.assert_array_equal(faces[5].box, (6, 16, 236, 246))
    np.testing.assert_array_equal(faces[5].landmarks, face((1, 1, 1), eyes=50).landmarks)
    side = 256 + 2 * CROP_BORDER
    assert inputs[0].shape == (side, side, 3) and inputs[0].sum() == 7 * crops[0].size
    assert (inputs[0][CROP_BORDER:-CROP_BORDER, CROP_BORDER:-CROP_BORDER] == 7).all()


@pytest.mark.parametrize("contract", ["rigid", "musetalk_v15"])
def test_landmarks_detected_in_real_crops_are_those_of_the_frames(clips, face_backend, contract):
    names = ("talking_a", "talking_b", "talking_c", "people/person_3", "people/person_7", "people/person_l4")
    missed, distances = [], []
    for name in names:
        frames = list(islice(read_frames(clips / f"{name}.mp4"), 0, 100, 10))
        person = crop_person(frames, face_backend, CONTRACTS[contract])
        faces = [(face, box) for face, (box,) in zip(person.faces, person.boxes, strict=True) if face is not None]
        truth = [Face(box, in_crop(face.landmarks, box), face.score) for face, box in faces]
        crops = [images[0] for images in person.crops() if images is not None]
        detected = detect_in_crops(crops, face_backend)
        missed += [face is None for face in detected]
        distances.append(mouth_landmark_distance(detected, truth))
    assert len(missed) >= 55 and np.mean(missed) < 0.03
    assert np.median(distances) < 0.012 and max(distances) < 0.025


# Mouth landmark distance.


def test_mouth_landmark_distance_by_hand():
    true, moved, one_lip, elsewhere = (face((6, 9, 3), eyes=50) for _ in range(4))
    moved.landmarks[48:68] += (3, 4)
    one_lip.landmarks[67] += (0, 10)
    elsewhere.landmarks[:48] += 30
    for moved_face, distance in ((true, 0), (moved, 5 / 50), (one_lip, 10 / 20 / 50), (elsewhere, 0)):
        assert mouth_landmark_distance([moved_face], [true]) == pytest.approx(distance)
    assert mouth_landmark_distance([true, moved, one_lip], [true] * 3) == pytest.approx((0.1 + 0.01) / 3)


def test_frames_without_a_face_do_not_count():
    true, moved = face((6, 9, 3), eyes=50), face((6, 9, 3), eyes=50)
    moved.landmarks[48:68] += (3, 4)
    assert mouth_landmark_distance([None, true, None, moved], [true, None, None, true]) == pytest.approx(0.1)
    assert np.isnan(mouth_landmark_distance([None], [true]))


# Image similarity.


def test_psnr_by_hand():
    image = np.full((64, 96, 3), 100, np.uint8)
    half = image.copy()
    half[:32] += 20
    assert psnr(image + np.uint8(10), image) == pytest.approx(28.1308, abs=1e-3)  # 20 log10(25.5)
    assert psnr(half, image) == pytest.approx(25.1205, abs=1e-3)  # 10 log10(255^2 / 200)
    assert psnr(image, image) == np.inf


def test_ssim_by_its_formula_at_one_pixel():
    """In an image of the size of the window, 11 pixels, only the middle pixel counts."""
    rng = np.random.default_rng(0)
    truth, image = rng.integers(256, size=(2, 11, 11, 3), dtype=np.uint8)
    weights = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    weights = np.outer(weights, weights)[..., None] / np.outer(weights, weights).sum()
    x, y = truth.astype(float), image.astype(float)
    mean_x, mean_y = (weights * x).sum(axis=(0, 1)), (weights * y).sum(axis=(0, 1))
    var_x, var_y = (weights * (x - mean_x) ** 2).sum(axis=(0, 1)), (weights * (y - mean_y) ** 2).sum(axis=(0, 1))
    covariance = (weights * (x - mean_x) * (y - mean_y)).sum(axis=(0, 1))
    c1, c2 = 2.55**2, 7.65**2
    expected = (
        (2 * mean_x * mean_y + c1) * (2 * covariance + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    )
    assert ssim(image, truth) == pytest.approx(expected.mean(), abs=1e-6)
    assert ssim(truth, truth) == pytest.approx(1)


def test_jitter_is_the_acceleration_of_the_lips_relative_to_the_eyes():
    """It is 0 for lips that move steadily, even if the head moves, grows and rotates."""
    rng = np.random.default_rng(0)
    lips = rng.uniform(20, 60, (20, 2)).astype(np.float32)
    faces = []
    for k in range(6):
        still = face((0, 0, 0), eyes=60)
        still.landmarks[48:] = lips + k
        angle = 0.1 * k * k
        rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        moved = (1 + k) * still.landmarks @ rotation + 7 * k**3
        faces.append(Face(still.box, moved.astype(np.float32), still.score))
    assert mouth_jitter(faces) == pytest.approx(0, abs=1e-4)
    jump = [face((0, 0, 0), eyes=60) for _ in range(3)]
    jump[1].landmarks[48:, 1] += 6  # a tenth of the distance between the eyes, down and back: 2 x 0.1
    assert mouth_jitter(jump) == pytest.approx(0.2)


def test_jitter_needs_three_consecutive_faces():
    still = face((1, 2, 3), eyes=60)
    assert np.isnan(mouth_jitter([still, still, None, still, still])) and np.isnan(mouth_jitter([]))
    assert mouth_jitter([still, still, None, still, still, still]) == 0
    assert np.isfinite(mouth_jitter([face((0, 0, 0), eyes=0)] * 3))


def test_sharpness_is_the_variance_of_the_laplacian():
    """Blurring lowers it, and in a checkerboard of single pixels the Laplacian is 4 times the contrast, up and down."""
    board = np.indices((64, 64)).sum(axis=0) % 2 * 20
    images = np.repeat(board[None, ..., None], 3, axis=-1).astype(np.uint8)
    assert sharpness(images) == pytest.approx(80**2)
    blurred = np.stack([cv2.GaussianBlur(image, (0, 0), 1) for image in images])
    assert sharpness(blurred) < 100
    assert sharpness(np.concatenate([images, np.zeros_like(images)])) == pytest.approx(80**2 / 2)


# Mouth shapes.


def test_mouth_aspect_ratio_by_hand():
    x = face((6, 9, 3), eyes=60)
    x.landmarks[60], x.landmarks[64] = (15, 70), (39, 70)
    assert mouth_aspect_ratio(x) == pytest.approx(6 / 24)
    assert np.isnan(mouth_aspect_ratio(None))


def test_lip_leak_is_the_share_of_open_mouths():
    assert lip_leak(np.array([0.3, 0.2, np.nan, 0.24, 0.26])) == 0.5
    assert np.isnan(lip_leak(np.array([np.nan]))) and np.isnan(lip_leak(np.zeros(0)))


def test_closures_may_come_a_frame_early_or_late():
    closed, open_ = 0.001, 0.1
    truth = np.array([open_] * 3 + [closed] + [open_] * 3)
    for frame, share in ((1, 0), (2, 1), (3, 1), (4, 1), (5, 0)):
        prediction = np.full(7, open_)
        prediction[frame] = closed
        assert closures(prediction, truth) == share
    assert closures(np.full(7, np.nan), truth) == 0
    assert np.isnan(closures(truth, np.full(7, open_)))
    assert closures(np.array([closed, open_, open_, open_]), np.array([closed, closed, closed, open_])) == 2 / 3


# Intervals.


def test_a_bootstrap_interval_covers_the_true_mean_as_often_as_it_says():
    """With 20 groups of 3 equal values it is that of 20 values: it narrows with more groups, not with more copies."""
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(100):
        values = np.repeat(rng.standard_normal(20), 3)
        low, high = bootstrap_interval(values, [str(i // 3) for i in range(60)])
        hits += low < 0 < high
    assert 85 <= hits <= 99
    assert bootstrap_interval(values, [str(i // 3) for i in range(60)]) == (low, high)


def test_an_interval_needs_two_groups_with_values():
    nan = float("nan")
    assert np.isnan(bootstrap_interval([1.0, 2.0], ["a", "a"])).all()
    assert np.isnan(bootstrap_interval([1.0, nan], ["a", "b"])).all()
    assert bootstrap_interval([1.0, nan, 3.0], ["a", "b", "b"]) == (1, 3)
