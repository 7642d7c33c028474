"""The backends mmpose and dwpose give the same points. `make test-mmpose` installs mmpose and runs these tests."""

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
from musetalk.data.video import read_frames
from musetalk.models.weights import IGNORED_GLOBALS, WeightsError, read_tensors
from tests.sample import sample_frames

pytestmark = pytest.mark.skipif(find_spec("mmpose") is None, reason="needs mmpose, see requirements-mmpose.txt")

CLIPS = (
    *("talking_a", "talking_b", "talking_c", "WDA_AlexandriaOcasioCortez_000"),
    *("portrait_hevc_1080x1920", "cartoon_no_audio"),
)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Iterator[Path]:
    """A models folder with randomised weights in the published format."""
    folder = tmp_path_factory.mktemp("mmpose")
    with pytest.MonkeyPatch.context() as monkeypatch:
        save_as_trainer(randomised(), folder / WEIGHTS, monkeypatch)
    yield folder
    (folder / WEIGHTS).unlink()  # 140 MB


@pytest.fixture(scope="module")
def ours(published) -> DWPose:
    return load_face_backend("dwpose", published, "cpu")


@pytest.fixture(scope="module")
def theirs(published) -> MMPose:
    return load_face_backend("mmpose", published, "cpu")


def test_both_networks_have_the_same_names_and_shapes(theirs):
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in RTMPose().state_dict().items()}
    assert {name: value.shape for name, value in theirs.network.state_dict().items()} == shapes


@pytest.fixture(scope="module")
def data_set(theirs) -> dict:
    """mmpose's metadata of the 133 points."""
    from mmpose.datasets.datasets.utils import parse_pose_metainfo

    home = Path(find_spec("mmpose").origin).parent / ".mim"
    return parse_pose_metainfo({"from_file": str(home / "configs/_base_/datasets/coco_wholebody.py")})


def test_mirrored_points_are_those_of_mmpose(data_set):
    assert list(data_set["flip_indices"]) == MIRRORED


def compare(theirs: MMPose, ours: DWPose, frames: list[np.ndarray]) -> None:
    points, scores = theirs.points(frames)
    our_points, our_scores = ours.points(frames)
    assert points.dtype == our_points.dtype == np.float64 and scores.dtype == our_scores.dtype == np.float32
    assert len(np.unique(points.reshape(-1, 2), axis=0)) > 50 * len(frames)
    np.testing.assert_array_equal(our_points, points)  # exactly: MuseTalk truncates them to whole pixels
    np.testing.assert_allclose(our_scores, scores, rtol=0, atol=1e-4)
    for (face,), (our_face,) in zip(theirs.detect(frames[:1]), ours.detect(frames[:1]), strict=True):
        np.testing.assert_array_equal(our_face.landmarks, face.landmarks)
        np.testing.assert_array_equal(our_face.box, face.box)
        assert our_face.score == pytest.approx(face.score, abs=1e-4)


def test_both_give_the_same_points_for_real_frames(theirs, ours, clips):
    compare(theirs, ours, [f for c in CLIPS for f in islice(read_frames(clips / f"{c}.mp4"), 0, 41, 40)])


def test_both_give_the_same_points_for_frames_of_odd_shapes(theirs, ours):
    (frame,) = sample_frames(0, 0, 1)
    frames = [frame, frame[:, :97], frame[:101], frame[100:133, 100:121], frame[::-1, ::-1]]
    compare(theirs, ours, [np.ascontiguousarray(frame) for frame in frames])


def test_the_points_are_those_of_mmposes_own_function(theirs, data_set, monkeypatch):
    """MuseTalk calls inference_topdown with a frame and no box. Ours omits only the rounding to float32."""
    from mmengine.config import Config
    from mmpose.apis import inference_topdown

    from musetalk.data.face.mmpose import PIPELINE

    frames = sample_frames(0, 0, 20)[::10]
    theirs.network.cfg = Config({"test_dataloader": {"dataset": {"pipeline": PIPELINE}}})
    theirs.network.dataset_meta = data_set
    points, scores = theirs.points(frames)
    monkeypatch.delattr(theirs.network.head.decoder, "decode")  # the method of the class remains
    for index, frame in enumerate(frames):
        (found,) = inference_topdown(theirs.network, frame)
        assert found.pred_instances.keypoints.dtype == np.float32
        assert np.array_equal(found.pred_instances.keypoints[0], points[index].astype(np.float32))
        assert np.array_equal(found.pred_instances.keypoint_scores[0], scores[index])


def test_no_frames_have_no_faces(theirs):
    assert theirs.detect([]) == []


def test_both_name_a_missing_file(tmp_path):
    for name in ("mmpose", "dwpose"):
        with pytest.raises(WeightsError, match=f"{WEIGHTS} is missing"):
            load_face_backend(name, tmp_path, "cpu")


def test_missing_operators_can_be_imported_but_not_called():
    operators = NoOperators("mmcv._ext")
    with pytest.raises(NotImplementedError, match="mmcv-lite has no operator nms"):
        operators.nms(1, 2)
    assert not hasattr(operators, "__path__")


def test_a_checkpoint_of_mmengines_runner_is_read(data_set, tmp_path):
    """Two steps of a network of one layer, with a log and mmpose's metadata."""
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
    referenced = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    assert "mmengine.logging.history_buffer.HistoryBuffer" in referenced and referenced <= set(IGNORED_GLOBALS)
    values = read_tensors(path)
    assert {"meta", "state_dict", "message_hub", "optimizer", "param_schedulers"} <= values.keys()
    for name, value in runner.model.state_dict().items():
        assert torch.equal(values["state_dict"][name], value)
