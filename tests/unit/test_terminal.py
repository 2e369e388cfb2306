"""What a command says: in a terminal, in a file, quietly, and as JSON."""

import io
import json
import sys

import pytest
from tqdm import tqdm

from dpo import terminal
from dpo.cli import main as cli


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(terminal.OUTPUT, raising=False)


def speak() -> None:
    terminal.note("a note", "of two lines")
    terminal.warning("a warning")
    terminal.event("metrics", {"step": 1, "train/loss": 0.5})
    terminal.summary("train", {"model": "runs/a/model", "next": ""})


def test_plain_output_has_notes_warnings_and_the_box(capsys: pytest.CaptureFixture[str]) -> None:
    speak()
    printed = capsys.readouterr().out
    assert printed.startswith("a note\nof two lines\na warning\ntrain\n  model  runs/a/model\n  took   ")
    assert "next" not in printed  # there is nothing to say
    assert "\033" not in printed  # no colour into a file
    assert "train/loss" not in printed


def test_quiet_leaves_warnings_and_the_box(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(terminal.OUTPUT, "quiet")
    speak()
    assert list(terminal.progress([1, 2], description="walk", unit="steps")) == [1, 2]
    captured = capsys.readouterr()
    assert captured.out.startswith("a warning\ntrain\n  model  runs/a/model\n")
    assert captured.err == ""


def test_json_lines_are_all_that_standard_output_has(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(terminal.OUTPUT, "json")
    speak()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["event"] for line in lines] == ["note", "warning", "metrics", "summary"]
    assert lines[0]["text"] == "a note\nof two lines"
    assert lines[2] == {"event": "metrics", "step": 1, "train/loss": 0.5}
    assert lines[3]["model"] == "runs/a/model"
    assert lines[3]["seconds"] >= 0


@pytest.mark.parametrize("output", ["", "quiet", "json"])
def test_other_ranks_are_silent(
    output: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv(terminal.OUTPUT, output)
    speak()
    list(terminal.progress([1], description="walk", unit="steps"))
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_a_bar_writes_whole_lines_into_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    monkeypatch.setattr(terminal, "FILE_SECONDS", 0.0)
    with terminal.bar(3, description="walk", unit="steps") as bar:
        for _ in range(3):
            bar.update()
    lines = file.getvalue().splitlines()
    assert lines[0].startswith("walk: 0/3 steps [")
    assert lines[-1].startswith("walk: 3/3 steps [")
    assert "\r" not in file.getvalue()
    assert all(lines)


def test_a_bar_starts_no_thread() -> None:
    with terminal.bar(3, description="work", unit="steps"):
        assert tqdm.monitor is None


def test_a_bar_into_a_file_does_not_write_a_line_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    for _ in terminal.progress(range(10_000), description="walk", unit="steps"):
        pass
    assert file.getvalue() == ""  # it is over before the first line is due


def test_a_terminal_gets_a_box_in_colour_unless_it_asks_for_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal.summary("train", {"model": "runs/a/model"})
    assert capsys.readouterr().out.startswith("╭─ \033[1;32mtrain\033[0m ─")
    monkeypatch.setenv("NO_COLOR", "1")
    terminal.summary("train", {"model": "runs/a/model"})
    assert capsys.readouterr().out.startswith("╭─ train ─")


def test_a_file_gets_lines_that_are_not_broken() -> None:
    text = "word " * 60 + "\nsecond line"
    assert terminal.listing("train", {"result": text, "took": "1 s"}).splitlines() == [
        "train",
        f"  result  {'word ' * 60}",
        "          second line",
        "  took    1 s",
    ]


def test_every_line_of_the_box_is_as_wide_as_the_frame() -> None:
    text = "one two three " * 10 + "\nsecond line"
    lines = terminal.box("evaluate", {"result": text, "took": "1 s"}, 60).splitlines()
    assert {len(line) for line in lines} == {60}
    assert "second line" in lines[-3]


def test_the_title_alone_has_colour_and_does_not_move_the_frame() -> None:
    lines = terminal.box("train", {"took": "1 s"}, 60, colour=True).splitlines()
    assert lines[0].count("\033") == 2
    assert (
        lines[0].replace("\033[1;32m", "").replace("\033[0m", "")
        == lines[0][:0] + "╭─ train " + "─" * 50 + "╮"
    )


def test_a_path_is_not_broken() -> None:
    path = "runs/" + "x" * 100
    assert f"  {path}│" in terminal.box("train", {"model": path}, 60)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(9.44, "9.4 s"), (59.99, "60.0 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")],
)
def test_durations(seconds: float, said: str) -> None:
    assert terminal.duration(seconds) == said


def test_the_flags_go_before_or_after_the_keys_and_an_error_is_said_in_every_mode(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(terminal.OUTPUT, "")  # restored afterwards
    assert cli.run(["train", "--quiet", "--config", "no_such.yaml"]) == 2
    assert "no_such.yaml" in capsys.readouterr().err
    assert cli.run(["train", "--config", "no_such.yaml", "--json_lines"]) == 2
    captured = capsys.readouterr()
    assert "no_such.yaml" in captured.err
    (line,) = captured.out.splitlines()
    end = json.loads(line)
    assert (end["event"], end["status"]) == ("end", 2)
    assert "no_such.yaml" in end["message"]
