"""A video prepared for lip-syncing, and its frames with generated faces."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from musetalk.data.crop import paste_back
from musetalk.data.face.face import Face
from musetalk.data.ping_pong import ping_pong_index
from musetalk.inference.blend import unpack_alpha
from musetalk.inference.stage_timer import StageTimer


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


def blended_frames(
    prepared: PreparedVideo,
    source: Generator[np.ndarray, None, None],
    batches: Generator[np.ndarray, None, None],
    timer: StageTimer,
) -> Generator[np.ndarray, None, None]:
    """The frames of `ping_pong` with the generated crops pasted back. Closes both generators when it ends.

    source: BGR uint8 (H, W, 3) each. batches: BGR uint8 (B, 256, 256, 3) each. timer: measures the stage "blend".
    """
    with closing(source), closing(batches):
        for k, (frame, crop) in enumerate(zip(source, chain.from_iterable(batches), strict=True)):
            with timer("blend"):
                prepared.paste(frame, crop, ping_pong_index(k, len(prepared.faces)))
            yield frame
