"""What is said of rows that are dropped, of columns that are not used, and of data that may not be meant."""

from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast
from unit.data.conftest import Open

from dpo.config import DataConfig, DataSource
from dpo.data.build import train_sources_of
from dpo.data.preview import preview_data
from dpo.errors import UserError


def preview(data: DataConfig, *arguments: Any) -> Any:
    return preview_data(train_sources_of(data), [], data, *arguments)


def test_unused_columns_are_named_once_per_source_in_every_run(
    open_with: Open, write_jsonl: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"prompt": "a", "chosen": " b", "rejected": " c"}
    one = write_jsonl([{**row, "model": "m"}, {**row, "model": None}, {**row, "model": "n"}], "one.jsonl")
    two = write_jsonl([{**row, "query": "q", "chosen_id": 0}], "two.jsonl")
    for _ in range(2):
        open_with([DataSource(path=one), DataSource(path=two)])
        said = capsys.readouterr().out.splitlines()
        assert said == [
            f"{one}: columns that are not used: model (2 rows)",
            f"{two}: columns that are not used: chosen_id (1 rows), query (1 rows)",
        ]


WRONG = {"question": "q", "good": "a", "bad": "b"}


def test_wrong_columns_are_named_with_what_the_row_has_and_how_to_map_them(
    open_with: Open, write_jsonl: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    bad = write_jsonl([WRONG] * 3, "bad.jsonl")
    for refused in (lambda: open_with(bad), lambda: preview(DataConfig(train=bad), None, None)):
        with pytest.raises(UserError) as error:
            refused()
        (line,) = [line for line in str(error.value).splitlines() if "missing_field, first" in line]
        assert f"{bad}:1: no field 'chosen'" in line
        assert "['bad', 'good', 'question']" in line
        assert "columns: {chosen: COLUMN}" in line
    assert capsys.readouterr().out == ""


def test_the_first_row_of_each_reason_is_shown_in_every_run(
    open_with: Open, write_jsonl: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"prompt": "a", "chosen": " b", "rejected": " c"}
    long = {"prompt": "the cat" * 9, "chosen": " b", "rejected": " c"}
    path = write_jsonl([good, WRONG, {**good, "rejected": " b"}, WRONG, long, long])
    for _ in range(2):
        data, _ = open_with(path, max_length=16, too_long="drop")
        assert data.counts["dropped/too_long"] == 2
        missing, identical, too_long, *_ = capsys.readouterr().out.splitlines()
        assert missing.startswith(f"{path}: dropped 2 as missing_field, first {path}:2: ")
        assert identical.startswith(f"{path}: dropped 1 as identical_completions, first {path}:3: ")
        assert too_long.startswith(f"{path}: dropped 2 as too_long, first {path}:5: ")
        assert "the cat'" in too_long


GOOD = {"prompt": "a", "chosen": " b", "rejected": " c"}


@pytest.mark.parametrize(("number", "warned"), [(8, False), (7, True)])
def test_more_than_a_fifth_of_the_rows_dropped_is_a_warning(
    open_with: Open,
    write_jsonl: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    number: int,
    warned: bool,
) -> None:
    path = write_jsonl([GOOD] * number + [WRONG, {**GOOD, "prompt": "the cat" * 9}])
    for _ in range(2):
        open_with(path, max_length=16, too_long="drop")
        assert (f"{path}: 22% of the rows are dropped" in capsys.readouterr().out) is warned


def test_plain_text_for_a_model_with_a_chat_template_is_a_warning(
    open_with: Open,
    write_jsonl: Callable[..., str],
    tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chat = {**GOOD, "prompt": [{"role": "user", "content": "hi"}]}
    path = write_jsonl([GOOD])
    open_with(path)
    assert "chat template" not in capsys.readouterr().out
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    mixed = write_jsonl([GOOD, chat], "mixed.jsonl")
    open_with(mixed)
    assert f"{mixed}: 1 of 2 prompts are plain text" in capsys.readouterr().out
    open_with(write_jsonl([chat], "chat.jsonl"))
    assert "plain text" not in capsys.readouterr().out


def test_a_system_turn_that_the_template_leaves_out_is_a_warning(
    open_with: Open,
    write_jsonl: Callable[..., str],
    tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
) -> None:
    user = {"role": "user", "content": "hi"}
    prompts = [[{"role": "system", "content": "Be brief."}, user], [user]]
    path = write_jsonl([{**GOOD, "prompt": prompt} for prompt in prompts])
    skips = "{% if m.role != 'system' %}{{ m.content }}{{ eos_token }}{% endif %}"
    for body, warned in ((skips, True), ("{{ m.content | trim }}{{ eos_token }}", False)):
        tokenizer.chat_template = "{% for m in messages %}" + body + "{% endfor %}"
        open_with(path)
        assert ("leaves out the system turn of 1 of 2" in capsys.readouterr().out) is warned


def test_held_out_data_that_is_the_training_data_is_a_warning_in_every_run(
    open_with: Open, write_jsonl: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    train, copy = write_jsonl([GOOD], "train.jsonl"), write_jsonl([GOOD], "copy.jsonl")
    for _ in range(2):
        open_with(train, test=copy)
        assert f"data.test: {copy} has the content of data.train" in capsys.readouterr().out
    open_with(train, test=write_jsonl([GOOD, GOOD], "other.jsonl"))
    assert "data.test" not in capsys.readouterr().out


def test_rows_without_a_prompt_never_train_on_an_empty_one(
    open_with: Open, write_jsonl: Callable[..., str]
) -> None:
    rows = [{"query": "Sky?", "chosen": "It is blue", "rejected": "Red"}] * 3
    with pytest.raises(UserError, match="3 missing_field"):
        open_with(write_jsonl(rows))


def test_an_implied_prompt_beside_unused_columns_is_a_warning(
    open_with: Open, write_jsonl: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"query": "Sky?", "chosen": "It is blue", "rejected": "It is red"}]
    path = write_jsonl([*rows, {"prompt": "a", "chosen": " b", "rejected": " c"}])
    open_with(path)
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "no column 'prompt'" in line]
    assert said.startswith(f"{path}: ")
    assert "1 of 2 rows" in said
    assert "'It is'" in said
