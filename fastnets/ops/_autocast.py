"""torch.autocast for our operators: the casts that torch's own would get."""

import torch
from torch import Tensor


def _enabled(device: str) -> bool:
    # Not torch.amp.is_autocast_available, which torch.compile cannot trace before torch 2.13; without it "meta" raises.
    return device != "meta" and torch.is_autocast_enabled(device)


def lower(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Casts float32 tensors, of which the first is there, to autocast's dtype where autocast is on: as for convolution
    and matrix products."""
    device = tensors[0].device.type
    if not _enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )


def full(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Casts lower precision to float32, the first tensor being there, where autocast is on: as for softmax."""
    device = tensors[0].device.type
    if not _enabled(device):
        return tensors
    low = (torch.bfloat16, torch.float16)
    return tuple(t.float() if t is not None and t.dtype in low else t for t in tensors)
