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
from torch.utils.serialization import config as serialization

from musetalk.contract import ALL_FIELDS, CONTRACTS, ContractError, FeatureContract
from musetalk.files import whole_file
from musetalk.models.unet import UNet, load_unet
from musetalk.weights import BROKEN_PICKLE, WeightsError, read_tensors, write_tensors

STATE_NAME, UNET_NAME = r"training-state-(\d+)\.pt", r"unet-(\d+)\.safetensors"
WEIGHTS_NAME = r"[a-z]+-(\d+)\.safetensors"  # of any network
GO_BACK = "delete it, and the run goes on from the state before it"


def saved_files(run_dir: Path, pattern: str) -> dict[int, Path]:
    """Returns the files of a run whose names fit a pattern with one group, the step: by step, the newest first."""
    found = {int(match[1]): path for path in run_dir.glob("*") if (match := re.fullmatch(pattern, path.name))}
    return dict(sorted(found.items(), reverse=True))


def delete_older(path: Path, keep: int, every: int = 0) -> None:
    """Deletes files named like this one, `<kind>-<step, 7 digits>.<ending>`, but for earlier steps.

    The newest `keep`, this one among them, stay, and those of steps that are multiples of `every`; 0: of none.
    """
    kind, step = path.stem.rsplit("-", 1)
    files = saved_files(path.parent, rf"{re.escape(kind)}-(\d+){re.escape(path.suffix)}")
    earlier = [other for other in files if other < int(step)]
    for old in earlier[keep - 1 :]:
        ours = files[old].name == f"{kind}-{old:07d}{path.suffix}"
        if ours and (not every or old % every):
            files[old].unlink()


def save_state(run_dir: Path, step: int, state: dict, keep: int) -> Path:
    """Write a training state that is either whole or not there; only the newest `keep` of a run stay."""
    path = run_dir / f"training-state-{step:07d}.pt"
    with whole_file(path) as partial, open(partial, "wb") as file:
        torch.save(state | {"step": step}, file)
    delete_older(path, keep)
    return path


def load_latest_state(run_dir: Path, *, check_sums: bool = True) -> tuple[Path, dict] | None:
    """The newest training state of a run, mapped into memory, and where it is; None where there is none.

    check_sums: read all of it to see whether a byte has changed. Raises WeightsError where it is no whole state.
    """
    path = next(iter(saved_files(run_dir, STATE_NAME).values()), None)
    if path is None:
        return None
    try:
        if not path.is_file():  # a pipe would be waited for
            raise FileNotFoundError("it is no file")
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise zipfile.BadZipFile("it says that it holds more than its size")
            # torch reads nothing of a folder, and maps a compressed record as if it were not.
            odd = next((entry.filename for entry in entries if entry.external_attr or entry.compress_type), None)
            broken = odd or (archive.testzip() if check_sums else None)
    except (OSError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, *BROKEN_PICKLE) as error:
        raise WeightsError(f"{path} is no whole training state ({error}); {GO_BACK}") from error
    if broken is not None:
        raise WeightsError(f"{path} has changed since it was saved ({broken}); {GO_BACK}")
    try:
        with serialization.patch("load.mmap", True):
            return path, read_tensors(path)
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
