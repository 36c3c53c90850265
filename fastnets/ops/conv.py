"""Convolution and transposed convolution with a fused epilogue: validation, autograd, fake kernels."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _library, dispatch
from ..reference import conv as reference
from . import _autocast, _autograd
from ._checks import DtypeError, ShapeError, expect_tensor
from ._plan import Metadata, planned
from ._precision import convolutions_allow_tf32

ACTIVATIONS = tuple(reference.ACTIVATIONS)
FROM_INPUT = ("gelu", "silu")  # their derivative needs the activation's input; the others' its output


class _Conv(_autograd.Call):
    """Inputs: x, weight, bias, residual. `size`: the result's spatial size; `padding`: before the first element."""

    def __init__(self, operators, transposed, channels_last, tf32, size, stride, padding, dilation, groups, activation):
        self.operators, self.transposed, self.channels_last, self.tf32 = operators, transposed, channels_last, tf32
        self.size, self.stride, self.padding, self.dilation, self.groups = size, stride, padding, dilation, groups
        self.activation = activation
        self.saves_outputs = activation is not None

    @property
    def options(self) -> tuple:
        return self.stride, self.padding, self.dilation, self.groups, self.channels_last, self.tf32

    def forward(self, x, weight, bias, residual):
        operator = self.operators.conv_grad_input if self.transposed else self.operators.conv_forward
        epilogue = ACTIVATIONS.index(self.activation), self.keep
        y, kept = operator(x, weight, bias, residual, self.size, *self.options, *epilogue)
        return (y, kept) if self.keep else (y,)

    keep = False
    """Whether forward also returns the activation's input, for backward."""

    def backward(self, inputs, outputs, grads, needs):
        x, weight = inputs[:2]
        grad = _formatted(grads[0], self.channels_last)
        if self.activation is not None:
            grad = self.operators.conv_grad_epilogue(grad, outputs[-1], ACTIVATIONS.index(self.activation))
        grad_x = grad_weight = grad_bias = None
        if needs[0]:
            operator = self.operators.conv_forward if self.transposed else self.operators.conv_grad_input
            grad_x = operator(grad, weight, None, None, x.shape[2:], *self.options, 0, False)[0]
        together = needs[1] and needs[2] and not self.transposed
        if needs[1]:
            ends = (x, grad) if self.transposed else (grad, x)
            grad_weight, summed = self.operators.conv_grad_weight(*ends, weight, *self.options, together)
        if needs[2]:
            grad_bias = summed if together else grad.sum((0, *range(2, grad.dim())))
        return grad_x, grad_weight, grad_bias, grad if needs[3] else None

    def reference(self, x, weight, bias, residual):
        if self.transposed:
            past = [
                size - _transposed_size(*of)
                for size, *of in zip(
                    self.size, x.shape[2:], weight.shape[2:], self.stride, self.padding, self.dilation, strict=True
                )
            ]
            options = self.stride, self.padding, past, self.groups, self.dilation
            return (reference.conv_transpose(x, weight, bias, residual, *options, self.activation),)
        symmetric = self.padding if self.size == _sizes(x, weight, self.stride, self.padding, self.dilation) else "same"
        options = self.stride, symmetric, self.dilation, self.groups
        return (reference.conv(x, weight, bias, residual, *options, self.activation),)


def conv(
    dims: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
    activation: str | None,
    residual: Tensor | None,
) -> Tensor:
    """activation(conv(x, weight) + bias + residual) over `dims` spatial dimensions; see fastnets.functional.conv2d."""
    stride, dilation = _spatial(dims, stride, "stride"), _spatial(dims, dilation, "dilation")
    given = padding if isinstance(padding, str) else _spatial(dims, padding, "padding")
    _expect_groups(groups)
    _expect_tensors(x, weight, bias, residual)
    x, weight, bias, residual = _autocast.lower(x, weight, bias, residual)
    of = Metadata.of(x), Metadata.of(weight), Metadata.of(bias), Metadata.of(residual)
    case, size, before = _plan(dims, *of, stride, given, dilation, groups, activation)
    implementation = dispatch.select(case)
    if implementation.operators is None:
        return reference.conv(x, weight, bias, residual, stride, given, dilation, groups, activation)
    return _run(
        implementation, dims, x, weight, bias, residual, False, size, stride, before, dilation, groups, activation
    )


