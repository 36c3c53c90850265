"""What Triton makes of its kernels for architectures that are not here: machine code, read as nvcc's is. No GPU."""

import dataclasses
import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import _machine_code as code

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
"""Those that kernels are compiled for: one of each kind of tensor core."""

_SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10}
"""Bytes of shared memory that a block can have (CUDA C++ Programming Guide, "Technical Specifications")."""


class Workload(NamedTuple):
    """Operators to be called with tensors of the stated shapes, whose contents nobody reads."""

    op: str
    name: str
    call: Callable[[], Any]


class Launch(NamedTuple):
    """A kernel as a workload starts it on an architecture."""

    op: str
    name: str
    arch: str
    kernel: Any
    constants: dict[str, Any]
    source: Any
    """Specialised as Triton's launcher specialises it for the arguments."""
    options: Any
    """The compiler's."""


class Compiled(NamedTuple):
    kernel: code.Kernel
    shared: int
    """Bytes of shared memory of a block."""
    threads: int
    multiplies: str | None
    """What multiplies matrices: mma, wgmma or tcgen05; None where the source has no products."""
    copies_ahead: bool
    """Whether products' operands are to be copied to shared memory ahead of them."""
    operations: float | None
    """Of a turn of the main loop, a warp's share; None where its products are not known from the tile."""


def workloads() -> Iterator[Workload]:
    """Shapes that together start every kernel in every row of the tables of tiles."""
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        yield Workload("softmax", f"{name} 4096x1000", lambda dtype=dtype: _softmax(1000, dtype))
        yield Workload("softmax", f"{name} 64x100000", lambda dtype=dtype: _softmax(100_000, dtype))
        for width in (64, 128, 256):
            for general in (False, True):
                of = f"{name} D{width} {'every option' if general else 'causal'}"
                yield Workload("attention", of, lambda d=dtype, w=width, g=general: _attention(d, w, g))
        for channels in (64, 256):
            of = f"{name} {channels}x56x56"
            yield Workload("conv", of, lambda d=dtype, c=channels: _conv(d, c, c, 1))
        yield Workload("conv", f"{name} 3x224x224", lambda dtype=dtype: _conv(dtype, 3, 64, 1, 224))
        yield Workload("conv", f"{name} depthwise 128x56x56", lambda dtype=dtype: _conv(dtype, 128, 128, 128))
        for hidden in (32, 64, 256):
            for cell in range(4):
                of = f"{name} {('lstm', 'gru', 'tanh', 'relu')[cell]} H{hidden}"
                yield Workload("recurrent", of, lambda d=dtype, c=cell, h=hidden: _recurrent(d, c, h))
        for hidden in (16, 32, 256):
            for normed in (False, True):
                of = f"{name} lstm with {'layer norm' if normed else 'options'} H{hidden}"
                yield Workload("recurrent", of, lambda d=dtype, h=hidden, n=normed: _recurrent(d, 0, h, n))


