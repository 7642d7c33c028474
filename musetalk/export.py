"""Trained weights -> the files that other programs load.

    python -m musetalk.export checkpoints/stage1 --layout musetalk_v15 --output exported

    diffusers      <output>/diffusion_pytorch_model.safetensors   UNet2DConditionModel.from_pretrained(<output>)
    musetalk_v15   <output>/musetalkV15/unet.pth                  MuseTalk v1.5
    musetalk_v1    <output>/musetalk/pytorch_model.bin            MuseTalk v1.0
    original       <output>/musetalk/cunet.bin                    MuseTalkTrainer's demo, which follows v1.0

Each with the configuration of the network beside it. The tensors are those of the checkpoint, bit by bit. All but
diffusers are for programs with rules of their own for faces and audio: weights of another feature contract are refused,
since they would infer badly there.
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

# Layout -> the file of weights, that of the configuration, and the rules of the program that loads them.
LAYOUTS = {
    "diffusers": ("diffusion_pytorch_model.safetensors", "config.json", None),
    "musetalk_v15": ("musetalkV15/unet.pth", "musetalkV15/musetalk.json", "musetalk_v15"),
    "musetalk_v1": ("musetalk/pytorch_model.bin", "musetalk/musetalk.json", "musetalk_v1"),
    "original": ("musetalk/cunet.bin", "musetalk/musetalk.json", "musetalk_v1"),
}


@dataclass
class ExportConfig:
    """The constants of an export; override them on the command line."""

    checkpoint: tyro.conf.Positional[Path]  # a unet-<step>.safetensors, or a folder whose newest is taken
    layout: Literal["diffusers", "musetalk_v15", "musetalk_v1", "original"] = "diffusers"
    output: Path = Path("exported")  # folder
    models_dir: Path = Path("models")  # whose musetalk.json describes the network


def main(config: ExportConfig) -> None:
    """Write the weights of a checkpoint in a layout. Raises WeightsError, ContractError."""
    check_constants(config)
    path = find_unet(config.checkpoint)
    weights, description, rules = LAYOUTS[config.layout]
    unet, contract = load_trained_unet(path, config.models_dir)
    if rules:
        # How the latents of the cache were drawn and rounded makes no difference to who uses the weights.
        wanted = replace(CONTRACTS[rules], posterior=contract.posterior, encode_dtype=contract.encode_dtype)
        try:
            contract.require(wanted, ALL_FIELDS, str(path))
        except ContractError as error:
            raise ContractError(f"{error}, or export it for diffusers; {config.layout} has the rules {rules}") from None
    if rules:
        with atomic_write(config.output / weights) as partial:
            torch.save(unet.model.state_dict(), partial)
    else:
        write_unet(config.output / weights, unet.model.state_dict(), contract)
    with atomic_write(config.output / description) as partial:
        shutil.copyfile(find(config.models_dir, *CONFIGS), partial)
    print(f"{path} has been exported to {config.output / weights}")


if __name__ == "__main__":
    run_script(main, tyro.cli(ExportConfig, description=__doc__))
