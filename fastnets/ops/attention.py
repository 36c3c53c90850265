"""Scaled dot-product attention: validation, autograd, fake kernels."""

import math
from itertools import pairwise, zip_longest

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant

from .. import _library, dispatch
from ..reference.attention import Options
from ..reference.attention import attention as reference
from ..reference.philox import draw_seed
from . import _autocast, _autograd
from ._checks import expect, expect_broadcastable, expect_floating, expect_like, expect_shape, expect_tensor
from ._plan import Metadata, planned
from ._precision import matmul_allows_tf32


class _Attention(_autograd.Call):
    """Inputs: q, k, v, mask of 4 dimensions, and without gradients slopes [B, Hq], seed, starts_q, starts_k."""

    def __init__(self, operators, options: Options, lse: bool, weights: bool):
        self.operators, self.options, self.lse, self.weights = operators, options, lse, weights
        self.visible = 1 + lse + weights

    def forward(self, q, k, v, mask, *extra):
        q, k, v = _rows(q), _rows(k), _rows(v)
        out, log2_sum = self.operators.attention_forward(q, k, v, mask, *extra, *self.options)
        lse = (log2_sum * math.log(2.0),) if self.lse else ()
        weights = ()
        if self.weights:
            weights = (self.operators.attention_weights(q, k, log2_sum, mask, *extra[:2], *self.options),)
        return out, *lse, *weights, log2_sum

    def backward(self, inputs, outputs, grads, needs):
        q, k, v, mask, *extra = inputs
        out, log2_sum = outputs[0], outputs[-1]
        grad_out, grad_lse = grads[0], grads[1] if self.lse else None
        row_bias = needs[3] and mask.size(3) == 1
        grad_mask = _row_bias_gradient(mask, log2_sum, grad_lse) if row_bias else None
        grad_weights = grads[-1] if self.weights else None
        grad_out = torch.zeros_like(out) if grad_out is None else _rows(grad_out)
        if grad_weights is not None:
            # The softmax subtracts from every row what it weighs on average, as a gradient of lse adds to it.
            inner = (outputs[self.visible - 1].to(log2_sum.dtype) * grad_weights).sum(-1)
            grad_lse = -inner if grad_lse is None else grad_lse - inner
            grad_weights = grad_weights.contiguous()
        grad_lse = None if grad_lse is None else grad_lse.contiguous()
        found = self.operators.attention_backward(
            grad_out,
            grad_lse,
            grad_weights,
            _rows(q),
            _rows(k),
            _rows(v),
            out,
            log2_sum,
            mask,
            *extra,
            *self.options,
            needs[3] and not row_bias,
            torch.are_deterministic_algorithms_enabled(),
        )
        return (*found[:3], found[3] if needs[3] and not row_bias else grad_mask, None, None, None, None)

    def reference(self, *inputs):
        return _asked(reference(*inputs, self.options), self.lse, self.weights)


def _asked(results: tuple[Tensor, Tensor, Tensor], lse: bool, weights: bool) -> tuple[Tensor, ...]:
    """Of out, lse and weights those that were asked for."""
    return results[:1] + (results[1:2] if lse else ()) + (results[2:] if weights else ())


def _row_bias_gradient(mask: Tensor, log2_sum: Tensor, grad_lse: Tensor | None) -> Tensor:
    """The gradient of a mask that is the same for all keys of a row: no weight depends on it, and lse grows as it does.

    Summed over the keys it would be rounding alone.
    """
    if grad_lse is None:
        return torch.zeros_like(mask)
    rows = torch.where(log2_sum == -math.inf, 0.0, grad_lse).unsqueeze(-1)
    return rows.sum_to_size(mask.shape).to(mask.dtype)


