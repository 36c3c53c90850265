"""softmax(x * scale + mask): validation, autograd, fake kernels."""

import torch
from torch import Tensor

from .. import _library, dispatch
from ..reference.softmax import softmax as reference
from . import _autocast, _autograd
from ._checks import expect, expect_broadcastable, expect_floating, expect_like, expect_tensor


class _Softmax(_autograd.Call):
    """Inputs: x, mask (boolean, or additive in x's dtype)."""

    def __init__(self, operators, dim: int, scale: float):
        self.operators, self.dim, self.scale = operators, dim, scale

    def forward(self, x, mask):
        mask = None if mask is None else mask.expand(x.shape)
        return (self.operators.softmax_forward(x.contiguous(), mask, self.dim, self.scale),)

    def backward(self, inputs, outputs, grads, needs):
        mask = inputs[1]
        if not needs[1]:
            return self.operators.softmax_backward(grads[0].contiguous(), outputs[0], self.dim, self.scale), None
        grad = self.operators.softmax_backward(grads[0].contiguous(), outputs[0], self.dim, 1.0)
        return grad * self.scale if needs[0] else None, grad.sum_to_size(mask.shape)

    def reference(self, x, mask):
        return (reference(x, mask, self.dim, self.scale),)


def softmax(x: Tensor, dim: int, *, scale: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """softmax(x * scale + mask) over dimension `dim`; see fastnets.functional.softmax."""
    expect_tensor(x, "input")
    expect_floating(x, "input")
    expect(x.dim() > 0, "input", "at least one dimension", "a scalar")
    if not -x.dim() <= dim < x.dim():  # IndexError: torch's own choice here
        raise IndexError(f"dim: expected a value in [{-x.dim()}, {x.dim() - 1}], got {dim}")
    x, mask = _autocast.full(x, mask)
    if mask is not None:
        expect_tensor(mask, "mask")
        expect_broadcastable(mask, "mask", x.shape)
        if mask.dtype != torch.bool:
            expect_like(mask, "mask", x, "input")
    case = dispatch.Case("softmax", x.device.type, x.dtype)
    implementation = dispatch.select(case)
    dim %= x.dim()
    if implementation.operators is None:
        return reference(x, mask, dim, scale)
    return _autograd.run(_Softmax(implementation.operators, dim, scale), x, mask)[0]


if _library.missing is None:

    @torch.library.register_fake("fastnets::softmax_forward")
    def _(x, mask, dim, scale):
        return torch.empty_like(x)

    @torch.library.register_fake("fastnets::softmax_backward")
    def _(grad, y, dim, scale):
        return torch.empty_like(y)

    @torch.library.register_fake("fastnets::cpu_capability")
    def _():
        return torch.ops.fastnets.cpu_capability()

    @torch.library.register_fake("fastnets::cpu_is_amd")
    def _():
        return torch.ops.fastnets.cpu_is_amd()

    @torch.library.register_fake("fastnets::cpu_multiply_adds")
    def _(rounds):
        return torch.library.get_ctx().new_dynamic_size()
