"""The tiny decoder: its output, files, distillation and use in training."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import pytest
import safetensors.torch
import torch
from accelerate.state import AcceleratorState

from losses.objective import Objective
from musetalk.contract import CONTRACTS, ContractError, FeatureContract
from musetalk.data.cache import Cache
from musetalk.data.cache_writer import CacheWriter
from musetalk.models.tiny_decoder import TinyDecoder, decoder_psnr, load_tiny_decoder, save_tiny_decoder
from musetalk.models.vae import VAE, load_vae
from musetalk.models.weights import WeightsError
from musetalk_trainer import PRESETS, TrainConfig, train, weights
from tests.conftest import interrupted_after_a_save
from tools import distil_decoder
from tools.distil_decoder import DistilConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vae(mini) -> VAE:
    return load_vae(mini, CPU, torch.float32)


@pytest.fixture
def tiny(vae, tmp_path) -> Path:
    """A file of an untrained decoder of the small VAE."""
    torch.manual_seed(0)
    save_tiny_decoder(tmp_path / "tiny.safetensors", TinyDecoder(4), vae)
    return tmp_path / "tiny.safetensors"


@pytest.fixture
def write_cache(random_tensors, tmp_path) -> Callable[[FeatureContract], Cache]:
    """A function: contract -> cache of two random clips of one person, for the small audio encoder."""

    def write(contract: FeatureContract) -> Cache:
        writer = CacheWriter(tmp_path / "cache", contract)
        for seed, name in enumerate(("a", "b")):
            metadata = {"source": f"{name}.mp4", "source_bytes": 1, "identity": "one", "last": True}
            writer.write(name, random_tensors(12, states=5, width=128, seed=seed), metadata)
        return Cache(tmp_path / "cache")

    return write


@pytest.fixture
def cache(write_cache) -> Cache:
    """A cache whose contract names no VAE."""
    return write_cache(CONTRACTS["rigid"])


@pytest.fixture
def config(cache, tiny, mini, tmp_path) -> TrainConfig:
    """Six steps of one sample; every second has losses on images, and every third of those uses the full decoder."""
    return replace(
        PRESETS["demo"],
        hdtf_samples_dir=cache.folder,
        held_out_identities=(),
        start_from="",
        checkpoint_dir=tmp_path / "checkpoints",
        log_dir=tmp_path / "log",
        models_dir=mini,
        tiny_decoder=str(tiny),
        full_decoder_every=3,
        batch_size=1,
        pixel_every=2,
        num_steps=6,
        log_every=1,
        sample_every=10**6,
        val_every=0,
        save_every=3,
    )


def test_the_number_of_parameters_is_that_of_taesd():
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in TinyDecoder().parameters()) == 1_222_531


def test_the_psnr_of_a_decoder_by_hand():
    """Constant images of 0.5 against black (-1): the squared error is 2.25, of a peak of 2."""
    constant = SimpleNamespace(decode=lambda latents: torch.full((len(latents), 3, 256, 256), 0.5))
    black = SimpleNamespace(decode=lambda latents: torch.full((len(latents), 3, 256, 256), -1.2))
    assert decoder_psnr(constant, black, torch.zeros(2, 4, 32, 32)) == pytest.approx(
        10 * math.log10(4 / 2.25), abs=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_are_like_those_of_the_vae_and_only_latents_get_a_gradient(tiny, mini, dtype):
    decoder = load_tiny_decoder(tiny, load_vae(mini, CPU, dtype))
    assert {parameter.dtype for parameter in decoder.parameters()} == {dtype} and not decoder.training
    latents = torch.randn(2, 4, 32, 32, requires_grad=True)
    images = decoder.decode(latents)
    assert (images.shape, images.dtype) == ((2, 3, 256, 256), torch.float32)
    images.abs().mean().backward()
    assert latents.grad.isfinite().all() and latents.grad.abs().max() > 0
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in decoder.parameters())


def test_samples_do_not_mix(tiny, vae):
    """Otherwise decoding in chunks would change the result."""
    decoder, latents = load_tiny_decoder(tiny, vae), torch.randn(3, 4, 32, 32)
    alone = torch.cat([decoder.decode(x) for x in latents.split(1)])
    torch.testing.assert_close(decoder.decode(latents), alone, atol=1e-5, rtol=1e-5)


def test_a_saved_decoder_is_loaded(vae, tmp_path):
    decoder = TinyDecoder(5)
    save_tiny_decoder(tmp_path / "tiny.safetensors", decoder, vae)
    loaded = load_tiny_decoder(tmp_path / "tiny.safetensors", vae).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in decoder.state_dict().items())


def test_a_decoder_of_another_vae_is_refused(tiny, vae):
    other = VAE(vae.autoencoder)
    other.fingerprint = "0123456789abcdef"
    save_tiny_decoder(tiny, TinyDecoder(4), other)
    message = rf"^{re.escape(str(tiny))} was distilled from the VAE 0123456789abcdef, but .* {vae.fingerprint}"
    with pytest.raises(WeightsError, match=message):
        load_tiny_decoder(tiny, vae)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "is not a tiny decoder"),
        ({"tiny_decoder": "[" * 10_000}, "is not a tiny decoder"),
        ({"tiny_decoder": '{"vae": "VAE", "width": 65}'}, "is not a tiny decoder"),
        ({"tiny_decoder": '{"vae": "VAE", "width": 4}'}, "does not fit TinyDecoder: .* missing: layers.0.bias"),
    ],
)
def test_a_file_that_is_not_a_tiny_decoder_is_refused(metadata, message, vae, tmp_path):
    if metadata:
        metadata = {name: text.replace("VAE", vae.fingerprint) for name, text in metadata.items()}
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", metadata)
    with pytest.raises(WeightsError, match=message):
        load_tiny_decoder(tmp_path / "a.safetensors", vae)


def test_a_malformed_file_is_refused(vae, tmp_path):
    (tmp_path / "text").write_text("text")
    with pytest.raises(WeightsError, match="text cannot be read as a tiny decoder: "):
        load_tiny_decoder(tmp_path / "text", vae)


# Distillation.


def distil(cache: Cache, models_dir: Path, folder: Path, num_steps: int) -> DistilConfig:
    """Distils a narrow decoder for a few steps."""
    folders = DistilConfig(cache.folder, models_dir, folder, folder / "log", held_out=0.5, measured=2)
    small = replace(folders, width=4, batch_size=1, warmup_steps=1, learning_rate=1e-2)
    config = replace(small, num_steps=num_steps, log_every=1, save_every=2)
    AcceleratorState._reset_state(reset_partial_state=True)
    distil_decoder.main(config)
    return config


def records(config: DistilConfig) -> list[dict]:
    return [json.loads(line) for line in (config.log_dir / "tiny_decoder/stats.jsonl").read_text().splitlines()]


def test_distillation_improves_the_decoder_and_writes_its_files(cache, mini, vae, tmp_path):
    psnr = []
    for num_steps in (1, 12):
        *steps, measured = records(distil(cache, mini, tmp_path / str(num_steps), num_steps))
        assert [record["step"] for record in steps] == list(range(1, num_steps + 1)) and "loss" in steps[0]
        assert measured.keys() == {"step", "psnr_own", "psnr_tiny", "psnr", "gradient_cosine"}
        assert -1 <= measured["gradient_cosine"] <= 1
        psnr.append(measured["psnr"])
    assert psnr[1] > psnr[0] + 1
    files = {path.name for path in (tmp_path / "12").rglob("*.*t*") if "tfevents" not in path.name}
    assert files == {"tiny_decoder.safetensors", "training-state-0000010.pt", "training-state-0000012.pt"}
    faces = cv2.imread(str(tmp_path / "12/log/tiny_decoder/faces/0000012.png"))
    assert faces.shape == (3 * 256, 2 * 256, 3)
    assert load_tiny_decoder(tmp_path / "12/tiny_decoder.safetensors", vae).width == 4


def test_a_resumed_distillation_equals_an_uninterrupted_one(cache, mini, tmp_path):
    whole = distil(cache, mini, tmp_path / "whole", 4)
    with interrupted_after_a_save():
        distil(cache, mini, tmp_path / "resumed", 4)
    assert not (tmp_path / "resumed/tiny_decoder.safetensors").exists()
    resumed = distil(cache, mini, tmp_path / "resumed", 4)
    assert records(resumed) == records(whole)
    for name in ("tiny_decoder.safetensors", "log/tiny_decoder/faces/0000004.png"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(WeightsError, match="width = 4, not 5"):
        distil_decoder.main(replace(resumed, width=5))


def test_a_cache_of_another_vae_is_refused(write_cache, mini, tmp_path):
    cache = write_cache(replace(CONTRACTS["rigid"], vae="0123456789abcdef"))
    with pytest.raises(ContractError, match="vae = '0123456789abcdef'"):
        distil(cache, mini, tmp_path / "output", 1)


# Training.


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """The decoder of each chunk of a training, "full" or "tiny", in order."""
    names = []

    def recording(name: str, decode: Callable) -> Callable:
        def _decode(self, latents: torch.Tensor) -> torch.Tensor:
            names.append(name)
            return decode(self, latents)

        return _decode

    monkeypatch.setattr(VAE, "decode", recording("full", VAE.decode))
    monkeypatch.setattr(TinyDecoder, "decode", recording("tiny", TinyDecoder.decode))
    monkeypatch.setattr(Objective, "bounds", lambda *_: {})  # decodes before the first step
    return names


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, ["tiny", "tiny", "full"]),
        ({"full_decoder_every": 0}, ["tiny", "tiny", "tiny"]),
        ({"tiny_decoder": ""}, ["full", "full", "full"]),
    ],
)
def test_the_full_decoder_is_used_in_every_nth_step_with_losses_on_images(config, decoded, change, expected):
    train("demo", replace(config, save_every=10**6, **change))
    assert decoded[:3] == expected
    assert set(decoded[3:]) == {"full"}  # the sample grid at the end


def test_discriminators_get_the_images_of_the_tiny_decoder(config, monkeypatch):
    images, seen = [], []
    decode, backward = TinyDecoder.decode, Objective.discriminator_backward
    monkeypatch.setattr(TinyDecoder, "decode", lambda *args: images.append(decode(*args)) or images[-1])
    monkeypatch.setattr(Objective, "discriminator_backward", lambda *args: seen.append(args[1]) or backward(*args))
    losses = weights(latent_l1=1.0, pixel_l1=1.0, adv_g=0.1)
    train("demo", replace(config, num_steps=1, pixel_every=1, loss_weights=losses))
    assert len(images) == len(seen) == 1 and torch.equal(seen[0], images[0])
