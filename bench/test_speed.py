"""The benchmark's rows as pytest-benchmark cases: `pytest bench --benchmark-only`.

Each row is a group of two, fastnets and torch. `fastnets bench` times them in turns and is the one to quote.
"""

import pytest

from fastnets import testing
from fastnets.bench import measure
from fastnets.bench.rows import OURS, THEIRS, Row, network_rows, operator_rows

ROWS = [*operator_rows(testing.operator_table()), *network_rows()]


@pytest.fixture(scope="module", autouse=True)
def _freed_memory_kept():
    with measure.freed_memory_kept():
        yield


@pytest.mark.parametrize("rival", [OURS, THEIRS])
@pytest.mark.parametrize("row", [pytest.param(row, id=row.title) for row in ROWS])
def test_row(benchmark, row: Row, rival: str):
    benchmark.group = row.title
    benchmark.pedantic(row.prepare()[rival], rounds=5, warmup_rounds=1)