def _rows(x: Tensor) -> Tensor:
    """x with contiguous rows, which is all that the kernels ask for."""
    return x if x.stride(-1) == 1 or x.size(-1) == 1 else x.contiguous()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    left: int | None = None,
    right: int | None = None,
    offset: int | None = 0,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    dropout: float = 0.0,
    starts_q: Tensor | None = None,
    starts_k: Tensor | None = None,
    return_lse: bool = False,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Attention of four-dimensional tensors, with every option; fastnets.functional has the public forms.

    Args:
        q: [B, Hq, Lq, D]; float32, float64, bfloat16 or float16. Any strides; contiguous rows save a copy.
        k: [B, Hkv, Lk, D]; Hkv divides Hq, and neighbouring query heads share one of k and v.
        v: [B, Hkv, Lk, Dv].
        mask: broadcastable to [B, Hq, Lq, Lk]; boolean (True takes part), or additive in q's dtype or float32, with
            gradient.
        scale: of q k^T; None means 1 / sqrt(D).
        left, right, offset: query i sees the keys i + offset - left <= j <= i + offset + right; None lifts the bound.
            left = None, right = 0, offset = 0 is torch's is_causal; offset = None means Lk - Lq.
        softcap: scores become softcap * tanh(score / softcap), before mask and bias; 0 means none.
        alibi_slopes: [Hq] or [B, Hq]: the bias -slope * |i + offset - j|. Without gradient.
        dropout: probability that a weight is zeroed. The random numbers come from torch's generator through a seed and
            depend on nothing but it and the weight's position, so that they are the same on every backend.
        starts_q, starts_k: int32 or int64 [N + 1]; B is 1 and the rows are N sequences one after the other, each from
            its start to the next. Not with mask and return_weights.
        return_lse: also lse [B, Hq, Lq], the natural logarithm of each row's sum of exp(score), with gradient; float64
            for float64, else float32.
        return_weights: also the softmax weights [B, Hq, Lq, Lk] (after dropout), with gradient.

    Returns:
        out [B, Hq, Lq, Dv], or a tuple of out and what was asked for besides, in the order of the arguments. A row that
        sees nothing gives zeros, an lse of -inf, zero weights and zero gradients.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    additive = mask is not None and isinstance(mask, Tensor) and mask.is_floating_point()
    q, k, v, bias = _autocast.lower(q, k, v, mask if additive else None)
    mask = bias if additive else mask
    mask = mask if mask is None else _as_four(mask)
    varlen = starts_q is not None or starts_k is not None
    if varlen:
        expect(starts_q is not None and starts_k is not None, "cu_seqlens", "both of them or none", "one")
        starts_q = _check_starts(starts_q, "cu_seqlens_q", q)
        starts_k = _check_starts(starts_k, "cu_seqlens_k", k)
        expect_shape(starts_k, "cu_seqlens_k", starts_q.shape)
    if alibi_slopes is not None:
        alibi_slopes = _check_slopes(alibi_slopes, q, starts_q.numel() - 1 if varlen else q.size(0))

    tf32 = q.dtype == torch.float32 and matmul_allows_tf32()
    scale = None if scale is None else float(scale)
    options, case = _plan(
        *(Metadata.of(q), Metadata.of(k), Metadata.of(v), Metadata.of(mask)),
        mask is not None and mask.requires_grad,
        alibi_slopes is not None,
        varlen,
        return_lse,
        return_weights,
        *(scale, float(softcap), left, right, offset, float(dropout), tf32),
    )
    if q.size(1) == 0:  # no query head shares the heads of k and v: the kernels need not see them
        k, v = k[:, :0], v[:, :0]
    seed = draw_seed(q.device) if dropout else None
    inputs = (q, k, v, mask, alibi_slopes, seed, starts_q, starts_k)
    implementation = dispatch.select(case)
    if implementation.operators is None:
        found = _asked(reference(*inputs, options), return_lse, return_weights)
    else:
        found = _autograd.run(_Attention(implementation.operators, options, return_lse, return_weights), *inputs)
    return found if len(found) > 1 else found[0]


