"""Floating-point operations that no way of computing the log-probabilities can do without."""

from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
from torch import nn
from transformers import PreTrainedModel

from dpo.data.dataset import TokenizedDataset

Float64s = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Multiply-adds of a model's forward pass."""

    token: int
    """For a token in the blocks' matrices: the weights that it meets."""
    seen: int
    """For a token that another sees, in all layers: products of queries with keys and of scores with
    values."""
    prediction: int
    """For a predicted token in the output layer."""


def work_of(model: PreTrainedModel) -> Work:
    """Reads it off the weights of a model, which may be on the meta device.

    Of a mixture of experts a token meets as many as the router picks.
    """
    config = model.config.get_text_config()
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    share = getattr(config, "num_experts_per_tok", 1) / experts if experts else 1.0
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    matrices = [p for p in chain.from_iterable(block.parameters() for block in blocks) if p.dim() > 1]
    token = sum(round(p.numel() * (share if p.dim() == 3 else 1.0)) for p in matrices)
    heads = int(config.num_attention_heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    head = model.get_output_embeddings()
    return Work(token=token, seen=2 * len(blocks) * heads * width, prediction=head.weight.numel())


def forward_flops(data: TokenizedDataset, work: Work) -> Float64s:
    """(G,) operations of the forward pass of each group: its prompt once, each completion once, attention
    between tokens that see each other, the output layer where a completion token is predicted.
    """
    completion = data.completion_tokens.astype(np.float64)
    completions = np.add.reduceat(completion, data.first_sequence)
    prompt = data.tree_tokens - completions
    squares = np.add.reduceat(completion * (completion + 1) / 2, data.first_sequence)
    seen = prompt * (prompt + 1) / 2 + prompt * completions + squares
    flops: Float64s = 2.0 * (work.token * data.tree_tokens + work.seen * seen + work.prediction * completions)
    return flops
