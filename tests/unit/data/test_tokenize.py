"""BOS, EOS, the prompt's boundary and truncation: the ids of a group, and the reasons of what is dropped."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from dpo.data.fields import RowError
from dpo.data.notes import RowNotes
from dpo.data.records import Pair, PreferenceGroup, TokenizedGroup
from dpo.data.tokenize import TokenizeOptions, _fit, encode_prompt, tokenize_groups

WIDE = TokenizeOptions(max_length=60, max_prompt_length=None, drop_too_long=False, append_eos=True)


def text_group(prompt: str, *completions: str) -> PreferenceGroup:
    pairs = tuple(Pair(0, index) for index in range(1, len(completions)))
    return PreferenceGroup(prompt=prompt, completions=completions, pairs=pairs)


def tokenized(
    tokenizer: PreTrainedTokenizerFast, group: PreferenceGroup, **changed: Any
) -> tuple[TokenizedGroup | None, dict[str, int]]:
    """The group in token ids and the counts that are not 0."""
    options = {name: getattr(WIDE, name) for name in WIDE.__slots__} | changed
    counts: Counter[str] = Counter()
    notes = RowNotes()
    found = list(tokenize_groups([group], tokenizer, TokenizeOptions(**options), counts, notes))
    counts.update({f"dropped/{reason}": number for reason, number in notes.drops.items()})
    return (found[0] if found else None), {name: n for name, n in counts.items() if n}


def ids_of(tokenizer: PreTrainedTokenizerFast, group: PreferenceGroup, **changed: Any) -> list[list[int]]:
    """Prompt ids, then the ids of each completion."""
    found, _ = tokenized(tokenizer, group, **changed)
    assert found is not None
    return [found.prompt.tolist(), *(completion.tolist() for completion in found.completions)]


def test_complete_completions_end_with_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt, good, bad = ids_of(tokenizer, text_group("the cat", " sat", " on the mat"))
    assert tokenizer.decode(prompt) == "the cat"
    assert tokenizer.decode(good) == " sat<|endoftext|>"
    assert tokenizer.decode(bad) == " on the mat<|endoftext|>"


def test_fragments_do_not_end_with_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    _, good, bad = ids_of(tokenizer, text_group("the cat", " sat", " on"), append_eos=False)
    assert (tokenizer.decode(good), tokenizer.decode(bad)) == (" sat", " on")


def test_a_completion_that_ends_with_eos_gets_no_second_one(tokenizer: PreTrainedTokenizerFast) -> None:
    _, good, _ = ids_of(tokenizer, text_group("the cat", " sat<|endoftext|>", " on"))
    assert good.count(tokenizer.eos_token_id) == 1
    assert good[-1] == tokenizer.eos_token_id


def test_bos_opens_a_prompt_once(bos_tokenizer: PreTrainedTokenizerFast) -> None:
    prompt, good, _ = ids_of(bos_tokenizer, text_group("the cat", " sat", " on"))
    assert prompt[0] == bos_tokenizer.bos_token_id
    assert bos_tokenizer.decode([*prompt, *good]) == "<s>the cat sat<|endoftext|>"


def test_a_prompt_that_brings_its_own_bos_gets_no_second_one(bos_tokenizer: PreTrainedTokenizerFast) -> None:
    written = ids_of(bos_tokenizer, text_group("<s>the cat", " sat", " on"))
    assert written == ids_of(bos_tokenizer, text_group("the cat", " sat", " on"))


def test_a_tokenizer_that_adds_no_bos_gets_none(tokenizer: PreTrainedTokenizerFast) -> None:
    assert encode_prompt("the cat", tokenizer) == tokenizer("the cat").input_ids


@pytest.mark.parametrize("adds_bos", [False, True])
def test_an_empty_prompt_becomes_one_token(
    tokenizer: PreTrainedTokenizerFast, bos_tokenizer: PreTrainedTokenizerFast, adds_bos: bool
) -> None:
    used = bos_tokenizer if adds_bos else tokenizer
    prompt, good, _ = ids_of(used, text_group("", "the cat", "mat"))
    assert prompt == [used.bos_token_id]
    assert used.decode(good) == "the cat<|endoftext|>"


def test_an_empty_prompt_becomes_eos_where_there_is_no_bos(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.bos_token = None
    assert encode_prompt("", tokenizer) == [tokenizer.eos_token_id]


def test_a_boundary_inside_a_token_leaves_the_prompt_as_it_is(tokenizer: PreTrainedTokenizerFast) -> None:
    # "en" + "ded" is one token "ended" or more of it when joined: the parts then stand alone.
    joined = tokenizer("a day en" + "ded").input_ids
    alone = tokenizer("a day en").input_ids
    assert joined[: len(alone)] != alone, "the tokenizer changed: choose another boundary"
    prompt, good, _ = ids_of(tokenizer, text_group("a day en", "ded", " well"), append_eos=False)
    assert prompt == alone
    assert good == tokenizer("ded").input_ids


def test_a_long_prompt_keeps_its_end_and_is_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    words = " cat" * 20  # one token per word, as the next line checks
    assert len(tokenizer(words).input_ids) == 20
    group = text_group(f"mat{words}", " sat", " on")
    longest = max(map(len, ids_of(tokenizer, group)[1:]))
    found, counts = tokenized(tokenizer, group, max_length=12)
    assert found is not None
    assert counts == {"truncated/prompts": 1}
    assert found.prompt.tolist() == tokenizer(words).input_ids[-(12 - longest) :]
    assert [len(found.prompt) + len(c) <= 12 for c in found.completions] == [True, True]


def test_a_long_prompt_keeps_bos_too(bos_tokenizer: PreTrainedTokenizerFast) -> None:
    prompt, *_ = ids_of(bos_tokenizer, text_group("mat" + " cat" * 20, " sat", " on"), max_prompt_length=5)
    assert bos_tokenizer.decode(prompt) == "<s>" + " cat" * 4


def test_a_long_completion_keeps_its_start_and_has_no_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    group = text_group("mat cat", " cat" * 20, " on")
    found, counts = tokenized(tokenizer, group, max_length=10)
    assert found is not None
    assert counts == {"truncated/completions": 1}
    cut, whole = found.completions
    room = 10 - len(found.prompt)
    assert cut.tolist() == tokenizer(" cat" * room).input_ids
    assert tokenizer.decode(whole) == " on<|endoftext|>"


def test_the_prompt_keeps_half_when_both_are_long(tokenizer: PreTrainedTokenizerFast) -> None:
    found, counts = tokenized(tokenizer, text_group(" mat" * 30, " cat" * 30, " on"), max_length=10)
    assert found is not None
    assert (len(found.prompt), [len(c) for c in found.completions]) == (5, [5, len(found.completions[1])])
    assert counts == {"truncated/prompts": 1, "truncated/completions": 1}


def test_what_does_not_fit_is_dropped_on_request(tokenizer: PreTrainedTokenizerFast) -> None:
    group = text_group(" mat" * 30, " cat", " on")
    assert tokenized(tokenizer, group, max_length=10, drop_too_long=True) == (None, {"dropped/too_long": 1})
    kept, counts = tokenized(tokenizer, group, max_length=60, drop_too_long=True)
    assert kept is not None
    assert counts == {}


def test_completions_that_differ_only_in_what_is_truncated_make_no_pair(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    group = text_group("mat", " cat" * 20 + " on", " cat" * 20 + " sat", " on")
    found, counts = tokenized(tokenizer, group, max_length=10)
    assert found is not None
    assert counts["dropped/pairs_identical_in_tokens"] == 1
    assert len(found.completions) == 2  # no pair names the second any more
    assert found.pairs == (Pair(0, 1),)


def test_a_group_that_keeps_no_pair_is_dropped(tokenizer: PreTrainedTokenizerFast) -> None:
    group = text_group("mat", " cat" * 20 + " on", " cat" * 20 + " sat")
    found, counts = tokenized(tokenizer, group, max_length=10)
    assert found is None
    assert counts["dropped/nothing_left_after_tokenization"] == 1


def test_equal_completions_become_one_and_the_repeated_pair_is_counted(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    found, counts = tokenized(tokenizer, text_group("mat", " cat", " on", " on"))
    assert found is not None
    assert (len(found.completions), found.pairs) == (2, (Pair(0, 1),))
    assert counts == {"dropped/pairs_repeated": 1}


def test_a_completion_that_no_pair_names_is_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    group = PreferenceGroup(prompt="mat", completions=(" cat", " on", " sat"), pairs=(Pair(2, 1),))
    found, counts = tokenized(tokenizer, group)
    assert found is not None
    assert [tokenizer.decode(c) for c in found.completions] == [" on<|endoftext|>", " sat<|endoftext|>"]
    assert found.pairs == (Pair(1, 0),)
    assert counts == {}


def test_many_groups_keep_their_order(tokenizer: PreTrainedTokenizerFast) -> None:
    groups = [text_group(f"{number} the", " cat", f" day {number}") for number in range(1100)]
    counts: Counter[str] = Counter()
    found = list(tokenize_groups(iter(groups), tokenizer, WIDE, counts, RowNotes()))
    assert [tokenizer.decode(group.prompt) for group in found] == [group.prompt for group in groups]
    assert all(
        tokenizer.decode(group.completions[1]) == f" day {number}<|endoftext|>"
        for number, group in enumerate(found)
    )


LENGTHS = st.lists(st.integers(1, 30), min_size=2, max_size=4)


@given(
    st.integers(1, 40), LENGTHS, st.integers(2, 40), st.one_of(st.none(), st.integers(1, 40)), st.booleans()
)
def test_whatever_the_lengths_a_group_fits_and_keeps_prompts_end_and_completions_start(
    prompt_length: int, lengths: list[int], max_length: int, max_prompt: int | None, drop: bool
) -> None:
    if max_prompt is not None and max_prompt >= max_length:
        max_prompt = max_length - 1  # configurations beyond that are refused
    prompt = list(range(100, 100 + prompt_length))
    completions = [[1000 * (i + 1) + n for n in range(length)] for i, length in enumerate(lengths)]
    pairs = tuple(Pair(0, index) for index in range(1, len(lengths)))
    options = TokenizeOptions(
        max_length=max_length, max_prompt_length=max_prompt, drop_too_long=drop, append_eos=False
    )
    counts: Counter[str] = Counter()
    group = PreferenceGroup(prompt="", completions=("",) * len(lengths), pairs=pairs)
    fits = prompt_length + max(lengths) <= max_length and prompt_length <= (max_prompt or max_length)
    if drop and not fits:
        with pytest.raises(RowError) as error:
            _fit(prompt, completions, group, _NoBos(), options, counts)  # type: ignore[arg-type]
        assert (error.value.reason, counts) == ("too_long", {})
        return
    found = _fit(prompt, completions, group, _NoBos(), options, counts)  # type: ignore[arg-type]
    kept = found.prompt.tolist()
    assert kept == prompt[-len(kept) :]
    assert len(kept) <= (max_prompt or max_length - 1)
    for before, after in zip(completions, found.completions, strict=True):
        assert after.tolist() == before[: len(after)]
        assert len(kept) + len(after) <= max_length
        assert len(after) >= 1
    shorter = [len(a) < len(b) for a, b in zip(found.completions, completions, strict=True)]
    cut = (len(kept) < prompt_length, sum(shorter))
    assert (counts["truncated/prompts"], counts["truncated/completions"]) == cut
    assert (cut == (False, 0)) == fits


class _NoBos:
    bos_token_id = None

    def __call__(self, text: str, **_: Any) -> Any:
        return type("Encoded", (), {"input_ids": []})


def test_pairs_keep_the_margin_of_their_scores() -> None:
    completions = [[1], [2], [1], [3]]  # the first and the third become one
    group = PreferenceGroup(
        prompt="",
        completions=("a", "b", "c", "d"),
        pairs=(Pair(0, 1), Pair(2, 1), Pair(3, 0)),
        scores=(2.0, 0.5, 1.5, 3.0),
    )
    options = TokenizeOptions(max_length=9, max_prompt_length=None, drop_too_long=False, append_eos=False)
    found = _fit([7], completions, group, _NoBos(), options, Counter())  # type: ignore[arg-type]
    assert found.pairs == (Pair(0, 1), Pair(2, 0))
    assert found.margins == (1.5, 1.0)
    unscored = _fit([7], completions, replace(group, scores=None), _NoBos(), options, Counter())  # type: ignore[arg-type]
    assert unscored.margins is None
