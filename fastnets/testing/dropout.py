"""The operator table's dropout cases, from one seed: every backend and dtype keeps the same elements."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import functional
from ..ops.dropout import seeded
from ..reference.dropout import dropout as reference
from . import Case

SEED = torch.tensor([0x243F6A88, 0x85A308D3])


def _masked(x: Tensor, residual: Tensor | None, p: float) -> Tensor:
    """With PyTorch's arithmetic: the factors are of x's dtype, and the product is rounded to it."""
    factors = reference(torch.ones(x.shape, dtype=torch.float64), None, SEED, p).to(x.device, x.dtype)
    return x * factors if residual is None else residual + x * factors


def _drawn(shape: tuple[int, ...], residual: bool, turned: bool):
    def inputs(generator: torch.Generator):
        def draw():
            t = torch.randn(shape, generator=generator, dtype=torch.float64)
            return t.mT if turned else t

        return {"x": draw(), "residual": draw() if residual else None}

    return inputs


def _case(shape: tuple[int, ...], p: float, *, residual: bool = False, turned: bool = False, **more) -> Case:
    """`turned`: the tensors lie as their transposes."""
    name = f"{'x'.join(map(str, shape)) or 'a scalar'}, p = {p:g}{', residual' * residual}{', turned' * turned}"
    return Case(
        op="dropout",
        name=name,
        inputs=_drawn(shape, residual, turned),
        function=lambda x, residual: seeded(x, residual, SEED.to(x.device), p),
        peer=lambda x, residual: _masked(x, residual, p),
        **more,
    )


def _row(shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> Case:
    """For the benchmark, with seeds from torch's generator."""
    return Case(
        op="dropout",
        name=f"{'x'.join(map(str, shape))}, p = 0.1, with a residual",
        inputs=_drawn(shape, True, False),
        function=lambda x, residual: functional.dropout(x, 0.1, residual=residual),
        peer=lambda x, residual: residual + F.dropout(x, 0.1),
        elements=3.0 * math.prod(shape),
        verify=False,
        benchmark=dtypes,
    )


CASES = [
    _case((5, 37), 0.5),
    _case((5, 37), 0.5, residual=True),
    _case((3, 1), 0.2, draws=8),
    _case((), 0.2, residual=True),
    _case((64,), 0.1),
    _case((65,), 0.1, residual=True),
    _case((2, 7, 129), 0.9, residual=True),
    _case((9, 70), 0.3, residual=True, turned=True),
    _case((0, 4), 0.5, residual=True),
    _case((6, 11), 1.0, residual=True),
    _case((6, 11), 0.0, residual=True),
    # Pieces for several threads; a result larger than the caches.
    _case((41, 1001), 0.25, residual=True),
    _case((1200, 1024), 0.25, residual=True, quick=False, suite=False),
    _row((512, 512), (torch.float32,)),
    _row((4096, 512), (torch.float32, torch.bfloat16)),
]
