"""One evaluation, start to end: the policy alone in memory, then the reference alone, then numbers and the
report.

Both continue the same held-out prompts with the same seeds. KL has samples of its own, at temperature 1.
"""

import gc
import shutil
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo import distributed, terminal
from dpo.config import Config, EvaluateConfig, ModelConfig
from dpo.data.dataset import TokenizedDataset, longest_tree
from dpo.data.preference import PreferenceData
from dpo.data.trees import Layout, sequence_batch
from dpo.evaluate.compose import Compared, Samples, compare, compose, headline, report_folder
from dpo.evaluate.divergence import kl_summary
from dpo.evaluate.page import html_page
from dpo.evaluate.report import terminal_table, write_report, write_text
from dpo.evaluate.rewards import PairScores, score_pairs
from dpo.evaluate.sampling import Continuation, sample
from dpo.frozen import bare_scorer, frozen_scorer, is_sharded, settle_layout, token_budget
from dpo.model.load import DTYPES, max_positions
from dpo.records import TokenIds

KL_SEED_OFFSET = 1  # the KL's samples are not the compared ones

Sequences = list[tuple[TokenIds, TokenIds]]
Float64s = npt.NDArray[np.float64]


def evaluate_run(
    config: Config,
    policy: ModelConfig,
    reference: ModelConfig,
    data: PreferenceData,
    tokenizer: PreTrainedTokenizerBase,
    identity: dict[str, str],
) -> dict[str, float]:
    """Evaluates the trained policy and writes RUN_DIR/report. All ranks must call it.

    Args:
        config: The experiment.
        policy: The trained model.
        reference: The model that the samples are compared with.
        data: Held-out groups with what the loss reads of the cache.
        tokenizer: The policy's.
        identity: Digests of data and cache, by name, for the report.

    Returns:
        What summary.json holds; empty on ranks other than the main one.
    """
    scores, samples = _use_models(config, policy, reference, data, tokenizer)
    compared = compare(samples, config.evaluate, tokenizer) if samples is not None else Compared()
    if not distributed.is_main():
        return {}
    folder = report_folder(config)
    report = compose(config, data.dataset, tokenizer, scores, compared, identity)
    write_report(report, folder)
    write_text(folder / "report.html", html_page(report, config.run_dir))
    if report.rows:
        shown = report.rows[: config.evaluate.table_rows]
        terminal.note(terminal_table(shown, shutil.get_terminal_size((140, 24)).columns))
    terminal.event("evaluation", report.summary)
    terminal.summary(
        "evaluate",
        {
            "result": headline(report.summary),
            "report": f"{folder / 'report.html'}\nreport.md, figures and all samples are beside it",
        },
    )
    return report.summary


