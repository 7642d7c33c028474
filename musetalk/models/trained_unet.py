"""Files of trained UNets: weights for inference, with the feature contract of their training."""

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
    """Writes tensors under plain diffusers names, with the feature contract as the only metadata key.

    Raises WeightsError if writing fails.
    """
    write_tensors(path, tensors, {"contract": json.dumps(contract.as_dict(ALL_FIELDS))})


def find_unet(place: Path) -> Path:
    """Returns `place` if it is a file, else the newest unet-<step>.safetensors in it. Raises WeightsError if none
    exists."""
    if place.is_file():
        return place
    path = next(iter(saved_files(place, UNET_NAME).values()), None)
    if path is None:
        raise WeightsError(
            f"{place} is neither a file nor a folder with unet-<step>.safetensors; make one with musetalk_trainer.py"
        )
    return path


def read_unet_contract(path: Path) -> FeatureContract | None:
    """Reads the contract in a file of weights. Returns None if there is none, as in weights from other projects.

    Raises WeightsError or ContractError if the contract cannot be read.
    """
    if path.suffix != ".safetensors":
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        if "contract" not in metadata:
            return None
        values = json.loads(metadata["contract"])
    except (OSError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise WeightsError(f"{path} cannot be read as weights with a feature contract: {error}") from error
    return FeatureContract.from_dict(values, ALL_FIELDS, str(path))


def load_trained_unet(
    path: Path, models_dir: Path, contract: FeatureContract | None = None
) -> tuple[UNet, FeatureContract]:
    """Loads a trained UNet and its contract: the one in the file or, for weights without a contract, `contract`.

    Raises WeightsError. Raises ContractError if neither exists or if they differ.
    """
    own = read_unet_contract(path)
    if own and contract:
        own.require(contract, ALL_FIELDS, str(path))
    contract = own or contract
    if contract is None:
        raise ContractError(
            f"{path} carries no feature contract, since it was not written by this project; pass the contract it was "
            f"trained under ({', '.join(CONTRACTS)})"
        )
    return load_unet(models_dir, path, contract.positional_encoding), contract
