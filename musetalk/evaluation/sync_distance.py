"""The published measures of lip sync, LSE-D and LSE-C (also Sync-D and Sync-C), and the offset of the audio.

Prajwal et al. 2020 (Wav2Lip), https://arxiv.org/abs/2008.10010; formulas: https://github.com/joonson/syncnet_python.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch.nn import functional

from musetalk.contract import SAMPLES_PER_FRAME, VIDEO_FPS
from musetalk.data.audio import to_int16
from musetalk.errors import UserError
from musetalk.models.syncnet_v2 import FACE_SIZE, FRAMES, MFCC_FRAMES, MFCC_RATE, SyncNetV2, mfcc

MAX_SHIFT = 15  # video frames
BATCH = 20  # windows at a time


@dataclass(frozen=True)
class LipSyncError:
    """The mean distance of faces and shifted audio, and what is read from it."""

    distances: np.ndarray  # (31,), for audio of 15 frames earlier to 15 frames later than the faces

    @property
    def lse_d(self) -> float:
        """The smallest distance; lower is better."""
        return float(self.distances.min())

    @property
    def lse_c(self) -> float:
        """The confidence, by how much the smallest distance is below the median; higher is better."""
        return float(np.median(self.distances)) - self.lse_d

    @property
    def offset(self) -> int:
        """The number of frames by which the audio is ahead of the video, in [-15, 15].

        `musetalk.data.offsets` uses the opposite sign.
        """
        return MAX_SHIFT - int(self.distances.argmin())


def lip_sync_error(network: SyncNetV2, frames: np.ndarray, samples: np.ndarray) -> LipSyncError:
    """Compares each 5 frames of a clip with the audio of 0.2 s at each shift of -15 to 15 frames.

    frames: BGR uint8 (F, H, W, 3), face crops at 25 fps, resized to 224 x 224. samples: float (N,) in [-1, 1] at
    16 kHz. Windows begin at the first min(F, N // 640) - 5 frames. Audio embeddings beyond those are zero, so a clip
    should be much longer than 15 frames: LatentSync demands 50, syncnet_python 100. Values of different kinds of crops
    are not comparable; syncnet_python's are squares of 1.4 times the longer side of a detected face, from its top on.
    Raises UserError if there are fewer than 6 frames or their audio is missing.
    """
    length = min(len(frames), len(samples) // SAMPLES_PER_FRAME)
    if length <= FRAMES:
        raise UserError(f"the lip-sync error needs more than {FRAMES} frames with audio, but a clip has {length}")
    windows = length - FRAMES
    device = next(network.parameters()).device
    step = MFCC_RATE // VIDEO_FPS
    cepstra = torch.from_numpy(mfcc(to_int16(samples))).float()  # (M, 13)
    audio_windows = cepstra.unfold(0, MFCC_FRAMES, step)[:windows, None]  # (windows, 1, 13, 20)
    faces, audio = [], []
    for first in range(0, windows, BATCH):
        stop = min(first + BATCH, windows)
        faces.append(network.embed_faces(_face_windows(frames[first : stop + FRAMES - 1]).to(device)))
        audio.append(network.embed_audio(audio_windows[first:stop].to(device)))
    return LipSyncError(_shifted_distances(torch.cat(faces), torch.cat(audio)).cpu().numpy())


def _face_windows(frames: np.ndarray) -> torch.Tensor:
    """BGR uint8 (T, H, W, 3) -> all windows of 5 consecutive faces, float32 (T - 4, 3, 5, 224, 224) in [0, 255]."""
    faces = np.stack([cv2.resize(frame, (FACE_SIZE, FACE_SIZE)) for frame in frames])
    return torch.from_numpy(faces).float().unfold(0, FRAMES, 1).permute(0, 3, 4, 1, 2)


def _shifted_distances(faces: torch.Tensor, audio: torch.Tensor) -> torch.Tensor:
    """Mean Euclidean distance of embeddings (T, D) of faces from those of audio at each shift: (31,)."""
    padded = functional.pad(audio, (0, 0, MAX_SHIFT, MAX_SHIFT))
    shifted = (padded[first : first + len(faces)] for first in range(2 * MAX_SHIFT + 1))
    return torch.stack([functional.pairwise_distance(faces, moved).mean() for moved in shifted])
