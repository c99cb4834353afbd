"""Batch norm over the batch of all processes, for when each one's share is small.

As torch.nn.SyncBatchNorm, which runs on GPUs only and forgets the activation that timm's layers carry. Here a layer
stays what it is, its weights and buffers keep their names, and only its statistics in training come from all processes.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules.batchnorm import _BatchNorm


def synchronise(network: nn.Module) -> None:
    """Makes every batch norm of a network take its statistics from all processes while it trains."""
    for module in network.modules():
        if isinstance(module, _BatchNorm) and not isinstance(module, _Synchronised):
            module.__class__ = type(f"Synchronised{type(module).__name__}", (_Synchronised, type(module)), {})


class _Synchronised(_BatchNorm):
    def forward(self, x: Tensor) -> Any:
        if not self.training:
            return super().forward(x)
        y = self._normalised(x)
        # timm's batch norms carry what follows them: dropout and the activation.
        for after in ("drop", "act"):
            y = getattr(self, after, nn.Identity())(y)
        return y

    def _normalised(self, x: Tensor) -> Tensor:
        """(b, c, …) normalised channel by channel, in float32 where less comes in."""
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        dims = [0, *range(2, x.ndim)]
        shape = [1, -1, *[1] * (x.ndim - 2)]
        count = _total(torch.full((), values.numel() / values.shape[1], device=x.device))
        mean = _total(values.sum(dims)) / count
        centred = values - mean.view(shape)
        variance = _total(centred.square().sum(dims)) / count
        if self.track_running_stats:
            self._track(mean.detach(), (variance * count / (count - 1).clamp(min=1)).detach())
        y = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.weight is not None:
            y = y * self.weight.view(shape)
        if self.bias is not None:
            y = y + self.bias.view(shape)
        return y.to(x.dtype)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        # Without a momentum the running statistics are the mean over all batches.
        new = self.num_batches_tracked.to(mean.dtype).reciprocal() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, new)
        self.running_var.lerp_(variance, new)


class _Total(Function):
    """The sum over all processes; so is its gradient, for what one of them puts in is in the sum of every other."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total


def _total(value: Tensor) -> Tensor:
    found = _Total.apply(value)
    assert isinstance(found, Tensor)
    return found
