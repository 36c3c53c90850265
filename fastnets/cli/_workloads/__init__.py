"""The shapes that `inspect` states figures of: a module a family, with `workloads()` and `probes()`."""

from . import attention, conv, recurrent, softmax
from .counting import Counts, Launch, Workload, measured, missing

__all__ = ["FAMILIES", "Counts", "Launch", "Workload", "measured", "missing", "networks", "probes", "workloads"]

FAMILIES = {"softmax": softmax, "attention": attention, "conv": conv, "recurrent": recurrent}
"""A family without a row here has neither launches nor traffic in the tables."""


def workloads() -> list[Workload]:
    """Every stated shape."""
    return [workload for family in FAMILIES.values() for workload in family.workloads()]


def networks() -> list[Workload]:
    """Every convolution of known networks; minutes."""
    return list(conv.networks())


def probes() -> list[Workload]:
    """Small shapes that together launch every kernel."""
    return [workload for family in FAMILIES.values() for workload in family.probes()]
