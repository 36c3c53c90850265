"""Starting a kernel: on the GPU where the tensors lie, or under the interpreter for CPU tensors."""

import torch
from torch import Tensor


def launch(kernel, grid: tuple[int, ...], like: Tensor, *args, **options) -> None:
    """Runs the kernel on every point of the grid.

    Args:
        grid: up to 3 numbers of programs; the second and third at most 65535.
        like: a tensor on the device that runs it.
        args: the kernel's tensors (None where absent) and numbers.
        options: its constants by name, and num_warps and num_stages.
    """
    if like.device.type == "cpu":
        from . import _interpreter

        _interpreter.run(kernel, grid, args, options)
        return
    with torch.cuda.device(like.device):
        kernel[grid](*args, **options)
