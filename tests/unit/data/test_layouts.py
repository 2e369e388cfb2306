"""Rows as public data sets have them train with the tokens that their conversations have in the template."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from dpo.config import DataConfig, DataSource
from dpo.data.build import open_datasets
from dpo.data.fields import RowError
from dpo.data.layouts import LAYOUTS
from dpo.data.records import TokenizedGroup
from dpo.data.rows import group_from_row

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def turns(*texts: str) -> list[dict[str, str]]:
    """Turns of user and assistant, one after the other."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


SYSTEM = [{"role": "system", "content": "Be brief."}]
FIRST = turns("the cat?")
LONGER = turns("the cat?", "It sat.", "and the mat?")

CHATS: dict[str, tuple[dict[str, Any], list[dict[str, str]]]] = {
    "UltraFeedback, binarized": (
        {
            "prompt": "the cat?",
            "prompt_id": "1",
            "chosen": [*FIRST, *turns("", " yes")[1:]],
            "rejected": [*FIRST, *turns("", "no")[1:]],
            "messages": [*FIRST, *turns("", " yes")[1:]],
            "score_chosen": 8.0,
            "score_rejected": 6.5,
        },
        FIRST,
    ),
    "Orca pairs": (
        {"system": "Be brief.", "question": "the cat?", "chosen": " yes", "rejected": "no"},
        SYSTEM + FIRST,
    ),
    "Tulu 3 mixture": (
        {
            "id": "1",
            "source": "x",
            "prompt": "the cat?",
            "chosen": [*LONGER, *turns("", " yes")[1:]],
            "rejected": [*LONGER, *turns("", "no")[1:]],
        },
        LONGER,
    ),
    "HelpSteer3": (
        {
            "domain": "general",
            "context": LONGER,
            "response1": " yes",
            "response2": "no",
            "overall_preference": -2,
            "individual_preference": [{"score": -2}],
        },
        LONGER,
    ),
    "Dolci": (
        {
            "chosen": [
                {**turn, "function_calls": None, "functions": None} for turn in turns("the cat?", " yes")
            ],
            "rejected": [
                {**turn, "function_calls": None, "functions": None} for turn in turns("the cat?", "no")
            ],
            "id": "a",
        },
        FIRST,
    ),
    "ShareGPT": (
        {
            "conversations": [
                {"from": "human", "value": "the cat?"},
                {"from": "gpt", "value": "It sat."},
                {"from": "human", "value": "and the mat?"},
            ],
            "chosen": {"from": "gpt", "value": " yes"},
            "rejected": {"from": "gpt", "value": "no"},
        },
        LONGER,
    ),
    "ShareGPT, whole conversations": (
        {
            "system": "Be brief.",
            "chosen": [{"from": "human", "value": "the cat?"}, {"from": "gpt", "value": " yes"}],
            "rejected": [{"from": "human", "value": "the cat?"}, {"from": "gpt", "value": "no"}],
        },
        SYSTEM + FIRST,
    ),
    "argilla, with nulls and metadata": (
        {
            "source": "x",
            "prompt": "the cat?",
            "chosen": [*FIRST, *turns("", " yes")[1:]],
            "chosen-rating": 5.0,
            "rejected": [*FIRST, *turns("", "no")[1:]],
            "rejected-rating": None,
            "metadata": '{"length": 3}',
            "external_id": None,
        },
        FIRST,
    ),
    "Alpaca": (
        {"instruction": "the cat?", "input": "", "chosen": " yes", "rejected": "no"},
        FIRST,
    ),
    "UltraFeedback": (
        {
            "instruction": "the cat?",
            "completions": [
                {"response": "no", "overall_score": 2.5, "model": "a"},
                {"response": " yes", "overall_score": 7.5, "model": "b"},
            ],
        },
        FIRST,
    ),
}
TEXTS: dict[str, tuple[dict[str, Any], str]] = {
    "HH": (
        {
            "chosen": "\n\nHuman: the cat?\n\nAssistant: yes",
            "rejected": "\n\nHuman: the cat?\n\nAssistant: no",
        },
        "\n\nHuman: the cat?\n\nAssistant:",
    ),
    "SHP": (
        {
            "post_id": "a",
            "domain": "x",
            "history": "the cat?",
            "human_ref_A": " no",
            "human_ref_B": " yes",
            "labels": 0,
            "score_A": 2,
            "score_B": 9,
        },
        "the cat?",
    ),
    "Nectar": (
        {
            "prompt": "\n\nHuman: the cat?\n\nAssistant:",
            "answers": [
                {"answer": " yes", "model": "a", "rank": 1.0},
                {"answer": " no", "model": "b", "rank": 2.0},
            ],
            "turns": 1,
        },
        "\n\nHuman: the cat?\n\nAssistant:",
    ),
    "HelpSteer2, preferences": (
        {
            "split": "train",
            "prompt": "the cat?",
            "response_1": " no",
            "response_2": " yes",
            "preference_strength": 3,
            "preference_statement": "x",
        },
        "the cat?",
    ),
}


