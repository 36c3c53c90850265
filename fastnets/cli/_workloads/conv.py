"""Convolution: a few shapes of each kind, and with `--networks` every one of ResNet-50, MobileNet-V2 and our networks.

A batch of 32 on 128 multiprocessors, a large GPU, is run as some of its images on as many times 4 multiprocessors, with
the tiles and the shares of the depth that the whole has: as many as give 4096 results, 16 of the tallest tiles, but no
more than 4, and of small images, whose tiles and weights are few or large beside them, 8 (14 x 14) or all (7 x 7). The
weight counts once, and so does laying it out anew: all images share it.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ... import functional
from .counting import Gradient, Workload

BATCH = 32


def _conv(
    name: str,
    x: Sequence[int],
    weight: Sequence[int],
    dtype: torch.dtype = torch.bfloat16,
    *,
    copies: int = 1,
    channels_last: bool = True,
    tf32: bool = False,
    first: bool = False,
    activation: str | None = None,
    multiprocessors: int = 16,
    **options,
) -> Workload:
    """`first`: a network's first layer, whose input needs no gradient."""

    @contextlib.contextmanager
    def within() -> Iterator[None]:
        from ... import _simt

        former = _simt.multiprocessors()
        _simt.set_multiprocessors(multiprocessors)
        try:
            yield
        finally:
            _simt.set_multiprocessors(former)

    def inputs() -> dict[str, Tensor]:
        drawn = {"x": torch.randn(*x, dtype=dtype), "weight": torch.randn(*weight, dtype=dtype)}
        return {k: t.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else t for k, t in drawn.items()}

    def call(x: Tensor, weight: Tensor) -> Tensor:
        former = torch.backends.cudnn.conv.fp32_precision
        torch.backends.cudnn.conv.fp32_precision = "tf32" if tf32 else "ieee"
        try:
            conv = getattr(functional, f"conv{x.dim() - 2}d")
            return conv(x, weight, activation=activation, **options)
        finally:
            torch.backends.cudnn.conv.fp32_precision = former

    of_x, of_weight = Gradient("grad x", "x", ("weight",)), Gradient("grad weight", "weight", ("x",))
    return Workload(
        op="conv",
        name=name + (", channels last" if channels_last else ""),
        dtype=dtype,
        copies=copies,
        inputs=inputs,
        call=call,
        exponentials=0,
        common=frozenset({"weight"}),
        once=frozenset({"conv_arrange"} if channels_last and x[1] > 1 else ()),  # NCHW: of images, too
        gradients=(of_weight,) if first else (of_x, of_weight),
        within=within,
    )


