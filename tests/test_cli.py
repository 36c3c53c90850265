"""The command line: what it prints and writes, and its exit status."""

import csv
import json
import subprocess
import sys

import pytest
import torch

from fastnets import _library, dispatch, testing
from fastnets.cli import main

ONE_CASE = ["--op", "softmax", "--match", "5x37", "--dtype", "float32"]
ONE_ROW = ["--op", "softmax", "--match", "4096x1000", "--dtype", "float32", "--seconds", "1"]
CASE_KEYS = {"op", "backend", "case", "dtype", "error", "tolerance", "status", "reason"}


def _softmax_on_cpu(monkeypatch, *, operators=torch.ops.fastnets, objection: str | None = None) -> None:
    """Replaces the cpu backend's softmax."""
    implementation = dispatch.Implementation("cpu", lambda case: objection, operators)
    monkeypatch.setitem(dispatch.IMPLEMENTATIONS, ("softmax", "cpu"), implementation)


class _Wrong:
    """A softmax that is one per cent off."""

    @staticmethod
    def softmax_forward(x, mask, dim, scale):
        return 1.01 * torch.ops.fastnets.softmax_forward(x, mask, dim, scale)

    softmax_backward = torch.ops.fastnets.softmax_backward


class _Raising:
    @staticmethod
    def softmax_forward(x, mask, dim, scale):
        raise RuntimeError("the kernel [fell] over")


def _verify(tmp_path, *more: str) -> tuple[int, dict]:
    path = tmp_path / "verify.json"
    status = main(["verify", *ONE_CASE, "--json", str(path), *more])
    return status, json.loads(path.read_text())


