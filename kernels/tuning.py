"""Tiles by measurement, where it is asked for: FASTNETS_TRITON_TUNE=1.

The tables of tiles hold without it. With it, the first call of a kernel with a bucket of sizes times the table's tile
and its neighbours on the GPU, a second or so, and the fastest is kept on disk, a file an entry: processes that find the
same one out replace each other's file whole. Another tile adds up in another order, so that results may differ in their
last bits from those of another machine.
"""

import hashlib
import json
import math
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_enabled = os.environ.get("FASTNETS_TRITON_TUNE", "") not in ("", "0")

# What is varied, one at a time, and between which bounds; tl.dot takes no less than 16.
_BOUNDS = {"M": (16, 256), "N": (16, 256), "num_warps": (2, 16)}
_STAGES = (1, 5)


def bucket(size: int) -> int:
    """The power of 2 from `size` up: what lies between two of them shares a tile."""
    return 1 << max(size - 1, 0).bit_length()


def folder() -> Path:
    """Where this user's caches lie, by each system's rules."""
    if sys.platform == "win32":
        home = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        home = Path.home() / "Library" / "Caches"
    else:
        home = os.environ.get("XDG_CACHE_HOME", "")
        home = home if os.path.isabs(home) else Path.home() / ".cache"
    return Path(home) / "fastnets" / "triton-tiles"


def neighbours(tile: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The tile itself, then those that differ from it in one thing."""
    yield tile
    for name, (least, most) in _BOUNDS.items():
        for value in (tile[name] // 2, tile[name] * 2):
            if least <= value <= most:
                yield {**tile, name: value}
    for stages in (tile["num_stages"] - 1, tile["num_stages"] + 1):
        if _STAGES[0] <= stages <= _STAGES[1]:
            yield {**tile, "num_stages": stages}


class Tuner:
    """Remembers the fastest tile of each key, in this process and in a folder."""

    def __init__(self, folder: Path, timer: Callable[[Callable[[], Any]], float]) -> None:
        """timer: how long a call takes; infinity where the GPU does not take it."""
        self._folder, self._timer = folder, timer
        self._known: dict[str, dict[str, Any]] = {}
        self._lock = threading.RLock()
        self._warned = False

    def choose(self, key: str, tile: dict[str, Any], run: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        """The fastest of `tile` and its neighbours.

        Args:
            key: whatever the answer depends on.
            run: does the work with a tile, any number of times with the same result.
        """
        with self._lock:
            if key not in self._known:
                self._known[key] = self._read(key, tile) or self._measured(key, tile, run)
            return self._known[key]

    def _measured(self, key: str, tile: dict[str, Any], run: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        times = [(self._timer(lambda each=each: run(each)), each) for each in neighbours(tile)]
        least, fastest = min(times, key=lambda timed: timed[0])  # the first of equals, which is the table's
        if math.isfinite(least):
            self._write(key, fastest)
        return fastest

    def _path(self, key: str) -> Path:
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"

    def _read(self, key: str, tile: dict[str, Any]) -> dict[str, Any] | None:
        """What is on disk, if it can be a tile like this one."""
        path = self._path(key)
        try:
            entry = json.loads(path.read_bytes())
            if entry["key"] == key and entry["tile"] in list(neighbours(tile)):
                return entry["tile"]
            problem = "it is of something else"
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            problem = f"{type(error).__name__}: {error}"
        self._warn(f"{path} is ignored: {problem}")
        return None

    def _write(self, key: str, tile: dict[str, Any]) -> None:
        path = self._path(key)
        unfinished = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._folder, suffix=".unfinished", delete=False) as file:
                unfinished = Path(file.name)
                json.dump({"key": key, "tile": tile}, file)
            unfinished.replace(path)
        except OSError as error:
            if unfinished is not None:
                unfinished.unlink(missing_ok=True)
            self._warn(f"tiles are not kept, {path} cannot be written: {error}")

    def _warn(self, problem: str) -> None:
        if not self._warned:
            warnings.warn(f"fastnets: {problem}", stacklevel=2)
        self._warned = True


def _on_gpu(call: Callable[[], Any]) -> float:
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        return do_bench(call, warmup=5, rep=20, return_mode="median")
    except OutOfResources:
        return math.inf


_tuner = Tuner(folder(), _on_gpu)


def _gpu(like: Tensor) -> str | None:
    """The GPU's name, or None where nothing can be timed."""
    if like.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    return torch.cuda.get_device_name(like.device)


def tuned(
    kernel: str,
    like: Tensor,
    sizes: Iterable[int],
    exact: Iterable,
    tile: dict[str, Any],
    run: Callable[[dict[str, Any]], Any],
) -> dict[str, Any]:
    """The table's tile or, with FASTNETS_TRITON_TUNE, the one that was measured to be the fastest.

    Args:
        kernel: its name.
        like: a tensor of the device and dtype.
        sizes: that count by their bucket.
        exact: what else the answer depends on.
        tile: the table's, with M, N, num_warps and num_stages.
        run: does the work with a tile, any number of times with the same result.
    """
    if not _enabled or (gpu := _gpu(like)) is None:
        return tile
    import triton

    key = (kernel, gpu, triton.__version__, like.dtype, [bucket(size) for size in sizes], list(exact), tile)
    return _tuner.choose(repr(key), tile, run)
