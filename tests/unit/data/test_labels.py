"""Completions with labels instead of rivals: rows, token ids, batches, and completions of other prompts."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast
from unit.data.conftest import Open

from dpo.data.dataset import map_dataset, write_dataset
from dpo.data.distinct import split_pairs
from dpo.data.fields import RowError
from dpo.data.mismatched import mismatched_groups, with_mismatched
from dpo.data.notes import RowNotes
from dpo.data.preference_data import preference_data
from dpo.data.records import NO_RIVAL, Pair, TokenizedGroup, plain_ids
from dpo.data.rows import group_from_row
from dpo.data.trees import group_batch
from dpo.errors import UserError

GOOD, BAD = Pair(0, NO_RIVAL), Pair(NO_RIVAL, 0)
USER = {"role": "user", "content": "Hi"}
YES = {"role": "assistant", "content": "yes"}


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


@pytest.mark.parametrize("label", [True, 1, 1.0, "true", "True", "1", np.bool_(True)])
def test_a_labelled_completion_is_a_pair_with_one_side(label: Any) -> None:
    notes = RowNotes()
    group = group_from_row({"prompt": "p", "completion": " a", "label": label}, notes=notes)
    assert (group.prompt, group.completions, group.pairs) == ("p", (" a",), (GOOD,))
    assert notes.labelled == 1
    assert not notes.ignored


@pytest.mark.parametrize("label", [False, 0, "false", "0"])
def test_an_undesirable_one_has_the_other_side(label: Any) -> None:
    assert group_from_row({"prompt": "p", "completion": " a", "label": label}).pairs == (BAD,)


def test_messages_and_several_completions_have_labels_too() -> None:
    group = group_from_row({"prompt": [USER], "completion": [YES], "label": False})
    assert (group.prompt, group.completions, group.pairs) == ((USER,), ("yes",), (BAD,))
    several = group_from_row(
        {"prompt": "p", "completions": [" a", " b", " c"], "labels": [True, False, True]}
    )
    assert several.pairs == (GOOD, Pair(NO_RIVAL, 1), Pair(2, NO_RIVAL))
    assert group_from_row({"prompt": "p", "completions": [" a"], "labels": [True]}).pairs == (GOOD,)


def test_pairs_and_scores_come_before_labels_which_are_then_named_as_unused() -> None:
    notes = RowNotes()
    row = {"prompt": "p", "completions": [" a", " b"], "labels": [True, False]}
    assert group_from_row({**row, "pairs": [[1, 0]]}, notes=notes).pairs == (Pair(1, 0),)
    assert group_from_row({**row, "scores": [1, 3]}, notes=notes).pairs == (Pair(1, 0),)
    assert group_from_row(
        {"prompt": "p", "chosen": " a", "rejected": " b", "label": 1}, notes=notes
    ).pairs == (Pair(0, 1),)
    assert notes.ignored == {"labels": 2, "label": 1}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "p", "completion": " a"}, "missing_field"),
        ({"prompt": "p", "completion": " a", "label": "good"}, "bad_label"),
        ({"prompt": "p", "completion": " a", "label": 2}, "bad_label"),
        ({"prompt": "p", "completions": [" a", " b"], "labels": [True]}, "bad_label"),
        ({"prompt": "p", "completions": [" a", " b"], "labels": [True, None]}, "bad_label"),
        ({"prompt": "p", "completions": [" a", " a"], "labels": [True, False]}, "label_both_ways"),
        ({"prompt": "p", "completions": [], "labels": []}, "too_few_completions"),
        ({"completion": " a", "label": True}, "missing_field"),
    ],
)
def test_a_faulty_label_is_named(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as found:
        group_from_row(row)
    assert found.value.reason == reason


ROWS = [
    {"prompt": "0 the cat", "completion": " good day", "label": True},
    {"prompt": "1 the mat", "completion": " bad", "label": False},
    {"prompt": "2 we", "completions": [" a", " b", " a"], "labels": [True, False, True]},
    {"prompt": "3 like", "completions": [" a cat", " a mat"], "labels": [True, False]},
]


def test_they_are_tokenized_once_each_and_described(open_with: Open, write_jsonl: Callable[..., str]) -> None:
    data, _ = open_with(write_jsonl(ROWS))
    assert [group.pairs for group in (data[index] for index in range(len(data)))] == [
        (GOOD,),
        (BAD,),
        (GOOD, Pair(NO_RIVAL, 1)),
        (GOOD, Pair(NO_RIVAL, 1)),
    ]
    assert not data.has_rivals.any()
    assert data.contents == "6 labelled completions, 3 of them desirable, of 4 prompts"
    assert data.counts["dropped/pairs_repeated"] == 1
    paired = [{"prompt": "p", "chosen": " a", "rejected": " b"}]
    mixed, _ = open_with(write_jsonl([*paired, *ROWS], "mixed.jsonl"))
    assert mixed.contents == "1 pairs and 6 labelled completions, 3 of them desirable, of 5 prompts"
    assert open_with(write_jsonl(paired, "paired.jsonl"))[0].contents == "1 pairs of 1 prompts"


def test_labels_that_contradict_each_other_after_truncation_are_dropped(
    open_with: Open, write_jsonl: Callable[..., str]
) -> None:
    same = {"prompt": "3", "completions": [" we like", " we ended", " b"], "labels": [True, False, True]}
    data, _ = open_with(write_jsonl([same]), max_length=2, max_prompt_length=1, append_eos=False)
    assert [len(ids) for ids in data[0].completions] == [1]
    assert (data[0].pairs, data.counts["dropped/pairs_identical_in_tokens"]) == ((GOOD,), 2)


def test_every_label_may_be_a_group_of_its_own() -> None:
    group = TokenizedGroup(
        prompt=ids(9), completions=(ids(1), ids(2)), pairs=(GOOD, Pair(NO_RIVAL, 1), Pair(0, 1))
    )
    first, second, both = split_pairs(group)
    assert (first.completions, first.pairs) == ((ids(1),), (GOOD,))
    assert (second.completions, second.pairs) == ((ids(2),), (BAD,))
    assert both.pairs == (Pair(0, 1),)


def test_a_batch_keeps_the_missing_sides() -> None:
    one = TokenizedGroup(prompt=ids(9), completions=(ids(1), ids(2)), pairs=(Pair(1, 0),))
    good = TokenizedGroup(prompt=ids(8), completions=(ids(3),), pairs=(GOOD,))
    bad = TokenizedGroup(prompt=ids(7), completions=(ids(4),), pairs=(BAD,))
    batch = group_batch([one, good, bad], "packed")
    assert batch.pairs.tolist() == [[1, 0], [2, NO_RIVAL], [NO_RIVAL, 3]]
    assert (batch.num_chosen, batch.num_rejected) == (2, 2)


def written(groups: list[TokenizedGroup], folder: Path) -> Any:
    write_dataset(groups, folder, Counter({"dropped/too_long": 3}))
    return map_dataset(folder, f"digest of {folder.name}")


def test_a_mismatched_completion_is_of_the_next_other_prompt_and_fits(tmp_path: Path) -> None:
    groups = [
        TokenizedGroup(prompt=ids(1), completions=(ids(10, 11), ids(12)), pairs=(Pair(0, 1),)),
        TokenizedGroup(prompt=ids(1), completions=(ids(20),), pairs=(GOOD,)),
        TokenizedGroup(prompt=ids(2, 2), completions=(ids(30, 31), ids(32)), pairs=(Pair(0, 1),)),
        TokenizedGroup(prompt=ids(3, 3, 3), completions=(ids(40),), pairs=(BAD,)),
    ]
    data = written(groups, tmp_path / "plain")
    found = with_mismatched(data, "data.train")
    last = [found[index].completions[-1].tolist() for index in range(4)]
    assert last == [[30, 31], [32], [40], [12]]  # by turns the first and the second; at most 4 tokens in all
    assert int(found.sequence_tokens.max()) == int(data.sequence_tokens.max())
    assert [found[index].pairs for index in range(4)] == [group.pairs for group in groups]
    assert [len(found[index].completions) for index in range(4)] == [3, 2, 3, 2]
    assert found.counts == {**data.counts, "tokens": data.counts["tokens"] + 5}
    assert found.digest != data.digest
    assert with_mismatched(data, "data.train").path == found.path
    batch = preference_data(found, np.arange(10.0), mismatched=True).batch(np.array([2, 0]), "packed")
    assert batch.mismatched is not None
    assert batch.mismatched.tolist() == [2, 5]
    assert batch.reference is not None
    assert batch.reference[batch.mismatched].tolist() == [7.0, 2.0]
    empty = preference_data(found, np.arange(10.0), mismatched=True).batch(np.zeros(0, np.int64), "packed")
    assert empty.mismatched is not None
    assert torch.equal(empty.mismatched, torch.zeros(0, dtype=torch.int64))


def test_data_of_one_prompt_has_no_mismatched_completions(tmp_path: Path) -> None:
    same = TokenizedGroup(prompt=ids(1), completions=(ids(2),), pairs=(GOOD,))
    data = written([same, same], tmp_path / "same")
    with pytest.raises(UserError, match=r"data\.train: all rows have the same prompt"):
        list(mismatched_groups(data, "data.train"))


def test_mismatched_text_is_text_of_another_row(
    open_with: Open, write_jsonl: Callable[..., str], tokenizer: PreTrainedTokenizerFast
) -> None:
    data = with_mismatched(open_with(write_jsonl(ROWS[:2]), append_eos=False)[0], "data.train")
    texts = [tokenizer.decode(plain_ids(data[index].completions[-1])) for index in (0, 1)]
    assert texts == [" bad", " good day"]
    assert [source.name for source in data.sources] == [str(write_jsonl(ROWS[:2]))]
