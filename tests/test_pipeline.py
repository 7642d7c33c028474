"""The inference pipeline: its UNet inputs are those of training, its output, and arguments that it refuses."""

import threading
from dataclasses import replace
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import wavfile

import musetalk.data.ping_pong as ping_pong_module
import musetalk.data.video as video_module
import musetalk.inference.pipeline as pipeline_module
from datasets_process import PrepareConfig
from datasets_process import main as prepare
from musetalk.contract import (
    AUDIO_SAMPLE_RATE,
    CONTRACTS,
    MUSETALK_V15,
    RIGID,
    SAMPLES_PER_FRAME,
    VIDEO_FPS,
    ContractError,
)
from musetalk.data.audio import audio_features, audio_windows
from musetalk.data.cache import Cache
from musetalk.data.dataset import FaceDataset
from musetalk.data.ping_pong import ping_pong_index
from musetalk.data.video import MediaError, read_audio, read_frames, write_video
from musetalk.errors import UserError
from musetalk.inference.pipeline import LipSyncPipeline
from musetalk.inference.prepared_video import PreparedVideo
from musetalk.models.unet import build_unet
from musetalk.models.vae import load_vae
from musetalk.training.checkpoint import save_unet

MINI = Path("models/mini")


def make_pipeline(cache: Cache, folder: Path) -> LipSyncPipeline:
    """A pipeline with an untrained UNet, saved and loaded like a trained one."""
    contract = replace(cache.contract, window_edge="zero")
    unet = build_unet(MINI, 0, contract.positional_encoding)
    return LipSyncPipeline.from_checkpoint(save_unet(folder, 1, unet.model.state_dict(), contract), MINI)


@pytest.fixture(scope="module")
def pipeline(make_cache, tmp_path_factory) -> LipSyncPipeline:
    return make_pipeline(make_cache("rigid"), tmp_path_factory.mktemp("unet"))


@pytest.fixture
def video(small_clips, tmp_path) -> Path:
    """12 frames with sound; frames 0, 5 and 6 show no face."""
    frames = list(islice(read_frames(small_clips / "sample_00.mp4"), 12))
    for k in (0, 5, 6):
        frames[k] = np.full_like(frames[k], 90)
    audio = read_audio(small_clips / "sample_00.mp4")[: 12 * SAMPLES_PER_FRAME]
    write_video(tmp_path / "video.mp4", frames, audio, AUDIO_SAMPLE_RATE)
    return tmp_path / "video.mp4"


@pytest.mark.parametrize("contract", CONTRACTS)
def test_unet_inputs_are_the_same_in_training_and_inference(contract, small_clips, tmp_path):
    """Golden test: latents and audio windows of the dataset equal those of the pipeline, bit for bit."""
    video = tmp_path / "videos" / "a.mp4"
    frames, audio = islice(read_frames(small_clips / "sample_00.mp4"), 12), read_audio(small_clips / "sample_00.mp4")
    write_video(video, frames, audio, AUDIO_SAMPLE_RATE)
    prepare(PrepareConfig(hdtf_dir=video.parent, hdtf_samples_dir=tmp_path / "cache", contract=contract))
    cache = Cache(tmp_path / "cache")
    pipeline = make_pipeline(cache, tmp_path)
    prepared = pipeline.prepare(video)
    features = audio_features(read_audio(video), pipeline.audio_encoder, pipeline.contract)
    dataset = FaceDataset(cache, ["a"], pipeline.contract, seed=0, slots=1)
    for step in range(10):
        sample = dataset.draw(step, 0)
        item = dataset.read(sample)
        assert np.array_equal(item["masked_latents"][0], prepared.masked_latents[sample.start])
        assert np.array_equal(item["target_latents"][0], prepared.latents[sample.start])
        assert np.array_equal(item["reference_latents"][0], prepared.latents[sample.references[0]])
        window = audio_windows(features, [sample.start], pipeline.contract)
        assert np.array_equal(item["audio_window"], window)


def test_a_video_shorter_than_the_audio_plays_forwards_and_backwards(pipeline, video, tmp_path):
    """Pixels outside the face box and frames without a face are those of the source."""
    prepared = pipeline.prepare(video)
    assert [k for k, face in enumerate(prepared.faces) if face is None] == [0, 5, 6]
    speech, output = tmp_path / "speech.wav", tmp_path / "new" / "out.mp4"
    samples = np.random.default_rng(0).normal(0, 0.1, 17 * SAMPLES_PER_FRAME).astype(np.float32)
    wavfile.write(speech, AUDIO_SAMPLE_RATE, samples)
    assert pipeline.speak(prepared, speech, output) == 17 == sum(1 for _ in read_frames(output))
    assert abs(len(read_audio(output)) / SAMPLES_PER_FRAME - 17) < 2
    assert [path.name for path in output.parent.iterdir()] == ["out.mp4"]

    source = list(read_frames(video))
    features = audio_features(samples, pipeline.audio_encoder, pipeline.contract)
    for k, frame in enumerate(pipeline.frames(prepared, features, 17)):
        index = ping_pong_index(k, 12)
        x1, y1, x2, y2 = prepared.boxes[index]
        outside = np.ones(frame.shape[:2], bool)
        outside[y1:y2, x1:x2] = False
        assert np.array_equal(frame[outside], source[index][outside])
        assert np.array_equal(frame, source[index]) == (prepared.faces[index] is None)


