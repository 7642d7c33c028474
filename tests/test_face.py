"""Following one person through made-up faces, and the detector on real clips."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from musetalk.data.face import load_face_backend
from musetalk.data.face.face import Face, area, overlap
from musetalk.data.face.tracking import MAX_GAP, SAME_PERSON_IOU, follow_person, people
from musetalk.data.video import read_frames
from musetalk.errors import UserError

CLIPS = (
    "talking_a",
    "talking_b",
    "talking_c",
    "WDA_AlexandriaOcasioCortez_000",
    "people/person_3",
    "people/person_l2",
)


def face_at(x: float, y: float = 0, size: float = 100) -> Face:
    """A face in a square box with its top left corner at x, y."""
    box = np.array([x, y, x + size, y + size], np.float32)
    return Face(box, np.zeros((68, 2), np.float32), 0.9)


# Following.


def test_without_faces_there_is_no_person():
    assert follow_person([]) == []
    assert follow_person([[], [], []]) == [None, None, None]


def test_a_single_face_is_the_person():
    faces = [face_at(k) for k in range(10)]
    assert follow_person([[face] for face in faces]) == faces


def test_the_person_is_the_larger_of_two_in_any_order():
    large, small = [face_at(k, size=120) for k in range(20)], [face_at(500 - k, size=100) for k in range(20)]
    assert follow_person([[a, b] for a, b in zip(large, small, strict=True)]) == large
    assert follow_person([[b, a] for a, b in zip(large, small, strict=True)]) == large


def test_a_large_face_seen_briefly_is_ignored():
    person = [face_at(0) for _ in range(40)]
    frames = [[face] for face in person]
    for k in range(10, 15):
        frames[k].insert(0, face_at(200, size=180))
    assert follow_person(frames) == person


def test_faces_on_the_shorter_side_of_a_cut_are_ignored():
    before, after = [face_at(0) for _ in range(10)], [face_at(400) for _ in range(11)]
    assert follow_person([[face] for face in before + after]) == [None] * 10 + after


@pytest.mark.parametrize(("missing", "same"), [(MAX_GAP - 1, True), (MAX_GAP + 1, False)])
def test_a_person_may_be_missing_for_some_frames(missing, same):
    first, second = [face_at(0) for _ in range(5)], [face_at(3) for _ in range(4)]
    found = follow_person([[f] for f in first] + [[]] * missing + [[f] for f in second])
    assert found == first + [None] * missing + (second if same else [None] * 4)


def test_people_are_ordered_from_left_to_right_in_the_first_frame_that_shows_the_most():
    left, middle, right = face_at(0, size=90), face_at(200, size=150), face_at(400)
    assert people([[middle], [right, left], [right, left, middle], [face_at(9), left, right]]) == [left, middle, right]
    assert people([]) == people([[], []]) == []


def test_a_chosen_person_is_followed_from_any_of_their_faces():
    large, small = [face_at(k, size=120) for k in range(20)], [face_at(500 - k, size=100) for k in range(20)]
    frames = [[a, b] for a, b in zip(large, small, strict=True)]
    assert follow_person(frames, large[7]) == large
    assert follow_person(frames, small[0]) == follow_person(frames, small[19]) == small


def test_people_who_pass_each_other_are_not_swapped():
    """At different heights: their boxes overlap, but each overlaps its own next box more."""
    left = [face_at(4 * k, 0, 110) for k in range(60)]
    right = [face_at(240 - 4 * k, 60, 100) for k in range(60)]
    assert max(overlap(a.box, b.box) for a, b in zip(left, right, strict=True)) > 0.1
    frames = [[a, b] if k % 2 else [b, a] for k, (a, b) in enumerate(zip(left, right, strict=True))]
    assert follow_person(frames) == left


def test_the_best_overlap_wins_over_an_earlier_face_in_the_list():
    person = [face_at(10 * k) for k in range(8)]
    frames = [[face] for face in person]
    frames[4] = [face_at(75), person[4]]
    assert follow_person(frames)[4] is person[4]


def test_a_face_with_little_overlap_is_another_person():
    edge = 100 * (1 - SAME_PERSON_IOU) / (1 + SAME_PERSON_IOU)  # where the overlap is SAME_PERSON_IOU
    for moved, same in ((edge - 1, True), (edge + 1, False)):
        found = follow_person([[face_at(0)]] * 3 + [[face_at(moved)]])
        assert (found[3] is not None) is same


# Overlap.


def test_overlap_and_area_by_hand():
    assert area(np.array([1, 2, 4, 8])) == 18 and area(np.array([4, 2, 1, 8])) == 0 == area(np.array([1, 8, 4, 2]))
    assert overlap(np.array([0, 0, 2, 2]), np.array([0, 0, 2, 2])) == 1
    assert overlap(np.array([0, 0, 2, 2]), np.array([1, 1, 3, 3])) == 1 / 7
    assert overlap(np.array([1, 1, 3, 3]), np.array([0, 0, 2, 2])) == 1 / 7
    assert overlap(np.array([0, 0, 2, 2]), np.array([2, 0, 4, 2])) == 0
    assert overlap(np.array([0, 0, 2, 2]), np.array([5, 5, 4, 4])) == 0


# The detector.


def test_an_unknown_backend_is_refused_by_name():
    with pytest.raises(UserError, match="'mediapipe', 'dwpose', 'mmpose', not 'eyes'"):
        load_face_backend("eyes", Path(), "cpu")


@pytest.fixture(scope="module")
def real_frames(clips) -> list[np.ndarray]:
    """Two frames of each clip, of several sizes."""
    return [frame for name in CLIPS for frame in islice(read_frames(clips / f"{name}.mp4", 0, 41), 0, 41, 40)]


@pytest.fixture(scope="module")
def real_faces(real_frames, face_backend) -> list[list[Face]]:
    return face_backend.detect(real_frames)


def values_of(faces: list[list[Face]]) -> list[list[tuple]]:
    """Faces as values that can be compared."""
    return [[(face.box.tolist(), face.landmarks.tolist(), face.score) for face in frame] for frame in faces]


def test_each_real_frame_has_one_face(real_faces):
    assert [len(faces) for faces in real_faces] == [1] * len(real_faces)


def test_landmarks_are_in_the_order_of_dlib(real_faces, real_frames):
    for (face,), frame in zip(real_faces, real_frames, strict=True):
        points = face.landmarks
        assert points.shape == (68, 2) and points.dtype == face.box.dtype == np.float32 and 0.5 <= face.score <= 1
        x, y = points.T
        assert points.min() > -50 and (x.max(), y.max()) < (frame.shape[1] + 50, frame.shape[0] + 50)
        assert y[17:27].max() < y[31:36].min()  # brows, nose base
        assert y[36:48].max() < y[33] < y[48:68].min() < y[8]  # eyes, nose base, lips, chin
        assert y[36:48].mean() < y[27:31].mean() < y[33] and y[28] < y[29] < y[30]  # eyes, bridge of the nose
        assert x[0] < x[36] < x[39] < x[42] < x[45] < x[16]  # jaw, corners of the eyes, jaw
        assert x[0] < x[8] < x[16] and x[4] < x[8] < x[12] and x[48] < x[51] < x[54]  # jaw and lips
        assert y[61] <= y[67] + 1 and y[62] <= y[66] + 1 and y[63] <= y[65] + 1  # inner lips
        assert y[50] < y[58] and y[51] < y[57] and y[52] < y[56]  # outer lips
        left, top, right, bottom = face.box
        assert left < x[30] < right and top < y[30] < bottom
        inside = (x > left - 0.2 * (right - left)) & (x < right + 0.2 * (right - left))
        assert inside.mean() > 0.9


def test_point_29_is_at_two_thirds_of_the_bridge_of_the_nose_as_in_dlib(real_faces):
    """MuseTalk's crop is halved at this point."""
    share = [
        (f.landmarks[29, 1] - f.landmarks[27, 1]) / (f.landmarks[30, 1] - f.landmarks[27, 1]) for (f,) in real_faces
    ]
    assert abs(np.mean(share) - 2 / 3) < 0.04


