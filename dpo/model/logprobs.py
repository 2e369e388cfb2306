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

    def forward(self, batch: RowBatch) -> Tensor:
        """Summed log-probs of each row's completion given its prompt.

        Args:
            batch: S rows on the model's device.

        Returns:
            (S,) float64, in nats, with gradient where gradients are on; 0 for a row without a completion.
        """
        logps = self.token_logps(batch)
        sums = torch.zeros(len(batch.num_tokens), dtype=torch.float64, device=logps.device)
        return sums.index_add(0, batch.rows, logps.double())

    def token_logps(self, batch: RowBatch) -> Tensor:
        """(N,) float32 log-probs of every completion token, in row order."""
        if self._selects:
            output = self.model(input_ids=batch.input_ids, use_cache=False, logits_to_keep=batch.predicts)
            logits = output.logits.flatten(0, -2)
        else:
            logits = self.model(input_ids=batch.input_ids, use_cache=False).logits[batch.predicts]
        return -F.cross_entropy(logits.float(), batch.targets, reduction="none")
