"""What the tests of convolutions share."""

import torch

FLOATING = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def innermost(t: torch.Tensor) -> torch.Tensor:
    """The same tensor with its channels innermost in memory."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def gradients(outputs: torch.Tensor, inputs: list[torch.Tensor], seed: int = 7) -> tuple[torch.Tensor, ...]:
    weight = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(seed)).to(outputs.dtype)
    return torch.autograd.grad(outputs, inputs, weight)
