"""The networks built on attention. `layers` is fastnets.nn, or torch.nn for the twin."""

import torch
from torch import Tensor, nn

from .data import END, LANGUAGES, LETTERS, LONGEST_SPELLING, LONGEST_WORD, PAD, PHONES, SPELLING, START

_PHONES = len(PHONES) + 3
"""The phones, PAD, START and END."""


class _Positions(nn.Module):
    """Ids [B, L] -> the sum of their embeddings and of learned positions [B, L, width]."""

    def __init__(self, vocabulary: int, longest: int, width: int):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(longest, width))

    def forward(self, ids: Tensor) -> Tensor:
        return self.tokens(ids) + self.positions[: ids.shape[1]]


def _future(length: int, device: torch.device) -> Tensor:
    """True above the diagonal: what a step of the target must not see."""
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)


class Transformer(nn.Module):
    """Letters [B, S] and the phones so far [B, T] -> scores of the next phone [B, T, 42]; padding is a token."""

    def __init__(self, layers, width: int = 128, heads: int = 4, depth: int = 2, longest: int = 16):
        super().__init__()
        self.source = _Positions(len(SPELLING) + 1, longest, width)
        self.target = _Positions(_PHONES, longest, width)
        self.transformer = layers.Transformer(width, heads, depth, depth, 4 * width, batch_first=True)
        self.head = layers.Linear(width, _PHONES)

    def forward(self, letters: Tensor, phones: Tensor) -> Tensor:
        future = _future(phones.shape[1], phones.device)
        x = self.transformer(self.source(letters), self.target(phones), tgt_mask=future, tgt_is_causal=True)
        return self.head(x)


class TransformerMasked(nn.Module):
    """Letters [B, S] and the phones so far [B, T] -> scores of the next phone [B, T, 42]; padding is masked."""

    def __init__(self, layers, width: int = 512, heads: int = 8, depth: int = 2, longest: int = 16):
        super().__init__()
        self.source = _Positions(len(SPELLING) + 1, longest, width)
        self.target = _Positions(_PHONES, longest, width)
        self.encoder = layers.TransformerEncoder(
            layers.TransformerEncoderLayer(width, heads, 4 * width, batch_first=True), depth, enable_nested_tensor=False
        )
        self.decoder = layers.TransformerDecoder(
            layers.TransformerDecoderLayer(width, heads, 4 * width, batch_first=True), depth
        )
        self.head = layers.Linear(width, _PHONES)

    def forward(self, letters: Tensor, phones: Tensor) -> Tensor:
        unused = letters == PAD
        memory = self.encoder(self.source(letters), src_key_padding_mask=unused)
        x = self.decoder(
            self.target(phones),
            memory,
            tgt_mask=_future(phones.shape[1], phones.device),
            tgt_key_padding_mask=phones == PAD,
            memory_key_padding_mask=unused,
        )
        return self.head(x)


class Attention(nn.Module):
    """Letter ids [B, T] -> scores of the languages [B, 8].

    softmax(Q K^T / sqrt(d_k)) V alone, then with several heads, each added to its input; the mean over the letters.
    """

    def __init__(self, layers, width: int = 128, heads: int = 4):
        super().__init__()
        self.attend = layers.functional.scaled_dot_product_attention
        self.letters = _Positions(len(LETTERS) + 1, LONGEST_WORD, width)
        self.qkv = layers.Linear(width, 3 * width)
        self.several = layers.MultiheadAttention(width, heads, batch_first=True)
        self.head = layers.Linear(width, len(LANGUAGES))

    def forward(self, letters: Tensor) -> Tensor:
        x = self.letters(letters)
        used = letters != PAD
        alone = self.attend(*self.qkv(x).chunk(3, dim=-1), attn_mask=used[:, None, :])
        x = torch.relu(x + alone)
        several, _ = self.several(x, x, x, key_padding_mask=~used, need_weights=False)
        x = torch.relu(x + several).masked_fill(~used[..., None], 0)
        return self.head(x.sum(1) / used.sum(1, keepdim=True))


@torch.no_grad()
def pronounce(model: nn.Module, word: str) -> str:
    """How a trained Transformer says a word of at most eight letters: the likeliest phone each time."""
    device = next(model.parameters()).device
    letters = torch.zeros(1, LONGEST_SPELLING, dtype=torch.int64, device=device)
    letters[0, : len(word)] = torch.tensor([1 + SPELLING.index(letter) for letter in word])
    said = [START]
    while len(said) <= LONGEST_SPELLING:
        phone = int(model(letters, torch.tensor([said], device=device))[0, -1].argmax())
        if phone in (PAD, START, END):
            break
        said.append(phone)
    return " ".join(PHONES[phone - 3] for phone in said[1:])
