"""The face backends: detectors of faces with landmarks, by name.

A backend is stateless: a frame gives the same faces whatever came before it, so batches and processes may cut
a video anywhere.
"""

from __future__ import annotations

from pathlib import Path

import torch

from musetalk.data.face.face import FaceBackend
from musetalk.errors import UserError

# Backends, and whose landmarks each gives, by the name that a feature contract has for them.
FACE_BACKENDS = {"mediapipe": "mediapipe", "dwpose": "dwpose", "mmpose": "dwpose"}


def check_face_backend(name: str) -> None:
    """Raises UserError for a name that is not in FACE_BACKENDS."""
    if name not in FACE_BACKENDS:
        raise UserError(f"face_backend must be one of {', '.join(map(repr, FACE_BACKENDS))}, not {name!r}")


def load_face_backend(name: str, models_dir: Path, device: torch.device | str) -> FaceBackend:
    """The backend of a name in FACE_BACKENDS; mediapipe has its weights in itself and runs on the CPU.

    Raises UserError for a name there is none of, WeightsError where a file of models_dir is missing or unfit.
    """
    check_face_backend(name)
    if name == "mediapipe":
        from musetalk.data.face.mediapipe import MediapipeFaceMesh  # heavy: imported by those who use it

        return MediapipeFaceMesh()
    if name == "dwpose":
        from musetalk.data.face.dwpose import load_dwpose  # weights.py imports diffusers

        return load_dwpose(models_dir, torch.device(device))
    from musetalk.data.face.mmpose import load_mmpose  # not among the requirements

    return load_mmpose(models_dir, torch.device(device))
