"""Groups of token ids -> the tensors of one micro-batch: padded rows, one for each completion.

A completion that stands in several pairs is one row. Rows are padded on the right; under causal attention no
real token sees the padding, so no attention mask is needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpo.records import PairLogProbs, TokenIds, TokenizedGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBatch:
    """S sequences, T tokens wide, and the B pairs between them.

    >>> # prompt [7, 8] with completions [1] and [2, 3], the first preferred
    >>> # input_ids = [[7, 8, 1, 0], [7, 8, 2, 3]]
    >>> # predicts  = [[0, 1, 0, 0], [0, 1, 1, 0]]   the positions whose output predicts a completion token
    >>> # targets   = [1, 2, 3]      rows = [0, 1, 1]     pairs = [[0, 1]]
    """

    input_ids: Tensor
    """(S, T) int64."""
    predicts: Tensor
    """(S, T) bool: the next token belongs to the completion."""
    targets: Tensor
    """(N,) int64: the completion tokens of all rows, in row order; N = predicts.sum()."""
    rows: Tensor
    """(N,) int64: the row of each target."""
    num_tokens: Tensor
    """(S,) int64: completion tokens of each row."""
    pairs: Tensor
    """(B, 2) int64: rows of the chosen and the rejected completion."""
    num_real_tokens: int
    """Tokens of all rows without padding."""

    def to(self, device: torch.device) -> "RowBatch":
        """The same batch on `device`."""
        tensors = {name: getattr(self, name) for name in self.__slots__ if name != "num_real_tokens"}
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        return RowBatch(**moved, num_real_tokens=self.num_real_tokens)

    def pair_logps(self, logps: Tensor) -> PairLogProbs:
        """Picks the pairs' values out of one value a row.

        Args:
            logps: (S,) summed log-probs in nats.
        """
        chosen, rejected = self.pairs[:, 0], self.pairs[:, 1]
        return PairLogProbs(
            chosen=logps[chosen],
            rejected=logps[rejected],
            chosen_tokens=self.num_tokens[chosen],
            rejected_tokens=self.num_tokens[rejected],
        )


def group_batch(groups: Sequence[TokenizedGroup]) -> RowBatch:
    """One row a completion, the groups one after the other, with their pairs."""
    sequences: list[tuple[TokenIds, TokenIds]] = []
    pairs: list[tuple[int, int]] = []
    for group in groups:
        pairs.extend((len(sequences) + chosen, len(sequences) + rejected) for chosen, rejected in group.pairs)
        sequences.extend((group.prompt, completion) for completion in group.completions)
    return sequence_batch(sequences, pairs)


def sequence_batch(
    sequences: Sequence[tuple[TokenIds, TokenIds]], pairs: Sequence[tuple[int, int]] = ()
) -> RowBatch:
    """Rows of (prompt, completion), each with at least one token.

    Without sequences the batch is one row of two tokens that predicts nothing: ranks that have run out of
    work still call the engine with it.
    """
    if not sequences:
        sequences, counted = [(np.zeros(2, dtype=np.int32), np.zeros(0, dtype=np.int32))], 0
    else:
        counted = sum(len(prompt) + len(completion) for prompt, completion in sequences)
    lengths = [len(prompt) + len(completion) for prompt, completion in sequences]
    input_ids = torch.zeros((len(sequences), max(lengths)), dtype=torch.int64)
    predicts = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, (prompt, completion) in enumerate(sequences):
        input_ids[row, : lengths[row]] = torch.from_numpy(
            np.concatenate([prompt, completion]).astype(np.int64)
        )
        predicts[row, len(prompt) - 1 : lengths[row] - 1] = len(completion) > 0
    num_tokens = torch.tensor([len(completion) for _, completion in sequences])
    return RowBatch(
        input_ids=input_ids,
        predicts=predicts,
        targets=torch.from_numpy(
            np.concatenate([completion for _, completion in sequences]).astype(np.int64)
        ),
        rows=torch.repeat_interleave(torch.arange(len(sequences)), num_tokens),
        num_tokens=num_tokens,
        pairs=torch.tensor(list(pairs), dtype=torch.int64).reshape(-1, 2),
        num_real_tokens=counted,
    )
