"""The contracts of MuseTalk v1.0 and v1.5 from files to UNet inputs, each against its official inference.

Single steps are tested elsewhere: mels, states and windows in test_audio.py, box and crop in test_crop.py, posterior
and scale in test_vae.py, positions in test_unet.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import whisper.audio
from diffusers import AutoencoderKL
from scipy.io import wavfile
from whisper.model import AudioEncoder as WhisperEncoder

import datasets_process
from datasets_process import PrepareConfig
from musetalk.contract import (
    ALL_FIELDS,
    AUDIO_SAMPLE_RATE,
    CACHE_FIELDS,
    CONTRACTS,
    MODEL_FIELDS,
    MUSETALK_V15,
    ContractError,
    FeatureContract,
)
from musetalk.data.cache import Cache
from musetalk.data.cache_writer import CacheWriter
from musetalk.data.dataset import FaceDataset, read_windows
from musetalk.data.face.face import Face
from musetalk.data.ping_pong import ping_pong_index
from musetalk.data.video import read_frames, write_video
from musetalk.inference.pipeline import LipSyncPipeline
from musetalk.models.audio_encoder import load_audio_encoder
from musetalk.models.trained_unet import load_trained_unet
from musetalk.models.unet import UNet, build_unet
from musetalk.models.vae import load_vae, posterior_noise
from musetalk.training.checkpoint import save_state, save_unet
from musetalk.training.run import resume
from musetalk.training.state import TrainState, training_contract
from musetalk_trainer import PRESETS, train
from tests.sample import sample_audio, sample_frames

CPU = torch.device("cpu")
METADATA = {"source": "a.mp4", "source_bytes": 9, "identity": "a", "start": 0, "last": True}


# UNet inputs and outputs.


@pytest.fixture(scope="module")
def whisper_encoder(mini) -> WhisperEncoder:
    checkpoint = torch.load(mini / "whisper" / "tiny.pt", weights_only=True)
    dims = checkpoint["dims"]
    sizes = (dims[f"n_{name}"] for name in ("mels", "audio_ctx", "audio_state", "audio_head", "audio_layer"))
    encoder = WhisperEncoder(*sizes)
    tensors = {name.removeprefix("encoder."): tensor for name, tensor in checkpoint["model_state_dict"].items()}
    encoder.load_state_dict({name: tensors[name] for name in encoder.state_dict()})
    return encoder.eval()


@pytest.fixture(scope="module")
def autoencoder(mini) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(mini / "sd-vae-ft-mse", torch_dtype=torch.float32).eval()


@torch.no_grad()
def official_tokens(encoder: WhisperEncoder, samples: np.ndarray, count: int, version: str) -> np.ndarray:
    """Audio tokens (count, 50, D) of a version for the first `count` frames of less than 30 s of audio."""
    if version == "musetalk_v15":
        mel = whisper.audio.log_mel_spectrogram(np.pad(samples, (0, 480_000 - len(samples))))
    else:
        mel = whisper.audio.log_mel_spectrogram(samples)
        mel = torch.nn.functional.pad(mel, (0, 3000 - mel.shape[1]))
    x = torch.nn.functional.gelu(encoder.conv1(mel[None]))
    x = torch.nn.functional.gelu(encoder.conv2(x)).transpose(1, 2) + encoder.positional_embedding
    states = [x]
    for block in encoder.blocks:
        states.append(block(states[-1]))
    if version == "musetalk_v15":
        states[-1] = encoder.ln_post(states[-1])
    features = torch.stack(states, dim=2)[0, : len(samples) // 320].numpy()  # (F, 5, D)

    mode = "constant" if version == "musetalk_v15" else "edge"
    padded = np.pad(features, ((4, 16), (0, 0), (0, 0)), mode=mode)
    width = features.shape[-1]
    windows = np.stack([padded[2 * k : 2 * k + 10].reshape(50, width) for k in range(count)])
    angle = np.arange(50)[:, None] / 10_000 ** (np.arange(0, width, 2) / width)
    return windows + np.stack([np.sin(angle), np.cos(angle)], axis=-1).reshape(50, width)


@torch.no_grad()
def official_latents(
    autoencoder: AutoencoderKL, frame: np.ndarray, landmarks: np.ndarray, noise: np.ndarray, version: str
) -> np.ndarray:
    """UNet input (8, 32, 32) of a version for the face in a frame. noise: (2, 4, 32, 32)."""
    x, y = landmarks.astype(np.int32).T
    x1, x2, y1, y2 = min(x), max(x), max(0, y[29] - (max(y) - y[29])), max(y)
    if version == "musetalk_v15":
        y2 = min(y2 + 10, len(frame))
    crop = cv2.resize(frame[y1:y2, x1:x2], (256, 256), interpolation=cv2.INTER_LANCZOS4)
    image = cv2.cvtColor(crop, cv2.COLOR_BGR2RGB).transpose(2, 0, 1) / 255  # (3, 256, 256) in [0, 1]
    upper = (np.arange(256) < 128)[:, None]
    latents = []
    for pixels, eps in zip((image * upper, image), noise, strict=True):
        normalised = torch.from_numpy((pixels - 0.5) / 0.5).float()[None]
        mean, logvar = autoencoder.quant_conv(autoencoder.encoder(normalised)).chunk(2, dim=1)
        latents.append((mean + torch.exp(logvar / 2) * torch.from_numpy(eps)) * autoencoder.config.scaling_factor)
    return torch.cat(latents, dim=1)[0].numpy()


@pytest.mark.parametrize("version", ["musetalk_v1", "musetalk_v15"])
def test_released_weights_get_the_inputs_of_the_official_inference(
    version, mini, tmp_path, whisper_encoder, autoencoder
):
    """A video of three frames and an audio of seven, from files to generated faces."""
    torch.save(build_unet(mini, 0, True).model.state_dict(), tmp_path / "unet.pth")
    video, speech, count = tmp_path / "face.mp4", tmp_path / "speech.wav", 7
    write_video(video, sample_frames(0, 40, 43), np.zeros(9, np.float32), AUDIO_SAMPLE_RATE)
    samples = np.round(sample_audio(0, 25, 26 + count)[: 640 * count + 100] * 2**15).astype(np.int16)
    wavfile.write(speech, AUDIO_SAMPLE_RATE, samples)

    pipeline = LipSyncPipeline.from_checkpoint(tmp_path / "unet.pth", mini, contract=version)
    inputs, outputs, faces, generate = [], [], [], pipeline.generate

    def record(_, args: tuple, kwargs: dict, output) -> None:
        inputs.append((*args, kwargs["encoder_hidden_states"]))
        outputs.append(output.sample)

    pipeline.unet.model.register_forward_hook(record, with_kwargs=True)
    pipeline.generate = lambda *args: faces.append(images := generate(*args)) or images
    prepared = pipeline.prepare(video)
    assert pipeline.speak(prepared, speech, tmp_path / "out.mp4") == count
    unet_input, timestep, tokens = (torch.cat([torch.atleast_1d(call[i]) for call in inputs]) for i in range(3))

    assert (timestep == 0).all()
    expected = official_tokens(whisper_encoder, samples / np.float32(2**15), count, version)
    np.testing.assert_allclose(tokens, expected, rtol=1e-3, atol=5e-3)  # float16 in the cache
    frames, margin = list(read_frames(video)), 10 if version == "musetalk_v15" else 0
    for k in range(count):
        index = ping_pong_index(k, len(frames))
        noise = posterior_noise("face", index, margin)
        expected = official_latents(autoencoder, frames[index], prepared.faces[index].landmarks, noise, version)
        np.testing.assert_allclose(unet_input[k], expected, rtol=1e-3, atol=2e-3)

    with torch.no_grad():
        image = autoencoder.decode(torch.cat(outputs) / autoencoder.config.scaling_factor).sample
    expected = ((image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255).round()[..., ::-1]
    assert np.abs(np.concatenate(faces) - expected).max() <= 1


def test_training_feeds_masked_then_reference_latents(mini, tmp_path, random_tensors, monkeypatch):
    """Both from one clip: the masked frame, whose audio is the other input, and a reference frame away from it."""
    contract = replace(MUSETALK_V15, margins=(10,), vae=load_vae(mini, CPU, torch.float32).fingerprint)
    writer = CacheWriter(tmp_path / "cache", contract)
    stored = {name: random_tensors(16, states=5, width=128, seed=seed) for seed, name in enumerate("ab")}
    for name, tensors in stored.items():
        writer.write(name, tensors, METADATA | {"source": f"{name}.mp4", "identity": name})
    inputs = []

    def record(_, *args: torch.Tensor) -> None:
        inputs.extend(args)
        raise InterruptedError

    monkeypatch.setattr(UNet, "forward", record)
    config = replace(
        PRESETS["demo"],
        hdtf_samples_dir=tmp_path / "cache",
        held_out_identities=(),
        start_from="",
        checkpoint_dir=tmp_path / "checkpoints",
        log_dir=tmp_path / "log",
        contract="musetalk_v15",
        loss_weights={"latent_l1": 1.0},
        batch_size=4,
    )
    with pytest.raises(InterruptedError):
        train("demo", config)
    unet_input, windows = inputs
    assert unet_input.shape == (4, 8, 32, 32) and windows.shape == (4, 50, 128)
    cache = Cache(tmp_path / "cache")
    for latents_pair, window in zip(unet_input.numpy(), windows.numpy(), strict=True):
        matches = {
            tensor: [
                (name, k)
                for name, tensors in stored.items()
                for k in range(16)
                if np.array_equal(tensors[tensor][k, 0], latents)
            ]
            for tensor, latents in (("masked_latents", latents_pair[:4]), ("latents", latents_pair[4:]))
        }
        ((clip, frame),), ((reference_clip, reference),) = matches.values()
        assert clip == reference_clip and abs(frame - reference) >= 5
        np.testing.assert_array_equal(window, read_windows(cache.clips[clip], frame, frame + 1, MUSETALK_V15)[0])


# Time.

RATES = [Fraction(25), Fraction(60), Fraction(24_000, 1001), Fraction(30_000, 1001)]
MOMENTS = range(1, 10, 2)  # seconds of a flash and a beep


class FlashBackend:
    """A backend that detects a face as large as the frame, in bright frames only."""

    def detect(self, frames):
        height, width = frames[0].shape[:2]
        points = np.full((68, 2), (width / 2, height / 2), np.float32)
        points[[0, 16], 0], points[8, 1] = (0, width), height
        face = Face(np.array([0, 0, width, height], np.float32), points, 1.0)
        return [[face] if frame.mean() > 128 else [] for frame in frames]


def flashes_of(rate: Fraction) -> list[int]:
    """Indices of the bright frames in a video at this frame rate."""
    return [round(second * rate) for second in MOMENTS]


@pytest.fixture(scope="module")
def flashing(tmp_path_factory, write_source, mini) -> Cache:
    """A cache of ten seconds at each frame rate with a beep at each flash, prepared by the real script."""
    folder = tmp_path_factory.mktemp("flashes")
    time = np.arange(10 * AUDIO_SAMPLE_RATE) / AUDIO_SAMPLE_RATE
    for rate in RATES:
        sound = 0.001 * np.random.default_rng(0).standard_normal(len(time))
        for flash in flashes_of(rate):
            near = np.clip((time - float(flash / rate)) / 0.03, -1, 1)  # 60 ms
            sound += 0.3 * np.cos(np.pi / 2 * near) ** 2 * np.sin(2 * np.pi * 1500 * time)
        pictures = [np.full((64, 64, 3), 220 if k in flashes_of(rate) else 30, np.uint8) for k in range(int(10 * rate))]
        write_source(folder / f"at {float(rate):.2f}.mp4", pictures, rate=rate, audio=sound)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets_process, "load_face_backend", lambda *_: FlashBackend())
        cache_dir = tmp_path_factory.mktemp("flashes_cache")
        config = PrepareConfig(folder, cache_dir, mini, contract="musetalk_v15", num_workers=1)
        datasets_process.main(config)
    return Cache(cache_dir)


@pytest.mark.parametrize("rate", RATES, ids=lambda rate: f"{float(rate):.2f}")
def test_video_and_audio_are_aligned_in_the_cache_at_every_frame_rate(flashing, mini, rate):
    """Frame k is the source frame nearest to k / 25 s, and step 4 of its window is the audio of that time."""
    clip, flashes = flashing.clips[f"at {float(rate):.2f}"], flashes_of(rate)
    nearest = [round(Fraction(k, 25) * rate) for k in range(len(clip))]  # without ties at these rates
    bright = np.flatnonzero(clip.usable)
    assert abs(len(clip) - 250) <= 1 and len(bright) == len(MOMENTS)
    assert bright.tolist() == [k for k, picture in enumerate(nearest) if picture in flashes]
    assert all(clip.image(k).mean() > 200 for k in bright)

    # Only the first state is local; the others depend on the whole 30 s.
    positions = load_audio_encoder(mini, CPU).encoder.positional_embedding.numpy()
    features = clip.tensor("audio_features")[:, 0] - positions[: clip.rows("audio_features")]
    quiet = np.median(features, axis=0)
    mel = clip.tensor("mel").astype(np.float32).max(axis=1)
    for k, flash in zip(bright, flashes, strict=True):
        window = read_windows(clip, k, k + 1, MUSETALK_V15).reshape(10, 5, -1)[:, 0] - positions[2 * k - 4 : 2 * k + 6]
        assert abs(np.abs(window - quiet).sum(axis=1).argmax() - 4) <= 1
        around = slice(round(80 * k / 25) - 8, round(80 * k / 25) + 9)  # the mel of the sync expert, 80 a second
        assert abs(around.start + mel[around].argmax() - 80 * flash / rate) <= 1.5


# Refusals.

OTHER = {
    "crop": "rigid",
    "bbox_shift": 3,
    "margins": (7,),
    "posterior": "mode",
    "final_layer_norm": False,
    "mel_scope": "file",
    "tail": "mel_zero",
    "encode_dtype": "bfloat16",
    "vae": "other",
    "audio_encoder": "other",
    "face_backend": "dwpose",
    "window_edge": "clamp",
    "positional_encoding": False,
}


@pytest.fixture(scope="module")
def artefacts(mini, tmp_path_factory, random_tensors) -> tuple[Path, FeatureContract, TrainState]:
    """A folder with a cache, a training state and weights, all under one contract; and a state to resume into."""
    folder = tmp_path_factory.mktemp("artefacts")
    contract = replace(MUSETALK_V15, margins=(0, 10), vae="one", audio_encoder="two", face_backend="mediapipe")
    CacheWriter(folder, contract).write("a", random_tensors(12, variants=2), METADATA)
    unet = build_unet(mini, 0, True)
    state = TrainState(
        unet, contract, torch.optim.AdamW(unet.parameters()), "adamw", copy.deepcopy(unet.model.state_dict())
    )
    save_state(folder, 1, state.as_dict(), keep=1)
    save_unet(folder, 1, unet.model.state_dict(), contract)
    return folder, contract, state


def readers(folder: Path, models_dir: Path, state: TrainState) -> dict[str, Callable[[FeatureContract], object]]:
    """Every operation that compares the contract of an artefact with a requested one, by name."""
    cache = Cache(folder)
    weights = folder / "unet-0000001.safetensors"
    return {
        "continue a cache": lambda requested: CacheWriter(folder, requested),
        "read a cache": lambda requested: FaceDataset(cache, ["a"], requested, seed=0, slots=1),
        "resume training": lambda requested: resume(replace(state, contract=requested), folder),
        "initialise training": lambda requested: replace(state, contract=requested).load_pretrained(folder),
        "load weights": lambda requested: load_trained_unet(weights, models_dir, requested),
    }


def test_every_field_but_mask_is_tested():
    assert {*OTHER, "mask"} == set(ALL_FIELDS)


@pytest.mark.parametrize("field", OTHER)
def test_every_reader_refuses_another_contract(artefacts, mini, field):
    folder, contract, state = artefacts
    other = replace(contract, **{field: OTHER[field]})
    for name, read in readers(folder, mini, state).items():
        read(contract)
        if name == "initialise training" and field == "encode_dtype":
            read(other)  # training goes on at any precision
        elif field in CACHE_FIELDS or "cache" not in name:
            with pytest.raises(ContractError) as caught:
                read(other)
            message = str(caught.value)
            assert str(folder) in message and f"{field} = {getattr(contract, field)!r}" in message, name
            assert f"but {OTHER[field]!r}" in message, name
        else:
            read(other)  # caches do not depend on model fields


@pytest.mark.parametrize("preset", CONTRACTS)
def test_the_contract_of_training_combines_the_cache_and_the_requested_windows(preset, tmp_path, random_tensors):
    """Fields that the contract's name does not fix are those of the cache; another name is refused."""
    own = {"bbox_shift": 4, "margins": (3, 9), "encode_dtype": "bfloat16", "posterior": "sample"}
    cached = replace(CONTRACTS[preset], **own, vae="one", audio_encoder="two", face_backend="dwpose")
    CacheWriter(tmp_path, cached).write("a", random_tensors(12, variants=2), METADATA)
    cache = Cache(tmp_path)
    for requested, base in CONTRACTS.items():
        if requested == preset:
            combined = training_contract(requested, cache, positional_encoding=True)
            assert combined.as_dict(CACHE_FIELDS) == cached.as_dict(CACHE_FIELDS)
            assert combined.as_dict(MODEL_FIELDS) == base.as_dict(MODEL_FIELDS)
        else:
            field = "crop" if "rigid" in (requested, preset) else "final_layer_norm"
            have, want = getattr(cached, field), getattr(base, field)
            with pytest.raises(ContractError) as caught:
                training_contract(requested, cache, positional_encoding=True)
            message = str(caught.value)
            assert f"{tmp_path} was made with {field} = {have!r}, but {want!r}" in message


@pytest.mark.parametrize("field", [name for name in CACHE_FIELDS if name in OTHER])
def test_training_refuses_a_cache_that_differs_in_a_field_fixed_by_the_contract(field, tmp_path, random_tensors):
    own = ("bbox_shift", "margins", "encode_dtype", "posterior", "vae", "audio_encoder", "face_backend")
    CacheWriter(tmp_path, replace(MUSETALK_V15, **{field: OTHER[field]})).write("a", random_tensors(12), METADATA)
    if field in own:
        assert getattr(training_contract("musetalk_v15", Cache(tmp_path), True), field) == OTHER[field]
    else:
        with pytest.raises(ContractError, match=f"{field} = "):
            training_contract("musetalk_v15", Cache(tmp_path), True)
