"""YAML and dotted overrides to a configuration; every problem at once, each with its place."""

from pathlib import Path

import pytest
from unit.cli.refusals import REQUIRED, parsed, refusal

from dpo.cli.expected import choices, in_words
from dpo.cli.help import fitted
from dpo.cli.main import run
from dpo.cli.parse import _leaves, parse
from dpo.cli.table import TOOLS
from dpo.config import Config, DataSource, SftConfig
from dpo.config.foreign import BUILT_IN, KEYS, MISSING, VALUES
from dpo.errors import UserError
from dpo.loss.catalog import LOSSES


def yaml_file(folder: Path, text: str) -> str:
    path = folder / "experiment.yaml"
    path.write_text(text)
    return str(path)


CONFIGS = sorted(Path(__file__).parents[3].joinpath("configs").glob("*.yaml"))


def test_there_are_shipped_configurations() -> None:
    assert {"demo.yaml", "demo_sft.yaml"} <= {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_shipped_configuration_parses(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parents[1])  # a plan of a model is named from the repository's root
    config = parse("sft" if "sft" in path.stem else "train", ["--config", str(path)])
    assert config.run_dir.startswith("runs/")


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


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("lr", "did you mean train.learning_rate?"),
        ("train.lr", "did you mean train.learning_rate?"),
        ("per_device_train_batch_size", "did you mean train.pairs_per_step (pairs of one optimizer step,"),
        ("train.beta", "did you mean loss.beta?"),
        ("dataset_name", "did you mean data.train?"),
        ("loss.loss_type", "did you mean loss.type?"),
        ("resume_from_checkpoint", "did you mean train.resume?"),
        ("bf16", "did you mean model.dtype?"),
        ("logging_steps", "nothing to set: every optimizer step is recorded"),
        ("fp16", "float16 is not supported"),
    ],
)
def test_another_trainers_key_is_answered_with_ours(key: str, said: str) -> None:
    assert refusal(*REQUIRED, f"--{key}", "1")[1].startswith(f"  {key}: unknown key; {said}")


def test_a_batch_of_another_trainer_is_one_of_sequences_in_sft() -> None:
    said = refusal("--data.train", "t", "--batch_size", "1", command="sft")[1]
    assert said.endswith("did you mean train.sequences_per_step?")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model.dtype", "bf16", "one of float32, bfloat16; did you mean bfloat16?"),
        ("train.optimizer", "adamw_torch", "did you mean adamw?"),
        ("train.schedule", "cosine_with_restarts", "did you mean cosine?"),
        ("model.attention", "flash_attention_2", "did you mean auto?"),
        ("train.learning_rate", "fast", "a number above 0"),
        ("train.num_epochs", "1.5", "a whole number of at least 1"),
        ("train.max_steps", "many", "a whole number of at least 1, or null"),
        ("train.adam_betas", "0.9", "[a number in [0, 1), a number in [0, 1)]"),
        ("data.group_pairs", "maybe", "true or false"),
        ("train.trackers", "wandb", "a list such as [a, b]"),
        ("loss.weights", "x", "a list, each a number above 0, or null"),
    ],
)
def test_a_value_of_the_wrong_type_is_answered_in_words(key: str, value: str, said: str) -> None:
    (_, line) = refusal(*REQUIRED, f"--{key}", value)
    assert line.startswith(f"  {key}: {value!r}; expected ")
    assert line.endswith(said)


def test_a_loss_by_another_name_is_answered_with_ours() -> None:
    assert refusal(*REQUIRED, "--loss.type", "dpo")[1].endswith("; did you mean sigmoid?")


@pytest.mark.parametrize("kind", [Config, SftConfig])
def test_no_option_is_described_in_the_words_of_a_type_checker(kind: type) -> None:
    for leaf in _leaves(kind).values():
        assert not any(
            word in in_words(leaf.ranged) for word in ("Literal", "Union", "typing", "class", "dpo.")
        )


def test_the_table_of_other_names_leads_to_options_that_exist() -> None:
    leaves = _leaves(Config) | _leaves(SftConfig)
    assert {ours for names in KEYS.values() for ours in names} <= {*leaves}
    assert not {*BUILT_IN, *MISSING} & {*KEYS}
    for key, names in VALUES.items():
        legal = {*choices(leaves[key].type)} or {*LOSSES, "auto", "never"}
        assert {*names.values()} <= legal


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


