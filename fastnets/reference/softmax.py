"""Softmax with scale and mask, in plain PyTorch."""

import torch
from torch import Tensor


def softmax(x: Tensor, mask: Tensor | None, dim: int, scale: float) -> Tensor:
    """softmax(x * scale + mask) over `dim`; a row without a single finite score gives zeros."""
    scores = x * scale
    if mask is None:
        return torch.softmax(scores, dim)
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    empty = (scores == -torch.inf).all(dim, keepdim=True)
    return torch.softmax(scores.masked_fill(empty, 0.0), dim).masked_fill(empty, 0.0)
