"""What training leaves behind: training-state-<step>.pt to go on, unet-<step>.safetensors to use."""

from __future__ import annotations

import json
import lzma
import re
import zipfile
import zlib
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from musetalk.contract import ALL_FIELDS, FeatureContract
from musetalk.files import whole_file
from musetalk.models.unet import UNet, load_unet
from musetalk.weights import BROKEN_PICKLE, WeightsError, read_tensors

STATE_NAME = re.compile(r"^training-state-(\d+)\.pt$")
GO_BACK = "delete it, and the run goes on from the state before it"
UNET_NAME = re.compile(r"^unet-(\d+)\.safetensors$")


def _newest(run_dir: Path, pattern: re.Pattern) -> list[Path]:
    """Files of a run by step, the newest first."""
    found = [(int(match[1]), path) for path in run_dir.glob("*") if (match := pattern.match(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def save_state(run_dir: Path, step: int, state: dict, keep: int) -> Path:
    """Write a training state that is either whole or not there; only the newest `keep` of a run stay."""
    path = run_dir / f"training-state-{step:07d}.pt"
    with whole_file(path) as partial, open(partial, "wb") as file:
        torch.save(state | {"step": step}, file)
    for old in _newest(run_dir, STATE_NAME)[keep:]:
        old.unlink()
    return path


def load_latest_state(run_dir: Path) -> tuple[Path, dict] | None:
    """The newest training state of a run on the CPU and where it is, None where there is none.

    Raises WeightsError where a byte of it has changed.
    """
    paths = _newest(run_dir, STATE_NAME)
    if not paths:
        return None
    try:
        if not paths[0].is_file():  # a pipe would be waited for
            raise FileNotFoundError("it is no file")
        with zipfile.ZipFile(paths[0]) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > paths[0].stat().st_size:
                raise zipfile.BadZipFile("it says that it holds more than its size")
            folders = [
                entry.filename for entry in archive.infolist() if entry.external_attr
            ]  # torch reads nothing there
            broken = next(iter(folders), None) or archive.testzip()
    except (OSError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, *BROKEN_PICKLE) as error:
        raise WeightsError(f"{paths[0]} is no whole training state ({error}); {GO_BACK}") from error
    if broken is not None:
        raise WeightsError(f"{paths[0]} has changed since it was saved ({broken}); {GO_BACK}")
    try:
        return paths[0], read_tensors(paths[0])
    except WeightsError as error:
        raise WeightsError(f"{error}; {GO_BACK}") from error


def save_unet(run_dir: Path, step: int, tensors: dict[str, torch.Tensor], contract: FeatureContract) -> Path:
    """Write weights to use: plain diffusers names, the feature contract in the one metadata key.

    Raises WeightsError where it cannot be written.
    """
    path = run_dir / f"unet-{step:07d}.safetensors"
    metadata = {"contract": json.dumps(contract.as_dict(ALL_FIELDS))}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as partial:
        try:
            safetensors.torch.save_file(tensors, partial, metadata)
        except safetensors.SafetensorError as error:
            raise WeightsError(f"{path} cannot be written: {error}") from error
    return path


def latest_unet(run_dir: Path) -> Path:
    """The newest weights of a run. Raises WeightsError where there are none."""
    paths = _newest(run_dir, UNET_NAME)
    if not paths:
        raise WeightsError(f"{run_dir} has no unet-<step>.safetensors in it; train one with musetalk_trainer.py")
    return paths[0]


def read_unet_contract(path: Path) -> FeatureContract:
    """The contract inside weights of `save_unet`. Raises WeightsError where there is none."""
    try:
        if not path.is_file():  # a pipe would be waited for
            raise FileNotFoundError("there is no such file")
        with safetensors.safe_open(path, framework="pt") as file:
            values = json.loads((file.metadata() or {})["contract"])
    except (OSError, KeyError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise WeightsError(f"{path} cannot be read as weights with a feature contract in them: {error}") from error
    return FeatureContract.from_dict(values, ALL_FIELDS, str(path))


def load_trained_unet(path: Path, models_dir: Path) -> tuple[UNet, FeatureContract]:
    """A trained UNet and the contract it was trained under. Raises WeightsError, ContractError."""
    contract = read_unet_contract(path)
    return load_unet(models_dir, path, contract.positional_encoding), contract
