"""The trained part of a UNet: all of it, its attention, or low-rank adapters (LoRA) of its attention.

LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) freezes the weight W (out, in) of a linear layer and uses
W + B A instead, with trained factors A (rank, in), random at first, and B (out, rank), zero at first. Names and scale
(alpha = rank, so a factor of 1) are those of peft and diffusers, whose `load_lora_adapter` reads a file of factors.
"""

from __future__ import annotations

from typing import Literal

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.nn import functional

Trained = Literal["all", "attention", "lora"]


class LoRALinear(nn.Linear):
    """A linear layer with low-rank factors beside its frozen weight, whose name in the state dict stays the same.

    The forward pass multiplies by the merged weight instead of the factors one after the other. So training in mixed
    precision sees the same rounded weight as inference with merged weights does.
    """

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        """Takes over the parameters of a layer."""
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.lora_A = nn.Linear(layer.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)"""
        with torch.autocast(input.device.type, enabled=False):
            weight = merged_weight(self.weight, self.lora_A.weight, self.lora_B.weight)
        return functional.linear(input, weight, self.bias)


def merged_weight(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Returns W + B A (out, in) of W (out, in), A (rank, in) and B (out, rank)."""
    return weight + b @ a


def choose_trained(model: UNet2DConditionModel, trained: Trained, rank: int, seed: int) -> None:
    """Freezes what is not trained; for "lora", adds factors of a rank to the attention's layers, seeded.

    Attention is all of the self-attention and the cross-attention: projections to queries, keys, values and output.
    """
    if trained == "all":
        return
    model.requires_grad_(False)
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for attention in attentions:
            if trained == "attention":
                attention.requires_grad_(True)
                continue
            layers = {name: layer for name, layer in attention.named_modules() if isinstance(layer, nn.Linear)}
            for name, layer in layers.items():
                attention.set_submodule(name, LoRALinear(layer, rank))


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the trained parameters by name, detached."""
    return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}


def factors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns those tensors of a state dict that are LoRA's factors."""
    return {name: value for name, value in tensors.items() if ".lora_" in name}


def merge(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns a state dict with the factors merged into the weights, under the names of a UNet without LoRA."""
    merged = {name: value for name, value in tensors.items() if ".lora_" not in name}
    for name, a in tensors.items():
        layer, found, _ = name.partition(".lora_A.")
        if found:
            weight = f"{layer}.weight"
            merged[weight] = merged_weight(tensors[weight], a, tensors[f"{layer}.lora_B.weight"])
    return merged