def test_module_and_version():
    command = [sys.executable, "-m", "fastnets", "--version"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert out.startswith("fastnets 0.")


@pytest.mark.parametrize(
    "command", [(), ("info",), ("verify",), ("bench",), ("train",), ("inspect",), ("wheel-check",)]
)
def test_help(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    assert "usage: fastnets" in capsys.readouterr().out


def test_info(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"missing: {dispatch.why_missing('triton')}" in " ".join(out.split())
    assert "No GPU has run any of this" in out


def test_info_json(capsys):
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert found["instruction_set"]["in_use"] in _library.CPU_CAPABILITIES
    assert [row["backend"] for row in found["backends"]] == list(dispatch.BACKENDS)
    assert {row["backend"]: row["reason"] for row in found["backends"] if not row["available"]} == {
        name: reason for name in dispatch.BACKENDS if (reason := dispatch.why_missing(name)) is not None
    }
    assert "GCC" in found["build"]["compiler"] or "clang" in found["build"]["compiler"]


def test_verify_json(tmp_path, capsys):
    here = {name for name in dispatch.BACKENDS if dispatch.why_missing(name) is None}
    status, found = _verify(tmp_path)
    assert status == 0
    assert set(found) == {"passed", "failed", "skipped", "cases"}
    assert (found["passed"], found["failed"], found["skipped"]) == (len(here), 0, 0)
    assert {case["backend"] for case in found["cases"]} == here
    for case in found["cases"]:
        assert set(case) == CASE_KEYS
        assert case["status"] == "passed"
        assert case["error"] <= case["tolerance"]
    assert f"{len(here)} passed, 0 failed, 0 skipped" in capsys.readouterr().out


def test_verify_quick_leaves_out_slow_cases(tmp_path):
    path = tmp_path / "verify.json"
    chosen = ["--op", "softmax", "--dtype", "float32", "--backend", "cpu", "--quick"]
    assert main(["verify", *chosen, "--json", str(path)]) == 0
    names = {case["case"] for case in json.loads(path.read_text())["cases"]}
    assert names == {case.name for case in testing.operator_table("softmax") if case.verify and case.quick}


def test_verify_verbose_lists_every_case(tmp_path, capsys):
    _verify(tmp_path, "--verbose", "--backend", "cpu")
    assert capsys.readouterr().out.count("5x37") == 2  # in the list, and as the worst case of the total


def test_verify_fails_on_a_wrong_result(tmp_path, capsys, monkeypatch):
    _softmax_on_cpu(monkeypatch, operators=_Wrong)
    status, found = _verify(tmp_path, "--backend", "reference", "--backend", "cpu")
    assert status == 1
    assert (found["passed"], found["failed"]) == (1, 1)
    failed = next(case for case in found["cases"] if case["status"] == "failed")
    assert failed["backend"] == "cpu"
    assert failed["error"] > failed["tolerance"]
    assert "FAILED softmax 5x37, float32 on cpu: output 0" in capsys.readouterr().out


def test_verify_reports_what_an_operator_raises(tmp_path, capsys, monkeypatch):
    _softmax_on_cpu(monkeypatch, operators=_Raising)
    status, found = _verify(tmp_path, "--backend", "cpu")
    assert status == 1
    assert found["cases"][0]["reason"] == "RuntimeError: the kernel [fell] over"
    assert found["cases"][0]["error"] is None
    assert "the kernel [fell] over" in capsys.readouterr().out


def test_verify_skips_only_on_an_objection(tmp_path, capsys, monkeypatch):
    _softmax_on_cpu(monkeypatch, objection="it takes no Tuesdays")
    status, found = _verify(tmp_path, "--backend", "cpu")
    assert status == 0
    assert (found["passed"], found["skipped"]) == (0, 1)
    assert "it takes no Tuesdays" in found["cases"][0]["reason"]
    assert "it takes no Tuesdays" in capsys.readouterr().out


def test_verify_interrupted_keeps_what_was_done(tmp_path, capsys, monkeypatch):
    check, calls = testing.check, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return check(*arguments)

    monkeypatch.setattr(testing, "check", interrupted)
    status, found = _verify(tmp_path)
    assert status == 130
    assert len(found["cases"]) == 1
    assert "interrupted" in capsys.readouterr().out


def test_bench_one_row(tmp_path, capsys):
    figures, lines = tmp_path / "bench.json", tmp_path / "bench.csv"
    assert main(["bench", *ONE_ROW, "--skip-verify", "--json", str(figures), "--csv", str(lines)]) == 0
    out = capsys.readouterr().out
    assert "NOT VERIFIED" in out
    found = json.loads(figures.read_text())
    assert found["environment"]["verified"] is False
    assert found["environment"]["versions"]["torch"] == torch.__version__
    assert [row["mode"] for row in found["rows"]] == ["forward", "training"]
    for row in found["rows"]:
        assert 0 < row["fastnets_p20"] <= row["fastnets_p50"] <= row["fastnets_p80"]
        assert row["speedup"] == pytest.approx(row["torch_p50"] / row["fastnets_p50"])
    assert found["rows"][0]["rate_unit"] == "GB/s"
    records = list(csv.DictReader(lines.open()))
    assert [float(record["speedup"]) for record in records] == [row["speedup"] for row in found["rows"]]
    assert {record["torch"] for record in records} == {torch.__version__}


def test_bench_refuses_what_is_wrong(capsys, monkeypatch):
    _softmax_on_cpu(monkeypatch, operators=_Wrong)
    assert main(["bench", *ONE_ROW]) == 1
    out = capsys.readouterr().out
    assert "FAILED softmax" in out
    assert "not benchmarked" in out
    assert "GB/s" not in out


def test_bench_interrupted_prints_what_was_measured(capsys, monkeypatch):
    from fastnets.bench import measure

    compare, calls = measure.compare, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return compare(*arguments)

    monkeypatch.setattr(measure, "compare", interrupted)
    assert main(["bench", *ONE_ROW, "--skip-verify"]) == 130
    out = capsys.readouterr().out
    assert "forward" in out
    assert "interrupted" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "--backend", "cuda"], "cuda does not run here: torch"),
        (["verify", "--backend", "gpu"], "expected one of reference, cpu"),
        (["verify", "--op", "softmax", "--match", "no such case"], "no case of the operator table"),
        (["bench", "--op", "softmax", "--match", "no such case"], "no row of the benchmark"),
        (["bench", "--growth", "--op", "softmax"], "no curve is left"),
        (["bench", "--growth", "--csv", "growth.csv"], "has no --csv"),
    ],
)
def test_mistakes_in_one_line(capsys, arguments, message):
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["verfy"], "invalid choice"),
        (["verify", "--op", "pool"], "invalid choice"),
        (["verify", "--json", "no/such/folder/x.json"], "there is no folder no/such/folder"),
        (["bench", "--threads", "0"], "expected a positive number"),
    ],
)
def test_mistakes_in_options(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
