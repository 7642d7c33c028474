"""Face backends: detectors of faces with landmarks, by name.

A backend is stateless: its output for a frame does not depend on other frames, so a video can be split anywhere.
"""

from __future__ import annotations

from pathlib import Path

import torch

from musetalk.data.face.face import FaceBackend
from musetalk.data.face.mediapipe import MediapipeFaceMesh
from musetalk.errors import UserError

# Backend -> name of its landmarks in a feature contract.
FACE_BACKENDS = {"mediapipe": "mediapipe", "dwpose": "dwpose", "mmpose": "dwpose"}


def check_face_backend(name: str) -> None:
    """Raises UserError for a name that is not in FACE_BACKENDS."""
    if name not in FACE_BACKENDS:
        raise UserError(f"face_backend must be one of {', '.join(map(repr, FACE_BACKENDS))}, not {name!r}")


def load_face_backend(name: str, models_dir: Path, device: torch.device | str) -> FaceBackend:
    """Loads a backend of FACE_BACKENDS. The weights of mediapipe are part of this package, not of models_dir.

    Raises UserError for an unknown name, WeightsError if a file of models_dir is missing or invalid.
    """
    check_face_backend(name)
    if name == "mediapipe":
        return MediapipeFaceMesh(torch.device(device))
    if name == "dwpose":
        from musetalk.data.face.dwpose import load_dwpose  # slow import (diffusers)

        return load_dwpose(models_dir, torch.device(device))
    from musetalk.data.face.mmpose import load_mmpose  # optional requirement

    return load_mmpose(models_dir, torch.device(device))
