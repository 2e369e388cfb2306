"""Random numbers of sampling: functions of seed, prompt, sample, step and token, on any device."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from dpo.random_bits import at_once, random_bits, shifted


def exponentials(keys: Tensor, start: int, number: int) -> Tensor:
    """(S, number) float32 draws from the exponential distribution of mean 1, as in `random_bits`.

    The uniform numbers are odd multiples of 2^-54, so that small draws, which decide what is sampled, keep
    float32's relative precision, and none is 0.
    """
    odd = shifted(random_bits(keys, start, number), 11).mul_(2).add_(1)
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
        rows = max(1, at_once(scores.device) // vocabulary)
        pairs = zip(probabilities.split(rows), self._keys.split(rows), strict=True)
        for part, keys in pairs:
            part.div_(exponentials(keys, self._step * vocabulary, vocabulary))
        self._step += 1
        return probabilities
