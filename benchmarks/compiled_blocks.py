"""What `model.compile` gains: forward and backward passes with blocks as they are and compiled, in turn.

    python -m benchmarks.compiled_blocks [--layers 2] [--rounds 3]        the numbers of docs/performance.md

Models of GPT-2's width (768) with few blocks, and the whole vocabulary in the output projection, which is not
compiled; float32, trees of a prompt of 64 tokens and four completions of 24, about 1,000 tokens per pass.
Ratios are medians over rounds in which the two alternate.
"""

import argparse
import statistics
import time
from collections.abc import Iterator

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig

from dpo.data.trees import Tree, TreeBatch, tree_batch
from dpo.model.compiled import compile_blocks
from dpo.model.load import ready
from dpo.model.scorer import SequenceScorer

PROMPT, COMPLETIONS, COMPLETION = 64, 4, 24
TREES = 6


def main() -> None:
    """Prints a line for each model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=2, help="blocks of each model")
    parser.add_argument("--rounds", type=int, default=3, help="how often the two alternate")
    given = parser.parse_args()
    for name, config in _configs(given.layers):
        print(f"{name}: {_compared(config, given.rounds)}", flush=True)


def _configs(layers: int) -> Iterator[tuple[str, PreTrainedConfig]]:
    yield "gpt2", GPT2Config(n_layer=layers, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    yield (
        "llama",
        LlamaConfig(
            num_hidden_layers=layers, hidden_size=768, intermediate_size=2048, num_attention_heads=12,
            num_key_value_heads=4, vocab_size=32_000, max_position_embeddings=1024,
        ),
    )  # fmt: skip


def _compared(config: PreTrainedConfig, rounds: int) -> str:
    plain, ours = (_scorer(config) for _ in range(2))
    compile_blocks(ours.model)
    batches = [_batch(seed) for seed in range(3)]
    began = time.perf_counter()
    _pass(ours, batches[0])
    first = time.perf_counter() - began
    for scorer in (plain, ours):
        for batch in batches:
            _pass(scorer, batch)
    ratios = []
    for _ in range(rounds):
        times = []
        for scorer in (plain, ours):
            began = time.perf_counter()
            for batch in batches:
                _pass(scorer, batch)
            times.append(time.perf_counter() - began)
        ratios.append(times[0] / times[1])
    found = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return f"compiled passes are {found} times as fast; the first took {first:.0f} s"


def _scorer(config: PreTrainedConfig) -> SequenceScorer:
    torch.manual_seed(0)
    return SequenceScorer(ready(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")))


def _batch(seed: int) -> TreeBatch:
    rng = np.random.default_rng(seed)

    def ids(length: int) -> np.ndarray:
        return rng.integers(0, 30_000, length).astype(np.int32)

    trees: list[Tree] = [
        (ids(PROMPT + seed), [ids(COMPLETION) for _ in range(COMPLETIONS)]) for _ in range(TREES)
    ]
    return tree_batch(trees, "packed")


def _pass(scorer: SequenceScorer, batch: TreeBatch) -> None:
    scorer.zero_grad()
    scorer(batch).sum().backward()


if __name__ == "__main__":
    main()
