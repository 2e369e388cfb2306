"""dpo best-of: the reference continues each held-out prompt many times; the results are in RUN_DIR/best_of.

One model in memory, nothing trained. `dpo frontier` draws the numbers beside those of policies: the metrics
have the names of summary.json.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo import distributed, terminal
from dpo.commands.inputs import asked_prompts, open_held_out, open_reference_model, quieten_libraries
from dpo.config import Config, EvaluateConfig, ModelConfig
from dpo.data.dataset import TokenizedDataset
from dpo.engine.frozen import frozen_scorer, is_sharded
from dpo.engine.scoring import bare_scorer, settle_layout, token_budget
from dpo.evaluate.asked import Asked
from dpo.evaluate.best_of import Limit, ReferenceSamples, best_of_summary, score_limit, values_of_n
from dpo.evaluate.checks import check_best_of
from dpo.evaluate.samples import PromptAndCompletion, held_out_prompts, log_probs, texts_of
from dpo.evaluate.sampling import Continuation, sample, stop_ids_of
from dpo.evaluate.scoring import Scorer, load_scorer, score_over_ranks
from dpo.files import remove_abandoned, write_file
from dpo.guards.guard import Guard
from dpo.model.files import max_positions
from dpo.model.load import DTYPES
from dpo.model.probe_trees import probe_trees
from dpo.tracking.run_folder import RunFolder

AGAIN = "during best-of: nothing was changed; run the same command again"
SEED_OFFSET = 2
"""Added to the seed: neither the compared samples of an evaluation nor those of its KL."""


def best_of(config: Config) -> None:
    """Many continuations by the reference alone: best of n, and the limit that no policy can exceed."""
    check_best_of(config.evaluate)
    quieten_libraries()
    folder, stuck = RunFolder(Path(config.run_dir)), config.train.stuck_after_seconds
    with Guard(folder, "best-of", stuck, at_once=AGAIN, exclusive=False):
        _, test_data, tokenizer = open_held_out(config.data, config.model, "best-of")
        reference = open_reference_model(config)
        best_of_reference(config, reference, test_data, tokenizer)


def best_of_reference(
    config: Config, reference: ModelConfig, data: TokenizedDataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Samples the reference, and writes best_of.json and samples.jsonl to RUN_DIR/best_of.

    All ranks must call it.

    Args:
        config: The experiment.
        reference: The model that is sampled, at temperature 1.
        data: Held-out groups; only their prompts are used.
        tokenizer: The reference's.
    """
    options = config.evaluate
    assert options.scorer is not None
    prompts = held_out_prompts(data, options.num_prompts, options.completion_tokens, max_positions(reference))
    budget = token_budget(config.train.max_tokens_per_micro_batch)
    sharded = is_sharded(options.sharding, reference)
    with frozen_scorer(reference, sharded=sharded) as model:
        longest = max(map(len, prompts), default=0) + options.completion_tokens
        trees = probe_trees([data], at_least=longest)
        layout = settle_layout(model, trees, DTYPES[reference.dtype]).layout
        continuations = sample(
            bare_scorer(model).model,
            prompts,
            num_samples=options.reference_samples,
            max_new_tokens=options.completion_tokens,
            temperature=1.0,
            seed=options.seed + SEED_OFFSET,
            batch_size=options.batch_size,
            stop_ids=stop_ids_of(bare_scorer(model).model, tokenizer),
            progress="reference samples",
            sharded=sharded,
        )
        scorer = load_scorer(options.scorer)
        asked = asked_prompts(config.data, prompts, tokenizer)
        samples = _scored(asked, continuations, scorer, tokenizer)
        picks = {n: samples.best_of(n).tolist() for n in values_of_n(options.reference_samples)}
        picked = sorted({(row, pick) for of_n in picks.values() for row, pick in enumerate(of_n)})
        sequences: list[PromptAndCompletion] = [
            (prompts[row], continuations[row][pick].sampled_ids()) for row, pick in picked
        ]
        logps = dict(zip(picked, log_probs(model, sequences, layout, budget).tolist(), strict=True))
    if distributed.is_main():
        summaries = {
            n: best_of_summary(samples, n, [logps[row, pick] for row, pick in enumerate(of_n)], scorer)
            for n, of_n in picks.items()
        }
        folder = RunFolder(Path(config.run_dir)).best_of
        _write(folder, options, texts_of(prompts, tokenizer), samples, summaries)


def _scored(
    prompts: Sequence[Asked],
    continuations: Sequence[Sequence[Continuation]],
    scorer: Scorer,
    tokenizer: PreTrainedTokenizerBase,
) -> ReferenceSamples:
    """The samples as text, scored over the ranks."""
    texts = [texts_of([one.ids for one in several], tokenizer) for several in continuations]
    asked = [prompt for prompt, several in zip(prompts, texts, strict=True) for _ in several]
    scores = score_over_ranks(scorer, asked, [text for several in texts for text in several])
    tokens = [[len(one.sampled_ids()) for one in several] for several in continuations]
    return ReferenceSamples(
        texts=texts, scores=np.asarray(scores).reshape(len(texts), -1), tokens=np.asarray(tokens, np.int64)
    )


def _write(
    folder: Path,
    options: EvaluateConfig,
    prompts: Sequence[str],
    samples: ReferenceSamples,
    summaries: dict[int, dict[str, float]],
) -> None:
    """Writes the files, and prints the main numbers."""
    limit = score_limit(samples.scores)
    rows = [
        {"prompt": prompt, "reference": texts, "reference_scores": scores}
        for prompt, texts, scores in zip(prompts, samples.texts, samples.scores.tolist(), strict=True)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    remove_abandoned(folder)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_file(folder / "samples.jsonl", "".join(lines))
    write_file(folder / "best_of.json", json.dumps(_as_json(options, summaries, limit), indent=2) + "\n")
    mean_scores = [f"{summary['score/policy']:.3f} best of {n}" for n, summary in summaries.items()]
    terminal.summary(
        "best-of",
        {
            "samples": f"{options.reference_samples} for each of {len(prompts)} prompts",
            "mean score": ", ".join(mean_scores),
            "limit": f"{limit.score[-1].mean:.3f} at a KL of {limit.kl[-1]:.2f} nats: no policy exceeds it",
            "numbers": str(folder / "best_of.json"),
        },
    )


def _as_json(
    options: EvaluateConfig, summaries: dict[int, dict[str, float]], limit: Limit
) -> dict[str, object]:
    return {
        "samples": options.reference_samples,
        "seed": options.seed + SEED_OFFSET,
        "best_of": {str(n): summary for n, summary in summaries.items()},
        "limit": {"kl": limit.kl.tolist(), "score": [list(score) for score in limit.score]},
    }
