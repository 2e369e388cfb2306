"""One family of each kind, and those that people train most: exact in the layout that is found, or refused.

Tiny random models, as `python -m benchmarks.families` makes them of every causal class.
"""

from copy import deepcopy

import numpy as np
import numpy.typing as npt
import pytest
import torch
from families import naive_logps, random_ids
from torch import Tensor, nn
from transformers import PreTrainedModel

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


@pytest.fixture(scope="module")
def hybrid() -> PreTrainedModel:
    """An LFM2 that has learned to read the two tokens before it: in attention, or in its convolutions."""
    model = tiny_model("lfm2", tiny_config("lfm2", hidden_size=64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    rng = np.random.default_rng(0)
    for _ in range(60):
        ids = torch.from_numpy(chains(rng, 16, 48))
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return ready(model)


def chains(rng: np.random.Generator, number: int, length: int) -> npt.NDArray[np.int64]:
    """Sequences in which a token mostly follows from the two before it."""
    follows = np.random.default_rng(1).integers(3, 40, (40, 40))
    ids = rng.integers(3, 40, (number, length))
    for place in range(2, length):
        as_learned = rng.random(number) < 0.9
        ids[:, place] = np.where(as_learned, follows[ids[:, place - 1], ids[:, place - 2]], ids[:, place])
    return ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("completions", [1, 2], ids=["documents of sft", "pairs"])
def test_a_trained_hybrid_is_computed_as_plain_sequences_in_any_batch(
    hybrid: PreTrainedModel, dtype: torch.dtype, completions: int
) -> None:
    rng = np.random.default_rng(2)
    rows = chains(rng, 4 * completions, 60).astype(np.int32)
    start = 1 if completions == 1 else 12  # of the completions; text has a prompt of one token
    trees: list[Tree] = [
        (rows[n * completions, :start], [row[start:] for row in rows[n * completions :][:completions]])
        for n in range(4)
    ]
    scorer = make_scorer(deepcopy(hybrid).to(dtype), ModelConfig(name_or_path=""))
    with torch.no_grad():
        plain = naive_logps(scorer.model, trees)
        leaked = scorer(tree_batch(trees, "packed"), per_token=True) - plain
        assert float(leaked.abs().max()) > 0.5, "else this shows nothing"
        assert settle_layout(scorer, trees_of(trees[0], trees[1]), dtype).layout == "rows"
        exact = scorer(tree_batch(trees, scorer.layout), per_token=True) - plain
    assert float(exact.abs().max()) < (1e-4 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("family", NOT_CAUSAL)
def test_what_sees_later_tokens_is_refused(family: str) -> None:
    with pytest.raises(UserError, match="cannot be used: it is not causal"):
        found(scorer_of(family), torch.float32)
