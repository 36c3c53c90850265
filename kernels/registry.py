"""Registers the operators in Triton as torch.ops.fastnets_triton, under the schemas of csrc/ops.cpp.

Importing this needs no Triton: a family's kernels are imported by its first call.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import sys

import torch

from .. import _library

NAMESPACE = "fastnets_triton"
"""The operators' namespace under torch.ops."""

_MODULES = {
    "softmax_forward": "softmax",
    "softmax_backward": "softmax",
    "attention_forward": "attention",
    "attention_weights": "attention",
    "attention_backward": "attention_backward",
    "conv_forward": "conv",
    "conv_grad_input": "conv",
    "conv_grad_weight": "conv",
    "conv_grad_epilogue": "conv",
    "recurrent_forward": "recurrent",
    "recurrent_backward": "recurrent_backward",
}
"""Operator -> the module that has it, as a function of its name."""

FAMILIES = frozenset(operator.split("_")[0] for operator in _MODULES)
"""The families that there are kernels of."""


def _missing() -> str | None:
    if _library.missing is not None:
        return _library.missing
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    return None


missing: str | None = _missing()
"""Why there are no Triton kernels, or None when there are. Where there are, there may still be no GPU."""


_INTERPRETER = {"ttsem": "0.1.0", "triton": "3.8.0"}  # the one knows the other's IR


def _interpreter_missing() -> str | None:
    if missing is not None:
        return missing
    if sys.version_info < (3, 11):
        return "ttsem, which interprets the kernels on the CPU, needs Python 3.11"
    for name, version in _INTERPRETER.items():
        if importlib.util.find_spec(name) is None or importlib.metadata.version(name) != version:
            return f"interpreting the kernels on the CPU needs {name} {version} (docs/gpu.md)"
    return None


interpreter_missing: str | None = _interpreter_missing()
"""Why the kernels cannot be interpreted on CPU tensors, or None when they can; for tests alone."""


def _run(operator: str, *args):
    return getattr(importlib.import_module(f".{_MODULES[operator]}", __package__), operator)(*args)


def _fake(operator: str, *args):
    return getattr(torch.ops.fastnets, operator)(*args)  # of fake tensors: the CPU operator's own fake


def _register() -> torch.library.Library:
    library = torch.library.Library(NAMESPACE, "DEF")
    for operator in _MODULES:
        schema = str(getattr(torch.ops.fastnets, operator).default._schema)
        library.define(schema.removeprefix("fastnets::"), tags=torch.Tag.pt2_compliant_tag)
        for key in ("CUDA", "CPU"):
            library.impl(operator, functools.partial(_run, operator), key)
        library._register_fake(operator, functools.partial(_fake, operator))
    return library


_registered = _register() if missing is None else None  # the operators live as long as this object
