"""What training leaves behind and begins with: training-state-<step>.pt to go on, unet-<step>.safetensors to use."""

from __future__ import annotations

import lzma
import zipfile
import zlib
from pathlib import Path

import torch
from torch.utils.serialization import config as serialization

from musetalk.contract import FeatureContract
from musetalk.files import atomic_write, delete_older, saved_files
from musetalk.models.trained_unet import write_unet
from musetalk.models.weights import PICKLE_ERRORS, WeightsError, read_tensors

STATE_NAME = r"training-state-(\d+)\.pt"
WEIGHTS_NAME = r"[a-z]+-(\d+)\.safetensors"  # of any network
GO_BACK = "delete it, and the run goes on from the state before it"


def save_state(run_dir: Path, step: int, state: dict, keep: int) -> Path:
    """Write a training state that is either whole or not there; only the newest `keep` of a run stay."""
    path = run_dir / f"training-state-{step:07d}.pt"
    with atomic_write(path) as partial, open(partial, "wb") as file:
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
    except (OSError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, *PICKLE_ERRORS) as error:
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
