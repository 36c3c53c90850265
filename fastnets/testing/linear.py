"""The operator table's linear layers."""

import math

import torch

from .. import functional
from ..reference.linear import linear as reference
from . import Case


def _case(
    name: str,
    rows: tuple[int, ...],
    features: tuple[int, int],
    *,
    bias: bool = True,
    residual: bool = False,
    activation: str | None = None,
    turned: bool = False,
    **more,
) -> Case:
    """x[*rows, I] through weight[O, I], `features` being (I, O); `turned`: the weight lies as its transpose."""
    inner, outer = features

    def inputs(generator: torch.Generator):
        def draw(*size: int):
            return torch.randn(size, generator=generator, dtype=torch.float64)

        weight = draw(inner, outer).t() if turned else draw(outer, inner)
        return {
            "x": draw(*rows, inner),
            "weight": weight / math.sqrt(max(inner, 1)),
            "bias": draw(outer) if bias else None,
            "residual": draw(*rows, outer) if residual else None,
        }

    def function(x, weight, bias, residual):
        return functional.linear(x, weight, bias, activation=activation, residual=residual)

    count = math.prod(rows)
    return Case(
        op="linear",
        name=name,
        inputs=inputs,
        function=function,
        peer=lambda x, weight, bias, residual: reference(x, weight, bias, residual, activation),
        flops=2.0 * count * inner * outer,
        elements=float(count * (inner + outer) + inner * outer),
        **more,
    )


def _row(rows: tuple[int, ...], features: tuple[int, int]) -> Case:
    name = f"{'x'.join(map(str, rows))} rows, {features[0]} -> {features[1]}"
    return _case(name, rows, features, verify=False, benchmark=(torch.float32,))


CASES = [
    _case("2x3x17 rows, 20 -> 33", (2, 3, 17), (20, 33)),
    _case("130 rows, 70 -> 9, without bias", (130,), (70, 9), bias=False),
    _case("1 row, 40 -> 35", (1,), (40, 35)),
    _case("a vector, 24 -> 40", (), (24, 40)),
    _case("31 rows, 1 -> 1", (31,), (1, 1), draws=8),
    _case("0 rows, 8 -> 4", (0,), (8, 4)),
    _case("5 rows, 0 -> 3", (5,), (0, 3)),
    _case("5 rows, 3 -> 0", (5,), (3, 0)),
    _case("41 rows, 36 -> 50, turned", (41,), (36, 50), turned=True),
    _case("37 rows, 20 -> 45, gelu, residual", (37,), (20, 45), activation="gelu", residual=True),
    _case("2x19 rows, 33 -> 18, relu", (2, 19), (33, 18), activation="relu"),
    # Weights that outgrow a second-level cache.
    _case("53 rows, 530 -> 530", (53,), (530, 530), quick=False),
    _case("26 rows, 1100 -> 270, silu, residual", (26,), (1100, 270), activation="silu", residual=True, quick=False),
    _case("30 rows, 600 -> 512, turned, without bias", (30,), (600, 512), turned=True, bias=False, quick=False),
    _row((2048,), (384, 384)),
    _row((2048,), (384, 1536)),
    _row((2048,), (1536, 384)),
    _row((512,), (768, 3072)),
    _row((64,), (4096, 128)),
]
