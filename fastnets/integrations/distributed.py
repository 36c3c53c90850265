"""One process or many: what training needs of torch.distributed, the same either way."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

__all__ = ["Processes", "launched", "leave", "processes"]


def launched() -> tuple[int, int]:
    """(rank, size) as torchrun has set them; (0, 1) for a process on its own."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class Processes(NamedTuple):
    """The processes that train one model together, seen from one of them. Every method is called by all of them."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with its gradients averaged over the processes after each backward."""
        if self.size == 1:
            return model
        devices = None if self.device.type == "cpu" else [self.device]
        return nn.parallel.DistributedDataParallel(model, device_ids=devices)

    def total(self, values: Tensor) -> Tensor:
        """The sum over the processes."""
        if self.size > 1:
            distributed.all_reduce(values)
        return values

    def gather(self, thing: Any) -> list[Any]:
        """Every process's `thing`, by rank."""
        things = [thing] * self.size
        if self.size > 1:
            distributed.all_gather_object(things, thing)
        return things

    def wait(self) -> None:
        """Returns when all have called it."""
        if self.size > 1:
            distributed.barrier()


# A DistributedDataParallel that outlives the group would be the one to destroy it, and would do so holding the
# interpreter's lock, for which the group's own thread may wait: a deadlock. So the group lives to the process's end.
_groups: list[Any] = []


@contextlib.contextmanager
def processes(device: torch.device) -> Iterator[Processes]:
    """Joins the processes that torchrun started (gloo between CPUs, nccl between GPUs), and leaves them at the end."""
    rank, size = launched()
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
    if size == 1:
        yield Processes(rank, size, device)
        return
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    _groups.append(distributed.group.WORLD)
    try:
        yield Processes(rank, size, device)
    finally:
        distributed.destroy_process_group()


def leave(status: int) -> None:
    """Ends a process that has joined others, without the interpreter's own shutting down; others it lets be.

    The threads of a process group that still run while the interpreter shuts down abort it now and then ("terminate
    called without an active exception"), after all work is done and written.
    """
    if _groups:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
