"""GPT-2's linear layer; apart, because it needs transformers to be imported."""

from torch import Tensor
from transformers import pytorch_utils

from ..dispatch import is_small_linear
from ..functional import linear

THEIRS = pytorch_utils.Conv1D


class Conv1D(THEIRS):
    """transformers' Conv1D, drop-in: a linear layer with weight [I, O]."""

    def forward(self, x: Tensor) -> Tensor:
        if is_small_linear(x.numel() * self.nf):
            return super().forward(x)
        return linear(x, self.weight.t(), self.bias)
