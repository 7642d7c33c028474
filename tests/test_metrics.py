"""Figures about a generated video, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from musetalk.face import Face
from musetalk.metrics import correlation, mouth_opening, mouth_openings


def face(gaps: tuple[float, float, float], eyes: float, shift: float = 0, box: tuple = (0, 0, 100, 100)) -> Face:
    """A face whose inner lips are so far apart at their three pairs, and so far its outer eye corners."""
    points = np.zeros((68, 2), np.float32)
    points[36], points[45] = (10, 20), (10 + eyes, 20)
    for x, gap, up, low in zip((20, 30, 40), gaps, (61, 62, 63), (67, 66, 65), strict=True):
        points[up], points[low] = (x, 70), (x, 70 + gap)
    return Face(np.array(box, np.float32), points + np.float32(shift), 0.9)


def test_mouth_opening_by_hand():
    assert mouth_opening(face((6, 9, 3), eyes=60)) == pytest.approx(0.1)
    assert mouth_opening(face((0, 0, 0), eyes=60)) == 0


def test_mouth_opening_depends_on_neither_place_nor_size_nor_tilt():
    one = face((6, 9, 3), eyes=60)
    turn = np.array([[0.8, -0.6], [0.6, 0.8]], np.float32)
    other = Face(one.box, 3.5 * one.landmarks @ turn + 11, one.score)
    assert mouth_opening(other) == pytest.approx(mouth_opening(one), rel=1e-5)


def test_no_face_has_no_opening_and_eyes_in_one_place_are_no_error():
    assert np.isnan(mouth_opening(None))
    assert np.isfinite(mouth_opening(face((1, 1, 1), eyes=0)))


def test_openings_follow_one_person_through_the_frames():
    """A smaller face beside the person, and a frame with nobody in it."""
    small = face((50, 50, 50), eyes=10, box=(300, 0, 320, 20))

    class Planted:
        def detect(self, frames):
            return [[] if frame[0, 0, 0] == 2 else [small, face((k := frame[0, 0, 0], k, k), 50)] for frame in frames]

    frames = [np.full((4, 4, 3), k, np.uint8) for k in range(60)]
    found = mouth_openings(frames, Planted())
    assert found.shape == (60,) and np.isnan(found[2])
    np.testing.assert_allclose(np.delete(found, 2), np.delete(np.arange(60), 2) / 50, rtol=1e-5)


def test_correlation_by_hand():
    a = np.array([1.0, 2, 3, 4])
    assert correlation(a, 5 * a - 3) == pytest.approx(1)
    assert correlation(a, -a) == pytest.approx(-1)
    assert correlation(np.array([1.0, 2, 3]), np.array([1.0, 3, 2])) == pytest.approx(0.5)


def test_correlation_leaves_out_what_either_series_does_not_know():
    a = np.array([1, np.nan, 3, 4, 9, np.inf, 5])
    b = np.array([2, 7, np.nan, 8, 18, 1, 10])
    assert correlation(a, b) == pytest.approx(1)


def test_correlation_is_over_the_common_length():
    assert correlation(np.array([1.0, 2, 3, -90]), np.array([2.0, 4, 6])) == pytest.approx(1)
    assert correlation(np.array([2.0, 4, 6]), np.array([1.0, 2, 3, -90])) == pytest.approx(1)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("a", [[], [1.0], [np.nan, np.nan, np.nan], [2.0, 2.0, 2.0]])
def test_correlation_of_what_tells_nothing_is_nan(a):
    assert np.isnan(correlation(np.array(a), np.array([1.0, 2.0, 3.0])))
