import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

ABORT = """
import atexit, os
atexit.register(os.abort)
"""


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["dpo", "--help"], 0),
        (["dpo", "no-such-command"], 2),
        (["data_prep", "preferences", "nowhere.jsonl", "--output", "nowhere"], 2),
    ],
)
def test_a_rank_has_the_status_of_its_command_whatever_happens_while_the_interpreter_ends(
    tmp_path: Path, arguments: list[str], status: int
) -> None:
    (tmp_path / "sitecustomize.py").write_text(ABORT)
    search = f"{tmp_path}:{Path(__file__).parents[2]}"
    environment = {**os.environ, "PYTHONPATH": search, "WORLD_SIZE": "1"}
    ended = subprocess.run(
        [sys.executable, "-m", *arguments], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == status, ended.stderr
    assert "dpo --help" in ended.stderr or "usage" in ended.stdout or "nowhere.jsonl" in ended.stderr


def test_an_unexpected_error_keeps_its_traceback_and_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dpo import __main__ as entry

    def broken(arguments: list[str]) -> int:
        raise ZeroDivisionError("of the test")

    monkeypatch.setattr(entry, "run", broken)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert ended.value.code == 1
    assert "ZeroDivisionError: of the test" in capsys.readouterr().err


@pytest.mark.parametrize(("status", "leaves"), [(0, True), (3, True), (2, False), (1, False)])
def test_ranks_that_end_alike_leave_the_process_group(
    status: int, leaves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpo import __main__ as entry
    from dpo import distributed

    done: list[str] = []
    monkeypatch.setattr(entry, "run", lambda arguments: status)
    monkeypatch.setattr(distributed, "leave", lambda: done.append("left"))
    monkeypatch.setattr(os, "_exit", lambda code: done.append(f"exit {code}"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    entry.main()
    assert done == (["left"] if leaves else []) + [f"exit {status}"]


def test_a_reader_that_has_gone_is_no_traceback() -> None:
    command = f"{sys.executable} -m dpo --help | true"
    ended = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert ended.stderr == ""


@pytest.mark.parametrize("users", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_memory_of_gpus_grows_in_place_unless_the_user_says_otherwise(
    users: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpo import __main__ as entry

    found: list[dict[str, str]] = []

    def run(arguments: list[str]) -> int:
        found.append({name: os.environ[name] for name in entry.ALLOCATOR if name in os.environ})
        return 0

    monkeypatch.setattr(entry, "run", run)
    monkeypatch.setattr(entry, "end_with_launcher", lambda: None)
    for name in entry.ALLOCATOR:
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if users:
        monkeypatch.setenv(users, "max_split_size_mb:64")
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert ended.value.code == 0
    assert found == [
        {users: "max_split_size_mb:64"} if users else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    ]


@pytest.mark.parametrize("command", ["check", "compare"])
def test_garbage_is_collected_from_where_a_command_begins(
    command: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not before: importing torch and transformers takes a seventh longer with collections."""
    from dpo import __main__ as entry
    from dpo.cli import main

    begun: list[bool] = []

    def begin(*arguments: object, **options: object) -> int:
        begun.append(gc.isenabled())
        return 0

    def run(arguments: list[str]) -> int:
        assert not gc.isenabled()
        return main.run(arguments)

    monkeypatch.setattr("dpo.commands.check.check", begin)
    monkeypatch.setattr(main, "run_tool", begin)
    monkeypatch.setattr(entry, "run", run)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    keys = ["--model.name_or_path", str(tiny_model), "--data.train", str(tmp_path / "pairs.jsonl")]
    monkeypatch.setattr(sys, "argv", ["dpo", command, *keys])
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert (ended.value.code, begun, gc.isenabled()) == (0, [True], True)


def test_garbage_is_collected_again_after_a_command_that_did_not_begin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from dpo import __main__ as entry

    monkeypatch.setattr(sys, "argv", ["dpo", "train", "--no.such_key", "1"])
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert (ended.value.code, gc.isenabled()) == (2, True)
