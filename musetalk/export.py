"""Exports trained weights to the layouts of other programs.

    python -m musetalk.export checkpoints/stage1 --layout musetalk_v15 --output exported

    diffusers      <output>/diffusion_pytorch_model.safetensors   UNet2DConditionModel.from_pretrained(<output>)
    musetalk_v15   <output>/musetalkV15/unet.pth                  MuseTalk v1.5
    musetalk_v1    <output>/musetalk/pytorch_model.bin            MuseTalk v1.0
    original       <output>/musetalk/cunet.bin                    MuseTalkTrainer's demo, which follows v1.0

The configuration of the network is written beside the weights. The tensors equal those of the checkpoint bit for bit.
All layouts but diffusers are for programs with a fixed feature contract: weights trained under another one are refused,
since inference would be poor.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro

from musetalk.cli import check_constants, run_script
from musetalk.contract import ALL_FIELDS, CONTRACTS, ContractError
from musetalk.files import atomic_write
from musetalk.models.trained_unet import find_unet, load_trained_unet, write_unet
from musetalk.models.unet import CONFIGS
from musetalk.models.weights import find

# Layout -> file of the weights, file of the configuration, feature contract of the program that loads them
LAYOUTS = {
    "diffusers": ("diffusion_pytorch_model.safetensors", "config.json", None),
    "musetalk_v15": ("musetalkV15/unet.pth", "musetalkV15/musetalk.json", "musetalk_v15"),
    "musetalk_v1": ("musetalk/pytorch_model.bin", "musetalk/musetalk.json", "musetalk_v1"),
    "original": ("musetalk/cunet.bin", "musetalk/musetalk.json", "musetalk_v1"),
}


@dataclass
class ExportConfig:
    """The constants of an export; override them on the command line."""

    checkpoint: tyro.conf.Positional[Path]  # a unet-<step>.safetensors, or a folder: its newest one
    layout: Literal["diffusers", "musetalk_v15", "musetalk_v1", "original"] = "diffusers"
    output: Path = Path("exported")  # folder
    models_dir: Path = Path("models")  # its musetalk.json is the configuration of the network


def main(config: ExportConfig) -> None:
    """Writes the weights of a checkpoint in a layout. Raises WeightsError, ContractError."""
    check_constants(config)
    path = find_unet(config.checkpoint)
    weights, description, contract_name = LAYOUTS[config.layout]
    unet, contract = load_trained_unet(path, config.models_dir)
    if contract_name is None:
        write_unet(config.output / weights, unet.model.state_dict(), contract)
    else:
        # Sampling and rounding of the cached latents do not matter for inference.
        needed = replace(CONTRACTS[contract_name], posterior=contract.posterior, encode_dtype=contract.encode_dtype)
        try:
            contract.require(needed, ALL_FIELDS, str(path))
        except ContractError as error:
            raise ContractError(
                f"{error}, or export it for diffusers; {config.layout} needs the contract {contract_name}"
            ) from None
        with atomic_write(config.output / weights) as partial:
            torch.save(unet.model.state_dict(), partial)
    with atomic_write(config.output / description) as partial:
        shutil.copyfile(find(config.models_dir, *CONFIGS), partial)
    print(f"exported {path} to {config.output / weights}")


if __name__ == "__main__":
    run_script(main, tyro.cli(ExportConfig, description=__doc__))