def trained(row: dict[str, Any], tokenizer: PreTrainedTokenizerFast, folder: Path) -> TokenizedGroup:
    """The group as training has it, from a Parquet file and from JSON lines alike."""
    pq.write_table(pa.Table.from_pylist([row]), folder / "a.parquet")
    (folder / "a.jsonl").write_text(json.dumps(row))
    found = []
    for name in ("a.parquet", "a.jsonl"):
        data = DataConfig(train=DataSource(path=str(folder / name)), cache_dir=str(folder), max_length=200)
        found.append(open_datasets(data, tokenizer, None)[0])
    assert [len(data) for data in found] == [1, 1]
    assert found[0].content_digest() == found[1].content_digest()
    return found[0][0]


@pytest.mark.parametrize("name", CHATS)
def test_a_chat_has_the_tokens_of_its_conversation(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, name: str
) -> None:
    tokenizer.chat_template = CHATML
    row, prompt = CHATS[name]
    group = trained(row, tokenizer, tmp_path)
    ((chosen, rejected),) = group.pairs
    plain: Any = tokenizer.apply_chat_template
    assert group.prompt.tolist() == plain(prompt, add_generation_prompt=True, return_dict=False)
    for index, answer in ((chosen, " yes"), (rejected, "no")):
        whole = [*group.prompt.tolist(), *group.completions[index].tolist()]
        assert whole == plain([*prompt, {"role": "assistant", "content": answer}], return_dict=False)


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_has_its_own_tokens(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, name: str) -> None:
    row, prompt = TEXTS[name]
    group = trained(row, tokenizer, tmp_path)
    ((chosen, rejected),) = group.pairs
    assert tokenizer.decode(group.prompt) == prompt
    assert tokenizer.decode(group.completions[chosen]) == " yes<|endoftext|>"
    assert tokenizer.decode(group.completions[rejected]) == " no<|endoftext|>"


def test_every_layout_has_an_example() -> None:
    examples = [row for row, _ in (*CHATS.values(), *TEXTS.values())]
    assert all(any(layout.columns <= row.keys() for row in examples) for layout in LAYOUTS)


def test_a_row_of_an_unknown_layout_is_read_as_it_is() -> None:
    row = {"history": [], "prompt": "a", "chosen": " b", "rejected": " c"}
    assert group_from_row(row).completions == (" b", " c")


def test_scores_give_margins(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    for name, margin in (("Nectar", 1.0), ("HelpSteer2, preferences", 3.0)):
        assert trained(TEXTS[name][0], tokenizer, tmp_path).margins == (margin,)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (TEXTS["SHP"][0] | {"labels": 2}, "bad_pairs"),
        (TEXTS["Nectar"][0] | {"answers": [{"answer": "a"}, {"answer": "b"}]}, "not_text"),
        (TEXTS["Nectar"][0] | {"answers": "a"}, "not_a_list"),
        (TEXTS["Nectar"][0] | {"answers": [{"answer": "a", "rank": "?"}] * 2}, "bad_scores"),
        (TEXTS["HelpSteer2, preferences"][0] | {"preference_strength": 0}, "no_pairs"),
        (TEXTS["HelpSteer2, preferences"][0] | {"preference_strength": None}, "bad_scores"),
        (
            {"instruction": "a", "completions": [{"response": "b", "overall_score": 1}, {"response": "c"}]},
            "not_text",
        ),
        (
            {
                "conversations": [{"from": "function_call", "value": "{}"}],
                "chosen": {"from": "gpt", "value": "a"},
                "rejected": {"from": "gpt", "value": "b"},
            },
            "unusable_field",
        ),
        ({"chosen": [{"role": "user", "content": "a"}], "rejected": {"role": "x"}}, "not_text"),
    ],
)
def test_a_value_that_a_layout_does_not_have_is_refused(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as error:
        group_from_row(row)
    assert error.value.reason == reason


def test_lists_and_numbers_of_a_spreadsheet_are_read(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "a.csv").write_text('prompt,completions,scores\nthe cat?,"["" yes"", "" no""]","[2, 1]"\n')
    (tmp_path / "b.csv").write_text(
        "prompt,chosen,rejected,score_chosen,score_rejected\nthe cat?, yes, no,2.5,1\n"
    )
    for name, margin in (("a.csv", 1.0), ("b.csv", 1.5)):
        data = DataConfig(train=str(tmp_path / name), cache_dir=str(tmp_path))
        assert open_datasets(data, tokenizer, 64)[0].margins.tolist() == [margin]
