"""A video prepared for lip-syncing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from musetalk.data.crop import paste_back
from musetalk.data.face.face import Face
from musetalk.inference.blend import unpack_alpha


@dataclass(frozen=True)
class PreparedVideo:
    """A video of T frames with its face detected, cropped, encoded and masked; can be lip-synced any number of times.

    faces: T faces, None in frames without one. boxes: int32 (T, 4) in source pixels.
    alphas: T masks of the boxes by `pack_alpha`, None in frames without a face.
    masked_latents, latents: float16 (T, 4, 32, 32), zeros in frames without a face.
    people: the most people detected in one frame.
    """

    path: Path
    faces: Sequence[Face | None]
    boxes: np.ndarray
    alphas: Sequence[bytes | None]
    masked_latents: np.ndarray
    latents: np.ndarray
    people: int = 1

    def paste(self, frame: np.ndarray, crop: np.ndarray, index: int) -> None:
        """Blends a crop, BGR uint8 (256, 256, 3), into the frame of this index in place, if it shows the face."""
        box, alpha = self.boxes[index], self.alphas[index]
        if alpha is not None:
            paste_back(frame, crop, box, unpack_alpha(alpha, int(box[2] - box[0])))
