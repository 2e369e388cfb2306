"""Log-probabilities of completions: the one forward pass that training, precompute and evaluation share.

The trunk runs over trees, the output projection only where a completion token is predicted. With any
compute dtype, log-softmax is float32 and sums over tokens are float64.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (the field's name for it)
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo.data.trees import Layout, TreeBatch
from dpo.model.attention import TREE_ATTENTION, TreeAttention, dense_masks, windows_of
from dpo.model.projection import TokenLogProbs, product_dtype


class SequenceScorer(nn.Module):
    """Wraps a causal language model so that its forward pass returns log-probs of completions.

    Everything is in one module, because ZeRO-3 gathers weights only inside the forward pass of the module
    that its engine wraps.
    """

    def __init__(self, model: PreTrainedModel, *, flex: bool = False) -> None:
        """Determines from the model's class which layouts are possible; `dpo.model.probe` tests them.

        Args:
            model: The bare model, on any device. Its attention implementation may be replaced.
            flex: Prefer FlexAttention; for models whose own attention is SDPA.
        """
        super().__init__()
        self.model = model
        self.layouts: list[Layout] = ["rows"]
        """Possible layouts, the fastest first."""
        parameters = inspect.signature(model.forward).parameters
        if "position_ids" in parameters:  # otherwise positions follow the tokens' order, or are ALiBi's
            self.layouts.insert(0, "trees")
            replaceable = model._supports_attention_backend
            if replaceable and model.config._attn_implementation in ("sdpa", TREE_ATTENTION):
                model.set_attn_implementation(TREE_ATTENTION)
                self.layouts.insert(0, "packed")
                if flex:
                    self.layouts.insert(0, "flex")
        self.layout = self.layouts[0]
        """The layout for batches of this model; `dpo.model.probe` may change it."""
        self.windows = windows_of(model.config)
        """How far back its layers look; for `TreeBatch.to`."""
        self.projection = TokenLogProbs(model.get_output_embeddings(), model.config)
        self.uses_projection = True
        """Whether our output projection replaces the model's own; `dpo.model.probe` may change it."""

    def forward(
        self,
        batch: TreeBatch,
        *,
        per_token: bool = False,
        own_projection: bool | None = None,
        states: bool = False,
    ) -> Tensor:
        """Log-probs of each completion given its prompt.

        Args:
            batch: S sequences on the model's device, N completion tokens.
            per_token: Return the log-probs of tokens instead of their sums.
            own_projection: Use the model's full logits instead of our projection; default: as probed.
            states: Return what the output layer reads to predict the tokens, instead of log-probs.

        Returns:
            (S,) float64 sums in nats, 0 for a sequence without a completion; or with `per_token` (N,)
            float32, one sequence after the other; or with `states` the (N, D) hidden states of the last
            layer that predict the completion tokens. With gradient where gradients are enabled.
        """
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
        if batch.layout != "rows":
            inputs["position_ids"] = batch.positions
        if batch.layout == "trees":
            inputs["attention_mask"] = dense_masks(batch, self.model.config, self.compute_dtype())
        elif batch.layout != "rows":
            inputs["attention_mask"] = torch.ones((1, 1, 1, 1), device=batch.input_ids.device)  # unused
            inputs["tree"] = TreeAttention(batch=batch)
        if states:
            return rows_of(self.model.base_model(**inputs)[0], batch.predicts)
        if own_projection or (own_projection is None and not self.uses_projection):
            logits = rows_of(self.model(**inputs).logits, batch.predicts)
            token_logps = -F.cross_entropy(logits.float(), batch.targets, reduction="none")
        else:
            hidden = self.model.base_model(**inputs)[0]
            token_logps = self.projection(rows_of(hidden, batch.predicts), batch.targets)
        return token_logps if per_token else sequence_sums(token_logps, batch)

    def compute_dtype(self) -> torch.dtype:
        """The dtype of matrix products, under autocast too."""
        return product_dtype(self.model.device, self.model.dtype)


def rows_of(states: Tensor, positions: Tensor) -> Tensor:
    """(N, D) rows of (R, T, D) states, with a gradient that is the same in every run.

    The state before a completion serves all completions of its prompt. On a CPU the backward pass of indexing
    adds their gradients with atomics, in any order; on a GPU that of index_select does.
    """
    flat = states.flatten(0, 1)
    return flat.index_select(0, positions) if flat.device.type == "cpu" else flat[positions]


def sequence_sums(token_logps: Tensor, batch: TreeBatch) -> Tensor:
    """Sums of token log-probs over each sequence's completion.

    Args:
        token_logps: (N,) log-probs of completion tokens in nats, one sequence after the other.
        batch: The scored batch of S sequences.

    Returns:
        (S,) float64 sums, 0 for a sequence without a completion.
    """
    sums = torch.zeros(len(batch.num_tokens), dtype=torch.float64, device=token_logps.device)
    return sums.index_add(0, batch.sequences, token_logps.double())
