"""Tiles by measurement: what is timed, what is kept, by whom. No GPU: the times are made up."""

import json
import math
import multiprocessing
import warnings
from pathlib import Path

import pytest
import torch
from test_triton import interpreted

import fastnets
from fastnets.kernels import tuning
from fastnets.testing import full_precision

TILE = {"M": 64, "N": 32, "num_warps": 4, "num_stages": 2}


def _tuner(folder: Path, best: dict, calls: list) -> tuning.Tuner:
    """Times `best` as the fastest; run notes what it is given."""

    def timer(call) -> float:
        call()
        return 1.0 if calls[-1] == best else math.inf if calls[-1]["num_warps"] == 8 else 2.0

    return tuning.Tuner(folder, timer)


def test_sizes_share_a_bucket():
    assert [tuning.bucket(n) for n in (0, 1, 2, 3, 4, 5, 1000, 1024, 1025)] == [1, 1, 2, 4, 4, 8, 1024, 1024, 2048]


def test_neighbours_stay_within_bounds():
    found = list(tuning.neighbours({**TILE, "N": 16, "num_warps": 16, "num_stages": 1, "K": 32}))
    assert found[0] == {**TILE, "N": 16, "num_warps": 16, "num_stages": 1, "K": 32}
    assert all(each["K"] == 32 and each["N"] >= 16 and each["num_warps"] <= 16 for each in found)
    assert len(found) == 1 + 2 + 1 + 1 + 1


def test_the_fastest_is_kept(tmp_path):
    best, calls = {**TILE, "M": 128}, []
    tuner = _tuner(tmp_path, best, calls)
    assert tuner.choose("key", TILE, calls.append) == best
    timed = len(calls)
    assert calls[0] == TILE
    assert tuner.choose("key", TILE, calls.append) == best
    assert _tuner(tmp_path, TILE, calls).choose("key", TILE, calls.append) == best  # from the folder
    assert len(calls) == timed
    assert _tuner(tmp_path, TILE, calls).choose("other key", TILE, calls.append) == TILE
    assert len(list(tmp_path.iterdir())) == 2


def test_nothing_is_kept_where_nothing_fits(tmp_path):
    tuner = tuning.Tuner(tmp_path, lambda call: math.inf)
    assert tuner.choose("key", TILE, lambda tile: None) == TILE
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\xff\x00 no text",
        b'{"key": "key", "tile": {"M": 64',
        b"[1, 2]",
        b'{"key": "another", "tile": {}}',
        json.dumps({"key": "key", "tile": {**TILE, "M": 7}}).encode(),
        json.dumps({"key": "key", "tile": {**TILE, "M": "64"}}).encode(),
    ],
)
def test_a_damaged_entry_is_ignored(damage, tmp_path):
    best, calls = {**TILE, "M": 128}, []
    _tuner(tmp_path, best, calls).choose("key", TILE, calls.append)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage)
    again = _tuner(tmp_path, best, calls)
    with pytest.warns(UserWarning, match="is ignored"):
        assert again.choose("key", TILE, calls.append) == best
    assert json.loads(path.read_bytes()) == {"key": "key", "tile": best}


def test_there_is_one_warning(tmp_path):
    (tmp_path / "folder").write_text("a file where the folder belongs")
    tuner = tuning.Tuner(tmp_path / "folder", lambda call: 1.0)
    with pytest.warns(UserWarning, match="is ignored") as caught:
        assert [tuner.choose(key, TILE, lambda tile: None) for key in "abc"] == [TILE] * 3
    assert len(caught) == 1


def _write_often(folder: Path, warps: int, barrier) -> None:
    warnings.simplefilter("error")
    tile = {**TILE, "num_warps": warps}
    barrier.wait()
    for turn in range(100):
        tuner = tuning.Tuner(folder, lambda call: 1.0)
        tuner._write(f"key {turn % 5}", tile)
        assert tuner._read(f"key {turn % 5}", TILE) is not None


def test_processes_write_at_the_same_time(tmp_path):
    processes = multiprocessing.get_context("fork")
    barrier = processes.Barrier(3)
    writers = [processes.Process(target=_write_often, args=(tmp_path, warps, barrier)) for warps in (2, 4, 8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    entries = [json.loads(path.read_bytes()) for path in tmp_path.iterdir()]
    assert sorted(entry["key"] for entry in entries) == [f"key {n}" for n in range(5)]


def test_the_folder_is_the_users(monkeypatch):
    monkeypatch.setattr(tuning.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere/else")
    assert tuning.folder() == Path("/somewhere/else/fastnets/triton-tiles")
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")  # which the specification has ignored
    assert tuning.folder() == Path.home() / ".cache/fastnets/triton-tiles"
    monkeypatch.setattr(tuning.sys, "platform", "darwin")
    assert tuning.folder() == Path.home() / "Library/Caches/fastnets/triton-tiles"
    monkeypatch.setattr(tuning.sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", "/local")
    assert tuning.folder() == Path("/local/fastnets/triton-tiles")


def test_it_is_off_by_default(monkeypatch):
    assert not tuning._enabled
    monkeypatch.setattr(tuning, "_gpu", lambda like: pytest.fail("asked for a GPU"))
    assert tuning.tuned("kernel", torch.empty(1), (1,), (), TILE, pytest.fail) == TILE


def test_without_a_gpu_the_table_holds(monkeypatch):
    monkeypatch.setattr(tuning, "_enabled", True)
    assert tuning.tuned("kernel", torch.empty(1), (1,), (), TILE, pytest.fail) == TILE


@interpreted
def test_every_tile_gives_the_same(tmp_path, monkeypatch):
    """Each kernel that is tuned, run with its tile, with half of M and with twice of it, which is taken."""
    turns, keys = iter(range(1000, 0, -1)), []

    class Noting(tuning.Tuner):
        def choose(self, key, tile, run):
            keys.append(key)
            return super().choose(key, tile, run)

    def timer(call) -> float:
        call()
        return next(turns)

    monkeypatch.setattr(tuning, "_enabled", True)
    monkeypatch.setattr(tuning, "_gpu", lambda like: "a GPU")
    monkeypatch.setattr(tuning, "_tuner", Noting(tmp_path, timer))
    monkeypatch.setattr(tuning, "_BOUNDS", {"M": (16, 256)})
    monkeypatch.setattr(tuning, "_STAGES", (99, 0))
    q = torch.randn(1, 2, 20, 8, requires_grad=True)
    x, weight = (torch.randn(*size, requires_grad=True) for size in ((1, 8, 4, 4), (3, 8, 2, 2)))
    layer = fastnets.nn.RNN(3, 4)

    def results() -> list[torch.Tensor]:
        found = [
            fastnets.functional.scaled_dot_product_attention(q, q, q, is_causal=True),
            fastnets.functional.conv2d(x, weight),
            layer(torch.ones(2, 3, 3))[0],
        ]
        grads = torch.autograd.grad(sum(out.square().sum() for out in found), (q, x, weight, *layer.parameters()))
        return [*found, *grads]

    with fastnets.backend("triton"), full_precision():
        ours = results()
    torch.testing.assert_close(ours, results(), rtol=1e-4, atol=1e-4)
    kernels = {key.split("'")[1] for key in keys}
    assert kernels == {
        "attention_forward", "attention_backward_keys", "attention_backward_queries", "conv_gather", "conv_weight",
        "matmul",
    }  # fmt: skip
    assert len(list(tmp_path.iterdir())) == len(set(keys))
