"""Textbook DPO as a baseline: two padded rows per pair, full logits, a live reference.

    python -m benchmarks.textbook SETTINGS WORK {precompute,train}

It uses no code of dpo, so that it is also an independent check of its losses.
"""

import copy
import json
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (the field's name for it)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.speed_processes import Measurement, Settings

MAX_GRAD_NORM = 1.0
Row = tuple[list[int], int]
"""Token ids of prompt and completion, and how many of them are the prompt's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """B chosen rows, then their B rejected rows, padded to T tokens."""

    input_ids: Tensor
    """(2B, T) int64."""
    attention_mask: Tensor
    """(2B, T) int64, 0 for padding."""
    is_completion: Tensor
    """(2B, T) bool."""


def read_pairs(settings: Settings, work: str) -> list[tuple[Row, Row]]:
    """The (chosen, rejected) rows of each pair, in the order of training."""
    tokenizer = AutoTokenizer.from_pretrained(settings.model)

    def row(prompt: str, completion: str) -> Row:
        ids = tokenizer(f"{prompt}{completion}{tokenizer.eos_token}").input_ids
        return ids, len(tokenizer(prompt).input_ids)

    with (settings.work(work) / "pairs.jsonl").open() as file:
        pairs = [json.loads(line) for line in file]
    return [(row(pair["prompt"], pair["chosen"]), row(pair["prompt"], pair["rejected"])) for pair in pairs]


def pad(pairs: Sequence[tuple[Row, Row]]) -> Rows:
    """The rows of B pairs as tensors; padding has id 0 and is masked."""
    rows = [pair[side] for side in (0, 1) for pair in pairs]
    lengths = torch.tensor([len(ids) for ids, _ in rows])[:, None]
    prompts = torch.tensor([prompt for _, prompt in rows])[:, None]
    places = torch.arange(int(lengths.max()))[None]
    return Rows(
        input_ids=nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids, _ in rows], batch_first=True),
        attention_mask=(places < lengths).long(),
        is_completion=(places >= prompts) & (places < lengths),
    )


def completion_logps(model: nn.Module, rows: Rows) -> tuple[Tensor, Tensor]:
    """(B,) summed log-probs of the chosen and of the rejected completions, in nats."""
    logits = model(input_ids=rows.input_ids, attention_mask=rows.attention_mask, use_cache=False).logits
    logps = torch.log_softmax(logits[:, :-1], dim=-1)
    token_logps = logps.gather(-1, rows.input_ids[:, 1:, None]).squeeze(-1)
    chosen, rejected = (token_logps * rows.is_completion[:, 1:]).sum(-1).chunk(2)
    return chosen, rejected


def dpo_loss(policy: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor], beta: float) -> Tensor:
    """(B,) Eq. 7 of arXiv 2305.18290."""
    margins = (policy[0] - reference[0]) - (policy[1] - reference[1])
    return -F.logsigmoid(beta * margins)


def micro_batches(pairs: Sequence[tuple[Row, Row]], settings: Settings) -> list[Rows]:
    """Micro-batches of a fixed number of pairs, in order."""
    size = settings.pairs_per_micro_batch
    return [pad(pairs[start : start + size]) for start in range(0, len(pairs), size)]


def precompute(settings: Settings, pairs: Sequence[tuple[Row, Row]], model: nn.Module) -> dict[str, Any]:
    """Reference log-probs of all pairs; one untimed pass over the first micro-batch comes before."""
    with torch.inference_mode():
        completion_logps(model, micro_batches(pairs, settings)[0])
        started = time.perf_counter()
        for rows in micro_batches(pairs, settings):
            completion_logps(model, rows)
        seconds = time.perf_counter() - started
    return {"pairs": len(pairs), "seconds": seconds, "tokens": num_tokens(pairs), "losses": []}


def train(settings: Settings, pairs: Sequence[tuple[Row, Row]], policy: nn.Module) -> dict[str, Any]:
    """Optimizer steps with the reference in memory beside the policy; the first one is not timed."""
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    losses: list[float] = []
    seconds: list[float] = []
    for first in range(0, len(pairs), settings.pairs_per_step):
        started = time.perf_counter()
        total = 0.0
        for rows in micro_batches(pairs[first : first + settings.pairs_per_step], settings):
            with torch.no_grad():
                live = completion_logps(reference, rows)
            loss = dpo_loss(completion_logps(policy, rows), live, settings.beta).sum()
            loss = loss / settings.pairs_per_step
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(policy.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        seconds.append(time.perf_counter() - started)
    timed = pairs[settings.pairs_per_step :]
    return {"pairs": len(timed), "seconds": sum(seconds[1:]), "tokens": num_tokens(timed), "losses": losses}


def num_tokens(pairs: Sequence[tuple[Row, Row]]) -> int:
    """Tokens of all rows, without padding."""
    return sum(len(ids) for pair in pairs for ids, _ in pair)


def main() -> int:
    """Measures one task."""
    path, work, task = sys.argv[1:]
    settings = Settings.read(path)
    torch.set_num_threads(settings.threads)
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
    measured = {"precompute": precompute, "train": train}[task](settings, read_pairs(settings, work), model)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    Measurement(system="textbook", work=work, task=task, peak_bytes=peak, **measured).print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
