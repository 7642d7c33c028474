"""Following one person through planted faces, and the detector on real clips."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from musetalk.data.face import load_face_backend
from musetalk.data.face.face import Face, area, overlap
from musetalk.data.face.tracking import MAX_GAP, SAME_PERSON_IOU, follow_person
from musetalk.data.video import read_frames
from musetalk.errors import UserError

ABROAD = (
    "talking_a",
    "talking_b",
    "talking_c",
    "WDA_AlexandriaOcasioCortez_000",
    "people/person_3",
    "people/person_l2",
)


def planted(x: float, y: float = 0, size: float = 100, score: float = 0.9) -> Face:
    """A face in a square box whose corner is at x, y."""
    box = np.array([x, y, x + size, y + size], np.float32)
    return Face(box, np.zeros((68, 2), np.float32), score)


# Following.


def test_no_frame_and_no_face_give_nobody():
    assert follow_person([]) == []
    assert follow_person([[], [], []]) == [None, None, None]


def test_a_lone_face_is_the_person():
    faces = [planted(k) for k in range(10)]
    assert follow_person([[face] for face in faces]) == faces


def test_the_person_is_the_larger_of_two_whatever_their_order():
    large, small = [planted(k, size=120) for k in range(20)], [planted(500 - k, size=100) for k in range(20)]
    assert follow_person([[a, b] for a, b in zip(large, small, strict=True)]) == large
    assert follow_person([[b, a] for a, b in zip(large, small, strict=True)]) == large


def test_a_large_but_brief_passer_by_is_left_out():
    person = [planted(0) for _ in range(40)]
    frames = [[face] for face in person]
    for k in range(10, 15):
        frames[k].insert(0, planted(200, size=180))
    assert follow_person(frames) == person


def test_what_is_shown_before_a_cut_is_another_person():
    before, after = [planted(0) for _ in range(10)], [planted(400) for _ in range(11)]
    assert follow_person([[face] for face in before + after]) == [None] * 10 + after


@pytest.mark.parametrize(("unseen", "same"), [(1, True), (MAX_GAP - 1, True), (MAX_GAP + 1, False)])
def test_a_person_may_be_unseen_for_a_while(unseen, same):
    first, second = [planted(0) for _ in range(5)], [planted(3) for _ in range(4)]
    found = follow_person([[f] for f in first] + [[]] * unseen + [[f] for f in second])
    assert found == first + [None] * unseen + (second if same else [None] * 4)


def test_two_people_who_cross_do_not_swap():
    """They pass at different heights: their boxes overlap, but each overlaps itself more."""
    left = [planted(4 * k, 0, 110) for k in range(60)]
    right = [planted(240 - 4 * k, 60, 100) for k in range(60)]
    assert max(overlap(a.box, b.box) for a, b in zip(left, right, strict=True)) > 0.1
    assert (
        follow_person([[a, b] if k % 2 else [b, a] for k, (a, b) in enumerate(zip(left, right, strict=True))]) == left
    )


def test_the_best_overlap_wins_over_an_earlier_one():
    """Somebody whose box is close enough to be taken comes first in the list."""
    person = [planted(10 * k) for k in range(8)]
    frames = [[face] for face in person]
    frames[4] = [planted(75), person[4]]
    assert follow_person(frames)[4] is person[4]


def test_a_face_that_barely_overlaps_the_last_one_is_somebody_else():
    edge = 100 * (1 - SAME_PERSON_IOU) / (1 + SAME_PERSON_IOU)  # there the overlap is just that
    for moved, same in ((edge - 1, True), (edge + 1, False)):
        found = follow_person([[planted(0)]] * 3 + [[planted(moved)]])
        assert (found[3] is not None) is same


people = st.lists(  # for each person: place, size, and in which of 12 frames it is seen
    st.tuples(st.integers(0, 4), st.integers(50, 90), st.lists(st.booleans(), min_size=12, max_size=12)),
    min_size=1,
    max_size=4,
    unique_by=(lambda person: person[0], lambda person: person[1]),
)


@given(people=people, seed=st.integers(0, 99))
def test_people_far_apart_are_kept_apart_in_any_order(people, seed):
    rng = np.random.default_rng(seed)
    tracks = [[planted(200 * place, size=size) if k else None for k in seen] for place, size, seen in people]
    frames = [[face for face in faces if face is not None] for faces in zip(*tracks, strict=True)]
    sums = [sum(area(face.box) for face in track if face is not None) for track in tracks]
    found = follow_person([[faces[i] for i in rng.permutation(len(faces))] for faces in frames])
    if max(sums) == 0:
        assert found == [None] * 12
    else:
        assert found in [track for track, size in zip(tracks, sums, strict=True) if size == max(sums)]


# Overlap.

coordinates = st.floats(-1000, 1000, allow_nan=False, width=32)
boxes = st.tuples(coordinates, coordinates, coordinates, coordinates).map(lambda b: np.array(b, np.float32))


@given(a=boxes, b=boxes)
def test_overlap_is_symmetric_and_a_share(a, b):
    assert 0 <= overlap(a, b) <= 1 + 1e-6
    assert overlap(a, b) == overlap(b, a)


@given(a=boxes)
def test_a_box_overlaps_itself_wholly_unless_it_is_empty(a):
    assert overlap(a, a) == (1 if area(a) > 0 else 0)


def test_overlap_and_area_by_hand():
    assert area(np.array([1, 2, 4, 8])) == 18 and area(np.array([4, 2, 1, 8])) == 0 == area(np.array([1, 8, 4, 2]))
    assert overlap(np.array([0, 0, 2, 2]), np.array([1, 1, 3, 3])) == 1 / 7
    assert overlap(np.array([0, 0, 2, 2]), np.array([2, 0, 4, 2])) == 0
    assert overlap(np.array([0, 0, 2, 2]), np.array([5, 5, 4, 4])) == 0


# The detector.


def test_an_unknown_backend_is_named():
    with pytest.raises(UserError, match="'mediapipe', 'dwpose', 'mmpose', not 'eyes'"):
        load_face_backend("eyes", Path(), "cpu")


@pytest.fixture(scope="module")
def real_frames(clips) -> list[np.ndarray]:
    """Two frames of each of some clips, of several sizes."""
    return [frame for name in ABROAD for frame in islice(read_frames(clips / f"{name}.mp4", 0, 41), 0, 41, 40)]


@pytest.fixture(scope="module")
def real_faces(real_frames, face_backend) -> list[list[Face]]:
    return face_backend.detect(real_frames)


def same(one: list[list[Face]], other: list[list[Face]]) -> bool:
    return [len(faces) for faces in one] == [len(faces) for faces in other] and all(
        np.array_equal(a.box, b.box) and np.array_equal(a.landmarks, b.landmarks) and a.score == b.score
        for pair in zip(one, other, strict=True)
        for a, b in zip(*pair, strict=True)
    )


def test_one_face_is_found_in_each_real_frame(real_faces):
    assert [len(faces) for faces in real_faces] == [1] * len(real_faces)


def test_a_face_has_its_parts_where_faces_have_them(real_faces, real_frames):
    for (face,), frame in zip(real_faces, real_frames, strict=True):
        points = face.landmarks
        assert points.shape == (68, 2) and points.dtype == face.box.dtype == np.float32 and 0.5 <= face.score <= 1
        x, y = points.T
        assert points.min() > -50 and (x.max(), y.max()) < (frame.shape[1] + 50, frame.shape[0] + 50)
        assert y[17:27].max() < y[31:36].min()  # brows, nose base
        assert y[36:48].max() < y[33] < y[48:68].min() < y[8]  # eyes, nose base, lips, chin
        assert y[36:48].mean() < y[27:31].mean() < y[33]
        assert y[36:48].mean() < y[29] < y[33] and y[28] < y[29] < y[30]  # the point that halves the crop
        assert x[36] < x[39] < x[42] < x[45]  # the corners of the eyes
        assert x[0] < x[8] < x[16] and x[4] < x[8] < x[12] and x[48] < x[51] < x[54]  # jaw and lips
        assert x[0] < x[36] and x[45] < x[16]
        assert y[61] <= y[67] + 1 and y[62] <= y[66] + 1 and y[63] <= y[65] + 1  # inner lips
        assert y[50] < y[58] and y[51] < y[57] and y[52] < y[56]  # outer lips
        left, top, right, bottom = face.box
        assert left < x[30] < right and top < y[30] < bottom
        inside = (x > left - 0.2 * (right - left)) & (x < right + 0.2 * (right - left))
        assert inside.mean() > 0.9


def test_point_29_is_as_low_on_the_nose_as_musetalk_takes_it(real_faces):
    """Of the way from the root of the nose to its tip, dlib's points lie at thirds."""
    share = [
        (f.landmarks[29, 1] - f.landmarks[27, 1]) / (f.landmarks[30, 1] - f.landmarks[27, 1]) for (f,) in real_faces
    ]
    assert abs(np.mean(share) - 2 / 3) < 0.04


