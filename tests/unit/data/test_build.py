"""From a configuration's sources to token ids: mixtures, splits, counts, and when a folder is used again."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from groups import tokenized_groups
from hypothesis import given
from transformers import PreTrainedTokenizerFast
from unit.data.conftest import Open

from dpo.config import DataConfig, DataSource
from dpo.data import build as build_module
from dpo.data.build import open_datasets, resolve_max_length, train_sources_of
from dpo.data.dataset import TokenizedDataset
from dpo.data.distinct import split_pairs
from dpo.data.preview import preview_data
from dpo.data.records import Pair, TokenizedGroup
from dpo.errors import UserError


def preview(data: DataConfig, *arguments: Any) -> Any:
    return preview_data(train_sources_of(data), [], data, *arguments)


def numbered(write_jsonl: Callable[..., str], number: int, name: str) -> str:
    rows = [{"prompt": f"{name} {i}", "chosen": " cat", "rejected": " mat"} for i in range(number)]
    return write_jsonl(rows, f"{name}.jsonl")


def prompts(data: TokenizedDataset, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [tokenizer.decode(data[index].prompt) for index in range(len(data))]


def prepared(folder: Path, splits: dict[str, int], *, complete: bool | None = None) -> str:
    """A folder as data_prep writes it, with that many rows per split."""
    folder.mkdir()
    for split, number in splits.items():
        rows = [
            {
                "prompt": f"{split} {i}",
                "completions": [" cat", " mat"],
                "pairs": [{"chosen": 0, "rejected": 1}],
            }
            for i in range(number)
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")
    if complete is not None:
        (folder / "manifest.json").write_text(json.dumps({"completions_are_complete": complete}))
    return str(folder)


def pairs_with_margins(group: TokenizedGroup) -> list[tuple[list[int], list[int], list[int], float | None]]:
    """(prompt, chosen, rejected, margin) of each pair."""
    margins = group.margins or [None] * len(group.pairs)
    return [
        (
            group.prompt.tolist(),
            group.completions[pair.chosen].tolist(),
            group.completions[pair.rejected].tolist(),
            margin,
        )
        for pair, margin in zip(group.pairs, margins, strict=True)
    ]


@given(tokenized_groups())
def test_splitting_a_group_keeps_prompt_pairs_and_margins(group: TokenizedGroup) -> None:
    split = list(split_pairs(group))
    assert all((len(one.completions), one.pairs) == (2, (Pair(0, 1),)) for one in split)
    assert [row for one in split for row in pairs_with_margins(one)] == pairs_with_margins(group)


@pytest.mark.parametrize("group_pairs", [True, False])
def test_scores_reach_the_data_set_as_margins(
    open_with: Open, write_jsonl: Callable[..., str], group_pairs: bool
) -> None:
    row = {"prompt": "the", "completions": [" cat", " mat", " day"], "scores": [0.5, 2.0, -1.0]}
    data, _ = open_with(write_jsonl([row]), group_pairs=group_pairs)
    assert data.margins.tolist() == [1.5, 3.0]


def test_scores_of_a_pair_reach_the_data_set_too(open_with: Open, write_jsonl: Callable[..., str]) -> None:
    row = {"prompt": "the", "chosen": " cat", "rejected": " mat", "score_chosen": 2.0, "score_rejected": 0.5}
    data, _ = open_with(write_jsonl([row, {**row, "score_rejected": 2.0}]))
    assert data.margins.tolist() == [1.5]
    assert data.counts["dropped/no_pair_above_margin"] == 1


def test_ungrouped_every_pair_is_a_group_of_its_own(
    open_with: Open, write_jsonl: Callable[..., str], tokenizer: PreTrainedTokenizerFast
) -> None:
    row = {"prompt": "the", "completions": [" cat", " mat", " day"], "pairs": [[2, 0], [2, 1]]}
    grouped, _ = open_with(write_jsonl([row]))
    alone, _ = open_with(write_jsonl([row]), group_pairs=False)
    assert (len(grouped), len(alone)) == (1, 2)
    assert alone.pairs_per_group.tolist() == [1, 1]
    texts = [
        [tokenizer.decode(c, skip_special_tokens=True) for c in group.completions]
        for group in (alone[0], alone[1])
    ]
    assert texts == [[" day", " cat"], [" day", " mat"]]
    assert {pair for group in (alone[0], alone[1]) for pair in group.pairs} == {Pair(0, 1)}
    assert set(alone.keys.tolist()) == set(grouped.keys.tolist())  # the same rows of the cache


def test_counts_tell_what_was_dropped_and_truncated(open_with: Open, write_jsonl: Callable[..., str]) -> None:
    rows = [
        {"prompt": "the cat", "chosen": " sat", "rejected": " on"},
        {"prompt": "the cat", "chosen": " sat", "rejected": " sat"},
        {"prompt": "the cat", "chosen": " sat"},
        {"prompt": "the mat" * 40, "chosen": " sat", "rejected": " on"},
    ]
    train, test = open_with(write_jsonl(rows), max_length=16)
    assert test is None
    assert {name: number for name, number in train.counts.items() if number and name != "tokens"} == {
        "groups": 2,
        "pairs": 2,
        "dropped/identical_completions": 1,
        "dropped/missing_field": 1,
        "truncated/prompts": 1,
    }
    assert train.counts["tokens"] == len(train.tokens)


def test_strict_makes_a_faulty_row_an_error_also_when_the_data_is_tokenized_already(
    open_with: Open, write_jsonl: Callable[..., str]
) -> None:
    path = write_jsonl([{"prompt": "a", "chosen": " b", "rejected": " c"}, {"prompt": "a", "chosen": " b"}])
    assert len(open_with(path)[0]) == 1
    with pytest.raises(UserError, match=rf"{path}:2: .*missing_field"):
        open_with(path, strict=True)


def test_strict_leaves_tokenized_data_in_place_since_another_job_may_have_it_mapped(
    open_with: Open, write_jsonl: Callable[..., str]
) -> None:
    path = numbered(write_jsonl, 3, "x")
    first, _ = open_with(path)
    before = first.path.stat().st_ino
    again, _ = open_with(path, strict=True)
    assert (again.path, again.path.stat().st_ino) == (first.path, before)


def test_nothing_left_is_an_error_that_says_why(open_with: Open, write_jsonl: Callable[..., str]) -> None:
    path = write_jsonl([{"prompt": "a", "chosen": " b", "rejected": " b"}] * 3)
    with pytest.raises(UserError, match=r"data\.train: .*3 identical_completions"):
        open_with(path)
    with pytest.raises(UserError, match="3 identical_completions"):
        preview(DataConfig(train=path), None, None)


def test_an_empty_file_is_an_error(open_with: Open, write_jsonl: Callable[..., str]) -> None:
    with pytest.raises(UserError, match=r"data\.train: .*empty"):
        open_with(write_jsonl([]))


def test_weights_take_a_fixed_part_or_repeat(
    open_with: Open, write_jsonl: Callable[..., str], tokenizer: PreTrainedTokenizerFast
) -> None:
    half = DataSource(path=numbered(write_jsonl, 200, "half"), weight=0.5)
    twice = DataSource(path=numbered(write_jsonl, 5, "twice"), weight=2.0)
    found = prompts(open_with([half, twice])[0], tokenizer)
    assert [p for p in found if p.startswith("twice")] == [f"twice {i}" for i in range(5) for _ in range(2)]
    taken = [p for p in found if p.startswith("half")]
    assert len(taken) == len(set(taken))
    assert 70 < len(taken) < 130  # 100 expected, standard deviation 7
    again = prompts(open_with([twice, half])[0], tokenizer)
    assert [p for p in again if p.startswith("half")] == taken


def test_a_weight_between_two_numbers_repeats_some(
    open_with: Open, write_jsonl: Callable[..., str], tokenizer: PreTrainedTokenizerFast
) -> None:
    source = DataSource(path=numbered(write_jsonl, 200, "some"), weight=1.5)
    times = Counter(prompts(open_with([source])[0], tokenizer))
    assert len(times) == 200
    assert set(times.values()) == {1, 2}
    assert 70 < sum(number == 2 for number in times.values()) < 130


def test_a_data_set_knows_how_many_groups_each_source_gave(
    write_jsonl: Callable[..., str], open_with: Open
) -> None:
    first = DataSource(path=numbered(write_jsonl, 5, "first"), weight=2.0)
    second = DataSource(path=numbered(write_jsonl, 3, "second"))
    assert [source[:2] for source in open_with([first, second])[0].sources] == [
        (first.path, 10),
        (second.path, 3),
    ]


def test_held_out_data_defaults_to_the_test_splits_beside_train(
    open_with: Open, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, write_jsonl: Callable[..., str]
) -> None:
    with_test = prepared(tmp_path / "a", {"train": 3, "test": 2})
    without = prepared(tmp_path / "b", {"train": 4})
    train, test = open_with([DataSource(path=with_test, weight=2.0), DataSource(path=without)])
    assert (len(train), test and len(test)) == (10, 2)  # weights are for training data only
    assert test is not None
    assert prompts(test, tokenizer) == ["test 0", "test 1"]
    assert open_with(without)[1] is None
    named = open_with(with_test, test=numbered(write_jsonl, 7, "other"))[1]
    assert named is not None
    assert len(named) == 7


@pytest.mark.parametrize(
    ("complete", "option", "ends"),
    [(True, None, True), (False, None, False), (None, None, True), (True, False, False), (False, True, True)],
)
def test_eos_follows_the_manifest_unless_the_option_overrides(
    open_with: Open,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    complete: bool | None,
    option: bool | None,
    ends: bool,
) -> None:
    train, _ = open_with(prepared(tmp_path / "a", {"train": 1}, complete=complete), append_eos=option)
    assert (int(train[0].completions[0][-1]) == tokenizer.eos_token_id) is ends


@pytest.mark.parametrize(
    ("complete", "option", "ends"), [(True, None, True), (False, None, False), (True, False, False)]
)
def test_the_end_of_a_chat_turn_follows_the_manifest_and_the_option_too(
    open_with: Open,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    complete: bool,
    option: bool | None,
    ends: bool,
) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    folder = Path(prepared(tmp_path / "a", {"train": 1}, complete=complete))
    row = {"prompt": [{"role": "user", "content": "hi"}], "completions": [" cat", " mat"], "pairs": [[0, 1]]}
    pq.write_table(pa.Table.from_pylist([row]), folder / "train.parquet")
    train, _ = open_with(str(folder), append_eos=option)
    assert tokenizer.decode(train[0].completions[0]) == " cat" + "<|endoftext|>" * ends


def test_the_folder_is_used_again_and_an_option_that_decides_ids_makes_another(
    open_with: Open, write_jsonl: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = numbered(write_jsonl, 3, "x")
    first, _ = open_with(path)
    folders = {first.path}
    for change in (
        {"max_length": 32},
        {"max_prompt_length": 4},
        {"too_long": "drop"},
        {"group_pairs": False},
        {"append_eos": False},
        {"pairing": "all"},
        {"min_margin": 0.5},
    ):
        folders.add(open_with(path, **change)[0].path)
    folders.add(open_with([DataSource(path=path, weight=2.0)])[0].path)
    assert len(folders) == 9

    def never(*_: Any) -> None:
        raise AssertionError("tokenized again")

    monkeypatch.setattr(build_module, "build_dataset", never)
    assert open_with(path)[0].path == first.path
    moved = Path(path).rename(tmp_path / "renamed.jsonl")  # the content counts, not the name
    assert open_with(str(moved))[0].path == first.path


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_a_file_that_was_moved_has_its_own_name_in_messages(
    open_with: Open, tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str
) -> None:
    """The folder of token ids is used again, and it was made under the earlier name."""
    rows = {
        "jsonl": '{"prompt": "a", "chosen": " cat", "rejected": " mat", "more": 1}\n{"prompt": "b"}\n',
        "csv": "prompt,chosen,rejected,more\na, cat, mat,1\nb,x,,\n",
    }
    first = tmp_path / f"first.{ending}"
    first.write_text(rows[ending])
    made = open_with(str(first), strict=False, test=str(first))
    seen = capsys.readouterr().out
    second = first.rename(tmp_path / f"second.{ending}")
    moved = open_with(str(second), strict=False, test=str(second))
    assert [data.path for data in moved if data] == [data.path for data in made if data]
    assert seen.count(str(first)) > 5
    assert capsys.readouterr().out == seen.replace(str(first), str(second))
    assert [source.name for data in moved if data for source in data.sources] == [str(second)] * 2
    with pytest.raises(UserError, match="second") as fault:
        open_with(str(second), strict=True)
    assert str(first) not in str(fault.value)


def test_an_edited_source_or_another_tokenizer_makes_another_folder(
    open_with: Open,
    write_jsonl: Callable[..., str],
    bos_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    first = open_with(numbered(write_jsonl, 3, "x"))[0].path
    assert open_with(numbered(write_jsonl, 4, "x"))[0].path != first
    data = DataConfig(train=numbered(write_jsonl, 3, "x"), cache_dir=str(tmp_path / "cache"))
    assert open_datasets(data, bos_tokenizer, 64)[0].path != first


def test_data_tokenized_by_an_earlier_version_of_the_reader_is_not_used(
    open_with: Open, write_jsonl: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module, "tokenizer_digest", lambda _: "tokenizer")
    data, _ = open_with(numbered(write_jsonl, 3, "x"), max_length=32)
    earlier = {
        "7f162118312552dd",
        "fbd335d11907dec4",
        "6375aa5f4d714c59",
        "6b7505374b22d82f",
        "41161ad9e2fb24da",
    }
    assert data.path.name not in earlier  # which may hold what those versions read otherwise
    assert data.path.name == "af0f192e7cc89e99"


def test_the_longest_length_is_the_models_at_most() -> None:
    assert resolve_max_length(None, 64) == 64
    assert resolve_max_length(None, 4096) == 1024
    assert resolve_max_length(None, None) == 1024
    assert resolve_max_length(64, 64) == 64
    assert resolve_max_length(3000, None) == 3000
    with pytest.raises(UserError, match=r"data\.max_length: 65"):
        resolve_max_length(65, 64)


def test_a_prompt_length_that_leaves_no_room_under_the_models_limit_is_refused(
    open_with: Open, write_jsonl: Callable[..., str]
) -> None:
    with pytest.raises(UserError, match=r"data\.max_prompt_length: 64"):
        open_with(numbered(write_jsonl, 3, "x"), max_prompt_length=64)
