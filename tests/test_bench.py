"""The measuring core and the report."""

import io
import math
import platform
import resource
import time

import pytest
import torch
from rich.console import Console

from fastnets import testing
from fastnets.bench import growth, measure, report
from fastnets.bench.rivals import RIVALS, missing
from fastnets.bench.rows import OURS, THEIRS, Row, operator_rows


def _measurement(family: str, mode: str, ours: float, theirs: float, **row) -> report.Measurement:
    return report.Measurement(
        Row(family, "case", torch.float32, mode, dict, **row),
        {OURS: measure.Timing([ours]), THEIRS: measure.Timing([theirs])},
        {OURS: 1000000, THEIRS: None},
        measure.Limits(flops=12e9, bytes=8e9),
    )


def test_quantiles():
    timing = measure.Timing([5.0, 1.0, 3.0, 2.0, 4.0, 6.0])
    assert timing.p50 == 3.5
    assert (timing.p20, timing.p80) == (2.0, 5.0)
    assert measure.Timing([7.0]).p80 == 7.0


def test_rivals_take_turns():
    calls: list[str] = []
    timings = measure.compare({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 0.01)
    assert len(timings["a"].samples) == len(timings["b"].samples) >= 3
    runs = [name for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name]
    assert len(runs) > 3  # blocks of a and of b in turns, not all of a and then all of b


def test_times_are_those_of_one_call():
    timings = measure.compare({"short": lambda: time.sleep(0.0005), "long": lambda: time.sleep(0.02)}, 0.1)
    assert 0.0005 <= timings["short"].p50 < timings["long"].p50
    assert timings["long"].p50 >= 0.02


def test_peak_memory_is_that_of_the_call():
    size = 64 << 20

    def used(count: int) -> int | None:
        def call():
            return [torch.ones(size, dtype=torch.uint8) for _ in range(count)]

        call()
        return measure.peak_memory(call)

    with measure.freed_memory_kept():
        assert used(1) == pytest.approx(size, rel=0.02)
        assert used(2) == pytest.approx(2 * size, rel=0.02)


def test_samples_meet_warm_memory():
    """Results of 32 MB at several places, after the row before gave every free page back."""
    if platform.libc_ver()[0] != "glibc" or tuple(map(int, platform.release().split(".")[:2])) < (5, 14):
        pytest.skip("needs glibc and Linux 5.14, which maps pages on request")
    faults = []

    def call():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        results = [torch.ones(8 << 20) for _ in range(len(faults) % 4 + 1)]
        faults.append((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / len(results))

    with measure.freed_memory_kept():
        measure.peak_memory(call)
        faults.clear()
        measure.compare({"a": call}, 0.1)
    assert len(faults) > 4
    assert max(faults[1:]) < 100  # of 8,192 pages; the first call comes before the heap is warmed


def test_share_of_what_the_machine_can_do():
    assert _measurement("conv", "forward", 0.5, 1.0, flops=3e9).share == 0.5
    assert _measurement("softmax", "forward", 0.5, 1.0, bytes=1e9).share == 0.25
    assert _measurement("conv", "forward", 0.5, 1.0, flops=3e9, bytes=3e9).share == 0.75  # the limit that is closer
    assert _measurement("network", "forward", 0.5, 1.0, items=3.0).share is None


def test_the_fastest_rival_counts():
    m = _measurement("conv", "forward", 0.5, 1.0)
    assert m.against_best is None
    m.timings["compile"] = measure.Timing([0.75])
    assert (m.speedup, m.against_best) == (2.0, 1.5)


def test_rivals_run_the_same_function():
    case = next(case for case in testing.operator_table("softmax") if case.benchmark)
    inputs = case.inputs(torch.Generator().manual_seed(0))
    available = [name for name in RIVALS if missing(name) is None]
    assert "compile" in available
    for name in available:
        found = RIVALS[name](case.peer, inputs)()
        torch.testing.assert_close(torch.as_tensor(found[0] if name == "onnxruntime" else found), case.peer(**inputs))


def test_limits_are_of_this_machine():
    limits = measure.Limits.measured()
    assert limits.bytes > 1e8
    assert limits.flops is None or limits.flops > limits.bytes / 8  # a processor has more than a FLOP for a float


def test_rates():
    m = _measurement("conv", "forward", 0.5, 1.0, flops=3e9)
    assert m.speedup == 2.0
    assert m.rate(OURS) == (6.0, "GFLOP/s")
    assert m.rate(THEIRS) == (3.0, "GFLOP/s")
    assert _measurement("conv", "forward", 0.5, 1.0).rate(OURS) is None


def test_geometric_means():
    means = report.geometric_means(
        [
            _measurement("conv", "forward", 1.0, 4.0),
            _measurement("conv", "forward", 1.0, 1.0),
            _measurement("conv", "training", 2.0, 1.0),
        ]
    )
    assert means == {("conv", "forward"): pytest.approx(2.0), ("conv", "training"): pytest.approx(0.5)}


@pytest.mark.parametrize("mode", ["forward", "training"])
def test_both_rivals_of_a_row_do_the_same(mode):
    case = next(case for case in testing.operator_table("softmax") if case.benchmark)
    row = next(row for row in operator_rows([case]) if row.mode == mode and row.dtype == torch.float32)
    calls = row.prepare()
    ours, theirs = (testing.flatten(calls[name]()) for name in (OURS, THEIRS))
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def _points(name: str, *costs: tuple[int, float]) -> list[growth.Point]:
    return [growth.Point("attention", name, "forward", "L", size, cost, int(1000 * cost)) for size, cost in costs]


def test_order_of_growth_is_that_of_the_upper_half():
    quadratic = _points("full", (1, 7.0), (2, 7.0), (4, 1.6), (8, 6.4))  # small sizes cost what they cost
    assert growth.order(quadratic, lambda p: p.seconds) == pytest.approx(2.0)
    assert growth.order(quadratic, lambda p: p.memory) == pytest.approx(2.0)
    assert math.isnan(growth.order(quadratic[:1], lambda p: p.seconds))
    assert math.isnan(growth.order(quadratic, lambda p: None))


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("series", growth.SERIES, ids=lambda series: series.name)
def test_growth_is_measured_of_every_curve(series, mode):
    point = growth.measured(series, mode, series.sizes[0] // 16)
    assert point.seconds > 0
    assert point.size == series.sizes[0] // 16


def test_growth_is_reported():
    points = _points("full", (1, 1.0), (2, 4.0), (4, 16.0), (8, 64.0))
    shown = io.StringIO()
    Console(file=shown, width=132).print(growth.table(points))
    assert "L^2.00" in shown.getvalue()
    assert "4.00" in shown.getvalue()
