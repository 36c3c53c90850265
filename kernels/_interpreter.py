"""Runs kernels on CPU tensors, for tests: what Triton compiled them to (TTIR), executed by ttsem.

Right for bfloat16, where TRITON_INTERPRET=1 is not. An access outside the tensors given, a race between two programs
and an operation with an undefined result raise KernelFault, which names the line of the kernel.
"""

from collections import Counter

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from ttsem import harness, mlir, pidraces, sanitize, values
from ttsem.interp import Interp
from ttsem.memory import Memory, MemoryFault

_TARGET = GPUTarget("cuda", 90, 32)
_modules: dict[tuple, tuple] = {}


launched: Counter[str] = Counter()
"""Kernel -> how often it was run: with every access within its tensors, and without a race but for these."""

unsearched: Counter[str] = Counter()
"""Kernel -> how many of its launches were too large to be searched for races."""


class KernelFault(sanitize.KernelFault, RuntimeError):
    """As what a kernel raises that fails."""


def _compiled(kernel, args, options):
    """The module's text and parse, and which parameters it kept as arguments; remembered."""
    parsed, signature, constants, attributes = harness._specialize(kernel, args, options, _TARGET)
    key = (kernel, repr(parsed), repr(signature), repr(constants), repr(attributes))
    if key not in _modules:
        mlir.enable_generic_printing()  # before the first text; this process compiles nothing for people to read
        record = harness.LaunchRecord(0, kernel, kernel.__name__, "", (1,), args, options, {}, {}, {}, {})
        text = mlir.to_generic(harness._stage_text(record, "ttir", _TARGET), None)
        names = [name for name, kind in signature.items() if kind != "constexpr"]
        _modules[key] = text, mlir.parse(text), names
    return _modules[key]


def run(kernel, grid, args, options) -> None:
    """One launch: every program of the grid, one after the other, then a search for races between them."""
    text, module, names = _compiled(kernel, args, options)
    bound = harness._bind_names(kernel.arg_names, args, options, harness._param_defaults(kernel))
    tensors = {name: bound[name] for name in names if isinstance(bound[name], torch.Tensor)}
    memory, bases, contents = Memory(), {}, {}
    for name, tensor in tensors.items():
        bases[name], contents[name] = harness.storage_copy(tensor)
        if bases[name] not in memory.buffers():
            memory.register(bases[name], contents[name])
    memory.trace()
    function = next(iter(module.funcs)) if len(module.funcs) == 1 else kernel.__name__
    block = module.funcs[function].regions[0].blocks[0]
    arguments = [
        np.array(tensors[name].data_ptr(), dtype=np.int64)
        if name in tensors
        else harness._scalar_value(bound[name], kind)
        for name, (_, kind) in zip(names, block.args, strict=True)
    ]
    record = harness.LaunchRecord(
        0, kernel, kernel.__name__, "", grid, args, options, bound, contents, {}, bases, bases
    )
    file = kernel.fn.__code__.co_filename
    try:
        Interp(module, memory, harness._grid3(grid)).run_grid(function, arguments)
    except MemoryFault as fault:
        buffer, past, before = sanitize._locate(record, fault)
        kind = "oob_write" if fault.kind == "write" else "oob_read"
        found = sanitize.Fault(kind, 0, kernel.__name__, sanitize._op_of(fault), buffer, past, before, str(fault))
        raise KernelFault(sanitize._with_source(found, text, file)) from None
    except values.Poison as fault:
        found = sanitize.Fault("poison", 0, kernel.__name__, sanitize._op_of(fault), detail=str(fault))
        raise KernelFault(sanitize._with_source(found, text, file)) from None
    if memory.access_overflow and sanitize._spans_may_race(memory.access_spans, []):
        unsearched[kernel.__name__] += 1
    if (race := pidraces.find_race(memory.access_log)) is not None:
        found = sanitize._race_fault(record, race, 0, text, file)
        raise KernelFault(sanitize._with_source(found, text, file))
    launched[kernel.__name__] += 1
    buffers = memory.buffers()
    for name, tensor in tensors.items():
        flat = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        if flat.numel():
            flat.copy_(torch.from_numpy(np.ascontiguousarray(buffers[bases[name]]).view(np.uint8).reshape(-1)))
