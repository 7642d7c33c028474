"""Audio features, their windows and the sync expert's mel, each against a computation of its own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import whisper
import whisper.audio
from hypothesis import given
from hypothesis import strategies as st

from musetalk.contract import AUDIO_SAMPLE_RATE, MUSETALK_V1, MUSETALK_V15, FeatureContract
from musetalk.data.audio import SEGMENT_SAMPLES, audio_features, audio_windows, sync_mel
from musetalk.data.video import read_audio
from musetalk.models.audio_encoder import AudioEncoder, build_encoder, load_audio_encoder
from musetalk.models.weights import WeightsError

CPU = torch.device("cpu")


class Counting:
    """An encoder of two states that tells, of each segment, its number and the place in it."""

    mel_bins, shape = 80, (2, 2)

    def __init__(self) -> None:
        self.mels: list[torch.Tensor] = []

    def __call__(self, mel: torch.Tensor, final_layer_norm: bool) -> torch.Tensor:
        assert mel.shape == (self.mel_bins, 3000)
        self.mels.append(mel)
        place = torch.arange(1500.0)
        number = torch.full((1500,), float(len(self.mels)))
        return torch.stack([place, number], dim=1)[:, None].expand(-1, 2, -1)


@pytest.fixture(scope="module")
def encoder(mini) -> AudioEncoder:
    return load_audio_encoder(mini, CPU)


@pytest.fixture(scope="module")
def real_encoder(real_whisper_models) -> AudioEncoder:
    return load_audio_encoder(real_whisper_models, CPU)


def states_by_hand(encoder: AudioEncoder, mel: torch.Tensor, final_layer_norm: bool) -> torch.Tensor:
    """openai-whisper's own forward, step by step: (1500, S, D)."""
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
    """The mel of v1.5: silence up to 30 s, then the log-mel of that."""
    return whisper.audio.log_mel_spectrogram(np.pad(audio, (0, SEGMENT_SAMPLES - len(audio))))


def cut_mel(audio: np.ndarray) -> torch.Tensor:
    """The mel of v1.0: the log-mel of the file, zeros up to 3000 frames."""
    mel = whisper.audio.log_mel_spectrogram(audio)
    return F.pad(mel, (0, 3000 - mel.shape[1]))


def magnitudes_by_hand(audio: np.ndarray, fft: int, hop: int) -> np.ndarray:
    """Of the short-time spectrum, one frame at every hop from 0 on: float64 (M, fft / 2 + 1)."""
    around = np.pad(audio.astype(np.float64), fft // 2, mode="reflect")
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(fft) / fft)
    frames = np.lib.stride_tricks.sliding_window_view(around, fft)[::hop]
    return np.abs(np.fft.rfft(frames * hann, axis=1))


