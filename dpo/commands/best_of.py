"""dpo best-of: the reference continues each held-out prompt many times; what that says is in RUN_DIR/best_of.

One model in memory, nothing trained. The frontier draws its numbers beside those of policies: they have the
names of summary.json.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from dpo import distributed, terminal
from dpo.commands.inputs import join_ranks, open_held_out
from dpo.config import Config, EvaluateConfig, ModelConfig
from dpo.data.dataset import TokenizedDataset, longest_tree
from dpo.data.records import TokenIds
from dpo.engine.frozen import frozen_scorer, is_sharded
from dpo.engine.scoring import bare_scorer, settle_layout, token_budget
from dpo.errors import UserError
from dpo.evaluate.best_of import Limit, best_of_kl, best_of_kl_bound, expected_best, score_limit
from dpo.evaluate.samples import held_out_prompts, log_probs
from dpo.evaluate.sampling import Continuation, sample
from dpo.evaluate.scoring import Scorer, load_scorer, score_over_ranks
from dpo.evaluate.statistics import Interval, distinct_n, mean_interval, ratio_interval, win_rate
from dpo.model.files import max_positions
from dpo.model.load import DTYPES
from dpo.reference.identity import reference_model
from dpo.report.markdown import write_text

SEED_OFFSET = 2  # neither the compared samples nor those of the KL
COARSEST = 4
"""Best of n is estimated where there are at least this many times n samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """M continuations of each of P prompts by the reference."""

    texts: list[list[str]]
    """P lists of M."""
    scores: npt.NDArray[np.float64]
    """(P, M)."""
    tokens: npt.NDArray[np.int64]
    """(P, M) tokens that were drawn, EOS included."""


def check_baseline(options: EvaluateConfig) -> None:
    """Raises UserError where best-of has nothing to score or to sample; everything at once."""
    wrong = [
        *(["evaluate.scorer: nothing; expected vader or hf:MODEL"] if options.scorer is None else []),
        *(["evaluate.num_prompts: 0; expected at least 1"] if options.num_prompts < 1 else []),
    ]
    if wrong:
        raise UserError("\n".join(f"{problem}: best-of scores samples" for problem in wrong))


