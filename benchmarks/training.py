"""Runs the trainer's step at full size on fake tensors, to count its operations and memory.

Networks and batches have the shapes and dtypes of training on a GPU but no values (torch's FakeTensorMode), so a step
takes seconds and gives the same counts on any machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from itertools import repeat
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from losses.objective import Objective
from musetalk.contract import (
    CONTRACTS,
    IMAGE_SIZE,
    LATENT_CHANNELS,
    LATENT_SIZE,
    SYNC_MEL_BINS,
    WINDOW_STEPS,
    sync_mel_frames,
)
from musetalk.files import read_json
from musetalk.models.lpips import LPIPS, VGG16, Heads
from musetalk.models.syncnet import STABLE_SYNCNET_16, StableSyncNet
from musetalk.models.tiny_decoder import TinyDecoder
from musetalk.models.vae import VAE
from musetalk.models.weights import freeze
from musetalk.training.state import TrainState, frozen_dtype
from musetalk.training.step import StepResult
from musetalk_trainer import TrainConfig, build_objective, build_state, optimizer_step

STATES = 5  # of Whisper tiny's encoder


class HostReads(TorchDispatchMode):
    """Makes every value that the host reads from a tensor 1 within the context."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1
        return func(*args, **kwargs or {})


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Makes all new tensors fake within the context. Values that the host reads from them are 1."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    # Drop its weak references to tensors, which prevent nn.Module from moving to a device or dtype.
    mode.fake_tensor_converter.set_tensor_memo = lambda *_: None  # type: ignore[method-assign]
    with mode, HostReads():
        yield


@dataclass
class Training:
    """A training with its networks, state and objective."""

    config: TrainConfig
    accelerator: Accelerator
    state: TrainState
    objective: Objective

    def step(self, batch_size: int) -> StepResult:
        """Runs the last step, which has all losses, with batches of `batch_size` samples."""
        self.state.step = self.config.num_steps - 1
        width = self.state.unet.model.config.cross_attention_dim
        batches = repeat(zero_batch(self.config, batch_size, width))
        return optimizer_step(self.state, self.objective, batches, self.config, self.accelerator)

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.state.optimizer, *(gan_loss.optimizer for gan_loss in self.state.gan_losses.values())]

    def allocate_moments(self) -> None:
        """Makes the optimizers allocate their moments."""
        for optimizer in self.optimizers:
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad()


@contextmanager
def training(config: TrainConfig) -> Iterator[Training]:
    """A training in bf16 with random weights, whose fake tensors take the memory they take on a GPU.

    Without the averaged weights if they are in host memory.
    """
    AcceleratorState._reset_state(reset_partial_state=True)  # a global state, possibly of another training
    try:
        with cuda_memory():
            run = untrained_training(config, Accelerator(cpu=True, mixed_precision="bf16"))
            if config.ema_on_host:
                run.state.ema.clear()
            yield run
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def untrained_training(config: TrainConfig, accelerator: Accelerator) -> Training:
    """Builds a training with the trainer's own functions, with random weights instead of those of files.

    Full-size except for the UNet and the VAE, whose sizes are those of models_dir.
    """
    frozen = accelerator.device, frozen_dtype(accelerator)
    untrained: dict[str, Any] = {
        "load_lpips": lambda _, device, dtype: LPIPS(VGG16().to(device, dtype), Heads().to(device)),
        "load_tiny_decoder": lambda _, vae: freeze(TinyDecoder()).to(*frozen),
        "load_syncnet": lambda _, __, device: freeze(StableSyncNet(STABLE_SYNCNET_16)).to(device),
    }
    state = build_state(config, CONTRACTS[config.contract], accelerator)
    autoencoder = AutoencoderKL.from_config(read_json(config.models_dir / "sd-vae-ft-mse/config.json"))
    with patch("musetalk.models.vae.fingerprint", return_value=""):
        vae = VAE(nn.Module.to(autoencoder, *frozen))
    with patch.multiple("musetalk_trainer", **untrained):
        objective, _ = build_objective(config, state, vae, accelerator)
    # Without the average, whose update is work of the host, and reporting non-finite gradients instead of stopping.
    config = replace(config, ema_every=config.num_steps + 1, on_nonfinite="skip")
    run = Training(config, accelerator, state, objective)
    run.allocate_moments()
    return run


@contextmanager
def cuda_memory() -> Iterator[None]:
    """Makes CPU tensors take the memory of GPU tensors within the context.

    On a GPU, autocast computes norms in float32, and optimizers update all parameters at once by default.
    """

    def promoted(norm: Callable) -> Callable:
        @wraps(norm)
        def _run(values: torch.Tensor, *args, **kwargs) -> torch.Tensor:
            return norm(values.float() if torch.is_autocast_enabled("cpu") else values, *args, **kwargs)

        return _run

    norms: dict[str, Any] = {name: promoted(getattr(functional, name)) for name in ("group_norm", "layer_norm")}
    updated: dict[str, Any] = {
        "_get_foreach_kernels_supported_devices": lambda: ["cpu"],
        "_foreach_supported_types": [nn.Parameter, FakeTensor],
    }
    with patch.multiple(functional, **norms), patch.multiple("torch.optim.optimizer", **updated):
        yield


def zero_batch(config: TrainConfig, batch_size: int, width: int) -> dict:
    """A batch of zeros with the tensors of musetalk.data.dataset. width: D."""
    window = batch_size, config.frames
    latents = (*window, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)
    names = ("masked_latents", "reference_latents", "target_latents")
    batch: dict = {name: torch.zeros(latents).half() for name in names}
    batch |= {
        "audio_window": torch.zeros(*window, WINDOW_STEPS * STATES, width).half(),
        "target_image": torch.zeros(*window, IMAGE_SIZE, IMAGE_SIZE, 3, dtype=torch.uint8),
        "mouth_box": torch.zeros(*window, 4),
        "where": [""] * batch_size,
    }
    if config.loss_weights.get("sync"):
        batch["mel"] = torch.zeros(batch_size, sync_mel_frames(config.frames), SYNC_MEL_BINS).half()
    return batch
