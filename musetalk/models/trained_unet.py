"""Weights to use: a trained UNet with the feature contract that it was trained under."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors
import torch

from musetalk.contract import ALL_FIELDS, CONTRACTS, ContractError, FeatureContract
from musetalk.files import saved_files
from musetalk.models.unet import UNet, load_unet
from musetalk.models.weights import WeightsError, write_tensors

UNET_NAME = r"unet-(\d+)\.safetensors"


def write_unet(path: Path, tensors: dict[str, torch.Tensor], contract: FeatureContract) -> None:
    """Write plain diffusers names, the feature contract in the one metadata key.

    Raises WeightsError where it cannot be written.
    """
    write_tensors(path, tensors, {"contract": json.dumps(contract.as_dict(ALL_FIELDS))})


def find_unet(place: Path) -> Path:
    """The weights at a place: a file itself, or the newest of a run's folder. Raises WeightsError where none are."""
    if place.is_file():
        return place
    path = next(iter(saved_files(place, UNET_NAME).values()), None)
    if path is None:
        raise WeightsError(
            f"{place} is no file and has no unet-<step>.safetensors in it; train one with musetalk_trainer.py"
        )
    return path


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
