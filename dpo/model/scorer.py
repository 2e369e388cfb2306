"""Log-probabilities of completions: the one forward pass that training, precompute and evaluation share.

The trunk runs over trees, the output projection only where a completion token is predicted; log-softmax and
sums are float32 and float64 whatever the compute type.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (the field's name for it)
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo.data.trees import Layout, TreeBatch
from dpo.model.attention import TREE_ATTENTION, TreeAttention, dense_masks
from dpo.model.projection import TokenLogProbs


class SequenceScorer(nn.Module):
    """Wraps a causal language model so that its forward pass returns log-probs of completions.

    One module around everything, because ZeRO-3 gathers a weight only inside a forward pass that its engine
    wraps.
    """

    def __init__(self, model: PreTrainedModel, *, flex: bool = False) -> None:
        """Finds out from the model's class which layouts it may take; `dpo.model.probe` tries them.

        Args:
            model: On any device, not wrapped yet.
            flex: Prefer FlexAttention; for models whose own attention is SDPA.
        """
        super().__init__()
        self.model = model
        self.layouts: list[Layout] = ["rows"]
        parameters = inspect.signature(model.forward).parameters
        if "position_ids" in parameters:  # without, positions come from the order of tokens, or are a slope
            self.layouts.insert(0, "trees")
            takes_ours = model._supports_attention_backend
            if takes_ours and model.config._attn_implementation in ("sdpa", TREE_ATTENTION):
                model.set_attn_implementation(TREE_ATTENTION)
                self.layouts.insert(0, "packed")
                if flex:
                    self.layouts.insert(0, "flex")
        self.layout = self.layouts[0]
        """How batches for this model are to be laid out."""
        self.projection = TokenLogProbs(model.get_output_embeddings(), model.config)
        self.uses_projection = True
        """Whether our projection stands for the model's own; `dpo.model.probe` turns it off where not."""

    def forward(
        self, batch: TreeBatch, *, per_token: bool = False, own_projection: bool | None = None
    ) -> Tensor:
        """Log-probs of each completion given its prompt.

        Args:
            batch: S sequences on the model's device, N completion tokens.
            per_token: Give the tokens' log-probs instead of their sums.
            own_projection: Use the model's full logits instead of our projection; default: as probed.

        Returns:
            (S,) float64 sums in nats, 0 for a sequence without a completion; or (N,) float32, sequence after
            sequence. With gradient where gradients are on.
        """
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
        if batch.layout != "rows":
            inputs["position_ids"] = batch.positions
        if batch.layout == "trees":
            inputs["attention_mask"] = dense_masks(batch, self.model.config, self.compute_dtype())
        elif batch.layout != "rows":
            inputs["attention_mask"] = torch.ones((1, 1, 1, 1), device=batch.input_ids.device)  # as it is
            inputs["tree"] = TreeAttention(batch=batch)
        if own_projection or (own_projection is None and not self.uses_projection):
            logits = self.model(**inputs).logits.flatten(0, 1)[batch.predicts]
            token_logps = -F.cross_entropy(logits.float(), batch.targets, reduction="none")
        else:
            hidden = self.model.base_model(**inputs)[0]
            token_logps = self.projection(hidden.flatten(0, 1)[batch.predicts], batch.targets)
        return token_logps if per_token else sequence_sums(token_logps, batch)

    def compute_dtype(self) -> torch.dtype:
        """Type of the matrix products."""
        kind = self.model.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.model.dtype


def sequence_sums(token_logps: Tensor, batch: TreeBatch) -> Tensor:
    """(S,) float64 sums of each sequence's completion, 0 for one without.

    Args:
        token_logps: (N,) sequence after sequence.
        batch: What was scored.
    """
    sums = torch.zeros(len(batch.num_tokens), dtype=torch.float64, device=token_logps.device)
    return sums.index_add(0, batch.sequences, token_logps.double())
