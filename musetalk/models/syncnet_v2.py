"""SyncNet v2, which embeds faces and audio for the published measures of lip sync, and its audio features.

Not a sync expert of training (`musetalk.models.syncnet`). Chung and Zisserman 2016, "Out of time: automated lip sync in
the wild", https://doi.org/10.1007/978-3-319-54427-4_19; architecture, parameter names and inputs are those of
https://github.com/joonson/syncnet_python.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import scipy.fft
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import nn

from musetalk.contract import AUDIO_SAMPLE_RATE
from musetalk.models.weights import find, freeze, load_strictly, read_tensors, unwrap

WEIGHTS = "syncnet/syncnet_v2.model"
FACE_SIZE = 224  # pixels, width and height
FRAMES = 5  # per window of faces
CEPSTRA = 13  # per MFCC frame
MFCC_RATE = 100  # frames a second
MFCC_FRAMES = 20  # per window of audio, the 0.2 s of 5 video frames

# Of the MFCCs. Source: the defaults of python_speech_features 0.6
STEP = AUDIO_SAMPLE_RATE // MFCC_RATE  # 160 samples
WINDOW = AUDIO_SAMPLE_RATE // 40  # 400 samples, 25 ms
FFT_SIZE = 512  # samples
MEL_BANDS = 26  # from 0 Hz to half the sample rate
PREEMPHASIS = 0.97
LIFTER = 22


class SyncNetV2(nn.Module):
    """Embeds a window of faces and a window of audio. Their Euclidean distance is small if they are in sync."""

    def __init__(self) -> None:
        super().__init__()
        self.netcnnaud = nn.Sequential(
            *_block(nn.Conv2d(1, 64, 3, padding=1)),  # (64, 13, 20)
            nn.Identity(),  # published as a pooling of 1 x 1
            *_block(nn.Conv2d(64, 192, 3, padding=1)),
            nn.MaxPool2d(3, stride=(1, 2)),  # (192, 11, 9)
            *_block(nn.Conv2d(192, 384, 3, padding=1)),
            *_block(nn.Conv2d(384, 256, 3, padding=1)),
            *_block(nn.Conv2d(256, 256, 3, padding=1)),
            nn.MaxPool2d(3, stride=2),  # (256, 5, 4)
            *_block(nn.Conv2d(256, 512, (5, 4))),  # (512, 1, 1)
        )
        self.netcnnlip = nn.Sequential(
            *_block(nn.Conv3d(3, 96, (5, 7, 7), stride=(1, 2, 2))),  # (96, 1, 109, 109)
            nn.MaxPool3d((1, 3, 3), stride=(1, 2, 2)),  # (96, 1, 54, 54)
            *_block(nn.Conv3d(96, 256, (1, 5, 5), stride=(1, 2, 2), padding=(0, 1, 1))),  # (256, 1, 26, 26)
            nn.MaxPool3d((1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)),  # (256, 1, 13, 13)
            *_block(nn.Conv3d(256, 256, (1, 3, 3), padding=(0, 1, 1))),
            *_block(nn.Conv3d(256, 256, (1, 3, 3), padding=(0, 1, 1))),
            *_block(nn.Conv3d(256, 256, (1, 3, 3), padding=(0, 1, 1))),
            nn.MaxPool3d((1, 3, 3), stride=(1, 2, 2)),  # (256, 1, 6, 6)
            *_block(nn.Conv3d(256, 512, (1, 6, 6))),  # (512, 1, 1, 1)
        )
        self.netfcaud, self.netfclip = (
            nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 1024)) for _ in range(2)
        )

    def embed_faces(self, faces: torch.Tensor) -> torch.Tensor:
        """faces: BGR float (B, 3, 5, 224, 224) in [0, 255]. Returns (B, 1024), not normalised."""
        return self.netfclip(self.netcnnlip(faces).flatten(start_dim=1))

    def embed_audio(self, cepstra: torch.Tensor) -> torch.Tensor:
        """cepstra: `mfcc` of 20 frames, float (B, 1, 13, 20). Returns (B, 1024), not normalised."""
        return self.netfcaud(self.netcnnaud(cepstra).flatten(start_dim=1))


def _block(convolution: nn.Conv2d | nn.Conv3d) -> list[nn.Module]:
    """Convolution, batch norm, ReLU."""
    norm = nn.BatchNorm2d if isinstance(convolution, nn.Conv2d) else nn.BatchNorm3d
    return [convolution, norm(convolution.out_channels), nn.ReLU(inplace=True)]


def load_syncnet_v2(models_dir: Path, device: torch.device) -> SyncNetV2:
    """Loads syncnet/syncnet_v2.model of a models folder, frozen, in float32. Raises WeightsError."""
    path = find(models_dir, WEIGHTS)
    with torch.device("meta"):
        network = SyncNetV2()
    load_strictly(network, unwrap(read_tensors(path), path), path)
    return freeze(network).to(device)


def mfcc(samples: np.ndarray) -> np.ndarray:
    """Computes mel-frequency cepstral coefficients, 100 frames a second: float64 (M, 13).

    samples: int16 (N,) at 16 kHz, N > 0. M = 1 + ceil((N - 400) / 160), but at least 1; the last frame is filled with
    zeros. Coefficient 0 is replaced with the logarithm of the frame's energy. Source (numbers only):
    https://github.com/jameslyons/python_speech_features
    """
    emphasised = np.append(samples[:1], samples[1:] - PREEMPHASIS * samples[:-1])
    count = 1 + max(0, -(-(len(samples) - WINDOW) // STEP))
    padded = np.pad(emphasised, (0, (count - 1) * STEP + WINDOW - len(samples)))
    frames = sliding_window_view(padded, WINDOW)[::STEP]  # (M, 400)
    power = np.abs(np.fft.rfft(frames, FFT_SIZE)) ** 2 / FFT_SIZE  # (M, 257)
    cepstra = scipy.fft.dct(_log(power @ _mel_filters().T), norm="ortho")[:, :CEPSTRA]
    cepstra *= 1 + LIFTER / 2 * np.sin(np.pi * np.arange(CEPSTRA) / LIFTER)
    cepstra[:, 0] = _log(power.sum(axis=1))
    return cepstra


def _log(values: np.ndarray) -> np.ndarray:
    """Natural logarithm of non-negative values; 0 counts as 2^-52, the epsilon of float64."""
    return np.log(np.where(values == 0, np.finfo(np.float64).eps, values))


def _mel_filters() -> np.ndarray:
    """Triangular filters between FFT bins at equal distances in mel: (26, 257)."""
    mels = np.linspace(0, 2595 * np.log10(1 + AUDIO_SAMPLE_RATE / 2 / 700), MEL_BANDS + 2)
    hertz = 700 * (10 ** (mels / 2595) - 1)
    corners = np.floor((FFT_SIZE + 1) * hertz / AUDIO_SAMPLE_RATE)
    bins = np.arange(FFT_SIZE // 2 + 1)
    return np.stack([np.interp(bins, corners[band : band + 3], (0, 1, 0)) for band in range(MEL_BANDS)])
