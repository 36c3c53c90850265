"""Hugging Face transformers on our attention, `register()`, then `attn_implementation="fastnets"`, and on our linear
layers: `convert(model)`."""

import torch
from torch import Tensor

from ..convert import convert as _convert
from ..functional import scaled_dot_product_attention

__all__ = ["attention", "convert", "register"]


def register(name: str = "fastnets") -> None:
    """Makes our attention known to transformers (5.x) under `name`.

        fastnets.integrations.transformers.register()
        model = AutoModel.from_pretrained(..., attn_implementation="fastnets")

    The boolean masks of transformers' own "sdpa" are registered with it: without them padding would go unmasked.

    Raises:
        ModuleNotFoundError: transformers is not installed.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)


def convert(model: torch.nn.Module) -> torch.nn.Module:
    """fastnets.convert, and GPT-2's own layers besides.

    Its linear layer Conv1D, whose weight is [I, O], becomes ours, and NewGELUActivation one call of torch's gelu.

    Returns:
        `model`, changed in place.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        TypeError: `model` is no torch.nn.Module.
    """
    from ._layers import OURS

    for module in _convert(model).modules():
        if type(module) in OURS and "forward" not in vars(module):
            module.__class__ = OURS[type(module)]
    return model


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    **_,
) -> tuple[Tensor, None]:
    """Attention by the protocol of transformers' AttentionInterface.

    Args:
        module: the model's attention layer; where `is_causal` is None its attribute of that name counts.
        query: [B, Hq, Lq, D].
        key: [B, Hkv, Lk, D]; Hkv divides Hq.
        value: [B, Hkv, Lk, Dv].
        attention_mask: broadcastable to [B, Hq, Lq, Lk], boolean (True takes part) or additive; a causal model's mask
            has causality in it. None: causal if the layer is, unless there is one query, which sees every key.
        dropout: probability that a weight is zeroed.
        scaling: of query key^T; None means 1 / sqrt(D).
        softcap: scores become softcap * tanh(score / softcap).
        position_bias: added to the scores, as T5's; broadcastable to [B, Hq, Lq, Lk].
        s_aux: attention sinks, which our kernels do not have.

    Returns:
        [B, Lq, Hq, Dv], and None in place of the weights.

    Raises:
        NotImplementedError: the model has attention sinks.
    """
    if s_aux is not None:
        raise NotImplementedError("fastnets has no attention sinks (s_aux): use another attn_implementation")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    if position_bias is not None:
        attention_mask = _with_bias(position_bias, attention_mask, causal)
        causal = False
    out = scaled_dot_product_attention(
        query,
        key,
        value,
        attention_mask,
        dropout,
        causal,
        scaling,
        enable_gqa=key.shape[1] != query.shape[1],
        softcap=softcap or 0.0,
    )
    return out.transpose(1, 2).contiguous(), None


def _with_bias(bias: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """One additive mask of a bias [..., Lq, Lk] and what hides keys besides."""
    if causal:
        mask = torch.ones(bias.shape[-2:], dtype=torch.bool, device=bias.device).tril()
    if mask is None:
        return bias
    return torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else bias + mask
