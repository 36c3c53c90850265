"""What else runs a PyTorch model's forward pass: further rivals for `fastnets bench --rival`."""

import contextlib
import importlib.util
import io
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["RIVALS", "Unavailable", "missing"]


class Unavailable(Exception):
    """The rival does not take this case."""


def missing(name: str) -> str | None:
    """What to install before the rival can run; None where it can."""
    needs = {"compile": (), "onnxruntime": ("onnx", "onnxruntime")}[name]
    absent = [package for package in needs if importlib.util.find_spec(package) is None]
    return f"pip install {' '.join(absent)}" if absent else None


def _compiled(function: Callable[..., Any], inputs: Mapping[str, Tensor | None]) -> Callable[[], Any]:
    torch.compiler.reset()  # else it gives up on the ninth function of this line
    compiled = torch.compile(lambda: function(**inputs), dynamic=False)

    def call():
        with torch.no_grad():
            return compiled()

    return call


def _onnxruntime(function: Callable[..., Any], inputs: Mapping[str, Tensor | None]) -> Callable[[], Any]:
    """PyTorch's own export, run by ONNX Runtime on as many threads as torch has.

    Raises:
        Unavailable: the export or the runtime lacks an operator, mostly of bfloat16.
    """
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as errors

    given = {name: tensor for name, tensor in inputs.items() if tensor is not None}

    class Peer(torch.nn.Module):
        def forward(self, *tensors: Tensor):
            return function(**{**inputs, **dict(zip(given, tensors, strict=True))})

    file = io.BytesIO()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4
    # Its threads wait busily for more work, else on into the next rival's sample: that took up to three times as long.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.onnx.export(Peer(), tuple(given.values()), file, input_names=list(given), dynamo=False)
        session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    except (torch.onnx.OnnxExporterError, errors.NotImplemented, errors.InvalidGraph, errors.Fail) as error:
        raise Unavailable(str(error)) from error
    taken = {node.name for node in session.get_inputs()}
    feed = {name: tensor.contiguous().numpy() for name, tensor in given.items() if name in taken}
    return lambda: session.run(None, feed)


RIVALS: dict[str, Callable[[Callable[..., Any], Mapping[str, Tensor | None]], Callable[[], Any]]] = {
    "compile": _compiled,
    "onnxruntime": _onnxruntime,
}
"""Of PyTorch's function and its inputs: a call of no arguments. `compile` is torch.compile."""
