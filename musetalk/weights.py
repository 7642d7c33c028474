"""Weight files: where they belong, where they come from, loaded strictly and without running code from them."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from musetalk.script import UserError

# Each file of a models folder -> where people get it. The first that is there is taken.
SOURCES = {
    "musetalk/musetalk.json": "https://huggingface.co/TMElyralab/MuseTalk (musetalk/musetalk.json)",
    "sd-vae-ft-mse/config.json": "https://huggingface.co/stabilityai/sd-vae-ft-mse",
    "sd-vae-ft-mse/diffusion_pytorch_model.safetensors": "https://huggingface.co/stabilityai/sd-vae-ft-mse",
    "whisper/tiny.pt": "https://openaipublic.azureedge.net/main/whisper/models/"
    "65147644a518d12f04e32d6f3b26facc3f8dd46e5390956a9424a650c0ce22b9/tiny.pt",
}

# What torch's own unpickler lets through where the bytes make no sense.
BROKEN_PICKLE = (ValueError, RuntimeError, IndexError, KeyError, TypeError, AttributeError)


class WeightsError(UserError):
    """A weight file is missing or is not what it should be. The message names it and what to do."""


def find(models_dir: Path, name: str) -> Path:
    """The path of a file of `SOURCES` in a models folder. Raises WeightsError naming its place and source."""
    path = Path(models_dir) / name
    if not path.is_file():
        raise WeightsError(f"{path} is missing; get it from {SOURCES[name]} and put it there")
    return path


def read_json(path: Path) -> dict:
    """A JSON object. Raises WeightsError where the file is something else."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{path} holds no JSON object")
    return values


def read_tensors(path: Path) -> dict:
    """What a .safetensors or a torch file holds. Nothing in it is run. Raises WeightsError where it is neither."""
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        values = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, SafetensorError, pickle.UnpicklingError, *BROKEN_PICKLE) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"{path} cannot be read as weights: {reason}") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{path} holds no weights by name but a {type(values).__name__}")
    return values


def load_strictly(module: nn.Module, tensors: dict, path: Path) -> None:
    """Put tensors into a module by name. Raises WeightsError listing what does not fit; then nothing was loaded."""
    own = module.state_dict()
    faults = {
        "missing": sorted(own.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - own.keys()),
        "wrongly shaped": [
            f"{name} {tuple(tensors[name].shape)} for {tuple(own[name].shape)}"
            for name in sorted(own.keys() & tensors.keys())
            if tensors[name].shape != own[name].shape
        ],
    }
    if any(faults.values()):
        listed = "; ".join(
            f"{len(names)} {fault}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            for fault, names in faults.items()
            if names
        )
        raise WeightsError(f"{path} does not fit {type(module).__name__}: {listed}")
    module.load_state_dict(tensors)


def freeze(module: nn.Module) -> nn.Module:
    """The module in eval mode, none of its weights ever getting a gradient."""
    return module.requires_grad_(False).eval()


def fingerprint(module: nn.Module) -> str:
    """A short hash of a module's tensors as float32, by name: the same whatever file format they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
