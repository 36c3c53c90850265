"""torch.nn.Linear on our kernels."""

import torch
from torch import Tensor

from ..ops.linear import linear

__all__ = ["Linear"]


class Linear(torch.nn.Linear):
    """torch.nn.Linear, drop-in: the same constructor, parameters, initial values, state_dict and repr."""

    def forward(self, input: Tensor) -> Tensor:
        own = self._parameters  # Module.__getattr__ takes a tenth of a small layer's time
        if "weight" in own and "bias" in own:
            return linear(input, own["weight"], own["bias"])
        return linear(input, self.weight, self.bias)  # parametrized, pruned
