"""torch.nn's Transformer layers on our attention, without torch's inference shortcut."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..ops._checks import expect_tensor
from .attention import MultiheadAttention, additive
from .dropout import Dropout, sum_of
from .linear import Linear

__all__ = [
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]


def _adopting(construct: Callable[..., None]) -> Callable[..., None]:
    """torch's constructor `construct`; then the layers that it made, not those it was given, become ours."""

    @functools.wraps(construct)
    def __init__(self, *args, **kwargs) -> None:
        construct(self, *args, **kwargs)
        given = (*args, *kwargs.values())
        for child in self.children():
            if not any(child is one for one in given):
                for module in child.modules():
                    module.__class__ = _OURS.get(type(module), type(module))

    return __init__


def _is_causal(mask: Tensor | None, hint: bool | None) -> bool:
    """Whether the mask is the causal one: the caller's hint, or by looking; a graph being traced cannot look."""
    if hint is not None:
        return hint
    if mask is None or torch.compiler.is_compiling() or mask.dim() != 2 or mask.shape[0] != mask.shape[1]:
        return False
    later = torch.ones_like(mask, dtype=torch.bool).triu(1)
    return torch.equal(mask, later if mask.dtype == torch.bool else additive(later, mask.dtype))


def _is_replaced(layer: torch.nn.Module, name: str, base: type[torch.nn.Module]) -> bool:
    """Whether the method that torch's layer has by this name is the user's own."""
    return name in layer.__dict__ or getattr(type(layer), name) is not getattr(base, name)


def _attended(
    residual: Tensor,
    attention: torch.nn.Module,
    dropout: torch.nn.Module,
    x: Tensor,
    memory: Tensor,
    mask: Tensor | None,
    padding: Tensor | None,
    is_causal: bool,
) -> Tensor:
    """residual + dropout(attention), of x as queries and memory as keys and values."""
    masks = {"attn_mask": mask, "key_padding_mask": padding, "is_causal": is_causal}
    return sum_of(residual, dropout, attention(x, memory, memory, need_weights=False, **masks)[0])


def _fed(residual: Tensor, layer: torch.nn.Module, dropout: torch.nn.Module, x: Tensor) -> Tensor:
    """residual + dropout(the layer's feed-forward network of x)."""
    return sum_of(residual, dropout, layer.linear2(layer.dropout(layer.activation(layer.linear1(x)))))


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer, drop-in; its self_attn is a fastnets.nn.MultiheadAttention.

    There is one path, in training and in evaluation: torch's fused inference kernel is not used.
    """

    __init__ = _adopting(torch.nn.TransformerEncoderLayer.__init__)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Self-attention and feed-forward network, each with its residual and normalisation.

        Args:
            src: (L, N, d_model), or (N, L, d_model) with batch_first, or (L, d_model), or a nested tensor.
            src_mask: (L, L) or (N * nhead, L, L); boolean (True leaves out) or additive.
            src_key_padding_mask: (N, L), or (L,) unbatched; boolean (True leaves out) or additive.
            is_causal: says that src_mask is the causal mask.

        Returns:
            A tensor of src's shape.
        """
        masks = src_mask, src_key_padding_mask, is_causal
        if self.norm_first:
            x = self._attended(src, self.norm1(src), *masks)
            return self._fed(x, self.norm2(x))
        x = self.norm1(self._attended(src, src, *masks))
        return self.norm2(self._fed(x, x))

    def _attended(self, residual: Tensor, x: Tensor, mask, padding, is_causal: bool) -> Tensor:
        if _is_replaced(self, "_sa_block", torch.nn.TransformerEncoderLayer):
            return residual + self._sa_block(x, mask, padding, is_causal=is_causal)
        return _attended(residual, self.self_attn, self.dropout1, x, x, mask, padding, is_causal)

    def _fed(self, residual: Tensor, x: Tensor) -> Tensor:
        if _is_replaced(self, "_ff_block", torch.nn.TransformerEncoderLayer):
            return residual + self._ff_block(x)
        return _fed(residual, self, self.dropout2, x)


