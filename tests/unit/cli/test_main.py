"""The command line: what it refuses and in which words, its exit status, and that help needs no torch."""

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpo.cli import main as cli
from dpo.cli.parse import parse
from dpo.config import Config, DataSource, SftConfig
from dpo.errors import UserError

REQUIRED = ["--model.name_or_path", "m", "--data.train", "d"]


def refusal(*arguments: str, command: str = "train") -> list[str]:
    """The lines of the message; the first one counts the problems."""
    with pytest.raises(UserError) as raised:
        parse(command, arguments)
    return str(raised.value).splitlines()


def parsed(*arguments: str) -> Config:
    config = parse("train", [*REQUIRED, *arguments])
    assert isinstance(config, Config)
    return config


def yaml_file(folder: Path, text: str) -> str:
    path = folder / "experiment.yaml"
    path.write_text(text)
    return str(path)


def test_two_keys_are_enough() -> None:
    config = parsed()
    assert (config.model.name_or_path, config.data.train) == ("m", "d")
    assert config.loss.beta == 0.1


def test_arguments_override_the_file_and_the_file_the_defaults(tmp_path: Path) -> None:
    text = "model: {name_or_path: m}\ndata: {train: d}\nloss: {beta: 0.5}\n"
    text += "train: {seed: 3, learning_rate: 5e-7}\n"
    config = parse("train", ["--config", yaml_file(tmp_path, text), "--train.seed=4"])
    assert isinstance(config, Config)
    assert (config.loss.beta, config.train.seed, config.train.learning_rate) == (0.5, 4, 5e-7)
    assert config.train.num_epochs == 1


def test_a_mixture_is_a_list_of_sources(tmp_path: Path) -> None:
    text = "model: {name_or_path: m}\ndata:\n  train:\n    - {path: a, weight: 0.5}\n    - path: b\n"
    config = parse("train", ["--config", yaml_file(tmp_path, text)])
    assert config.data.train == [DataSource(path="a", weight=0.5), DataSource(path="b", weight=1.0)]


def test_sft_of_an_existing_model_needs_no_plan_of_a_new_one() -> None:
    config = parse("sft", REQUIRED)
    assert isinstance(config, SftConfig)
    assert config.model.scratch is None


def test_sft_from_scratch_needs_the_plan(tmp_path: Path) -> None:
    plan = yaml_file(tmp_path, "{}")
    config = parse("sft", ["--data.train", "t.txt", "--model.scratch.config", plan])
    assert isinstance(config, SftConfig)
    assert config.model.scratch is not None
    assert (config.model.scratch.config, config.model.scratch.vocab_size) == (plan, 8192)
    said = refusal("--data.train", "t.txt", "--model.scratch.vocab_size", "9", command="sft")
    assert said[1:] == ["  model.scratch.config: required"]


def test_every_required_key_that_is_missing_is_named() -> None:
    assert refusal() == [
        "2 problems in the configuration:",
        "  model.name_or_path: required",
        "  data.train: required",
    ]


def test_all_problems_are_shown_at_once_with_the_file_they_are_in(tmp_path: Path) -> None:
    text = "model: {name_or_path: m, dtype: float16}\nloss: {bta: 1}\ntrain: {seed: 1.5, adam_betas: [0.9]}\n"
    name = yaml_file(tmp_path, text)
    said = refusal("--config", name, "--loss.beta=x", "--train.schedul", "cosine")
    assert said[0] == "7 problems in the configuration:"
    starts = [
        f"  {name}: loss.bta: unknown key",
        "  train.schedul: unknown key",
        f"  {name}: model.dtype: 'float16'",
        f"  {name}: train.seed: 1.5",
        f"  {name}: train.adam_betas: [0.9]",
        "  loss.beta: 'x'",
        "  data.train: required",
    ]
    for line, start in zip(said[1:], starts, strict=True):
        assert line.startswith(start)


def test_illegal_values_of_the_right_type_are_shown_at_once_too() -> None:
    said = refusal(*REQUIRED, "--loss.beta", "-1", "--train.keep_last", "0")
    assert said[0] == "2 problems in the configuration:"
    assert {line.split(":")[0].strip() for line in said[1:]} == {"loss.beta", "train.keep_last"}


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("train.learning_rat", "train.learning_rate"),
        ("los.beta", "loss.beta"),
        ("beta", "loss.beta"),
        ("train.max_length", "data.max_length"),
    ],
)
def test_an_unknown_key_names_the_nearest_legal_one(key: str, nearest: str) -> None:
    assert refusal(*REQUIRED, f"--{key}", "1")[1] == f"  {key}: unknown key; did you mean {nearest}?"


def test_a_key_like_no_other_has_no_nearest_one() -> None:
    assert refusal(*REQUIRED, "--zzqq", "1")[1] == "  zzqq: unknown key"


