"""A small reward model for `reward:MODEL`, trained on preference files with transformers alone.

    python -m data_prep hh test.jsonl.gz --output data/hh
    python -m benchmarks.reward_model --model BASE --pairs data/hh --output models/reward

Fits -log sigmoid(r(chosen) - r(rejected)) (Bradley and Terry) by AdamW, one pass over the training pairs, and
says how often it ranks held-out pairs correctly, scored as `reward:OUTPUT` scores them.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from dpo.data.chat import dialogue_text
from dpo.data.records import Message
from dpo.evaluate.asked import Asked
from dpo.evaluate.reward_model import RewardScorer
from dpo.evaluate.statistics import share_by_cluster

TEMPLATE = (
    "{% for m in messages %}\n\n{{ 'Human' if m.role == 'user' else 'Assistant' }}: {{ m.content }}"
    "{% endfor %}{% if add_generation_prompt %}\n\nAssistant:{% endif %}"
)
"""For a base model that has none: HH's own layout."""
BATCH, RATE = 8, 5e-5


class Preferred(NamedTuple):
    """A pair of one prompt."""

    prompt: Asked
    chosen: str
    rejected: str


def pairs_of(file: Path) -> Iterator[Preferred]:
    """The pairs of a preference file."""
    for row in pq.read_table(file).to_pylist():
        prompt: Any = row["prompt"]
        asked = (
            Asked(prompt)
            if isinstance(prompt, str)
            else Asked("", tuple(Message(role=turn["role"], content=turn["content"]) for turn in prompt))
        )
        for pair in row["pairs"]:
            yield Preferred(asked, row["completions"][pair["chosen"]], row["completions"][pair["rejected"]])


def train(base: str, pairs: Sequence[Preferred], output: Path, max_length: int) -> None:
    """Trains a copy of `base` with one new output, and saves it with its tokenizer."""
    torch.manual_seed(0)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = tokenizer.chat_template or TEMPLATE
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.truncation_side, tokenizer.padding_side = "left", "right"
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    texts = [[dialogue_text(one.prompt.messages(end), tokenizer) for end in one[1:]] for one in pairs]
    order = np.random.default_rng(0).permutation(len(pairs))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    steps, began = len(pairs) // BATCH, time.monotonic()
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    model.train()
    for step in range(steps):
        batch = [text for index in order[step * BATCH : (step + 1) * BATCH] for text in texts[index]]
        inputs = tokenizer(
            batch,
            add_special_tokens=False,
            padding=True,
            truncation=True,
            max_length=max_length,
            return_tensors="pt",
        )
        rewards = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, 0]
        loss = -logsigmoid(rewards[0::2] - rewards[1::2]).mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(
                f"step {step} of {steps}: loss {loss.item():.3f}, {time.monotonic() - began:.0f} s",
                flush=True,
            )
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def accuracy(scorer: RewardScorer, pairs: Sequence[Preferred]) -> str:
    """How often the chosen completion scores higher, with its interval by prompt."""
    prompts = [one.prompt for one in pairs]
    chosen = scorer.score(prompts, [one.chosen for one in pairs])
    rejected = scorer.score(prompts, [one.rejected for one in pairs])
    right = (np.sign(np.subtract(chosen, rejected)) + 1) / 2
    _, clusters = np.unique([repr(prompt) for prompt in prompts], return_inverse=True)
    found = share_by_cluster(right, clusters)
    return f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}] of {len(pairs)} held-out pairs"


def main() -> None:
    """Trains and measures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a causal language model to start from")
    parser.add_argument("--pairs", type=Path, required=True, help="a preference folder")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--max_pairs", type=int, help="train on the first N (default: all)")
    parser.add_argument("--max_length", type=int, default=256, help="tokens of a dialogue (default: 256)")
    args = parser.parse_args()
    train(
        args.model, [*pairs_of(args.pairs / "train.parquet")][: args.max_pairs], args.output, args.max_length
    )
    print(accuracy(RewardScorer(str(args.output)), [*pairs_of(args.pairs / "test.parquet")]))


if __name__ == "__main__":
    main()
