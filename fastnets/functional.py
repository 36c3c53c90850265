"""fastnets' operators as functions: torch.nn.functional's signatures, plus keyword-only extras of our own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .ops import attention as _attention
from .ops._checks import expect_tensor
from .ops.conv import conv as _conv
from .ops.conv import conv_transpose as _conv_transpose
from .ops.dropout import dropout as _dropout
from .ops.linear import linear as _linear
from .ops.softmax import softmax as _softmax

__all__ = [
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "dropout",
    "linear",
    "scaled_dot_product_attention",
    "softmax",
    "varlen_attention",
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


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """activation(input weight^T + bias + residual), in one pass over memory.

    torch.nn.functional.linear with an epilogue. It is a pointwise convolution, and runs on convolution's kernels where
    these are faster than PyTorch's matrix product (`fastnets.explain` says where), else on PyTorch's.

    Args:
        input: [*, I], any number of leading dimensions, any strides.
        weight: [O, I].
        bias: [O].
        activation: None, 'relu', 'gelu' (the exact one), 'silu', 'sigmoid' or 'tanh'.
        residual: of the result's shape, added before the activation.

    Returns:
        [*, O].

    Raises:
        TypeError, ValueError (where torch raises RuntimeError, that too): naming the argument.
    """
    return _linear(input, weight, bias, activation, residual)


def dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    residual: Tensor | None = None,
) -> Tensor:
    """input times (0 with probability p, else 1 / (1 - p)), plus residual, in one pass over memory.

    torch.nn.functional.dropout (Srivastava et al., JMLR 2014) with the sum of a residual connection. Our CPU kernel
    draws the random numbers in vectors by Philox (Salmon et al., SC 2011), from a seed that torch's generator gives:
    torch.manual_seed makes them reproducible, on any number of threads and any processor, but they are not those that
    PyTorch draws from the same seed. Backward draws them again, so neither input nor a mask is kept.

    PyTorch's dropout runs on other devices and of few elements (`fastnets.explain` says where), with inplace=True, and
    under a forced backend that has no dropout: those of GPUs.

    As in PyTorch every element is multiplied: an infinite or NaN one that is dropped gives NaN. p = 0 gives input
    itself where there is no residual.

    Args:
        input: of any shape and strides; float32, float64, bfloat16 or float16 (others as PyTorch takes them).
        p: the probability of a zero, in [0, 1].
        training: False for input + residual.
        inplace: input becomes its dropout; the sum with residual is another tensor.
        residual: of input's shape and dtype; under torch.autocast of any dtype, as a sum takes it.

    Returns:
        A tensor of input's shape and dtype.

    Raises:
        TypeError, ValueError (where torch raises RuntimeError, that too): naming the argument.
    """
    return _dropout(input, p, training, inplace, residual)


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


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window_size: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(query key^T * scale + mask) value in memory linear in the lengths; torch's function with extras.

    Args:
        query: [..., Hq, Lq, D]; float32, float64, bfloat16 or float16. Leading dimensions broadcast, as in torch; two
            dimensions are enough.
        key: [..., Hkv, Lk, D].
        value: [..., Hkv, Lk, Dv].
        attn_mask: broadcastable to [..., Hq, Lq, Lk]; boolean (True takes part) or additive, with gradient; or
            torch.nn.attention.bias.causal_upper_left / causal_lower_right. Not with is_causal.
        dropout_p: probability that a weight is zeroed; always applied, as in torch.
        is_causal: query i sees the keys up to i (aligned at the first query and key, as in torch).
        scale: of query key^T; None means 1 / sqrt(D).
        enable_gqa: Hkv may divide Hq; neighbouring query heads then share a head of key and value.
        window_size: (left, right): query i sees the keys from i - left to i + right, of its own position counted as
            is_causal does (with causal_lower_right: as that does); None is unlimited on that side.
        softcap: scores become softcap * tanh(score / softcap), before mask and bias; 0 means none.
        alibi_slopes: [Hq] or [B, Hq]: adds -slope * |i - j|, positions counted as by window_size. No gradient.
        return_lse: also return the rows' log-sum-exp.

    Returns:
        [..., Hq, Lq, Dv], and lse [..., Hq, Lq] with `return_lse`: natural logarithm, with gradient, float64 for
        float64 inputs and float32 for all others. A row that sees no key gives 0, an lse of -inf and zero gradient.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    return _attention.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale,
        enable_gqa,
        window_size,
        softcap,
        alibi_slopes,
        return_lse,
    )


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention within each of N sequences of different lengths, packed one after the other without padding.

    Args:
        query: [total_q, Hq, D].
        key: [total_k, Hkv, D]; Hkv divides Hq.
        value: [total_k, Hkv, Dv].
        cu_seqlens_q, cu_seqlens_k: int32 or int64 [N + 1], ascending from 0 to the total: where each sequence begins.
        is_causal, window_size, alibi_slopes: as in `scaled_dot_product_attention`, but in every sequence its last query
            faces its last key, as in FlashAttention's; slopes are [Hq] or [N, Hq].

    Returns:
        [total_q, Hq, Dv], and lse [Hq, total_q] with `return_lse`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    return _attention.varlen_attention(
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        dropout_p,
        is_causal,
        scale,
        window_size,
        softcap,
        alibi_slopes,
        return_lse,
    )
