"""Chat templates own BOS, EOS and turns; those that rewrite history, or refuse one, drop the group."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from dpo.data.notes import RowNotes
from dpo.data.records import Message, Pair, PreferenceGroup, TokenizedGroup
from dpo.data.rows import group_from_row
from dpo.data.tokenize import TokenizeOptions, encode_prompt, tokenize_groups, tokenizer_digest
from dpo.errors import UserError

OPTIONS = TokenizeOptions(max_length=200, max_prompt_length=None, drop_too_long=False, append_eos=True)

PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# As reasoning models do: of all turns but the last the text before "|" is dropped, also when the prompt ends
# with a turn of the assistant.
REWRITES = (
    "{% for m in messages %}<{{ m.role }}>"
    "{{ m.content if loop.last else m.content.split('|')[-1] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
REFUSES_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + PLAIN
)


def chat(*turns: tuple[str, str]) -> PreferenceGroup:
    prompt = tuple(Message(role=role, content=content) for role, content in turns)
    return PreferenceGroup(prompt=prompt, completions=("well", "bad"), pairs=(Pair(0, 1),))


def run(
    tokenizer: PreTrainedTokenizerFast, *groups: PreferenceGroup, complete: bool = True
) -> tuple[list[TokenizedGroup], dict[str, int]]:
    counts: Counter[str] = Counter()
    notes = RowNotes()
    options = replace(OPTIONS, append_eos=complete)
    found = list(tokenize_groups(groups, tokenizer, options, counts, notes))
    counts.update({f"dropped/{reason}": number for reason, number in notes.drops.items()})
    return found, {name: number for name, number in counts.items() if number}


def test_the_template_makes_prompt_and_completion(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = PLAIN
    (group,), counts = run(tokenizer, chat(("user", "hi")))
    assert tokenizer.decode(group.prompt) == "<user>hi<|endoftext|><assistant>"
    assert [tokenizer.decode(c) for c in group.completions] == ["well<|endoftext|>", "bad<|endoftext|>"]
    assert counts == {}


def test_a_template_that_asks_for_the_date_gets_the_same_one_on_every_day(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') if strftime_now is defined }}" + PLAIN
    (group,), _ = run(tokenizer, chat(("user", "hi")))
    assert tokenizer.decode(group.prompt) == "26 Jul 2024<user>hi<|endoftext|><assistant>"
    notes = RowNotes()
    [*tokenize_groups([chat(("user", "hi"))], tokenizer, OPTIONS, Counter(), notes)]
    assert [line for line in notes.lines("x") if "26 July 2024" in line]


def test_a_template_without_bos_gets_none(bos_tokenizer: PreTrainedTokenizerFast) -> None:
    bos_tokenizer.chat_template = PLAIN
    (group,), _ = run(bos_tokenizer, chat(("user", "hi")))
    assert bos_tokenizer.decode(group.prompt) == "<user>hi<|endoftext|><assistant>"


def test_the_templates_bos_is_the_only_one(bos_tokenizer: PreTrainedTokenizerFast) -> None:
    bos_tokenizer.chat_template = "{{ bos_token }}" + PLAIN
    (group,), _ = run(bos_tokenizer, chat(("user", "hi")))
    assert bos_tokenizer.decode(group.prompt) == "<s><user>hi<|endoftext|><assistant>"
    assert bos_tokenizer.bos_token_id not in group.completions[0]


def test_a_template_that_rewrites_history_drops_the_rows_it_rewrites(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = REWRITES
    rewritten = chat(("user", "hi"), ("user", "thought|hi"))  # whole once it is no longer the last turn
    (group,), counts = run(tokenizer, chat(("user", "hi")), rewritten)
    assert tokenizer.decode(group.prompt) == "<user>hi<|endoftext|><assistant>"
    assert counts == {"dropped/template_rewrites_history": 1}


@pytest.mark.parametrize(
    ("end", "answer"),
    [
        ("<assistant> ", "good"),  # " good" is one token
        ("<assistant>", "good"),
        ("<assistant>\n", "\n\n good"),
        ("<assistant> the", " cat"),
        ("<assistant>a day en", "ded well"),
    ],
)
def test_an_answer_that_merges_with_the_templates_last_token_is_encoded_apart(
    tokenizer: PreTrainedTokenizerFast, end: str, answer: str
) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '" + end + "' if m.role == 'assistant' else '<user>' }}{{ m.content }}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}" + end + "{% endif %}"
    )
    (group,), counts = run(tokenizer, group_from_row({"prompt": [HI], "chosen": answer, "rejected": "bad"}))
    assert counts == {}
    assert group.prompt.tolist() == encode_prompt((Message(role="user", content="hi"),), tokenizer)
    assert tokenizer.decode(group.prompt) == f"<user>hi<|endoftext|>{end}"
    assert tokenizer.decode(group.completions[0]) == f"{answer}<|endoftext|>"
    whole = tokenizer.apply_chat_template([HI, {"role": "assistant", "content": answer}], return_dict=False)
    joint = whole[len(group.prompt) :] if whole[: len(group.prompt)] == group.prompt.tolist() else None
    assert group.completions[0].tolist() == (joint or tokenizer(f"{answer}<|endoftext|>").input_ids)


def test_fragments_are_not_followed_by_the_end_of_a_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    for template in (PLAIN, PLAIN.replace("{{ eos_token }}", "{{ eos_token }}\n")):
        tokenizer.chat_template = template
        (whole,), _ = run(tokenizer, chat(("user", "hi")))
        (cut,), counts = run(tokenizer, chat(("user", "hi")), complete=False)
        assert counts == {}
        assert cut.prompt.tolist() == whole.prompt.tolist()
        assert [tokenizer.decode(ids) for ids in cut.completions] == ["well", "bad"]


def test_a_fragment_whose_text_is_also_in_the_template_is_cut_after_its_own_end(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = PLAIN.replace("{{ eos_token }}", "|end|{{ eos_token }}")
    row = {"prompt": [HI], "chosen": "the end", "rejected": "end "}
    (group,), _ = run(tokenizer, group_from_row(row), complete=False)
    assert [tokenizer.decode(ids) for ids in group.completions] == ["the end", "end "]


def test_a_call_of_a_tool_cannot_be_a_fragment(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = AGENT
    row = {"prompt": [HI], "chosen": [DAY], "rejected": [BAD]}
    found, counts = run(tokenizer, group_from_row(row), complete=False)
    assert (found, counts) == ([], {"dropped/template_changes_completion": 1})


def test_an_answer_that_the_prompt_starts_is_continued_in_the_same_turn(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = PLAIN
    start = {"role": "assistant", "content": "a good"}
    row = {"prompt": [HI, start], "chosen": " day", "rejected": " film"}
    for complete, end in ((True, "<|endoftext|>"), (False, "")):
        (group,), counts = run(tokenizer, group_from_row(row), complete=complete)
        assert counts == {}
        assert tokenizer.decode(group.prompt) == "<user>hi<|endoftext|><assistant>a good"
        assert [tokenizer.decode(ids) for ids in group.completions] == [f" day{end}", f" film{end}"]
    turns = (Message(role="user", content="hi"), Message(role="assistant", content="a good"))
    assert encode_prompt(turns, tokenizer) == group.prompt.tolist()


def test_two_turns_of_the_assistant_in_a_row_are_written_as_the_template_does(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = PLAIN
    (group,), _ = run(tokenizer, group_from_row({"chosen": [HI, WELL, WELL], "rejected": [HI, WELL, BAD]}))
    assert tokenizer.decode(group.prompt) == ("<user>hi<|endoftext|><assistant>well<|endoftext|><assistant>")


@pytest.mark.parametrize("end", ["<|im_end|>", "<|im_end|>\n", "<|endoftext|>", "<|endoftext|>\n"])
def test_text_that_ends_with_the_end_of_a_turn_gets_no_second_end(
    tokenizer: PreTrainedTokenizerFast, end: str
) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = PLAIN.replace("{{ eos_token }}", "<|im_end|>\n")
    text = {"prompt": "<user>hi<|im_end|>\n<assistant>", "chosen": f"well{end}", "rejected": "bad"}
    (group,), _ = run(tokenizer, group_from_row(text))
    assert [tokenizer.decode(ids) for ids in group.completions] == [f"well{end}", "bad<|endoftext|>"]


def test_chat_turns_without_a_template_are_refused_with_the_option(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    turns = (Message(role="user", content="hi"),)
    with pytest.raises(UserError, match=r"--model: .*chat template"):
        encode_prompt(turns, tokenizer, key="--model")
    tokenizer.chat_template = PLAIN
    assert tokenizer.decode(encode_prompt(turns, tokenizer)) == "<user>hi<|endoftext|><assistant>"


def test_a_dialogue_that_the_template_refuses_is_dropped_and_counted(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = REFUSES_SYSTEM
    found, counts = run(tokenizer, chat(("system", "be nice"), ("user", "hi")), chat(("user", "hi")))
    assert len(found) == 1
    assert counts == {"dropped/template_refuses_dialogue": 1}


def test_chats_need_a_template(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"data\.train: .* no chat template"):
        run(tokenizer, chat(("user", "hi")))


def test_text_and_chats_may_be_in_one_source(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = PLAIN
    text = PreferenceGroup(prompt="the cat", completions=(" sat", " on"), pairs=(Pair(0, 1),))
    found, _ = run(tokenizer, text, chat(("user", "hi")), text)
    decoded = [tokenizer.decode(group.prompt) for group in found]
    assert decoded == ["the cat", "<user>hi<|endoftext|><assistant>", "the cat"]
    assert tokenizer.decode(found[2].completions[0]) == " sat<|endoftext|>"


AGENT = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
    "{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}{% endfor %}"
    "{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# As some reasoning models do: what comes before "|" in an answer is cut.
CUTS = (
    "{% for m in messages %}<{{ m.role }}>"
    "{{ m.content.split('|')[-1] if m.role == 'assistant' else m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
HI = {"role": "user", "content": "hi"}
WELL = {"role": "assistant", "content": "well"}
BAD = {"role": "assistant", "content": "bad"}
TOOLS = [{"type": "function", "function": {"name": "day"}}]
DAY = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"function": {"name": "day", "arguments": {"n": 1}}}],
}
FOUND = {"role": "tool", "content": "good", "tool_call_id": "7"}
THOUGHT = {**WELL, "reasoning_content": "the cat"}


@pytest.mark.parametrize(
    ("row", "answers"),
    [
        ({"prompt": [HI], "chosen": [DAY], "rejected": [BAD]}, [DAY, BAD]),
        ({"prompt": [HI, DAY, FOUND], "chosen": [WELL], "rejected": [BAD]}, [WELL, BAD]),
        ({"prompt": [HI], "chosen": [THOUGHT], "rejected": [WELL]}, [THOUGHT, WELL]),
        ({"prompt": [HI], "chosen": "well", "rejected": "bad", "tools": TOOLS}, [WELL, BAD]),
    ],
)
def test_fields_beside_the_text_give_the_ids_of_the_plain_template(
    tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], answers: list[dict[str, Any]]
) -> None:
    tokenizer.chat_template = AGENT
    (group,), counts = run(tokenizer, group_from_row(row))
    assert counts == {}
    tools = row.get("tools")
    options = {"tools": tools, "return_dict": False}
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, **options)
    assert group.prompt.tolist() == prompt
    for answer, completion in zip(answers, group.completions, strict=True):
        whole = tokenizer.apply_chat_template([*row["prompt"], answer], **options)
        assert [*prompt, *completion.tolist()] == whole


def test_a_rows_own_arguments_go_to_the_template(tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"prompt": [HI], "chosen": "well", "rejected": "bad", "chat_template_kwargs": {"loud": True}}
    tokenizer.chat_template = PLAIN.replace("{% for", "{{ '!' if loud else '' }}{% for", 1)
    (group,), _ = run(tokenizer, group_from_row(row))
    assert tokenizer.decode(group.prompt) == "!<user>hi<|endoftext|><assistant>"


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"prompt": [HI], "chosen": [DAY], "rejected": [BAD]}, "tool_calls"),
        ({"prompt": [HI, DAY, FOUND], "chosen": [WELL], "rejected": [BAD]}, "tool_calls"),
        ({"prompt": [HI], "chosen": [THOUGHT], "rejected": [WELL]}, "reasoning_content"),
        ({"prompt": [HI], "chosen": "well", "rejected": "bad", "tools": TOOLS}, "tools"),
        (
            {"prompt": [HI], "chosen": "well", "rejected": "bad", "chat_template_kwargs": {"loud": True}},
            "loud",
        ),
    ],
)
def test_a_field_that_the_template_does_not_know_drops_the_row(
    tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], field: str
) -> None:
    tokenizer.chat_template = PLAIN
    notes = RowNotes()
    assert list(tokenize_groups([group_from_row(row)], tokenizer, OPTIONS, Counter(), notes)) == []
    assert notes.drops == {"template_lacks_field": 1}
    assert repr(field) in notes.first["template_lacks_field"]


def test_a_completion_that_the_template_cuts_drops_the_row(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = CUTS
    cut = group_from_row({"prompt": [HI], "chosen": "a thought|well", "rejected": "bad"})
    (group,), counts = run(tokenizer, cut, chat(("user", "hi")))
    assert tokenizer.decode(group.completions[0]) == "well<|endoftext|>"
    assert counts == {"dropped/template_changes_completion": 1}


def test_white_space_that_the_template_trims_or_adds_is_no_change(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = PLAIN.replace("m.content", "m.content | trim | replace('x', 'x\n')")
    (group,), counts = run(tokenizer, group_from_row({"prompt": [HI], "chosen": " ax b ", "rejected": "bad"}))
    assert tokenizer.decode(group.completions[0]) == "ax\n b<|endoftext|>"
    assert counts == {}


def test_names_that_the_template_leaves_out_are_counted_as_not_used(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    row = {"prompt": [{**HI, "name": "Ann"}], "chosen": "well", "rejected": "bad"}
    notes = RowNotes()
    tokenizer.chat_template = PLAIN
    assert len(list(tokenize_groups([group_from_row(row)], tokenizer, OPTIONS, Counter(), notes))) == 1
    assert notes.ignored == {"messages.name": 1}
    tokenizer.chat_template = PLAIN.replace("m.role }}>", "m.role }}{{ m.name }}>", 1)
    (group,) = tokenize_groups([group_from_row(row)], tokenizer, OPTIONS, Counter(), notes)
    assert tokenizer.decode(group.prompt) == "<userAnn>hi<|endoftext|><assistant>"
    assert notes.ignored == {"messages.name": 1}


def test_the_digest_is_the_same_for_what_gives_the_same_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    before = tokenizer_digest(tokenizer)
    tokenizer(["the cat", "sat"], padding=True, truncation=True, max_length=4)  # leaves settings behind
    tokenizer.padding_side = "left"
    assert tokenizer_digest(tokenizer) == before


def test_the_digest_differs_with_everything_that_decides_ids(
    tokenizer: PreTrainedTokenizerFast, bos_tokenizer: PreTrainedTokenizerFast
) -> None:
    digests = {tokenizer_digest(tokenizer), tokenizer_digest(bos_tokenizer)}
    tokenizer.chat_template = PLAIN
    digests.add(tokenizer_digest(tokenizer))
    tokenizer.eos_token = "!"
    digests.add(tokenizer_digest(tokenizer))
    tokenizer.add_tokens(["the cat"])
    digests.add(tokenizer_digest(tokenizer))
    assert len(digests) == 5