@planned
def _plan(dims, x, weight, bias, residual, stride, padding, dilation, groups, activation):
    """The case, the result's spatial size and the padding before the first element; `x` to `residual`: Metadata."""
    same = _expect_padding_name(padding, stride)
    _expect_options(stride, (0,) if isinstance(padding, str) else padding, dilation, groups)
    _expect_dimensions(dims, x, weight)
    _expect_alike(x, weight=weight, bias=bias, residual=residual)
    _expect_channels(x.shape[-dims - 1], weight.shape[1] * groups, weight.shape[0], bias, groups)
    spans = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    before = tuple(span // 2 for span in spans) if same else (0,) * dims if padding == "valid" else padding
    size = tuple(x.shape[-dims:]) if same else _sizes(x, weight, stride, before, dilation)
    if any(n < 1 for n in size):
        raise ShapeError(
            f"weight: expected a kernel no larger than the padded input, got kernel {tuple(weight.shape[2:])} with "
            f"dilation {dilation} for input {tuple(x.shape[-dims:])} with padding {padding}"
        )
    expect_activation(activation)
    _expect_result(x, residual, (*x.shape[: -dims - 1], weight.shape[0], *size))
    large = _is_large(x, weight, size, x.shape[-dims:], stride, before, dilation)
    return _case(x, dims, groups, large, transposed=False), size, before


def conv_transpose(
    dims: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    output_padding: int | Sequence[int],
    groups: int,
    dilation: int | Sequence[int],
    activation: str | None,
    residual: Tensor | None,
) -> Tensor:
    """activation(conv_transpose(x, weight) + bias + residual); see fastnets.functional.conv_transpose2d."""
    stride, dilation = _spatial(dims, stride, "stride"), _spatial(dims, dilation, "dilation")
    padding, past = _spatial(dims, padding, "padding"), _spatial(dims, output_padding, "output_padding")
    _expect_groups(groups)
    _expect_tensors(x, weight, bias, residual)
    x, weight, bias, residual = _autocast.lower(x, weight, bias, residual)
    of = Metadata.of(x), Metadata.of(weight), Metadata.of(bias), Metadata.of(residual)
    case, size = _plan_transposed(dims, *of, stride, padding, past, groups, dilation, activation)
    implementation = dispatch.select(case)
    if implementation.operators is None:
        options = stride, padding, past, groups, dilation
        return reference.conv_transpose(x, weight, bias, residual, *options, activation)
    return _run(
        implementation, dims, x, weight, bias, residual, True, size, stride, padding, dilation, groups, activation
    )


@planned
def _plan_transposed(dims, x, weight, bias, residual, stride, padding, past, groups, dilation, activation):
    """The case and the result's spatial size."""
    _expect_options(stride, padding, dilation, groups)
    if any(n < 0 for n in past) or any(n >= max(s, d) for n, s, d in zip(past, stride, dilation, strict=True)):
        raise ShapeError(
            f"output_padding: expected non-negative values smaller than stride {stride} or dilation {dilation}, got "
            f"{past} (output padding must be smaller than either stride or dilation)"
        )
    _expect_dimensions(dims, x, weight)
    _expect_alike(x, weight=weight, bias=bias, residual=residual)
    _expect_channels(x.shape[-dims - 1], weight.shape[0], weight.shape[1] * groups, bias, groups)
    size = tuple(
        _transposed_size(n, k, s, p, d) + o
        for n, k, s, p, d, o in zip(x.shape[-dims:], weight.shape[2:], stride, padding, dilation, past, strict=True)
    )
    if any(n < 0 for n in size):
        raise ShapeError(f"padding: expected one that leaves an output, got {padding}, which leaves size {size}")
    expect_activation(activation)
    _expect_result(x, residual, (*x.shape[: -dims - 1], weight.shape[1] * groups, *size))
    large = _is_large(x, weight, x.shape[-dims:], size, stride, padding, dilation)
    return _case(x, dims, groups, large, transposed=True), size


def _case(x: Metadata, dims: int, groups: int, large: bool, transposed: bool) -> dispatch.Case:
    options = frozenset(name for name, used in (("transposed", transposed), ("large", large)) if used)
    return dispatch.Case("conv", x.device.type, x.dtype, options, {"dims": dims, "groups": groups})


def _is_large(x: Metadata, weight: Metadata, results, positions, stride, padding, dilation) -> bool:
    """Whether 32 bits cannot count it: 2^29 positions along a dimension, where padding and taps reach included, or
    2^31 in an image, images or elements of the weight. `results`: the spatial size of the end that the stride is of."""
    along = zip(positions, results, weight.shape[2:], stride, padding, dilation, strict=True)
    return any(
        n + p + d * (k - 1) >= 1 << 29 or r * s + p + d * (k - 1) >= 1 << 29 for n, r, k, s, p, d in along
    ) or any(n >= 1 << 31 for n in (math.prod(positions), math.prod(results), x.shape[0], math.prod(weight.shape)))


def _run(implementation, dims, x, weight, bias, residual, transposed, *options) -> Tensor:
    unbatched = x.dim() == dims + 1
    if unbatched:
        x, residual = x.unsqueeze(0), None if residual is None else residual.unsqueeze(0)
    channels_last = _is_channels_last(x) or _is_channels_last(weight)
    tf32 = x.dtype == torch.float32 and convolutions_allow_tf32()
    call = _Conv(implementation.operators, transposed, channels_last, tf32, *options)
    call.keep = call.activation in FROM_INPUT and torch.is_grad_enabled()
    residual = None if residual is None else _formatted(residual, channels_last)
    y = _autograd.run(call, _formatted(x, channels_last), weight, bias, residual)[0]
    return y.squeeze(0) if unbatched else y


def _transposed_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """The result's size in one dimension, without output_padding."""
    return (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1


def _sizes(x: Tensor, weight: Tensor, stride, padding, dilation) -> tuple[int, ...]:
    """The result's spatial size with the same padding on both sides."""
    kernel = weight.shape[2:]
    return tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(x.shape[-len(kernel) :], kernel, stride, padding, dilation, strict=True)
    )


# ---- memory format -------------------------------------------------------------------------------------------------


def _is_channels_last(t: Tensor) -> bool:
    """Whether the channels lie innermost; False where that cannot be told from the other order."""
    return not t.is_contiguous() and t.movedim(1, -1).is_contiguous()


def _formatted(t: Tensor, channels_last: bool) -> Tensor:
    """The tensor with its channels innermost, or contiguous: itself where it is so already."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else t.contiguous()


def _new(like: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    if not channels_last:
        return like.new_empty(shape)
    return like.new_empty((shape[0], *shape[2:], shape[1])).movedim(-1, 1)


# ---- validation ----------------------------------------------------------------------------------------------------
# In parentheses the words of PyTorch's own complaint, for those who look for them.


def _spatial(dims: int, value: Any, name: str) -> tuple[int, ...]:
    """One integer, or one for each spatial dimension, as a tuple."""
    if type(value) is int:
        return (value,) * dims
    if type(value) is tuple and len(value) == dims and all(type(n) is int for n in value):
        return value
    values = (value,) if isinstance(value, (int, torch.SymInt)) else value
    if not isinstance(values, Sequence) or not all(isinstance(n, (int, torch.SymInt)) for n in values):
        raise TypeError(f"{name}: expected an integer or {dims} of them, got {value!r}")
    if len(values) not in (1, dims):
        raise ShapeError(f"{name}: expected an integer or {dims} of them, got {tuple(values)}")
    return tuple(values) * dims if len(values) == 1 else tuple(values)


def _expect_padding_name(padding: Any, stride: Sequence[int]) -> bool:
    """Whether the padding is 'same'."""
    if not isinstance(padding, str):
        return False
    if padding not in ("same", "valid"):
        raise ShapeError(f"padding: expected integers, 'same' or 'valid', got {padding!r}")
    if padding == "same" and any(s != 1 for s in stride):
        raise ShapeError(
            f"padding: expected integers with stride {tuple(stride)}, got 'same' "
            "(padding='same' is not supported for strided convolutions)"
        )
    return padding == "same"


def _expect_groups(groups: Any) -> None:
    if not isinstance(groups, (int, torch.SymInt)):
        raise TypeError(f"groups: expected an integer, got {groups!r}")


def _expect_options(stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> None:
    for name, values, least, words in (
        ("stride", stride, 1, "non-positive stride is not supported"),
        ("padding", padding, 0, "negative padding is not supported"),
        ("dilation", dilation, 1, "dilation should be greater than zero"),
        ("groups", (groups,), 1, "non-positive groups is not supported"),
    ):
        if any(n < least for n in values):
            raise ShapeError(f"{name}: expected values of at least {least}, got {tuple(values)} ({words})")
        if any(n >= 1 << 60 for n in values):
            raise ShapeError(f"{name}: expected values below 2^60, got {tuple(values)}")


def _expect_tensors(x: Any, weight: Any, bias: Any, residual: Any) -> None:
    expect_tensor(x, "input")
    expect_tensor(weight, "weight")
    if bias is not None:
        expect_tensor(bias, "bias")
    if residual is not None:
        expect_tensor(residual, "residual")


def _expect_dimensions(dims: int, x: Metadata, weight: Metadata) -> None:
    if weight.dim() < 3:
        raise ShapeError(
            f"weight: expected {dims + 2} dimensions, got {weight.dim()} (weight should have at least three dimensions)"
        )
    if weight.dim() != dims + 2:
        n = weight.dim()
        raise ShapeError(
            f"weight: expected {dims + 2} dimensions, got {n} "
            f"(Expected {n}-dimensional input for {n}-dimensional weight)"
        )
    if x.dim() not in (dims + 1, dims + 2):
        raise ShapeError(
            f"input: expected {dims + 2} dimensions, or {dims + 1} without a batch, got {x.dim()} "
            f"(Expected {dims + 1}D (unbatched) or {dims + 2}D (batched) input to conv{dims}d)"
        )


def _expect_alike(x: Metadata, **others: Metadata | None) -> None:
    """Every tensor has the input's dtype and device."""
    for name, t in others.items():
        if t is None:
            continue
        if t.dtype != x.dtype:
            raise DtypeError(
                f"{name}: expected {x.dtype} like input, got {t.dtype} (Input type and {name} type should be the same)"
            )
        if t.device != x.device:
            raise ShapeError(
                f"{name}: expected device {x.device} like input, got {t.device} (they should be on the same device)"
            )


def _expect_channels(given: int, taken: int, out: int, bias: Metadata | None, groups: int) -> None:
    """`given`: the input's channels; `taken`: those that the weight takes; `out`: the result's."""
    for name, channels in (("weight", taken), ("weight", out)):
        if channels < groups:
            raise ShapeError(
                f"{name}: expected at least {groups} channels for {groups} groups, got {channels} "
                f"(expected weight to be at least {groups} at dimension 0)"
            )
        if channels % groups:
            raise ShapeError(
                f"groups: expected a divisor of weight's {channels} channels, got {groups} "
                f"(expected weight to be divisible by {groups} at dimension 0)"
            )
    if given != taken:
        raise ShapeError(f"input: expected to have {taken} channels, but got {given} channels instead")
    if bias is not None and tuple(bias.shape) != (out,):
        raise ShapeError(
            f"bias: expected shape ({out},), got {tuple(bias.shape)} "
            f"(expected bias to be 1-dimensional with {out} elements)"
        )


def expect_activation(activation: str | None) -> None:
    if activation not in ACTIVATIONS:
        names = ", ".join(repr(name) for name in ACTIVATIONS)
        raise ValueError(f"activation: expected one of {names}, got {activation!r}")


def _expect_result(x: Metadata, residual: Metadata | None, shape: tuple[int, ...]) -> None:
    if math.prod(shape) * x.dtype.itemsize >= 1 << 63:
        raise ShapeError(f"padding: expected a result of fewer than 2^63 bytes, got shape {shape}")
    if residual is not None and tuple(residual.shape) != shape:
        raise ShapeError(f"residual: expected the result's shape {shape}, got {tuple(residual.shape)}")


# ---- fake kernels --------------------------------------------------------------------------------------------------

if _library.missing is None:

    @torch.library.register_fake("fastnets::conv_forward")
    def _(x, weight, bias, residual, size, stride, padding, dilation, groups, channels_last, tf32, activation, keep):
        y = _new(x, (x.shape[0], weight.shape[0], *size), channels_last)
        return y, torch.empty_like(y) if keep else x.new_empty((0,))

    @torch.library.register_fake("fastnets::conv_grad_input")
    def _(grad, weight, bias, residual, size, stride, padding, dilation, groups, channels_last, tf32, activation, keep):
        y = _new(grad, (grad.shape[0], weight.shape[1] * groups, *size), channels_last)
        return y, torch.empty_like(y) if keep else grad.new_empty((0,))

    @torch.library.register_fake("fastnets::conv_grad_weight")
    def _(grad, x, weight, stride, padding, dilation, groups, channels_last, tf32, bias):
        return torch.empty_like(weight), grad.new_empty((weight.shape[0] if bias else 0,))

    @torch.library.register_fake("fastnets::conv_grad_epilogue")
    def _(grad, saved, activation):
        return torch.empty_like(grad)
