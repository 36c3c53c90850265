"""PyTorch's own conformance samples for every layer of fastnets.nn, and what the tests of layers share."""

import copy
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.testing._internal.common_modules import FunctionInput, ModuleInfo, ModuleInput, module_db

import fastnets
from fastnets.testing import tolerances

NAMES = sorted(fastnets.nn.__all__)
_INFO = {info.module_cls: info for info in module_db}


def ours(name: str) -> type[torch.nn.Module]:
    return getattr(fastnets.nn, name)


def theirs(name: str) -> type[torch.nn.Module]:
    return getattr(torch.nn, name)


def _decoder_stacks(info, device, dtype, requires_grad, training) -> list[ModuleInput]:
    """For TransformerDecoder, which PyTorch has no samples of: two of each of the decoder layers' samples."""
    layers = _INFO[torch.nn.TransformerDecoderLayer].module_inputs_func(info, device, dtype, requires_grad, training)
    stacks = []
    for sample in layers:
        arguments = sample.constructor_input
        layer = torch.nn.TransformerDecoderLayer(*arguments.args, **arguments.kwargs, device=device, dtype=dtype)
        stacks.append(ModuleInput(FunctionInput(layer, 2), sample.forward_input, sample.desc))
    return stacks


def _certain_dropouts(info, device, dtype, requires_grad, training) -> list[ModuleInput]:
    """For Dropout, which PyTorch has no samples of: all or nothing, whatever the random numbers."""
    x = torch.randn(3, 70, 40, device=device, dtype=dtype, requires_grad=requires_grad)
    return [ModuleInput(FunctionInput(p), FunctionInput(x), f"p={p:g}") for p in (0.0, 1.0)]


_WITHOUT_SAMPLES = {
    torch.nn.TransformerDecoder: ModuleInfo(torch.nn.TransformerDecoder, module_inputs_func=_decoder_stacks),
    torch.nn.Dropout: ModuleInfo(torch.nn.Dropout, module_inputs_func=_certain_dropouts, train_and_eval_differ=True),
}


def info(name: str) -> ModuleInfo:
    """torch's description of the layer with our class in its place."""
    found = copy.copy(_INFO.get(theirs(name)) or _WITHOUT_SAMPLES[theirs(name)])
    found.module_cls = ours(name)
    return found


@functools.cache
def samples(name: str, dtype: torch.dtype, requires_grad: bool, training: bool) -> list[ModuleInput]:
    """torch's samples; shared, so that no test may change them."""
    torch.manual_seed(0)
    found = info(name)
    return found.module_inputs_func(found, "cpu", dtype, requires_grad, training)


class Sample(NamedTuple):
    """One of torch's samples."""

    name: str
    training: bool
    index: int

    def draw(self, dtype=torch.float32, requires_grad=True) -> tuple[torch.nn.Module, torch.nn.Module, tuple, dict]:
        """torch's layer, ours of the same seed, and the arguments of the call."""
        sample = samples(self.name, dtype, requires_grad, self.training)[self.index]
        layers = (self.build(cls, dtype) for cls in (theirs(self.name), ours(self.name)))
        return *layers, sample.forward_input.args, sample.forward_input.kwargs

    def build(self, cls: type[torch.nn.Module], dtype=torch.float32) -> torch.nn.Module:
        """The sample's layer of either class, always of the same seed."""
        arguments = copy.deepcopy(samples(self.name, dtype, False, self.training)[self.index].constructor_input)
        torch.manual_seed(1)
        return cls(*arguments.args, **arguments.kwargs).to(dtype).train(self.training)


def every_sample(name: str, training: bool = True) -> list[Sample]:
    return [Sample(name, training, index) for index in range(len(samples(name, torch.float32, False, training)))]


def parameter(sample: Sample):
    """The sample as pytest's parameter."""
    description = samples(sample.name, torch.float32, False, sample.training)[sample.index].desc
    mode = "" if sample.training else "-eval"
    return pytest.param(sample, id=f"{sample.name}{mode}-{sample.index}{'-' * bool(description)}{description}")


def flatten(value: Any) -> list[Tensor]:
    """Every tensor in a layer's arguments or result."""
    if isinstance(value, PackedSequence):
        return [value.data]
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in flatten(item)] if isinstance(value, tuple | list) else []


def replace(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The same structure with the tensors, in `flatten`'s order, replaced."""
    if isinstance(value, PackedSequence):
        return PackedSequence(next(tensors), *value[1:])
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, dict):
        return {key: replace(item, tensors) for key, item in value.items()}
    return type(value)(replace(item, tensors) for item in value) if isinstance(value, tuple | list) else value


def to_double(tensor: Tensor) -> Tensor:
    """A floating tensor's values in float64, as a leaf with a gradient where the tensor has one."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().double().requires_grad_(tensor.requires_grad)


def cotangents(tensors: list[Tensor]) -> list[Tensor]:
    """Fixed random numbers of the tensors' shapes."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in tensors]


def results(layer: torch.nn.Module, args: tuple, kwargs: dict, orders: int = 1) -> list[list[Tensor]]:
    """The outputs, and the gradients up to an order, each of the sum of what precedes times fixed random numbers."""
    found = [flatten(layer(*args, **kwargs))]
    leaves = [t for t in (*flatten((args, kwargs)), *layer.parameters()) if t.requires_grad]
    for order in range(1, orders + 1):
        outputs = [t for t in found[-1] if t.requires_grad]
        grads = torch.autograd.grad(
            outputs, leaves, cotangents(outputs), create_graph=order < orders, materialize_grads=True
        )
        found.append(list(grads))
    return found


def assert_within_rule(got: list[Tensor], measured: list[Tensor], truth: list[Tensor], dtype: torch.dtype) -> None:
    """The tolerance rule over all elements of all tensors."""
    got, measured, truth = (torch.cat([t.flatten().double() for t in tensors]) for tensors in (got, measured, truth))
    rms, largest = tolerances(measured - truth, truth, dtype)
    error = got - truth
    assert error.square().mean().sqrt() <= rms
    assert error.abs().max() <= largest
