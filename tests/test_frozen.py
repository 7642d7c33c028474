"""Files that an earlier version wrote are read: a cache and weights, see data/frozen/README.md."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from musetalk.contract import ALL_FIELDS, CACHE_FIELDS, RIGID, SAMPLES_PER_FRAME
from musetalk.data.cache import Cache, verify
from musetalk.data.dataset import FaceDataset, Sample
from musetalk.models.trained_unet import find_unet, load_trained_unet
from musetalk.models.weights import fingerprint

FROZEN = Path(__file__).parent / "data" / "frozen"
CLIP = "WDA_Somebody_000"
CONTRACT = replace(RIGID, encode_dtype="float32", vae="0279f89379b87612", audio_encoder="1279fdfed6a89364")
CONTRACT = replace(CONTRACT, face_backend="mediapipe", positional_encoding=False)


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


@pytest.fixture(scope="module")
def cache() -> Cache:
    return Cache(FROZEN / "cache")


def test_the_cache_is_read(cache):
    assert list(verify(cache.folder)) == [None]
    assert cache.contract.as_dict(CACHE_FIELDS) == CONTRACT.as_dict(CACHE_FIELDS)
    clip = cache.clips[CLIP]
    assert len(clip) == 5 and clip.usable.all() and clip.variants == 1 and clip.identity == "WDA_Somebody"
    assert (clip.metadata["scores"], clip.metadata["audio_offset"], clip.metadata["start"]) == ({}, 0, 0)
    audio = clip.tensor("audio")
    assert audio.shape == ((5 + 30) * SAMPLES_PER_FRAME,) and digest(audio) == "a17a8f54244839d8"


def test_the_cache_gives_training_samples(cache):
    dataset = FaceDataset(cache, [CLIP], cache.contract, seed=0, slots=1, min_reference_gap=1, mel_frames=4)
    sample = dataset.read(Sample(CLIP, start=1, references=(4,), variant=0, reference_variants=(0,)))
    expected = {
        "masked_latents": ((1, 4, 32, 32), "1df3da770405621d"),
        "reference_latents": ((1, 4, 32, 32), "e8fa72ec2278fd3e"),
        "target_latents": ((1, 4, 32, 32), "bbf2766ec670e778"),
        "audio_window": ((1, 50, 64), "aad244ecd14fdd9b"),
        "mel": ((4, 80), "ebcc09033183ad32"),
    }
    assert {name: (tuple(sample[name].shape), digest(sample[name].numpy())) for name in expected} == expected
    image = sample["target_image"]  # compared by its mean colour: JPEG decoders may differ by a level
    assert image.shape == (1, 256, 256, 3) and image.dtype == torch.uint8
    np.testing.assert_allclose(image.float().mean(dim=(0, 1, 2)), (112.5, 131.3, 149.8), atol=0.5)
    np.testing.assert_allclose(sample["mouth_box"], [[56.794, 144.344, 193.967, 212.930]], atol=1e-2)


def test_the_weights_are_read_with_their_contract():
    path = find_unet(FROZEN)
    assert path.name == "unet-0000001.safetensors"
    unet, contract = load_trained_unet(path, FROZEN / "models")
    assert contract.as_dict(ALL_FIELDS) == CONTRACT.as_dict(ALL_FIELDS)
    assert len(unet.model.state_dict()) == 206 and fingerprint(unet.model) == "854e3a7565b88d7b"
