"""Completions of several messages: what the assistant wrote is trained on, the rest is read."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from dpo.config import DataConfig, ModelConfig
from dpo.data.build import open_datasets
from dpo.data.dataset import READ_ONLY, TokenizedDataset
from dpo.data.fields import RowError
from dpo.data.notes import RowNotes
from dpo.data.records import num_trained, plain_ids, sequence_key
from dpo.data.rows import group_from_row
from dpo.data.tokenize import TokenizeOptions, tokenize_groups
from dpo.data.trees import LAYOUTS, Layout, group_batch
from dpo.engine.scoring import make_scorer
from dpo.model.load import load_model

CALLS = "{% for call in m.tool_calls or [] %}!{{ call.function.name }}{% endfor %}"
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}" + CALLS + "{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
ASK = {"role": "user", "content": "the cat?"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look"}}]}
SEEN = {"role": "tool", "content": "it is on the mat"}
YES, NO = {"role": "assistant", "content": "on the mat"}, {"role": "assistant", "content": "no"}
ROW = {"prompt": [ASK], "chosen": [CALL, SEEN, YES], "rejected": [NO]}


@pytest.fixture
def template(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def opened(row: Any, tokenizer: PreTrainedTokenizerFast, folder: Path, **options: Any) -> TokenizedDataset:
    (folder / "a.jsonl").write_text(json.dumps(row))
    data = DataConfig(train=str(folder / "a.jsonl"), cache_dir=str(folder), **options)
    return open_datasets(data, tokenizer, 256)[0]


def test_the_tokens_are_those_of_the_template_and_the_assistants_are_trained_on(
    template: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    group = opened(ROW, template, tmp_path)[0]
    chosen, rejected = group.completions
    plain: Any = template.apply_chat_template
    whole = plain([ASK, CALL, SEEN, YES], return_dict=False)
    assert [*group.prompt.tolist(), *plain_ids(chosen).tolist()] == whole
    assert template.decode(chosen[chosen >= 0]) == "!look<|endoftext|>on the mat<|endoftext|>"
    read = plain_ids(chosen)[chosen < 0]
    assert template.decode(read) == "t:it is on the mat<|endoftext|>a:"
    assert num_trained(rejected) == len(rejected)


@pytest.mark.parametrize(
    ("row", "prompt", "number"),
    [
        ({"chosen": [ASK, CALL, SEEN, YES], "rejected": [ASK, NO]}, 1, 3),
        ({"prompt": "the cat?", "chosen": [CALL, SEEN, YES], "rejected": [NO]}, 1, 3),
        ({"prompt": [ASK], "chosen": [ASK, CALL, SEEN, YES], "rejected": [ASK, NO]}, 1, 3),
        ({"chosen": [ASK, CALL, SEEN, YES], "rejected": [ASK, CALL, SEEN, NO]}, 3, 1),  # as ever
        ({"chosen": [ASK, NO, ASK, YES], "rejected": [ASK, NO, SEEN, NO]}, 1, 3),  # a user's turns differ
        ({"chosen": [ASK, CALL, SEEN, SEEN, YES], "rejected": [ASK, NO]}, 1, 4),
    ],
)
def test_the_prompt_is_what_all_share_up_to_an_answer(row: Any, prompt: int, number: int) -> None:
    group = group_from_row(row)
    assert len(group.prompt) == prompt
    assert len(group.conversations[0]) == number if number > 1 else group.conversations == ()
    assert group.completions[0] == YES["content"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": [ASK, YES], "rejected": [SEEN, NO]}, "prompts_differ"),
        ({"prompt": [ASK], "chosen": [SEEN, YES], "rejected": [NO]}, "prompts_differ"),
        ({"prompt": [ASK], "chosen": [CALL, YES], "rejected": [NO]}, "prompts_differ"),
        ({"prompt": [ASK, NO], "chosen": [CALL, SEEN, YES], "rejected": [NO]}, "prompts_differ"),
        ({"prompt": [ASK], "chosen": [CALL, SEEN], "rejected": [NO]}, "last_turn_not_assistant"),
        (
            {"prompt": [ASK], "chosen": [CALL, SEEN, YES], "rejected": [CALL, SEEN, YES]},
            "identical_completions",
        ),
        (
            {"prompt": [ASK], "chosen": [CALL, SEEN, {**YES, "content": ""}], "rejected": [NO]},
            "empty_completion",
        ),
    ],
)
def test_messages_that_do_not_fit_together_are_refused(row: Any, reason: str) -> None:
    with pytest.raises(RowError) as error:
        group_from_row(row)
    assert error.value.reason == reason


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        # reasoning templates cut earlier answers once another follows
        (
            TEMPLATE.replace("m.content", "(m.content if loop.last else m.content[:2])"),
            "template_rewrites_history",
        ),
        (TEMPLATE.replace("tool_calls", "calls"), "template_lacks_field"),
        ("{% for m in messages %}{{ m.content }}" + CALLS + "{% endfor %}", "template_merges_messages"),
    ],
)
def test_a_template_that_cannot_say_who_wrote_what_drops_the_row(
    tokenizer: PreTrainedTokenizerFast, template: str, reason: str
) -> None:
    tokenizer.chat_template = template
    call = {**CALL, "content": "the", "tool_calls": [{"function": {"name": "c"}}]}
    row = {**ROW, "chosen": [call, {**SEEN, "content": "at"}, YES]}
    notes = RowNotes()
    options = TokenizeOptions(max_length=99, max_prompt_length=None, drop_too_long=False, append_eos=True)
    assert [*tokenize_groups([group_from_row(row)], tokenizer, options, Counter(), notes)] == []
    assert dict(notes.drops) == {reason: 1}


def test_what_is_trained_on_is_part_of_the_key_and_single_messages_keep_theirs(
    template: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    group = opened(ROW, template, tmp_path)[0]
    assert sequence_key(group.prompt, group.completions[0]) != sequence_key(
        group.prompt, plain_ids(group.completions[0])
    )
    alone = opened({"prompt": [ASK], "chosen": [YES], "rejected": [NO]}, template, tmp_path)
    assert alone.keys[1] == np.void(sequence_key(group.prompt, group.completions[1]))


def test_the_data_set_counts_what_is_trained_on(template: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    data = opened(ROW, template, tmp_path)
    group = data[0]
    lengths = [len(ids) for ids in group.completions]
    assert data.completion_lengths.tolist() == lengths
    assert data.completion_tokens.tolist() == [num_trained(ids) for ids in group.completions]
    assert data.sequence_tokens.tolist() == [len(group.prompt) + length for length in lengths]
    assert data.counts[READ_ONLY] == lengths[0] - num_trained(group.completions[0])
    assert data.largest_id == max(int(plain_ids(ids).max()) for ids in (group.prompt, *group.completions))


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "flex"])
def test_log_probs_are_those_of_the_assistants_tokens_in_plain_rows(
    template: PreTrainedTokenizerFast, tmp_path: Path, tiny_model: Path, layout: Layout
) -> None:
    group = opened(ROW, template, tmp_path)[0]
    config = ModelConfig(name_or_path=str(tiny_model), dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    expected = []
    for ids in group.completions:
        row = torch.from_numpy(np.concatenate([group.prompt, plain_ids(ids)]).astype(np.int64))[None]
        with torch.no_grad():
            logps = model(row).logits[0, :-1].log_softmax(-1).gather(1, row[0, 1:, None])[:, 0]
        trained = torch.from_numpy(np.concatenate([np.zeros(len(group.prompt), bool), ids >= 0]))[1:]
        expected.append(float(logps[trained].double().sum()))
    scorer = make_scorer(load_model(config), config).eval()
    batch = group_batch([group], layout)
    with torch.no_grad():
        found = scorer(batch)
    assert batch.num_tokens.tolist() == [num_trained(ids) for ids in group.completions]
    np.testing.assert_allclose(found.tolist(), expected, rtol=0, atol=1e-4)


def test_a_completion_that_is_cut_keeps_an_answer(template: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    long = {**SEEN, "content": "the cat sat on the mat " * 30}
    row = {"prompt": [ASK], "chosen": [CALL, long, YES], "rejected": [{**CALL, "content": "no"}, long, NO]}
    group = opened(row, template, tmp_path, max_length=64)[0]
    assert [template.decode(ids[ids >= 0]) for ids in group.completions] == [
        "!look<|endoftext|>",
        "no!look<|endoftext|>",
    ]
