"""Linear layers with a fused epilogue: pointwise convolutions of one image whose pixels are the rows."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import dispatch
from ..reference.linear import linear as reference
from . import _autocast, _autograd
from ._checks import DtypeError, ShapeError, expect_tensor
from ._choice import elements, is_plain
from ._precision import matmul_allows_bf16, matmul_allows_tf32
from .conv import ACTIVATIONS, FROM_INPUT, expect_activation


class _Linear(_autograd.Call):
    """Inputs: x [*, I], weight [O, I], bias, residual [*, O]."""

    def __init__(self, operators, tf32: bool, activation: str | None, keep: bool):
        self.operators, self.activation = operators, activation
        self.options = (1,), (0,), (1,), 1, True, tf32
        self.keep = keep
        self.saves_outputs = activation is not None

    def forward(self, x, weight, bias, residual):
        pixels = None if residual is None else _pixels(residual)
        x, of, shape = _pixels(x), weight.unsqueeze(-1), (*x.shape[:-1], weight.shape[0])
        epilogue = ACTIVATIONS.index(self.activation), self.keep
        y, kept = self.operators.conv_forward(x, of, bias, pixels, x.shape[2:], *self.options, *epilogue)
        return (_rows(y, shape), _rows(kept, shape)) if self.keep else (_rows(y, shape),)

    def backward(self, inputs, outputs, grads, needs):
        x, weight = inputs[:2]
        grad = grads[0].contiguous()
        if self.activation is not None:
            grad = self.operators.conv_grad_epilogue(grad, outputs[-1], ACTIVATIONS.index(self.activation))
        pixels, of = _pixels(grad), weight.unsqueeze(-1)
        grad_x = grad_weight = grad_bias = None
        if needs[0]:
            found = self.operators.conv_grad_input(pixels, of, None, None, pixels.shape[2:], *self.options, 0, False)
            grad_x = _rows(found[0], x.shape)
        if needs[1]:
            found = self.operators.conv_grad_weight(pixels, _pixels(x), of, *self.options, needs[2])
            grad_weight, grad_bias = found[0].squeeze(-1), found[1] if needs[2] else None
        elif needs[2]:
            grad_bias = grad.sum(tuple(range(grad.dim() - 1))) if grad.dim() > 1 else grad
        return grad_x, grad_weight, grad_bias, grad if needs[3] else None

    def reference(self, x, weight, bias, residual):
        return (reference(x, weight, bias, residual, self.activation),)


def _pixels(t: Tensor) -> Tensor:
    """Rows [*, C] as an image [1, C, rows], its channels innermost."""
    return t.contiguous().view(1, t.shape[:-1].numel(), t.shape[-1]).transpose(1, 2)


def _rows(pixels: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The way back."""
    return pixels.transpose(1, 2).view(shape)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None, residual: Tensor | None = None
) -> Tensor:
    """activation(x weight^T + bias + residual); see fastnets.functional.linear."""
    try:
        if activation is None and residual is None and dispatch.leaves_linear_to_torch(x, elements(x) * weight.size(0)):
            return F.linear(x, weight, bias)
    except (AttributeError, IndexError, RuntimeError, TypeError):
        _expect(x, weight, bias, residual, activation)  # what is wrong, in our words
        raise
    _expect(x, weight, bias, residual, activation)
    if weight.numel() == 0 or weight.dim() == 1:  # of which convolution has none
        return reference(x, weight, bias, residual, activation)
    x, weight, bias, residual = _autocast.lower(x, weight, bias, residual)
    implementation = dispatch.select(_case(x, weight, residual))
    if implementation.operators is None:
        return reference(x, weight, bias, residual, activation)
    keep = activation in FROM_INPUT and torch.is_grad_enabled()
    tf32 = x.dtype == torch.float32 and matmul_allows_tf32()
    return _autograd.run(_Linear(implementation.operators, tf32, activation, keep), x, weight, bias, residual)[0]


def _case(x: Tensor, weight: Tensor, residual: Tensor | None) -> dispatch.Case:
    products = weight.numel()  # of a row
    rows = elements(x) // weight.shape[1]
    options = []
    if not (is_plain(x) and is_plain(weight) and (residual is None or is_plain(residual))):
        options.append("special")
    if max(rows, products) >= 1 << 29:
        options.append("large")
    if x.dtype == torch.float32 and matmul_allows_bf16():
        options.append("bf16")
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        options.append("gradients")
    sizes = {"rows": rows, "products": rows * products}
    return dispatch.Case("linear", x.device.type, x.dtype, frozenset(options), sizes)


def _expect(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None) -> None:
    # In parentheses the words of PyTorch's own complaint, for those who look for them.
    expect_tensor(x, "input")
    expect_tensor(weight, "weight")
    if weight.dim() not in (1, 2):
        raise ShapeError(f"weight: expected 2 dimensions, got {weight.dim()}")
    if x.dim() == 0 or x.shape[-1] != weight.shape[-1]:
        got = tuple(x.shape)
        raise ShapeError(
            f"input: expected {weight.shape[-1]} features in the last dimension, got shape {got} "
            f"(mat1 and mat2 shapes cannot be multiplied)"
        )
    for tensor, name in ((weight, "weight"), (bias, "bias"), (residual, "residual")):
        if tensor is None:
            continue
        expect_tensor(tensor, name)
        if tensor.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise DtypeError(f"{name}: expected {x.dtype} like input, got {tensor.dtype} (must have the same dtype)")
        if tensor.device != x.device:
            raise ShapeError(
                f"{name}: expected device {x.device} like input, got {tensor.device} "
                "(expected all tensors to be on the same device)"
            )
    outputs = tuple(weight.shape[:-1])
    if bias is not None and tuple(bias.shape) != outputs:
        raise ShapeError(f"bias: expected shape {outputs}, got {tuple(bias.shape)}")
    if residual is not None and residual.shape != (*x.shape[:-1], *outputs):
        shape = (*x.shape[:-1], *outputs)
        raise ShapeError(f"residual: expected the result's shape {tuple(shape)}, got {tuple(residual.shape)}")
    expect_activation(activation)