def slaney_bank(fft: int, low: float, high: float) -> np.ndarray:
    """The 80 triangles between two frequencies, at 16 kHz: (80, fft / 2 + 1)."""

    def mel(hertz):
        return np.where(hertz < 1000, hertz * 3 / 200, 15 + np.log(np.maximum(hertz, 1e-9) / 1000) * 27 / np.log(6.4))

    edges = np.linspace(mel(low), mel(high), 82)
    edges = np.where(edges < 15, edges * 200 / 3, 1000 * np.exp((edges - 15) * np.log(6.4) / 27))
    bins = np.arange(fft // 2 + 1) * 16_000 / fft
    left, middle, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    bank = np.clip(np.minimum((bins - left) / (middle - left), (right - bins) / (right - middle)), 0, None)
    return bank * 2 / (right - left)  # Slaney's norm


def whisper_mel_by_hand(audio: np.ndarray) -> np.ndarray:
    """Whisper's formulas alone, in float64: (80, M), M = N / 160, the floor 8 below the loudest bin of all."""
    power = magnitudes_by_hand(audio, 400, 160)[:-1] ** 2
    mel = np.log10(np.maximum(power @ slaney_bank(400, 0.0, 8000.0).T, 1e-10)).T
    return (np.maximum(mel, mel.max() - 8) + 4) / 4


def mels_by_hand(audio: np.ndarray, contract: FeatureContract) -> list[np.ndarray]:
    """What the official inference of a version gives its encoder: (80, 3000) for each 30 s."""
    count = -(-len(audio) // SEGMENT_SAMPLES)
    if contract is MUSETALK_V15:
        audio = np.pad(audio, (0, count * SEGMENT_SAMPLES - len(audio)))
        return [whisper_mel_by_hand(part) for part in np.split(audio, count)]
    mel = whisper_mel_by_hand(audio)
    return np.split(np.pad(mel, ((0, 0), (0, 3000 * count - mel.shape[1]))), count, axis=1)


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """Mean absolute difference, relative to the mean size of the first."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    return float(np.abs(one - other).mean() / np.abs(one).mean())


# Features.


@pytest.mark.parametrize("contract", [MUSETALK_V1, MUSETALK_V15], ids=["v1", "v15"])
def test_features_are_the_states_of_whispers_own_forward(encoder, voice, contract):
    audio = voice(1.7)
    mel = padded_mel(audio) if contract is MUSETALK_V15 else cut_mel(audio)
    wanted = states_by_hand(encoder, mel, contract.final_layer_norm)[:85]
    found = audio_features(audio, encoder, contract)
    assert found.dtype == np.float16 and found.shape == (85, 5, 64)
    np.testing.assert_array_equal(found, wanted.half().numpy())


@pytest.mark.parametrize("contract", [MUSETALK_V1, MUSETALK_V15], ids=["v1", "v15"])
def test_features_are_those_of_the_published_whisper(real_encoder, clips, contract):
    audio = read_audio(clips / "speech_jfk.flac")[: 3 * AUDIO_SAMPLE_RATE]
    mel = padded_mel(audio) if contract is MUSETALK_V15 else cut_mel(audio)
    found = audio_features(audio, real_encoder, contract)
    assert found.shape == (150, 5, 384)
    np.testing.assert_array_equal(found, states_by_hand(real_encoder, mel, contract.final_layer_norm)[:150].half())


def test_the_last_state_alone_is_after_the_final_norm(encoder, voice):
    mel = padded_mel(voice(0.5))
    before, after = encoder(mel, False), encoder(mel, True)
    assert torch.equal(before[:, :-1], after[:, :-1])
    with torch.no_grad():
        torch.testing.assert_close(after[:, -1], encoder.encoder.ln_post(before[:, -1]), rtol=0, atol=1e-6)
        torch.testing.assert_close(after[:, -1], encoder.encoder(mel[None])[0], rtol=0, atol=0)
    assert not torch.equal(before[:, -1], after[:, -1])


def test_an_encoder_leaves_no_hook_and_no_gradient_behind(encoder, voice):
    states = encoder(padded_mel(voice(0.5)), True)
    assert not states.requires_grad and not any(p.requires_grad for p in encoder.encoder.parameters())
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in encoder.encoder.blocks)


def test_the_tails_of_the_versions_differ_most_in_the_fifth_state_of_short_audio(real_encoder, clips):
    """DESIGN.md: by 216 % on short audio. The final norm is kept the same here: this is the tail alone."""
    audio = read_audio(clips / "speech_jfk.flac")[: 2 * AUDIO_SAMPLE_RATE]
    zero = audio_features(audio, real_encoder, replace(MUSETALK_V15, tail="mel_zero"))
    silent = audio_features(audio, real_encoder, MUSETALK_V15)
    apart = [difference(silent[:, state], zero[:, state]) for state in range(5)]
    assert apart[0] < 0.01 < apart[4] and apart[4] == max(apart)
    v1 = audio_features(audio, real_encoder, MUSETALK_V1)
    assert difference(v1[:, 4], silent[:, 4]) > 0.5


def test_a_full_segment_has_no_tail(encoder, voice):
    audio = voice(30)
    one, other = (audio_features(audio, encoder, replace(MUSETALK_V15, tail=tail)) for tail in ("mel_zero", "silence"))
    assert one.shape == (1500, 5, 64)
    np.testing.assert_array_equal(one, other)


@given(length=st.integers(1, 60_000), version=st.sampled_from([MUSETALK_V1, MUSETALK_V15]))
def test_there_are_fifty_features_a_second_and_at_least_one(length, version):
    features = audio_features(np.full(length, 0.1, np.float32), Counting(), version)
    assert features.shape == (max(1, length // 320), 2, 2) and features.dtype == np.float16


@pytest.mark.parametrize("scope", ["file", "segment"])
@pytest.mark.parametrize("tail", ["mel_zero", "silence"])
@pytest.mark.parametrize("past", [0, 1, 159, 160, 200, 319, 320, 5000])
def test_longer_audio_is_encoded_in_segments_of_30_seconds(scope, tail, past):
    counting = Counting()
    contract = FeatureContract(mel_scope=scope, tail=tail)
    features = audio_features(np.full(SEGMENT_SAMPLES + past, 0.1, np.float32), counting, contract)
    assert len(features) == 1500 + past // 320
    np.testing.assert_array_equal(features[:1500, 0, 0], np.arange(1500))
    assert (features[:1500, 0, 1] == 1).all() and (features[1500:, 0, 1] == 2).all()
    np.testing.assert_array_equal(features[1500:, 0, 0], np.arange(past // 320))


def loud_and_soft(voice) -> tuple[np.ndarray, np.ndarray]:
    """A soft minute-half, and the same followed by a loud one."""
    soft = 0.001 * voice(30)
    return soft, np.concatenate([soft, 3 * voice(2)])


def test_segments_are_independent_of_each_other_in_scope_segment(encoder, voice):
    soft, both = loud_and_soft(voice)
    alone, joined = audio_features(soft, encoder, MUSETALK_V15), audio_features(both, encoder, MUSETALK_V15)
    np.testing.assert_array_equal(joined[:1500], alone)
    np.testing.assert_array_equal(joined[1500:], audio_features(both[SEGMENT_SAMPLES:], encoder, MUSETALK_V15))


def test_a_loud_second_changes_what_was_heard_before_it_in_scope_file(encoder, voice):
    soft, both = loud_and_soft(voice)
    contract = replace(MUSETALK_V15, mel_scope="file")
    alone, joined = audio_features(soft, encoder, contract), audio_features(both, encoder, contract)
    assert difference(alone, joined[:1500]) > 0.01


def test_the_mel_of_a_file_is_cut_into_segments_after_it_is_made(voice):
    counting, audio = Counting(), voice(31)
    audio_features(audio, counting, MUSETALK_V1)
    mel = whisper.audio.log_mel_spectrogram(audio)
    assert len(counting.mels) == 2
    assert torch.equal(counting.mels[0], mel[:, :3000]) and torch.equal(counting.mels[1][:, :100], mel[:, 3000:])
    assert (counting.mels[1][:, 100:] == 0).all()


def test_the_mels_of_each_version_are_those_of_the_formulas(voice):
    """A soft half minute and two loud seconds: v1.0 floors both by the loudest bin of all, v1.5 each by its own."""
    audio, heard = loud_and_soft(voice)[1], {}
    for contract in (MUSETALK_V1, MUSETALK_V15):
        audio_features(audio, counting := Counting(), contract)
        heard[contract] = counting.mels
        for found, wanted in zip(counting.mels, mels_by_hand(audio, contract), strict=True):
            np.testing.assert_allclose(found, wanted, atol=2e-3)
    soft, loud = ([mels[segment] for mels in heard.values()] for segment in (0, 1))
    assert soft[0].min() > soft[1].min() + 0.1 and soft[0].max() == soft[1].max()
    assert (loud[0][:, 200:] == 0).all() and (loud[1][:, 202:] == loud[1].min()).all()


@pytest.mark.parametrize(("which", "seconds"), [("encoder", 65), ("real_encoder", 31)])
def test_long_audio_is_the_official_inference_of_each_version(request, voice, which, seconds):
    """From samples to windows: mels by the formulas, openai-whisper's layers on each 30 s, windows across the seams."""
    encoder = request.getfixturevalue(which)
    audio = voice(seconds)
    audio[: 15 * AUDIO_SAMPLE_RATE] *= 0.003  # so that floors of the file and of segments differ
    audio[SEGMENT_SAMPLES:] *= 3
    found, wanted = {}, {}
    for contract in (MUSETALK_V1, MUSETALK_V15):
        found[contract] = audio_features(audio, encoder, contract)
        parts = [
            states_by_hand(encoder, torch.from_numpy(mel).float(), contract.final_layer_norm).numpy()
            for mel in mels_by_hand(audio, contract)
        ]
        wanted[contract] = np.concatenate(parts)[: 50 * seconds]
        assert found[contract].shape == wanted[contract].shape
        np.testing.assert_allclose(found[contract], wanted[contract], rtol=2e-3, atol=1e-2)

        frames = [747, 748, 749, 750, 751, 752]
        windows = audio_windows(found[contract], frames, contract).reshape(len(frames), 10, *encoder.shape)
        for window, old in zip(windows, [10, 8, 6, 4, 2, 0], strict=True):  # features of the first segment
            across = np.concatenate([parts[0][1500 - old :], parts[1][: 10 - old]])
            np.testing.assert_allclose(window, across, rtol=2e-3, atol=1e-2)
    near = [difference(wanted[contract], found[contract]) for contract in found]
    apart = difference(wanted[MUSETALK_V15], found[MUSETALK_V1])
    assert max(near) < 1e-3 and apart > 0.05


# The encoder's file.


def test_the_encoder_of_a_checkpoint_has_its_dimensions(encoder):
    assert encoder.mel_bins == 80


@pytest.mark.parametrize("content", [{"dims": {"n_mels": 80}}, {"model_state_dict": {}}, [1, 2], {"dims": 3}])
def test_what_is_no_whisper_checkpoint_is_refused_by_name(tmp_path, content):
    (tmp_path / "whisper").mkdir()
    torch.save(content, path := tmp_path / "whisper" / "tiny.pt")
    with pytest.raises(WeightsError) as caught:
        load_audio_encoder(tmp_path, CPU)
    assert str(path) in str(caught.value)


def test_a_checkpoint_in_half_precision_gives_an_encoder_in_float32(tmp_path, voice):
    dims = whisper.model.ModelDimensions(
        n_mels=80, n_audio_ctx=1500, n_audio_state=16, n_audio_head=2, n_audio_layer=2,
        n_vocab=1, n_text_ctx=1, n_text_state=1, n_text_head=1, n_text_layer=1,
    )  # fmt: skip
    torch.manual_seed(0)
    network = build_encoder(dims)
    tensors = {f"encoder.{name}": tensor.half() for name, tensor in network.state_dict().items()}
    (tmp_path / "whisper").mkdir()
    torch.save(
        {"dims": vars(dims), "model_state_dict": tensors | {"decoder.x": torch.ones(1)}}, tmp_path / "whisper/tiny.pt"
    )
    encoder = load_audio_encoder(tmp_path, CPU)
    features = audio_features(voice(0.5), encoder, MUSETALK_V15)
    assert features.shape == (25, 3, 16) and encoder.encoder.conv1.weight.dtype == torch.float32
    np.testing.assert_array_equal(features, states_by_hand(encoder, padded_mel(voice(0.5)), True)[:25].half())


# Windows.


def numbered(count: int, states: int = 2, width: int = 3) -> np.ndarray:
    """Features that carry 1 + their index, and their state in the last digit behind the point."""
    return ((1 + np.arange(count))[:, None, None] + np.arange(states)[None, :, None] / 4 + np.zeros(width)).astype(
        np.float16
    )


@pytest.mark.parametrize(
    ("frame", "edge", "wanted"),
    [
        (5, "zero", [7, 8, 9, 10, 11, 12, 13, 14, 15, 16]),
        (5, "clamp", [7, 8, 9, 10, 11, 12, 13, 14, 15, 16]),
        (2, "zero", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        (0, "zero", [0, 0, 0, 0, 1, 2, 3, 4, 5, 6]),
        (0, "clamp", [1, 1, 1, 1, 1, 2, 3, 4, 5, 6]),
        (9, "zero", [15, 16, 17, 18, 19, 20, 0, 0, 0, 0]),
        (9, "clamp", [15, 16, 17, 18, 19, 20, 20, 20, 20, 20]),
        (14, "zero", [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        (14, "clamp", [20] * 10),
    ],
)
def test_windows_by_hand(frame, edge, wanted):
    """The features are numbered from 1 to 20; frame f hears [2f - 4, 2f + 6)."""
    found = audio_windows(numbered(20), [frame], FeatureContract(window_edge=edge))
    assert found.shape == (1, 20, 3) and found.dtype == np.float16
    steps = found.reshape(10, 2, 3)  # time-major: the states of one moment are neighbours
    np.testing.assert_array_equal(steps[:, 0, 0], wanted)
    np.testing.assert_array_equal(steps[:, 1, 0], [step + 0.25 if step else 0 for step in wanted])
    assert (steps == steps[:, :, :1]).all()


@given(
    count=st.integers(1, 60),
    frames=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    edge=st.sampled_from(["zero", "clamp"]),
)
def test_a_window_is_what_its_indices_say(count, frames, edge):
    features = numbered(count)
    contract = FeatureContract(window_edge=edge)
    found = audio_windows(features, frames, contract)
    assert found.shape == (len(frames), 20, 3)
    for frame, window in zip(frames, found.reshape(len(frames), 10, 2, 3), strict=True):
        for step, heard in enumerate(window):
            index = 2 * frame - 4 + step
            if 0 <= index < count:
                np.testing.assert_array_equal(heard, features[index])
            elif edge == "zero":
                assert (heard == 0).all()
            else:
                np.testing.assert_array_equal(heard, features[0 if index < 0 else -1])


# The sync expert's mel.


def mel_by_hand(audio: np.ndarray) -> np.ndarray:
    """The formulas alone, in float64: (M, 80)."""
    emphasised = np.append(audio[:1], audio[1:] - 0.97 * audio[:-1])
    magnitude = magnitudes_by_hand(emphasised, 800, 200)  # (M, 401)
    decibels = 20 * np.log10(np.maximum(1e-5, magnitude @ slaney_bank(800, 55.0, 7600.0).T)) - 20
    return np.clip(8 * (decibels + 100) / 100 - 4, -4, 4)


@pytest.mark.parametrize("length", [16_000, 16_001, 15_999, 4321])
def test_the_mel_is_that_of_the_formulas(voice, length):
    audio = voice(2)[4000 : 4000 + length]
    found, wanted = sync_mel(audio), mel_by_hand(audio)
    assert found.dtype == np.float16 and found.shape == wanted.shape == (1 + length // 200, 80)
    np.testing.assert_allclose(found, wanted, atol=4e-3)  # float16 near 4 is in steps of 0.002 to 0.004
    assert found.std() > 0.5


@pytest.mark.filterwarnings("ignore:n_fft:UserWarning")  # librosa, of audio shorter than its window
@given(length=st.integers(1, 5000), loudness=st.floats(0, 1))
def test_a_mel_of_any_audio_has_its_shape_and_range(length, loudness):
    noise = np.random.default_rng(length).standard_normal(length).astype(np.float32)
    mel = sync_mel(np.clip(loudness * noise, -1, 1))
    assert mel.shape == (1 + length // 200, 80) and mel.dtype == np.float16
    assert np.isfinite(mel).all() and mel.min() >= -4 and mel.max() <= 4


def test_silence_is_the_floor_of_the_mel():
    assert (sync_mel(np.zeros(16_000, np.float32)) == -4).all()
