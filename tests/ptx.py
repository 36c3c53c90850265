"""Executes straight-line PTX for one warp: just the instructions that nvcc makes of tests/simt/probes.cu.

Written from NVIDIA's "Parallel Thread Execution ISA" (cp.async: 9.7.9.25; ldmatrix, mma and their fragments: 9.7.14.5;
cvt: 9.7.9.21), not from csrc: it is what csrc/cuda/tensor_core.h is held against. Lanes run in lockstep, so that every
instruction takes and gives arrays of 32.
"""

import re

import numpy as np

LANES = np.arange(32)
GROUP, PLACE = LANES >> 2, LANES % 4  # the manual's groupID and threadID_in_group
IN, OUT = 1 << 20, 2 << 20  # addresses of the two buffers in global memory


def entries(text: str) -> dict[str, list[str]]:
    """The instructions of every kernel in a PTX file."""
    found = {}
    for name, body in re.findall(r"\.visible \.entry (\w+)\([^)]*\)[^{]*\{(.*?)\n\}", text, re.DOTALL):
        lines = (re.sub(r"//.*", "", line).strip() for line in body.splitlines())
        found[name] = [line.rstrip(";") for line in lines if line]
    return found


class Warp:
    """One warp that runs a kernel of two pointer parameters."""

    def __init__(self, instructions: list[str], source: np.ndarray, words_out: int):
        self.registers: dict[str, np.ndarray] = {}
        self.memory = {"in": source.view(np.uint8).copy(), "out": np.zeros(4 * words_out, np.uint8)}
        self.shared_names: dict[str, int] = {}
        self.open_group: list[tuple] = []
        self.groups: list[list[tuple]] = []
        for line in instructions:
            self.step(line)

    @property
    def result(self) -> np.ndarray:
        """The output buffer's words."""
        return self.memory["out"].view(np.uint32)

    def step(self, line: str) -> None:
        if line.startswith(".shared"):
            name, size = re.search(r"(\w+)\[(\d+)\]", line).groups()
            if "shared" in self.memory:
                raise NotImplementedError("a second shared array")
            self.shared_names[name] = 0
            self.memory["shared"] = np.zeros(int(size), np.uint8)
            return
        if line.startswith(".reg") or line == "ret":
            return
        opcode, rest = re.fullmatch(r"(\S+)\s*(.*)", line).groups()
        operands = [operand.strip() for operand in re.findall(r"\s*(\{[^}]*\}|\[[^\]]*\]|[^,]+)", rest)]
        parts = opcode.split(".")
        for length in range(len(parts), 0, -1):
            method = getattr(self, "do_" + "_".join(parts[:length]), None)
            if method is not None:
                method(parts[length:], *operands)
                return
        raise NotImplementedError(line)

    # Operands.

    def value(self, operand: str) -> np.ndarray:
        if operand == "%tid.x":
            return LANES.astype(np.uint64)
        if operand.startswith("%"):
            return self.registers[operand]
        number = self.shared_names[operand] if operand in self.shared_names else int(operand)
        return np.full(32, number & 0xFFFFFFFFFFFFFFFF, np.uint64)

    def floats(self, operand: str) -> np.ndarray:
        return self.value(operand).astype(np.uint32).view(np.float32)

    def set(self, operand: str, value: np.ndarray, bits: int = 32) -> None:
        self.registers[operand] = value.astype(np.uint64) & np.uint64((1 << bits) - 1)

    def address(self, operand: str) -> np.ndarray:
        base, _, offset = operand.strip("[]").partition("+")
        return (self.value(base) + np.uint64(int(offset or 0))).astype(np.int64)

    @staticmethod
    def names(operand: str) -> list[str]:
        return [name.strip() for name in operand.strip("{}").split(",")]

    # Memory, byte by byte.

    def locate(self, address: int, space: str, size: int) -> tuple[np.ndarray, int]:
        name, base = ("shared", 0) if space == "shared" else ("in", IN) if address < OUT else ("out", OUT)
        memory, offset = self.memory[name], address - base
        if address % size or not 0 <= offset <= memory.size - size:
            raise IndexError(f"{size} bytes at {address:#x} ({name})")
        return memory, offset

    def read(self, address: int, space: str, size: int) -> np.ndarray:
        memory, offset = self.locate(address, space, size)
        return memory[offset : offset + size].copy()

    def write(self, address: int, space: str, data: np.ndarray) -> None:
        memory, offset = self.locate(address, space, data.size)
        memory[offset : offset + data.size] = data

    # Moves and integers.

    def do_ld(self, modifiers, target, source):
        if modifiers[0] == "param":
            self.set(target, np.full(32, IN if source.strip("[]").endswith("_0") else OUT), 64)
            return
        space = next(m for m in modifiers if m in ("global", "shared"))
        names = self.names(target)
        addresses = self.address(source)
        loaded = np.array([self.read(a, space, 4 * len(names)).view(np.uint32) for a in addresses])
        for i, name in enumerate(names):
            self.set(name, loaded[:, i])

    def do_st(self, modifiers, target, source):
        space = next(m for m in modifiers if m in ("global", "shared"))
        words = np.stack([self.value(name) for name in self.names(source)], 1).astype(np.uint32)
        for address, row in zip(self.address(target), words, strict=True):
            self.write(address, space, row.view(np.uint8))

    def do_mov(self, modifiers, target, source):
        self.set(target, self.value(source), int(modifiers[0][1:]))

    def do_cvta_to_global(self, modifiers, target, source):
        self.set(target, self.value(source), 64)

    def do_add(self, modifiers, target, a, b):
        self.set(target, self.value(a) + self.value(b), int(modifiers[0][1:]))

    def do_sub(self, modifiers, target, a, b):
        self.set(target, self.value(a) - self.value(b), int(modifiers[0][1:]))

    def do_shl(self, modifiers, target, a, b):
        self.set(target, self.value(a) << self.value(b), int(modifiers[0][1:]))

    def do_mul_wide_u32(self, modifiers, target, a, b):
        self.set(target, self.value(a) * self.value(b), 64)

    def do_mul_lo_s32(self, modifiers, target, a, b):
        self.set(target, self.value(a) * self.value(b))

    # Barriers: in lockstep everyone is there.

    def do_bar_sync(self, modifiers, barrier, threads="32"):
        assert (self.value(barrier) < 16).all()
        assert (self.value(threads) == 32).all()

    # cp.async: the copy happens when its group is waited for.

    def do_cp_async(self, modifiers, target, source, size, valid=None):
        assert modifiers[0] == ("cg" if size == "16" else "ca")
        assert modifiers[1:] == ["shared", "global"]
        count = self.value(valid if valid is not None else size)
        self.open_group += zip(
            self.address(target), self.address(source), count.astype(int), [int(size)] * 32, strict=True
        )

    def do_cp_async_commit_group(self, modifiers):
        self.groups.append(self.open_group)
        self.open_group = []

    def do_cp_async_wait_group(self, modifiers, pending):
        while len(self.groups) > int(pending):
            for target, source, valid, size in self.groups.pop(0):
                data = np.zeros(size, np.uint8)
                data[:valid] = self.read(source, "global", size)[:valid]
                self.write(target, "shared", data)

    def do_cp_async_wait_all(self, modifiers):
        self.do_cp_async_commit_group([])
        self.do_cp_async_wait_group([], "0")

    # Matrices.

    def do_ldmatrix_sync_aligned_m8n8(self, modifiers, target, source):
        names, addresses = self.names(target), self.address(source)
        count, transposed = int(modifiers[0][1:]), "trans" in modifiers
        assert modifiers[-2:] == ["shared", "b16"]
        assert len(names) == count
        for m, name in enumerate(names):
            rows = [self.read(a, "shared", 16).view(np.uint16) for a in addresses[8 * m : 8 * m + 8]]
            matrix = np.stack(rows).astype(np.uint64)
            matrix = matrix.T if transposed else matrix
            row = matrix[GROUP]
            self.set(name, row[LANES, 2 * PLACE] | row[LANES, 2 * PLACE + 1] << np.uint64(16))

    def do_mma_sync_aligned_m16n8k16_row_col_f32(self, modifiers, d, a, b, c):
        kind = modifiers[0]
        assert modifiers == [kind, kind, "f32"]
        elements_a, elements_b = self.halves(a, kind), self.halves(b, kind)
        left, right = np.full((16, 16), np.nan), np.full((16, 8), np.nan)
        for i in range(8):
            row = GROUP if i < 2 or 4 <= i < 6 else GROUP + 8
            left[row, 2 * PLACE + (i & 1) + (8 if i >= 4 else 0)] = elements_a[i]
        for i in range(4):
            right[2 * PLACE + (i & 1) + (8 if i >= 2 else 0), GROUP] = elements_b[i]
        self.accumulate(d, left @ right, c)

    def do_mma_sync_aligned_m16n8k8_row_col_f32_tf32_tf32_f32(self, modifiers, d, a, b, c):
        left, right = np.full((16, 8), np.nan), np.full((8, 8), np.nan)
        for i, name in enumerate(self.names(a)):
            left[GROUP if i in (0, 2) else GROUP + 8, PLACE if i < 2 else PLACE + 4] = self.floats(name)
        for i, name in enumerate(self.names(b)):
            right[PLACE if i == 0 else PLACE + 4, GROUP] = self.floats(name)
        self.accumulate(d, left @ right, c)

    def halves(self, operand: str, kind: str) -> list[np.ndarray]:
        """The 16-bit elements of registers, the lower half of each first."""
        found = []
        for name in self.names(operand):
            bits = self.value(name).astype(np.uint32)
            for part in (bits & 0xFFFF, bits >> 16):
                if kind == "bf16":
                    found.append((part << 16).astype(np.uint32).view(np.float32).astype(float))
                else:
                    found.append(part.astype(np.uint16).view(np.float16).astype(float))
        return found

    def accumulate(self, d: str, product: np.ndarray, c: str) -> None:
        values = [self.floats(name) for name in self.names(c)]
        for i, name in enumerate(self.names(d)):
            row = GROUP if i < 2 else GROUP + 8
            total = (product[row, 2 * PLACE + (i & 1)] + values[i]).astype(np.float32)
            self.set(name, total.view(np.uint32))

    # Conversions.

    @staticmethod
    def rounded(x: np.ndarray, bits: int, rounding) -> np.ndarray:
        """x with so many significant bits."""
        mantissa, exponent = np.frexp(x.astype(float))
        return np.ldexp(rounding(np.ldexp(mantissa, bits)), exponent - bits)

    def do_cvt_rna_tf32_f32(self, modifiers, target, source):
        away = self.rounded(self.floats(source), 11, lambda m: np.copysign(np.floor(np.abs(m) + 0.5), m))
        self.set(target, away.astype(np.float32).view(np.uint32))

    def do_cvt_rn_bf16x2_f32(self, modifiers, target, upper, lower):
        high, low = (
            self.rounded(self.floats(x), 8, np.rint).astype(np.float32).view(np.uint32) for x in (upper, lower)
        )
        self.set(target, (high & 0xFFFF0000) | low >> 16)

    def do_cvt_rn_f16x2_f32(self, modifiers, target, upper, lower):
        high, low = (self.floats(x).astype(np.float16).view(np.uint16).astype(np.uint32) for x in (upper, lower))
        self.set(target, high << 16 | low)

    def do_ex2_approx_ftz_f32(self, modifiers, target, source):
        x = self.floats(source)
        result = np.exp2(x.astype(float))
        self.set(target, np.where(result < np.finfo(np.float32).tiny, 0, result).astype(np.float32).view(np.uint32))
