"""The words of every complaint about an argument: its name, what was expected, what came."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ._plan import Metadata

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class ShapeError(ValueError, RuntimeError):
    """A bad size or value where PyTorch's own operator raises RuntimeError."""


class DtypeError(TypeError, RuntimeError):
    """A bad dtype where PyTorch's own operator raises RuntimeError."""


def expect_tensor(value: Any, name: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")


def expect(condition: bool, name: str, expected: str, got: Any) -> None:
    """Raises ValueError naming the argument unless the condition holds; `got` may be a tensor, whose shape is named."""
    if not condition:
        # Here, so that a good call puts no shape in words.
        what = f"shape {tuple(got.shape)}" if isinstance(got, (Tensor, Metadata)) else got
        raise ValueError(f"{name}: expected {expected}, got {what}")


def expect_floating(tensor: Tensor | Metadata, name: str) -> None:
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {tensor.dtype}")


def expect_like(tensor: Tensor | Metadata, name: str, model: Tensor | Metadata, model_name: str) -> None:
    """The tensor must share dtype and device with `model`."""
    if tensor.dtype != model.dtype:
        raise TypeError(f"{name}: expected {model.dtype} like {model_name}, got {tensor.dtype}")
    if tensor.device != model.device:
        raise ValueError(f"{name}: expected device {model.device} like {model_name}, got {tensor.device}")


def expect_shape(tensor: Tensor | Metadata, name: str, shape: Iterable[int]) -> None:
    shape = tuple(shape)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")


def expect_broadcastable(tensor: Tensor | Metadata, name: str, shape: Iterable[int]) -> None:
    shape = tuple(shape)
    ours = tuple(tensor.shape)
    if len(ours) > len(shape) or any(a not in (1, b) for a, b in zip(ours[::-1], shape[::-1], strict=False)):
        raise ValueError(f"{name}: expected a shape that broadcasts to {shape}, got {ours}")