def _layer(network: str, channels: int, size: int, results: int, kernel: int, stride: int = 1, **more) -> Workload:
    """A layer on square images as networks have them, of a batch of BATCH."""
    groups, padding = more.get("groups", 1), more.pop("padding", kernel // 2)
    out = (size + 2 * padding - kernel) // stride + 1
    images = min(32 if out <= 7 else 8 if out <= 14 else 4, -(-4096 // (out * out)))
    name = f"{network} {BATCH}x{channels}x{size}x{size} -> {results}, {kernel}x{kernel}"
    name += (f"/{stride}" if stride > 1 else "") + (", depthwise" if groups > 1 else "")
    return _conv(
        name.strip(),
        (images, channels, size, size),
        (results, channels // groups, kernel, kernel),
        copies=BATCH // images,
        multiprocessors=4 * images,
        stride=stride,
        padding=padding,
        first=channels <= 3,
        **more,
    )


def _resnet50() -> Iterator[tuple]:
    """Channels, size, results, kernel and stride of its convolutions (version 1.5: the stride is the
    middle layer's), https://arxiv.org/abs/1512.03385."""
    yield 3, 224, 64, 7, 2
    channels, size = 64, 56
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 << stage
        for block in range(blocks):
            stride = 2 if block == 0 and stage > 0 else 1
            yield channels, size, width, 1, 1
            yield width, size, width, 3, stride
            if block == 0:
                yield channels, size, 4 * width, 1, stride
            size //= stride
            yield width, size, 4 * width, 1, 1
            channels = 4 * width


def _mobilenet_v2() -> Iterator[tuple]:
    """Its convolutions, https://arxiv.org/abs/1801.04381; a sixth element: groups."""
    yield 3, 224, 32, 3, 2
    channels, size = 32, 112
    rows = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for expansion, results, blocks, first_stride in rows:
        for block in range(blocks):
            width, stride = channels * expansion, first_stride if block == 0 else 1
            if expansion > 1:
                yield channels, size, width, 1, 1
            yield width, size, width, 3, stride, width
            size //= stride
            yield width, size, results, 1, 1
            channels = results
    yield 320, 7, 1280, 1, 1


OURS = {
    "cnn_rgb": ((3, 32, 32, 1), (32, 16, 64, 1)),
    "cnn_gray": ((1, 28, 32, 0), (32, 26, 64, 0)),
    "cnn_deep": ((1, 28, 32, 0), (32, 13, 64, 0), (64, 5, 64, 0)),
}
"""fastnets.networks' layers of 3x3: channels, size, results, padding."""


def networks() -> Iterator[Workload]:
    """Each shape once, in the network where it comes first."""
    seen = set()
    for channels_last in (True, False):
        for network, layers in (("ResNet-50", _resnet50()), ("MobileNet-V2", _mobilenet_v2())):
            for layer in layers:
                if (layer, channels_last) in seen:
                    continue
                seen.add((layer, channels_last))
                groups = {"groups": layer[5]} if len(layer) > 5 else {}
                yield _layer(network, *layer[:5], channels_last=channels_last, **groups)
        for network, layers in OURS.items():
            for channels, size, results, padding in layers:
                yield _layer(network, channels, size, results, 3, padding=padding, channels_last=channels_last)


def workloads() -> Iterator[Workload]:
    for channels_last in (True, False):
        of = {"channels_last": channels_last}
        yield _layer("", 3, 224, 64, 7, 2, **of)
        yield _layer("", 64, 56, 64, 3, **of)
        yield _layer("", 256, 14, 256, 3, **of)
        yield _layer("", 64, 56, 256, 1, **of)
        yield _layer("", 144, 56, 144, 3, groups=144, **of)
    yield _layer("", 64, 56, 64, 3, dtype=torch.float32)
    yield _layer("TF32", 64, 56, 64, 3, dtype=torch.float32, tf32=True)


def probes() -> Iterator[Workload]:
    """Every arithmetic and tile, each layout of depthwise, and what surrounds them."""
    for dtype, tf32 in ((torch.bfloat16, False), (torch.float16, False), (torch.float32, True), (torch.float32, False)):

        def probe(name, x, weight, dtype=dtype, tf32=tf32, **options):
            return _conv(name, x, weight, dtype, tf32=tf32, **options)

        # Tiles are as many as the device's multiprocessors, 16, by groups; 1 x 1 brings every tap's pixels. No sum has
        # fewer terms than 16.
        many = {"groups": 16}
        yield probe("gather wide", (1, 256, 4, 4), (16 * 72, 16, 1, 1), **many)
        yield probe("gather tall", (1, 256, 4, 4), (16 * 24, 16, 1, 1), **many)
        yield probe("gather small", (1, 16, 3, 3), (72, 16, 1, 1), channels_last=False)
        yield probe("held tall", (1, 128, 2, 2), (16 * 24, 8, 2, 1), **many)
        yield probe("held small", (1, 8, 3, 3), (72, 8, 2, 1), channels_last=False)
        # Two fillings of so wide an image leave no room for the tallest tile.
        yield probe("held wide", (1, 16 * 72, 2, 30), (16 * 72, 72, 3, 1), padding=(1, 0), **many)
        yield probe("held middle", (1, 16 * 72, 2, 30), (16 * 24, 72, 3, 1), padding=(1, 0), **many)
        yield probe("weight of held taps", (1, 32, 4, 4), (8, 32, 3, 3), padding=1)
        yield probe("shares", (1, 8 * 64, 3, 3), (72, 8 * 64, 1, 1))
        yield probe("planes wide", (1, 16 * 72, 4, 4), (16 * 72, 72, 1, 1), channels_last=False, **many)
        yield probe("planes tall", (1, 16 * 72, 4, 4), (16 * 24, 72, 1, 1), channels_last=False, **many)
        yield probe("planes small", (1, 40, 4, 4), (24, 40, 1, 1), channels_last=False)
        yield probe("planes, weight tall", (1, 16, 4, 4), (24, 16, 1, 1), channels_last=False)
        yield probe("weight flat", (1, 72, 4, 4), (24, 72, 1, 1))
        yield probe("weight small", (1, 40, 4, 4), (24, 40, 1, 1))
        yield probe("few tall", (1, 3, 6, 6), (24, 3, 3, 3))
        yield probe("few wide", (1, 3, 10, 10), (72, 3, 7, 7))
        yield probe("depthwise", (1, 16, 3, 3), (16, 1, 3, 3), groups=16, activation="gelu")
        yield probe("depthwise", (1, 5, 3, 3), (5, 1, 3, 3), groups=5, activation="gelu")
        yield probe("depthwise", (1, 5, 3, 3), (5, 1, 3, 3), groups=5, channels_last=False)
