"""Dropout with the residual sum: validation, autograd, fake kernel."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _library, dispatch
from ..reference.dropout import dropout as reference
from ..reference.philox import draw_seed
from . import _autograd
from ._checks import DtypeError, ShapeError, expect_tensor
from ._choice import elements, is_plain


class _Dropout(_autograd.Call):
    """Inputs: x, residual, and without a gradient seed. Of these backward needs the seed alone."""

    saves_outputs = False

    def __init__(self, operators, p: float):
        self.operators, self.p = operators, p

    def saved(self, inputs):
        return None, None, inputs[2]

    def forward(self, x, residual, seed):
        residual = None if residual is None else residual.contiguous()
        return (self.operators.dropout(x.contiguous(), residual, seed, self.p),)

    def backward(self, inputs, outputs, grads, needs):
        grad = self.operators.dropout(grads[0].contiguous(), None, inputs[2], self.p) if needs[0] else None
        return grad, grads[0] if needs[1] else None, None

    def reference(self, x, residual, seed):
        return (reference(x, residual, seed, self.p),)

    def differentiable_backward(self, inputs, outputs, grads, needs):
        grad = _autograd.run(self, grads[0], None, inputs[2])[0] if needs[0] else None
        return grad, grads[0] if needs[1] else None, None


def dropout(x: Tensor, p: float, training: bool, inplace: bool, residual: Tensor | None) -> Tensor:
    """See fastnets.functional.dropout."""
    _expect(x, p, residual)
    if not training or inplace or p == 0 or dispatch.leaves_dropout_to_torch(x, elements(x)):
        return _torch(x, p, training, inplace, residual)
    if residual is not None and residual.dtype != x.dtype:  # by autocast, which knows no dropout
        return residual + dropout(x, p, training, inplace, None)
    implementation = dispatch.select(_case(x, residual))
    if implementation.operators is None and not dispatch.is_forced():
        return _torch(x, p, training, inplace, residual)
    return _run(implementation, x, residual, draw_seed(x.device), p)


def seeded(x: Tensor, residual: Tensor | None, seed: Tensor, p: float) -> Tensor:
    """What the family's operators do with a seed, PyTorch's own dropout left aside."""
    return _run(dispatch.select(_case(x, residual)), x, residual, seed, p)


def _run(implementation, x: Tensor, residual: Tensor | None, seed: Tensor, p: float) -> Tensor:
    if implementation.operators is None:
        return reference(x, residual, seed, p)
    return _autograd.run(_Dropout(implementation.operators, p), x, residual, seed)[0]


def _torch(x: Tensor, p: float, training: bool, inplace: bool, residual: Tensor | None) -> Tensor:
    y = F.dropout(x, p, training, inplace)
    return y if residual is None else residual + y


def _case(x: Tensor, residual: Tensor | None) -> dispatch.Case:
    options = []
    if not (is_plain(x) and (residual is None or is_plain(residual))):
        options.append("special")
    if not torch.compiler.is_compiling() and _autograd.transforming():
        options.append("transformed")
    return dispatch.Case("dropout", x.device.type, x.dtype, frozenset(options), {"elements": elements(x)})


def _expect(x: Tensor, p: float, residual: Tensor | None) -> None:
    # In parentheses the words of PyTorch's own complaint, for those who look for them.
    expect_tensor(x, "input")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p: expected a number in [0, 1], got {p} (dropout probability has to be between 0 and 1)")
    if residual is None:
        return
    expect_tensor(residual, "residual")
    if residual.shape != x.shape:
        raise ShapeError(f"residual: expected input's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    if residual.device != x.device:
        raise ShapeError(f"residual: expected device {x.device} like input, got {residual.device}")
    if residual.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise DtypeError(f"residual: expected {x.dtype} like input, got {residual.dtype}")


if _library.missing is None:

    @torch.library.register_fake("fastnets::dropout")
    def _(x, residual, seed, p):
        return torch.empty_like(x, memory_format=torch.contiguous_format)