def test_a_word_without_a_key_is_refused_with_the_key_that_it_needs(tmp_path: Path) -> None:
    run_dir, rows = tmp_path / "run", tmp_path / "rows.jsonl"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("run_dir: run\n")
    rows.write_text("{}\n")
    for word, hint in {
        "stray": "",
        "my.yaml": "; did you mean --config my.yaml?",
        str(run_dir): f"; did you mean --config {run_dir}/config.yaml?",
        str(rows): f"; did you mean --data.train {rows}?",
    }.items():
        expected = f"{word}: a word without a key; expected --KEY VALUE, or --config FILE{hint}"
        for arguments in ([word], [*REQUIRED, word], [word, *REQUIRED], ["--train.resume", *REQUIRED, word]):
            with pytest.raises(UserError) as found:
                parse("train", arguments)
            assert expected in str(found.value)
    with pytest.raises(UserError, match=r"train\.seed: ''; expected"):
        parse("train", ["--train.seed", *REQUIRED])  # the next key is no value


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
    ("text", "key", "lines"),
    [
        ("train: {seed: 3}\nloss: {beta: 0.5}\ntrain:\n  max_steps: 2\n", "train", (1, 3)),
        ("train:\n  seed: 3\n  max_steps: 2\n  seed: 4\n", "train.seed", (2, 4)),
        ("model:\n  lora:\n    rank: 4\n    rank: 4\n", "model.lora.rank", (3, 4)),
        ("train:\n  seed: 3\ntrain.seed: 4\n", "train.seed", (2, 3)),
        ("data:\n  train:\n  - path: a\n  - path: b\n    path: c\n", "data.train[1].path", (4, 5)),
        ("base: &b\n  seed: 1\n  seed: 2\ntrain: *b\n", "base.seed", (2, 3)),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_both_lines(
    tmp_path: Path, text: str, key: str, lines: tuple[int, int]
) -> None:
    name = yaml_file(tmp_path, text)
    (line,) = refusal(*REQUIRED, "--config", name)
    assert line.startswith(f"--config: {name}: {key}: in line {lines[0]} and again in line {lines[1]};")


def test_all_keys_that_stand_twice_are_named_on_one_line_too(tmp_path: Path) -> None:
    name = yaml_file(tmp_path, "loss: {beta: 1, beta: 2}\ntrain:\n  seed: 1\n  seed: 2\n")
    said = refusal(*REQUIRED, "--config", name)
    assert [line.split(": ")[2] for line in said] == ["loss.beta", "train.seed"]


def test_what_a_merge_key_brings_may_be_overridden(tmp_path: Path) -> None:
    text = (
        "train: &base {seed: 3, max_steps: 2}\nmodel: {name_or_path: m}\n"
        "data: {train: [&one {path: a}, {<<: *one, weight: 2}]}\n"
    )
    config = parse("train", ["--config", yaml_file(tmp_path, text)])
    assert config.data.train == [DataSource(path="a"), DataSource(path="a", weight=2.0)]


@pytest.mark.parametrize("command", ["train", "sft"])
def test_a_run_without_a_folder_of_its_own_is_named_after_its_configuration(
    tmp_path: Path, command: str
) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "mine.yaml"
    first.write_text("model: {name_or_path: m}\ndata: {train: a}\n")
    second.write_text("train: {seed: 3}\n")
    assert parse(command, ["--config", str(first)]).run_dir == "runs/first"
    assert parse(command, ["--config", str(first), f"--config={second}"]).run_dir == "runs/mine"
    assert parse(command, ["--config", str(first), "--run_dir", "runs/x"]).run_dir == "runs/x"
    second.write_text("run_dir: elsewhere\n")
    assert parse(command, ["--config", str(second), "--config", str(first)]).run_dir == "elsewhere"


@pytest.mark.parametrize(("command", "kind"), [("train", Config), ("sft", SftConfig)])
def test_help_lists_every_key_in_80_columns(
    command: str, kind: type, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(command, ["--help"])
    printed = capsys.readouterr().out
    assert [key for key in _leaves(kind) if f"  --{key}  " not in printed] == []
    assert max(map(len, printed.splitlines())) <= 80


USAGE = """usage: dpo x --config FILE [--KEY VALUE ...]
             [--other THING]

Prose in lines
of any length.

--one    what it is,
         at length
--other  short
"""


def test_a_usage_is_filled_to_the_width() -> None:
    assert fitted(USAGE, 29).splitlines() == [
        "usage: dpo x --config FILE",
        "           [--KEY VALUE ...]",
        "           [--other THING]",
        "",
        "Prose in lines of any length.",
        "",
        "--one    what it is, at",
        "         length",
        "--other  short",
    ]


@pytest.mark.parametrize("command", [*TOOLS, ""])
def test_every_usage_fits_80_columns(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    run([command, "--help"] if command else ["--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_a_section_has_a_help_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse("train", ["--model.lora.help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "--model.lora.rank  a whole number of at least 1; default: 16" in printed
    assert "--model.dtype" not in printed
    with pytest.raises(UserError, match=r"--model\.lorb\.help: no such section.*model\.lora"):
        parse("train", ["--model.lorb.help"])
