"""What NVIDIA documents of its architectures and GPUs, and what follows: occupancy, and a roofline."""

import math
from typing import NamedTuple


class Architecture(NamedTuple):
    """Limits of a compute capability (CUDA C++ Programming Guide, "Technical Specifications per
    Compute Capability")."""

    threads: int
    """Resident on a multiprocessor, as below."""
    blocks: int
    shared: int
    """Bytes, of which every block's system part (1 KiB) and its own are taken."""


REGISTERS = 1 << 16
"""Of a multiprocessor, in four parts, given out to warps 256 at a time."""
_SYSTEM_SHARED = 1 << 10

ARCHITECTURES = {
    "sm_80": Architecture(2048, 32, 164 << 10),
    "sm_86": Architecture(1536, 16, 100 << 10),
    "sm_89": Architecture(1536, 24, 100 << 10),
    "sm_90": Architecture(2048, 32, 228 << 10),
    "sm_100": Architecture(2048, 32, 228 << 10),
    "sm_120": Architecture(1536, 24, 100 << 10),
}
"""Those that kernels are built for."""


def blocks_per_multiprocessor(arch: str, threads: int, registers: int, shared: int) -> int:
    """How many blocks of a kernel are resident on a multiprocessor; 0 where not even one fits.

    The arithmetic of NVIDIA's cuda_occupancy.h, against which the tests hold it.

    Args:
        arch: one of ARCHITECTURES.
        threads: in a block.
        registers: of a thread.
        shared: static and dynamic bytes of a block.
    """
    limits = ARCHITECTURES[arch]
    warps = math.ceil(threads / 32)
    warps_a_part = REGISTERS // 4 // _round_up(max(registers, 1) * 32, 256)
    bytes_a_block = _round_up(shared + _SYSTEM_SHARED, 128)
    if bytes_a_block > limits.shared:
        return 0
    return min(limits.blocks, limits.threads // 32 // warps, warps_a_part * 4 // warps, limits.shared // bytes_a_block)


def occupancy(arch: str, threads: int, registers: int, shared: int) -> float:
    """Resident warps over the most that a multiprocessor takes."""
    resident = blocks_per_multiprocessor(arch, threads, registers, shared) * math.ceil(threads / 32)
    return resident * 32 / ARCHITECTURES[arch].threads


def _round_up(n: int, unit: int) -> int:
    return math.ceil(n / unit) * unit


class Gpu(NamedTuple):
    """A GPU's peaks, dense, from NVIDIA's data sheets."""

    name: str
    multiprocessors: int
    clock: float
    """GHz at which the peaks are quoted: the peak over what all multiprocessors do a clock."""
    half: float
    """TFLOP/s of bf16 and fp16 products summed in float."""
    tf32: float
    bandwidth: float
    """GB/s of DRAM."""


GPUS = (
    Gpu("A100", 108, 1.41, 312.0, 156.0, 2039.0),  # SXM, 80 GB
    Gpu("H100", 132, 1.83, 989.4, 494.7, 3352.0),  # SXM
    Gpu("B200", 148, 1.86, 2250.0, 1125.0, 7700.0),  # in HGX B200
    Gpu("RTX 5090", 170, 2.41, 209.5, 104.8, 1792.0),
)

_SPECIAL_A_CLOCK = 16
"""Exponentials that a multiprocessor computes a clock (Programming Guide, "Arithmetic Instructions")."""


class Work(NamedTuple):
    """What a pass has to do."""

    fewest_bytes: float
    """To and from DRAM: every tensor once."""
    half_flops: float
    """On tensor cores, 16-bit operands."""
    tf32_flops: float
    wavefronts: float
    """Passes over shared memory's banks."""
    exponentials: float


def roofline(gpu: Gpu, work: Work) -> tuple[float, str]:
    """The seconds below which the work cannot be done, and what they are spent on: an estimate, never measured.

    The longest of: every tensor once through DRAM; the products at the tensor cores' peak; shared memory, one pass a
    clock; exponentials. Everything is taken to overlap, caches to be perfect, latency to be hidden.
    """
    clocks = gpu.multiprocessors * gpu.clock * 1e9
    bounds = {
        "memory": work.fewest_bytes / (gpu.bandwidth * 1e9),
        "tensor": work.half_flops / (gpu.half * 1e12) + work.tf32_flops / (gpu.tf32 * 1e12),
        "shared": work.wavefronts / clocks,
        "exp": work.exponentials / (_SPECIAL_A_CLOCK * clocks),
    }
    limit = max(bounds, key=bounds.__getitem__)
    return bounds[limit], limit


_L2_LATENCY = 280
"""Clocks until data from L2 is there; 222 to 339 were measured on an L40 (https://arxiv.org/abs/2606.22588)."""
_L2_BYTES = 48
"""That a multiprocessor gets from L2 a clock: 5120 for the 108 of an A100, by its white paper."""
_EXCHANGE = 3.5
"""Latencies of L2 between a block's last store and its reader's first product: until stores have arrived and the flag
may follow (1), the flag's way (1/2), the poll that finds it (1), the data (1)."""
_CELL = 300
"""Clocks of a step's barriers, partial sums and activations: assumed, none of it counted."""


def step(gpu: Gpu, work: Work, moved: float, blocks: int) -> tuple[float, str]:
    """The seconds that one step of a persistent recurrent kernel takes, and the most of them: an estimate.

    A step waits for the one before it, so that nothing of these overlaps: the exchange between blocks; what a block
    loads and stores; its products; its passes over shared memory; the cell.

    Args:
        work: of all blocks.
        moved: bytes between L2 and all blocks.
        blocks: each on a multiprocessor of its own.
    """
    each = gpu.multiprocessors * gpu.clock * 1e9  # from a GPU's peak to a multiprocessor's, a clock
    clocks = {
        "exchange": _EXCHANGE * _L2_LATENCY,
        "L2": moved / blocks / _L2_BYTES,
        "tensor": (work.half_flops / (gpu.half * 1e12) + work.tf32_flops / (gpu.tf32 * 1e12)) * each / blocks,
        "shared": work.wavefronts / blocks,
        "cell": _CELL,
    }
    return sum(clocks.values()) / (gpu.clock * 1e9), max(clocks, key=clocks.__getitem__)
