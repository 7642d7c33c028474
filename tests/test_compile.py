"""Compiled networks have the same losses and gradients as uncompiled ones."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from itertools import repeat
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch._dynamo.utils import counters

from musetalk.contract import IMAGE_SIZE, LATENT_CHANNELS, LATENT_SIZE, RIGID, WINDOW_STEPS
from musetalk.devices import DeviceError
from musetalk.training.state import load_pixel_vae
from musetalk_trainer import PRESETS, TrainConfig, build_objective, build_state, check_config, optimizer_step, weights

pytestmark = pytest.mark.slow

# A minimal UNet with audio attention, downsampling and upsampling.
MINIMAL_UNET = {
    "block_out_channels": [8, 16],
    "norm_num_groups": 2,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "mid_block_type": None,
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
}
STATES = 5
needs_a_compiler = pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler"
)


@pytest.fixture
def config(mini, tmp_path) -> TrainConfig:
    """Trains a UNet that compiles fast, with an adaptive weight every other step and learning rates close to 0."""
    unet_config = json.loads((mini / "musetalk/musetalk.json").read_text()) | MINIMAL_UNET
    (tmp_path / "musetalk").mkdir()
    (tmp_path / "musetalk/musetalk.json").write_text(json.dumps(unet_config))
    losses = weights(latent_l1=1.0, pixel_l1=0.1, adv_g=1.0)
    small = {"models_dir": tmp_path, "discriminator_width": 4}
    rates = {"learning_rate": 1e-12, "discriminator_learning_rate": 1e-12, "max_grad_norm": 1e9}
    return replace(PRESETS["demo"], **small, loss_weights=losses, pixel_every=1, adaptive_every=2, **rates)


def results(config: TrainConfig, mini: Path) -> dict[str, torch.Tensor]:
    """Adaptive weight, losses and gradients of the trainer's step 2, the first with an adaptive weight."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    state = build_state(config, RIGID, accelerator)
    vae = load_pixel_vae(mini, accelerator)
    objective, _ = build_objective(config, state, vae, accelerator)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 2, 1, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE, generator=generator).half()
    batch = dict(zip(("masked_latents", "reference_latents", "target_latents"), latents, strict=True))
    width = state.unet.model.config.cross_attention_dim
    batch["audio_window"] = torch.randn(2, 1, WINDOW_STEPS * STATES, width, generator=generator).half()
    images = (2, 1, IMAGE_SIZE, IMAGE_SIZE, 3)
    batch["target_image"] = torch.randint(256, images, generator=generator, dtype=torch.uint8)
    batch["mouth_box"] = torch.zeros(2, 1, 4)
    batch["where"] = ["", ""]
    gradients = {}

    def keep_gradients(*_):
        gradients.update({name: parameter.grad for name, parameter in state.unet.named_parameters()})

    state.optimizer.register_step_pre_hook(keep_gradients)
    for _ in range(2):
        terms = optimizer_step(state, objective, repeat(batch), config, accelerator).terms
    return {"adaptive_weight": state.adaptive_weights["face"]} | terms | gradients


def test_compile_is_refused_without_a_compiler(config, monkeypatch):
    monkeypatch.setenv("CXX", "no such compiler")
    with pytest.raises(DeviceError, match="compile must be False here: torch.compile needs a C.. compiler"):
        check_config(replace(config, compile=True))
    check_config(config)


@needs_a_compiler
def test_compiled_networks_give_the_same_loss_and_gradients(config, mini):
    counters.clear()
    plain = results(config, mini)
    assert not counters["stats"]
    compiled = results(replace(config, compile=True), mini)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]  # UNet and decoder
    assert all(value.abs().max() > 0 for value in plain.values()) and plain["adaptive_weight"] < 1
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-7)
