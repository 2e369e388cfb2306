"""Random numbers of sampling: functions of seed, prompt, sample, step and token, made on the model's device.

The generator is SplitMix64 (Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number Generators"),
which is counter-based: its n-th output is a hash of key + n * GAMMA. Integer arithmetic gives the same
numbers on every device, in any order, and nothing waits for the host.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


GAMMA = _signed(0x9E3779B97F4A7C15)
MULTIPLIER_1, MULTIPLIER_2 = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)
AT_ONCE = {"cpu": 2**16}
"""Numbers that are computed at once, by device: those of a CPU stay in its cache."""
AT_ONCE_ELSEWHERE = 2**22


def stream_key(seed: int, prompt: int, sample: int) -> int:
    """Key of the random stream of one sample of a prompt, a signed 64-bit integer.

    Args:
        seed: At least 0.
        prompt: Index of the prompt.
        sample: Index among the samples of that prompt.
    """
    return _signed(int(np.random.SeedSequence([seed, prompt, sample]).generate_state(1, np.uint64)[0]))


def random_bits(keys: Tensor, start: int, number: int) -> Tensor:
    """(S, number) int64: outputs start, start + 1, ... of the generators with these keys, (S,) int64."""
    counters = torch.arange(start + 1, start + 1 + number, dtype=torch.int64, device=keys.device)
    bits = keys[:, None] + counters * GAMMA  # wraps around, as all of this does
    bits.bitwise_xor_(_shifted(bits, 30)).mul_(MULTIPLIER_1)
    bits.bitwise_xor_(_shifted(bits, 27)).mul_(MULTIPLIER_2)
    return bits.bitwise_xor_(_shifted(bits, 31))


def _shifted(bits: Tensor, places: int) -> Tensor:
    """Shifts to the right, filling with zeros: torch's own shift repeats the sign."""
    return (bits >> places).bitwise_and_(2 ** (64 - places) - 1)


def exponentials(keys: Tensor, start: int, number: int) -> Tensor:
    """(S, number) float32 draws from the exponential distribution of mean 1, as in `random_bits`.

    The uniform numbers are odd multiples of 2^-54, so that small draws, which decide what is sampled, keep
    float32's relative precision, and none is 0.
    """
    odd = _shifted(random_bits(keys, start, number), 11).mul_(2).add_(1)
    return odd.to(torch.float32).mul_(-(2.0**-54)).log1p_().neg_()


class ExponentialRace(LogitsProcessor):
    """Makes greedy decoding an exact sampler: argmax(p / e) ~ p, for independent exponential e of mean 1.

    The noise of a row depends only on its key, the number of tokens it has drawn, and the token.
    """

    def __init__(self, keys: Sequence[int], temperature: float, device: torch.device) -> None:
        self._keys = torch.tensor(keys, dtype=torch.int64, device=device)
        self._temperature = temperature
        self._step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(S, V) probabilities divided by noise, float32."""
        probabilities = (scores.float() / self._temperature).softmax(-1)
        vocabulary = scores.shape[1]
        at_once = max(1, AT_ONCE.get(scores.device.type, AT_ONCE_ELSEWHERE) // vocabulary)
        pairs = zip(probabilities.split(at_once), self._keys.split(at_once), strict=True)
        for part, keys in pairs:
            part.div_(exponentials(keys, self._step * vocabulary, vocabulary))
        self._step += 1
        return probabilities
