"""A small part of `make sanitize`: every driver passes, and a missing barrier, wait or fence is noticed."""

import host_compiler
import mutants
import pytest
import sanitizers

STATEMENTS = mutants.statements()
OF_TENSOR_CORE = [s for s in STATEMENTS if s.file == "tests/sanitize/tensor_core.cu"]


@pytest.fixture
def perform():
    """Runs a family's kernels, nothing or one statement missing."""
    host_compiler.compiler()

    def build_and_perform(family, schedules, removed):
        run = sanitizers.Run(family, "plain", schedules, removed)
        sanitizers.build([run], jobs=1)
        return sanitizers.perform(run)

    return build_and_perform


@pytest.mark.parametrize("family", sanitizers.families())
def test_kernels_give_the_values_of_loops_in_double(perform, family):
    outcome = perform(family, 2, mutants.NOTHING)
    assert outcome.noticed is None, outcome.output
    assert int(outcome.output.split()[0]) >= 20


@pytest.mark.parametrize("statement", OF_TENSOR_CORE, ids=lambda s: f"{s.line} {s.text}")
def test_a_missing_statement_is_noticed(perform, statement):
    assert perform("tensor_core", sanitizers.SCHEDULES, statement.number).noticed is not None


def test_statements_are_found_in_the_kernels():
    found = {(statement.file, statement.text.split("(")[0]) for statement in STATEMENTS}
    assert ("csrc/cuda/reduce.h", "__syncthreads") in found
    assert ("csrc/cuda/softmax.cu", "__syncthreads") in found
    assert len({text for _, text in found}) >= 6


def test_every_proof_of_redundance_is_about_one_statement():
    assert sanitizers.stale_entries(STATEMENTS) == []


def test_a_call_that_cannot_be_left_out_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    path = tmp_path / "kernel.cu"
    path.write_text("void f() {\n  named_barrier(1,\n                64);\n}\n")
    with pytest.raises(ValueError, match=r"kernel\.cu:2"):
        mutants.number(path, 0)
    path.write_text(
        "__device__ void named_barrier(int id, int threads) {}\nvoid f() {\n  if (a) named_barrier(1, 2);\n}\n"
    )
    statements, text = mutants.number(path, 5)
    assert [(s.number, s.line, s.before) for s in statements] == [(5, 3, "void f() {")]
    assert "if (a) FASTNETS_STATEMENT(5, (named_barrier(1, 2)));" in text
