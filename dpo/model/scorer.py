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
from dpo.model.attention import (
    REPLACED,
    TREE_ATTENTION,
    TreeAttention,
    attend,
    dense_masks,
    restore_attention,
    windows_of,
    written,
)
from dpo.model.compiled import eagerly
from dpo.model.projection import TokenLogProbs


class SequenceScorer(nn.Module):
    """Wraps a causal language model so that its forward pass returns log-probs of completions.

    Everything is in one module, because ZeRO-3 gathers weights only inside the forward pass of the module
    that its engine wraps.
    """

    def __init__(self, model: PreTrainedModel, *, flex: bool = False) -> None:
        """Determines from the model's class which layouts are possible; `dpo.model.probe` tests them.

        Args:
            model: The bare model, on any device. In packed layouts its attention is replaced.
            flex: Prefer FlexAttention; for models whose own attention is SDPA.
        """
        super().__init__()
        self.model = model
        restore_attention(model)
        self.own_attention: str = model.config._attn_implementation
        self.packed_attention = TREE_ATTENTION
        """The implementation in packed layouts; in all others the model has its own."""
        self.layouts: list[Layout] = ["rows"]
        """Possible layouts, the fastest first."""
        parameters = inspect.signature(model.forward).parameters
        self._skips_logits = "logits_to_keep" in parameters
        if "position_ids" in parameters:  # otherwise positions follow the tokens' order, or are ALiBi's
            self.layouts.insert(0, "trees")
            if model._supports_attention_backend and self.own_attention == REPLACED:
                self.layouts.insert(0, "packed")
                if flex:  # on a GPU, whose kernel for pieces has no float32
                    self.layouts[:0] = ["flex", "varlen"] if model.dtype == torch.bfloat16 else ["flex"]
        self.layout = self.layouts[0]
        """The layout for batches of this model; `dpo.model.probe` may change it."""
        self.windows = windows_of(model.config)
        """How far back its layers look; for `TreeBatch.to`."""
        self.projection = projection_of(model)
        """Our output projection; None where the model's trunk or output layer is not known."""
        self.uses_projection = self.projection is not None
        """Whether our output projection replaces the model's own; `dpo.model.probe` may change it."""
        self.one_at_a_time = False
        """Whether each row of the layout `rows` is a pass of its own, without padding."""

    def forward(
        self,
        batch: TreeBatch,
        *,
        per_token: bool = False,
        aligned: bool = False,
        own_projection: bool | None = None,
        states: bool = False,
        one_at_a_time: bool | None = None,
        as_written: bool = False,
    ) -> Tensor:
        """Log-probs of each completion given its prompt.

        Args:
            batch: S sequences on the model's device, N completion tokens.
            per_token: Return the log-probs of tokens instead of their sums.
            aligned: Also give how likely each token is beside a sample of the model: its log-prob less the
                logarithm of the sum of all tokens' squared probabilities, without gradient.
            own_projection: Use the model's full logits instead of our projection; default: as probed.
            states: Return what the output layer reads to predict the tokens, instead of log-probs.
            one_at_a_time: A pass per row, in the layout `rows`; default: as probed.
            as_written: The model as its authors wrote it: its own attention, its full logits, in evaluation
                mode, and nothing given but the token ids of one sequence.

        Returns:
            (S,) float64 sums in nats, 0 for a sequence without a completion; or with `per_token` (N,)
            float32, one sequence after the other; with `aligned` a second column, (S, 2) or (N, 2); or with
            `states` the (N, D) hidden states of the last layer that predict the completion tokens. With
            gradient where gradients are enabled.
        """
        if as_written:
            token_logps = self._as_written(batch)
            return token_logps if per_token else sequence_sums(token_logps, batch)
        own = not self.uses_projection if own_projection is None else own_projection
        own = own and not states
        if not own and self.projection is None:
            raise ValueError(f"{type(self.model).__name__} has no trunk and output layer that are known")
        packed = batch.layout in ("flex", "varlen", "packed")
        attend(self.model, self.packed_attention if packed else self.own_attention)
        apart = self.one_at_a_time if one_at_a_time is None else one_at_a_time
        found = self._states_apart(batch, own=own) if apart else self._states(self._inputs(batch), own=own)
        found = rows_of(found, batch.predicts)
        if states:
            return found
        if own or self.projection is None:
            token_logps = -F.cross_entropy(found.float(), batch.targets, reduction="none")
            if aligned:
                squares = (2 * found.detach().float().log_softmax(-1)).logsumexp(-1)
                token_logps = torch.stack([token_logps, squares], dim=1)
        else:
            token_logps = self.projection(found, batch.targets, squares=aligned)
        if aligned:
            logps, squares = token_logps.unbind(1)
            token_logps = torch.stack([logps, logps.detach() - squares], dim=1)
        return token_logps if per_token else sequence_sums(token_logps, batch)

    def _as_written(self, batch: TreeBatch) -> Tensor:
        """(N,) log-probs of a batch of one sequence."""
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
        completion = len(batch.targets) + 1
        if self._skips_logits:  # those of the prompt
            inputs["logits_to_keep"] = completion
        with written(self.model), eagerly():
            logits = self.model(**inputs).logits
        if logits.shape[1] != (completion if self._skips_logits else batch.input_ids.shape[1]):
            raise ValueError(f"{logits.shape[1]} logits for {batch.input_ids.shape[1]} tokens")
        predicting = logits[0, -completion:-1].float()
        return -F.cross_entropy(predicting, batch.targets, reduction="none")

    def _inputs(self, batch: TreeBatch) -> dict[str, Any]:
        """What the model is called with."""
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
        if batch.layout != "rows":
            inputs["position_ids"] = batch.positions
        if batch.layout == "trees":
            inputs["attention_mask"] = dense_masks(batch, self.model.config, self.model.dtype)
        elif batch.layout != "rows":
            inputs["attention_mask"] = torch.ones((1, 1, 1, 1), device=batch.input_ids.device)  # unused
            inputs["tree"] = TreeAttention(batch=batch)
        return inputs

    def _states(self, inputs: dict[str, Any], *, own: bool) -> Tensor:
        """(R, T, V) logits of the model, or (R, T, D) hidden states for our projection."""
        if own:
            logits: Tensor = self.model(**inputs).logits
            return logits
        trunk = trunk_of(self.model)
        assert trunk is not None
        hidden: Tensor = trunk(**inputs)[0]
        return hidden

    def _states_apart(self, batch: TreeBatch, *, own: bool) -> Tensor:
        """As `_states`, of the layout `rows`, with a pass per row that has no padding."""
        width = batch.input_ids.shape[1]
        rows = []
        for ids, segments in zip(batch.input_ids, batch.trees, strict=True):
            alone = {"input_ids": ids[None, : sum(segments)], "use_cache": False}
            states = self._states(alone, own=own)
            rows.append(F.pad(states, (0, 0, 0, width - states.shape[1])))
        return torch.cat(rows)


def trunk_of(model: PreTrainedModel) -> nn.Module | None:
    """The model without its output layer, or None where its class does not say what that is."""
    for find in ("base_model", "get_decoder"):
        found = getattr(model, find, None)
        found = found() if find == "get_decoder" and found is not None else found
        if isinstance(found, nn.Module) and found is not model:
            return found
    return None


def projection_of(model: PreTrainedModel) -> TokenLogProbs | None:
    """Our output projection for a model, or None where its output layer is not a matrix behind its trunk."""
    head = model.get_output_embeddings()
    if trunk_of(model) is None or not isinstance(getattr(head, "weight", None), Tensor):
        return None
    return TokenLogProbs(head, model.config)


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
        token_logps: (N,) or (N, K) log-probs of completion tokens in nats, one sequence after the other.
        batch: The scored batch of S sequences.

    Returns:
        (S,) or (S, K) float64 sums, 0 for a sequence without a completion.
    """
    shape = (len(batch.num_tokens), *token_logps.shape[1:])
    sums = torch.zeros(shape, dtype=torch.float64, device=token_logps.device)
    return sums.index_add(0, batch.sequences, token_logps.double())
