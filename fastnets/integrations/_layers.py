"""Layers that transformers has of its own; apart, because they need it to be imported."""

from torch import Tensor
from torch.nn import functional as F
from transformers import activations, pytorch_utils

from ..dispatch import leaves_linear_to_torch
from ..functional import linear


class Conv1D(pytorch_utils.Conv1D):
    """transformers' Conv1D, drop-in: a linear layer with weight [I, O]."""

    def forward(self, x: Tensor) -> Tensor:
        if leaves_linear_to_torch(x, x.numel() * self.nf):
            return super().forward(x)
        return linear(x, self.weight.t(), self.bias)


class NewGELUActivation(activations.NewGELUActivation):
    """transformers' NewGELUActivation, drop-in: the same approximation by torch's one kernel instead of eight."""

    def forward(self, input: Tensor) -> Tensor:
        return F.gelu(input, approximate="tanh")


OURS = {ours.__base__: ours for ours in (Conv1D, NewGELUActivation)}
