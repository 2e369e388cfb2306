"""The work of benchmarks.speed: a model of random weights, and the same pairs for every system.

A work is a folder with groups.jsonl, which this system reads, and pairs.jsonl, which the others read: the
same pairs one by one, in the order in which this system's plan trains them. A group is only used if every way
of tokenizing it gives the same ids, so that no system has fewer tokens because it truncates or splits
differently.
"""

import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

import data_prep.cli
from benchmarks.speed_processes import PAIRS_PER_PROMPT, Settings
from dpo.config import DataConfig, DataSource
from dpo.data.build import open_datasets
from dpo.data.dataset import TokenizedDataset
from dpo.data.notes import RowNotes
from dpo.data.plan import BatchPlan
from dpo.data.records import PreferenceGroup
from dpo.data.rows import group_from_row, read_groups
from dpo.data.sources import open_source, read_rows
from dpo.data.text import read_lines
from dpo.data.tokenize import TokenizeOptions, tokenize_groups
from dpo.errors import UserError
from dpo.model.flops import forward_flops, work_of

POSITIONS = 1024
HEAD_WIDTH = 64
QUERY_TOKENS, RESPONSE_TOKENS, RESPONSES = 64, 24, 4
"""Of best4; a response's last token is EOS, which TRL adds to every completion."""

Row = dict[str, Any]


def prepare(settings: Settings, work: str) -> None:
    """Writes model and work, and prints what is known of the work: a JSON object with its useful FLOPs."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(settings.tokenizer)
    folder = settings.work(work)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = write_model(settings, tokenizer)
    number = settings.steps * settings.pairs_per_step // PAIRS_PER_PROMPT[work]
    rows = hh_rows(settings) if work == "hh" else book_rows(settings, tokenizer)
    kept = list(islice((pick for row in rows if (pick := fitting(row, tokenizer, settings))), number))
    if len(kept) < number:
        raise UserError(f"--steps: {settings.steps} steps need {number} prompts; {work} has {len(kept)}")
    (folder / "groups.jsonl").write_text("".join(json.dumps(row) + "\n" for row, _ in kept))
    data = DataConfig(
        train=str(folder / "groups.jsonl"),
        max_length=settings.max_length,
        append_eos=True,
        cache_dir=str(folder / "tokenized"),
    )
    dataset, _ = open_datasets(data, tokenizer, POSITIONS)
    assert len(dataset) == number
    steps = planned_steps(settings, dataset)
    with (folder / "pairs.jsonl").open("w") as file:
        for index in (index for step in steps for index in step):
            row, group = kept[index]
            file.writelines(json.dumps(pair) + "\n" for pair in pairs_of(row, group))
    with torch.device("meta"):
        of_groups = forward_flops(dataset, work_of(AutoModelForCausalLM.from_config(config)))
    forward = [float(of_groups[step].sum()) for step in steps]
    flops = {"precompute": sum(forward), "train": 3 * sum(forward[1:])}
    pairs = settings.steps * settings.pairs_per_step
    counts = {
        "tree": int(dataset.tree_tokens.sum()) / pairs,
        "completion": int(dataset.completion_tokens.sum()) / pairs,
    }
    print(json.dumps({"prompts": number, "pairs": pairs, "tokens_a_pair": counts, "useful_flops": flops}))


def write_model(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """Saves a model of random weights with the tokenizer."""
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    heads = settings.width // HEAD_WIDTH
    config: PreTrainedConfig
    if settings.family == "gpt2":
        config = GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=POSITIONS,
            n_embd=settings.width,
            n_layer=settings.layers,
            n_head=heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **ids,
        )
    else:
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=POSITIONS,
            hidden_size=settings.width,
            intermediate_size=4 * settings.width,
            num_hidden_layers=settings.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 4 or 1,
            tie_word_embeddings=True,
            **ids,
        )
    torch.manual_seed(settings.seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(settings.model)
    tokenizer.save_pretrained(settings.model)
    return config


def hh_rows(settings: Settings) -> Iterator[Row]:
    """HH's groups in random order, prepared by data_prep."""
    prepared = settings.work("hh") / "prepared"
    output = ["--output", str(prepared), "--test_fraction", "0", "--overwrite"]
    if status := data_prep.cli.main(["hh", settings.hh, *output]):
        sys.exit(status)
    rows_read = read_rows(open_source(DataSource(path=str(prepared)), "train", key="--hh"))
    groups = read_groups(rows_read, pairing="best-vs-rest", min_margin=0.0, strict=True, notes=RowNotes())
    rows = [
        {"prompt": g.prompt, "completions": g.completions, "pairs": [pair._asdict() for pair in g.pairs]}
        for g in groups
    ]
    for index in np.random.default_rng(settings.seed).permutation(len(rows)):
        yield rows[index]


