"""Chat templates own BOS, EOS and turns; those that rewrite history, or refuse one, drop the group."""

from collections import Counter

import pytest
from transformers import PreTrainedTokenizerFast

from dpo.data.notes import RowNotes
from dpo.data.records import Message, Pair, PreferenceGroup, TokenizedGroup
from dpo.data.tokenize import TokenizeOptions, encode_prompt, tokenize_groups, tokenizer_digest
from dpo.errors import UserError

OPTIONS = TokenizeOptions(max_length=64, max_prompt_length=None, drop_too_long=False, append_eos=True)

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
    tokenizer: PreTrainedTokenizerFast, *groups: PreferenceGroup
) -> tuple[list[TokenizedGroup], dict[str, int]]:
    counts: Counter[str] = Counter()
    notes = RowNotes()
    found = list(tokenize_groups(groups, tokenizer, OPTIONS, counts, notes))
    counts.update({f"dropped/{reason}": number for reason, number in notes.drops.items()})
    return found, {name: number for name, number in counts.items() if number}


def test_the_template_makes_prompt_and_completion(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = PLAIN
    (group,), counts = run(tokenizer, chat(("user", "hi")))
    assert tokenizer.decode(group.prompt) == "<user>hi<|endoftext|><assistant>"
    assert [tokenizer.decode(c) for c in group.completions] == ["well<|endoftext|>", "bad<|endoftext|>"]
    assert counts == {}


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
