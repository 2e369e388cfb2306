"""Prompts with the turns they were made of: found again in the data by their token ids, cut or not."""

import numpy as np
from transformers import PreTrainedTokenizerFast

from dpo.data.records import Message, Pair, PreferenceGroup
from dpo.data.tokenize import encode_prompt
from dpo.evaluate.asked import Asked, asked_of

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def turns(*contents: str) -> tuple[Message, ...]:
    roles = ("user", "assistant")
    return tuple(Message(role=roles[n % 2], content=text) for n, text in enumerate(contents))


def group(prompt: str | tuple[Message, ...]) -> PreferenceGroup:
    return PreferenceGroup(prompt=prompt, completions=("a", "b"), pairs=(Pair(0, 1),))


def test_the_turns_of_a_prompt_are_found_also_where_it_was_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = TEMPLATE
    chats = [turns("one"), turns("two", "three", "four"), turns("five", "begins")]
    groups = iter([*map(group, ["a text", *chats]), group(turns("not read"))])
    whole = [np.asarray(encode_prompt(chat, tokenizer), np.int32) for chat in chats]
    prompts = [whole[0], whole[1][-12:], whole[2]]
    found = asked_of(prompts, ["1", "2", "3"], groups, tokenizer)
    assert found == [Asked("1", chats[0]), Asked("2", chats[1]), Asked("3", chats[2])]
    assert [one.prompt for one in groups] == [turns("not read")]


def test_a_text_and_a_prompt_that_is_not_there_have_no_turns(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = np.asarray([5, 6, 7], np.int32)
    assert asked_of([prompt], ["p"], [group("p")], tokenizer) == [Asked("p")]
    tokenizer.chat_template = TEMPLATE
    assert asked_of([prompt], ["p"], [group(turns("q"))], tokenizer) == [Asked("p")]


def test_an_answer_follows_the_turns_or_goes_on_where_they_end() -> None:
    assert Asked("p").messages("a") == [*turns("p", "a")]
    assert Asked("p", turns("q", "r", "s")).messages("a") == [*turns("q", "r", "s", "a")]
    begun = Asked("p", turns("q", "r"))
    assert begun.messages(" a") == [*turns("q", "r a")]
    assert begun.turns == turns("q", "r")
