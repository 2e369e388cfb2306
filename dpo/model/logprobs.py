"""Log-probabilities of completions: the one forward pass that training, precompute and evaluation share.

Output projection and log-softmax run only where a completion token is predicted; log-softmax and sums are
float32 and float64 whatever the compute type.
"""

import inspect

import torch
import torch.nn.functional as F  # noqa: N812  (the field's name for it)
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo.data.batches import RowBatch


class SequenceScorer(nn.Module):
    """Wraps a causal language model so that its forward pass returns log-probs of completions.

    One module around everything, because ZeRO-3 gathers a weight only inside a forward pass that its engine
    wraps.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self._selects = "logits_to_keep" in inspect.signature(model.forward).parameters

    def forward(self, batch: RowBatch, *, per_token: bool = False) -> Tensor:
        """Log-probs of each row's completion given its prompt.

        Args:
            batch: S rows on the model's device, N completion tokens.
            per_token: Give the tokens' log-probs instead of their sums.

        Returns:
            (S,) float64 sums in nats, 0 for a row without a completion; or (N,) float32 in row order. With
            gradient where gradients are on.
        """
        if self._selects:
            output = self.model(input_ids=batch.input_ids, use_cache=False, logits_to_keep=batch.predicts)
            logits = output.logits.flatten(0, -2)
        else:
            logits = self.model(input_ids=batch.input_ids, use_cache=False).logits[batch.predicts]
        token_logps = -F.cross_entropy(logits.float(), batch.targets, reduction="none")
        return token_logps if per_token else row_sums(token_logps, batch)


def row_sums(token_logps: Tensor, batch: RowBatch) -> Tensor:
    """(S,) float64 sums of each row's completion, 0 for a row without one.

    Args:
        token_logps: (N,) in row order.
        batch: The rows.
    """
    sums = torch.zeros(len(batch.num_tokens), dtype=torch.float64, device=token_logps.device)
    return sums.index_add(0, batch.rows, token_logps.double())
