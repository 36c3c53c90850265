"""What depends on no element of a tensor is checked and worked out once for all calls alike."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

_KEPT = 1024
"""Plans that a function keeps; past them it starts again with none."""


class Metadata(NamedTuple):
    """Of a tensor, what a plan may depend on."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(tensor: Tensor | None) -> "Metadata | None":
        return None if tensor is None else Metadata(tensor.shape, tensor.dtype, tensor.device)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int) -> int:
        return self.shape[dim]


def planned(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps what `function` returns for its arguments: Metadata, numbers of settled type (1 is True is 1.0 here),
    strings and tuples of them. What it raises is raised anew."""
    kept: dict[tuple, Any] = {}

    @functools.wraps(function)
    def plan(*of: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*of)
        try:
            found = kept.get(of)
        except TypeError:  # symbolic sizes have no hash
            return function(*of)
        if found is None:
            found = function(*of)
            if len(kept) >= _KEPT:
                kept.clear()
            kept[of] = found
        return found

    return plan
