"""Dropout and the sum with a residual, in plain PyTorch.

Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov, "Dropout: a simple way to prevent neural networks from
overfitting", JMLR 15, 2014.
"""

import torch
from torch import Tensor

from .philox import philox


def dropout(x: Tensor, residual: Tensor | None, seed: Tensor, p: float) -> Tensor:
    """x times (0 with probability p, else 1 / (1 - p)), plus residual.

    Every element is multiplied, so that an infinite one that is dropped gives NaN, as in PyTorch.

    Args:
        x: of any shape.
        residual: of x's shape and dtype.
        seed: two 32-bit words in int64, the key of the random numbers.
        p: within [0, 1].
    """
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(compute) * _factors(x.numel(), seed, p, compute).view(x.shape)
    return (y if residual is None else y + residual.to(compute)).to(x.dtype)


def _factors(count: int, seed: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """What the elements are multiplied with, in the order of their linear indices.

    Element i is decided by the upper 24 bits of word i % 64 // 16 of the block of random numbers with the counter
    (i // 64 * 16 + i % 16, of two words, 0, 0): 16 neighbours, a vector's lanes, differ in one counter word only.
    """
    blocks = torch.arange((count + 63) // 64 * 16, device=seed.device)
    zero = torch.zeros_like(blocks[:1])
    words = torch.stack(philox((blocks & 0xFFFFFFFF, blocks >> 32, zero, zero), (seed[0], seed[1])))  # [4, blocks]
    drawn = words.view(4, -1, 16).transpose(0, 1).reshape(-1)[:count]
    factor = 0.0 if p == 1.0 else 1.0 / (1.0 - p)
    return (drawn >> 8 >= round(p * 2**24)).to(dtype) * factor
