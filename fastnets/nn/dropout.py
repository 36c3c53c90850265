"""torch.nn.Dropout on our kernels."""

import torch
from torch import Tensor

from .. import functional

__all__ = ["Dropout"]


class Dropout(torch.nn.Dropout):
    """torch.nn.Dropout, drop-in: the same constructor, repr and pickling. Its random numbers are others from the same
    seed; see fastnets.functional.dropout."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """While training, input with elements zeroed, else input itself; plus residual, of its shape and dtype."""
        return functional.dropout(input, self.p, self.training, self.inplace, residual=residual)


def sum_of(residual: Tensor, dropout: torch.nn.Module, x: Tensor) -> Tensor:
    """residual + dropout(x), in one pass over memory where the layer is ours and no hook waits for what it returns."""
    if type(dropout) is not Dropout or "forward" in dropout.__dict__ or _has_hooks(dropout):
        return residual + dropout(x)
    if x.is_nested or x.dtype != residual.dtype or x.shape != residual.shape:
        return residual + dropout(x)
    return dropout(x, residual)


def _has_hooks(module: torch.nn.Module) -> bool:
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(len(some) > 0 for some in hooks)