class TransformerDecoderLayer(torch.nn.TransformerDecoderLayer):
    """torch.nn.TransformerDecoderLayer, drop-in; its attentions are fastnets.nn.MultiheadAttention."""

    __init__ = _adopting(torch.nn.TransformerDecoderLayer.__init__)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Self-attention, attention to memory and feed-forward network, each with its residual and normalisation.

        Args:
            tgt: (T, N, d_model), or (N, T, d_model) with batch_first, or (T, d_model).
            memory: the encoder's output, (S, N, d_model), (N, S, d_model) or (S, d_model).
            tgt_mask, memory_mask: (T, T) and (T, S), or N * nhead of them; boolean (True leaves out) or additive.
            tgt_key_padding_mask, memory_key_padding_mask: (N, T) and (N, S), or (T,) and (S,) unbatched; likewise.
            tgt_is_causal, memory_is_causal: say that the mask is the causal mask.

        Returns:
            A tensor of tgt's shape.
        """
        masks = tgt_mask, tgt_key_padding_mask, tgt_is_causal
        memory_masks = memory_mask, memory_key_padding_mask, memory_is_causal
        if self.norm_first:
            x = self._attended(tgt, self.norm1(tgt), *masks)
            x = self._remembered(x, self.norm2(x), memory, *memory_masks)
            return self._fed(x, self.norm3(x))
        x = self.norm1(self._attended(tgt, tgt, *masks))
        x = self.norm2(self._remembered(x, x, memory, *memory_masks))
        return self.norm3(self._fed(x, x))

    def _attended(self, residual: Tensor, x: Tensor, mask, padding, is_causal: bool) -> Tensor:
        if _is_replaced(self, "_sa_block", torch.nn.TransformerDecoderLayer):
            return residual + self._sa_block(x, mask, padding, is_causal)
        return _attended(residual, self.self_attn, self.dropout1, x, x, mask, padding, is_causal)

    def _remembered(self, residual: Tensor, x: Tensor, memory: Tensor, mask, padding, is_causal: bool) -> Tensor:
        if _is_replaced(self, "_mha_block", torch.nn.TransformerDecoderLayer):
            return residual + self._mha_block(x, memory, mask, padding, is_causal)
        return _attended(residual, self.multihead_attn, self.dropout2, x, memory, mask, padding, is_causal)

    def _fed(self, residual: Tensor, x: Tensor) -> Tensor:
        if _is_replaced(self, "_ff_block", torch.nn.TransformerDecoderLayer):
            return residual + self._ff_block(x)
        return _fed(residual, self, self.dropout3, x)


class TransformerEncoder(torch.nn.TransformerEncoder):
    """torch.nn.TransformerEncoder, drop-in; clones of a torch.nn.TransformerEncoderLayer become ours.

    It never turns padded input into nested tensors, so padded positions hold the same values in training and in
    evaluation (where torch's may be zero).
    """

    __init__ = _adopting(torch.nn.TransformerEncoder.__init__)

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """The layers in turn, then the final normalisation.

        Args:
            src: (L, N, d_model), or (N, L, d_model) with batch_first, or (L, d_model), or a nested tensor.
            mask: (L, L) or (N * nhead, L, L); boolean (True leaves out) or additive.
            src_key_padding_mask: (N, L), or (L,) unbatched; boolean (True leaves out) or additive.
            is_causal: says that mask is the causal mask; None looks (but not while a graph is traced).

        Returns:
            A tensor of src's shape.
        """
        expect_tensor(src, "src")
        is_causal = _is_causal(mask, is_causal)
        # Layers of the user's own may rely on additive masks, which is what torch's encoder hands on.
        mask, src_key_padding_mask = (m if m is None else additive(m, src.dtype) for m in (mask, src_key_padding_mask))
        x = src
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=is_causal, src_key_padding_mask=src_key_padding_mask)
        return x if self.norm is None else self.norm(x)


class TransformerDecoder(torch.nn.TransformerDecoder):
    """torch.nn.TransformerDecoder, drop-in; clones of a torch.nn.TransformerDecoderLayer become ours."""

    __init__ = _adopting(torch.nn.TransformerDecoder.__init__)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """As torch's; a causal tgt_mask is recognised, save while a graph is traced."""
        return super().forward(
            tgt,
            memory,
            tgt_mask,
            memory_mask,
            tgt_key_padding_mask,
            memory_key_padding_mask,
            _is_causal(tgt_mask, tgt_is_causal),
            memory_is_causal,
        )


class Transformer(torch.nn.Transformer):
    """torch.nn.Transformer, drop-in; custom_encoder and custom_decoder stay what they are."""

    __init__ = _adopting(torch.nn.Transformer.__init__)


_OURS = {
    ours.__base__: ours
    for ours in (
        Dropout,
        Linear,
        MultiheadAttention,
        TransformerEncoderLayer,
        TransformerDecoderLayer,
        TransformerEncoder,
        TransformerDecoder,
        Transformer,
    )
}
