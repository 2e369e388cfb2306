"""The random bits: known outputs, the same however they are cut, and other ones for every key."""

import numpy as np
import torch

from dpo.random_bits import random_bits, stream_key

SPLITMIX64_OF_1234567 = [
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
    4593380528125082431,
    16408922859458223821,
]
"""First outputs with seed 1234567, as implementations of SplitMix64 list them."""


OF_A_WEIGHT = 5144412895507905081
"""The key of lm_head.weight with seed 7: a run that starts again must draw the same."""


def keys(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


def test_the_generator_is_splitmix64() -> None:
    drawn = random_bits(keys(1234567), 0, 5)[0].tolist()
    assert [number % 2**64 for number in drawn] == SPLITMIX64_OF_1234567


def test_a_number_depends_only_on_its_key_and_its_place() -> None:
    whole = random_bits(keys(3, -8, 2**62), 0, 90)
    assert torch.equal(random_bits(keys(-8), 40, 50), whole[1:2, 40:])


def test_keys_differ_in_seed_prompt_and_sample() -> None:
    found = {stream_key(*indices) for indices in np.ndindex(4, 5, 6)}
    assert len(found) == 4 * 5 * 6
    assert all(-(2**63) <= key < 2**63 for key in found)


def test_keys_differ_in_the_names_of_weights() -> None:
    places = [("a",), ("b",), ("a.b",), ("a", "b"), ("", "a"), (1, "a"), ("a", 1)]
    assert len({stream_key(seed, *place) for seed in range(3) for place in places}) == 3 * len(places)
    assert stream_key(7, "lm_head.weight") == OF_A_WEIGHT
