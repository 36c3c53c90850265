"""Swaps the layers of any model for ours, and back."""

import torch

from . import nn

__all__ = ["TABLE", "convert", "convertible", "revert"]

TABLE: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    getattr(torch.nn, name): getattr(nn, name) for name in nn.__all__
}
"""torch.nn's class -> ours. Ours holds no state of its own, so swapping a layer's class is all of a conversion."""


def convert(model: torch.nn.Module) -> torch.nn.Module:
    """Makes every layer of a class in `TABLE` ours, in place.

    Parameters, buffers, hooks and the state_dict stay the very same objects. Layers of any other class are left alone:
    subclasses (parametrized and quantized layers among them) and layers whose `forward` was replaced on the instance.

    Args:
        model: any module; it may be a single layer.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is no torch.nn.Module.
    """
    return _swap(model, TABLE)


def revert(model: torch.nn.Module) -> torch.nn.Module:
    """The way back: every layer of ours becomes torch.nn's again, in place; as `convert` in every other respect.

    An LSTM with options that torch's lacks stays ours.
    """
    return _swap(model, {ours: theirs for theirs, ours in TABLE.items()})


def convertible(module: torch.nn.Module) -> bool:
    """Whether `convert` would make this very layer ours."""
    return type(module) in TABLE and _runs_its_class(module)


def _runs_its_class(module: torch.nn.Module) -> bool:
    return "forward" not in vars(module)


def _swap(model: torch.nn.Module, table: dict[type, type]) -> torch.nn.Module:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if type(module) in table and _runs_its_class(module) and not (isinstance(module, nn.LSTM) and module.options):
            module.__class__ = table[type(module)]
    return model
