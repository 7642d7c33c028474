"""The tiny decoder: output, files, distillation and use in training."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import cv2
import pytest
import safetensors.torch
import torch
from accelerate.state import AcceleratorState

import musetalk_trainer
from musetalk.contract import CONTRACTS, ContractError, FeatureContract
from musetalk.data.cache import Cache, CacheWriter
from musetalk.errors import UserError
from musetalk.models.tiny_decoder import TAESD_WIDTH, TinyDecoder, load_tiny_decoder, save_tiny_decoder
from musetalk.models.vae import VAE, load_vae
from musetalk.models.weights import WeightsError
from musetalk.training.checkpoint import save_state
from musetalk_trainer import PRESETS, TrainConfig, train, weights
from tools import distil_decoder
from tools.distil_decoder import DistilConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vae(mini) -> VAE:
    return load_vae(mini, CPU, torch.float32)


@pytest.fixture
def tiny(vae, tmp_path) -> Path:
    """A file of an untrained decoder that names the small VAE as its origin."""
    torch.manual_seed(0)
    save_tiny_decoder(tmp_path / "tiny.safetensors", TinyDecoder(4), vae)
    return tmp_path / "tiny.safetensors"


@pytest.fixture
def make_up(random_tensors, tmp_path) -> Callable[[FeatureContract], Cache]:
    """A function: contract -> two made-up clips of one person, with features as wide as the small audio encoder's."""

    def make(contract: FeatureContract) -> Cache:
        writer = CacheWriter(tmp_path / "cache", contract)
        for seed, name in enumerate(("a", "b")):
            about = {"source": f"{name}.mp4", "source_bytes": 1, "identity": "one", "last": True}
            writer.write(name, random_tensors(12, states=5, width=64, seed=seed), about)
        return Cache(tmp_path / "cache")

    return make


@pytest.fixture
def cache(make_up) -> Cache:
    """That of any VAE."""
    return make_up(CONTRACTS["rigid"])


@pytest.fixture
def config(cache, tiny, mini, tmp_path) -> TrainConfig:
    """Six steps of one sample, every third of the three with losses on images through the VAE's own decoder."""
    return replace(
        PRESETS["demo"],
        hdtf_samples_dir=cache.folder,
        held_out_identities=(),
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


def test_number_of_parameters_is_that_of_taesd():
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in TinyDecoder().parameters()) == 1_222_531


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_is_like_the_vaes_and_only_the_latents_get_a_gradient(tiny, mini, dtype):
    vae = load_vae(mini, CPU, dtype)
    decoder = load_tiny_decoder(tiny, vae)
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


@pytest.mark.parametrize("width", [1, 5, TAESD_WIDTH])
def test_saving_and_loading(width, vae, tmp_path):
    path = tmp_path / "tiny.safetensors"
    written = TinyDecoder(width)
    save_tiny_decoder(path, written, vae)
    read = load_tiny_decoder(path, vae)
    assert all(torch.equal(tensor, read.state_dict()[name]) for name, tensor in written.state_dict().items())


def test_a_decoder_of_another_vae_is_refused(tiny, vae):
    other = replace_fingerprint(vae, "0123456789abcdef")
    said = rf"^{re.escape(str(tiny))} was distilled from the VAE {vae.fingerprint}, but .* 0123456789abcdef"
    with pytest.raises(WeightsError, match=said):
        load_tiny_decoder(tiny, other)


def replace_fingerprint(vae: VAE, fingerprint: str) -> VAE:
    """Returns the VAE with another fingerprint."""
    other = VAE(vae.autoencoder)
    other.fingerprint = fingerprint
    return other


