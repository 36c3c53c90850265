"""Convolution as implicit matrix products: pixels times (taps x channels) times the result's channels.

Forwards and to the input is one kernel: the geometry of csrc/conv_axis.h says what a result takes from where, and the
gradient in the input is, for each phase of the stride, a convolution of stride 1. Sources with enough channels lie with
these innermost; few channels are gathered together with the taps. Groups of a few channels are computed without matrix
products. Every sum has one order.
"""

import itertools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from ._launch import architecture, launch, precision, processors
from .tuning import tuned

# Pixels, channels, depth, warps and stages of a tile, by compute capability and bytes an element: a result of few
# channels (up to 64), and of more. csrc/cuda/conv.cu has tiles of the same kind.
_TILES = {
    8: {2: ((128, 64, 32, 4, 3), (128, 128, 32, 8, 3)), 4: ((64, 32, 16, 4, 2), (64, 64, 16, 8, 2))},
    9: {2: ((128, 64, 64, 4, 3), (128, 128, 64, 8, 3)), 4: ((64, 32, 16, 4, 2), (64, 64, 16, 8, 2))},
}
_TILES[10] = _TILES[9]
_TILES[12] = {**_TILES[8], 2: ((128, 64, 32, 4, 2), (128, 128, 32, 8, 3))}
_FEW = 16  # products a group's pixel and tap is worth: fewer are not done by tensor cores


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of that number in fastnets.reference.conv.ACTIVATIONS."""
    if ACTIVATION == 1:
        x = tl.where(x < 0.0, 0.0, x)  # NaN stays
    elif ACTIVATION == 2:
        x = x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))  # x Phi(x), arXiv 1606.08415
    elif ACTIVATION == 3:
        x = x * tl.sigmoid(x)
    elif ACTIVATION == 4:
        x = tl.sigmoid(x)
    elif ACTIVATION == 5:
        x = libdevice.tanh(x)
    return x


@triton.jit
def finish(acc, at, channel, inside, bias_ptr, residual_ptr, y_ptr, kept_ptr, ACTIVATION: tl.constexpr):
    """Bias, residual and activation of a tile, which is stored `at` these places of the result."""
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if kept_ptr is not None:
        tl.store(kept_ptr + at, acc.to(kept_ptr.dtype.element_ty), mask=inside)
    tl.store(y_ptr + at, activate(acc, ACTIVATION).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def pixels_of(number, count0, count1, count2):
    """Image and position of a result's pixel."""
    j2 = number % count2
    j1 = number // count2 % count1
    j0 = number // count2 // count1 % count0
    return number // count2 // count1 // count0, j0, j1, j2


