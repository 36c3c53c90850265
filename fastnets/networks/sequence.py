"""The recurrent networks. `layers` is fastnets.nn, or torch.nn for the twin."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .data import LANGUAGES, LETTERS, TRIGRAMS


def _one_hot(letters: Tensor, dtype: torch.dtype) -> Tensor:
    """Letter ids [B, T] -> [B, T, len(LETTERS)]; padding (0) becomes zeros."""
    return F.one_hot(letters, len(LETTERS) + 1)[..., 1:].to(dtype)


class Rnn(nn.Module):
    """Letter ids [B, T] -> scores of the languages [B, 8], from the last state of a plain RNN."""

    def __init__(self, layers, hidden: int = 128):
        super().__init__()
        self.rnn = layers.RNN(len(LETTERS), hidden, batch_first=True)
        self.head = layers.Linear(hidden, len(LANGUAGES))

    def forward(self, letters: Tensor) -> Tensor:
        _, last = self.rnn(_one_hot(letters, self.head.weight.dtype))
        return self.head(last[-1])


class LstmClassifier(nn.Module):
    """Letter ids [B, T] -> scores of the languages [B, 8], from the last step of two LSTM layers.

    `options` are of the LSTM; with fastnets' layers those that torch's lacks, too.
    """

    def __init__(self, layers, hidden: int = 128, **options):
        super().__init__()
        self.lstm = layers.LSTM(len(LETTERS), hidden, 2, batch_first=True, **options)
        self.head = layers.Linear(hidden, len(LANGUAGES))

    def forward(self, letters: Tensor) -> Tensor:
        x = _one_hot(letters, self.head.weight.dtype)
        h0 = x.new_zeros(self.lstm.num_layers, len(x), self.lstm.hidden_size)
        c0 = torch.zeros_like(h0)
        steps, _ = self.lstm(x, (h0, c0))
        return self.head(steps[:, -1])


class LstmText(nn.Module):
    """Token ids [B, 100] -> a probability [B, 1]."""

    def __init__(self, layers, hidden: int = 64):
        super().__init__()
        self.embedding = nn.Embedding(TRIGRAMS, 64)
        self.lstm = layers.LSTM(64, hidden, batch_first=True)
        self.head = layers.Linear(hidden, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        _, (last, _) = self.lstm(self.embedding(tokens))
        return torch.sigmoid(self.head(last[-1]))
