"""torch.nn's Transformer layers on our attention, without torch's inference shortcut."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..ops._checks import expect_tensor
from .attention import MultiheadAttention, additive
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
        if self.norm_first:
            x = src + self._sa_block(self.norm1(src), src_mask, src_key_padding_mask, is_causal=is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(src + self._sa_block(src, src_mask, src_key_padding_mask, is_causal=is_causal))
        return self.norm2(x + self._ff_block(x))


class TransformerDecoderLayer(torch.nn.TransformerDecoderLayer):
    """torch.nn.TransformerDecoderLayer, drop-in; its attentions are fastnets.nn.MultiheadAttention."""

    __init__ = _adopting(torch.nn.TransformerDecoderLayer.__init__)


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
        Linear,
        MultiheadAttention,
        TransformerEncoderLayer,
        TransformerDecoderLayer,
        TransformerEncoder,
        TransformerDecoder,
        Transformer,
    )
}
