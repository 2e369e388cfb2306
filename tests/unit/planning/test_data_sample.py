from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from dpo.config import DataConfig
from dpo.errors import UserError
from dpo.planning import data_sample as sample
from dpo.planning.data_sample import SampledData, sample_data


def sampled(data: DataConfig, tokenizer: PreTrainedTokenizerFast, *, exact: bool = False) -> SampledData:
    return sample_data(data, tokenizer, 64, exact=exact)["train"]


@pytest.fixture
def data(
    write_jsonl: Callable[..., str], preference_rows: Callable[..., list[dict[str, Any]]], tmp_path: Any
) -> DataConfig:
    rows = [*preference_rows(300), {"prompt": "x", "chosen": "same", "rejected": "same"}]
    return DataConfig(train=write_jsonl(rows), cache_dir=str(tmp_path / "tokenized"))


def test_a_small_data_set_is_tokenized_as_a_whole(
    data: DataConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    found, exact = sampled(data, tokenizer), sampled(data, tokenizer, exact=True)
    assert found.exact
    assert exact.exact
    assert found.tokens == exact.tokens
    assert found.changed["dropped/identical_completions"] == 1
    assert (found.groups, found.pairs, found.sequences) == (exact.groups, exact.pairs, exact.sequences)
    assert (found.pairs_per_group == exact.pairs_per_group).all()


@pytest.mark.parametrize("seed", range(4))
def test_a_sample_estimates_the_whole(
    data: DataConfig, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(sample, "SAMPLE_GROUPS", 120)
    monkeypatch.setattr(sample, "SEED", seed)
    found, exact = sampled(data, tokenizer), sampled(data, tokenizer, exact=True)
    assert not found.exact
    assert len(found.sample) == 120
    assert found.groups == exact.groups
    assert found.tokens.low <= exact.tokens.mean <= found.tokens.high
    assert found.tokens.high - found.tokens.low < 0.2 * exact.tokens.mean
    assert found.pairs == pytest.approx(exact.pairs, rel=0.15)
    assert found.changed["dropped/identical_completions"] == 1


def test_counts_of_cut_groups_are_scaled_up(
    data: DataConfig, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = DataConfig(train=data.train, max_length=16, cache_dir=data.cache_dir)
    exact = sampled(short, tokenizer, exact=True)
    monkeypatch.setattr(sample, "SAMPLE_GROUPS", 150)
    found = sampled(short, tokenizer)
    cut = "truncated/completions"
    assert found.changed[cut] == pytest.approx(exact.changed[cut], rel=0.3)


def test_trees_fill_a_micro_batch_and_include_the_longest(
    data: DataConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    found = sampled(data, tokenizer)

    def tokens(limit: int) -> int:
        return sum(len(prompt) + sum(map(len, rest)) for prompt, rest in found.trees(limit))

    assert tokens(1) == found.longest
    assert 1990 < tokens(2000) <= 2000
    assert tokens(10**5) == pytest.approx(10**5, rel=0.001), "groups are repeated"


def test_a_piece_is_cut_between_the_completions_of_a_group(
    write_jsonl: Callable[..., str], tokenizer: PreTrainedTokenizerFast, tmp_path: Any
) -> None:
    row = {"prompt": "the cat", "completions": [" sat" * n for n in (2, 9, 4)], "scores": [1, 2, 3]}
    found = sampled(DataConfig(train=write_jsonl([row]), cache_dir=str(tmp_path)), tokenizer)
    prompt, completions = len(found.sample[0].prompt), [len(each) for each in found.sample[0].completions]
    assert found.longest_sequence == prompt + max(completions)

    def lengths(limit: int) -> list[tuple[int, list[int]]]:
        return [(len(prompt), [*map(len, rest)]) for prompt, rest in found.piece(limit)]

    short, long, middle = completions
    assert lengths(1) == [(prompt, [long])]
    assert lengths(prompt + long + middle) == [(prompt, [long, middle])]
    assert lengths(found.longest) == [(prompt, [long, middle, short])]
    assert len(found.piece(2 * found.longest)) == 2


def test_the_held_out_split_is_sampled_too(data: DataConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    both = DataConfig(train=data.train, test=data.train, cache_dir=data.cache_dir)
    assert set(sample_data(both, tokenizer, 64, exact=False)) == {"train", "test"}


def test_a_split_without_any_group_left_is_an_error(
    write_jsonl: Callable[..., str], tokenizer: PreTrainedTokenizerFast, tmp_path: Any
) -> None:
    rows = [{"prompt": "a " * 40, "chosen": "b " * 30, "rejected": "c " * 30}]
    data = DataConfig(train=write_jsonl(rows), max_length=8, too_long="drop", cache_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"data.train: .*no group of 1"):
        sampled(data, tokenizer)


def test_the_sample_depends_only_on_the_seed(
    data: DataConfig, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "SAMPLE_GROUPS", 50)
    first, second = sampled(data, tokenizer), sampled(data, tokenizer)
    assert np.array_equal(first.stand_in, second.stand_in)
    assert first.tokens == second.tokens


@pytest.mark.parametrize("exact", [True, False])
def test_completions_of_other_prompts_are_planned_for(
    data: DataConfig, tokenizer: PreTrainedTokenizerFast, exact: bool
) -> None:
    plain = sampled(data, tokenizer, exact=exact)
    found = sample_data(data, tokenizer, 64, exact=exact, mismatched=True)["train"]
    assert found.sequences == plain.sequences + plain.groups
    assert (found.groups, found.pairs) == (plain.groups, plain.pairs)
    assert found.tokens.mean > plain.tokens.mean
