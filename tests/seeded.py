"""Seeded random tensors and weights."""

from __future__ import annotations

import torch
from torch import nn


def random_tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    """Returns normal values, float32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_weights(network: nn.Module, seed: int = 0) -> nn.Module:
    """Fills a network with random weights and statistics of batch norms, without vanishing activations.

    Returns the network in eval mode.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in network.state_dict().items():
        if not tensor.is_floating_point():
            tensor.fill_(7)
        elif name.endswith("running_var") or tensor.ndim == 1 and name.endswith("weight"):
            tensor.uniform_(0.5, 1.5, generator=generator)
        else:
            tensor.normal_(0, (2 / max(1, tensor[0].numel())) ** 0.5 if tensor.ndim > 1 else 0.1, generator=generator)
    return network.eval()
