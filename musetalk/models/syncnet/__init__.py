"""The sync experts, which judge whether a mouth speaks given audio: Wav2Lip's SyncNet and LatentSync's StableSyncNet.

Each embeds a window of faces and the mel of the same time as two unit vectors. Their dot product is 1 if they are in
sync and 0 if not.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from reprlib import repr as short

import safetensors
import torch

from musetalk.files import saved_files
from musetalk.models.syncnet.base import SyncNet
from musetalk.models.syncnet.stable import (
    STABLE_SYNCNET_16,
    STABLE_SYNCNET_16_ATTENTION,
    STABLE_SYNCNET_16_NARROW,
    StableSyncNet,
    build_from_file,
)
from musetalk.models.syncnet.wav2lip import Wav2LipSyncNet
from musetalk.models.weights import WeightsError, find, freeze, load_strictly, read_tensors, unwrap, write_tensors

ARCHITECTURES: dict[str, Callable[[], SyncNet]] = {
    "wav2lip": Wav2LipSyncNet,
    "wav2lip_narrow": lambda: Wav2LipSyncNet(width=8),
    "latentsync": lambda: StableSyncNet(STABLE_SYNCNET_16),
    "latentsync_attention": lambda: StableSyncNet(STABLE_SYNCNET_16_ATTENTION),
    "latentsync_narrow": lambda: StableSyncNet(STABLE_SYNCNET_16_NARROW),
}
PUBLISHED = {  # file in a models folder -> its architecture, if there is no configuration next to it
    "syncnet/lipsync_expert.pth": "wav2lip",
    "syncnet/latentsync_syncnet.pt": "latentsync",  # the expert of MuseTalk v1.5's training
    "syncnet/stable_syncnet.pt": "latentsync_attention",
}
SYNCNET_NAME = r"syncnet-(\d+)\.safetensors"


def build_syncnet(architecture: str, seed: int) -> SyncNet:
    """Builds an untrained expert, seeded. architecture: a key of `ARCHITECTURES`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ARCHITECTURES[architecture]()


def save_syncnet(run_dir: Path, step: int, tensors: dict[str, torch.Tensor], architecture: str) -> Path:
    """Writes an expert's weights for use, with its architecture as the only metadata key. Returns the path.

    Raises WeightsError if writing fails.
    """
    path = run_dir / f"syncnet-{step:07d}.safetensors"
    write_tensors(path, tensors, {"architecture": architecture})
    return path


def load_syncnet(models_dir: Path, name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> SyncNet:
    """Loads a frozen expert. Raises WeightsError.

    name: a key of `PUBLISHED` (a file in models_dir), a syncnet-<step>.safetensors of syncnet_trainer.py, or a folder
    whose newest one is loaded. A StableSyncNet of other widths under a published name has its `StableConfig` in a .json
    file of the same name next to it.
    """
    if name in PUBLISHED:
        path = find(models_dir, name)
        config = path.with_suffix(".json")
        build = (lambda: build_from_file(config)) if config.is_file() else ARCHITECTURES[PUBLISHED[name]]
    else:
        path = find_trained(Path(name))
        build = ARCHITECTURES[_read_architecture(path)]
    with torch.device("meta"):
        network = build()
    load_strictly(network, unwrap(read_tensors(path), path), path)
    return freeze(network).to(device, dtype)


def find_trained(place: Path) -> Path:
    """Returns `place` if it is a file, else the newest syncnet-<step>.safetensors in it. Raises WeightsError if none
    exists."""
    if place.is_file():
        return place
    path = next(iter(saved_files(place, SYNCNET_NAME).values()), None)
    if path is None:
        raise WeightsError(
            f"{place} is no sync expert: name a file of the models folder ({', '.join(PUBLISHED)}), a "
            "syncnet-<step>.safetensors made by syncnet_trainer.py, or a folder that contains one"
        )
    return path


def _read_architecture(path: Path) -> str:
    """Returns the architecture in a file of `save_syncnet`. Raises WeightsError if there is none."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            name = (file.metadata() or {}).get("architecture")
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsError(f"{path} cannot be read as a sync expert of syncnet_trainer.py: {error}") from error
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise WeightsError(f"{path} is no sync expert: its architecture is {short(name)}, not one of {known}")
    return name
