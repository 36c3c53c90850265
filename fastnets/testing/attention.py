"""The operator table's attention cases."""

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from .. import functional
from ..ops.attention import attention
from . import DTYPES, Case

_KEEP_TRUE = 0.7  # share of True in a boolean mask


def _draw(generator: torch.Generator, shape) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _case(
    name: str,
    sizes: tuple[int, ...],
    mask: str | tuple[int, ...] | None = None,
    *,
    peer: bool = True,
    packed: bool = False,
    bottom_right: bool = False,
    slopes: bool = False,
    benchmark: tuple[torch.dtype, ...] = (),
    verify: bool = True,
    quick: bool = True,
    **options,
) -> Case:
    """A case of sizes (B, Hq, Hkv, Lq, Lk, D, Dv).

    Args:
        mask: "boolean", "empty rows" (boolean, each row empty with probability 1/2), "keys" (boolean, the same for
            every query), or the shape of an additive one.
        packed: q, k and v are views of [B, L, H, D], as MultiheadAttention has them.
        bottom_right: causal, with the last query facing the last key.
        slopes: ALiBi.
        options: of fastnets.functional.scaled_dot_product_attention; torch has them too where `peer` stays True.
    """
    batch, heads, kv_heads, lq, lk, width, out_width = sizes
    options["enable_gqa"] = heads != kv_heads

    def inputs(generator: torch.Generator):
        shapes = [(batch, heads, lq, width), (batch, kv_heads, lk, width), (batch, kv_heads, lk, out_width)]
        drawn = {name: _draw(generator, shape) for name, shape in zip("qkv", shapes, strict=True)}
        if packed:
            drawn = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in drawn.items()}
        if isinstance(mask, tuple):
            drawn["mask"] = _draw(generator, mask)
        elif mask is not None:
            drawn["mask"] = torch.rand(batch, 1, 1 if mask == "keys" else lq, lk, generator=generator) < _KEEP_TRUE
            if mask == "empty rows":
                drawn["mask"] &= torch.rand(batch, 1, lq, 1, generator=generator) < 0.5
        if slopes:
            drawn["slopes"] = torch.rand(heads, generator=generator, dtype=torch.float64)
        return drawn

    def ours(q, k, v, mask=None, slopes=None):
        mask = causal_lower_right(lq, lk) if bottom_right else mask
        return functional.scaled_dot_product_attention(q, k, v, mask, alibi_slopes=slopes, **options)

    def torchs(q, k, v, mask=None):
        mask = causal_lower_right(lq, lk) if bottom_right else mask
        return F.scaled_dot_product_attention(q, k, v, mask, **options)

    flops = 2.0 * batch * heads * lq * lk * (width + out_width) / (2 if options.get("is_causal") else 1)
    return Case(
        op="attention",
        name=name,
        inputs=inputs,
        function=ours,
        peer=torchs if peer and not slopes else None,
        constant=frozenset({"slopes"}),
        two_ways=True,
        dtypes=benchmark or DTYPES,  # the other dtypes are checked on smaller shapes
        benchmark=benchmark,
        verify=verify,
        quick=quick,
        flops=flops,
        training_flops=3.5 * flops,
        elements=1.0 * batch * (heads * lq * (width + out_width) + kv_heads * lk * (width + out_width)),
    )


def _ours(name: str, sizes: tuple[int, ...], mask: tuple[int, ...] | None = None, **options) -> Case:
    """A case of what torch's function has no argument for; as `_case` otherwise."""
    return _case(name, sizes, mask, peer=False, **options)


def _weights(name: str, sizes: tuple[int, ...], **options) -> Case:
    """The softmax weights and the log-sum-exp beside the output, each with a gradient."""
    case = _case(name, sizes)

    def function(q, k, v):
        torch.manual_seed(0)
        return attention(q, k, v, return_lse=True, return_weights=True, **options)

    return _without_peer(case, function)


def _dropout(name: str, sizes: tuple[int, ...], mask: str | None = None, **options) -> Case:
    """Dropout from the same seed on every backend."""
    case = _case(name, sizes, mask)

    def function(q, k, v, mask=None):
        torch.manual_seed(0)
        return attention(q, k, v, mask=mask, dropout=0.3, **options)

    return _without_peer(case, function)


def _varlen(name: str, lengths_q: tuple[int, ...], lengths_k: tuple[int, ...], **options) -> Case:
    """Packed sequences, 4 heads on 2, width 16."""
    starts = [torch.tensor([0, *lengths]).cumsum(0) for lengths in (lengths_q, lengths_k)]

    def inputs(generator: torch.Generator):
        shapes = [(sum(lengths_q), 4, 16), (sum(lengths_k), 2, 16), (sum(lengths_k), 2, 24)]
        return {name: _draw(generator, shape) for name, shape in zip("qkv", shapes, strict=True)}

    def function(q, k, v):
        torch.manual_seed(0)
        return functional.varlen_attention(q, k, v, *(s.to(q.device) for s in starts), return_lse=True, **options)

    return Case(op="attention", name=name, inputs=inputs, function=function, two_ways=True)


