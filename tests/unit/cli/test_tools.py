"""Commands with options of their own: what they refuse, and in which place."""

import contextlib
from pathlib import Path

import pytest

from dpo.cli import main as cli
from dpo.cli.tools import _bytes

REQUIRED = ["--model.name_or_path", "m", "--data.train", "d"]
NEITHER = "dpo: error: expected a folder or --config FILE: see dpo cache --help"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["zzqq", "F"], "dpo: error: no action zzqq; expected info, verify or prune: see dpo cache --help"),
        (["--config", "F"], "dpo: error: no action --config; expected info, verify or prune"),
        (["info"], NEITHER),
        (["verify", "--recompute", "3"], NEITHER),
        (["prune", "--dry_run"], NEITHER),
        (
            ["info", "F", "--config", "experiment.yaml"],
            "dpo: error: --config: dpo cache info FOLDER does not",
        ),
        (["info", "F", "G"], "dpo: error: G: dpo cache info FOLDER does not take it"),
        (["info", "F", "--loss.beta", "1"], "dpo: error: --loss.beta: dpo cache info FOLDER does not take"),
        (["verify", "F", "--recompute", "-1"], "dpo: error: --recompute: -1; expected a number of rows"),
        (
            ["verify", "F", "--recompute", "many"],
            "dpo: error: argument --recompute: invalid int value: 'many'",
        ),
        (["verify", "F", "--recompute"], "dpo: error: argument --recompute: expected one argument"),
        (
            ["info", "F", "--recompute", "3"],
            "dpo: error: --recompute: dpo cache info FOLDER does not take it",
        ),
        (
            ["prune", "F", "--recompute", "3"],
            "dpo: error: --recompute: dpo cache prune FOLDER does not take it",
        ),
        (
            ["verify", "F", "--recompute", "3"],
            "dpo: error: --recompute: ",
        ),
        (
            ["info", "/no/such/cache"],
            "dpo: error: /no/such/cache: no reference cache there; expected a folder",
        ),
        (["info", "--config", "/no/such.yaml"], "dpo: error: --config: /no/such.yaml: No such file"),
        (
            ["prune", *REQUIRED, "--and_config", "/no/such.yaml"],
            "dpo: error: --config: /no/such.yaml: No such",
        ),
        (["info", "--los.beta", "1"], "dpo: error: 3 problems in the configuration:"),
        (
            ["info", *REQUIRED, "--dry_ru"],
            "dpo: error: 1 problem in the configuration:\n  dry_ru: unknown key",
        ),
    ],
)
def test_bad_usage_of_cache_is_one_message_and_status_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["cache", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(said)
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_cache_without_an_action_shows_its_usage_and_is_bad_usage(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.run(["cache"]) == 2
    usage = capsys.readouterr().out
    assert all(f"dpo cache {action}" in usage for action in ("info", "verify", "prune"))
    assert cli.run(["cache", "--help"]) == 0
    assert capsys.readouterr().out == usage


@pytest.mark.parametrize("action", ["info", "verify", "prune"])
def test_help_of_an_action_is_that_of_cache(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(["cache"])
    usage = capsys.readouterr().out
    with contextlib.suppress(SystemExit):  # as `dpo train --help` ends
        cli.run(["cache", action, "--help"])
    assert capsys.readouterr().out == usage


@pytest.mark.parametrize(
    "arguments",
    [
        ["info", "F", "--dry_run"],
        ["verify", "F", "--dry_run"],
        ["info", "F", "--and_config", "other.yaml"],
        ["prune", "F", "--and_config", "other.yaml"],
    ],
)
def test_an_option_that_would_do_nothing_is_refused(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.yaml").write_text("model: {name_or_path: m}\ndata: {train: d}\n")
    assert cli.run(["cache", *arguments]) == 2
    assert arguments[2] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "number"),
    [
        ("80", 80e9),
        ("80GB", 80e9),
        ("1GiB", 2**30),
        ("85899345920", 80 * 2**30),
        ("141 GB", 141e9),
        ("many", 0),
    ],
)
def test_a_number_alone_is_a_size_in_gb(size: str, number: float) -> None:
    assert _bytes(size) == number
