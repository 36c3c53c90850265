"""What is measured: the operator table's benchmark cases and the networks, forward and training, each beside PyTorch's.

FLOPs are counted as docs/benchmarks.md says.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastnets import dispatch, nn, testing
from fastnets.bench.rivals import RIVALS, Unavailable
from fastnets.networks import NETWORKS, Network

__all__ = ["MODES", "NETWORK", "OURS", "THEIRS", "Row", "network_rows", "operator_rows"]

OURS, THEIRS = "fastnets", "torch"
MODES = ("forward", "training")
NETWORK = "network"
"""The networks' family."""
GENERATED = 32
"""Characters that the row of a language model's generation asks for."""

Calls = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Row:
    """One row of the benchmark."""

    family: str
    name: str
    dtype: torch.dtype
    mode: str
    """forward (without gradients) or training (forward and every gradient; for a network the optimiser's step too)."""
    prepare: Callable[[], Calls]
    """Draws the inputs and returns both rivals' calls, by name."""
    flops: float = 0.0
    """Of one call; 0 where the row is bound by memory, or not counted."""
    bytes: float = 0.0
    """That one call must read and write; 0 where not counted."""
    items: float = 0.0
    """Samples that one call of a network takes."""

    @property
    def title(self) -> str:
        return f"{self.family} {self.name} {str(self.dtype).removeprefix('torch.')} {self.mode}"


def operator_rows(cases: Iterable[testing.Case], rivals: Iterable[str] = ()) -> list[Row]:
    """A forward and a training row for every benchmark case and dtype; forwards, beside these of RIVALS too."""
    return [
        Row(
            family=case.op,
            name=case.name,
            dtype=dtype,
            mode=mode,
            prepare=lambda case=case, dtype=dtype, mode=mode: _operator_calls(case, dtype, mode, tuple(rivals)),
            flops=case.flops if mode == "forward" else case.training_flops or 3 * case.flops,
            bytes=case.elements * dtype.itemsize if mode == "forward" else 0.0,
        )
        for case in cases
        for dtype in case.benchmark
        for mode in MODES
    ]


def network_rows(names: Iterable[str] = NETWORKS) -> list[Row]:
    """Inference and a training step of every network, on a batch of its data, beside its torch.nn twin."""
    rows = []
    for network in (NETWORKS[name] for name in names):
        calls = {"forward": _inference, "training": _training_step}
        rows += [
            Row(
                family=NETWORK,
                name=network.name,
                dtype=torch.float32,
                mode=mode,
                prepare=lambda network=network, calls=calls[mode]: _network_calls(network, calls),
                items=network.batch_size,
            )
            for mode in MODES
        ]
        if hasattr(network.factory, "generate"):
            rows.append(
                Row(
                    family=NETWORK,
                    name=f"{network.name} generating {GENERATED}",
                    dtype=torch.float32,
                    mode="forward",
                    prepare=lambda network=network: _network_calls(network, _generation),
                )
            )
    return rows


def _operator_calls(case: testing.Case, dtype: torch.dtype, mode: str, others: tuple[str, ...]) -> Calls:
    inputs = testing.cast(case.inputs(torch.Generator().manual_seed(0)), dtype)
    rivals = {OURS: case.function, THEIRS: case.peer or _on_reference(case.function)}
    if mode == "forward":
        calls = {name: _forward(functools.partial(function, **inputs)) for name, function in rivals.items()}
        for name in others:
            with contextlib.suppress(Unavailable):
                calls[name] = RIVALS[name](rivals[THEIRS], inputs)
        return calls
    for name, tensor in inputs.items():
        if tensor is not None and tensor.is_floating_point() and name not in case.constant:
            tensor.requires_grad_()
    return {name: _training(function, inputs) for name, function in rivals.items()}


def _on_reference(function: Callable[..., Any]) -> Callable[..., Any]:
    """Where PyTorch has no operator of its own, the rival is the definition written in PyTorch's operators."""

    def run(**inputs: Tensor | None):
        with dispatch.backend("reference"):
            return function(**inputs)

    return run


def _forward(function: Callable[[], Any]) -> Callable[[], Any]:
    def call():
        with torch.no_grad():
            return function()

    return call


def _training(function: Callable[..., Any], inputs: dict[str, Tensor | None]) -> Callable[[], Any]:
    leaves = [tensor for tensor in inputs.values() if tensor is not None and tensor.requires_grad]
    generator = torch.Generator().manual_seed(1)
    # As a network's lie: a result in channels last gets its gradient so.
    grads = [torch.empty_like(out).normal_(generator=generator) for out in _differentiable(function(**inputs))]

    def call():
        return torch.autograd.grad(_differentiable(function(**inputs)), leaves, grads, allow_unused=True)

    return call


def _differentiable(value: Any) -> list[Tensor]:
    return [out for out in testing.flatten(value) if out.requires_grad]


def _network_calls(network: Network, call: Callable[..., Callable[[], Any]]) -> Calls:
    """Both rivals from the same seed, on the same batch of the network's data.

    Raises:
        MissingPackageError: the network or its data needs a package that is not installed.
    """
    batch = network.dataset().train.pick(torch.arange(network.batch_size))
    calls = {}
    for name, layers in ((OURS, nn), (THEIRS, torch.nn)):
        torch.manual_seed(0)
        calls[name] = call(network, network.build(layers), batch)
    return calls


def _inference(network: Network, model: torch.nn.Module, batch) -> Callable[[], Any]:
    return _forward(functools.partial(model.eval(), *batch.inputs))


def _training_step(network: Network, model: torch.nn.Module, batch) -> Callable[[], Any]:
    optimiser = network.optimiser(model.train().parameters(), lr=network.learning_rate)
    count = network.objective.count(batch.target)

    def call():
        optimiser.zero_grad()
        (network.objective.loss(model(*batch.inputs), batch.target) / count).backward()
        optimiser.step()

    return call


def _generation(network: Network, model: torch.nn.Module, batch) -> Callable[[], Any]:
    """A language model goes on from a prompt of 64, one sequence, keys and values kept."""
    prompt = batch.inputs[0][:1, :64]
    return lambda: model.eval().generate(prompt, GENERATED)
