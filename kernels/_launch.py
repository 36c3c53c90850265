"""Starting a kernel: on the GPU where the tensors lie, or under the interpreter for CPU tensors."""

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


class _Thread(threading.local):
    def __init__(self) -> None:
        self.recorder: Callable[..., None] | None = None
        self.architecture = 8


_thread = _Thread()


@contextlib.contextmanager
def recording(architecture: int, recorder: Callable[..., None]) -> Iterator[None]:
    """Within this context this thread's launches for CPU tensors are told to `recorder` instead of run.

    Args:
        architecture: the major compute capability that tiles are chosen for.
        recorder: called with the kernel, its arguments by place, and its arguments and constants by name.
    """
    former = _thread.recorder, _thread.architecture
    _thread.recorder, _thread.architecture = recorder, architecture
    try:
        yield
    finally:
        _thread.recorder, _thread.architecture = former


def launch(kernel, grid: tuple[int, ...], like: Tensor, *args, **options) -> None:
    """Runs the kernel on every point of the grid.

    Args:
        grid: up to 3 numbers of programs; the second and third at most 65535.
        like: a tensor on the device that runs it.
        args: the kernel's tensors (None where absent) and numbers.
        options: more of them by name, its constants, num_warps and num_stages.
    """
    if like.device.type == "cuda":
        with torch.cuda.device(like.device):
            kernel[grid](*args, **options)
    elif _thread.recorder is not None:
        _thread.recorder(kernel, args, options)
    else:
        from . import _interpreter

        _interpreter.run(kernel, grid, args, options)


def precision(dtype: torch.dtype, tf32: bool) -> str:
    """How tl.dot multiplies: float32 as float32, by three products where there is TF32, unless that is allowed."""
    if dtype != torch.float32 or (tf32 and torch.version.hip is None):
        return "tf32"
    return "tf32x3" if torch.version.hip is None else "ieee"


def architecture(like: Tensor) -> int:
    """The major compute capability of the tensor's device, as far as the tables know it."""
    if like.device.type != "cuda":
        return _thread.architecture
    major = torch.cuda.get_device_capability(like.device)[0]
    return max(known for known in (8, 9, 10, 12) if known <= max(major, 8))


def processors(like: Tensor) -> int:
    """The multiprocessors of the tensor's device; for a CPU tensor few, so that tests see work being divided."""
    return torch.cuda.get_device_properties(like.device).multi_processor_count if like.device.type == "cuda" else 8
