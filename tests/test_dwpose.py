"""DWPose: parameter names, the published file, geometry with fake networks, batches."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from musetalk.data.face import load_face_backend
from musetalk.data.face.dwpose import (
    BATCH,
    FACE,
    MIN_SCORE,
    MIRRORED,
    WEIGHTS,
    DWPose,
    RTMPose,
    decode,
    load_dwpose,
    warp,
)
from musetalk.errors import UserError
from musetalk.models.weights import IGNORED_GLOBALS, WeightsError

CPU = torch.device("cpu")


def randomised() -> dict[str, torch.Tensor]:
    """Seeded weights with which points and pictures differ."""
    torch.manual_seed(0)
    tensors = RTMPose().state_dict()
    for name, value in tensors.items():
        if name.endswith(("running_var", "bn.weight")):
            value.uniform_(0.5, 1.5)
        elif name.endswith(("running_mean", "bn.bias")):
            value.normal_(0, 0.2)
        elif name.endswith(("gamma", "beta", "scale", ".g")):
            value.normal_(1, 0.3)
    return tensors


class HistoryBuffer:
    """A log of mmengine's trainer: arrays, and functions by name."""

    def __init__(self) -> None:
        self.log, self.count = np.arange(5.0), np.ones(5, np.int64)
        self.statistics = {"min": HistoryBuffer.min}

    def min(self) -> float:
        return self.log.min()


