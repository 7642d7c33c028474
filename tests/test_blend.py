"""Masks from landmarks and from class maps, blended frames against those of MuseTalk, and blending in the pipeline."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

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
from musetalk.data.video import read_frames, write_video
from musetalk.images import to_tensor
from musetalk.inference.blend import (
    RECIPES,
    crop_square,
    face_alpha,
    face_square,
    parsed_alpha,
    unpack_alpha,
)
from musetalk.inference.pipeline import LipSyncPipeline
from musetalk.models.face_parser import CLASSES, INPUT_SIZE, BiSeNet, load_face_parser
from musetalk.models.unet import build_unet
from musetalk.models.vae import load_vae
from musetalk.training.checkpoint import save_unet

# Masks from landmarks.


@pytest.mark.parametrize("recipe", ["nose_centred", "rigid"])
@pytest.mark.parametrize(("eyes", "jaw"), [(24, 0.2), (90, 0)])
def test_alpha_covers_mouth_and_chin_and_fades_at_the_other_edges(recipe, eyes, jaw):
    """The chin is covered even where the box ends: otherwise the chin of the source would show beside the new one."""
    points = head(eyes=eyes, jaw=jaw)
    box = face_box(points, FRAME, 0, 10, recipe)
    alpha = face_alpha(points, box)
    assert alpha.dtype == np.float32 and alpha.shape == (box[3] - box[1], box[2] - box[0])
    assert alpha.min() >= 0 and alpha.max() <= 1
    for x, y in np.round(points[48:68] - box[:2]).astype(int):
        assert alpha[y, x] == 1
    x, y = np.round(points[8] - box[:2]).astype(int)
    assert alpha[min(y, len(alpha) - 1), x] >= 0.9
    assert (alpha[: len(alpha) // 3] == 0).all() and (alpha[:, [0, -1]] == 0).all()


def test_alpha_falls_monotonically_to_zero_below_the_chin():
    points = head()
    box = face_box(points, FRAME, crop="rigid")
    x, y = np.round(points[8] - box[:2]).astype(int)
    column = face_alpha(points, box)[y:, x]
    assert (np.diff(column) <= 0).all() and column[0] >= 0.9 and column[-1] == 0


# The input of the face parser.


@pytest.mark.parametrize(
    ("box", "blend", "square"),
    [
        ((100, 40, 376, 382), "raw", (-18, -45, 512)),  # 342 // 2 * 1.5 = 256.5 around (238, 211)
        ((0, 0, 100, 60), "jaw", (-25, -45, 150)),
        ((10, 20, 111, 120), "raw", (-15, -5, 150)),  # 101 // 2 * 1.5 = 75
        ((10, 20, 111, 120), "musetalk_v1", (0, 10, 120)),
    ],
)
def test_face_square_by_hand(box, blend, square):
    assert face_square(np.array(box), blend) == square


@pytest.mark.parametrize("box", [(300, 200, 400, 300), (0, 0, 640, 480), (600, 440, 640, 480)])
def test_the_square_contains_the_box_and_is_black_outside_the_frame(box):
    frame = frame_of(1) | 1
    left, top, side = face_square(np.array(box), "raw")
    square = crop_square(frame, np.array(box), "raw")
    assert square.shape == (side, side, 3) and square.dtype == np.uint8
    inside = square[box[1] - top : box[3] - top, box[0] - left : box[2] - left]
    assert np.array_equal(inside, frame[box[1] : box[3], box[0] : box[2]])
    rows, columns = np.arange(side) + top, np.arange(side) + left
    in_frame = ((rows >= 0) & (rows < FRAME[0]))[:, None] & ((columns >= 0) & (columns < FRAME[1]))
    assert np.array_equal(square.all(axis=-1), in_frame)


# Masks from a face parser.


def official_frame(frame: np.ndarray, face: np.ndarray, box: np.ndarray, classes: np.ndarray, blend: str) -> np.ndarray:
    """The frame as MuseTalk's program blends it: on the whole square, with Pillow."""
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
    blended = frame.copy()
    paste_back(blended, face, box, parsed_alpha(classes, box, blend))
    assert np.abs(blended.astype(int) - expected).max() <= 1


# In the pipeline.


@pytest.fixture(scope="module")
def checkpoint(mini, tmp_path_factory) -> Path:
    contract = replace(RIGID, vae=load_vae(mini, torch.device("cpu"), torch.float32).fingerprint)
    unet = build_unet(mini, 0, contract.positional_encoding)
    return save_unet(tmp_path_factory.mktemp("unet"), 1, unet.model.state_dict(), contract)


@pytest.fixture(scope="module")
def video(small_clips, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("video") / "a.mp4"
    write_video(path, islice(read_frames(small_clips / "sample_00.mp4"), 3), np.zeros(0, np.float32), 16_000)
    return path


FEATURES = np.random.default_rng(0).normal(size=(40, 5, 128)).astype(np.float16)


def test_the_pipeline_blends_by_the_classes_of_its_parser(mini, checkpoint, video, tmp_path):
    """With random weights, whose classes include skin."""
    for part in mini.iterdir():
        (tmp_path / part.name).symlink_to(part)
    (tmp_path / "face-parse-bisent").mkdir()
    torch.manual_seed(0)
    torch.save(BiSeNet().state_dict(), tmp_path / "face-parse-bisent" / "79999_iter.pth")
    pipeline = LipSyncPipeline.from_checkpoint(checkpoint, tmp_path, blend="jaw")
    prepared = pipeline.prepare(video)
    parser = load_face_parser(tmp_path, torch.device("cpu"))
    pipeline.face_parser = None  # not needed again
    output = pipeline.frames(prepared, FEATURES, 3)
    for frame, blended, box in zip(read_frames(video), output, prepared.boxes, strict=True):
        x1, y1, x2, y2 = box
        classes = parser(to_tensor(crop_square(frame, box, "jaw")[None]))[0].numpy()
        alpha = np.zeros(frame.shape[:2], np.float32)
        alpha[y1:y2, x1:x2] = parsed_alpha(classes, box, "jaw")
        assert (alpha > 0.9).sum() > 100 and (alpha[y1:y2, x1:x2] == 0).sum() > 100
        assert np.array_equal(blended[alpha == 0], frame[alpha == 0])
        assert (blended[alpha > 0.9] != frame[alpha > 0.9]).mean() > 0.9


def test_the_default_blend_uses_landmarks_and_loads_no_parser(mini, checkpoint, video):
    pipeline = LipSyncPipeline.from_checkpoint(checkpoint, mini)
    prepared = pipeline.prepare(video)
    frame, face, box = next(read_frames(video)), prepared.faces[0], prepared.boxes[0]
    alpha = face_alpha(face.landmarks, box)
    unpacked = unpack_alpha(prepared.alphas[0], alpha.shape[1])
    assert np.array_equal(unpacked, alpha[-len(unpacked) :]) and (alpha[: -len(unpacked)] == 0).all()
    assert next(pipeline.frames(prepared, FEATURES, 1)).shape == frame.shape
