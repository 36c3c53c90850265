"""The operator table's convolutions."""

import math
from collections.abc import Sequence

import torch

from .. import functional
from ..reference.conv import ACTIVATIONS
from . import Case


def conv_case(
    name: str,
    x: Sequence[int],
    weight: Sequence[int],
    *,
    transposed: bool = False,
    bias: bool = True,
    residual: bool = False,
    activation: str | None = None,
    channels_last: bool = False,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    output_padding=0,
    **more,
) -> Case:
    """A convolution of x[N, C, *size] with weight[K, C / groups, *kernel] (transposed: [C, K / groups, *kernel])."""
    dims = len(weight) - 2
    prefix = "conv_transpose" if transposed else "conv"
    ours, theirs = (getattr(module, f"{prefix}{dims}d") for module in (functional, torch.nn.functional))
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    if transposed:
        options["output_padding"] = output_padding
    channels = weight[1] * groups if transposed else weight[0]
    if padding == "same":
        shape = (x[0], channels, *x[2:])
    else:
        shape = theirs(torch.empty(x, device="meta"), torch.empty(weight, device="meta"), **options).shape
    fan_in = math.prod(weight[1:])

    def inputs(generator: torch.Generator):
        def draw(*size: int):
            t = torch.randn(size, generator=generator, dtype=torch.float64)
            innermost = channels_last and len(size) > 1
            return t.movedim(1, -1).contiguous().movedim(-1, 1) if innermost else t

        return {
            "x": draw(*x),
            "weight": draw(*weight) / math.sqrt(fan_in),
            "bias": draw(channels) if bias else None,
            "residual": draw(*shape) if residual else None,
        }

    def function(x, weight, bias, residual):
        return ours(x, weight, bias, **options, activation=activation, residual=residual)

    def peer(x, weight, bias, residual):
        y = theirs(x, weight, bias, **options)
        return ACTIVATIONS[activation](y if residual is None else y + residual)

    # A pixel of the smaller channels' side meets every tap of its group once.
    products = math.prod(x if transposed else shape) * fan_in
    return Case(
        op="conv",
        name=name + (", channels last" if channels_last else ""),
        inputs=inputs,
        function=function,
        peer=peer,
        flops=2.0 * products,
        elements=float(math.prod(x) + math.prod(weight) + math.prod(shape)),
        **more,
    )


def _both(name: str, *args, **more) -> list[Case]:
    """In either memory format."""
    return [conv_case(name, *args, **more), conv_case(name, *args, **more, channels_last=True)]


def _row(x: Sequence[int], weight: Sequence[int], **more) -> list[Case]:
    """A row of the benchmark, named as in its literature: input -> output channels, kernel, stride."""
    name = f"{'x'.join(map(str, x))} -> {weight[0]}, {'x'.join(map(str, weight[2:]))}"
    name += ", depthwise" if more.get("groups", 1) > 1 else ""
    name += f", stride {more['stride']}" if more.get("stride", 1) > 1 else ""
    return _both(name, x, weight, verify=False, benchmark=(torch.float32,), **more)


