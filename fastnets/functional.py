"""fastnets' operators as functions: torch.nn.functional's signatures, plus keyword-only extras of our own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .ops._checks import expect_tensor
from .ops.conv import conv as _conv
from .ops.conv import conv_transpose as _conv_transpose
from .ops.softmax import softmax as _softmax

__all__ = [
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "softmax",
]


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


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """activation(conv1d(input, weight) + bias + residual): conv2d over one dimension.

    input: [N, C, L]; weight: [K, C / groups, kernel]; the rest as conv2d.
    """
    return _conv(1, input, weight, bias, stride, padding, dilation, groups, activation, residual)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """activation(conv2d(input, weight) + bias + residual), in one pass over memory.

    torch.nn.functional.conv2d with an epilogue; torch's page has the formula of the convolution.

    Args:
        input: [N, C, H, W] or, without a batch, [C, H, W]; any strides. With the channels innermost
            (torch.channels_last), in input or weight, the result has them innermost too.
        weight: [K, C / groups, kernel height, kernel width].
        bias: [K].
        stride, dilation: an integer, or one for each dimension.
        padding: zeros on both sides, as stride; or 'same' (the result has input's size; stride 1 only), or 'valid'.
        groups: both C and K are divided into as many, convolved apart.
        activation: None, 'relu', 'gelu' (the exact one), 'silu', 'sigmoid' or 'tanh'.
        residual: of the result's shape, added before the activation.

    float32, float64, bfloat16 and float16 (the last two summed in float32) run on our kernels; complex numbers and
    integers on the reference.

    Returns:
        [N, K, H', W'], H' = (H + 2 padding - dilation (kernel height - 1) - 1) // stride + 1.

    Raises:
        TypeError, ValueError (where torch raises RuntimeError, that too): naming the argument.
    """
    return _conv(2, input, weight, bias, stride, padding, dilation, groups, activation, residual)


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """activation(conv3d(input, weight) + bias + residual): conv2d over three.

    input: [N, C, D, H, W]; weight: [K, C / groups, *kernel]; the rest as conv2d.
    """
    return _conv(3, input, weight, bias, stride, padding, dilation, groups, activation, residual)


def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """activation(conv_transpose1d(input, weight) + bias + residual): conv_transpose2d over one dimension.

    input: [N, C, L]; weight: [C, K / groups, kernel]; the rest as conv_transpose2d.
    """
    options = stride, padding, output_padding, groups, dilation
    return _conv_transpose(1, input, weight, bias, *options, activation, residual)


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """activation(conv_transpose2d(input, weight) + bias + residual), in one pass over memory.

    torch.nn.functional.conv_transpose2d with an epilogue: the gradient of conv2d, with this weight, in its input.

    Args:
        input: [N, C, H, W] or [C, H, W], as conv2d.
        weight: [C, K / groups, kernel height, kernel width].
        bias: [K].
        output_padding: added to the result's size at the far side; smaller than stride or dilation.

    The others as conv2d; padding takes integers only.

    Returns:
        [N, K, H', W'], H' = (H - 1) stride - 2 padding + dilation (kernel height - 1) + output_padding + 1.

    Raises:
        TypeError, ValueError (where torch raises RuntimeError, that too): naming the argument.
    """
    options = stride, padding, output_padding, groups, dilation
    return _conv_transpose(2, input, weight, bias, *options, activation, residual)


def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """activation(conv_transpose3d(input, weight) + bias + residual): conv_transpose2d over three.

    input: [N, C, D, H, W]; weight: [C, K / groups, *kernel]; the rest as conv_transpose2d.
    """
    options = stride, padding, output_padding, groups, dilation
    return _conv_transpose(3, input, weight, bias, *options, activation, residual)