ORIGIN = {"vae": "", "width": 4}  # "" becomes the fingerprint


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        (None, "is not a tiny decoder"),
        ({"contract": "{}"}, "is not a tiny decoder"),
        ({"tiny_decoder": "[" * 10_000}, "is not a tiny decoder"),
        ({"tiny_decoder": '{"vae": "0"}'}, "is not a tiny decoder"),
        ({"tiny_decoder": '{"vae": "0", "width": 65}'}, "is not a tiny decoder"),
        ({"tiny_decoder": '{"vae": "0", "width": "4"}'}, "is not a tiny decoder"),
        ({"tiny_decoder": '{"vae": "0", "width": 4}'}, "does not fit TinyDecoder: .* missing: layers.0.bias"),
    ],
)
def test_a_file_that_is_not_a_tiny_decoder_is_refused(metadata, said, vae, tmp_path):
    path = tmp_path / "odd.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1)}, path, metadata)
    with pytest.raises(WeightsError, match=said):
        load_tiny_decoder(path, replace_fingerprint(vae, "0"))


def test_a_missing_or_malformed_file_is_refused(vae, tmp_path):
    with pytest.raises(WeightsError, match="nowhere cannot be read as a tiny decoder: No such file"):
        load_tiny_decoder(tmp_path / "nowhere", vae)
    (tmp_path / "text").write_text("text")
    with pytest.raises(WeightsError, match="text cannot be read as a tiny decoder: "):
        load_tiny_decoder(tmp_path / "text", vae)


# The tool.


def distil(cache: Cache, models_dir: Path, folder: Path, num_steps: int) -> DistilConfig:
    """A few steps of a narrow decoder by the real main."""
    places = DistilConfig(cache.folder, models_dir, folder, folder / "log", held_out=0.5, measured=2)
    small = replace(places, width=4, batch_size=1, warmup_steps=1, learning_rate=1e-2)
    config = replace(small, num_steps=num_steps, log_every=1, save_every=2)
    AcceleratorState._reset_state(reset_partial_state=True)
    distil_decoder.main(config)
    return config


def records(config: DistilConfig) -> list[dict]:
    return [json.loads(line) for line in (config.log_dir / "tiny_decoder/stats.jsonl").read_text().splitlines()]


def test_it_is_distilled_from_a_cache(cache, mini, vae, tmp_path, capsys):
    heard = []
    for num_steps in (1, 12):
        config = distil(cache, mini, tmp_path / str(num_steps), num_steps)
        assert "held out 1 of 2 clips" in capsys.readouterr().out
        *steps, measured = records(config)
        assert [record["step"] for record in steps] == list(range(1, num_steps + 1)) and "loss" in steps[0]
        assert measured.keys() == {"step", "psnr_own", "psnr_tiny", "psnr", "gradient_cosine"}
        assert -1 <= measured["gradient_cosine"] <= 1
        heard.append(measured["psnr"])
    assert heard[1] > heard[0] + 1
    assert sorted(path.name for path in (tmp_path / "12").rglob("*.*t*") if "tfevents" not in path.name) == [
        "tiny_decoder.safetensors",
        "training-state-0000010.pt",
        "training-state-0000012.pt",
    ]
    faces = cv2.imread(str(tmp_path / "12/log/tiny_decoder/faces/0000012.png"))
    assert faces.shape == (3 * 256, 2 * 256, 3)
    assert load_tiny_decoder(tmp_path / "12/tiny_decoder.safetensors", vae).width == 4


