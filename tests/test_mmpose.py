"""The engine mmpose and the plain one see the same points. Needs mmpose: `make test-mmpose` installs and runs it."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from test_dwpose import randomised, save_as_trainer

from musetalk.data.face import load_face_backend
from musetalk.data.face.dwpose import MIRRORED, WEIGHTS, DWPose, RTMPose
from musetalk.data.face.mmpose import MMPose, NoOperators
from musetalk.data.sample import render_frames
from musetalk.data.video import read_frames
from musetalk.models.weights import IGNORED_GLOBALS, WeightsError, read_tensors

pytestmark = pytest.mark.skipif(find_spec("mmpose") is None, reason="needs mmpose, see requirements-mmpose.txt")

CLIPS = (
    *("talking_a", "talking_b", "talking_c", "WDA_AlexandriaOcasioCortez_000"),
    *("portrait_hevc_1080x1920", "cartoon_no_audio"),
)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Iterator[Path]:
    """A models folder with randomised weights in the published form."""
    folder = tmp_path_factory.mktemp("mmpose")
    with pytest.MonkeyPatch.context() as monkeypatch:
        save_as_trainer(randomised(), folder / WEIGHTS, monkeypatch)
    yield folder
    (folder / WEIGHTS).unlink()  # 140 MB


@pytest.fixture(scope="module")
def plain(published) -> DWPose:
    return load_face_backend("dwpose", published, "cpu")


@pytest.fixture(scope="module")
def engine(published) -> MMPose:
    return load_face_backend("mmpose", published, "cpu")


def test_both_networks_have_the_same_names_and_shapes(engine):
    with torch.device("meta"):
        mine = RTMPose().state_dict()
    assert {name: value.shape for name, value in engine.network.state_dict().items()} == {
        name: value.shape for name, value in mine.items()
    }


@pytest.fixture(scope="module")
def data_set(engine) -> dict:
    """What mmpose knows of the 133 points."""
    from mmpose.datasets.datasets.utils import parse_pose_metainfo

    home = Path(find_spec("mmpose").origin).parent / ".mim"
    return parse_pose_metainfo({"from_file": str(home / "configs/_base_/datasets/coco_wholebody.py")})


def test_both_know_the_same_pairs(data_set):
    assert list(data_set["flip_indices"]) == MIRRORED


def compare(engine: MMPose, plain: DWPose, frames: list[np.ndarray]) -> None:
    points, scores = engine.points(frames)
    others, other_scores = plain.points(frames)
    assert points.dtype == others.dtype == np.float64 and scores.dtype == other_scores.dtype == np.float32
    assert len(np.unique(points.reshape(-1, 2), axis=0)) > 50 * len(frames)
    np.testing.assert_array_equal(others, points)  # not nearly: what MuseTalk makes of them are whole pixels
    np.testing.assert_allclose(other_scores, scores, rtol=0, atol=1e-4)
    for (face,), (other,) in zip(engine.detect(frames[:1]), plain.detect(frames[:1]), strict=True):
        np.testing.assert_array_equal(other.landmarks, face.landmarks)
        np.testing.assert_array_equal(other.box, face.box)
        assert other.score == pytest.approx(face.score, abs=1e-4)


def test_both_see_the_same_points_in_real_frames(engine, plain, clips):
    compare(engine, plain, [f for c in CLIPS for f in islice(read_frames(clips / f"{c}.mp4"), 0, 41, 40)])


def test_both_see_the_same_points_in_the_sample_and_in_odd_shapes(engine, plain):
    (frame,) = islice(render_frames(0), 1)
    frames = [frame, frame[:, :97], frame[:101], frame[100:133, 100:121], frame[::-1, ::-1]]
    compare(engine, plain, [np.ascontiguousarray(frame) for frame in frames])


def test_the_engine_gives_what_mmposes_own_function_does(engine, data_set, monkeypatch):
    """MuseTalk calls inference_topdown with a frame and no box. Only the rounding to float32 is left out."""
    from mmengine.config import Config
    from mmpose.apis import inference_topdown

    from musetalk.data.face.mmpose import PIPELINE

    frames = list(islice(render_frames(0), 0, 20, 10))
    engine.network.cfg = Config({"test_dataloader": {"dataset": {"pipeline": PIPELINE}}})
    engine.network.dataset_meta = data_set
    points, scores = engine.points(frames)
    monkeypatch.delattr(engine.network.head.decoder, "decode")  # the class's own is left
    for index, frame in enumerate(frames):
        (found,) = inference_topdown(engine.network, frame)
        assert found.pred_instances.keypoints.dtype == np.float32
        assert np.array_equal(found.pred_instances.keypoints[0], points[index].astype(np.float32))
        assert np.array_equal(found.pred_instances.keypoint_scores[0], scores[index])


def test_no_frame_gives_no_face(engine):
    assert engine.detect([]) == []


def test_a_missing_file_is_named_by_both(tmp_path):
    for name in ("mmpose", "dwpose"):
        with pytest.raises(WeightsError, match=f"{WEIGHTS} is missing"):
            load_face_backend(name, tmp_path, "cpu")


def test_operators_can_be_named_but_not_called():
    operators = NoOperators("mmcv._ext")
    with pytest.raises(NotImplementedError, match="mmcv-lite has no operator nms"):
        operators.nms(1, 2)
    assert not hasattr(operators, "__path__")


def test_what_mmengines_trainer_writes_is_read(data_set, tmp_path):
    """Its own runner, two steps of a network of one layer, with a log and what mmpose says of its points."""
    from mmengine.model import BaseModel
    from mmengine.runner import Runner

    class OneLayer(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)

        def forward(self, *_: object, **__: object) -> dict:
            return {"loss": self.layer(torch.ones(1, 2)).sum()}

    runner = Runner(
        OneLayer(),
        str(tmp_path),
        train_dataloader={
            "dataset": [0, 1],
            "batch_size": 1,
            "num_workers": 0,
            "sampler": {"type": "DefaultSampler"},
            "collate_fn": {"type": "pseudo_collate"},
        },
        train_cfg={"by_epoch": True, "max_epochs": 1},
        optim_wrapper={
            "optimizer": {"type": "AdamW", "lr": 0.004, "weight_decay": 0.05},
            "paramwise_cfg": {"norm_decay_mult": 0, "bias_decay_mult": 0, "bypass_duplicate": True},
        },
        param_scheduler=[{"type": "LinearLR", "start_factor": 0.1, "by_epoch": False, "end": 10}],
        default_scope="mmengine",
        experiment_name="one_layer",
    )
    runner.message_hub.update_info("dataset_meta", data_set)
    runner.message_hub.update_info("best_score", np.float64(0.5))
    runner.train()
    path = tmp_path / "epoch_1.pth"
    asked = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    assert "mmengine.logging.history_buffer.HistoryBuffer" in asked and asked <= set(IGNORED_GLOBALS)
    values = read_tensors(path)
    assert {"meta", "state_dict", "message_hub", "optimizer", "param_schedulers"} <= values.keys()
    for name, value in runner.model.state_dict().items():
        assert torch.equal(values["state_dict"][name], value)
