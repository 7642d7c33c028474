"""Files of a training: training-state-<step>.pt to resume from, unet-<step>.safetensors to use.

With LoRA also adapter-<step>.safetensors, the adapter alone.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import torch
from torch.utils._pytree import tree_map
from torch.utils.serialization import config as serialization

from musetalk.contract import FeatureContract
from musetalk.files import atomic_write, delete_older, saved_files
from musetalk.models.lora import merge
from musetalk.models.trained_unet import write_unet
from musetalk.models.weights import PICKLE_ERRORS, WeightsError, read_tensors, write_tensors

STATE_NAME = r"training-state-(\d+)\.pt"
WEIGHTS_NAME = r"[a-z]+-(\d+)\.safetensors"  # of any network
GO_BACK = "delete it to resume from the state before it"


def host_copy(values: dict) -> dict:
    """Copies the tensors in nested dicts and lists to host memory, where further training does not change them."""
    return tree_map(lambda x: x.detach().to("cpu", copy=True) if isinstance(x, torch.Tensor) else x, values)


def save_state(run_dir: Path, step: int, state: dict, keep: int) -> Path:
    """Writes a training state atomically and deletes all but the newest `keep`. Returns its path."""
    path = run_dir / f"training-state-{step:07d}.pt"
    with atomic_write(path) as partial, open(partial, "wb") as file:
        torch.save(state | {"step": step}, file)
    delete_older(path, keep)
    return path


def load_latest_state(run_dir: Path, *, check_sums: bool = True) -> tuple[Path, dict] | None:
    """Returns the path and the values of a run's newest training state, mapped into memory; None without one.

    check_sums: read the whole file to verify its checksums. Raises WeightsError if it is truncated or corrupted.
    """
    path = next(iter(saved_files(run_dir, STATE_NAME).values()), None)
    if path is None:
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            # torch would map a compressed entry as it is, and reads nothing of one that is marked as a folder.
            odd = (entry.filename for entry in archive.infolist() if entry.compress_type or entry.external_attr)
            broken = next(odd, None) or (archive.testzip() if check_sums else None)
    except (OSError, zipfile.BadZipFile, *PICKLE_ERRORS) as error:
        raise WeightsError(f"{path} is not a complete training state ({error}); {GO_BACK}") from error
    if broken is not None:
        raise WeightsError(f"{path} is corrupted (at {broken}); {GO_BACK}")
    try:
        with serialization.patch("load.mmap", True):  # type: ignore[attr-defined]  # torch installs it at run time
            return path, read_tensors(path)
    except WeightsError as error:
        raise WeightsError(f"{error}; {GO_BACK}") from error


def save_unet(run_dir: Path, step: int, tensors: dict[str, torch.Tensor], contract: FeatureContract) -> Path:
    """Writes weights with their contract, LoRA's factors merged into them. Returns their path.

    Raises WeightsError if they cannot be written.
    """
    path = run_dir / f"unet-{step:07d}.safetensors"
    write_unet(path, merge(tensors), contract)
    return path


def save_adapter(run_dir: Path, step: int, tensors: dict[str, torch.Tensor], rank: int) -> Path:
    """Writes the factors of LoRA with peft's description of them, as diffusers stores it. Returns their path.

    Raises WeightsError if they cannot be written.
    """
    path = run_dir / f"adapter-{step:07d}.safetensors"
    layers = sorted({name.partition(".lora_")[0] for name in tensors})
    description = {"r": rank, "lora_alpha": rank, "target_modules": layers}
    write_tensors(path, tensors, {"lora_adapter_metadata": json.dumps(description)})
    return path