def test_two_steps_and_a_resume_equal_four_steps(cache, mini, tmp_path):
    whole = distil(cache, mini, tmp_path / "whole", 4)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("musetalk.training.run.save_state", partial(save_and_interrupt, save_state))
        distil(cache, mini, tmp_path / "parted", 4)
    assert not (tmp_path / "parted/tiny_decoder.safetensors").exists()
    parted = distil(cache, mini, tmp_path / "parted", 4)
    assert records(parted) == records(whole)
    for name in ("tiny_decoder.safetensors", "log/tiny_decoder/faces/0000004.png"):
        assert (tmp_path / "parted" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(WeightsError, match="width = 4, not 5"):
        distil_decoder.main(replace(parted, width=5))


def test_constants_that_cannot_work_are_refused(cache, mini, tmp_path):
    config = DistilConfig(cache.folder, mini, tmp_path / "output", tmp_path / "output")
    for change in ({"width": TAESD_WIDTH + 1}, {"width": 0}, {"noise": -0.1}, {"num_steps": 0}, {"held_out": 1.0}):
        with pytest.raises(UserError, match=rf"^{next(iter(change))} cannot be "):
            distil_decoder.main(replace(config, **change))
    assert not (tmp_path / "output").exists()


def test_a_cache_of_another_vae_is_refused(make_up, mini, tmp_path):
    cache = make_up(replace(CONTRACTS["rigid"], vae="0123456789abcdef"))
    with pytest.raises(ContractError, match="vae = '0123456789abcdef'"):
        distil(cache, mini, tmp_path / "output", 1)


# The trainer.


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """By which decoder each chunk of a training goes, as it goes."""
    seen = []

    def noting(name: str, decode: Callable) -> Callable:
        def _decode(self, latents: torch.Tensor) -> torch.Tensor:
            seen.append(name)
            return decode(self, latents)

        return _decode

    monkeypatch.setattr(VAE, "decode", noting("full", VAE.decode))
    monkeypatch.setattr(TinyDecoder, "decode", noting("tiny", TinyDecoder.decode))
    return seen


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, ["tiny", "tiny", "full"]),
        ({"full_decoder_every": 0}, ["tiny", "tiny", "tiny"]),
        ({"full_decoder_every": 2}, ["tiny", "full", "tiny"]),
        ({"tiny_decoder": ""}, ["full", "full", "full"]),
    ],
)
def test_the_losses_on_images_take_the_decoder_whose_turn_it_is(config, decoded, change, expected):
    train("demo", replace(config, save_every=10**6, **change))
    assert decoded[:3] == expected
    assert set(decoded[3:]) == {"full"}  # the pictures at the end
    records = [json.loads(line) for line in (config.log_dir / "demo/stats.jsonl").read_text().splitlines()]
    assert ["pixel_l1" in record for record in records] == [False, True] * 3


def test_a_resumed_training_takes_the_same_turns(config, decoded, tmp_path):
    train("demo", config)
    whole = decoded.copy()
    decoded.clear()
    parted = replace(config, checkpoint_dir=tmp_path / "parted", log_dir=tmp_path / "parted_log")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("musetalk.training.run.save_state", partial(save_and_interrupt, save_state))
        train("demo", parted)
    train("demo", parted)
    assert decoded == whole and whole[:3] == ["tiny", "tiny", "full"]
    name = "demo/unet-0000006.safetensors"
    assert (parted.checkpoint_dir / name).read_bytes() == (config.checkpoint_dir / name).read_bytes()
    assert (parted.log_dir / "demo/stats.jsonl").read_bytes() == (config.log_dir / "demo/stats.jsonl").read_bytes()


def save_and_interrupt(save: Callable, *args) -> None:
    save(*args)
    raise KeyboardInterrupt


def test_discriminators_see_what_was_decoded(config, decoded, monkeypatch):
    """The images that the tiny decoder has made, and no further ones."""
    made, seen = [], []
    decode, learn = TinyDecoder.decode, musetalk_trainer.Objective.discriminator_backward
    monkeypatch.setattr(TinyDecoder, "decode", lambda *args: made.append(decode(*args)) or made[-1])
    monkeypatch.setattr(
        musetalk_trainer.Objective, "discriminator_backward", lambda *args: seen.append(args[1]) or learn(*args)
    )
    losses = weights(latent_l1=1.0, pixel_l1=1.0, adv_g=0.1)
    train("demo", replace(config, num_steps=1, pixel_every=1, loss_weights=losses))
    assert decoded.count("tiny") == len(made) == len(seen) == 1
    assert torch.equal(seen[0], made[0])


def test_one_of_another_vae_is_refused_before_a_step_is_made(config, vae):
    save_tiny_decoder(Path(config.tiny_decoder), TinyDecoder(4), replace_fingerprint(vae, "0123456789abcdef"))
    with pytest.raises(WeightsError, match="was distilled from the VAE 0123456789abcdef"):
        train("demo", config)
    assert not config.checkpoint_dir.exists()