def best_of_reference(
    config: Config, reference: ModelConfig, data: TokenizedDataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Samples the reference; writes best_of.json and samples.jsonl into RUN_DIR/best_of. All ranks call it.

    Args:
        config: The experiment.
        reference: The model that is sampled, at temperature 1.
        data: Held-out groups, of which the prompts are used.
        tokenizer: The reference's.
    """
    options, eos = config.evaluate, int(tokenizer.eos_token_id)
    assert options.scorer is not None
    prompts = held_out_prompts(data, options.num_prompts, options.completion_tokens, max_positions(reference))
    sharded = is_sharded(options.sharding, reference)
    with frozen_scorer(reference, sharded=sharded) as model:
        layout = settle_layout(model, longest_tree([data]), DTYPES[reference.dtype]).layout
        continuations = sample(
            bare_scorer(model).model,
            prompts,
            num_samples=options.reference_samples,
            max_new_tokens=options.completion_tokens,
            temperature=1.0,
            seed=options.seed + SEED_OFFSET,
            batch_size=options.batch_size,
            eos_token_id=eos,
            progress="reference samples",
            sharded=sharded,
        )
        scorer = load_scorer(options.scorer)
        drawn = _drawn(continuations, scorer, tokenizer, eos)
        picks = {n: drawn.scores[:, :n].argmax(axis=1) for n in numbers_of(options.reference_samples)}
        picked = sorted({(row, int(at)) for at_n in picks.values() for row, at in enumerate(at_n)})
        sequences: list[tuple[TokenIds, TokenIds]] = [
            (prompts[row], continuations[row][at].sampled_ids(eos)) for row, at in picked
        ]
        budget = token_budget(config.train.max_tokens_per_micro_batch)
        logps = dict(zip(picked, log_probs(model, sequences, layout, budget).tolist(), strict=True))
    if not distributed.is_main():
        return
    models = {
        n: best_of_summary(drawn, n, [logps[row, int(at)] for row, at in enumerate(at_n)], scorer)
        for n, at_n in picks.items()
    }
    folder = Path(config.run_dir) / "best_of"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "prompt": str(tokenizer.decode(prompt, skip_special_tokens=True)),
            "reference": texts,
            "reference_scores": scores,
        }
        for prompt, texts, scores in zip(prompts, drawn.texts, drawn.scores.tolist(), strict=True)
    ]
    write_text(folder / "samples.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    limit = score_limit(drawn.scores)
    write_text(folder / "best_of.json", json.dumps(_as_json(models, limit, options), indent=2) + "\n")
    terminal.summary(
        "best-of",
        {
            "samples": f"{options.reference_samples} of each of {len(prompts)} prompts",
            "mean score": ", ".join(
                f"{found['score/policy']:.3f} best of {n}" for n, found in models.items()
            ),
            "limit": f"{limit.score[-1].mean:.3f} at a KL of {limit.kl[-1]:.2f} nats: no policy exceeds it",
            "numbers": str(folder / "best_of.json"),
        },
    )


def numbers_of(num_samples: int) -> list[int]:
    """The n of best of n: 1, 2, 4, ... as far as so many samples tell them apart."""
    return [2**power for power in range(num_samples.bit_length()) if 2**power * COARSEST <= num_samples]


def best_of_summary(drawn: Drawn, n: int, logps: Sequence[float], scorer: Scorer) -> dict[str, float]:
    """The names of summary.json for the policy that takes the best of n samples of the reference.

    Means are over all draws of n from the M samples; what needs texts is of the best of the first n, and the
    win rate is that pick against the last sample.

    Args:
        drawn: The samples.
        n: At most M / 2.
        logps: (P,) log-probs in nats of the picks, the first best of the first n.
        scorer: Says what is positive.

    Returns:
        As of an evaluation, with intervals; `kl/bound` is what the KL is where no two scores are equal.
    """
    clusters = np.arange(len(drawn.scores))
    at = drawn.scores[:, :n].argmax(axis=1)
    positive = np.vectorize(scorer.is_positive, otypes=[np.float64])(drawn.scores)
    texts = [several[pick].split() for several, pick in zip(drawn.texts, at.tolist(), strict=True)]
    surprise = ratio_interval(-np.asarray(logps), drawn.tokens[clusters, at], clusters)
    found = {
        "kl/bound": best_of_kl_bound(n),
        "distinct_2/policy": distinct_n(texts, 2),
        **Interval(*np.exp(surprise).tolist()).under("perplexity/policy_samples"),
        **mean_interval(best_of_kl(drawn.scores, n), clusters).under("kl/sequence"),
        **win_rate(drawn.scores[clusters, at], drawn.scores[:, -1], clusters).under("win_rate"),
    }
    for name, values in {"score": drawn.scores, "positive_share": positive}.items():
        found |= mean_interval(values.mean(axis=1), clusters).under(f"{name}/reference")
        found |= mean_interval(expected_best(values, n), clusters).under(f"{name}/policy")
    return found


def _drawn(
    continuations: Sequence[Sequence[Continuation]],
    scorer: Scorer,
    tokenizer: PreTrainedTokenizerBase,
    eos: int,
) -> Drawn:
    texts = [
        [str(tokenizer.decode(one.ids, skip_special_tokens=True)) for one in several]
        for several in continuations
    ]
    flat = score_over_ranks(scorer, [text for several in texts for text in several])
    tokens = [[len(one.sampled_ids(eos)) for one in several] for several in continuations]
    return Drawn(
        texts=texts, scores=np.asarray(flat).reshape(len(texts), -1), tokens=np.asarray(tokens, np.int64)
    )


def _as_json(models: dict[int, dict[str, float]], limit: Limit, options: EvaluateConfig) -> dict[str, object]:
    return {
        "samples": options.reference_samples,
        "seed": options.seed + SEED_OFFSET,
        "best_of": {str(n): found for n, found in models.items()},
        "limit": {"kl": limit.kl.tolist(), "score": [list(score) for score in limit.score]},
    }


def best_of(config: Config) -> None:
    """Many continuations by the reference alone: best of n, and what no policy can exceed."""
    check_baseline(config.evaluate)
    join_ranks()
    _, test_data, tokenizer = open_held_out(config.data, config.model, "best-of")
    reference = reference_model(config.model, config.reference)
    best_of_reference(config, reference, test_data, tokenizer)
