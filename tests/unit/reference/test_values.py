"""What a run reads from the cache: the values of its data in its order, or an error with the command."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.reference.samples import IDENTITY, made

from dpo.config import ModelConfig, ReferenceConfig
from dpo.data.dataset import TokenizedDataset, map_dataset, write_dataset
from dpo.data.records import Pair, TokenizedGroup
from dpo.errors import UserError
from dpo.reference.audit import RECORD_FILE
from dpo.reference.shards import write_shard
from dpo.reference.store import ReferenceStore
from dpo.reference.table import ReferenceRows
from dpo.reference.values import (
    ReferenceUse,
    known_logps,
    open_reference,
    reference_logps,
    reference_token_logps,
)

PROMPT = np.array([1, 2], dtype=np.int32)


def data_of(folder: Path, *lengths: int) -> TokenizedDataset:
    """A group of two completions for each length: one of that many tokens, and a shared one of 3 tokens.

    Sequence 2 i is the completion of lengths[i] tokens, sequence 2 i + 1 the shared one.
    """
    shared = np.array([7, 8, 9], dtype=np.int32)
    groups = [
        TokenizedGroup(
            prompt=PROMPT,
            completions=(np.full(length, 40 + length, dtype=np.int32), shared),
            pairs=(Pair(0, 1),),
        )
        for length in lengths
    ]
    write_dataset(groups, folder, Counter())
    return map_dataset(folder, "digest")


@pytest.fixture
def data(tmp_path: Path) -> TokenizedDataset:
    return data_of(tmp_path / "data", 1, 4, 2)


@pytest.fixture
def store(tmp_path: Path) -> ReferenceStore:
    return made(tmp_path / "cache")


def rows_of(
    data: TokenizedDataset, sequences: list[int], *, with_tokens: bool = False, by: float = 0.0
) -> ReferenceRows:
    """Rows in which every token of a completion of n tokens has the log-prob -n - by."""
    lengths = data.completion_tokens[sequences].astype(np.int32)
    tokens = np.repeat(-lengths - by, lengths).astype(np.float32)
    logps = lengths * (-lengths - by)
    return ReferenceRows(
        keys=np.asarray(data.keys)[sequences],
        logps=logps.astype(np.float64),
        num_tokens=lengths,
        token_logps=tokens if with_tokens else None,
    )


def test_values_are_in_the_order_of_each_data_set(
    data: TokenizedDataset, store: ReferenceStore, tmp_path: Path
) -> None:
    other = data_of(tmp_path / "other", 4, 4, 1)
    store.append(rows_of(data, [4, 1, 0]))
    store.append(rows_of(data, [2]))
    first, second = reference_logps([data, other], store, "")
    assert first.tolist() == [-1, -9, -16, -9, -4, -9]
    assert second.tolist() == [-16, -9, -16, -9, -1, -9]
    assert first.dtype == np.float64
    assert reference_logps([], store, "") == []


def test_what_a_cache_knows_of_data_has_no_value_for_the_rest(
    data: TokenizedDataset, store: ReferenceStore
) -> None:
    assert np.isnan(known_logps([data], store)[0]).all()  # an empty cache
    store.append(rows_of(data, [4, 1]))
    np.testing.assert_equal(known_logps([data], store)[0], [np.nan, -9, np.nan, -9, -4, -9])


def test_a_cache_that_lacks_rows_is_refused_with_the_command(
    data: TokenizedDataset, store: ReferenceStore
) -> None:
    store.append(rows_of(data, [0, 1]))
    with pytest.raises(UserError, match=rf"{store.path}: .* 2 of the 6 .* make precompute-ref$"):
        reference_logps([data], store, "make precompute-ref")


def test_the_error_for_an_empty_cache_names_the_nearest_other_one(
    data: TokenizedDataset, store: ReferenceStore, tmp_path: Path
) -> None:
    other = made(tmp_path / "cache", replace(IDENTITY, dtype="bfloat16")).path.name
    with pytest.raises(UserError, match=rf"6 of the 6 .*{other}.* dtype: bfloat16 -> float32"):
        reference_logps([data], store, "")
    store.append(rows_of(data, [0]))
    with pytest.raises(UserError, match=r"5 of the 6 ") as raised:
        reference_logps([data], store, "")
    assert other not in str(raised.value)


def test_missing_rows_of_a_second_data_set_are_refused(
    data: TokenizedDataset, store: ReferenceStore, tmp_path: Path
) -> None:
    store.append(rows_of(data, [0, 1, 2, 4]))
    other = data_of(tmp_path / "other", 4, 5)
    with pytest.raises(UserError, match=rf"{store.path}: .* 1 of the 4 "):
        reference_logps([data, other], store, "")


@pytest.mark.parametrize("with_tokens", [False, True])
def test_a_row_of_another_length_is_refused(
    data: TokenizedDataset, store: ReferenceStore, with_tokens: bool
) -> None:
    longer = replace(
        rows_of(data, [0, 1, 2, 4]),
        num_tokens=np.array([1, 3, 5, 2], dtype=np.int32),
        token_logps=np.full(11, -1.0, dtype=np.float32),
    )
    store.append(longer)
    read = reference_token_logps if with_tokens else lambda data, *rest: reference_logps([data], *rest)
    with pytest.raises(UserError, match=rf"{store.path}: .* number of tokens .* command"):
        read(data, store, "command")


def tokens_of(*lengths_and_shifts: tuple[int, float]) -> list[float]:
    return [-length - by for length, by in lengths_and_shifts for _ in range(length)]


def test_tokens_are_in_the_order_of_the_sequences_even_if_those_share_a_row(
    data: TokenizedDataset, store: ReferenceStore
) -> None:
    store.append(rows_of(data, [4, 1, 0], with_tokens=True))
    store.append(rows_of(data, [2], with_tokens=True))
    found = reference_token_logps(data, store, "")
    assert found.dtype == np.float32
    assert found.tolist() == tokens_of((1, 0), (3, 0), (4, 0), (3, 0), (2, 0), (3, 0))


def test_of_several_copies_the_oldest_with_tokens_counts(
    data: TokenizedDataset, store: ReferenceStore
) -> None:
    tiny, digest = 2.0**-18, IDENTITY.digest  # within the tolerance for rounding
    store.append(rows_of(data, [0, 1, 2, 4], with_tokens=True, by=2 * tiny))
    write_shard(store.path, rows_of(data, [1, 2], with_tokens=True, by=tiny), digest, time_ns=20)
    write_shard(store.path, rows_of(data, [1]), digest, time_ns=10)  # older, but without tokens
    found = reference_token_logps(data, store, "")
    expected = [(1, 2 * tiny), (3, tiny), (4, tiny), (3, tiny), (2, 2 * tiny), (3, tiny)]
    assert found.tolist() == tokens_of(*expected)
    (sums,) = reference_logps([data], store, "")
    assert sums[1] == -9  # for sums the oldest of all


@given(st.lists(st.tuples(st.sets(st.integers(0, 3), min_size=1), st.booleans()), max_size=5))
@settings(max_examples=50, deadline=None)
def test_tokens_of_overlapping_shards_are_those_of_the_oldest_copies(
    tmp_path_factory: pytest.TempPathFactory, shards: list[tuple[set[int], bool]]
) -> None:
    folder, distinct = tmp_path_factory.mktemp("tokens"), [0, 1, 2, 4]
    data, store = data_of(folder / "data", 1, 4, 2), made(folder / "cache")
    oldest: dict[int, float] = {}  # distinct sequence -> shift of its oldest copy with tokens
    for number, (members, with_tokens) in enumerate([*shards, ({0, 1, 2, 3}, True)]):
        sequences, shift = [distinct[member] for member in sorted(members)], number * 2.0**-21
        rows = rows_of(data, sequences, with_tokens=with_tokens, by=shift)
        write_shard(store.path, rows, IDENTITY.digest, time_ns=number + 1)
        for sequence in sequences if with_tokens else []:
            oldest.setdefault(sequence, shift)
    lengths = data.completion_tokens.tolist()
    expected = [(lengths[s], oldest[s if s in distinct else 1]) for s in range(len(lengths))]
    assert reference_token_logps(data, store, "").tolist() == tokens_of(*expected)


def test_rows_without_tokens_are_refused_where_tokens_are_wanted(
    data: TokenizedDataset, store: ReferenceStore
) -> None:
    store.append(rows_of(data, [0, 1, 2, 4]))
    store.append(rows_of(data, [1], with_tokens=True))
    with pytest.raises(UserError, match=r"3 of the 6 .*reference\.store_token_logps: true"):
        reference_token_logps(data, store, "dpo precompute-ref")


def test_a_damaged_cache_is_refused(data: TokenizedDataset, store: ReferenceStore) -> None:
    path = store.append(rows_of(data, [0, 1, 2, 4], with_tokens=True))
    path.write_bytes(path.read_bytes()[:-9])
    for attempt in (
        lambda: reference_logps([data], store, ""),
        lambda: reference_token_logps(data, store, ""),
    ):
        with pytest.raises(UserError, match="damaged shard"):
            attempt()


def use_of(data: TokenizedDataset, store: ReferenceStore | None, *, audit_rows: int = 16) -> ReferenceUse:
    sums = [] if store is None else reference_logps([data], store, "")
    return ReferenceUse(
        model=ModelConfig(name_or_path="not there"),
        options=ReferenceConfig(audit_rows=audit_rows),
        store=store,
        datasets=[data],
        sums=sums,
        values=sums or [None],
    )


def test_a_loss_without_reference_reads_audits_and_records_nothing(
    data: TokenizedDataset, tmp_path: Path
) -> None:
    model, options = ModelConfig(name_or_path="not there"), ReferenceConfig(cache_dir=str(tmp_path / "none"))
    use = open_reference(model, options, [data], needed=False, per_token=True, command="")
    assert (use.store, use.sums, use.values) == (None, [], [None])
    assert not use.audit_apart(model)
    use.record(tmp_path, None)
    assert not (tmp_path / RECORD_FILE).exists()


def test_without_audit_rows_no_model_is_loaded(data: TokenizedDataset, store: ReferenceStore) -> None:
    store.append(rows_of(data, [0, 1, 2, 4]))
    assert not use_of(data, store, audit_rows=0).audit_apart(ModelConfig(name_or_path="not there"))


def test_a_resumed_run_needs_the_rows_it_started_with_unless_it_is_not_audited(
    data: TokenizedDataset, store: ReferenceStore, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    checkpoint = first / "checkpoints" / "step_00000001"
    path = store.append(rows_of(data, [0, 1, 2, 4]))
    use_of(data, store).record(first, None)
    use_of(data, store).record(second, checkpoint)  # a new run that starts from the checkpoint of another
    assert (second / RECORD_FILE).read_text() == (first / RECORD_FILE).read_text()
    path.unlink()
    store.append(rows_of(data, [0, 1, 2, 4], by=1e-9))
    with pytest.raises(UserError, match=str(first)):
        use_of(data, store).record(first, checkpoint)
    before = (first / RECORD_FILE).read_text()
    use_of(data, store, audit_rows=0).record(first, checkpoint)
    assert (first / RECORD_FILE).read_text() == before
