"""torch.nn.MultiheadAttention on our attention kernels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops._checks import expect, expect_shape, expect_tensor
from ..ops.attention import attention
from ..ops.linear import linear

__all__ = ["MultiheadAttention", "additive"]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of torch.nn's kind (boolean: True is left out) as what is added to the scores."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)


class MultiheadAttention(torch.nn.MultiheadAttention):
    """torch.nn.MultiheadAttention, drop-in: the same constructor, parameters, initial values and results.

    `forward` takes what torch's takes: inputs (L, N, E), with batch_first (N, L, E), or unbatched (L, E), nested
    tensors, every form of mask. It differs in three points. A query that may look at no key gets zero attention and
    zero weights, where torch's layer gives NaN. With `is_causal=True` the mask is taken to be causal also beside a
    key_padding_mask. Bad arguments raise TypeError or ValueError by name.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of every query over the keys.

        Args:
            query: (L, N, embed_dim), or (N, L, embed_dim) with batch_first, or (L, embed_dim).
            key: (S, N, kdim), ordered as query.
            value: (S, N, vdim), ordered as query.
            key_padding_mask: (N, S), or (S,) unbatched. Boolean: True leaves out; floating: added to the scores.
            need_weights: whether to return the weights; without them memory stays linear in L and S.
            attn_mask: (L, S) or (N * num_heads, L, S). Boolean: True leaves out; floating: added to the scores.
            average_attn_weights: the weights' mean over the heads, else every head's.
            is_causal: says that attn_mask is the causal mask, which then need not be read.

        Returns:
            The output, ordered as query, and None or the weights: (N, L, S), or (N, num_heads, L, S) without averaging;
            with add_bias_kv and add_zero_attn S grows by one each.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        for tensor, name in ((query, "query"), (key, "key"), (value, "value")):
            expect_tensor(tensor, name)
        if query.is_nested:
            return self._forward_nested(query, key, value, key_padding_mask, need_weights, attn_mask, is_causal)
        sizes = self._check(query, key, value, key_padding_mask, attn_mask, is_causal)

        q, k, v = (self._split(x) for x in self._project(query, key, value))
        k, v = self._extend(k, v)
        extra = k.shape[2] - sizes[3]
        # Keys appended at the end are seen by all: then the causal mask is one like any other.
        causal = is_causal and extra == 0
        found = attention(
            q,
            k,
            v,
            mask=_merge(None if causal else attn_mask, key_padding_mask, sizes, extra, q.dtype),
            right=0 if causal else None,
            dropout=self.dropout if self.training else 0.0,
            return_weights=need_weights,
        )
        out, weights = found if need_weights else (found, None)
        batched = query.dim() == 3
        out = linear(self._join(out, batched), self.out_proj.weight, self.out_proj.bias)
        if need_weights:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        return out, weights

    def _check(self, query, key, value, key_padding_mask, attn_mask, is_causal) -> tuple[int, int, int, int]:
        """Validates the arguments; returns the sizes (N, heads, L, S)."""
        expect(query.dim() in (2, 3), "query", "2 dimensions (unbatched) or 3", f"{query.dim()}")
        batched = query.dim() == 3
        axis = 1 if batched and self.batch_first else 0
        for tensor, name, features in (
            (query, "query", self.embed_dim),
            (key, "key", self.kdim),
            (value, "value", self.vdim),
        ):
            expect(tensor.dim() == query.dim(), name, f"{query.dim()} dimensions like query", f"{tensor.dim()}")
            expect(tensor.shape[-1] == features, name, f"{features} features", f"{tensor.shape[-1]}")
            weight = self.out_proj.weight
            if tensor.dtype != weight.dtype and not torch.is_autocast_enabled(tensor.device.type):
                raise TypeError(f"{name}: expected {weight.dtype} like the layer's weights, got {tensor.dtype}")
        batch, length, source = query.shape[1 - axis] if batched else 1, query.shape[axis], key.shape[axis]
        if batched:
            expect(key.shape[1 - axis] == batch, "key", f"a batch of {batch} like query", f"{key.shape[1 - axis]}")
        expect(
            value.shape[:-1] == key.shape[:-1],
            "value",
            f"{tuple(key.shape[:-1])} like key",
            f"{tuple(value.shape[:-1])}",
        )
        for mask, name in ((key_padding_mask, "key_padding_mask"), (attn_mask, "attn_mask")):
            if mask is not None:
                expect_tensor(mask, name)
                if mask.dtype != torch.bool and not mask.is_floating_point():
                    raise TypeError(f"{name}: expected a boolean or floating-point mask, got {mask.dtype}")
        if key_padding_mask is not None:
            expect_shape(key_padding_mask, "key_padding_mask", (batch, source) if batched else (source,))
        if attn_mask is not None:
            leading = () if attn_mask.dim() == 2 else (batch * self.num_heads,)
            expect_shape(attn_mask, "attn_mask", (*leading, length, source))
        elif is_causal:
            raise ValueError("attn_mask: expected the causal mask that is_causal=True speaks of, got None")
        return batch, self.num_heads, length, source

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """The input projections, as few matrix products as the aliasing of the inputs allows."""
        embed = self.embed_dim
        if not self._qkv_same_embed_dim:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key and key is value:
            return linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        elif key is value:
            weights = self.in_proj_weight.split([embed, 2 * embed])
            biases = (None, None) if self.in_proj_bias is None else self.in_proj_bias.split([embed, 2 * embed])
            return (linear(query, weights[0], biases[0]), *linear(key, weights[1], biases[1]).chunk(2, -1))
        else:
            weights = self.in_proj_weight.chunk(3)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))

    def _split(self, x: Tensor) -> Tensor:
        """A view [N, heads, L, D] of a projection in the layer's order."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        if x.dim() == 3:
            return x.transpose(0, 1).unsqueeze(0)
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _join(self, x: Tensor, batched: bool) -> Tensor:
        """The way back from [N, heads, L, D]."""
        if not batched:
            return x.squeeze(0).transpose(0, 1).flatten(-2)
        return (x.transpose(1, 2) if self.batch_first else x.permute(2, 0, 1, 3)).flatten(-2)

    def _extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends the learned key and value, and the zero ones, where the layer has them."""
        batch, heads, _, dim = k.shape
        keys, values = [k], [v]
        if self.bias_k is not None:
            keys.append(self.bias_k.to(k.dtype).view(1, heads, 1, dim).expand(batch, -1, -1, -1))
            values.append(self.bias_v.to(v.dtype).view(1, heads, 1, dim).expand(batch, -1, -1, -1))
        if self.add_zero_attn:
            keys.append(k.new_zeros(batch, heads, 1, dim))
            values.append(v.new_zeros(batch, heads, 1, dim))
        return (k, v) if len(keys) == 1 else (torch.cat(keys, 2), torch.cat(values, 2))

    def _forward_nested(self, query, key, value, key_padding_mask, need_weights, attn_mask, is_causal):
        """Nested inputs, of (L_i, E) each: padded, masked, and nested again."""
        expect(self.batch_first, "query", "dense tensors, as batch_first is False", "a nested one")
        expect(key_padding_mask is None, "key_padding_mask", "None beside nested tensors", "a mask")
        expect(attn_mask is None and not is_causal, "attn_mask", "None beside nested tensors", "a mask")
        expect(not need_weights, "need_weights", "False beside nested tensors", "True")
        expect(key.is_nested and value.is_nested, "key, value", "nested tensors like query", "dense ones")
        lengths = [len(x) for x in query.unbind()]
        sources = torch.tensor([len(x) for x in key.unbind()], device=key.device)
        padded = {id(x): torch.nested.to_padded_tensor(x, 0.0) for x in (query, key, value)}
        key = padded[id(key)]
        out, _ = self.forward(
            padded[id(query)],
            key,
            padded[id(value)],
            torch.arange(key.shape[1], device=key.device) >= sources[:, None],
            need_weights=False,
        )
        rows = [row[:length] for row, length in zip(out, lengths, strict=True)]
        return torch.nested.as_nested_tensor(rows, layout=query.layout), None


def _merge(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    sizes: tuple[int, int, int, int],
    extra: int,
    dtype: torch.dtype,
) -> Tensor | None:
    """Both masks as one that broadcasts to [N, heads, L, S + extra]: boolean (True takes part) or additive.

    The `extra` keys at the end take part always.
    """
    batch, heads, _, source = sizes
    masks = []
    if attn_mask is not None:
        masks.append(attn_mask.unflatten(0, (batch, heads)) if attn_mask.dim() == 3 else attn_mask)
    if key_padding_mask is not None:
        masks.append(key_padding_mask.view(batch, 1, 1, source))
    if not masks:
        return None
    if all(mask.dtype == torch.bool for mask in masks):
        merged = ~(masks[0] | masks[-1])
        return F.pad(merged, (0, extra), value=True) if extra else merged
    merged = sum(additive(mask, dtype) for mask in masks).to(dtype)
    return F.pad(merged, (0, extra)) if extra else merged