@planned
def _plan(
    q, k, v, mask, bias_gradient, slopes, varlen, lse, weights, scale, softcap, left, right, offset, dropout, tf32
):
    """The kernels' options and the case; `q` to `mask`: Metadata."""
    _check_heads(q, k, v)
    expect(0.0 <= dropout <= 1.0, "dropout_p", "a probability in [0, 1]", dropout)
    expect(softcap >= 0.0, "softcap", "a number that is not negative", softcap)
    if mask is not None:
        _check_mask(mask, q, k)
    if varlen:
        expect(q.size(0) == 1, "query", "a batch of 1 with cu_seqlens", q.size(0))
        expect(mask is None, "attn_mask", "None with cu_seqlens", "a mask")
        expect(not weights, "return_weights", "False with cu_seqlens", weights)
    if scale is None:
        scale = q.size(3) ** -0.5 if q.size(3) else 1.0
    used = {
        "mask": mask is not None,
        "bias gradient": bias_gradient,
        "alibi": slopes,
        "varlen": varlen,
        "softcap": softcap != 0.0,
        "window": left is not None or right is not None,
        "dropout": dropout != 0.0,
        "lse": lse,
        "weights": weights,
    }
    _, heads, rows, width = q.shape
    _, shared, keys, v_width = *k.shape[:3], v.size(3)
    shared = shared if heads else 0
    sizes = {"D": width, "Dv": v_width, "Lq": rows, "Lk": keys, "Hq": heads, "Hkv": shared}
    case = dispatch.Case("attention", q.device.type, q.dtype, frozenset(n for n, on in used.items() if on), sizes)
    return Options(scale, softcap, left, right, offset, dropout, tf32), case


def _check_heads(q: Metadata, k: Metadata, v: Metadata) -> None:
    expect_floating(q, "query")
    for name, tensor in (("query", q), ("key", k), ("value", v)):
        expect(tensor.dim() == 4, name, "4 dimensions [B, H, L, D]", tensor)
    expect_like(k, "key", q, "query")
    expect_like(v, "value", q, "query")
    batch, heads, _, width = q.shape
    k_batch, shared, length, k_width = k.shape
    expect(k_batch == batch, "key", f"a batch of {batch} like query's", k)
    expect(k_width == width, "key", f"a last dimension of {width} like query's", k)
    expect_shape(v, "value", (k_batch, shared, length, v.size(3)))
    fits = heads % shared == 0 if shared else heads == 0
    expect(fits, "key", f"a number of heads that divides query's {heads}", shared)


def _as_four(mask: Tensor) -> Tensor:
    """The mask with leading dimensions of one."""
    expect_tensor(mask, "attn_mask")
    return mask if mask.dim() >= 4 else mask[(None,) * (4 - mask.dim())]


def _check_mask(mask: Metadata, q: Metadata, k: Metadata) -> None:
    if mask.dtype not in (torch.bool, torch.float32, q.dtype):
        raise TypeError(f"attn_mask: expected bool, float32 or {q.dtype} like query, got {mask.dtype}")
    expect(mask.device == q.device, "attn_mask", f"device {q.device} like query", mask.device)
    expect_broadcastable(mask, "attn_mask", (*q.shape[:3], k.size(2)))


def _check_slopes(slopes: Tensor, q: Tensor, batch: int) -> Tensor:
    expect_tensor(slopes, "alibi_slopes")
    expect_floating(slopes, "alibi_slopes")
    expect(slopes.device == q.device, "alibi_slopes", f"device {q.device} like query", slopes.device)
    heads = q.size(1)
    fits = tuple(slopes.shape) in ((heads,), (batch, heads))
    expect(fits, "alibi_slopes", f"shape {(heads,)} or {(batch, heads)}", tuple(slopes.shape))
    return slopes.detach().to(torch.float64 if q.dtype == torch.float64 else torch.float32).expand(batch, heads)