def book_rows(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> Iterator[Row]:
    """Beginnings of paragraphs, the true continuation and three passages from elsewhere, randomly scored."""
    long = 4 * (QUERY_TOKENS + RESPONSE_TOKENS)
    paragraphs = [line for line in read_lines(settings.books, "--books") if len(line) >= long]
    rng = np.random.default_rng(settings.seed)
    elsewhere = passages(paragraphs, rng, tokenizer)
    for index in rng.permutation(len(paragraphs)):
        ids = tokenizer(paragraphs[index], verbose=False).input_ids
        end = QUERY_TOKENS + RESPONSE_TOKENS - 1
        if len(ids) <= end:
            continue
        continuation = tokenizer.decode(ids[QUERY_TOKENS:end])
        yield {
            "prompt": tokenizer.decode(ids[:QUERY_TOKENS]),
            "completions": [continuation, *islice(elsewhere, RESPONSES - 1)],
            "scores": rng.random(RESPONSES).tolist(),
        }


def passages(
    paragraphs: Sequence[str], rng: np.random.Generator, tokenizer: PreTrainedTokenizerBase
) -> Iterator[str]:
    """Passages that start at a word and are a token shorter than a response."""
    while True:
        words = paragraphs[int(rng.integers(len(paragraphs)))].split(" ")
        text = " " + " ".join(words[int(rng.integers(len(words))) :])
        ids = tokenizer(text, verbose=False).input_ids[: RESPONSE_TOKENS - 1]
        if len(ids) == RESPONSE_TOKENS - 1:
            yield str(tokenizer.decode(ids))


def fitting(
    row: Row, tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> tuple[Row, PreferenceGroup] | None:
    """The row and its group, if nothing of it is cut and tokenizing prompt + completion splits where the
    prompt ends.
    """
    group = group_from_row(row)
    options = TokenizeOptions(
        max_length=settings.max_length, max_prompt_length=None, drop_too_long=True, append_eos=True
    )
    tokenized = next(iter(tokenize_groups([group], tokenizer, options, Counter(), RowNotes())), None)
    if tokenized is None or tokenized.pairs != group.pairs:
        return None
    for text, ids in zip(group.completions, tokenized.completions, strict=True):
        together = tokenizer(f"{group.prompt}{text}{tokenizer.eos_token}", verbose=False).input_ids
        if together != [*tokenized.prompt.tolist(), *ids.tolist()]:
            return None
    lengths = [len(tokenized.prompt), *map(len, tokenized.completions)]
    if "scores" in row and lengths != [QUERY_TOKENS, *[RESPONSE_TOKENS] * RESPONSES]:
        return None  # the text of some excerpts has other tokens than they were cut from
    return row, group


def planned_steps(settings: Settings, dataset: TokenizedDataset) -> list[list[int]]:
    """The groups of each optimizer step, in the order in which this system trains them."""
    plan = BatchPlan(
        dataset.pairs_per_group,
        seed=settings.seed,
        num_epochs=1,
        pairs_per_step=settings.pairs_per_step,
        max_steps=settings.steps,
    )
    assert plan.num_steps == settings.steps
    return [plan.step(number + 1).groups.tolist() for number in range(settings.steps)]


def pairs_of(row: Row, group: PreferenceGroup) -> Iterator[Row]:
    """A group's pairs as TRL reads them."""
    for chosen, rejected in group.pairs:
        texts = row["completions"]
        yield {"prompt": row["prompt"], "chosen": texts[chosen], "rejected": texts[rejected]}
