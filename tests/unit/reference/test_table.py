"""The join: every key is found at its place, and of several copies of a row the first one counts."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from unit.reference.samples import TokenValues, Values, keys, padded, raw, rows, token_rows, values_of

from dpo.errors import UserError
from dpo.reference import table as table_module
from dpo.reference.table import TOLERANCE, ReferenceRows, build_table, index_keys, tolerance


def found(known: Sequence[bytes], wanted: Sequence[bytes]) -> list[bytes | None]:
    """What the index of `known` returns for each of `wanted`: the key at that place, or None."""
    index, _ = index_keys(keys(*known))
    stored = raw(index.keys)
    return [stored[place] if place >= 0 else None for place in index.find(keys(*wanted))]


HALVES = st.sampled_from([bytes(8), b"\0" * 7 + b"\1", b"\1" + bytes(7), b"\xff" * 8, b"abcdefgh"])
KEYS = st.one_of(st.binary(min_size=16, max_size=16), st.builds(bytes.__add__, HALVES, HALVES))


@given(st.lists(KEYS, max_size=40), st.lists(KEYS, max_size=40))
@example([b"a" * 8 + b"c" * 8, b"a" * 8 + b"a" * 8, b"b" * 16, b"a" * 8 + b"b" * 8], [b"a" * 8 + b"d" * 8])
def test_the_index_is_a_dictionary_of_the_first_occurrences(known: list[bytes], wanted: list[bytes]) -> None:
    first_of: dict[bytes, int] = {}
    for number, key in enumerate(known):
        first_of.setdefault(key, number)
    index, first = index_keys(keys(*known))
    assert len(index) == len(first_of)
    assert dict(zip(raw(index.keys), first.tolist(), strict=True)) == first_of
    places = index.find(keys(*wanted, *known))
    assert [int(first[p]) if p >= 0 else None for p in places] == [first_of.get(k) for k in wanted + known]


def test_find_returns_minus_one_for_absent_keys() -> None:
    assert found([b"b", b"d"], [b"a", b"b", b"c", b"d", b"e"]) == [
        None,
        *raw(keys(b"b")),
        None,
        *raw(keys(b"d")),
        None,
    ]


def test_an_empty_index_has_no_key_and_an_empty_search_no_result() -> None:
    assert found([], [b"a", b"b"]) == [None, None]
    assert found([b"a"], []) == []
    assert index_keys(keys())[1].tolist() == []


def test_keys_with_the_same_first_half_are_told_apart() -> None:
    same = [b"12345678" + bytes([number]) * 8 for number in (9, 3, 7, 3, 1, 9)]
    index, first = index_keys(keys(*same, b"1234567"))
    assert len(index) == 5
    assert sorted(first.tolist()) == [0, 1, 2, 4, 6]
    absent = [b"12345678" + bytes([number]) * 8 for number in (0, 2, 8, 255)]
    assert found(same, [*same, *absent]) == [*same, None, None, None, None]


def test_keys_with_the_same_first_half_at_the_end_of_the_index_are_told_apart() -> None:
    last = [b"\xff" * 8 + bytes([number]) * 8 for number in range(5)]
    assert found([b"a", *last], [*last, b"\xff" * 8 + b"\5" * 8]) == [*last, None]


def test_keys_that_end_in_zero_bytes_are_told_apart() -> None:
    known = [b"", b"a", b"a\0b", b"\0\0a"]
    wanted = [b"a", b"a\0\0b", b"", b"\0a", b"\0\0a"]
    a, empty, late = raw(keys(b"a", b"", b"\0\0a"))
    assert found(known, wanted) == [a, None, empty, None, late]


def test_looking_up_in_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    known = [rng.bytes(16) for _ in range(20)]
    wanted = [known[i] if i % 3 else rng.bytes(16) for i in rng.integers(0, 20, 17)]
    index, _ = index_keys(keys(*known))
    whole = index.find(keys(*wanted)).tolist()
    assert -1 in whole
    assert len(set(whole)) > 5
    for block in (1, 3, 16, 17, 18):
        monkeypatch.setattr(table_module, "FIND_BLOCK", block)
        assert index.find(keys(*wanted)).tolist() == whole


def test_the_tolerance_grows_with_the_square_root_of_the_length() -> None:
    assert TOLERANCE == {"float32": 2e-5, "bfloat16": 0.25}
    lengths = np.array([1, 4, 100], dtype=np.int32)
    assert tolerance("float32", lengths) == pytest.approx([2e-5, 4e-5, 2e-4])
    assert tolerance("bfloat16", lengths) == pytest.approx([0.25, 0.5, 2.5])


def joined(*parts: Values) -> ReferenceRows:
    return ReferenceRows.joined([rows(part) for part in parts])


@pytest.mark.parametrize(
    ("dtype", "num_tokens", "difference"),
    [("float32", 1, 1.9e-5), ("float32", 100, 1.9e-4), ("bfloat16", 1, 0.24), ("bfloat16", 100, 2.4)],
)
@pytest.mark.parametrize("sign", [-1, 1])
def test_copies_that_agree_count_once_and_the_first_is_kept(
    dtype: str, num_tokens: int, difference: float, sign: int
) -> None:
    first = {b"b": (-20.0, num_tokens), b"a": (-1.0, 1)}
    again = {b"c": (-3.0, 2), b"b": (-20.0 + sign * difference, num_tokens)}
    assert values_of(build_table(joined(first, again), dtype, "")) == padded(again | first)
    assert values_of(build_table(joined(again, first), dtype, "")) == padded(first | again)


@pytest.mark.parametrize(
    ("dtype", "num_tokens", "difference"),
    [("float32", 1, 2.1e-5), ("float32", 100, 2.1e-4), ("bfloat16", 1, 0.26), ("bfloat16", 100, 2.6)],
)
@pytest.mark.parametrize("sign", [-1, 1])
def test_copies_that_differ_by_more_are_refused_with_both_values(
    dtype: str, num_tokens: int, difference: float, sign: int
) -> None:
    first = {b"a": (-1.0, 1), b"b": (-20.0, num_tokens)}
    other = -20.0 + sign * difference
    message = rf"^cache/x: 1 rows .*-20\.000000 and {other:.6f} nats"
    with pytest.raises(UserError, match=message):
        build_table(joined(first, {b"b": (other, num_tokens)}), dtype, "cache/x")


def test_copies_of_different_length_are_refused_even_with_one_value() -> None:
    with pytest.raises(UserError, match=r"^cache/x: 1 rows "):
        build_table(joined({b"a": (-2.0, 10)}, {b"a": (-2.0, 11)}), "float32", "cache/x")


def test_one_bad_copy_among_many_is_enough_and_all_are_counted() -> None:
    good = {bytes([i]): (-float(i), 4) for i in range(1, 50)}
    bad = {bytes([i]): (-float(i) - (i in (7, 30)), 4) for i in range(1, 50)}
    with pytest.raises(UserError, match=r"^cache/x: 2 rows .* -7\.0"):
        build_table(joined(good, good, bad), "float32", "cache/x")


def test_rows_of_every_part_are_joined_in_order() -> None:
    first, second = {b"b": (-1.0, 3), b"a": (-2.0, 1)}, {b"c": (-3.0, 2)}
    whole = joined(first, {}, second)
    assert raw(whole.keys) == raw(keys(b"b", b"a", b"c"))
    assert (whole.logps.tolist(), whole.num_tokens.tolist()) == ([-1.0, -2.0, -3.0], [3, 1, 2])
    assert len(ReferenceRows.joined([])) == 0
    assert len(build_table(ReferenceRows.joined([]), "float32", "")) == 0


def test_tokens_are_joined_if_every_part_has_them_and_stay_with_their_rows() -> None:
    first: TokenValues = {b"a": [-1.0, -2.0], b"b": [-3.0]}
    second: TokenValues = {b"c": [-4.0, -5.0, -6.0]}
    whole = ReferenceRows.joined([token_rows(first), token_rows(second)])
    assert whole.token_logps is not None
    assert whole.token_logps.tolist() == [-1, -2, -3, -4, -5, -6]
    picked = whole.where(np.array([True, False, True]))
    assert picked.token_logps is not None
    assert picked.token_logps.tolist() == [-1, -2, -4, -5, -6]
    assert (raw(picked.keys), picked.logps.tolist()) == (raw(keys(b"a", b"c")), [-3.0, -15.0])
    assert ReferenceRows.joined([token_rows(first), rows({b"c": (-1.0, 1)})]).token_logps is None
