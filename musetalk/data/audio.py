"""Audio -> features -> one window per video frame, and the mel spectrogram of the sync expert."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import librosa
import numpy as np
import torch
import whisper.audio

from musetalk.contract import (
    AUDIO_MARGIN,
    AUDIO_SAMPLE_RATE,
    CONTEXT_FRAMES,
    FEATURES_PER_FRAME,
    SAMPLES_PER_FEATURE,
    SAMPLES_PER_FRAME,
    SYNC_MEL_BINS,
    SYNC_MEL_RATE,
    VIDEO_FPS,
    WINDOW_STEPS,
    FeatureContract,
)
from musetalk.models.audio_encoder import AudioEncoder

SEGMENT_SAMPLES = whisper.audio.N_SAMPLES  # 30 s, the input length of Whisper
SEGMENT_MEL_FRAMES = whisper.audio.N_FRAMES  # 3000
FULL_SCALE = 2**15  # of 16-bit audio
ROOM_NOISE = 1e-3  # standard deviation of the noise of a quiet room, -60 dB of full scale
SYNC_MEL_BLOCK = 60 * SYNC_MEL_RATE  # mel frames computed at a time, to bound memory

Frames = TypeVar("Frames", int, np.ndarray)


def audio_features(audio: np.ndarray, encoder: AudioEncoder, contract: FeatureContract) -> np.ndarray:
    """Computes the hidden states of Whisper's encoder, 50 per second.

    audio: float32 (N,) in [-1, 1] at 16 kHz, of any length. Returns float16 (F, S, D), F = max(1, N // 320).
    Encoded in segments of 30 s without overlap, as MuseTalk does.
    """
    count = max(1, len(audio) // SAMPLES_PER_FEATURE)
    features = np.empty((count, *encoder.shape), np.float16)
    for index, mel in enumerate(_segment_mels(audio, encoder.mel_bins, contract)):
        states = encoder(mel, contract.final_layer_norm)  # (1500, S, D)
        segment = features[index * len(states) : (index + 1) * len(states)]
        segment[:] = states[: len(segment)].half().cpu().numpy()
    return features


def _segment_mels(audio: np.ndarray, mel_bins: int, contract: FeatureContract) -> Iterator[torch.Tensor]:
    """Yields Whisper's log-mel spectrogram of each 30 s segment, (mel_bins, 3000)."""
    samples = torch.from_numpy(audio).float()
    padding = -len(samples) % SEGMENT_SAMPLES if contract.tail == "silence" else 0
    if contract.mel_scope == "file":
        mels = _log_mel(torch.nn.functional.pad(samples, (0, padding)), mel_bins).split(SEGMENT_MEL_FRAMES, dim=1)
    else:
        *full, last = samples.split(SEGMENT_SAMPLES)
        mels = (_log_mel(segment, mel_bins) for segment in (*full, torch.nn.functional.pad(last, (0, padding))))
    return (whisper.audio.pad_or_trim(mel, SEGMENT_MEL_FRAMES) for mel in mels)


def _log_mel(samples: torch.Tensor, mel_bins: int) -> torch.Tensor:
    """Computes Whisper's log-mel spectrogram; audio shorter than one FFT window is padded with silence."""
    padding = max(0, whisper.audio.N_FFT - len(samples))
    return whisper.audio.log_mel_spectrogram(torch.nn.functional.pad(samples, (0, padding)), mel_bins)


def silence_features(encoder: AudioEncoder, contract: FeatureContract) -> np.ndarray:
    """Computes `audio_features` of 30 s of digital and of recorded silence: float16 (2, 1500, S, D).

    Recorded silence is white noise at `ROOM_NOISE`.
    """
    noise = ROOM_NOISE * np.random.default_rng(0).standard_normal(SEGMENT_SAMPLES)
    silences = (np.zeros(SEGMENT_SAMPLES), noise)
    return np.stack([audio_features(silence.astype(np.float32), encoder, contract) for silence in silences])


def window_start(frames: Frames) -> Frames:
    """Index of the first feature in the window of a frame; negative before the start of the clip."""
    return FEATURES_PER_FRAME * (frames - CONTEXT_FRAMES)


def audio_windows(
    features: np.ndarray, frames: Sequence[int], contract: FeatureContract, first: int = 0, count: int | None = None
) -> np.ndarray:
    """Returns the audio window of each of T frames: features [2f - 4, 2f + 6), time-major.

    features: (F, S, D). Where only a part of a clip is passed, `first` is the index of its first feature and `count`
    the number of features in the clip. Returns (T, W, D) of the same dtype, W = 10 S. Positions beyond the clip are
    zero (window_edge "zero") or repeat the nearest feature ("clamp").
    """
    count = len(features) if count is None else count
    index = window_start(np.asarray(frames))[:, None] + np.arange(WINDOW_STEPS)  # (T, 10)
    inside = np.clip(index, 0, count - 1)
    windows = features[inside - first]  # (T, 10, S, D)
    if contract.window_edge == "zero":
        windows[index != inside] = 0
    return windows.reshape(len(index), -1, features.shape[-1])


def clip_audio(audio: np.ndarray, start: int, frames: int) -> np.ndarray:
    """Cuts the audio of video frames [start, start + frames) with `AUDIO_MARGIN` frames more on either side.

    audio: float32 (N,) in [-1, 1] at 16 kHz. Returns int16 (640 (frames + 30),), zeros beyond the file.
    """
    first, stop = (SAMPLES_PER_FRAME * frame for frame in (start - AUDIO_MARGIN, start + frames + AUDIO_MARGIN))
    samples = audio[max(0, first) : stop]
    before = max(0, -first)
    samples = np.pad(samples, (before, stop - first - before - len(samples)))
    return to_int16(samples)


def to_int16(samples: np.ndarray) -> np.ndarray:
    """Converts samples in [-1, 1] to 16 bits, rounded and clipped."""
    return np.clip(np.round(samples * FULL_SCALE), -FULL_SCALE, FULL_SCALE - 1).astype(np.int16)


def mel_start(frame: Frames) -> Frames:
    """Index of the sync expert's first mel frame at a video frame (3.2 mel frames per video frame). Source: Wav2Lip."""
    return SYNC_MEL_RATE * frame // VIDEO_FPS


def sync_mel(audio: np.ndarray) -> np.ndarray:
    """Computes the sync expert's log-mel, 80 frames per second: float16 (M, 80) in [-4, 4], M = 1 + N // 200.

    audio: float32 (N,) at 16 kHz. Source: Wav2Lip, hparams.py and audio.py (numbers only).
    """
    hop, window = AUDIO_SAMPLE_RATE // SYNC_MEL_RATE, 4 * AUDIO_SAMPLE_RATE // SYNC_MEL_RATE
    emphasised = np.pad(librosa.effects.preemphasis(audio, coef=0.97, zi=[0.0]), window // 2, mode="reflect")
    bank = librosa.filters.mel(sr=AUDIO_SAMPLE_RATE, n_fft=window, n_mels=SYNC_MEL_BINS, fmin=55, fmax=7600)
    mel = np.empty((1 + len(audio) // hop, SYNC_MEL_BINS), np.float16)
    for first in range(0, len(mel), SYNC_MEL_BLOCK):
        block = mel[first : first + SYNC_MEL_BLOCK]
        samples = emphasised[first * hop : (first + len(block) - 1) * hop + window]
        spectrum = np.abs(librosa.stft(samples, n_fft=window, hop_length=hop, center=False))
        decibels = 20 * np.log10(np.maximum(1e-5, bank @ spectrum)) - 20
        block[:] = np.clip(8 * (decibels + 100) / 100 - 4, -4, 4).T
    return mel