CASES = [
    *_both("2x5x9x7 -> 6, 3x3", (2, 5, 9, 7), (6, 5, 3, 3)),
    *_both("3x32x17x15 -> 70, 3x3, padding 1", (3, 32, 17, 15), (70, 32, 3, 3), padding=1),
    *_both(
        "4x40x13x22 -> 70, 3x3, 2 groups, gelu, residual",
        *((4, 40, 13, 22), (70, 20, 3, 3)),
        padding=2,
        groups=2,
        activation="gelu",
        residual=True,
    ),
    *_both("1x16x9x230 -> 17, 3x3", (1, 16, 9, 230), (17, 16, 3, 3)),
    *_both("2x17x3x12x9 -> 20, 1x3x3", (2, 17, 3, 12, 9), (20, 17, 1, 3, 3), padding=(0, 1, 1)),
    *_both("2x72x18x8 -> 40, 3x3, transposed", (2, 72, 18, 8), (72, 40, 3, 3), transposed=True, padding=1),
    *_both("2x3x23x21 -> 33, 7x7, stride 2", (2, 3, 23, 21), (33, 3, 7, 7), stride=2, padding=3),
    *_both("1x3x61x75 -> 33, 7x7, stride 2", (1, 3, 61, 75), (33, 3, 7, 7), stride=2, padding=3),
    *_both(
        "2x4x64x50 -> 40, 8x8, 2 groups, stride 2, gelu, residual",
        *((2, 4, 64, 50), (40, 2, 8, 8)),
        stride=2,
        padding=4,
        groups=2,
        activation="gelu",
        residual=True,
    ),
    *_both("1x12x45x38 -> 20, 5x5, stride 2", (1, 12, 45, 38), (20, 12, 5, 5), stride=2, padding=1),
    *_both("1x2x82x77 -> 17, 10x7, mixed", (1, 2, 82, 77), (17, 2, 10, 7), stride=(3, 2), padding=(3, 0)),
    *_both("1x3x3x47x50 -> 18, 1x7x7, stride 2", (1, 3, 3, 47, 50), (18, 3, 1, 7, 7), stride=2, padding=(1, 3, 2)),
    *_both("2x33x13x11 -> 40, 3x3, stride 2", (2, 33, 13, 11), (40, 33, 3, 3), stride=2, padding=1),
    *_both("2x32x9x8 -> 12, 5x4", (2, 32, 9, 8), (12, 32, 5, 4), padding=(2, 0)),
    *_both("2x64x9x11 -> 48, 1x1", (2, 64, 9, 11), (48, 64, 1, 1)),
    *_both("2x16x13x12 -> 24, 1x1, stride 2", (2, 16, 13, 12), (24, 16, 1, 1), stride=2),
    *_both("2x8x14x9 -> 40, 2x5, mixed", (2, 8, 14, 9), (40, 8, 2, 5), stride=(3, 2), padding=(1, 4), dilation=(2, 1)),
    *_both("2x6x19x20 -> 9, 3x3, dilation 3", (2, 6, 19, 20), (9, 6, 3, 3), padding=2, dilation=3),
    *_both("1x17x14x37 -> 3, 3x3", (1, 17, 14, 37), (3, 17, 3, 3), padding=(1, 0)),
    *_both("2x2x37x34 -> 5, 5x5, stride 2", (2, 2, 37, 34), (5, 2, 5, 5), stride=2, padding=2),
    *_both("1x3x40x58 -> 4, 7x7, stride 3", (1, 3, 40, 58), (4, 3, 7, 7), stride=3, padding=3),
    *_both("2x12x10x10 -> 18, 3x3, 3 groups", (2, 12, 10, 10), (18, 4, 3, 3), padding=1, groups=3),
    *_both("2x6x11x9 -> 5, 4x4, same", (2, 6, 11, 9), (5, 6, 4, 4), padding="same"),
    *_both("2x1x12x13 -> 32, 3x3", (2, 1, 12, 13), (32, 1, 3, 3)),
    *_both("2x45x14x13, 3x3, depthwise", (2, 45, 14, 13), (45, 1, 3, 3), padding=1, groups=45),
    *_both("2x40x15x9, 5x3, depthwise, stride 2", (2, 40, 15, 9), (40, 1, 5, 3), stride=2, padding=(2, 1), groups=40),
    *_both("1x2x112x120, 5x4, depthwise", (1, 2, 112, 120), (2, 1, 5, 4), padding=(2, 1), groups=2),
    *_both("2x13x9x9 -> 39, 3x3, depthwise times 3", (2, 13, 9, 9), (39, 1, 3, 3), padding=1, groups=13),
    *_both("2x70x9x9, 3x3, depthwise, dilation 2", (2, 70, 9, 9), (70, 1, 3, 3), padding=2, dilation=2, groups=70),
    *_both("3x20x31 -> 34, 5", (3, 20, 31), (34, 20, 5), padding=2),
    *_both("2x7x40 -> 12, 4, stride 3, dilation 2", (2, 7, 40), (12, 7, 4), stride=3, dilation=2),
    *_both("2x33x50, 4, depthwise", (2, 33, 50), (33, 1, 4), padding=3, groups=33),
    conv_case("1x2x1500 -> 3, 9", (1, 2, 1500), (3, 2, 9), padding=4),
    *_both("2x5x6x7x8 -> 18, 3x3x3", (2, 5, 6, 7, 8), (18, 5, 3, 3, 3), padding=1),
    *_both("2x24x4x5x3 -> 9, 3x3x3", (2, 24, 4, 5, 3), (9, 24, 3, 3, 3), padding=1),
    *_both("1x4x9x6x5 -> 6, 2x3x1, stride 2", (1, 4, 9, 6, 5), (6, 4, 2, 3, 1), stride=(2, 1, 2), dilation=(1, 2, 1)),
    *_both("1x18x5x6x7, 3x3x3, depthwise", (1, 18, 5, 6, 7), (18, 1, 3, 3, 3), padding=1, groups=18),
    *[
        case
        for name in ACTIVATIONS
        for case in _both(
            f"2x9x8x7 -> 35, 3x3, {name}, residual", (2, 9, 8, 7), (35, 9, 3, 3), residual=True, activation=name
        )
    ],
    *_both("2x36x9x9, 3x3, depthwise, gelu", (2, 36, 9, 9), (36, 1, 3, 3), groups=36, activation="gelu", residual=True),
    *_both("2x6x7x8, transposed -> 10, 3x3", (2, 6, 7, 8), (6, 10, 3, 3), transposed=True),
    *_both(
        "2x20x6x5, transposed -> 36, 4x3, mixed, silu",
        *((2, 20, 6, 5), (20, 18, 4, 3)),
        transposed=True,
        stride=(2, 3),
        padding=(1, 0),
        output_padding=(1, 2),
        groups=2,
        activation="silu",
        residual=True,
    ),
    *_both("2x8x9x9, transposed, 2x2, stride 3", (2, 8, 9, 9), (8, 5, 2, 2), transposed=True, stride=3),
    *_both("2x12x8x9, transposed, 4x4, depthwise", (2, 12, 8, 9), (12, 1, 4, 4), transposed=True, stride=2, groups=12),
    *_both("2x9x8x9, transposed, 3x3, depthwise times 2", (2, 9, 8, 9), (9, 2, 3, 3), transposed=True, groups=9),
    *_both("2x5x17, transposed -> 7, 5, dilation 2", (2, 5, 17), (5, 7, 5), transposed=True, stride=2, dilation=2),
    *_both("1x4x3x4x5, transposed -> 6, 3x2x3", (1, 4, 3, 4, 5), (4, 6, 3, 2, 3), transposed=True, stride=2),
    conv_case("0x3x8x8 -> 4, 3x3", (0, 3, 8, 8), (4, 3, 3, 3)),
    conv_case("2x3x8x8 -> 4, 3x3, without bias", (2, 3, 8, 8), (4, 3, 3, 3), bias=False),
    *_row((64, 3, 32, 32), (32, 3, 3, 3), padding=1),
    *_row((64, 32, 16, 16), (64, 32, 3, 3), padding=1),
    *_row((8, 64, 56, 56), (64, 64, 3, 3), padding=1),
    *_row((8, 256, 14, 14), (256, 256, 3, 3), padding=1),
    *_row((8, 3, 224, 224), (64, 3, 7, 7), stride=2, padding=3),
    *_row((8, 256, 56, 56), (64, 256, 1, 1)),
    *_row((8, 128, 56, 56), (128, 1, 3, 3), padding=1, groups=128),
    *_row((8, 64, 112, 112), (128, 64, 3, 3), stride=2, padding=1),
]