def test_an_unknown_key_of_a_source_names_the_nearest_one(tmp_path: Path) -> None:
    name = yaml_file(tmp_path, "model: {name_or_path: m}\ndata: {train: [{path: a, wight: 2}]}\n")
    said = refusal("--config", name)
    assert said[1] == f"  {name}: data.train[0].wight: unknown key; did you mean weight?"


@pytest.mark.parametrize("value", ["", " 3", " [1]", " text"])
def test_a_section_without_keys_is_refused(tmp_path: Path, value: str) -> None:
    name = yaml_file(tmp_path, f"model: {{name_or_path: m}}\ndata: {{train: d}}\ntrain:{value}\n")
    (_, problem) = refusal("--config", name)
    assert problem.startswith(f"  {name}: train: ")
    assert "expected keys below it" in problem


def test_a_stray_word_is_refused() -> None:
    assert "stray" in refusal("stray", *REQUIRED)[1]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"train: {seed: [}", "not YAML"),
        (b"\xff\xfe\x00", "not YAML"),
        (b"- a\n- b\n", "expected keys and values, got list"),
        (b"", "expected keys and values, got NoneType"),
    ],
)
def test_a_malformed_file_is_refused_in_one_line(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    (line,) = refusal("--config", str(path))
    assert line.startswith(f"--config: {path}: {expected}")


def test_a_missing_file_is_refused() -> None:
    (line,) = refusal("--config=/no/such.yaml")
    assert line.startswith("--config: /no/such.yaml: No such file or directory")


def test_print_config_shows_the_resolved_configuration_as_a_file_that_reads_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        parse("train", [*REQUIRED, "--loss.beta", "0.3", "--print_config"])
    assert raised.value.code == 0
    printed = yaml_file(tmp_path, capsys.readouterr().out)
    assert parse("train", ["--config", printed]) == parsed("--loss.beta", "0.3")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "dpo: error: no command trian; did you mean train?; see dpo --help"),
        (["check", "zzqq"], "dpo: error: no command zzqq; see dpo --help"),
        (["train"], "dpo: error: 2 problems in the configuration:"),
        (["train", "--config", "/no/such.yaml"], "dpo: error: --config: /no/such.yaml:"),
        (["check", *REQUIRED[:2], "--data.train", "/no/data"], "dpo: error: data.train: /no/data does not"),
    ],
)
def test_bad_usage_is_one_message_and_status_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(said)
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_no_command_shows_the_usage_and_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([]) == 2
    usage = capsys.readouterr().out
    assert all(f"\n  {name} " in usage for name in ("sft", "precompute-ref", "train", "evaluate", "check"))
    assert cli.run(["--help"]) == 0
    assert capsys.readouterr().out == usage


def test_a_refused_run_leaves_its_status_in_the_run_folder(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = ["--model.name_or_path", "/no/model", "--data.train", "/no/data", "--run_dir", str(run_dir)]
    assert cli.run(["evaluate", *arguments]) == 2
    record = json.loads((run_dir / "exit.json").read_text())
    assert (record["command"], record["status"], record["step"]) == ("evaluate", 2, 0)
    assert str(run_dir) in record["message"]


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    arguments = ["--model.name_or_path", "/no/model", "--data.train", "/no/data", "--run_dir", str(tmp_path)]
    assert cli.run(["evaluate", *arguments]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_checking_writes_nothing(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert cli.run(["check", "train", *REQUIRED[:2], "--data.train", "/no/d", "--run_dir", str(run_dir)]) == 2
    assert not run_dir.exists()


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["sft", "-h"]])
def test_help_answers_within_a_second_and_without_torch(arguments: list[str]) -> None:
    code = (
        "import sys; sys.argv = ['dpo', *sys.argv[1:]]\n"
        "import dpo.__main__ as program\n"
        "try:\n    program.main()\n"
        "except SystemExit as ended:\n    assert ended.code == 0, ended.code\n"
        "heavy = {'torch', 'transformers', 'accelerate', 'pyarrow', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    seconds = []
    for _ in range(3):  # the quickest of three: other work on the machine slows single ones
        started = time.monotonic()
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        seconds.append(time.monotonic() - started)
        assert done.returncode == 0, done.stderr
        if seconds[-1] < 1:
            break
    assert min(seconds) < 1
    assert "usage: dpo" in done.stdout
    if len(arguments) > 1:
        assert "--train.learning_rate" in done.stdout


CONFIGS = sorted(Path(__file__).parents[3].joinpath("configs").glob("*.yaml"))


def test_there_are_shipped_configurations() -> None:
    assert {"demo.yaml", "demo_sft.yaml"} <= {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_shipped_configuration_parses(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parents[1])  # a plan of a model is named from the repository's root
    config = parse("sft" if "sft" in path.stem else "train", ["--config", str(path)])
    assert config.run_dir.startswith("runs/")


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


@pytest.mark.parametrize("word", ["--local_rank=0", "--local-rank=0"])
def test_the_deepspeed_launchers_argument_is_named(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["train", word, "--config", "x.yaml"]) == 2
    said = capsys.readouterr().err
    assert "--local_rank" in said
    assert "accelerate launch" in said
