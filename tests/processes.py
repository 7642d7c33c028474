"""Run by test_processes.py, alone or as one of several: a few steps of a small training, what moves saved by the first.

python -m tests.processes <cache> <folder> <batch size> <steps> <precision>
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from losses.discriminator import PatchDiscriminator
from losses.objective import Objective
from musetalk import training
from musetalk.cache import Cache
from musetalk.checkpoint import save_state
from musetalk.contract import ALL_FIELDS
from musetalk.crop import to_tensor
from musetalk.models.unet import UNet
from musetalk.training import TrainState, loader, resume, start_processes
from musetalk_trainer import VIEWS, TrainConfig, build_state, open_dataset, optimizer_step, weights

HEARD = {"latent_l1": 1.0, "pixel_l1": 1.0, "adv_g": 0.1, "feat_match": 0.1, "adv_g_mouth": 0.1}
CONFIG = TrainConfig(
    loss_weights=weights(**HEARD),
    grad_accum_steps=2,
    adaptive_every=1,
    chunk_size=1,
    warmup_steps=1,
    learning_rate=1e-3,
    discriminator_learning_rate=1e-3,
    num_steps=100,
)


def small_unet(width: int) -> UNet:
    """The same one everywhere."""
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=32,
        in_channels=8,
        out_channels=4,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=width,
    )
    return UNet(model, positional_encoding=True)


def main(cache_dir: str, folder: str, batch_size: str, steps: str, dtype: str) -> None:
    training.precision = lambda: "no"
    torch.set_default_dtype(getattr(torch, dtype))
    torch.set_num_threads(1)
    import musetalk_trainer

    cache = Cache(Path(cache_dir))
    width = next(iter(cache.clips.values())).tensor("audio_features", 0, 1).shape[-1]
    musetalk_trainer.build_unet = lambda *_: small_unet(width)
    musetalk_trainer.PatchDiscriminator = partial(PatchDiscriminator, width=4, layers=2)

    accelerator = start_processes()
    config = replace(CONFIG, batch_size=int(batch_size))
    dataset = open_dataset(
        config, cache, sorted(cache.clips), cache.contract, ranks=accelerator.num_processes, sync_offset=0
    )
    state: TrainState = build_state(config, cache.contract, accelerator)
    torch.manual_seed(1)
    decoder = nn.Sequential(nn.Conv2d(4, 3, 3, padding=1), nn.Upsample(scale_factor=8), nn.Tanh()).requires_grad_(False)
    objective = Objective(
        HEARD,
        lambda _: decoder,
        lambda images: to_tensor(images).to(torch.get_default_dtype()),
        config.chunk_size,
        adversaries=state.adversaries,
        views={ending: VIEWS[ending] for ending in state.adversaries},
        pulls=state.pulls,
    )
    resume(state, Path(folder), cache.contract)
    share = {"rank": accelerator.process_index, "ranks": accelerator.num_processes}
    batches = iter(loader(dataset, range(state.step, int(steps)), config.batch_size, 0, **share))
    while state.step < int(steps):
        assert optimizer_step(state, objective, batches, config, accelerator).finite
        state.step += 1
    if accelerator.is_main_process:
        moving = state.as_dict() | {"contract": cache.contract.as_dict(ALL_FIELDS)}
        save_state(Path(folder), state.step, moving, keep=9)
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