def _use_models(
    config: Config,
    policy: ModelConfig,
    reference: ModelConfig,
    data: PreferenceData,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[PairScores, Samples | None]:
    """Everything that needs a model, one model in memory at a time."""
    options, eos = config.evaluate, int(tokenizer.eos_token_id)
    prompts = []
    if options.num_prompts:
        prompts = held_out_prompts(
            data.dataset, options.num_prompts, options.completion_tokens, max_positions(policy)
        )

    budget, longest = token_budget(config.train.max_tokens_per_micro_batch), longest_tree([data.dataset])
    sharded = is_sharded(options.sharding, policy)
    with frozen_scorer(policy, sharded=sharded) as scorer:
        layout = settle_layout(scorer, longest, DTYPES[policy.dtype]).layout
        scores = score_pairs(
            scorer,
            data,
            config.loss,
            layout=layout,
            budget=budget,
            device=distributed.device(),
        )
        if not prompts:
            return scores, None
        model = _Sampler(bare_scorer(scorer).model, options, eos, sharded=sharded)
        by_policy = model.sample(prompts, "policy samples")
        drawn = model.sample(prompts, "samples for the KL", for_kl=True)
        kl_sequences = [(prompt, c.sampled_ids(eos)) for prompt, c in zip(prompts, drawn, strict=True)]
        policy_logps = log_probs(scorer, kl_sequences, layout, budget)
    del model, scorer
    gc.collect()

    with frozen_scorer(reference, sharded=sharded) as scorer:
        layout = settle_layout(scorer, longest, DTYPES[reference.dtype]).layout
        model = _Sampler(bare_scorer(scorer).model, options, eos, sharded=sharded)
        by_reference = model.sample(prompts, "reference samples")
        kl_reference = log_probs(scorer, kl_sequences, layout, budget)
    lengths = [len(completion) for _, completion in kl_sequences]
    return scores, Samples(
        prompts=prompts,
        reference=_texts(by_reference, tokenizer),
        policy=_texts(by_policy, tokenizer),
        tokens={
            "reference": [len(drawn.ids) for drawn in by_reference],
            "policy": [len(drawn.ids) for drawn in by_policy],
        },
        kl=kl_summary(policy_logps, kl_reference, lengths, np.arange(len(prompts))),
    )


def held_out_prompts(
    data: TokenizedDataset, number: int, completion_tokens: int, positions: int | None
) -> list[TokenIds]:
    """The first different prompts of a data set, cut on the left where the continuation needs the room.

    Args:
        data: Held-out groups.
        number: Most prompts.
        completion_tokens: Longest continuation.
        positions: Of the model, or None without a limit.
    """
    room = positions - completion_tokens if positions is not None else None
    found: dict[bytes, TokenIds] = {}
    for index in range(len(data)):
        prompt = np.asarray(data[index].prompt)
        prompt = prompt[-room:] if room is not None and room > 0 else prompt
        found.setdefault(prompt.tobytes(), prompt)
        if len(found) == number:
            break
    return list(found.values())


@dataclass(frozen=True, slots=True)
class _Sampler:
    """A model that continues prompts as the options say."""

    model: PreTrainedModel
    options: EvaluateConfig
    eos: int
    _: KW_ONLY
    sharded: bool

    def sample(
        self, prompts: Sequence[TokenIds], progress: str, *, for_kl: bool = False
    ) -> list[Continuation]:
        """One continuation of each prompt; for the KL at temperature 1, and others."""
        drawn = sample(
            self.model,
            prompts,
            num_samples=1,
            max_new_tokens=self.options.completion_tokens,
            temperature=1.0 if for_kl else self.options.temperature,
            seed=self.options.seed + KL_SEED_OFFSET if for_kl else self.options.seed,
            batch_size=self.options.batch_size,
            eos_token_id=self.eos,
            progress=progress,
            sharded=self.sharded,
        )
        return [continuations[0] for continuations in drawn]


def log_probs(scorer: nn.Module, sequences: Sequences, layout: Layout, budget: int) -> Float64s:
    """(N,) summed log-probs in nats of N sequences, computed over the ranks, in order, on every rank.

    Args:
        scorer: A `SequenceScorer`, sharded or not.
        sequences: Prompt and completion of each, in token ids.
        layout: How the scorer takes its batches.
        budget: Most tokens of a batch, padding included.
    """
    width = max(len(prompt) + len(completion) for prompt, completion in sequences)
    size = max(1, budget // width)
    starts = range(0, len(sequences), size)
    mine: dict[int, Float64s] = {}
    turns = distributed.turns_of(starts)  # also an empty batch is a pass that a sharded model's ranks share
    for start in terminal.progress(turns, description="log-probs of samples", unit="batches", leave=False):
        chosen = sequences[start : start + size] if start is not None else []
        with torch.no_grad():
            found = scorer(sequence_batch(chosen, layout).to(distributed.device())).cpu().numpy()
        if start is not None:
            mine[start] = found
    gathered = {start: values for part in distributed.gather_objects(mine) for start, values in part.items()}
    return np.concatenate([gathered[start] for start in starts])


def _texts(continuations: Sequence[Continuation], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [str(tokenizer.decode(drawn.ids, skip_special_tokens=True)) for drawn in continuations]
