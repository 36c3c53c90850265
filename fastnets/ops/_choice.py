"""What of a tensor the choice of a backend may depend on."""

import torch
from torch import Tensor
from torch.nn import Parameter


def elements(x: Tensor) -> int:
    """How many x has; 0 in a graph for any number, which a choice by them would settle: it gets PyTorch's operator."""
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import has_static_value  # slow to import, where nobody compiles

        if not has_static_value(x.numel()):
            return 0
    return x.numel()


def is_plain(t: Tensor) -> bool:
    """Whether it is a tensor with strides and no class of its own: others have their own notion of an operator."""
    typical = type(t) in (Tensor, Parameter) or torch.compiler.is_compiling()
    return typical and t.layout is torch.strided and not t.is_nested
