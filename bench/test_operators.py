"""The benchmark's operator rows as pytest-benchmark cases: `pytest bench --benchmark-only`.

Each row is a group of two, fastnets and torch. `fastnets bench` times them in turns and is the one to quote.
"""

import pytest
from fastnets.bench import measure
from fastnets.bench.rows import OURS, THEIRS, Row, operator_rows

from fastnets import testing


@pytest.fixture(scope="module", autouse=True)
def _freed_memory_kept():
    with measure.freed_memory_kept():
        yield


@pytest.mark.parametrize("rival", [OURS, THEIRS])
@pytest.mark.parametrize("row", [pytest.param(row, id=row.title) for row in operator_rows(testing.operator_table())])
def test_operator(benchmark, row: Row, rival: str):
    benchmark.group = row.title
    call = row.prepare()[rival]
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)
