"""A synchronised batch norm for GPUs and CPUs."""

from __future__ import annotations

import torch
from torch import nn


class SyncBatchNorm(nn.SyncBatchNorm):
    """torch's SyncBatchNorm, which supports GPUs only, extended to processes on CPUs (gloo).

    On CPUs the batches of all processes must have the same size.
    """

    # Not None with the default arguments.
    momentum: float
    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        if x.device.type != "cpu" or not (self.training and torch.distributed.is_initialized()):
            return super().forward(x)
        count = x.numel() // x.shape[1] * torch.distributed.get_world_size()
        values = x.to(self.weight.dtype)
        mean = MeanOverProcesses.apply(values.mean((0, 2, 3), keepdim=True))  # (1, C, 1, 1)
        centred = values - mean
        variance = MeanOverProcesses.apply(centred.square().mean((0, 2, 3), keepdim=True))
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_var.lerp_(variance.flatten() * (count / (count - 1)), self.momentum)
        scale = self.weight[:, None, None] * (variance + self.eps).rsqrt()
        return (centred * scale + self.bias[:, None, None]).to(x.dtype)


class MeanOverProcesses(torch.autograd.Function):
    """Averages a tensor over processes. Its backward pass averages the gradients over processes."""

    @staticmethod
    def forward(_, values: torch.Tensor) -> torch.Tensor:
        values = values.contiguous().clone()
        torch.distributed.all_reduce(values)
        return values / torch.distributed.get_world_size()

    @staticmethod
    def backward(_, gradient: torch.Tensor) -> torch.Tensor:
        return MeanOverProcesses.apply(gradient)
