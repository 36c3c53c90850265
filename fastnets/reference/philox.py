"""Counter-based random numbers in torch's integer arithmetic: every backend draws the same ones.

Philox 4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four 32-bit words, in int64, for each counter.

    Args:
        counter: four int64 tensors with values below 2^32, broadcastable together.
        key: two int64 tensors with values below 2^32, broadcastable with the counter.
    """
    a, b, c, d = torch.broadcast_tensors(*counter)
    for _ in range(10):
        high_a, low_a = _product(a, _MULTIPLIERS[0])
        high_c, low_c = _product(c, _MULTIPLIERS[1])
        a, b, c, d = high_c ^ b ^ key[0], low_c, high_a ^ d ^ key[1], low_a
        key = ((key[0] + _WEYL[0]) & _LOW, (key[1] + _WEYL[1]) & _LOW)
    return a, b, c, d


def _product(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The high and the low 32 bits of x * factor; the 64-bit product may wrap into the sign, its bits are right."""
    product = x * factor
    return product >> 32 & _LOW, product & _LOW


def draw_seed(device: torch.device) -> Tensor:
    """A key for `philox` from torch's own generator: int64 [2], which torch.manual_seed governs."""
    return torch.randint(2**32, (2,), dtype=torch.int64, device=device)