def _check_starts(starts: Tensor, name: str, x: Tensor) -> Tensor:
    expect_tensor(starts, name)
    if starts.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected int32 or int64, got {starts.dtype}")
    expect(starts.dim() == 1 and starts.numel() > 0, name, "one dimension with an element", tuple(starts.shape))
    expect(starts.device == x.device, name, f"device {x.device} like query", starts.device)
    if not torch.compiler.is_compiling():  # a graph cannot look at values; the kernels guard memory by themselves
        values = starts.tolist()
        rises = all(a <= b for a, b in pairwise(values))
        fits = rises and values[0] == 0 and values[-1] == x.size(2)
        expect(fits, name, f"ascending values from 0 to {x.size(2)}", values)
    return starts.long().contiguous()


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    window_size: tuple[int | None, int | None] | None,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Brings torch's many forms of arguments to `attention`'s; see fastnets.functional."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor) or tensor.dim() < 2:
            expect_tensor(tensor, name)
            expect(False, name, "at least 2 dimensions [..., L, D]", tensor)
    left, right = _bounds(window_size, is_causal)
    offset: int | None = 0
    if attn_mask is not None:
        expect(not is_causal, "attn_mask", "None where is_causal is True", "a mask")
        if isinstance(attn_mask, CausalBias):
            sizes = (attn_mask.seq_len_q, attn_mask.seq_len_kv)
            lengths = (query.size(-2), key.size(-2))
            expect(sizes == lengths, "attn_mask", f"a causal bias for lengths {lengths}", f"one for {sizes}")
            offset = 0 if attn_mask.variant == CausalVariant.UPPER_LEFT else None
            attn_mask, right = None, 0 if right is None else min(right, 0)
    options = {
        "dropout": dropout_p,
        "scale": scale,
        "left": left,
        "right": right,
        "offset": offset,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "return_lse": return_lse,
    }
    of_q, of_k, of_v = query.shape, key.shape, value.shape
    alike = len(of_q) == len(of_k) == len(of_v) == 4 and of_q[0] == of_k[0] == of_v[0] and of_k[1] == of_v[1] > 0
    if alike and (of_q[1] == of_k[1] or enable_gqa):
        return attention(query, key, value, mask=attn_mask, **options)
    return _broadcast(query, key, value, attn_mask, enable_gqa, options)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    window_size: tuple[int | None, int | None] | None,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Packed sequences [total, H, D] are a batch of one to `attention`; see fastnets.functional."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        expect_tensor(tensor, name)
        expect(tensor.dim() == 3, name, "3 dimensions [total, H, D]", tensor)
    expect_tensor(cu_seqlens_q, "cu_seqlens_q")
    expect_tensor(cu_seqlens_k, "cu_seqlens_k")
    left, right = _bounds(window_size, is_causal)
    q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))
    found = attention(
        q,
        k,
        v,
        scale=scale,
        left=left,
        right=right,
        offset=None,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        dropout=dropout_p,
        starts_q=cu_seqlens_q,
        starts_k=cu_seqlens_k,
        return_lse=return_lse,
    )
    if isinstance(found, tuple):
        return found[0][0].transpose(0, 1), found[1][0]
    return found[0].transpose(0, 1)


def _bounds(window_size: tuple[int | None, int | None] | None, is_causal: bool) -> tuple[int | None, int | None]:
    """(left, right) of a window that is causal besides where `is_causal`."""
    left, right = (None, None) if window_size is None else _check_window(window_size)
    if is_causal:
        right = 0
    return left, right


def _check_window(window_size) -> tuple[int | None, int | None]:
    expected = "(left, right), each None or an integer that is not negative"
    if not isinstance(window_size, tuple | list):
        raise TypeError(f"window_size: expected {expected}, got {type(window_size).__name__}")
    expect(len(window_size) == 2, "window_size", expected, window_size)
    for size in window_size:
        if size is not None and (isinstance(size, bool) or not isinstance(size, int | torch.SymInt)):
            raise TypeError(f"window_size: expected {expected}, got {window_size}")
        expect(size is None or size >= 0, "window_size", expected, window_size)
    return window_size[0], window_size[1]


