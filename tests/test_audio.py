"""Audio features, their windows and the mel of sync experts, each against an independent computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import whisper
import whisper.audio

from musetalk.contract import AUDIO_SAMPLE_RATE, MUSETALK_V1, MUSETALK_V15, FeatureContract
from musetalk.data.audio import SEGMENT_SAMPLES, audio_features, audio_windows, sync_mel
from musetalk.data.video import read_audio
from musetalk.models.audio_encoder import AudioEncoder, build_encoder, load_audio_encoder
from musetalk.models.weights import WeightsError

CPU = torch.device("cpu")


class PositionEncoder:
    """An encoder of two equal states: the position in the segment and the number of the segment, from 1."""

    mel_bins, shape = 80, (2, 2)

    def __init__(self) -> None:
        self.mels: list[torch.Tensor] = []

    def __call__(self, mel: torch.Tensor, final_layer_norm: bool) -> torch.Tensor:
        assert mel.shape == (self.mel_bins, 3000)
        self.mels.append(mel)
        segment = torch.full((1500,), float(len(self.mels)))
        return torch.stack([torch.arange(1500.0), segment], dim=1)[:, None].expand(-1, 2, -1)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> AudioEncoder:
    """A seeded encoder of two layers of width 16, loaded from a checkpoint in half precision."""
    dims = whisper.model.ModelDimensions(
        n_mels=80, n_audio_ctx=1500, n_audio_state=16, n_audio_head=2, n_audio_layer=2,
        n_vocab=1, n_text_ctx=1, n_text_state=1, n_text_head=1, n_text_layer=1,
    )  # fmt: skip
    torch.manual_seed(0)
    tensors = {f"encoder.{name}": tensor.half() for name, tensor in build_encoder(dims).state_dict().items()}
    folder = tmp_path_factory.mktemp("models")
    (folder / "whisper").mkdir()
    checkpoint = {"dims": vars(dims), "model_state_dict": tensors | {"decoder.x": torch.ones(1)}}
    torch.save(checkpoint, folder / "whisper/tiny.pt")
    return load_audio_encoder(folder, CPU)


def states_by_hand(encoder: AudioEncoder, mel: torch.Tensor, final_layer_norm: bool) -> torch.Tensor:
    """The states of openai-whisper's own forward: (1500, S, D)."""
    network = encoder.encoder
    with torch.no_grad():
        x = F.gelu(network.conv2(F.gelu(network.conv1(mel[None])))).permute(0, 2, 1)
        states = [x + network.positional_embedding]
        for block in network.blocks:
            states.append(block(states[-1]))
        if final_layer_norm:
            states[-1] = network.ln_post(states[-1])
    return torch.stack(states, dim=2)[0]


def padded_mel(audio: np.ndarray) -> torch.Tensor:
    """The mel of v1.5: the log-mel of the audio padded with silence to 30 s."""
    return whisper.audio.log_mel_spectrogram(np.pad(audio, (0, SEGMENT_SAMPLES - len(audio))))


def cut_mel(audio: np.ndarray) -> torch.Tensor:
    """The mel of v1.0: the log-mel of the file, padded with zeros to 3000 frames."""
    mel = whisper.audio.log_mel_spectrogram(audio)
    return F.pad(mel, (0, 3000 - mel.shape[1]))


def magnitudes_by_hand(audio: np.ndarray, fft: int, hop: int) -> np.ndarray:
    """Magnitudes of the short-time spectrum, a frame per hop: float64 (M, fft / 2 + 1)."""
    padded = np.pad(audio.astype(np.float64), fft // 2, mode="reflect")
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(fft) / fft)
    frames = np.lib.stride_tricks.sliding_window_view(padded, fft)[::hop]
    return np.abs(np.fft.rfft(frames * hann, axis=1))


