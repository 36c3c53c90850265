"""fastnets' operators as functions: torch.nn.functional's signatures, plus keyword-only extras of our own."""

import torch
from torch import Tensor

from .ops._checks import expect_tensor
from .ops.softmax import softmax as _softmax

__all__ = ["softmax"]


def softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """softmax(input * scale + mask) over one dimension; torch.nn.functional.softmax with scale and mask fused in.

    Args:
        input: scores of any shape; float32, float64, bfloat16 or float16.
        dim: the dimension that sums to one; None as in torch: 0 for 0, 1 or 3 dimensions, else 1.
        dtype: the input is cast to it first.
        scale: factor on the input.
        mask: broadcastable to input; boolean (True takes part) or additive, of input's dtype, with gradient.

    Returns:
        A tensor of input's shape. Where the mask leaves nothing, zeros (not NaN), and zero gradient.

    Raises:
        TypeError, ValueError, IndexError: naming the argument.
    """
    expect_tensor(input, "input")
    if dtype is not None:
        input = input.to(dtype)
    if dim is None:
        dim = 0 if input.dim() in (0, 1, 3) else 1
    if input.dim() == 0:
        return _softmax(input.reshape(1), 0 if dim in (0, -1) else dim, scale=scale, mask=mask).reshape(())
    return _softmax(input, dim, scale=scale, mask=mask)