def _broadcast(query, key, value, attn_mask, enable_gqa: bool, options):
    """As torch's: leading dimensions broadcast, the third from the end holds the heads."""
    dims = max(query.dim(), key.dim(), value.dim(), 3)
    if enable_gqa:
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            expect(tensor.dim() >= 3, name, "at least 3 dimensions with enable_gqa", tensor)
    q, k, v = (t[(None,) * (dims - t.dim())] for t in (query, key, value))
    batch = _joint((q.shape[:-3], k.shape[:-3], v.shape[:-3]))
    heads = q.size(-3)
    if enable_gqa:
        for name, t in (("key", k), ("value", v)):
            fits = t.size(-3) > 0 and heads % t.size(-3) == 0
            expect(fits, name, f"a number of heads that divides query's {heads}", t.size(-3))
        if k.size(-3) != v.size(-3):
            k, v = (t.repeat_interleave(heads // t.size(-3), -3) for t in (k, v))
    else:
        (heads,) = _joint(((q.size(-3),), (k.size(-3),), (v.size(-3),)))
    rows = 1
    for size in batch:
        rows *= size

    def fold(t: Tensor, heads: int) -> Tensor:
        return t.expand(*batch, heads, -1, -1).reshape(rows, heads, *t.shape[-2:])

    shared = k.size(-3) if k.size(-3) == v.size(-3) and k.size(-3) > 0 else heads
    q, k, v = fold(q, heads), fold(k, shared), fold(v, shared)
    if attn_mask is not None:
        expect_tensor(attn_mask, "attn_mask")
        expect_broadcastable(attn_mask, "attn_mask", (*batch, heads, q.size(2), k.size(2)))
        attn_mask = attn_mask[(None,) * (dims - attn_mask.dim())]
        if any(size != 1 for size in attn_mask.shape[:-3]):
            attn_mask = attn_mask.expand(*batch, -1, -1, -1)
        attn_mask = attn_mask.reshape(-1 if attn_mask.numel() else rows, *attn_mask.shape[-3:])
    found = attention(q, k, v, mask=attn_mask, **options)
    lead = (*batch, heads) if max(query.dim(), key.dim(), value.dim()) > 2 else ()
    if isinstance(found, tuple):
        return tuple(t.reshape(*lead, *t.shape[2:]) for t in found)
    return found.reshape(*lead, *found.shape[2:])


def _joint(shapes) -> tuple[int, ...]:
    """The shape that batch dimensions broadcast to."""
    joint = []
    for sizes in zip_longest(*(reversed(shape) for shape in shapes), fillvalue=1):
        wide = [size for size in sizes if size != 1]
        same = all(size == wide[0] for size in wide)
        got = tuple(tuple(shape) for shape in shapes)
        expect(same, "query, key, value", "batch dimensions that broadcast together", got)
        joint.append(wide[0] if wide else 1)
    return tuple(reversed(joint))


def _like(x: Tensor, *sizes: int) -> Tensor:
    """Empty, of the given sizes, with its first three dimensions in memory in the order of x's."""
    order = sorted(range(3), key=lambda d: -x.stride(d))
    data = x.new_empty([sizes[d] for d in order] + [sizes[3]])
    return data.permute(*(order.index(d) for d in range(3)), 3)


if _library.missing is None:

    def _lse_dtype(q):
        return torch.float64 if q.dtype == torch.float64 else torch.float32

    @torch.library.register_fake("fastnets::attention_forward")
    def _(q, k, v, *others):
        return _like(q, *q.shape[:3], v.size(3)), q.new_empty(q.shape[:3], dtype=_lse_dtype(q))

    @torch.library.register_fake("fastnets::attention_weights")
    def _(q, k, *others):
        return q.new_empty((*q.shape[:3], k.size(2)))

    @torch.library.register_fake("fastnets::attention_backward")
    def _(grad_out, grad_lse, grad_weights, q, k, v, out, lse, mask, *others):
        grad_mask = mask.new_empty(mask.shape) if others[-2] else q.new_empty((0,))
        return _like(q, *q.shape), _like(k, *k.shape), _like(v, *v.shape), grad_mask