def _without_peer(case: Case, function) -> Case:
    return Case(op=case.op, name=case.name, inputs=case.inputs, function=function, two_ways=True)


def _square(batch: int, heads: int, length: int, width: int = 64) -> tuple[int, ...]:
    return batch, heads, heads, length, length, width, width


_FLOAT32, _BOTH = (torch.float32,), (torch.float32, torch.bfloat16)
_GROUPED = (2, 4, 2, 37, 65, 8, 12)

CASES = [
    # Sizes: one, a vector less or more than whole, a block less or more than whole, none.
    _case("L1 D1", (1, 1, 1, 1, 1, 1, 1)),
    _case("L2 D8", (2, 3, 3, 2, 2, 8, 8)),
    _case("L10 D64", (3, 2, 2, 10, 10, 64, 64)),
    _case("L37x65 D33, Dv 40", (2, 2, 2, 37, 65, 33, 40)),
    _case("L65x37 D80, Dv 1", (1, 2, 2, 65, 37, 80, 1)),
    _case("L128x200 D64", (1, 2, 2, 128, 200, 64, 64)),
    _case("L200x128 D64, causal", (1, 2, 2, 200, 128, 64, 64), is_causal=True),
    _case("L1x200 D64", (2, 2, 2, 1, 200, 64, 64)),
    _case("L300 D16, causal", (1, 1, 1, 300, 300, 16, 16), is_causal=True),
    _case("Lk 0", (1, 2, 2, 3, 0, 8, 8), peer=False, return_lse=True),
    _case("Lq 0", (1, 2, 2, 0, 3, 8, 8), peer=False, return_lse=True),
    _case("batch 0", (0, 2, 2, 3, 3, 8, 8), peer=False, return_lse=True),
    _case("L65 of [B, L, H, D]", _square(2, 3, 65, 16), packed=True),
    # Causal and windows.
    _case("L10 causal", _square(2, 2, 10, 8), is_causal=True),
    _case("L130 causal", _square(1, 2, 130, 8), is_causal=True),
    _case("L37x65 causal, bottom right", (2, 2, 2, 37, 65, 8, 8), bottom_right=True),
    _ours("L65x37 causal, bottom right, empty rows", (2, 2, 2, 65, 37, 8, 8), bottom_right=True, return_lse=True),
    _ours("L130 window (5, 3)", _square(1, 2, 130, 8), window_size=(5, 3)),
    _ours("L200 window (70, 0)", _square(1, 2, 200, 8), window_size=(70, None), is_causal=True),
    _ours("L200x130 window (1, 1), empty rows", (1, 2, 2, 200, 130, 8, 8), window_size=(1, 1), return_lse=True),
    # At most 16 keys, in whole vectors.
    _case("L20x16 D16, Dv 32, causal", (2, 2, 2, 20, 16, 16, 32), is_causal=True),
    _ours("L9x16 D32, causal, bottom right", (2, 2, 2, 9, 16, 32, 32), bottom_right=True, return_lse=True),
    _ours("L40x13 window (2, 1), grouped", (2, 4, 2, 40, 13, 32, 16), window_size=(2, 1), return_lse=True),
    _case("L12 of [B, L, H, D], 4 heads on 1", (2, 4, 1, 12, 12, 16, 16), packed=True),
    _case("L20x11 D16, bias [B, 1, 1, Lk]", (2, 4, 4, 20, 11, 16, 16), (2, 1, 1, 11)),
    _case("L9x13 D16, mask of keys, grouped", (3, 4, 2, 9, 13, 16, 32), "keys"),
    _ours("L20x2 D16, mask of keys, some none", (9, 2, 2, 20, 2, 16, 16), "keys", return_lse=True),
    _dropout("L21x16 D16, dropout, grouped", (2, 4, 2, 21, 16, 16, 32)),
    _dropout("L37x9 D32, dropout, mask of keys, causal", (2, 2, 2, 37, 9, 32, 16), "keys", right=0),
    # Masks and biases.
    _case("boolean mask", (2, 4, 4, 37, 65, 8, 12), "boolean"),
    _ours("boolean mask, empty rows", (2, 4, 4, 37, 65, 8, 12), "empty rows", return_lse=True),
    _case("bias [B, H, Lq, Lk]", (2, 4, 4, 37, 65, 8, 12), (2, 4, 37, 65)),
    _case("bias [Lq, Lk]", (2, 4, 4, 37, 65, 8, 12), (37, 65)),
    _case("bias [H, 1, Lk]", (2, 4, 4, 65, 130, 8, 12), (4, 1, 130)),
    # What is the same for all keys moves the log-sum-exp only.
    _ours("bias [B, 1, Lq, 1]", (2, 4, 4, 130, 65, 8, 12), (2, 1, 130, 1), return_lse=True),
    _ours("bias [H, 1, 1]", (1, 4, 2, 70, 70, 16, 16), (4, 1, 1), return_lse=True),
    _case("bias [B, 1, 1, Lk], grouped", _GROUPED, (2, 1, 1, 65)),
    # The other options.
    _case("scale 0.3", _square(2, 2, 37, 8), scale=0.3),
    _case("scale 0", _square(2, 2, 37, 8), scale=0.0),
    _case("4 heads on 2", _GROUPED),
    _case("6 heads on 1, causal", (2, 6, 1, 37, 65, 8, 12), is_causal=True),
    _ours("soft cap 2", _square(2, 2, 37, 8), softcap=2.0),
    _ours("soft cap 2, bias, causal", _GROUPED, (37, 65), softcap=2.0, bottom_right=False),
    _case("ALiBi", (2, 4, 4, 37, 65, 8, 12), slopes=True),
    _case("ALiBi, causal, window, soft cap, grouped", _GROUPED, slopes=True, softcap=3.0, window_size=(20, 0)),
    _ours("log-sum-exp", _square(2, 2, 65, 8), return_lse=True),
    _ours("log-sum-exp, bias, grouped", _GROUPED, (4, 37, 65), return_lse=True),
    _weights("weights", (2, 2, 2, 37, 65, 8, 12)),
    _weights("weights, dropout, causal, grouped", _GROUPED, dropout=0.3, right=0, softcap=2.0),
    _dropout("dropout", _square(2, 2, 130, 8)),
    _dropout("dropout, causal, grouped", _GROUPED, right=0),
    _varlen("sequences of 5, 0, 70, 1", (5, 0, 70, 1), (9, 3, 66, 1)),
    _varlen(
        "sequences, causal, window, dropout",
        (5, 30, 70, 1),
        (9, 3, 66, 1),
        is_causal=True,
        window_size=(20, 0),
        dropout_p=0.2,
    ),
    # Every length beside a tile's bounds, every width of tiles.
    *(_case(f"L{length} D64, causal", (1, 1, 1, length, length, 64, 64), is_causal=True) for length in (17, 127, 129)),
    _case("L1000 D8", _square(1, 1, 1000, 8), quick=False),
    *(_case(f"L33x70 D{width}", (1, 2, 1, 33, 70, width, width)) for width in (40, 96, 128, 192, 256)),
    _case("L129 D128, causal", _square(1, 1, 129, 128), is_causal=True),
    _ours("L33x70 D96, Dv 128, bias, ALiBi, grouped", (1, 4, 2, 33, 70, 96, 128), (4, 1, 70), slopes=True),
    _weights("weights, dropout, D72, Dv 136", (1, 2, 1, 33, 70, 72, 136), dropout=0.3),
    _ours("L33x70 D192, Dv 128, bias, soft cap", (1, 2, 2, 33, 70, 192, 128), (33, 70), softcap=5.0),
    _ours("L33x70 D256, window, ALiBi", (1, 2, 2, 33, 70, 256, 256), slopes=True, window_size=(20, 10)),
    _ours("L70x600, bias, soft cap, grouped", (1, 2, 1, 70, 600, 16, 16), (70, 600), softcap=4.0, quick=False),
    _case("L1x1000 D128, 8 heads on 2", (1, 8, 2, 1, 1000, 128, 128)),
    # A few queries, as generation asks with.
    _case("L4x130 D72, Dv 48 of [B, L, H, D], bias", (2, 4, 2, 4, 130, 72, 48), (4, 130), packed=True),
    _case("L3x130 D33, Dv 40, causal, bottom right", (2, 2, 2, 3, 130, 33, 40), bottom_right=True),
    # What docs/benchmarks times against torch.
    _case("B8 H8 L128 D64", _square(8, 8, 128), quick=False, benchmark=_FLOAT32),
    _case("B1 H8 L1024 D64", _square(1, 8, 1024), quick=False, benchmark=_BOTH),
    _case("B1 H8 L1024 D64, causal", _square(1, 8, 1024), is_causal=True, quick=False, benchmark=_BOTH),
    _case("B1 H8 L4096 D64, causal", _square(1, 8, 4096), is_causal=True, verify=False, benchmark=_FLOAT32),
    _case("B64 H8 L10 D64", _square(64, 8, 10), quick=False, benchmark=_BOTH),
    _case("B1 H12 L1x1024 D64", (1, 12, 12, 1, 1024, 64, 64), quick=False, benchmark=_BOTH),
]
