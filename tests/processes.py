"""Run by test_processes.py in one or several processes: a small training that the first process stops.

python -m tests.processes <unet | architecture of a sync expert> <cache> <folder> <batch size> <steps> <dtype>
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import nn

import musetalk_trainer
import syncnet_trainer
from losses.discriminator import PatchDiscriminator
from losses.objective import Objective
from musetalk.cli import StopRequests
from musetalk.data.cache import Cache
from musetalk.images import to_tensor
from musetalk.models.unet import UNet
from musetalk.training import distributed, run
from musetalk.training.distributed import start_processes
from musetalk.training.run import open_run
from musetalk_trainer import CROPS, TrainConfig, build_state, open_dataset, optimizer_step, weights
from syncnet_trainer import SyncConfig

LOSS_WEIGHTS = {"latent_l1": 1.0, "pixel_l1": 1.0, "adv_g": 0.1, "feat_match": 0.1, "adv_g_mouth": 0.1}
COMMON = {"grad_accum_steps": 2, "num_workers": 0, "warmup_steps": 1, "learning_rate": 1e-3, "num_steps": 100}
CONFIG = TrainConfig(
    **COMMON,
    loss_weights=weights(**LOSS_WEIGHTS),
    adaptive_every=1,
    chunk_size=1,
    discriminator_width=4,
    discriminator_learning_rate=1e-3,
)
SYNC_CONFIG = SyncConfig(**COMMON, held_out=0.25, gaps=(9, 3), other_clips=0.5)


def small_unet(width: int) -> UNet:
    """A seeded UNet. width: of the audio features."""
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


@contextmanager
def stop_after(steps: int, *, patient: bool) -> Iterator[StopRequests]:
    """Replaces `stop_requests`: only the first process gets a request, after some steps."""
    calls = iter(range(1, 10**9))

    class StopAfter(StopRequests):
        def __call__(self) -> bool:
            return next(calls) >= steps and int(os.environ.get("RANK", 0)) == 0

    yield StopAfter(patient=patient)


def train_unet(cache: Cache, config: TrainConfig) -> None:
    """The loop of musetalk_trainer.py with small networks, without validation."""
    width = next(iter(cache.clips.values())).tensor("audio_features", 0, 1).shape[-1]
    musetalk_trainer.build_unet = lambda *_: small_unet(width)
    musetalk_trainer.PatchDiscriminator = partial(PatchDiscriminator, layers=2)
    accelerator = start_processes("cpu")
    dataset = open_dataset(
        config, cache, sorted(cache.clips), cache.contract, world_size=accelerator.num_processes, sync_offset=0
    )
    state = build_state(config, cache.contract, accelerator)
    torch.manual_seed(1)
    decoder = nn.Sequential(nn.Conv2d(4, 3, 3, padding=1), nn.Upsample(scale_factor=8), nn.Tanh()).requires_grad_(False)
    objective = Objective(
        LOSS_WEIGHTS,
        lambda _: decoder,
        lambda images: to_tensor(images).to(torch.get_default_dtype()),
        config.chunk_size,
        gan_losses=state.gan_losses,
        crops=CROPS,
        adaptive_weights=state.adaptive_weights,
    )
    with open_run("unet", config, state, accelerator) as run:
        batches = run.batches(dataset)
        for _ in run.steps():
            assert not optimizer_step(state, objective, batches, config, accelerator).skipped
            stop = run.stop_requested()
            if stop or run.due(config.save_every) or run.overdue():
                run.save_state()
            if stop:
                break
        run.finish()


def main(model: str, cache: str, folder: str, batch_size: str, steps: str, dtype: str) -> None:
    distributed.precision = lambda _: "no"
    distributed.BUCKET_BYTES = 1000  # for many buckets
    run.stop_requests = partial(stop_after, int(steps))
    torch.set_default_dtype(getattr(torch, dtype))
    torch.Tensor.float = lambda tensor: tensor.to(torch.get_default_dtype())  # where a trainer converts to float32
    torch.set_num_threads(1)
    paths = {"checkpoint_dir": Path(folder), "log_dir": Path(folder) / "log", "batch_size": int(batch_size)}
    with suppress(KeyboardInterrupt):
        if model == "unet":
            train_unet(Cache(Path(cache)), replace(CONFIG, **paths))
        else:
            paths |= {"hdtf_samples_dir": Path(cache), "architecture": model}
            syncnet_trainer.train("demo", replace(SYNC_CONFIG, **paths))


if __name__ == "__main__":
    main(*sys.argv[1:])
