"""DWPose run by mmpose, as in MuseTalk. Optional: `pip install -r requirements-mmpose.txt`.

Gives the same points as dwpose.py, which does not need mmpose.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from musetalk.data.face.dwpose import (
    BATCH,
    INPUT_HEIGHT,
    INPUT_WIDTH,
    MEAN,
    MIRRORED,
    PADDING,
    POINTS,
    SPLIT,
    STD,
    faces_of_points,
    load_published,
)
from musetalk.data.face.face import Face
from musetalk.errors import UserError
from musetalk.images import batched
from musetalk.models.weights import freeze

INPUT_SIZE = (INPUT_WIDTH, INPUT_HEIGHT)
DATA_SET = {"dataset_name": "coco_wholebody", "flip_indices": MIRRORED}  # the metadata that mmpose requires
# Configuration of the network and its inference for mmpose's registries.
CODEC = {
    "type": "SimCCLabel",
    "input_size": INPUT_SIZE,
    "simcc_split_ratio": SPLIT,
    "sigma": (6.0, 6.93),
    "normalize": False,
    "use_dark": False,
}
MODEL = {
    "type": "TopdownPoseEstimator",
    "data_preprocessor": {"type": "PoseDataPreprocessor", "mean": MEAN, "std": STD, "bgr_to_rgb": True},
    "backbone": {
        "type": "mmdet.CSPNeXt",
        "arch": "P5",
        "expand_ratio": 0.5,
        "deepen_factor": 1.0,
        "widen_factor": 1.0,
        "out_indices": (4,),
        "channel_attention": True,
        "norm_cfg": {"type": "BN"},
        "act_cfg": {"type": "SiLU"},
    },
    "head": {
        "type": "RTMCCHead",
        "in_channels": 1024,
        "out_channels": POINTS,
        "input_size": INPUT_SIZE,
        "in_featuremap_size": (INPUT_WIDTH // 32, INPUT_HEIGHT // 32),
        "simcc_split_ratio": SPLIT,
        "final_layer_kernel_size": 7,
        "gau_cfg": {
            "hidden_dims": 256,
            "s": 128,
            "expansion_factor": 2,
            "dropout_rate": 0.0,
            "drop_path": 0.0,
            "act_fn": "SiLU",
            "use_rel_bias": False,
            "pos_enc": False,
        },
        "loss": {"type": "KLDiscretLoss", "use_target_weight": True},
        "decoder": CODEC,
    },
    "test_cfg": {"flip_test": True},
}
PIPELINE = [
    {"type": "LoadImage"},
    {"type": "GetBBoxCenterScale", "padding": PADDING},
    {"type": "TopdownAffine", "input_size": INPUT_SIZE},
    {"type": "PackPoseInputs"},
]


class NoOperators(ModuleType):
    """Stands in for mmcv's compiled operators, which mmcv-lite lacks: importable, but not callable."""

    def __getattr__(self, name: str) -> Callable:
        if name.startswith("_"):
            raise AttributeError(name)

        def missing(*_: object, **__: object) -> None:
            raise NotImplementedError(f"mmcv-lite has no operator {name}")

        return missing


class MMPose:
    """Stateless face backend for one person per frame."""

    def __init__(self, network: Any, prepare: Callable[[dict], dict]) -> None:
        """network: mmpose's estimator. prepare: its pipeline, frame with box -> sample."""
        self.network, self.prepare = freeze(network), prepare

    def detect(self, frames: Sequence[np.ndarray]) -> list[list[Face]]:
        """Detects at most one face per frame. frames: BGR uint8 (H, W, 3), of any size."""
        return faces_of_points(*self.points(frames))

    def points(self, frames: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Estimates all points of the person in each frame: float64 (T, 133, 2) x, y in source pixels, and scores,
        float32 (T, 133).

        frames: BGR uint8 (H, W, 3), of any size.
        """
        from mmengine.dataset import pseudo_collate

        points, scores = np.zeros((len(frames), POINTS, 2)), np.zeros((len(frames), POINTS), np.float32)
        for batch in batched(range(len(frames)), BATCH):
            samples = pseudo_collate([self.prepare(frame_input(frames[index])) for index in batch])
            with torch.no_grad():
                predictions = self.network.test_step(samples)
            for index, sample in zip(batch, predictions, strict=True):
                points[index] = sample.pred_instances.keypoints[0]
                scores[index] = sample.pred_instances.keypoint_scores[0]
        return points, scores


def in_float64(decode: Callable) -> Callable:
    """Wraps a decoder of mmpose so that it returns points as float64.

    mmpose maps points into the frame in the dtype of the decoder, so newer versions round them to float32. Version
    1.1, which MuseTalk requires, does not, and MuseTalk truncates the points afterwards.
    """

    def decode_in_float64(*simcc: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        points, scores = decode(*simcc)
        return points.astype(np.float64), scores

    return decode_in_float64


def frame_input(frame: np.ndarray) -> dict:
    """Builds the input of mmpose's pipeline: a frame whose whole area is the person's box."""
    box = np.array([[0, 0, frame.shape[1], frame.shape[0]]], np.float32)
    return {"img": frame, "bbox": box, "bbox_score": np.ones(1, np.float32), **DATA_SET}


def load_mmpose(models_dir: Path, device: torch.device) -> MMPose:
    """Loads dwpose/dw-ll_ucoco_384.pth of a models folder into mmpose.

    Raises UserError if mmpose cannot be imported, WeightsError for a missing or invalid file.
    """
    try:
        if find_spec("mmcv._ext") is None:
            sys.modules["mmcv._ext"] = NoOperators("mmcv._ext")
            sys.modules["mmcv._ext"].__spec__ = ModuleSpec("mmcv._ext", None)
        import mmpose.datasets  # noqa: F401 - fills the registries
        import mmpose.models  # noqa: F401
        from mmengine.dataset import Compose
        from mmengine.registry import init_default_scope
        from mmpose.models.builder import build_pose_estimator
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision does not match torch
        raise UserError(
            f"face_backend 'mmpose' cannot be imported: {error}; pip install -r requirements-mmpose.txt, "
            "or use 'dwpose', which gives the same points"
        ) from error
    init_default_scope("mmpose")
    network = build_pose_estimator(MODEL)
    load_published(network, models_dir)
    network.head.decoder.decode = in_float64(network.head.decoder.decode)
    return MMPose(network.to(device, torch.float32), Compose(PIPELINE))