@pytest.mark.parametrize("error", [MediaError("unreadable", "lost"), KeyboardInterrupt()])
@pytest.mark.parametrize("stage", ["decode", "generate", "blend", "encode"])
def test_an_error_in_any_stage_reaches_the_caller_and_ends_all_threads(
    pipeline, video, tmp_path, monkeypatch, stage, error
):
    prepared, speech = pipeline.prepare(video), tmp_path / "speech.wav"
    wavfile.write(speech, AUDIO_SAMPLE_RATE, np.zeros(200 * SAMPLES_PER_FRAME, np.int16))
    _ = pipeline.audio_encoder
    owner, name = {
        "decode": (ping_pong_module, "upright"),
        "generate": (pipeline, "generate"),
        "blend": (PreparedVideo, "paste"),
        "encode": (video_module, "yuv420p_frames"),
    }[stage]
    calls, working = count(1), getattr(owner, name)

    def failing(*args):
        if stage == "encode":
            return raising(args[0])
        if next(calls) > 3:
            raise error
        return working(*args)

    def raising(images):
        yield from working(islice(images, 3))
        raise error

    monkeypatch.setattr(owner, name, failing)
    before = set(threading.enumerate())
    with pytest.raises(type(error)) as caught:
        pipeline.speak(prepared, speech, tmp_path / "out" / "out.mp4")
    assert caught.value is error
    assert set(threading.enumerate()) == before
    assert list((tmp_path / "out").iterdir()) == []


def test_a_consumer_that_stops_early_leaves_no_thread(pipeline, video):
    prepared, before = pipeline.prepare(video), set(threading.enumerate())
    frames = pipeline.frames(prepared, np.zeros((400, 5, 128), np.float16), 200)
    next(frames)
    assert set(threading.enumerate()) > before
    frames.close()
    assert set(threading.enumerate()) == before


def test_a_limited_number_of_frames_are_the_first_ones(pipeline, video, tmp_path, monkeypatch):
    """Detected, encoded, generated and written."""
    prepared, detected, detect = pipeline.prepare(video), [], pipeline.backend.detect
    monkeypatch.setattr(pipeline.backend, "detect", lambda frames: detected.extend(frames) or detect(frames))
    first = pipeline.prepare(video, max_frames=4)
    assert len(detected) == len(first.faces) == 4
    assert np.array_equal(first.latents, prepared.latents[:4]) and np.array_equal(first.boxes, prepared.boxes[:4])

    written = []
    monkeypatch.setattr(pipeline_module, "write_video", lambda _, frames, *__: written.append(list(frames)))
    assert pipeline.speak(prepared, video, tmp_path / "all.mp4") > 4
    assert pipeline.speak(first, video, tmp_path / "first.mp4", max_frames=4) == 4
    assert np.array_equal(written[1], written[0][:4])


def test_generated_images_do_not_depend_on_the_batch_size(pipeline):
    """Except for rounding."""
    rng = np.random.default_rng(0)
    masked, latents = rng.normal(size=(2, 5, 4, 32, 32)).astype(np.float16)
    windows = rng.normal(size=(5, 50, 128)).astype(np.float16)
    together = pipeline.generate(masked, latents, windows)
    alone = np.concatenate(
        [pipeline.generate(masked[i : i + 1], latents[i : i + 1], windows[i : i + 1]) for i in range(5)]
    )
    difference = np.abs(together.astype(int) - alone)  # of 255; bfloat16 has steps of 1/256 between 1/2 and 1
    assert difference.max() <= 4 and difference.mean() < 0.2


def test_margins_and_videos_that_do_not_fit_are_refused(pipeline, video, tmp_path):
    with pytest.raises(ContractError, match=r"margins = \(0,\).*\(7,\)"):
        pipeline.prepare(video, margin=7)
    blank = tmp_path / "blank.mp4"
    write_video(blank, [np.zeros((64, 64, 3), np.uint8)] * VIDEO_FPS, np.zeros(16_000, np.float32), 16_000)
    with pytest.raises(MediaError, match="blank.mp4: no face"):
        pipeline.prepare(blank)


