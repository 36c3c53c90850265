"""Which backend runs a model, and why."""

import contextlib
import dataclasses
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from . import dispatch
from .convert import TABLE, convertible

__all__ = ["Explanation", "Operator", "Other", "explain"]


@dataclass(frozen=True)
class Operator:
    """Calls of one of our operators that are alike."""

    layer: str
    """The module's name within the model, or its class; empty for a call outside any module."""
    family: str
    device: str
    dtype: torch.dtype
    backend: str | None
    """Which one runs it; None where the forced backend refuses."""
    objections: tuple[tuple[str, str], ...] = ()
    """(backend, reason) of those that were asked before it."""
    calls: int = 0
    """How often; 0 where nothing was run."""

    @property
    def why(self) -> str:
        return "; ".join(f"not {name}: {reason}" for name, reason in self.objections)


@dataclass(frozen=True)
class Other:
    """Layers of one class without code of ours."""

    layers: tuple[str, ...]
    kind: str
    """Their class."""
    why: str


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; prints as a table, in colour where rich prints it."""

    operators: tuple[Operator, ...]
    others: tuple[Other, ...]

    def _tables(self) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
        """(head, rows) of the tables that are not empty."""
        operators = [
            (o.layer or "-", o.family, str(o.dtype)[6:], o.device, o.backend or "none", str(o.calls or "-"), o.why)
            for o in self.operators
        ]
        others = [
            (o.layers[0] + (f" and {len(o.layers) - 1} more" if len(o.layers) > 1 else ""), o.kind, o.why)
            for o in self.others
        ]
        tables = [
            (("layer", "operator", "dtype", "device", "backend", "calls", "why"), operators),
            (("not of fastnets", "class", "why"), others),
        ]
        return [(head, rows) for head, rows in tables if rows]

    def __str__(self) -> str:
        texts = []
        for head, rows in self._tables():
            widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
            lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (head, *rows)]
            texts.append("\n".join(lines))
        return "\n\n".join(texts) or "no layers"

    __repr__ = __str__

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        tables = []
        for head, rows in self._tables():
            tables.append(Table(*head))
            for row in rows:
                tables[-1].add_row(*map(Text, row))
        return Group(*tables) if tables else Text("no layers")


def explain(model_or_call: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Tells which backend runs every operator of a model or function, and why.

    With arguments (a function: always) it is called with them once, and its operators are watched. A model without
    arguments is read: what would run for the dtype and device of its parameters, as far as they decide. A graph of
    torch.compile chose its backends when it was traced: explain the model before compiling it.

    Args:
        model_or_call: a module, or anything callable.
        args, kwargs: what to call it with.

    Returns:
        An `Explanation`, printable.

    Raises:
        TypeError: `model_or_call` is not callable. Besides, whatever the call raises.
    """
    if not callable(model_or_call):
        raise TypeError(f"model_or_call: expected a module or a function, got {type(model_or_call).__name__}")
    owner = getattr(model_or_call, "__self__", model_or_call)
    named = _names(owner) if isinstance(owner, torch.nn.Module) else {}
    if owner is model_or_call and named and not args and not kwargs:
        operators = [_read(module, name, owner) for module, name in named.items() if _family(module)]
        return Explanation(tuple(operators), _others(named))

    counts: Counter[Operator] = Counter()
    called: dict[torch.nn.Module, str] = {}

    def record(case: dispatch.Case, chosen: dispatch.Implementation, objections: dict[str, str]) -> None:
        layer = called[entered[-1]] if entered else ""
        counts[_operator(layer, case, chosen.backend, objections)] += 1

    def enter(module: torch.nn.Module) -> None:
        called.setdefault(module, named.get(module, type(module).__name__))

    with _entered_modules(enter) as entered, dispatch.recording(record):
        model_or_call(*args, **kwargs)
    return Explanation(tuple(dataclasses.replace(o, calls=n) for o, n in counts.items()), _others(called))


def _operator(layer: str, case: dispatch.Case, backend: str | None, objections: Mapping[str, str]) -> Operator:
    return Operator(layer, case.family, case.device, case.dtype, backend, tuple(objections.items()))


def _names(model: torch.nn.Module) -> dict[torch.nn.Module, str]:
    return {module: name or type(module).__name__ for name, module in model.named_modules()}


@contextlib.contextmanager
def _entered_modules(seen: Callable[[torch.nn.Module], None]) -> Iterator[list[torch.nn.Module]]:
    """The modules that this thread is in the forward of, the innermost last; each is told to `seen` when entered."""
    thread, entered = threading.get_ident(), []

    def enter(module, inputs) -> None:
        if threading.get_ident() == thread:
            entered.append(module)
            seen(module)

    def leave(module, inputs, output) -> None:
        if threading.get_ident() == thread:
            entered.pop()

    hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)
    try:
        yield entered
    finally:
        for hook in hooks:
            hook.remove()


def _read(module: torch.nn.Module, name: str, model: torch.nn.Module) -> Operator:
    """What would run for this layer's parameters, or else the model's."""
    like = next(module.parameters(), next(model.parameters(), torch.empty(0)))
    case = dispatch.Case(
        _family(module), like.device.type, like.dtype, frozenset(getattr(module, "options", ())) - {"forget_bias"}
    )
    choices = []
    try:
        with dispatch.recording(lambda case, chosen, objections: choices.append((chosen.backend, objections))):
            dispatch.select(case)
    except NotImplementedError as refusal:
        choices.append((None, {"run": str(refusal)}))
    return _operator(name, case, *choices[0])


def _family(module: torch.nn.Module) -> str | None:
    """The operator family that a layer of ours runs on: the name of the file with its class. None for all others."""
    for ours in TABLE.values():
        if isinstance(module, ours):
            name = ours.__module__.rpartition(".")[2]
            return name if name in dispatch.FAMILIES else None
    return None


def _others(named: Mapping[torch.nn.Module, str]) -> tuple[Other, ...]:
    groups: dict[tuple[str, str], list[str]] = {}
    for module, name in named.items():
        why = _why_not_ours(module)
        if why is not None:
            groups.setdefault((type(module).__name__, why), []).append(name)
    return tuple(Other(tuple(layers), kind, why) for (kind, why), layers in groups.items())


def _why_not_ours(module: torch.nn.Module) -> str | None:
    """Why a layer of torch runs none of our code; None for ours, and for what is no layer of torch."""
    if isinstance(module, (*TABLE.values(), torch.nn.Sequential, torch.nn.ModuleList, torch.nn.ModuleDict)):
        return None
    if convertible(module):
        return "fastnets.convert makes it ours"
    for theirs in TABLE:
        if isinstance(module, theirs):
            return f"a {theirs.__name__} with code of its own, which fastnets.convert leaves alone"
    if type(module).__module__.startswith("torch.nn.") and not any(module.children()):
        return "fastnets has no such layer"
    return None
