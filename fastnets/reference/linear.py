"""A linear layer with a fused epilogue, in plain PyTorch."""

from torch import Tensor
from torch.nn import functional

from .conv import ACTIVATIONS


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None) -> Tensor:
    """activation(x weight^T + bias + residual): x[*, I], weight[O, I], bias[O], residual[*, O]."""
    y = functional.linear(x, weight, bias)
    return ACTIVATIONS[activation](y if residual is None else y + residual)