def test_a_vae_or_audio_encoder_other_than_that_of_training_is_refused(sample_cache, tmp_path):
    contract = replace(sample_cache.contract, vae="0123456789abcdef")
    unet = build_unet(MINI, 0, True)
    with pytest.raises(ContractError, match="vae = '0123456789abcdef'"):
        LipSyncPipeline.from_checkpoint(save_unet(tmp_path, 2, unet.model.state_dict(), contract), MINI)
    contract = replace(sample_cache.contract, audio_encoder="0123456789abcdef")
    pipeline = LipSyncPipeline.from_checkpoint(save_unet(tmp_path, 3, unet.model.state_dict(), contract), MINI)
    with pytest.raises(ContractError, match="audio_encoder = '0123456789abcdef'"):
        _ = pipeline.audio_encoder


@pytest.mark.parametrize(
    ("trained", "requested", "used"),
    [
        ("", None, "mediapipe"),
        ("", "dwpose", "dwpose"),
        ("dwpose", None, "dwpose"),
        ("dwpose", "mmpose", "mmpose"),  # computes the same landmarks
        ("mediapipe", "dwpose", None),
    ],
)
def test_the_face_backend_is_that_of_training(trained, requested, used):
    unet, contract = build_unet(MINI, 0, True), replace(RIGID, face_backend=trained)
    if used:
        assert LipSyncPipeline(unet, None, contract, MINI, requested).face_backend == used
    else:
        with pytest.raises(ContractError, match=f"face_backend = '{trained}'"):
            LipSyncPipeline(unet, None, contract, MINI, requested)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"blend": "neck"}, "^blend must be .* not 'neck'"),
        ({"blend": "jaw"}, "face-parse-bisent/79999_iter.pth is missing"),
        ({"contract": "v2"}, "^contract must be .* not 'v2'"),
        ({"face_backend": "eyes"}, "^face_backend must be .* not 'eyes'"),
    ],
)
def test_invalid_arguments_are_refused_before_loading(arguments, message, tmp_path, monkeypatch):
    for stage in ("load_trained_unet", "load_vae"):
        monkeypatch.setattr(pipeline_module, stage, lambda *_: pytest.fail("loads a network"))
    (tmp_path / "unet.pth").touch()
    with pytest.raises(UserError, match=message):
        LipSyncPipeline.from_checkpoint(tmp_path / "unet.pth", MINI, **arguments)
    if "contract" not in arguments:
        with pytest.raises(UserError, match=message):
            LipSyncPipeline(None, None, MUSETALK_V15, MINI, **arguments)


def test_loading_a_folder_uses_its_newest_weights(sample_cache, tmp_path):
    contract = sample_cache.contract
    for step in (9, 10):
        unet = build_unet(MINI, step, contract.positional_encoding)
        save_unet(tmp_path, step, unet.model.state_dict(), contract)
    loaded = LipSyncPipeline.from_checkpoint(tmp_path, MINI).unet.model.state_dict()
    assert all(torch.equal(value, unet.model.state_dict()[name]) for name, value in loaded.items())


def test_the_vae_has_the_dtype_of_the_contract(sample_cache, tmp_path):
    contract = replace(sample_cache.contract, encode_dtype="bfloat16")
    path = save_unet(tmp_path, 1, build_unet(MINI, 0, True).model.state_dict(), contract)
    vae = LipSyncPipeline.from_checkpoint(path, MINI).vae
    assert vae.autoencoder.dtype is torch.bfloat16
    assert vae.fingerprint == load_vae(MINI, torch.device("cpu"), torch.float32).fingerprint


def test_the_unet_and_the_decoder_run_in_the_mixed_precision_of_the_device(pipeline, monkeypatch):
    dtypes = []
    layers = [pipeline.unet.model.conv_in, pipeline.vae.autoencoder.decoder.conv_in]
    hooks = [layer.register_forward_hook(lambda _, __, output: dtypes.append(output.dtype)) for layer in layers]
    latents, windows = np.zeros((1, 4, 32, 32), np.float16), np.zeros((1, 50, 128), np.float16)
    pipeline.generate(latents, latents, windows)
    monkeypatch.setattr(pipeline_module, "mixed_precision", lambda device: torch.autocast(device.type, torch.bfloat16))
    pipeline.generate(latents, latents, windows)
    before_unet, _, *after = dtypes  # the VAE may have been loaded in bfloat16
    assert before_unet == torch.float32 and after == [torch.bfloat16] * 2
    for hook in hooks:
        hook.remove()


def test_compiled_networks_get_batches_of_one_size(sample_cache, video, tmp_path, monkeypatch):
    """And the frames stay the same."""
    plain, compiled = make_pipeline(sample_cache, tmp_path), make_pipeline(sample_cache, tmp_path)
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    compiled.compile()
    sizes = []
    compiled.unet.model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    monkeypatch.setitem(pipeline_module.BATCH, "cpu", 3)
    prepared, features = plain.prepare(video), np.zeros((20, 5, 128), np.float16)
    frames = zip(plain.frames(prepared, features, 7), compiled.frames(prepared, features, 7), strict=True)
    assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in frames)
    assert sizes == [3, 3, 3]
