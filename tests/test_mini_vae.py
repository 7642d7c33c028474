"""The committed small VAE: its files, and its reconstruction of people outside its training set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from musetalk.data.crop import crop_face, face_box, in_crop
from tests.sample import sample_frames
from tools.make_mini.config import Config
from tools.make_mini.crops import validation_crops
from tools.make_mini.figures import evaluate
from tools.make_mini.held_out import HELD_OUT

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "models" / "mini" / "sd-vae-ft-mse"
MAX_BYTES = 24_000_000  # of everything in models/mini
VALIDATION_FRAMES = 4  # of each identity; the table of models/mini/README.md has 12


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(FOLDER, torch_dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def portrait(face_backend) -> tuple[np.ndarray, np.ndarray]:
    """A crop of the built-in sample, BGR uint8 (1, 256, 256, 3), and its landmarks (1, 68, 2)."""
    (frame,) = sample_frames(0, 30, 31)
    landmarks = face_backend.detect([frame])[0][0].landmarks
    box = face_box(landmarks, frame.shape)
    return crop_face(frame, box)[None], in_crop(landmarks, box)[None]


def test_the_folder_is_small_enough_to_commit():
    size = sum(path.stat().st_size for path in FOLDER.parent.rglob("*") if path.is_file())
    assert 0 < size <= MAX_BYTES


def test_the_file_holds_fp16_weights_of_this_network(vae):
    assert {path.name for path in FOLDER.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    weights = load_file(FOLDER / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert all(tensor.isfinite().all() for tensor in weights.values())
    network = AutoencoderKL.from_config(vae.config)
    assert network.load_state_dict(weights, strict=True)
    for name, tensor in vae.state_dict().items():
        assert torch.equal(tensor, weights[name].float()), name


def test_the_sample_is_reconstructed(vae, portrait):
    figures = evaluate(vae, *portrait)
    assert figures["psnr"] >= figures["psnr_bilinear"] + 2
    assert figures["psnr_mouth"] >= figures["psnr_mouth_bilinear"] + 1.5
    assert figures["colour"] <= 0.03 and figures["colour_lips"] <= 0.03 and figures["colour_eyes"] <= 0.03


@pytest.mark.slow
def test_validation_people_are_reconstructed(vae, clips):
    """Required on average: 2 dB, 1.5 dB and 3 %. The committed weights reach 9.1 dB, 10.5 dB and 0.6 %."""
    config = Config(validation_frames=VALIDATION_FRAMES)
    metrics = {identity: evaluate(vae, *crops) for identity, crops in validation_crops(config).items()}
    assert set(metrics) >= set(HELD_OUT["validation"]["identities"])
    for identity, figures in metrics.items():
        assert figures["psnr"] > figures["psnr_bilinear"] + 5, identity
        assert figures["psnr_mouth"] > figures["psnr_mouth_bilinear"] + 5, identity
        assert max(value for name, value in figures.items() if name.startswith("colour")) <= 0.015, identity
    mean = {name: np.mean([figures[name] for figures in metrics.values()]) for name in figures}
    assert mean["psnr"] >= mean["psnr_bilinear"] + 7
    assert mean["psnr_mouth"] >= mean["psnr_mouth_bilinear"] + 7
    assert mean["psnr_upper_masked"] >= mean["psnr_upper"] - 1.0
    assert max(mean[name] for name in mean if name.startswith("colour")) <= 0.01