def _softmax(columns: int, dtype: torch.dtype) -> None:
    from ..kernels import softmax

    x = torch.empty(4_096_000 // columns, columns, dtype=dtype)
    y = softmax.softmax_forward(x, None, 1, 1.0)
    softmax.softmax_backward(y, y, 1, 1.0)


def _attention(dtype: torch.dtype, width: int, general: bool) -> None:
    from ..kernels import attention, attention_backward

    q = torch.empty(8, 16, 512, width, dtype=dtype)
    extras: tuple = (None, None, None, None, None)
    options = (0.125, 0.0, None, 0, 0, 0.0, False)
    if general:
        mask, slopes = torch.empty(1, 16, 512, 512, dtype=dtype), torch.empty(8, 16)
        extras = (mask, slopes, torch.empty(2, dtype=torch.int64), None, None)
        options = (0.125, 20.0, 256, 0, 0, 0.1, False)
    out, lse = attention.attention_forward(q, q, q, *extras, *options)
    attention_backward.attention_backward(out, None, None, q, q, q, out, lse, *extras, *options, general, False)
    attention.attention_weights(q, q, lse, *extras[:3], *options)
    attention.attention_forward(
        q[:1, :1, :1], q[:1, :1], q[:1, :1], *extras[:1], *(None,) * 4, *options[:5], 0.0, False
    )


def _conv(dtype: torch.dtype, channels: int, outs: int, groups: int, size: int = 56) -> None:
    from ..kernels import conv

    def last(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype).to(memory_format=torch.channels_last)

    x, weight, y = last(8, channels, size, size), last(outs, channels // groups, 3, 3), last(8, outs, size, size)
    options = ((1, 1), (1, 1), (1, 1), groups, True, False)
    conv.conv_forward(x, weight, y[0, :, 0, 0], y, (size, size), *options, 2, True)
    conv.conv_grad_input(y, weight, None, None, (size, size), *options, 0, False)
    conv.conv_grad_weight(y, x, weight, *options, True)
    conv.conv_grad_epilogue(y, y, 2)


def _recurrent(dtype: torch.dtype, cell: int, hidden: int, normed: bool | None = None) -> None:
    """One layer of hidden units; an lstm is projected, one with options (with layer norm or without) is not."""
    from ..kernels import recurrent, recurrent_backward

    def empty(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=kind)

    rows, outputs = (4, 3, 1, 1)[cell] * hidden, min(hidden, 64) if cell == 0 and normed is None else hidden
    x, h, c = empty(2, 64, hidden), empty(64, outputs), empty(64, hidden) if cell == 0 else None
    w_ih, w_hh, bias = empty(rows, hidden), empty(rows, outputs), empty(rows)
    w_hr = empty(outputs, hidden) if outputs != hidden else None
    call, mask = (cell, False, False), empty(2, 64, hidden, kind=torch.bool)
    variant: tuple = ()
    if normed is not None:
        variant = (empty(3 * hidden), empty(10 * hidden) if normed else None, mask, mask, mask, 2.0, 0.0, 0.0, 1.0)
    found = recurrent.recurrent_forward(x, h, c, w_ih, w_hh, bias, bias, w_hr, None, *call, True, *variant)
    saved = found[0], *found[3:]
    recurrent_backward.recurrent_backward(
        found[0], h, c, x, h, c, w_ih, w_hh, w_hr, None, *saved, *call, True, True, *variant
    )


def _target(arch: str):
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


def launches(wanted: Iterable[Workload], arch: str) -> list[Launch]:
    """What workloads start, each kernel once as it is specialised; nothing is run."""
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    from ..kernels import _launch

    target = _target(arch)
    backend = make_backend(target)
    found: dict[str, Launch] = {}

    def record(kernel, args, constants) -> None:
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, options = binder(*args, **constants)
        options, signature, constexprs, attributes = kernel._pack_args(
            backend, constants, bound, specialization, options
        )
        source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
        name = f"{kernel.__name__.removesuffix('_kernel')} {workload.name}"
        constants = {key: value for key, value in constants.items() if key.isupper()}
        launch = Launch(workload.op, name, arch, kernel, constants, source, options)
        found.setdefault(f"{source.hash()} {options.hash()}", launch)

    for workload in wanted:
        with torch.no_grad(), _launch.recording(target.arch // 10, record):
            workload.call()
    return list(found.values())


def compiled(launch: Launch) -> Compiled:
    """The kernel's machine code."""
    import triton

    made = triton.compile(launch.source, target=_target(launch.arch), options=launch.options.__dict__)
    figures = _figures(made.asm["cubin"], launch.arch)
    figures = dataclasses.replace(figures, family="triton", signature=launch.name, arch=launch.arch)
    warps = made.metadata.num_warps
    each = _OPERATIONS.get(launch.kernel.__name__)
    operations = None if each is None else each(launch.constants) / warps
    multiplies = None
    if "tt.dot" in made.asm["ttir"]:
        found = (name for name, operation in _MULTIPLIES.items() if operation in made.asm["ttgir"])
        multiplies = next(found, "mma")
    # A gather of single elements of 2 bytes is too narrow to be copied asynchronously.
    ahead = multiplies is not None and made.metadata.num_stages > 1 and not launch.constants.get("FLAT", False)
    return Compiled(figures, made.metadata.shared, 32 * warps, multiplies, ahead, operations)


_MULTIPLIES = {"tcgen05": "ttng.tc_gen5_mma", "wgmma": "ttng.warp_group_dot"}

# Operations of a turn of the main loop, by the tile; where float32 rows are multiplied in chunks, that loop is it.
_OPERATIONS: dict[str, Callable[[dict], float]] = {
    "attention_forward_kernel": lambda of: _chunk(of) or 2 * of["M"] * of["N"] * (of["D"] + of["DV"]),
    "attention_backward_keys_kernel": lambda of: _chunk(of) or 4 * of["M"] * of["N"] * (of["D"] + of["DV"]),
    "attention_backward_queries_kernel": lambda of: _chunk(of) or 2 * of["M"] * of["N"] * (2 * of["D"] + of["DV"]),
    "conv_gather_kernel": lambda of: 2 * of["M"] * of["N"] * of["K"],
    "conv_weight_kernel": lambda of: 2 * of["M"] * of["N"] * of["K"],
    "matmul_kernel": lambda of: 2 * of["M"] * of["N"] * of["K"],
}


def _chunk(of: dict) -> float:
    return 2 * of["M"] * of["N"] * of["CHUNK"] if of["CHUNK"] < of["D"] else 0


class Pair(NamedTuple):
    """A kernel in both languages."""

    what: str
    cuda: str
    """The name of ours in CUDA C++, as `inspect` has it."""
    triton: str
    """The launch in Triton."""


PAIRS = (
    *(
        Pair(
            f"attention forward, D {d}", f"attention::forward<Bf16, {d}, 0>", f"attention_forward bfloat16 D{d} causal"
        )
        for d in (64, 128, 256)
    ),
    *(
        Pair(
            f"attention backward, D {d}, {of}",
            f"attention::gradients<Bf16, {d}, false, {own}>",
            f"attention_backward_{side} bfloat16 D{d} causal",
        )
        for d in (64, 128, 256)
        for own, side, of in ((1, "keys", "of k and v"), (0, "queries", "of q"))
    ),
    Pair("3x3, 64 channels", "conv::conv_held<Bf16, Shape<256, 64, 4, 2, 3, 1> >", "conv_gather bfloat16 64x56x56"),
    Pair("3x3, 256 channels", "conv::conv_held<Bf16, Shape<256, 64, 4, 2, 3, 1> >", "conv_gather bfloat16 256x56x56"),
    Pair("3x3, grad weight", "conv::conv_held_weight<Bf16, HeldTaps>", "conv_weight bfloat16 64x56x56"),
    Pair("LSTM forward", "recurrent::forward<Bf16, 16, false>", "recurrent_persistent bfloat16 lstm H64"),
    Pair("LSTM backward", "recurrent::backward<Bf16, 16, false>", "recurrent_backward_persistent bfloat16 lstm H64"),
    Pair("softmax of 1000", "softmax::forward_held<BFloat16, 8, 256>", "softmax_forward bfloat16 4096x1000"),
    Pair("softmax backward", "softmax::backward_held<BFloat16, 8, 256>", "softmax_backward bfloat16 4096x1000"),
)
"""What is compared side by side, in bfloat16. CUDA's kernel of attention's k and v finds q's gradient too, unless torch
asks for deterministic sums; Triton's are always two."""

_MMA = 2 * 16 * 8 * 16  # operations of the mma.sync that csrc/cuda uses in 16 bits


def beside(of_cuda: Sequence[Mapping[str, Any]], of_triton: Sequence[Compiled]) -> Iterator[tuple[str, ...]]:
    """Rows of a table: what, architecture, then of either registers, shared memory, density and, last, instructions.

    Density: tensor-core instructions an instruction of the main loop. The last: of them, a million operations that the
    kernel is there for; what a warp computes in vain, or another warp does too, makes them more.
    """
    for what, cuda, triton in PAIRS:
        ours = {k["arch"]: k for k in reversed(of_cuda) if k["name"] == cuda}
        theirs = {one.kernel.arch: one for one in reversed(of_triton) if one.kernel.signature.startswith(triton)}
        for arch in (arch for arch in ARCHITECTURES if arch in ours and arch in theirs):
            mine, one = ours[arch], theirs[arch]
            kernel = one.kernel
            yield (
                *(what, arch, str(mine["registers"]), _or_dash(mine["shared"]), _density(mine)),
                f"{1e6 / _MMA:.0f}" if mine["tensor"] else "-",
                *(str(kernel.registers), str(one.shared)),
                _density({"tensor": kernel.tensor, "loop_instructions": kernel.loop_instructions}),
                f"{1e6 * kernel.tensor / one.operations:.0f}" if one.multiplies and one.operations else "-",
            )


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)


def _density(of: Mapping[str, Any]) -> str:
    return f"{of['tensor'] / of['loop_instructions']:.3f}" if of["tensor"] else "-"


def _figures(cubin: bytes, arch: str) -> code.Kernel:
    """What a cubin's only kernel consists of; kept, for disassembling takes longer than compiling."""
    read = hashlib.sha256(cubin + Path(code.__file__).read_bytes()).hexdigest()[:16]
    binary = code.CACHE / f"triton.{arch}.{read}.cubin"
    kept = binary.with_suffix(".json")
    if not kept.exists():
        code.CACHE.mkdir(parents=True, exist_ok=True)
        binary.write_bytes(cubin)
        (found,) = code.read(binary, arch)
        unfinished = kept.with_suffix(f".{threading.get_native_id()}")
        unfinished.write_text(json.dumps(dataclasses.asdict(found)))
        unfinished.rename(kept)
    return code.Kernel(**json.loads(kept.read_text()))


def complaint(of: Compiled) -> str | None:
    """What a kernel falls short of, or None."""
    kernel = of.kernel
    if kernel.spills or kernel.stack:
        return f"{kernel.spills} spills, {kernel.stack} bytes of stack"
    if of.shared > _SHARED[kernel.arch]:
        return f"{of.shared} bytes of shared memory"
    if of.multiplies and kernel.tensor == 0:
        return "no tensor-core instructions"
    if of.copies_ahead and kernel.async_copies == 0:
        return "no asynchronous copies"
    return None