def test_faces_do_not_depend_on_earlier_frames(real_frames, real_faces, face_backend):
    alone = [face_backend.detect([frame])[0] for frame in real_frames[:4]]
    assert values_of(alone) == values_of(real_faces[:4])
    order = [3, 0, 7, 3, 1, 10]
    faces = face_backend.detect([real_frames[i] for i in order])
    assert values_of(faces) == values_of([real_faces[i] for i in order])


def test_landmarks_move_with_the_picture(real_frames, real_faces, face_backend):
    frame, (face,) = real_frames[0], real_faces[0]
    height, width = frame.shape[:2]
    canvas = np.zeros((height + 100, width + 140, 3), np.uint8)
    canvas[60 : 60 + height, 100 : 100 + width] = frame
    (moved,) = face_backend.detect([canvas])[0]
    eyes = np.linalg.norm(face.landmarks[45] - face.landmarks[36])
    assert np.abs(moved.landmarks - face.landmarks - (100, 60)).max() < 0.15 * eyes


def test_two_people_side_by_side_are_both_detected(real_frames, face_backend):
    a, b = (np.ascontiguousarray(real_frames[i][:500, :500]) for i in (8, 10))
    found = face_backend.detect([np.hstack([a, b])])[0]
    assert sorted(face.box[0] > 450 for face in found) == [False, True]


def test_frames_without_people_have_no_faces(face_backend):
    noise = np.random.default_rng(0).integers(256, size=(120, 160, 3), dtype=np.uint8)
    blank = [np.zeros((96, 128, 3), np.uint8), np.full((300, 200, 3), 128, np.uint8), noise, noise[:8, :8].copy()]
    assert face_backend.detect(blank) == [[], [], [], []]
    assert face_backend.detect([]) == []
