"""mmpose as the engine of DWPose's network: the program that MuseTalk runs, where it is installed.

`pip install -r requirements-mmpose.txt` installs it. The points are those of dwpose.py, which needs none of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import nn

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
DATA_SET = {"dataset_name": "coco_wholebody", "flip_indices": MIRRORED}  # all that mmpose asks of the points
# The network and its use, as mmpose's registries build them. Its trainer's settings play no part.
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
    """In the place of mmcv's compiled operators, which mmcv-lite has none of: all can be named, none can be called."""

    def __getattr__(self, name: str) -> Callable:
        if name.startswith("_"):
            raise AttributeError(name)

        def missing(*_: object, **__: object) -> None:
            raise NotImplementedError(f"mmcv-lite has no operator {name}")

        return missing


class MMPose:
    """Stateless face backend that sees one person in a frame."""

    def __init__(self, network: nn.Module, prepare: Callable[[dict], dict]) -> None:
        """prepare: mmpose's pipeline, from a frame with its box to a sample."""
        self.network, self.prepare = freeze(network), prepare

    def detect(self, frames: Sequence[np.ndarray]) -> list[list[Face]]:
        """Faces of each frame, one at most. frames: BGR uint8 (H, W, 3), of any size."""
        return faces_of_points(*self.points(frames))

    def points(self, frames: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """All points of the person in each frame: float64 (T, 133, 2) x, y in source pixels, and their scores, float32
        (T, 133).

        frames: BGR uint8 (H, W, 3), of any size.
        """
        from mmengine.dataset import pseudo_collate

        points, scores = np.zeros((len(frames), POINTS, 2)), np.zeros((len(frames), POINTS), np.float32)
        for batch in batched(range(len(frames)), BATCH):
            samples = pseudo_collate([self.prepare(whole(frames[index])) for index in batch])
            with torch.no_grad():
                found = self.network.test_step(samples)
            for index, sample in zip(batch, found, strict=True):
                points[index] = sample.pred_instances.keypoints[0]
                scores[index] = sample.pred_instances.keypoint_scores[0]
        return points, scores


def in_float64(decode: Callable) -> Callable:
    """A decoder of mmpose, with its points as float64.

    mmpose moves them into the frame in the type that it is given here, rounding to float32 what it computes in
    float64. 1.1, which MuseTalk names, does not round, and MuseTalk then cuts the fractions off.
    """

    def decode_in_float64(*simcc: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        points, scores = decode(*simcc)
        return points.astype(np.float64), scores

    return decode_in_float64


def whole(frame: np.ndarray) -> dict:
    """A frame as mmpose's pipeline takes it, with all of it as the one person's box."""
    box = np.array([[0, 0, frame.shape[1], frame.shape[0]]], np.float32)
    return {"img": frame, "bbox": box, "bbox_score": np.ones(1, np.float32), **DATA_SET}


def load_mmpose(models_dir: Path, device: torch.device) -> MMPose:
    """mmpose with the network of dwpose/dw-ll_ucoco_384.pth in a models folder.

    Raises UserError where mmpose cannot be imported, WeightsError for a missing or unfit file.
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
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another build of torch
        raise UserError(
            f"face_backend 'mmpose' cannot be imported: {error}; pip install -r requirements-mmpose.txt, "
            "or use 'dwpose', which gives the same points"
        ) from error
    init_default_scope("mmpose")
    network = build_pose_estimator(MODEL)
    load_published(network, models_dir)
    network.head.decoder.decode = in_float64(network.head.decoder.decode)
    return MMPose(network.to(device, torch.float32), Compose(PIPELINE))
