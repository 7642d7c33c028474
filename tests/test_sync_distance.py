"""LSE-D, LSE-C and the offset against values worked out by hand, with a network whose embeddings are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hostile import refusal
from seeded import random_weights
from torch import nn

from musetalk.evaluation.sync_distance import lip_sync_error
from musetalk.models.syncnet_v2 import SyncNetV2, mfcc
from musetalk.models.weights import freeze

TURN = 0.2  # radians a frame
RADIUS = 10.0


class Clock(nn.Module):
    """Embeds frame t as the point at angle 0.2 t on a circle of radius 10, and audio `ahead` frames further.

    faces: their grey level is t. Audio: in the order of the calls.
    """

    def __init__(self, ahead: int) -> None:
        super().__init__()
        self.ahead, self.unused = ahead, nn.Parameter(torch.zeros(1), requires_grad=False)
        self.faces, self.audio = torch.empty(0, 3, 5, 224, 224), torch.empty(0, 1, 13, 20)

    def embed_faces(self, faces: torch.Tensor) -> torch.Tensor:
        self.faces = torch.cat([self.faces, faces])
        return self.points(faces[:, 0, 0, 0, 0])

    def embed_audio(self, cepstra: torch.Tensor) -> torch.Tensor:
        first, self.audio = len(self.audio), torch.cat([self.audio, cepstra])
        return self.points(torch.arange(first, len(self.audio)) + self.ahead)

    def points(self, times: torch.Tensor) -> torch.Tensor:
        return RADIUS * torch.stack([(TURN * times).cos(), (TURN * times).sin()], dim=1)


def clock_frames(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.uint8)[:, None, None, None].repeat(8, 1).repeat(6, 2).repeat(3, 3)


@pytest.mark.parametrize("ahead", [0, 3, -2])
def test_distances_by_hand(ahead):
    """50 windows. At shift s, frame t meets audio of t + s + ahead: a chord of 20 |sin(0.1 (s + ahead))| apart.

    The |s| windows that meet no audio are at the distance of the circle from 0. At s = -ahead only these count.
    """
    result = lip_sync_error(Clock(ahead), clock_frames(55), np.zeros(55 * 640, np.float32))
    shifts = np.arange(-15, 16)
    chords = 2 * RADIUS * np.abs(np.sin(TURN / 2 * (shifts + ahead)))
    expected = ((50 - abs(shifts)) * chords + abs(shifts) * RADIUS) / 50
    np.testing.assert_allclose(result.distances, expected, atol=1e-4)
    assert result.offset == ahead
    assert result.lse_d == pytest.approx(abs(ahead) * RADIUS / 50, abs=1e-4)
    assert result.lse_c == pytest.approx(sorted(expected)[15] - abs(ahead) * RADIUS / 50, abs=1e-4)


def test_windows_of_faces_and_audio_begin_together():
    """28.9 frames of audio: 23 windows. Window i has frames i to i + 4 and MFCCs 4 i to 4 i + 19."""
    rng, network = np.random.default_rng(0), Clock(0)
    frames = rng.integers(256, size=(30, 224, 224, 3), dtype=np.uint8)
    integers = rng.integers(-(2**15), 2**15, size=28 * 640 + 576, dtype=np.int16)
    lip_sync_error(network, frames, integers / np.float32(2**15))
    cepstra = mfcc(integers).astype(np.float32)
    assert len(network.faces) == len(network.audio) == 23
    for index in (0, 19, 20, 22):
        np.testing.assert_array_equal(network.faces[index], frames[index : index + 5].transpose(3, 0, 1, 2))
        np.testing.assert_array_equal(network.audio[index, 0], cepstra[4 * index : 4 * index + 20].T)


def test_the_shorter_of_video_and_audio_decides_and_six_frames_are_needed():
    audio = np.zeros(40 * 640, np.float32)
    lip_sync_error(network := Clock(0), clock_frames(33), audio)
    assert len(network.faces) == 28
    lip_sync_error(network := Clock(0), clock_frames(6), audio)
    assert len(network.faces) == 1
    for frames, samples in ((clock_frames(5), audio), (clock_frames(40), audio[: 6 * 640 - 1])):
        refusal(lambda frames=frames, samples=samples: lip_sync_error(Clock(0), frames, samples), "a clip has 5")


def test_the_network_is_that_of_the_embeddings():
    """With random weights. Audio of one window: shift 0 has its distance, the others the norm of the faces."""
    network = freeze(random_weights(SyncNetV2()))
    rng = np.random.default_rng(0)
    frames = rng.integers(256, size=(6, 224, 224, 3), dtype=np.uint8)
    integers = rng.integers(-9000, 9000, size=6 * 640, dtype=np.int16)
    distances = lip_sync_error(network, frames, integers / np.float32(2**15)).distances
    faces = network.embed_faces(torch.from_numpy(frames[None, :5]).permute(0, 4, 1, 2, 3).float())
    audio = network.embed_audio(torch.from_numpy(mfcc(integers)[:20].T[None, None]).float())
    np.testing.assert_allclose(distances[15], (faces - audio).norm(), rtol=1e-5)
    np.testing.assert_allclose(np.delete(distances, 15), faces.norm(), rtol=1e-5)
