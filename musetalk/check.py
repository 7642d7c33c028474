"""Checks everything that training needs and prints one line each, to read or to paste into a bug report.

    python -m musetalk.check                                               models/ and the cache in data/cache
    python -m musetalk.check --models-dir models/mini --hdtf-samples-dir data/mine

Prints versions, device, memory and disk space, every weight file with its size and checksum, every network, and the
cache with its feature contract. Networks are loaded strictly and run on a fixed input, on the CPU in float32: the mean
absolute output of equal weights agrees between machines to about five digits. A line that begins with "!" is a problem
that prevents training; the exit code is then 2. Weights that only some configurations need may be missing.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import psutil
import torch
import tyro

from musetalk.cli import check_constants, run_script
from musetalk.contract import IMAGE_SIZE, LATENT_CHANNELS, LATENT_SIZE, SYNC_MEL_BINS, WINDOW_STEPS
from musetalk.data.cache import Cache
from musetalk.data.face.dwpose import INPUT_HEIGHT, INPUT_WIDTH, DWPose, load_dwpose
from musetalk.data.face.dwpose import WEIGHTS as DWPOSE
from musetalk.devices import choose_device, cpu_cores, describe
from musetalk.errors import UserError
from musetalk.files import nearest_folder
from musetalk.models.audio_encoder import SEGMENT_STATES, AudioEncoder, load_audio_encoder
from musetalk.models.face_parser import WEIGHTS as FACE_PARSER
from musetalk.models.face_parser import load_face_parser
from musetalk.models.inception import WEIGHTS as INCEPTION
from musetalk.models.inception import load_inception
from musetalk.models.lpips import load_lpips
from musetalk.models.sources import SOURCES
from musetalk.models.syncnet import PUBLISHED, SyncNet, load_syncnet
from musetalk.models.syncnet_v2 import CEPSTRA, FACE_SIZE, FRAMES, MFCC_FRAMES, SyncNetV2, load_syncnet_v2
from musetalk.models.syncnet_v2 import WEIGHTS as SYNCNET_V2
from musetalk.models.unet import UNet, build_unet, load_unet
from musetalk.models.vae import VAE, load_vae
from musetalk.training.preflight import SHARED_MEMORY

PACKAGES = ("torch", "diffusers", "accelerate", "numpy", "av", "safetensors")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".model", ".onnx")
CPU = torch.device("cpu")
GIB = 2**30

Network = TypeVar("Network")


@dataclass
class CheckConfig:
    """The constants of the check; override them on the command line."""

    models_dir: Path = Path("models")
    hdtf_samples_dir: Path = Path("data/cache")  # cache made by datasets_process.py
    checkpoint_dir: Path = Path("checkpoints")  # output folder of training
    device: str = "auto"  # device of training


class Finding(NamedTuple):
    """A line of the report. fault: whether it prevents training."""

    text: str
    fault: bool = False


def main(config: CheckConfig) -> None:
    """Prints all findings. Raises UserError if training could not start."""
    check_constants(config)
    faults = 0
    for finding in chain(machine(config), files(config.models_dir), networks(config)):
        print(f"{'!' if finding.fault else ' '} {finding.text}", flush=True)
        faults += finding.fault
    if faults:
        raise UserError(f"training could not start; see the lines that begin with ! ({faults})")
    print("\ntraining could start")


def machine(config: CheckConfig) -> Iterator[Finding]:
    """Versions, device, memory and disk space."""
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    yield Finding(f"versions: Python {platform.python_version()}, {versions}, on {platform.platform()}")
    try:
        yield Finding(f"device: {describe(choose_device(config.device))}")
    except UserError as error:
        yield Finding(f"device: {error}", fault=True)
    memory, cores = psutil.virtual_memory(), cpu_cores()
    yield Finding(f"memory: {memory.total / GIB:.1f} GiB, {memory.available / GIB:.1f} GiB available; cores: {cores}")
    free = shutil.disk_usage(nearest_folder(config.checkpoint_dir)).free
    yield Finding(f"disk for {config.checkpoint_dir}: {free / GIB:.1f} GiB free")
    if SHARED_MEMORY.is_dir():
        yield Finding(f"{SHARED_MEMORY}: {shutil.disk_usage(SHARED_MEMORY).free / GIB:.2f} GiB free")


def files(models_dir: Path) -> Iterator[Finding]:
    """Each weight file, in whichever layout: its size, the start of its sha256, and the published file it equals."""
    published = {source.sha256: name for name, source in SOURCES.items() if source.sha256}
    for path in sorted(path for path in models_dir.glob("*/*") if path.suffix in WEIGHT_SUFFIXES):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        origin = f"the published {published[digest]}" if digest in published else "no published file that is known"
        yield Finding(f"{path}: {path.stat().st_size:,} bytes, sha256 {digest[:16]}, {origin}")


def networks(config: CheckConfig) -> Iterator[Finding]:
    """Whether each network loads, and its output for a fixed input; then the cache, which must match the networks."""
    models_dir = config.models_dir
    vae, finding = trial("VAE", partial(load_vae, models_dir, CPU, torch.float32), run_vae)
    yield finding
    encoder, finding = trial("audio encoder", partial(load_audio_encoder, models_dir, CPU), run_audio_encoder)
    yield finding
    states = encoder.shape[0] if encoder else 1

    def load_untrained() -> UNet:
        unet = build_unet(models_dir, 0, positional_encoding=True)
        if encoder:
            unet.check_features(encoder.shape, f"the Whisper in {models_dir}")
        return unet

    yield trial("UNet, untrained", load_untrained, partial(run_unet, states))[1]
    for name, load, run in optional_networks(models_dir, states):
        yield trial(name, load, run)[1]
    yield from check_cache(config, vae, encoder)


def optional_networks(models_dir: Path, states: int) -> Iterator[tuple[str, Callable, Callable]]:
    """Name, loader and forward pass of the networks that only some configurations need and whose files are present."""
    for name in ("musetalkV15/unet.pth", "musetalk/pytorch_model.bin", "musetalk/cunet.bin"):
        if (models_dir / name).is_file():
            yield name, partial(load_unet, models_dir, models_dir / name, True), partial(run_unet, states)
    for name in PUBLISHED:
        if (models_dir / name).is_file():
            yield name, partial(load_syncnet, models_dir, name, CPU), run_syncnet
    others: dict[str, tuple[str, Callable, Callable]] = {
        "LPIPS": ("vgg/lpips.pth", load_lpips, lambda lpips: lpips(fixed_image(), -fixed_image())),
        "face parser": (FACE_PARSER, load_face_parser, lambda parser: parser(fixed_image())),
        "DWPose": (DWPOSE, load_dwpose, run_dwpose),
        "SyncNet v2": (SYNCNET_V2, load_syncnet_v2, run_syncnet_v2),
        "Inception": (INCEPTION, load_inception, lambda inception: inception(fixed_image())),
    }
    for name, (file, load, run) in others.items():
        if (models_dir / file).is_file():
            yield name, partial(load, models_dir, CPU), run


def trial(name: str, load: Callable[[], Network], run: Callable) -> tuple[Network | None, Finding]:
    """Loads and runs a network. Returns it, None if it cannot be loaded, and the finding."""
    try:
        network = load()
    except UserError as error:
        return None, Finding(f"{name}: {error}", fault=True)
    with torch.no_grad():
        value = float(run(network).double().abs().mean())
    return network, Finding(f"{name}: loads strictly, mean absolute output {value:.5g}")


def check_cache(config: CheckConfig, vae: VAE | None, encoder: AudioEncoder | None) -> Iterator[Finding]:
    """The cache and its contract, and whether it was made with these networks."""
    try:
        cache = Cache(config.hdtf_samples_dir)
        contract, where = cache.contract, str(cache.folder)
        usable = sum(int(clip.usable.sum()) for clip in cache.clips.values())
        people = len({clip.identity for clip in cache.clips.values()})
        yield Finding(f"cache {where}: {len(cache.clips)} clips of {people} identities, {usable} usable frames")
        yield Finding(f"contract: {', '.join(f'{k} {v}' for k, v in vars(contract).items())}")
        if vae:
            contract.require(replace(contract, vae=vae.fingerprint), ("vae",), where)
        if encoder:
            contract.require(replace(contract, audio_encoder=encoder.fingerprint), ("audio_encoder",), where)
    except UserError as error:
        yield Finding(f"cache: {error}", fault=True)


def fixed(*shape: int) -> torch.Tensor:
    """The same float32 numbers in [-1, 1] on any machine."""
    return torch.from_numpy(np.sin(np.arange(np.prod(shape)) * 0.37).astype(np.float32)).reshape(shape)


def fixed_image() -> torch.Tensor:
    """(1, 3, 256, 256)."""
    return fixed(1, 3, IMAGE_SIZE, IMAGE_SIZE)


def run_vae(vae: VAE) -> torch.Tensor:
    return vae.decode(vae.encode(fixed_image()))


def run_audio_encoder(encoder: AudioEncoder) -> torch.Tensor:
    return encoder(fixed(encoder.mel_bins, 2 * SEGMENT_STATES), final_layer_norm=True)


def run_unet(states: int, unet: UNet) -> torch.Tensor:
    window = fixed(1, WINDOW_STEPS * states, unet.model.config.cross_attention_dim)
    return unet(fixed(1, 2 * LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE), window)


def run_syncnet(expert: SyncNet) -> torch.Tensor:
    images = fixed_image()[:, None].expand(-1, expert.frames, -1, -1, -1)
    return torch.stack(expert.embed(images, fixed(1, expert.mel_frames, SYNC_MEL_BINS)))


def run_syncnet_v2(network: SyncNetV2) -> torch.Tensor:
    faces = 255 * (fixed(1, 3, FRAMES, FACE_SIZE, FACE_SIZE) + 1) / 2
    return torch.stack([network.embed_faces(faces), network.embed_audio(fixed(1, 1, CEPSTRA, MFCC_FRAMES))])


def run_dwpose(backend: DWPose) -> torch.Tensor:
    return backend.network(fixed(1, 3, INPUT_HEIGHT, INPUT_WIDTH))[0]


if __name__ == "__main__":
    run_script(main, tyro.cli(CheckConfig, description=__doc__))