def save_as_trainer(tensors: dict, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes a checkpoint with the keys, types and shared objects of one that mmengine's trainer wrote."""
    home = "mmengine.logging.history_buffer"
    with monkeypatch.context() as patch:
        for name in ("mmengine", "mmengine.logging", home):
            patch.setitem(sys.modules, name, ModuleType(name))
        sys.modules[home].HistoryBuffer = HistoryBuffer
        for thing in (HistoryBuffer, HistoryBuffer.min):
            patch.setattr(thing, "__module__", home)
        settings, logs = {"joint_weights": np.ones(133, np.float32), "colors": np.zeros((3, 3), np.int64)}, {}
        for name in ("train/loss", "val/AP"):
            logs[name] = HistoryBuffer()
            logs[name].statistics = logs["train/loss"].statistics
        rates = [0.004]  # one list in two places
        rate = {"lr": 0.001, "betas": (0.9, 0.999)}
        moments = {"step": torch.tensor(7.0), "exp_avg": torch.ones(576, 256), "exp_avg_sq": torch.ones(576, 256)}
        checkpoint = {
            "meta": {"epoch": 3, "cfg": "model = dict()" * 9, "dataset_meta": settings, "seed": None},
            "state_dict": tensors,
            "message_hub": {
                "log_scalars": logs,
                "runtime_info": {"dataset_meta": settings, "best_score": np.float64(0.6)},
                "resumed_keys": {"train/loss": True},
            },
            "optimizer": {"state": {0: moments}, "param_groups": [{**rate, "params": [0]}, {**rate, "params": []}]},
            "param_schedulers": [{"base_values": rates, "last_step": 3}, {"base_values": rates}],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(checkpoint, path)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Iterator[tuple[Path, dict]]:
    """A models folder with randomised weights in the published format, and the weights."""
    folder, tensors = tmp_path_factory.mktemp("dwpose"), randomised()
    with pytest.MonkeyPatch.context() as monkeypatch:
        save_as_trainer(tensors, folder / WEIGHTS, monkeypatch)
    yield folder, tensors
    (folder / WEIGHTS).unlink()  # 140 MB


@pytest.fixture(scope="module")
def backend(published) -> DWPose:
    return load_dwpose(published[0], CPU)


# Names.


def test_names_and_shapes_are_those_of_mmpose():
    """The hash is of the state dict that mmpose 1.3.2 builds from its own configuration of RTMPose-l."""
    with torch.device("meta"):
        network = RTMPose()
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert len(shapes) == 470 and sum(parameter.numel() for parameter in network.parameters()) == 33_610_919
    listed = "".join(f"{name} {shape}\n" for name, shape in sorted(shapes.items()))
    expected = "69506a37d4855fdf906417fe8d97068db7cc41b66fa774b8bf3a600fd76b2cc3"
    assert hashlib.sha256(listed.encode()).hexdigest() == expected


def test_mirroring_swaps_left_and_right_points():
    assert sorted(MIRRORED) == list(range(133)) and [MIRRORED[point] for point in MIRRORED] == list(range(133))
    face = [point - FACE.start for point in MIRRORED[FACE]]
    assert (face[0], face[8], face[36], face[41], face[48], face[60], face[30]) == (16, 8, 45, 46, 54, 64, 30)
    assert (MIRRORED[0], MIRRORED[1], MIRRORED[17], MIRRORED[91]) == (0, 2, 20, 112)


# The file.


def test_a_checkpoint_of_mmengines_trainer_is_loaded_bit_for_bit(published, backend):
    folder, tensors = published
    referenced = set(torch.serialization.get_unsafe_globals_in_checkpoint(folder / WEIGHTS))
    names = {name.rpartition(".")[2] for name in referenced}
    assert referenced <= set(IGNORED_GLOBALS)
    assert names == {"_reconstruct", "scalar", "ndarray", "dtype", "getattr", "HistoryBuffer"}
    loaded = backend.network.state_dict()
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert not any(parameter.requires_grad for parameter in backend.network.parameters())
    assert not backend.network.training


def test_a_missing_file_is_named_with_its_source(tmp_path):
    with pytest.raises(WeightsError, match=f"{WEIGHTS} is missing; get it from https://huggingface.co/yzd-v/DWPose"):
        load_face_backend("dwpose", tmp_path, "cpu")


def test_a_checkpoint_of_another_network_is_refused_by_name(tmp_path, monkeypatch):
    save_as_trainer({"head.cls_x.weight": torch.zeros(576, 255)}, tmp_path / WEIGHTS, monkeypatch)
    with pytest.raises(WeightsError, match=f"{WEIGHTS} does not fit RTMPose: 394 missing"):
        load_dwpose(tmp_path, CPU)


def test_the_mmpose_backend_without_mmpose_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "mmcv", None)
    monkeypatch.delitem(sys.modules, "mmcv._ext", raising=False)
    with pytest.raises(UserError, match="pip install -r requirements-mmpose.txt, or use 'dwpose'"):
        load_face_backend("mmpose", tmp_path, "cpu")


# Geometry and scores, with fake networks.


class FixedPose(nn.Module):
    """Places all points at one pixel of the input with given scores, mirrored in the mirrored view."""

    def __init__(self, column: int, row: int, scores: np.ndarray) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.columns, self.rows = torch.full((133, 576), -1.0), torch.full((133, 768), -1.0)
        self.columns[:, 2 * column] = torch.from_numpy(scores).float()
        self.rows[:, 2 * row] = torch.from_numpy(scores).float()

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert images.shape[1:] == (3, 384, 288) and torch.equal(images.chunk(2)[0], images.chunk(2)[1].flip(-1))
        columns = torch.stack([self.columns, self.columns[MIRRORED].flip(-1)])
        rows = torch.stack([self.rows, self.rows[MIRRORED]])
        return columns.repeat_interleave(len(images) // 2, 0), rows.repeat_interleave(len(images) // 2, 0)


def black(width: int, height: int) -> np.ndarray:
    return np.zeros((height, width, 3), np.uint8)


@pytest.mark.parametrize(
    ("size", "pixel", "expected"),
    [
        ((576, 768), (100, 50), (100 * 2.5 - 72, 50 * 2.5 - 96)),  # a pixel of the input is 2.5 of the frame
        ((1000, 400), (36, 192), (36 * 1250 / 288 - 125, 200)),  # the view is 1.25 times as wide as the frame
        ((300, 1600), (144, 96), (150, 96 * 2000 / 384 - 200)),  # or 1.25 times as high
    ],
)
def test_points_are_mapped_from_the_input_to_the_frame(size, pixel, expected):
    points, scores = DWPose(FixedPose(*pixel, np.full(133, 0.8))).points([black(*size)] * 2)
    assert points.shape == (2, 133, 2) and points.dtype == np.float64 and scores.dtype == np.float32
    np.testing.assert_allclose(points, np.broadcast_to(expected, (2, 133, 2)), atol=1e-3)
    np.testing.assert_allclose(scores, 0.8, atol=1e-6)


def test_a_coordinate_just_below_a_whole_pixel_is_not_rounded_up():
    """The view of 1280 x 720 is 6400 / 3 pixels high, 8e-5 less in float32: bin 402 of 768 is at
    360 + (402 / 768 - 1 / 2) * 6400 / 3 = 410, less 2e-6. MuseTalk truncates it to 409."""
    points, _ = DWPose(FixedPose(144, 201, np.ones(133))).points([black(1280, 720)])
    np.testing.assert_allclose(points[..., 1], 410, atol=1e-5)
    assert (points[..., 1].astype(np.int32) == 409).all() and (points[..., 1].astype(np.float32) == 410).all()


def test_a_score_is_the_smaller_maximum_and_a_point_without_one_is_outside():
    columns, rows = np.zeros((1, 3, 576), np.float32), np.zeros((1, 3, 768), np.float32)
    columns[0, :, 11], rows[0, :, 700] = (0.9, 0.4, 0.5), (0.4, 0.9, -0.1)
    rows[0, 2, :] = -0.1
    points, scores = decode(columns, rows)
    np.testing.assert_allclose(scores, [[0.4, 0.4, -0.1]])
    assert points.tolist() == [[[5.5, 350], [5.5, 350], [-0.5, -0.5]]]


def test_a_face_is_detected_if_its_own_points_score_enough():
    for face, elsewhere, is_detected in ((0.29, 1.0, False), (0.31, 0.0, True), (1.7, 0.0, True), (-0.5, 2.0, False)):
        scores = np.full(133, elsewhere)
        scores[FACE] = face
        found = DWPose(FixedPose(100, 200, scores)).detect([black(400, 300)] * 3)
        assert [len(faces) for faces in found] == [int(is_detected)] * 3 and (face >= MIN_SCORE) is is_detected
        assert not is_detected or found[0][0].score == pytest.approx(min(face, 1))


def test_the_box_bounds_the_68_landmarks():
    network = FixedPose(0, 0, np.ones(133))
    network.columns[:], network.rows[:] = 0, 0
    for point in range(133):
        network.columns[point, 2 * point] = network.rows[point, 4 * point] = 1
    frame = black(288 * 4 // 5, 384 * 4 // 5)  # one pixel of the input is one of the frame
    ((face,),) = DWPose(network).detect([frame])
    assert face.landmarks.shape == (68, 2) and face.landmarks.dtype == face.box.dtype == np.float64
    np.testing.assert_allclose(face.landmarks[0], (23 - 28.8, 46 - 38.4), atol=1)
    np.testing.assert_allclose(face.landmarks[67] - face.landmarks[0], (67, 134), atol=1)
    assert np.array_equal(face.box, np.concatenate([face.landmarks[0], face.landmarks[67]]))


def test_the_input_is_rgb_normalised_by_the_statistics_of_imagenet():
    network, inputs = FixedPose(0, 0, np.ones(133)), []
    network.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    frame = black(90, 120)
    frame[:] = 10, 20, 30  # blue, green, red
    DWPose(network).points([frame])
    expected = [(30 - 123.675) / 58.395, (20 - 116.28) / 57.12, (10 - 103.53) / 57.375]
    np.testing.assert_allclose(inputs[0][0, :, 192, 144], expected, rtol=1e-6)


def test_the_view_shows_the_frame_where_points_are_mapped_from_and_black_around_it():
    """The view of 400 x 400 is 500 wide and 666.7 high around the same centre."""
    frame = np.full((400, 400, 3), 100, np.uint8)
    frame[290:310, 90:110] = 255
    view = warp(frame)
    assert view.shape == (384, 288, 3) and view[192, 144].min() == 100
    assert view[:60].max() == 0 == view[-60:].max() and view[192, 2].max() == 0 == view[192, -3].max()
    y, x = np.argwhere(view[..., 0] > 200).mean(axis=0)
    np.testing.assert_allclose((x * 500 / 288 - 50, y * 500 / 288 - 400 / 3), (99.5, 299.5), atol=1)


# Batches, with the randomised network.


@pytest.fixture(scope="module")
def frames() -> list[np.ndarray]:
    """One frame more than a batch, of several sizes."""
    rng = np.random.default_rng(3)
    return [rng.integers(256, size=(200 - 20 * k, 120 + 40 * k, 3), dtype=np.uint8) for k in range(BATCH + 1)]


@pytest.mark.slow
def test_points_of_a_frame_do_not_depend_on_its_batch(backend, frames):
    points, scores = backend.points(frames)
    assert len(np.unique(points.reshape(-1, 2), axis=0)) > 100
    for index in (0, BATCH):
        alone, alone_scores = backend.points([frames[index]])
        np.testing.assert_array_equal(alone[0], points[index])
        np.testing.assert_array_equal(alone_scores[0], scores[index])


def test_a_mirrored_frame_has_mirrored_points(backend, frames):
    """Up to a bin, or where two places have equal scores."""
    frame = frames[2]
    ((points, mirrored), _) = backend.points([frame, np.ascontiguousarray(frame[:, ::-1])])
    distance = np.abs(np.array([frame.shape[1], 0]) + mirrored[MIRRORED] * [-1, 1] - points).max(axis=-1)
    pixel = max(frame.shape[1] / 288, frame.shape[0] / 384) * 1.25
    assert np.mean(distance <= pixel) > 0.9


def test_no_frames_have_no_faces(backend):
    assert backend.detect([]) == []
    points, scores = backend.points([])
    assert points.shape == (0, 133, 2) and scores.shape == (0, 133)
