"""Sequence keys: equal for equal content, different for anything else."""

import hashlib
import struct

import numpy as np
import pytest

from dpo.data.records import KEY_BYTES, TokenIds, sequence_key


def ids(*values: int) -> TokenIds:
    return np.array(values, dtype=np.int32)


def test_the_key_is_blake2b_over_version_lengths_and_little_endian_ids() -> None:
    # Caches on disk hold these bytes: a change of them needs a new version and a change of the store.
    content = struct.pack("<B", 1) + struct.pack("<qq", 2, 1) + struct.pack("<iii", 7, 8, 9)
    assert sequence_key(ids(7, 8), ids(9)) == hashlib.blake2b(content, digest_size=16).digest()


def test_a_key_has_16_bytes_whatever_the_length() -> None:
    assert len(sequence_key(ids(1), ids(2))) == KEY_BYTES == 16
    assert len(sequence_key(ids(*range(5000)), ids(*range(5000)))) == 16


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        (ids(1, 2), ids(3)),  # the boundary
        (ids(1), ids(3, 2)),  # the order
        (ids(1), ids(2, 3, 0)),  # a zero at the end
        (ids(0, 1), ids(2, 3)),  # a zero at the start
        (ids(1), ids(2, 259)),  # 259 = 3 + 256: the second byte
        (ids(2), ids(2, 3)),
    ],
)
def test_other_content_has_another_key(prompt: TokenIds, completion: TokenIds) -> None:
    assert sequence_key(prompt, completion) != sequence_key(ids(1), ids(2, 3))


def test_the_memory_layout_of_the_ids_does_not_matter() -> None:
    expected = sequence_key(ids(1, 2), ids(3, 4))
    spread = np.array([1, 0, 2, 0, 3, 0, 4, 0], dtype=np.int32)[::2]
    assert sequence_key(spread[:2], spread[2:]) == expected
    big_endian = np.array([3, 4], dtype=">i4")
    assert sequence_key(np.array([1, 2], dtype=np.int64), big_endian) == expected
