"""One evaluation, start to end: the policy alone in memory, then the reference alone, then numbers and the
report.

Both continue the same held-out prompts with the same seeds. KL has samples of its own, at temperature 1.
"""

import gc
import shutil
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo import distributed, terminal
from dpo.commands.check import finished_model
from dpo.commands.inputs import join_ranks, open_held_out, with_reference
from dpo.config import Config, ModelConfig
from dpo.data.dataset import longest_tree
from dpo.data.preference_data import PreferenceData
from dpo.engine.frozen import frozen_scorer, is_sharded
from dpo.engine.scoring import bare_scorer, settle_layout, token_budget
from dpo.evaluate.divergence import kl_summary
from dpo.evaluate.rewards import PairScores, score_pairs
from dpo.evaluate.samples import Sampler, held_out_prompts, log_probs, texts
from dpo.loss.catalog import needs_reference
from dpo.model.files import max_positions
from dpo.model.load import DTYPES
from dpo.reference.identity import reference_model
from dpo.reference.values import open_reference
from dpo.report.build import Compared, Samples, compare, compose, headline, learned_preferences, report_folder
from dpo.report.html import html_page
from dpo.report.markdown import terminal_table, write_report, write_text
from dpo.report.model_card import policy_card


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
        model = Sampler(bare_scorer(scorer).model, options, eos, sharded=sharded)
        by_policy = model.sample(prompts, "policy samples")
        drawn = model.sample(prompts, "samples for the KL", for_kl=True)
        kl_sequences = [(prompt, c.sampled_ids(eos)) for prompt, c in zip(prompts, drawn, strict=True)]
        policy_logps = log_probs(scorer, kl_sequences, layout, budget)
    del model, scorer
    gc.collect()

    with frozen_scorer(reference, sharded=sharded) as scorer:
        layout = settle_layout(scorer, longest, DTYPES[reference.dtype]).layout
        model = Sampler(bare_scorer(scorer).model, options, eos, sharded=sharded)
        by_reference = model.sample(prompts, "reference samples")
        kl_reference = log_probs(scorer, kl_sequences, layout, budget)
    lengths = [len(completion) for _, completion in kl_sequences]
    return scores, Samples(
        prompts=prompts,
        reference=texts(by_reference, tokenizer),
        policy=texts(by_policy, tokenizer),
        tokens={
            "reference": [len(drawn.ids) for drawn in by_reference],
            "policy": [len(drawn.ids) for drawn in by_policy],
        },
        kl=kl_summary(policy_logps, kl_reference, lengths, np.arange(len(prompts))),
    )


def evaluate(config: Config) -> None:
    """Held-out metrics, samples of reference and policy side by side, and the report."""
    join_ranks()
    policy = finished_model(config)
    train_data, test_data, tokenizer = open_held_out(config.data, config.model, "evaluate")
    command = "make precompute-ref CONFIG=... (the cache lacks rows of the held-out data)"
    reference = open_reference(
        reference_model(config.model, config.reference),
        config.reference,
        [test_data],
        needed=needs_reference(config.loss),
        per_token=config.loss.ld_alpha is not None,
        command=command,
    )
    found = evaluate_run(
        config,
        policy,
        reference_model(config.model, config.reference),
        with_reference(config.loss, [test_data], reference)[0],
        tokenizer,
        {
            "training data": f"{config.data.train}, content {train_data.content_digest()[:16]}",
            "held-out data": f"content {test_data.content_digest()[:16]}",
            "reference cache": reference.description,
        },
    )
    if distributed.is_main() and learned_preferences(Path(config.run_dir)):
        (Path(policy.name_or_path) / "README.md").write_text(policy_card(config, found))
