"""Tokenized data on disk: groups after a round trip, the arrays that others read, and two writers at once."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from groups import ids, same, tokenized_groups
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.data.dataset import FORMAT_VERSION, TokenizedDataset, is_written, map_dataset, write_dataset
from dpo.data.records import Pair, TokenizedGroup, sequence_key
from dpo.errors import UserError

GROUPS = (
    TokenizedGroup(prompt=ids(1, 2), completions=(ids(3), ids(4, 5, 6)), pairs=(Pair(1, 0),)),
    TokenizedGroup(prompt=ids(7), completions=(ids(8), ids(9), ids(8, 9)), pairs=(Pair(0, 1), Pair(0, 2))),
)


def written(folder: Path) -> TokenizedDataset:
    write_dataset(GROUPS, folder, Counter())
    return map_dataset(folder, "digest")


@settings(max_examples=25, deadline=None)  # every example is flushed to the disk
@given(st.lists(tokenized_groups(), max_size=4))
def test_groups_that_are_written_and_read_back_are_equal(groups: list[TokenizedGroup]) -> None:
    with TemporaryDirectory() as folder:
        write_dataset(groups, Path(folder) / "data", Counter())
        data = map_dataset(Path(folder) / "data", "digest")
        assert len(data) == len(groups)
        assert all(same(data[index], group) for index, group in enumerate(groups))


def test_a_group_without_pairs_comes_back_without_margins(tmp_path: Path) -> None:
    block = TokenizedGroup(prompt=ids(1), completions=(ids(2, 3),), pairs=())
    write_dataset([block], tmp_path / "data", Counter())
    assert same(map_dataset(tmp_path / "data", "digest")[0], block)


def test_the_arrays_a_plan_needs(tmp_path: Path) -> None:
    data = written(tmp_path / "data")
    assert data.pairs_per_group.tolist() == [1, 2]
    assert data.sequences_per_group.tolist() == [2, 3]
    assert data.first_sequence.tolist() == [0, 2]
    assert data.longest.tolist() == [5, 3]  # 2 + 3 and 1 + 2 tokens
    assert data.counts == {"groups": 2, "pairs": 3, "tokens": 2 + 1 + 3 + 1 + 1 + 1 + 2}


def test_the_largest_id_is_known_also_of_a_folder_that_does_not_name_it(tmp_path: Path) -> None:
    data = written(tmp_path / "data")
    assert data.largest_id == data.tokens.max()
    (tmp_path / "data" / "counts.json").write_text(json.dumps(data.counts))
    assert map_dataset(tmp_path / "data", "digest").largest_id == data.tokens.max()
    write_dataset([], tmp_path / "empty", Counter())
    assert map_dataset(tmp_path / "empty", "digest").largest_id == -1


def test_the_arrays_a_cache_needs(tmp_path: Path) -> None:
    data = written(tmp_path / "data")
    assert data.completion_tokens.tolist() == [1, 3, 1, 1, 2]
    assert data.sequence_tokens.tolist() == [3, 5, 2, 2, 3]
    assert (data.completion_tokens.dtype, data.sequence_tokens.dtype) == (np.int64, np.int64)


def test_a_sequence_is_found_by_its_number(tmp_path: Path) -> None:
    data = written(tmp_path / "data")
    expected = [(group.prompt, completion) for group in GROUPS for completion in group.completions]
    for index, (prompt, completion) in enumerate(expected):
        found = data.sequence(index)
        assert [part.tolist() for part in found] == [prompt.tolist(), completion.tolist()]
        assert sequence_key(*found) == data.keys[index].tobytes()


def test_sequences_have_their_content_keys_in_order(tmp_path: Path) -> None:
    data = written(tmp_path / "data")
    expected = [sequence_key(group.prompt, c) for group in GROUPS for c in group.completions]
    assert [key.tobytes() for key in data.keys] == expected


def test_token_ids_are_mapped_not_read(tmp_path: Path) -> None:
    data = written(tmp_path / "data")
    for array in (data.tokens, data.segment_offsets, data.pairs, data.keys):
        assert isinstance(array, np.memmap)
    assert np.shares_memory(data[1].completions[2], data.tokens)


def test_a_source_that_ends_in_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    def broken() -> Iterator[TokenizedGroup]:
        yield GROUPS[0]
        raise UserError("line 2 is broken")

    for _ in range(2):  # a second attempt meets the same error, not what the first left
        with pytest.raises(UserError, match="line 2"):
            write_dataset(broken(), tmp_path / "data", Counter())
    assert list(tmp_path.iterdir()) == []


def test_of_two_writers_the_first_to_finish_wins_and_the_other_uses_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "data"

    def overtaken() -> Iterator[TokenizedGroup]:
        yield GROUPS[0]
        write_dataset(GROUPS, folder, Counter())
        yield GROUPS[1]

    write_dataset(overtaken(), folder, Counter())
    data = map_dataset(folder, "digest")
    assert [same(data[index], group) for index, group in enumerate(GROUPS)] == [True, True]
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_that_lost_files_is_written_again(tmp_path: Path) -> None:
    folder = written(tmp_path / "data").path
    (folder / "counts.json").unlink()
    assert not is_written(folder)
    assert len(written(folder)) == 2


def test_other_files_are_another_format(tmp_path: Path) -> None:
    """A change of the files needs a new FORMAT_VERSION, or folders of an earlier version cannot be read."""
    written(tmp_path / "data")
    arrays = {"group_pairs", "group_segments", "keys", "margins", "pairs", "quantiles", "segment_offsets"}
    files = {"counts.json", "tokens.bin", *(f"{name}.npy" for name in arrays)}
    assert (FORMAT_VERSION, {path.name for path in (tmp_path / "data").iterdir()}) == (4, files)