def slaney_bank(fft: int, low: float, high: float) -> np.ndarray:
    """The 80 mel filters between two frequencies in Hz, for 16 kHz: (80, fft / 2 + 1)."""

    def mel(hertz):
        return np.where(hertz < 1000, hertz * 3 / 200, 15 + np.log(np.maximum(hertz, 1e-9) / 1000) * 27 / np.log(6.4))

    edges = np.linspace(mel(low), mel(high), 82)
    edges = np.where(edges < 15, edges * 200 / 3, 1000 * np.exp((edges - 15) * np.log(6.4) / 27))
    bins = np.arange(fft // 2 + 1) * 16_000 / fft
    left, middle, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    bank = np.clip(np.minimum((bins - left) / (middle - left), (right - bins) / (right - middle)), 0, None)
    return bank * 2 / (right - left)  # Slaney's norm


def whisper_mel_by_hand(audio: np.ndarray) -> np.ndarray:
    """Whisper's log-mel in float64: (80, M), M = N / 160, with a floor 8 below the loudest bin."""
    power = magnitudes_by_hand(audio, 400, 160)[:-1] ** 2
    mel = np.log10(np.maximum(power @ slaney_bank(400, 0.0, 8000.0).T, 1e-10)).T
    return (np.maximum(mel, mel.max() - 8) + 4) / 4


def mels_by_hand(audio: np.ndarray, contract: FeatureContract) -> list[np.ndarray]:
    """The mels that the official inference of a version encodes: (80, 3000) for each 30 s."""
    count = -(-len(audio) // SEGMENT_SAMPLES)
    if contract is MUSETALK_V15:
        audio = np.pad(audio, (0, count * SEGMENT_SAMPLES - len(audio)))
        return [whisper_mel_by_hand(part) for part in np.split(audio, count)]
    mel = whisper_mel_by_hand(audio)
    return np.split(np.pad(mel, ((0, 0), (0, 3000 * count - mel.shape[1]))), count, axis=1)


# Features.


VERSIONS = pytest.mark.parametrize("contract", [MUSETALK_V1, MUSETALK_V15], ids=["v1", "v15"])


@VERSIONS
def test_features_are_the_states_of_whispers_own_forward(encoder, voice, contract):
    audio = voice(1.7)
    mel = padded_mel(audio) if contract is MUSETALK_V15 else cut_mel(audio)
    expected = states_by_hand(encoder, mel, contract.final_layer_norm)[:85]
    features = audio_features(audio, encoder, contract)
    assert features.dtype == np.float16 and features.shape == (85, 3, 16)
    np.testing.assert_array_equal(features, expected.half().numpy())


@VERSIONS
def test_features_of_the_published_whisper_are_those_of_its_own_forward(real_whisper_models, clips, contract):
    encoder = load_audio_encoder(real_whisper_models, CPU)
    audio = read_audio(clips / "speech_jfk.flac")[: 3 * AUDIO_SAMPLE_RATE]
    mel = padded_mel(audio) if contract is MUSETALK_V15 else cut_mel(audio)
    features = audio_features(audio, encoder, contract)
    assert features.shape == (150, 5, 384)
    np.testing.assert_array_equal(features, states_by_hand(encoder, mel, contract.final_layer_norm)[:150].half())


def test_the_final_norm_changes_the_last_state_alone(encoder, voice):
    mel = padded_mel(voice(0.5))
    plain, normed = encoder(mel, False), encoder(mel, True)
    assert torch.equal(plain[:, :-1], normed[:, :-1]) and not torch.equal(plain[:, -1], normed[:, -1])
    with torch.no_grad():
        torch.testing.assert_close(normed[:, -1], encoder.encoder(mel[None])[0], rtol=0, atol=0)
    assert not normed.requires_grad and not any(p.requires_grad for p in encoder.encoder.parameters())
    assert encoder.mel_bins == 80 and encoder.encoder.conv1.weight.dtype == torch.float32


@VERSIONS
@pytest.mark.parametrize("length", [1, 319, 320, 60_000])
def test_there_are_fifty_features_per_second_and_at_least_one(length, contract):
    features = audio_features(np.full(length, 0.1, np.float32), PositionEncoder(), contract)
    assert features.shape == (max(1, length // 320), 2, 2) and features.dtype == np.float16


@VERSIONS
@pytest.mark.parametrize("rest", [0, 1, 160, 320, 5000])
def test_longer_audio_is_encoded_in_segments_of_30_seconds(contract, rest):
    features = audio_features(np.full(SEGMENT_SAMPLES + rest, 0.1, np.float32), PositionEncoder(), contract)
    positions, segments = features[:, 0].T
    np.testing.assert_array_equal(positions, [*range(1500), *range(rest // 320)])
    assert (segments[:1500] == 1).all() and (segments[1500:] == 2).all()


def soft_then_loud(voice, seconds: float) -> np.ndarray:
    """Audio whose first segment is soft, so that a floor below the loudest bin of the file changes it."""
    audio = voice(seconds)
    audio[:SEGMENT_SAMPLES] *= 0.001
    audio[SEGMENT_SAMPLES:] *= 3
    return audio


def test_mels_follow_the_formulas_of_each_version(voice):
    """v1.0 has one floor for the file, v1.5 one for each segment."""
    audio, mels = soft_then_loud(voice, 32), {}
    for contract in (MUSETALK_V1, MUSETALK_V15):
        encoder = PositionEncoder()
        audio_features(audio, encoder, contract)
        mels[contract] = encoder.mels
        for mel, expected in zip(encoder.mels, mels_by_hand(audio, contract), strict=True):
            np.testing.assert_allclose(mel, expected, atol=2e-3)
    v1, v15 = mels.values()
    assert v1[0].min() > v15[0].min() + 0.1
    assert (v1[1][:, 200:] == 0).all() and (v15[1][:, 202:] == v15[1].min()).all()


@VERSIONS
def test_features_and_windows_of_long_audio_are_those_of_the_official_inference(encoder, voice, contract):
    """Mels by the formulas, openai-whisper's layers on each 30 s, windows across the boundary of two segments."""
    audio = soft_then_loud(voice, 32)
    parts = [
        states_by_hand(encoder, torch.from_numpy(mel).float(), contract.final_layer_norm).numpy()
        for mel in mels_by_hand(audio, contract)
    ]
    features = audio_features(audio, encoder, contract)
    np.testing.assert_allclose(features, np.concatenate(parts)[:1600], rtol=2e-3, atol=1e-2)

    frames = [747, 748, 749, 750, 751, 752]
    windows = audio_windows(features, frames, contract).reshape(len(frames), 10, *encoder.shape)
    for window, first in zip(windows, [10, 8, 6, 4, 2, 0], strict=True):  # steps in the first segment
        expected = np.concatenate([parts[0][1500 - first :], parts[1][: 10 - first]])
        np.testing.assert_allclose(window, expected, rtol=2e-3, atol=1e-2)


@pytest.mark.parametrize("content", [{"model_state_dict": {}}, [1, 2]], ids=["without dims", "no dictionary"])
def test_a_file_that_is_no_whisper_checkpoint_is_refused_by_name(tmp_path, content):
    (tmp_path / "whisper").mkdir()
    torch.save(content, path := tmp_path / "whisper" / "tiny.pt")
    with pytest.raises(WeightsError) as caught:
        load_audio_encoder(tmp_path, CPU)
    assert str(path) in str(caught.value)


# Windows.


@pytest.mark.parametrize(
    ("frame", "edge", "expected"),
    [
        (5, "zero", [7, 8, 9, 10, 11, 12, 13, 14, 15, 16]),
        (0, "zero", [0, 0, 0, 0, 1, 2, 3, 4, 5, 6]),
        (0, "clamp", [1, 1, 1, 1, 1, 2, 3, 4, 5, 6]),
        (9, "zero", [15, 16, 17, 18, 19, 20, 0, 0, 0, 0]),
        (9, "clamp", [15, 16, 17, 18, 19, 20, 20, 20, 20, 20]),
        (14, "zero", [0] * 10),
        (14, "clamp", [20] * 10),
    ],
)
def test_a_window_holds_the_features_around_its_frame(frame, edge, expected):
    """Features are numbered from 1 to 20, plus a quarter in the second state; frame f has features [2f - 4, 2f + 6)."""
    features = np.arange(1, 21)[:, None, None] + np.array([0, 0.25])[None, :, None] + np.zeros(3)
    windows = audio_windows(features.astype(np.float16), [5, frame], FeatureContract(window_edge=edge))
    assert windows.shape == (2, 20, 3) and windows.dtype == np.float16
    steps = windows[1].reshape(10, 2, 3)  # time-major
    np.testing.assert_array_equal(steps[:, 0, 0], expected)
    np.testing.assert_array_equal(steps[:, 1, 0], [number + 0.25 if number else 0 for number in expected])
    assert (steps == steps[:, :, :1]).all()


# The sync expert's mel.


def mel_by_hand(audio: np.ndarray) -> np.ndarray:
    """The formulas of Wav2Lip's mel in float64: (M, 80)."""
    emphasised = np.append(audio[:1], audio[1:] - 0.97 * audio[:-1])
    magnitude = magnitudes_by_hand(emphasised, 800, 200)  # (M, 401)
    decibels = 20 * np.log10(np.maximum(1e-5, magnitude @ slaney_bank(800, 55.0, 7600.0).T)) - 20
    return np.clip(8 * (decibels + 100) / 100 - 4, -4, 4)


@pytest.mark.parametrize("length", [15_999, 16_000, 4321])
def test_the_sync_mel_follows_its_formulas(voice, length):
    audio = voice(2)[4000 : 4000 + length]
    mel, expected = sync_mel(audio), mel_by_hand(audio)
    assert mel.dtype == np.float16 and mel.shape == expected.shape == (1 + length // 200, 80)
    np.testing.assert_allclose(mel, expected, atol=4e-3)  # the resolution of float16 near 4
    assert mel.std() > 0.5


@pytest.mark.filterwarnings("ignore:n_fft:UserWarning")  # by librosa for audio shorter than its window
@pytest.mark.parametrize("length", [1, 200, 700])
def test_the_sync_mel_of_short_or_loud_audio_has_its_shape_and_range(length):
    noise = np.random.default_rng(length).standard_normal(length).astype(np.float32)
    mel = sync_mel(np.clip(noise, -1, 1))
    assert mel.shape == (1 + length // 200, 80) and mel.dtype == np.float16
    assert np.isfinite(mel).all() and mel.min() >= -4 and mel.max() <= 4


def test_the_sync_mel_of_silence_is_its_floor():
    assert (sync_mel(np.zeros(16_000, np.float32)) == -4).all()
