"""Data and settings that are invalid, or that changed between a run and its resume."""

import json
import socket
from pathlib import Path

import pytest
from rig import KILL, Rig, at_step, metrics

GOOD = {"prompt": "a", "chosen": " b", "rejected": " c"}


@pytest.mark.fault(
    "line 17 of a JSON Lines file is malformed",
    "status 2; file and line are named",
)
def test_a_malformed_line_is_named(rig: Rig, tmp_path: Path) -> None:
    file = tmp_path / "broken.jsonl"
    file.write_text("\n".join([json.dumps(GOOD)] * 16 + ["{not json", json.dumps(GOOD)]) + "\n")
    ended = rig.run("malformed", "--data.train", str(file))
    assert set(ended.statuses) == {2}
    assert "broken.jsonl" in ended.output
    assert "17" in ended.output


@pytest.mark.fault(
    "an empty data file",
    "status 2; the file is named",
)
def test_an_empty_file(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    ended = rig.run("empty", "--data.train", str(tmp_path / "empty.jsonl"))
    assert set(ended.statuses) == {2}
    assert "empty.jsonl" in ended.output


@pytest.mark.fault(
    "fewer pairs than ranks, in training and in evaluation",
    "trains and evaluates; ranks without work still participate",
)
def test_fewer_pairs_than_ranks(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text(json.dumps(GOOD) + "\n")
    one = str(tmp_path / "one.jsonl")
    data = ("--data.train", one, "--data.test", one)
    rig.completed("cache_of_one", *data, command="precompute-ref", world_size=1, stage=None)
    run_dir = rig.completed("one_pair", *data)
    assert metrics(run_dir)[0]["eval/loss"] == pytest.approx(0.693147, abs=1e-6)


@pytest.mark.fault(
    "an evaluation set whose size is not divisible by ranks x batch",
    "metrics equal those of one process to 1e-6",
)
def test_an_evaluation_set_that_does_not_divide_evenly(rig: Rig, tmp_path: Path) -> None:
    rows = (rig.folder / "pairs.jsonl").read_text().splitlines()[:7]
    (tmp_path / "seven.jsonl").write_text("\n".join(rows) + "\n")
    arguments = ("--data.test", str(tmp_path / "seven.jsonl"), "--train.max_steps", "1")
    two = metrics(rig.completed("seven_2", *arguments))
    one = metrics(rig.completed("seven_1", *arguments, world_size=1, stage=None))
    for key in (key for key in two[0] if key.startswith("eval/")):
        assert two[-1][key] == pytest.approx(one[-1][key], abs=1e-6), key


@pytest.mark.fault(
    "resumed with a different loss, beta, seed, batch, schedule or length",
    "refused, with every key shown; train.resume_allow permits the keys it names",
)
def test_changed_settings_are_refused_key_by_key(rig: Rig) -> None:
    rig.run("changing", before=at_step(3, KILL, 0, 1))
    changes = {
        "loss.beta": "0.2",
        "train.seed": "7",
        "train.pairs_per_step": "5",
        "train.schedule": "linear",
        "train.num_epochs": "3",
    }
    arguments = [word for key, value in changes.items() for word in (f"--{key}", value)]
    ended = rig.run("changing", *arguments)
    assert set(ended.statuses) == {2}
    for key, value in changes.items():
        assert f"{key}: " in ended.output
        assert f"-> {value}" in ended.output
    allowed = rig.run("changing", *arguments, "--train.resume_allow", ",".join(changes))
    assert set(allowed.statuses) == {0}, allowed.output[-3000:]
    assert "after step 2" in allowed.output


@pytest.mark.fault(
    "resumed after the data file was changed",
    "refused: the content differs; train.resume_allow data.train permits it",
)
def test_changed_data_is_refused(rig: Rig, tmp_path: Path) -> None:
    rows = (rig.folder / "pairs.jsonl").read_text().splitlines()
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(rows) + "\n")
    rig.run("data", "--data.train", str(file), before=at_step(3, KILL, 0, 1))
    file.write_text("\n".join(rows[::-1]) + "\n")
    ended = rig.run("data", "--data.train", str(file))
    assert set(ended.statuses) == {2}
    assert "data.train: content " in ended.output
    allow = ("--train.resume_allow", "data.train", "--reference.audit_rows", "0")
    assert set(rig.run("data", "--data.train", str(file), *allow).statuses) == {0}


@pytest.mark.fault(
    "the port for the ranks is in use",
    "without MASTER_PORT a free port is chosen; a MASTER_PORT that is in use is an error",
)
def test_a_port_in_use(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("localhost", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        ended = rig.run("port", "--train.max_steps", "1", launcher=True)
    assert ended.statuses == [2], ended.output[-2000:]
    assert "MASTER_PORT" in ended.output.strip().splitlines()[-1]
