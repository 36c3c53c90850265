"""Convolution and transposed convolution with a fused epilogue, in plain PyTorch."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

_CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_CONV_TRANSPOSE = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda x: x,
    "relu": torch.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
"""The epilogue's activations by name, in the order of csrc/cpu/kernels.h's enum Activation. gelu is the exact one."""


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int] | str,
    dilation: Sequence[int],
    groups: int,
    activation: str | None,
) -> Tensor:
    """activation(conv(x, weight) + bias + residual): x[N, C, *size], weight[K, C / groups, *kernel], bias[K]."""
    y = _CONV[weight.dim() - 2](x, weight, bias, tuple(stride), _plain(padding), tuple(dilation), groups)
    return ACTIVATIONS[activation](y if residual is None else y + residual)


def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
    dilation: Sequence[int],
    activation: str | None,
) -> Tensor:
    """activation(conv_transpose(x, weight) + bias + residual): x[N, C, *size], weight[C, K / groups, *kernel], bias[K].

    The transposed convolution is the gradient of the convolution with this weight in its input.
    """
    operator = _CONV_TRANSPOSE[weight.dim() - 2]
    y = operator(x, weight, bias, tuple(stride), tuple(padding), tuple(output_padding), groups, tuple(dilation))
    return ACTIVATIONS[activation](y if residual is None else y + residual)


def _plain(padding: Sequence[int] | str) -> tuple[int, ...] | str:
    return padding if isinstance(padding, str) else tuple(padding)
