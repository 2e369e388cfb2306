"""One family of each kind, and those that people train most: exact in the layout that is found, or refused.

Tiny random models, as `python -m benchmarks.families` makes them of every causal class.
"""

import numpy as np
import pytest
import torch
from families import naive_logps, random_ids
from torch import Tensor, nn

from benchmarks.tiny_models import VOCABULARY, tiny_config, tiny_model
from dpo.config import ModelConfig
from dpo.data.trees import Tree, tree_batch
from dpo.engine.scoring import make_scorer, settle_layout
from dpo.errors import UserError
from dpo.model.authors import remove_noise
from dpo.model.load import ready
from dpo.model.probe_trees import trees_of
from dpo.model.scorer import SequenceScorer

TRAINED_MOST = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "phi3", "olmo2", "gpt2", "smollm3"), "packed"),
    **dict.fromkeys(("gemma3_text", "mixtral"), "packed"),
}
KINDS = {
    "lfm2": "rows",  # short convolutions
    "lfm2_moe": "rows",
    "minimax": "rows",  # linear attention
    "granitemoehybrid": "rows",  # state-space layers
    "recurrent_gemma": "rows",
    "zaya": "rows",
    "mamba": "rows",  # no attention
    "bloom": "rows",  # ALiBi
    "gemma4_text": "packed",  # heads differ by layer
    "gpt_oss": "trees",  # sinks
    "deepseek_v3": "packed",  # latent attention, routers in float32
    "phimoe": "packed",  # a threshold that is called noise
    "deepseek_v32": "rows, one at a time",  # selects keys, which ties of random models decide by rounding
}
NOT_CAUSAL = ("bert", "xlnet", "cpmant")
RNG = np.random.default_rng(0)
TREES: list[Tree] = [
    (RNG.integers(3, VOCABULARY, 9).astype(np.int32), [random_ids(RNG, 20), random_ids(RNG, 6)]),
    (RNG.integers(3, VOCABULARY, 4).astype(np.int32), [random_ids(RNG, 3), random_ids(RNG, 7)]),
]


def scorer_of(family: str, dtype: torch.dtype = torch.float32) -> SequenceScorer:
    config = tiny_config(family)
    remove_noise(config)
    return make_scorer(ready(tiny_model(family, config)).to(dtype), ModelConfig(name_or_path=""))


def found(scorer: SequenceScorer, dtype: torch.dtype) -> str:
    probed = settle_layout(scorer, trees_of(TREES[0], TREES[1]), dtype)
    return probed.layout + (", one at a time" if probed.one_at_a_time else "")


@pytest.mark.parametrize("family", TRAINED_MOST | KINDS)
def test_log_probs_and_gradients_are_those_of_plain_sequences(family: str) -> None:
    scorer = scorer_of(family)
    assert found(scorer, torch.float32) == (TRAINED_MOST | KINDS)[family]
    plain = tiny_model(family)
    expected = naive_logps(plain, TREES)
    weights = torch.linspace(-1, 1, len(expected))
    ours = scorer(tree_batch(TREES, scorer.layout), per_token=True)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    (ours * weights).sum().backward()
    (expected * weights).sum().backward()
    gradient, wanted = gradient_of(scorer.model), gradient_of(plain)
    assert float((gradient - wanted).norm() / wanted.norm()) < 1e-4


def gradient_of(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("family", [name for name, layout in KINDS.items() if layout == "rows"])
def test_state_leaks_no_more_in_bfloat16_than_in_float32(family: str) -> None:
    assert found(scorer_of(family, torch.bfloat16), torch.bfloat16) == KINDS[family]


def test_documents_in_a_row_are_probed_as_sft_packs_them() -> None:
    document: Tree = (random_ids(RNG, 1), [random_ids(RNG, 30)])
    scorer = scorer_of("lfm2")
    probed = settle_layout(scorer, trees_of(document), torch.float32)
    assert probed.layout in ("trees", "rows")  # one document in a row


@pytest.mark.parametrize("family", NOT_CAUSAL)
def test_what_sees_later_tokens_is_refused(family: str) -> None:
    with pytest.raises(UserError, match="cannot be used: it is not causal"):
        found(scorer_of(family), torch.float32)
