"""What training leaves behind and begins with: training-state-<step>.pt to go on, unet-<step>.safetensors to use."""

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

from musetalk.contract import ALL_FIELDS, CONTRACTS, ContractError, FeatureContract
from musetalk.files import whole_file
from musetalk.models.unet import UNet, load_unet
from musetalk.weights import BROKEN_PICKLE, WeightsError, read_tensors, write_tensors

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
    """Write weights to use; returns where. Raises WeightsError where it cannot be written."""
    path = run_dir / f"unet-{step:07d}.safetensors"
    write_unet(path, tensors, contract)
    return path


def write_unet(path: Path, tensors: dict[str, torch.Tensor], contract: FeatureContract) -> None:
    """Write plain diffusers names, the feature contract in the one metadata key.

    Raises WeightsError where it cannot be written.
    """
    write_tensors(path, tensors, {"contract": json.dumps(contract.as_dict(ALL_FIELDS))})


def find_unet(place: Path) -> Path:
    """The weights at a place: a file itself, or the newest of a run's folder. Raises WeightsError where none are."""
    if place.is_file():
        return place
    paths = _newest(place, UNET_NAME)
    if not paths:
        raise WeightsError(
            f"{place} is no file and has no unet-<step>.safetensors in it; train one with musetalk_trainer.py"
        )
    return paths[0]


def read_unet_contract(path: Path) -> FeatureContract | None:
    """The contract inside weights of `save_unet`, None where they are of others, who put none in.

    Raises WeightsError, ContractError where it cannot be read.
    """
    if path.suffix != ".safetensors":
        return None
    try:
        if not path.is_file():  # a pipe would be waited for
            raise FileNotFoundError("there is no such file")
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        if "contract" not in metadata:
            return None
        values = json.loads(metadata["contract"])
    except (OSError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise WeightsError(f"{path} cannot be read as weights with a feature contract in them: {error}") from error
    return FeatureContract.from_dict(values, ALL_FIELDS, str(path))


def load_trained_unet(
    path: Path, models_dir: Path, contract: FeatureContract | None = None
) -> tuple[UNet, FeatureContract]:
    """A trained UNet and the contract it was trained under: its own, or for weights without one the one given.

    Raises WeightsError; ContractError where there is none, or where its own is not the one given.
    """
    own = read_unet_contract(path)
    if own is None and contract is None:
        raise ContractError(
            f"{path} carries no feature contract, since this project did not make it; say which one it was trained "
            f"under ({', '.join(CONTRACTS)})"
        )
    if own and contract:
        own.require(contract, ALL_FIELDS, str(path))
    contract = own or contract
    return load_unet(models_dir, path, contract.positional_encoding), contract
