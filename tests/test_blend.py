"""Masks from landmarks and class maps, blended frames against MuseTalk's, and the pipeline's blending."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import get_args

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_crop import FRAME, frame_of, head

from musetalk.contract import IMAGE_SIZE, RIGID
from musetalk.data.crop import face_box, paste_back
from musetalk.data.video import read_frames
from musetalk.errors import UserError
from musetalk.images import to_tensor
from musetalk.inference.blend import (
    FEATHER,
    RECIPES,
    Blend,
    crop_square,
    face_alpha,
    face_square,
    grow_jaw,
    parsed_alpha,
)
from musetalk.inference.pipeline import LipSyncPipeline
from musetalk.models.face_parser import CLASSES, INPUT_SIZE, BiSeNet, load_face_parser
from musetalk.models.unet import build_unet
from musetalk.models.vae import load_vae
from musetalk.models.weights import WeightsError
from musetalk.training.checkpoint import save_unet
from tools.draw_blend import draw_classes

BOX = np.array([100, 40, 376, 382], np.int32)  # its square is as wide as the class map, 512 pixels
LEFT, TOP = 118, 85  # of the box, within the square
MIDDLE, BOTTOM = 256, 427
RADIUS = 12  # half of 5 % of 512


def draw(width: int = 110, height: int = 140, mouth: int = 330) -> np.ndarray:
    """A class map (512, 512) of a face: an ellipse with these half axes and a mouth at this row."""
    classes = np.zeros((INPUT_SIZE, INPUT_SIZE), np.uint8)
    cv2.rectangle(classes, (190, MIDDLE), (322, INPUT_SIZE), CLASSES.index("neck"), -1)
    cv2.ellipse(classes, (MIDDLE, MIDDLE), (width, height), 0, 0, 360, CLASSES.index("skin"), -1)
    cv2.rectangle(classes, (MIDDLE - width, 100), (MIDDLE - width + 40, 330), CLASSES.index("hair"), -1)
    cv2.rectangle(classes, (MIDDLE - 25, 190), (MIDDLE + 25, 290), CLASSES.index("nose"), -1)
    for name, rows in ("upper_lip", (-12, -5)), ("mouth", (-4, 4)), ("lower_lip", (5, 12)):
        cv2.rectangle(classes, (216, mouth + rows[0]), (296, mouth + rows[1]), CLASSES.index(name), -1)
    return classes


# Masks from landmarks.


@pytest.mark.parametrize("recipe", ["nose_centred", "rigid"])
@pytest.mark.parametrize("eyes", [24, 32, 61, 90])
@pytest.mark.parametrize("margin", [0, 10])
@pytest.mark.parametrize("jaw", [0, 0.2])
def test_alpha_covers_mouth_and_chin_and_fades_at_the_sides(recipe, eyes, margin, jaw):
    """The chin is covered even if the box ends there; otherwise a moved chin would be visible twice."""
    points = head(eyes=eyes, jaw=jaw)
    box = face_box(points, FRAME, 0, margin, recipe)
    alpha = face_alpha(points, box)
    assert alpha.dtype == np.float32 and alpha.shape == (box[3] - box[1], box[2] - box[0])
    assert alpha.min() >= 0 and alpha.max() <= 1
    for x, y in np.round(points[48:68] - box[:2]).astype(int):
        assert alpha[y, x] == 1
    x, y = np.round(points[8] - box[:2]).astype(int)
    assert alpha[min(y, len(alpha) - 1), x] >= 0.9
    assert (alpha[[0]] == 0).all() and (alpha[:, [0, -1]] == 0).all()


def test_alpha_is_zero_in_the_upper_half_except_for_the_feather():
    points = head()
    box = face_box(points, FRAME)
    alpha = face_alpha(points, box)
    height, width = alpha.shape
    radius = round(FEATHER * width)
    assert (alpha[: height // 2 - radius] == 0).all()
    assert alpha[height // 2 + radius :].max() == 1


def test_alpha_of_a_face_at_the_edge_of_the_frame_fades_at_the_side():
    points = head(x=20, y=400)
    box = face_box(points, FRAME)
    assert box[0] == 0 and box[3] == FRAME[0]
    assert (face_alpha(points, box)[:, [0, -1]] == 0).all()


def test_the_feather_ends_below_the_chin():
    points = head()
    box = face_box(points, FRAME, crop="rigid")
    alpha = face_alpha(points, box)
    x, y = np.round(points[8] - box[:2]).astype(int)
    radius = round(FEATHER * alpha.shape[1])
    column = alpha[y:, x]
    assert len(column) > 2 * radius + 1 and (np.diff(column) <= 0).all() and (column[2 * radius + 1 :] == 0).all()


# The input of the face parser.


@pytest.mark.parametrize(
    ("box", "blend", "square"),
    [
        (BOX, "raw", (-18, -45, 512)),  # 342 // 2 * 1.5 = 256.5 around (238, 211)
        ((0, 0, 100, 60), "jaw", (-25, -45, 150)),
        ((10, 20, 111, 120), "raw", (-15, -5, 150)),  # 101 // 2 * 1.5 = 75
        ((10, 20, 111, 120), "musetalk_v1", (0, 10, 120)),
    ],
)
def test_face_square_by_hand(box, blend, square):
    assert face_square(np.array(box), blend) == square


@pytest.mark.parametrize("blend", RECIPES)
@given(x=st.integers(0, 607), y=st.integers(0, 447), width=st.integers(32, 640), height=st.integers(32, 480))
def test_the_square_contains_the_box_and_is_black_outside_the_frame(blend, x, y, width, height):
    frame = frame_of(1) | 1
    box = np.array([x, y, min(x + width, FRAME[1]), min(y + height, FRAME[0])], np.int32)
    left, top, side = face_square(box, blend)
    square = crop_square(frame, box, blend)
    assert square.shape == (side, side, 3) and square.dtype == np.uint8
    inside = square[box[1] - top : box[3] - top, box[0] - left : box[2] - left]
    assert np.array_equal(inside, frame[box[1] : box[3], box[0] : box[2]])
    rows, columns = np.arange(side) + top, np.arange(side) + left
    in_frame = ((rows >= 0) & (rows < FRAME[0]))[:, None] & ((columns >= 0) & (columns < FRAME[1]))
    assert np.array_equal(square.all(axis=-1), in_frame)


# Masks from a face parser.


def official_frame(frame: np.ndarray, face: np.ndarray, box: np.ndarray, classes: np.ndarray, blend: str) -> np.ndarray:
    """The blended frame of MuseTalk's program, computed on the whole square with Pillow."""
    expand, blur = (1.2, 0.1) if blend == "musetalk_v1" else (1.5, 0.05)
    x1, y1, x2, y2 = (int(value) for value in box)
    half = int(max(x2 - x1, y2 - y1) // 2 * expand)
    left, top, side = (x1 + x2) // 2 - half, (y1 + y2) // 2 - half, 2 * half
    x1, y1, x2, y2 = x1 - left, y1 - top, x2 - left, y2 - top  # in the square

    if blend == "musetalk_v1":
        visible = (classes > 0) & (classes < 14)
    elif blend == "raw":
        visible = (classes == 1) | (classes == 11) | (classes == 12) | (classes == 13)
    else:
        reach = np.concatenate([np.full(10, -1), np.arange(11), np.full(12, 10)])  # of each row of the kernel
        kernel = np.uint8([[abs(column - 16) <= width for column in range(33)] for width in reach])
        grown = cv2.dilate(np.uint8(classes == 1), kernel)
        cheeks = cv2.erode(grown, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (35, 3)), iterations=2)
        columns = np.arange(512)
        skin = np.where((columns <= 166) | (columns >= 346), cheeks, grown).astype(bool)
        visible = (skin & (classes != 10)) | (classes == 11) | (classes == 12) | (classes == 13)
    whole = np.array(Image.fromarray(np.uint8(visible) * 255).resize((side, side)))

    mask = np.zeros((side, side), np.uint8)
    mask[max(side // 2, y1) : y2, x1:x2] = whole[max(side // 2, y1) : y2, x1:x2]
    kernel_size = int(blur * side // 2 * 2) + 1
    mask = cv2.GaussianBlur(mask, (kernel_size, kernel_size), 0)

    whole_frame = Image.fromarray(frame)
    square = whole_frame.crop((left, top, left + side, top + side))
    square.paste(Image.fromarray(cv2.resize(face, (x2 - x1, y2 - y1))), (x1, y1))
    whole_frame.paste(square, (left, top), Image.fromarray(mask))
    return np.array(whole_frame)


@pytest.mark.parametrize("blend", RECIPES)
@given(
    seed=st.integers(0, 2**32 - 1),
    cells=st.integers(1, 64),
    corner=st.tuples(st.integers(0, 600), st.integers(0, 440)),
    size=st.tuples(st.integers(32, 640), st.integers(32, 480)),
)
def test_blended_frames_are_those_of_the_official_program(blend, seed, cells, corner, size):
    random = np.random.default_rng(seed)
    coarse = random.integers(len(CLASSES), size=(cells, cells), dtype=np.uint8)
    classes = cv2.resize(coarse, (INPUT_SIZE, INPUT_SIZE), interpolation=cv2.INTER_NEAREST)
    frame, face = frame_of(2), random.integers(256, size=(IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    box = np.minimum([*corner, *np.add(corner, size)], [*FRAME[1::-1]] * 2)  # some at an edge of the frame
    expected = official_frame(frame, face, box, classes, blend)
    blended = paste_back(frame, face, box, parsed_alpha(classes, box, blend))
    assert np.abs(blended.astype(int) - expected).max() <= 1


def test_raw_masks_skin_and_mouth_only():
    """Alpha is 1 or 0 where the distance from a boundary exceeds the width of the feather."""
    classes = draw()
    alpha = parsed_alpha(classes, BOX, "raw")
    visible = np.isin(classes, [CLASSES.index(name) for name in ("skin", "mouth", "upper_lip", "lower_lip")])
    visible[:MIDDLE] = False
    visible = visible[TOP:BOTTOM, LEFT : LEFT + 276].astype(np.uint8)
    reach = np.ones((2 * RADIUS + 1,) * 2, np.uint8)
    assert (alpha[cv2.dilate(visible, reach) == 0] == 0).all()
    np.testing.assert_allclose(alpha[cv2.erode(visible, reach) == 1], 1, atol=1e-6)
    for x, y in ((256, 322), (256, 330), (256, 338), (256, 370)):  # upper lip, mouth, lower lip, chin
        assert alpha[y - TOP, x - LEFT] == pytest.approx(1)
    for x, y in ((256, 270), (256, 414), (160, 290), (380, 400)):  # nose, neck, hair, background
        assert alpha[y - TOP, x - LEFT] == 0


def test_grow_jaw_dilates_by_a_peg_that_points_down():
    skin = np.zeros((INPUT_SIZE, INPUT_SIZE), bool)
    skin[300, 256] = True
    grown = grow_jaw(skin)
    assert np.flatnonzero(grown.any(axis=1)).tolist() == [*range(284, 307)]  # 16 up, 6 down
    assert grown.sum(axis=1)[284:307].tolist() == [21] * 13 + [19, 17, 15, 13, 11, 9, 7, 5, 3, 1]
    assert (grown == grown[:, ::-1][:, [-1, *range(INPUT_SIZE - 1)]]).all()  # the same on both sides of column 256


def test_the_cheeks_are_eroded_from_90_pixels_off_the_middle():
    skin = np.zeros((INPUT_SIZE, INPUT_SIZE), bool)
    skin[200:300] = True  # grown: 184 .. 305
    grown = grow_jaw(skin)
    for columns, first, last in ((slice(0, 167), 186, 303), (slice(167, 346), 184, 305), (slice(346, 512), 186, 303)):
        rows = np.zeros(INPUT_SIZE, bool)
        rows[first : last + 1] = True
        assert (grown[:, columns] == rows[:, None]).all()
    skin[:] = False
    skin[200:300, 20:151] = True  # grown: 10 .. 160; twice 17 pixels less on both sides
    assert np.flatnonzero(grow_jaw(skin)[250]).tolist() == [*range(44, 127)]


def test_jaw_extends_below_the_chin_and_shrinks_at_the_cheeks():
    classes = draw()
    raw, jaw = (parsed_alpha(classes, BOX, blend) for blend in ("raw", "jaw"))
    chin = [np.flatnonzero(alpha[:, MIDDLE - LEFT] > 0.5).max() + TOP for alpha in (raw, jaw)]
    assert 395 <= chin[0] <= 397 and 3 <= chin[1] - chin[0] <= 6
    row = 290 - TOP
    assert np.flatnonzero(jaw[row] > 0.5).max() <= np.flatnonzero(raw[row] > 0.5).max() - 10
    assert (jaw[: 290 - RADIUS - TOP, MIDDLE - 12 - LEFT : MIDDLE + 12 - LEFT] == 0).all()  # the nose stays


@pytest.mark.parametrize("blend", ["raw", "jaw"])
@given(width=st.integers(80, 130), height=st.integers(125, 170), mouth=st.integers(320, 345))
def test_the_feather_falls_monotonically_below_and_above_the_mouth(blend, width, height, mouth):
    column = parsed_alpha(draw(width, height, mouth), BOX, blend)[:, MIDDLE - LEFT]
    assert column[mouth - TOP] == 1
    assert (np.diff(column[: mouth - TOP]) >= -1e-6).all()
    assert (np.diff(column[mouth - TOP :]) <= 1e-6).all()
    assert (column[: 290 - RADIUS - TOP] == 0).all()
    soft = np.flatnonzero((column > 0.02) & (column < 0.98))
    assert 10 < len(soft) < 4 * RADIUS  # no step, above or below


@pytest.mark.parametrize("blend", ["raw", "jaw"])
@pytest.mark.parametrize("recipe", ["nose_centred", "rigid"])
@pytest.mark.parametrize("eyes", [30, 61, 90])
def test_the_mouth_is_masked_at_any_position_and_size(blend, recipe, eyes):
    points = head(eyes=eyes)
    box = face_box(points, FRAME, 0, 10, recipe)
    alpha = parsed_alpha(draw_classes(points, box), box, blend)
    for x, y in np.round(points[48:68] - box[:2]).astype(int):
        assert alpha[y, x] > 0.99
    x, y = np.round(points[30] - box[:2]).astype(int)
    assert alpha[y, x] < 0.1  # the tip of the nose


# In the pipeline.


@pytest.fixture(scope="module")
def models_with_parser(mini, tmp_path_factory) -> Path:
    """The small networks and a face parser with random weights, whose classes include skin."""
    folder = tmp_path_factory.mktemp("models")
    for part in mini.iterdir():
        (folder / part.name).symlink_to(part)
    (folder / "face-parse-bisent").mkdir()
    torch.manual_seed(0)
    torch.save(BiSeNet().state_dict(), folder / "face-parse-bisent" / "79999_iter.pth")
    return folder


@pytest.fixture(scope="module")
def checkpoint(mini, tmp_path_factory) -> Path:
    contract = replace(RIGID, vae=load_vae(mini, torch.device("cpu"), torch.float32).fingerprint)
    unet = build_unet(mini, 0, contract.positional_encoding)
    return save_unet(tmp_path_factory.mktemp("unet"), 1, unet.model.state_dict(), contract)


@pytest.fixture(scope="module")
def features() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(40, 5, 64)).astype(np.float16)


@pytest.mark.parametrize("blend", ["jaw", "musetalk_v1"])
def test_the_pipeline_blends_by_the_classes_of_its_parser(blend, models_with_parser, checkpoint, features, small_clips):
    video = small_clips / "sample_00.mp4"
    pipeline = LipSyncPipeline.from_checkpoint(checkpoint, models_with_parser, blend=blend)
    prepared = pipeline.prepare(video)
    assert "face_parser" not in vars(pipeline)  # loaded on first use
    parser = load_face_parser(models_with_parser, torch.device("cpu"))
    output = pipeline.frames(prepared, features, 3)
    for frame, blended, box in zip(islice(read_frames(video), 3), output, prepared.boxes[:3], strict=True):
        x1, y1, x2, y2 = box
        classes = parser(to_tensor(crop_square(frame, box, blend)[None]))[0].numpy()
        alpha = np.zeros(frame.shape[:2], np.float32)
        alpha[y1:y2, x1:x2] = parsed_alpha(classes, box, blend)
        assert (alpha > 0.9).sum() > 100 and (alpha[y1:y2, x1:x2] == 0).sum() > 100
        assert np.array_equal(blended[alpha == 0], frame[alpha == 0])
        assert (blended[alpha > 0.9] != frame[alpha > 0.9]).mean() > 0.9


def test_landmarks_are_the_default_and_need_no_parser(mini, checkpoint, features, small_clips):
    pipeline = LipSyncPipeline.from_checkpoint(checkpoint, mini)
    assert pipeline.blend == "landmarks"
    prepared = pipeline.prepare(small_clips / "sample_00.mp4")
    frame = next(read_frames(small_clips / "sample_00.mp4"))
    face, box = prepared.faces[0], prepared.boxes[0]
    assert np.array_equal(pipeline.alpha(frame, face, box), face_alpha(face.landmarks, box))
    assert next(pipeline.frames(prepared, features, 1)).shape == frame.shape
    assert "face_parser" not in vars(pipeline)


def test_unknown_blends_and_missing_parsers_are_refused(mini, checkpoint):
    assert get_args(Blend) == ("landmarks", *RECIPES)
    with pytest.raises(UserError, match="^blend must be .* not 'neck'$"):
        LipSyncPipeline.from_checkpoint(checkpoint, mini, blend="neck")
    with pytest.raises(WeightsError, match="face-parse-bisent/79999_iter.pth"):
        LipSyncPipeline.from_checkpoint(checkpoint, mini, blend="jaw")
