"""Attention: squares of queries and keys, and decoding."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...ops.attention import attention
from .counting import Workload


def _attention(
    name: str,
    dtype: torch.dtype,
    *,
    d: int,
    lq: int,
    lk: int,
    copies: int = 1,
    heads: int = 1,
    groups: int = 1,
    tf32: bool = False,
    bias: tuple[int, int] | None = None,
    bias_dtype: torch.dtype | None = None,
    deterministic: bool = False,
    **options: Any,
) -> Workload:
    """One batch entry with `heads` query heads, each `groups` of which share a head of keys and values."""

    def inputs() -> dict[str, Tensor]:
        drawn = {
            "q": torch.randn(1, heads, lq, d, dtype=dtype),
            "k": torch.randn(1, heads // groups, lk, d, dtype=dtype),
            "v": torch.randn(1, heads // groups, lk, d, dtype=dtype),
        }
        if bias is not None:
            drawn["mask"] = torch.randn(1, 1, *bias, dtype=bias_dtype or dtype)
        return drawn

    def call(**drawn: Tensor) -> Tensor:
        former = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            results = attention(**drawn, **options)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = former
        return results if isinstance(results, Tensor) else torch.cat([result.flatten() for result in results])

    causal = options.get("right") == 0
    seen = sum(min(lk, lk - lq + i + 1) for i in range(lq)) if causal else lq * lk
    return Workload(
        op="attention",
        name=name,
        dtype=dtype,
        copies=copies,
        inputs=inputs,
        call=call,
        exponentials=heads * seen,
        recomputes=True,
        saved=heads * lq * 4,
        deterministic=deterministic,
    )


def workloads() -> Iterator[Workload]:
    """128 heads, 8 times 16, of 512 queries and keys, run as 4: enough blocks that keys are not split; and decoding."""
    square = {"lq": 512, "lk": 512, "heads": 4, "copies": 32}
    for dtype in (torch.bfloat16, torch.float32):
        yield _attention("8x16x512x64", dtype, d=64, **square)
        yield _attention("8x16x512x64 causal", dtype, d=64, right=0, **square)
    yield _attention("8x16x512x64 deterministic", torch.bfloat16, d=64, deterministic=True, **square)
    yield _attention("8x16x512x128", torch.bfloat16, d=128, **square)
    yield _attention("8x16x512x128 causal", torch.bfloat16, d=128, right=0, **square)
    yield _attention("8x16x512x64 causal TF32", torch.float32, d=64, right=0, tf32=True, **square)
    yield _attention("8x16x512x64 bias [512, 512]", torch.bfloat16, d=64, bias=(512, 512), **square)
    decoding = {"lq": 1, "lk": 2048, "heads": 8, "groups": 4, "right": 0, "offset": None}
    yield _attention("8x1x128 of 2x2048 keys", torch.bfloat16, d=128, **decoding)


def probes() -> Iterator[Workload]:
    """Every arithmetic and width of tiles: plain, general with a bias, few queries, split keys, weights, both ways
    back."""
    for dtype, tf32 in ((torch.bfloat16, False), (torch.float16, False), (torch.float32, True), (torch.float32, False)):
        for d in (64, 128, 256):
            of = {"dtype": dtype, "d": d, "tf32": tf32}
            yield _attention("plain", lq=72, lk=8, **of)
            yield _attention("plain", lq=16, lk=72, **of)
            yield _attention("general", lq=72, lk=8, heads=2, bias=(1, 8), return_weights=True, **of)
            yield _attention("few", lq=1, lk=8, heads=2, bias=(1, 8), bias_dtype=torch.float32, **of)
            yield _attention("split", lq=1, lk=8, **of) if d != 64 else _attention("split", lq=1, lk=640, **of)
