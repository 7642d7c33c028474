"""What a training step computes and holds at full size: the trainer's own step, on tensors without contents.

Networks and batches have the shapes and dtypes of a training on a GPU but no numbers in them (torch's FakeTensorMode),
so a step takes seconds and counts the same on any machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from itertools import repeat
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
    """Within it every number that the host asks of a tensor is a 1."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1
        return func(*args, **kwargs or {})


@contextmanager
def without_contents() -> Iterator[None]:
    """Within it tensors are made without contents. Where the host would read a number of them, it reads a 1."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    # Without the weak references that it keeps to tensors, for which nn.Module could not move to a device or a dtype.
    mode.fake_tensor_converter.set_tensor_memo = lambda *_: None
    with mode, HostReads():
        yield


@dataclass
class Training:
    """A training that is going on."""

    config: TrainConfig
    accelerator: Accelerator
    state: TrainState
    objective: Objective

    def step(self, batch_size: int) -> StepResult:
        """The last update of all networks, in which all happens that ever does, from batches of as many samples."""
        self.state.step = self.config.num_steps - 1
        width = self.state.unet.model.config.cross_attention_dim
        batches = repeat(made_up_batch(self.config, batch_size, width))
        return optimizer_step(self.state, self.objective, batches, self.config, self.accelerator)

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.state.optimizer, *(one.optimizer for one in self.state.gan_losses.values())]

    def begin(self) -> None:
        """Let the optimizers have their moments."""
        for optimizer in self.optimizers:
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad()


@contextmanager
def training(config: TrainConfig) -> Iterator[Training]:
    """An untrained training in bf16 whose tensors take the memory that they take on a GPU; for `without_contents`."""
    AcceleratorState._reset_state(reset_partial_state=True)  # it is one for all of a process, and may be another
    try:
        with costs_of_cuda():
            run = untrained_training(config, Accelerator(cpu=True, mixed_precision="bf16"))
            run.state.ema.clear()  # which is in host memory
            yield run
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def untrained_training(config: TrainConfig, accelerator: Accelerator) -> Training:
    """What the trainer's own functions build, with untrained networks in place of those that are read from files.

    Full-size but for the UNet and the VAE, whose sizes are those of models_dir.
    """
    frozen = accelerator.device, frozen_dtype(accelerator)
    untrained = {
        "load_lpips": lambda _, device, dtype: LPIPS(VGG16().to(device, dtype), Heads().to(device)),
        "load_tiny_decoder": lambda _, vae: freeze(TinyDecoder()).to(*frozen),
        "load_syncnet": lambda _, __, device, dtype: freeze(StableSyncNet(STABLE_SYNCNET_16)).to(device, dtype),
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
    run.begin()
    return run


@contextmanager
def costs_of_cuda() -> Iterator[None]:
    """Within it a CPU's tensors take the memory that they would take on a GPU, where two things are otherwise.

    Autocast computes norms in float32, and an optimizer that was not told how updates all parameters at once.
    """

    def promoted(norm: Callable) -> Callable:
        @wraps(norm)
        def _run(values: torch.Tensor, *args, **kwargs) -> torch.Tensor:
            return norm(values.float() if torch.is_autocast_enabled("cpu") else values, *args, **kwargs)

        return _run

    norms = {name: promoted(getattr(functional, name)) for name in ("group_norm", "layer_norm")}
    updated = {
        "_get_foreach_kernels_supported_devices": lambda: ["cpu"],
        "_foreach_supported_types": [nn.Parameter, FakeTensor],
    }
    with patch.multiple(functional, **norms), patch.multiple("torch.optim.optimizer", **updated):
        yield


def made_up_batch(config: TrainConfig, batch_size: int, width: int) -> dict:
    """What a loader gives of musetalk.data.dataset's samples, all zero. width: D."""
    window = batch_size, config.frames
    latents = (*window, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)
    batch = {name: torch.zeros(latents).half() for name in ("masked_latents", "reference_latents", "target_latents")}
    batch |= {
        "audio_window": torch.zeros(*window, WINDOW_STEPS * STATES, width).half(),
        "target_image": torch.zeros(*window, IMAGE_SIZE, IMAGE_SIZE, 3, dtype=torch.uint8),
        "mouth_box": torch.zeros(*window, 4),
        "where": [""] * batch_size,
    }
    if config.loss_weights.get("sync"):
        batch["mel"] = torch.zeros(batch_size, sync_mel_frames(config.frames), SYNC_MEL_BINS).half()
    return batch