def test_a_frame_gives_the_same_faces_whatever_came_before_it(real_frames, real_faces, face_backend):
    alone = [face_backend.detect([frame])[0] for frame in real_frames[:4]]
    assert same(alone, real_faces[:4])
    order = [3, 0, 7, 3, 1, 10]
    assert same(face_backend.detect([real_frames[i] for i in order]), [real_faces[i] for i in order])
    other = load_face_backend("mediapipe", Path(), "cpu").detect(real_frames[2:4])
    assert same(other, real_faces[2:4])


def test_a_moved_picture_moves_its_face(real_frames, real_faces, face_backend):
    frame, (face,) = real_frames[0], real_faces[0]
    height, width = frame.shape[:2]
    canvas = np.zeros((height + 100, width + 140, 3), np.uint8)
    canvas[60 : 60 + height, 100 : 100 + width] = frame
    (moved,) = face_backend.detect([canvas])[0]
    eyes = np.linalg.norm(face.landmarks[45] - face.landmarks[36])
    assert np.abs(moved.landmarks - face.landmarks - (100, 60)).max() < 0.15 * eyes


def test_two_people_beside_each_other_are_both_found(real_frames, face_backend):
    a, b = (np.ascontiguousarray(real_frames[i][:500, :500]) for i in (8, 10))
    found = face_backend.detect([np.hstack([a, b])])[0]
    assert sorted(face.box[0] > 450 for face in found) == [False, True]


def test_nothing_is_found_where_nobody_is(face_backend):
    noise = np.random.default_rng(0).integers(256, size=(120, 160, 3), dtype=np.uint8)
    blank = [np.zeros((96, 128, 3), np.uint8), np.full((300, 200, 3), 128, np.uint8), noise, noise[:8, :8].copy()]
    assert face_backend.detect(blank) == [[], [], [], []]
    assert face_backend.detect([]) == []
