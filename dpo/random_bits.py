"""Random bits as functions of a key and a place, the same on every device and however they are cut.

The generator is SplitMix64 (Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number Generators"),
which is counter-based: its n-th output is a hash of key + n * GAMMA. Integer arithmetic gives the same
numbers on every device, in any order, and nothing waits for the host.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


GAMMA = _signed(0x9E3779B97F4A7C15)
MULTIPLIER_1, MULTIPLIER_2 = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)
AT_ONCE = {"cpu": 2**16}
"""Numbers that are computed at once, by device: those of a CPU stay in its cache."""
AT_ONCE_ELSEWHERE = 2**22


def stream_key(seed: int, *place: int | str) -> int:
    """Key of a random stream, a signed 64-bit integer.

    Args:
        seed: At least 0.
        place: What the stream is for, such as the index of a prompt and of its sample, or a weight's name.
    """
    parts = [_number(part) if isinstance(part, str) else part for part in place]
    return _signed(int(np.random.SeedSequence([seed, *parts]).generate_state(1, np.uint64)[0]))


def _number(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])


def random_bits(keys: Tensor, start: int, number: int) -> Tensor:
    """(S, number) int64: outputs start, start + 1, ... of the generators with these keys, (S,) int64."""
    counters = torch.arange(start + 1, start + 1 + number, dtype=torch.int64, device=keys.device)
    bits = keys[:, None] + counters * GAMMA  # wraps around, as all of this does
    bits.bitwise_xor_(shifted(bits, 30)).mul_(MULTIPLIER_1)
    bits.bitwise_xor_(shifted(bits, 27)).mul_(MULTIPLIER_2)
    return bits.bitwise_xor_(shifted(bits, 31))


def shifted(bits: Tensor, places: int) -> Tensor:
    """Bits shifted to the right, filled with zeros: torch's own shift repeats the sign."""
    return (bits >> places).bitwise_and_(2 ** (64 - places) - 1)


def at_once(device: torch.device) -> int:
    """How many numbers to compute at once on a device."""
    return AT_ONCE.get(device.type, AT_ONCE_ELSEWHERE)