@triton.jit(do_not_specialize=["pixels"])
def conv_gather_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr, kept_ptr,
    pixels, channels, outs,  # of the result; a group's of the source; a group's of the result
    count0, count1, count2, pull0, pull1, pull2, taps0, taps1, taps2, offset0, offset1, offset2,
    step0, step1, step2, extent0, extent1, extent2,
    x_batch, x_channel, x_at0, x_at1, x_at2, w_base, w_in, w_out, w_group, w_at0, w_at1, w_at2,
    y_base, y_batch, y_channel, y_at0, y_at1, y_at2,
    ACTIVATION: tl.constexpr, FLAT: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(outs, N)
    tiles_m = tl.cdiv(pixels, M).to(tl.int32)
    number = tl.program_id(0)
    group = (number // tiles_n // tiles_m).to(tl.int64)
    m = (number // tiles_n % tiles_m).to(pixels.dtype) * M + tl.arange(0, M)
    n = number % tiles_n * N + tl.arange(0, N)
    batch, j0, j1, j2 = pixels_of(m, count0, count1, count2)
    x_ptr += group * channels * x_channel
    weight_ptr += w_base + group * w_group
    row = batch.to(tl.int64)[:, None] * x_batch
    p0 = (j0 * pull0 + offset0)[:, None]
    p1 = (j1 * pull1 + offset1)[:, None]
    p2 = (j2 * pull2 + offset2)[:, None]
    exists = (m < pixels)[:, None]
    column = n.to(tl.int64)[None, :] * w_out
    acc = tl.zeros((M, N), tl.float32)
    blocks = tl.cdiv(channels, K)
    taps = taps0 * taps1 * taps2
    steps = tl.cdiv(taps * channels, K) if FLAT else taps * blocks
    for step in range(0, steps):
        if FLAT:  # a depth is a tap and a channel
            depth = step * K + tl.arange(0, K)
            c = depth % channels
            tap = depth // channels
            live = tap < taps
            t0, t1, t2 = tap // (taps1 * taps2), tap // taps2 % taps1, tap % taps2
            q0, q1, q2 = p0 + t0[None, :] * step0, p1 + t1[None, :] * step1, p2 + t2[None, :] * step2
            w = (t0 * w_at0 + t1 * w_at1 + t2 * w_at2)[:, None]
        else:  # a depth is a channel of one tap
            tap = step // blocks
            c = step % blocks * K + tl.arange(0, K)
            live = c < channels
            t0, t1, t2 = tap // (taps1 * taps2), tap // taps2 % taps1, tap % taps2
            q0, q1, q2 = p0 + t0 * step0, p1 + t1 * step1, p2 + t2 * step2
            w = t0 * w_at0 + t1 * w_at1 + t2 * w_at2
        inside = exists & (q0 >= 0) & (q0 < extent0) & (q1 >= 0) & (q1 < extent1) & (q2 >= 0) & (q2 < extent2)
        at = row + q0.to(tl.int64) * x_at0 + q1.to(tl.int64) * x_at1 + q2.to(tl.int64) * x_at2
        a = tl.load(x_ptr + at + (c * x_channel)[None, :], mask=inside & live[None, :], other=0.0)
        b = tl.load(weight_ptr + column + w + (c * w_in)[:, None], mask=live[:, None] & (n < outs)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    at = y_base + batch.to(tl.int64) * y_batch + j0.to(tl.int64) * y_at0 + j1.to(tl.int64) * y_at1
    at += j2.to(tl.int64) * y_at2
    channel = group * outs + n
    inside = exists & (n < outs)[None, :]
    at = at[:, None] + (channel * y_channel)[None, :]
    finish(acc, at, channel[None, :] + 0 * at, inside, bias_ptr, residual_ptr, y_ptr, kept_ptr, ACTIVATION)


@triton.jit(do_not_specialize=["pixels"])
def conv_direct_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr, kept_ptr,
    pixels, channels, outs, all_outs,
    count0, count1, count2, pull0, pull1, pull2, taps0, taps1, taps2, offset0, offset1, offset2,
    step0, step1, step2, extent0, extent1, extent2,
    x_batch, x_channel, x_at0, x_at1, x_at2, w_base, w_in, w_out, w_group, w_at0, w_at1, w_at2,
    y_base, y_batch, y_channel, y_at0, y_at1, y_at2,
    ACTIVATION: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """As conv_gather_kernel, for groups of a few channels."""
    tiles_n = tl.cdiv(all_outs, N)
    m = (tl.program_id(0) // tiles_n).to(pixels.dtype) * M + tl.arange(0, M)
    channel = tl.program_id(0) % tiles_n * N + tl.arange(0, N)
    batch, j0, j1, j2 = pixels_of(m, count0, count1, count2)
    group = (channel // outs).to(tl.int64)
    column = (group * w_group + channel % outs * w_out)[None, :] + w_base
    row = batch.to(tl.int64)[:, None] * x_batch + (group * channels * x_channel)[None, :]
    p0, p1, p2 = j0 * pull0 + offset0, j1 * pull1 + offset1, j2 * pull2 + offset2
    there = (channel < all_outs)[None, :]
    acc = tl.zeros((M, N), tl.float32)
    for tap in range(0, taps0 * taps1 * taps2):
        t0, t1, t2 = tap // (taps1 * taps2), tap // taps2 % taps1, tap % taps2
        q0, q1, q2 = p0 + t0 * step0, p1 + t1 * step1, p2 + t2 * step2
        inside = (q0 >= 0) & (q0 < extent0) & (q1 >= 0) & (q1 < extent1) & (q2 >= 0) & (q2 < extent2) & (m < pixels)
        at = q0.to(tl.int64) * x_at0 + q1.to(tl.int64) * x_at1 + q2.to(tl.int64) * x_at2
        w = t0 * w_at0 + t1 * w_at1 + t2 * w_at2
        for c in range(0, channels):
            a = tl.load(x_ptr + row + at[:, None] + c * x_channel, mask=inside[:, None] & there, other=0.0)
            b = tl.load(weight_ptr + column + w + c * w_in, mask=there, other=0.0)
            acc += a.to(tl.float32) * b.to(tl.float32)
    at = y_base + batch.to(tl.int64) * y_batch + j0.to(tl.int64) * y_at0 + j1.to(tl.int64) * y_at1
    at += j2.to(tl.int64) * y_at2
    inside = (m < pixels)[:, None] & there
    at = at[:, None] + (channel.to(tl.int64) * y_channel)[None, :]
    finish(acc, at, channel[None, :] + 0 * at, inside, bias_ptr, residual_ptr, y_ptr, kept_ptr, ACTIVATION)


@triton.jit(do_not_specialize=["pixels", "each"])
def conv_weight_kernel(
    grad_ptr, x_ptr,
    result_ptr,  # float32 [parts, groups, outs, taps, channels]
    pixels, each, channels, outs, groups,  # each: pixels of a part
    count0, count1, count2, pull0, pull1, pull2, taps0, taps1, taps2, offset0, offset1, offset2,
    step0, step1, step2, extent0, extent1, extent2,
    x_batch, x_channel, x_at0, x_at1, x_at2, g_batch, g_channel, g_at0, g_at1, g_at2,
    PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """A tile of M of a group's result channels and N of its taps and channels, over a part of the pixels."""
    taps = taps0 * taps1 * taps2
    columns = taps * channels
    tiles_m, tiles_n = tl.cdiv(outs, M), tl.cdiv(columns, N)
    number = tl.program_id(0)
    group = (number // tiles_n // tiles_m).to(tl.int64)
    m = number // tiles_n % tiles_m * M + tl.arange(0, M)
    n = number % tiles_n * N + tl.arange(0, N)
    c, tap = n % channels, n // channels
    t0, t1, t2 = tap // (taps1 * taps2), tap // taps2 % taps1, tap % taps2
    x_column = ((group * channels + c) * x_channel)[None, :]
    g_row = ((group * outs + m) * g_channel)[:, None]
    s0, s1, s2 = (t0 * step0 + offset0)[None, :], (t1 * step1 + offset1)[None, :], (t2 * step2 + offset2)[None, :]
    part = tl.program_id(1).to(tl.int64)
    begin = tl.program_id(1).to(each.dtype) * each
    acc = tl.zeros((M, N), tl.float32)
    for start in range(begin, tl.minimum(begin + each, pixels), K):
        pixel = start + tl.arange(0, K)
        batch, j0, j1, j2 = pixels_of(pixel, count0, count1, count2)
        exists = pixel < pixels
        at = batch.to(tl.int64) * g_batch + j0.to(tl.int64) * g_at0 + j1.to(tl.int64) * g_at1
        at += j2.to(tl.int64) * g_at2
        grad = tl.load(grad_ptr + g_row + at[None, :], mask=(m < outs)[:, None] & exists[None, :], other=0.0)
        q0, q1, q2 = (j0 * pull0)[:, None] + s0, (j1 * pull1)[:, None] + s1, (j2 * pull2)[:, None] + s2
        inside = exists[:, None] & (q0 >= 0) & (q0 < extent0) & (q1 >= 0) & (q1 < extent1) & (q2 >= 0) & (q2 < extent2)
        at = batch.to(tl.int64)[:, None] * x_batch + q0.to(tl.int64) * x_at0 + q1.to(tl.int64) * x_at1
        at += q2.to(tl.int64) * x_at2
        x = tl.load(x_ptr + at + x_column, mask=inside & (n < columns)[None, :], other=0.0)
        acc = tl.dot(grad, x, acc, input_precision=PRECISION)
    at = ((part * groups + group) * outs + m)[:, None] * columns + n[None, :]
    tl.store(result_ptr + at, acc, mask=(m < outs)[:, None] & (n < columns)[None, :])


@triton.jit(do_not_specialize=["pixels", "each"])
def conv_weight_direct_kernel(
    grad_ptr, x_ptr,
    result_ptr,  # float32 [parts, all outs, taps, channels]
    pixels, each, channels, outs, all_outs,
    count0, count1, count2, pull0, pull1, pull2, taps0, taps1, taps2, offset0, offset1, offset2,
    step0, step1, step2, extent0, extent1, extent2,
    x_batch, x_channel, x_at0, x_at1, x_at2, g_batch, g_channel, g_at0, g_at1, g_at2,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """As conv_weight_kernel, for groups of a few channels: a tap, a channel of each group, N result channels."""
    taps = taps0 * taps1 * taps2
    tiles_n = tl.cdiv(all_outs, N)
    number = tl.program_id(0)
    out = number % tiles_n * N + tl.arange(0, N)
    c, tap = number // tiles_n % channels, number // tiles_n // channels
    t0, t1, t2 = tap // (taps1 * taps2), tap // taps2 % taps1, tap % taps2
    there = (out < all_outs)[None, :]
    x_column = ((out // outs * channels + c).to(tl.int64) * x_channel)[None, :]
    g_column = (out.to(tl.int64) * g_channel)[None, :]
    part = tl.program_id(1).to(tl.int64)
    begin = tl.program_id(1).to(each.dtype) * each
    acc = tl.zeros((M, N), tl.float32)
    for start in range(begin, tl.minimum(begin + each, pixels), M):
        pixel = start + tl.arange(0, M)
        batch, j0, j1, j2 = pixels_of(pixel, count0, count1, count2)
        at = batch.to(tl.int64) * g_batch + j0.to(tl.int64) * g_at0 + j1.to(tl.int64) * g_at1
        at += j2.to(tl.int64) * g_at2
        exists = pixel < pixels
        grad = tl.load(grad_ptr + at[:, None] + g_column, mask=exists[:, None] & there, other=0.0)
        q0, q1 = j0 * pull0 + offset0 + t0 * step0, j1 * pull1 + offset1 + t1 * step1
        q2 = j2 * pull2 + offset2 + t2 * step2
        inside = exists & (q0 >= 0) & (q0 < extent0) & (q1 >= 0) & (q1 < extent1) & (q2 >= 0) & (q2 < extent2)
        at = batch.to(tl.int64) * x_batch + q0.to(tl.int64) * x_at0 + q1.to(tl.int64) * x_at1
        at += q2.to(tl.int64) * x_at2
        x = tl.load(x_ptr + at[:, None] + x_column, mask=inside[:, None] & there, other=0.0)
        acc += grad.to(tl.float32) * x.to(tl.float32)
    at = ((part * all_outs + out) * taps + tap) * channels + c
    tl.store(result_ptr + at, tl.sum(acc, 0), mask=out < all_outs)


@triton.jit
def conv_grad_epilogue_kernel(grad_ptr, saved_ptr, result_ptr, count, ACTIVATION: tl.constexpr, N: tl.constexpr):
    """From the activation's input (gelu, silu) or its output (relu, sigmoid, tanh)."""
    at = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    s = tl.load(saved_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    if ACTIVATION == 1:
        grad = tl.where(s <= 0.0, 0.0, grad)
    elif ACTIVATION == 2:
        density = tl.exp(s * s * -0.5) * 0.3989422804014327
        grad *= 0.5 * (1.0 + tl.erf(s * 0.7071067811865476)) + s * density
    elif ACTIVATION == 3:
        sigmoid = tl.sigmoid(s)
        grad *= sigmoid * (1.0 + s * (1.0 - sigmoid))
    elif ACTIVATION == 4:
        grad *= s * (1.0 - s)
    elif ACTIVATION == 5:
        grad *= 1.0 - s * s
    tl.store(result_ptr + at, grad.to(result_ptr.dtype.element_ty), mask=at < count)


# ---- geometry ------------------------------------------------------------------------------------------------------
# Of an axis: result position `first` + j `apart`, j < `count`, takes at its i-th tap, i < `taps`, the source's position
# j `pull` + `offset` + i `step`, which counts within [0, `extent`), times the weight's tap `tap` + i `tap_step`.


def _forward_axis(size: int, out: int, kernel: int, stride: int, padding: int, dilation: int) -> dict[str, int]:
    return {
        "count": out, "first": 0, "apart": 1, "pull": stride, "taps": kernel, "tap": 0, "tap_step": 1,
        "offset": -padding, "step": dilation, "extent": size,
    }  # fmt: skip


def _phase_axis(
    size: int, out: int, kernel: int, stride: int, padding: int, dilation: int, phase: int
) -> dict[str, int]:
    """The gradient in positions phase, phase + stride, ...: the same taps meet them, in reverse order."""
    axis = {
        "count": -((phase - size) // stride), "first": phase, "apart": stride, "pull": 1, "taps": 0, "tap": 0,
        "tap_step": 0, "offset": 0, "step": 1, "extent": out,
    }  # fmt: skip
    common = math.gcd(stride, dilation)
    every = stride // common  # taps apart
    for tap in range(min(kernel, every)):
        ahead = phase + padding
        if (ahead - tap * dilation) % stride:
            continue
        taps = (kernel - 1 - tap) // every + 1
        last = tap + (taps - 1) * every
        axis |= {"taps": taps, "tap": last, "tap_step": -every, "step": dilation // common}
        axis["offset"] = (ahead - last * dilation) // stride
    return axis


def _numbered(axes: list[dict[str, int]], *names: str) -> dict[str, int]:
    """{"count0": axes[0]["count"], ...}"""
    return {f"{name}{d}": axis[name] for d, axis in enumerate(axes) for name in names}


def _three(values, lead: int) -> list[int]:
    """1 to 3 spatial values as those of 3 dimensions."""
    return [lead] * (3 - len(values)) + list(values)


def _at(t: Tensor, name: str) -> dict[str, int]:
    """The strides of [batch, channel, *size], as arguments."""
    names = (f"{name}_batch", f"{name}_channel", f"{name}_at0", f"{name}_at1", f"{name}_at2")
    return dict(zip(names, (*t.stride()[:2], *_three(t.stride()[2:], 0)), strict=True))


def _last(t: Tensor) -> Tensor:
    """The same values with the channels innermost."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def _new(like: Tensor, shape, channels_last: bool) -> Tensor:
    if not channels_last:
        return like.new_empty(shape)
    return like.new_empty((shape[0], *shape[2:], shape[1])).movedim(-1, 1)


_AXIS = ("count", "pull", "taps", "offset", "step", "extent")


def _gather(axes, x, weight, w_in, w_out, w_group, groups, bias, residual, y, kept, tf32, activation) -> None:
    """One launch: the positions of y that `axes` speak of."""
    pixels = x.size(0) * math.prod(axis["count"] for axis in axes)
    if pixels == 0:
        return
    channels, outs = x.size(1) // groups, y.size(1) // groups
    w_at, y_at = _three(weight.stride()[2:], 0), _three(y.stride()[2:], 0)
    arguments = {
        **_numbered(axes, *_AXIS),
        **_at(x, "x"),
        **_at(y, "y"),
        **{f"w_at{d}": axis["tap_step"] * w_at[d] for d, axis in enumerate(axes)},
        **{f"y_at{d}": axis["apart"] * y_at[d] for d, axis in enumerate(axes)},
        "x_ptr": x,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "residual_ptr": residual,
        "y_ptr": y,
        "kept_ptr": kept,
        "w_base": sum(axis["tap"] * stride for axis, stride in zip(axes, w_at, strict=True)),
        "y_base": sum(axis["first"] * stride for axis, stride in zip(axes, y_at, strict=True)),
        "w_in": w_in,
        "w_out": w_out,
        "w_group": w_group,
        "pixels": pixels,
        "channels": channels,
        "outs": outs,
        "ACTIVATION": activation,
    }
    if groups > 1 and channels * outs < _FEW:
        n = 1 if y.stride(1) != 1 else min(32, triton.next_power_of_2(y.size(1)))
        tile = {"M": 1024 // n if n > 1 else 256, "N": n, "num_warps": 4}
        grid = (triton.cdiv(pixels, tile["M"]) * triton.cdiv(y.size(1), n),)
        launch(conv_direct_kernel, grid, y, all_outs=y.size(1), **arguments, **tile)
        return
    multiply = precision(y.dtype, tf32)

    def run(tile: dict) -> None:
        grid = (triton.cdiv(pixels, tile["M"]) * triton.cdiv(outs, tile["N"]) * groups,)
        launch(conv_gather_kernel, grid, y, PRECISION=multiply, **arguments, **tile)

    exact = *(axis["taps"] for axis in axes), *(axis["pull"] for axis in axes), groups > 1, x.stride(1) == 1, multiply
    run(tuned("conv_gather", y, (pixels, channels, outs), exact, _tile(y, outs, channels), run))


def _tile(like: Tensor, outs: int, channels: int) -> dict[str, int]:
    m, n, k, warps, stages = _TILES[architecture(like)][like.element_size()][outs > 64]
    flat = channels < k
    return {
        "M": min(m, 64) if flat else m,  # every element's tap and channel are in registers
        "N": max(16, min(n, triton.next_power_of_2(outs))),
        "K": min(k, 32) if flat else k,
        "FLAT": flat,
        "num_warps": warps,
        "num_stages": stages,
    }


def _prepared(x: Tensor, weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Source and weight with channels innermost where a tile's depth runs along them."""
    if x.size(1) // groups < 8:
        return x, weight
    return _last(x), _last(weight)


def conv_forward(
    x, weight, bias, residual, size, stride, padding, dilation, groups, channels_last, tf32, activation, keep
) -> tuple[Tensor, Tensor]:
    """activation(conv(x, weight) + bias + residual), and with keep the activation's input; see csrc/ops.cpp."""
    y = _new(x, (x.size(0), weight.size(0), *size), channels_last)
    kept = torch.empty_like(y) if keep else None
    if y.numel():
        x, weight = _prepared(x, weight, groups)
        geometry = zip(
            _three(x.shape[2:], 1), _three(size, 1), _three(weight.shape[2:], 1), _three(stride, 1),
            _three(padding, 0), _three(dilation, 1), strict=True,
        )  # fmt: skip
        axes = [_forward_axis(*of) for of in geometry]
        group = weight.size(0) // groups * weight.stride(0)
        at = weight.stride(1), weight.stride(0), group
        bias = None if bias is None else bias.contiguous()
        _gather(axes, x, weight, *at, groups, bias, residual, y, kept, tf32, activation)
    return y, y.new_empty(0) if kept is None else kept


def conv_grad_input(
    grad, weight, bias, residual, size, stride, padding, dilation, groups, channels_last, tf32, activation, keep
) -> tuple[Tensor, Tensor]:
    """The gradient in x, of spatial size `size`, or the transposed convolution; see csrc/ops.cpp."""
    y = _new(grad, (grad.size(0), weight.size(1) * groups, *size), channels_last)
    kept = torch.empty_like(y) if keep else None
    if y.numel():
        grad, weight = _prepared(grad, weight, groups)
        stride = _three(stride, 1)
        geometry = list(
            zip(
                _three(size, 1), _three(grad.shape[2:], 1), _three(weight.shape[2:], 1), stride, _three(padding, 0),
                _three(dilation, 1), strict=True,
            )
        )  # fmt: skip
        at = weight.stride(0), weight.stride(1), weight.size(0) // groups * weight.stride(0)
        bias = None if bias is None else bias.contiguous()
        for phases in itertools.product(*map(range, stride)):
            axes = [_phase_axis(*of, phase) for of, phase in zip(geometry, phases, strict=True)]
            _gather(axes, grad, weight, *at, groups, bias, residual, y, kept, tf32, activation)
    return y, y.new_empty(0) if kept is None else kept


def conv_grad_weight(
    grad, x, weight, stride, padding, dilation, groups, channels_last, tf32, bias
) -> tuple[Tensor, Tensor]:
    """The gradient in weight, of its shape and strides, and in the bias; see csrc/ops.cpp."""
    result = torch.empty_like(weight)
    grad_bias = grad.sum((0, *range(2, grad.dim()))) if bias else grad.new_empty(0)
    taps, channels, outs = math.prod(weight.shape[2:]), weight.size(1), weight.size(0) // groups
    pixels = grad.size(0) * math.prod(grad.shape[2:])
    if result.numel() == 0 or pixels == 0 or x.numel() == 0:
        return result.zero_(), grad_bias
    direct = groups > 1 and channels * outs < _FEW
    if not direct:
        grad = _last(grad)
        x = _last(x) if channels >= 8 else x
    geometry = zip(
        _three(x.shape[2:], 1), _three(grad.shape[2:], 1), _three(weight.shape[2:], 1), _three(stride, 1),
        _three(padding, 0), _three(dilation, 1), strict=True,
    )  # fmt: skip
    arguments = {
        **_numbered([_forward_axis(*of) for of in geometry], *_AXIS),
        **_at(x, "x"),
        **_at(grad, "g"),
        "grad_ptr": grad,
        "x_ptr": x,
        "pixels": pixels,
        "channels": channels,
        "outs": outs,
    }

    def summed(kernel, programs: int, depth: int, **own) -> Tensor:
        """The gradient [all outs, taps, channels], from parts of the pixels, of whole depths."""
        parts = max(1, min(4 * processors(x) // programs, pixels // (4 * depth)))
        each = triton.cdiv(triton.cdiv(pixels, parts), depth) * depth
        sums = x.new_empty((parts, weight.size(0), taps, channels), dtype=torch.float32)
        launch(kernel, (programs, parts), x, result_ptr=sums, each=each, **arguments, **own)
        return sums.sum(0) if parts > 1 else sums[0]

    def run(tile: dict) -> Tensor:
        programs = groups * triton.cdiv(outs, tile["M"]) * triton.cdiv(taps * channels, tile["N"])
        return summed(conv_weight_kernel, programs, tile["K"], groups=groups, PRECISION=multiply, **tile)

    if direct:
        n = 1 if grad.stride(1) != 1 else min(32, triton.next_power_of_2(weight.size(0)))
        m = 1024 // n if n > 1 else 256
        programs, own = triton.cdiv(weight.size(0), n) * taps * channels, {"all_outs": weight.size(0)}
        total = summed(conv_weight_direct_kernel, programs, m, M=m, N=n, num_warps=4, **own)
    else:
        multiply = precision(x.dtype, tf32)
        m, n, depth, warps, stages = _TILES[architecture(x)][x.element_size()][0]
        tile = {"M": min(m, 64), "N": n, "K": depth, "num_warps": warps, "num_stages": stages}
        exact = *weight.shape[2:], *stride, groups > 1, multiply
        total = run(tuned("conv_weight", x, (pixels, channels, outs), exact, tile, run))
    return result.copy_(total.mT.reshape(weight.shape)), grad_bias


def conv_grad_epilogue(grad: Tensor, saved: Tensor, activation: int) -> Tensor:
    """The gradient in the activation's input; both tensors dense, of the same strides."""
    result = torch.empty_like(grad)
    if grad.numel():
        grid = (triton.cdiv(grad.numel(), 1024),)
        launch(conv_grad_epilogue_kernel, grid, grad, grad, saved, result, grad.numel(), ACTIVATION=activation, N=1024)
    return result
