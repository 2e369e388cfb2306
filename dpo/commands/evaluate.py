"""dpo evaluate: the trained policy alone in memory, then the reference alone, then numbers and the report.

Both models continue the same held-out prompts with the same seeds. Writes RUN_DIR/report, or the report of a
snapshot into the snapshot's folder, and the model card.
"""

import gc
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo import alive, distributed, terminal
from dpo.commands.amount import preference_plan, ran
from dpo.commands.check import finished_model
from dpo.commands.data_report import cached_logps
from dpo.commands.inputs import (
    asked_prompts,
    counted,
    open_held_out,
    open_reference_model,
    quieten_libraries,
    with_reference,
)
from dpo.config import Config, ModelConfig
from dpo.data.dataset import TokenizedDataset
from dpo.data.preference_data import PreferenceData
from dpo.data.records import TokenIds
from dpo.engine.frozen import frozen_scorer, is_sharded
from dpo.engine.scoring import bare_scorer, settle_layout, token_budget
from dpo.evaluate.described_data import HELD_OUT, TRAINING, describe
from dpo.evaluate.divergence import kl_summary
from dpo.evaluate.judge import open_judge
from dpo.evaluate.rewards import PairScores, score_pairs
from dpo.evaluate.samples import (
    ComparedSamples,
    Float64s,
    PromptAndCompletion,
    Samples,
    compare,
    continue_prompts,
    held_out_prompts,
    log_probs,
)
from dpo.evaluate.sampling import Continuation, stop_ids_of
from dpo.evaluate.scoring import check_scorer
from dpo.files import remove_abandoned, write_file
from dpo.guards.guard import Guard
from dpo.loss.catalog import needs_reference
from dpo.model.files import max_positions
from dpo.model.load import DTYPES
from dpo.model.probe_trees import probe_trees
from dpo.reference.values import open_reference
from dpo.report.build import compose
from dpo.report.content import Ran, Report, Section
from dpo.report.data_sections import data_sections
from dpo.report.headline import headline
from dpo.report.model_card import policy_card
from dpo.report.provenance import learned_preferences, provenance_of
from dpo.report.terminal_table import terminal_table
from dpo.report.write import write_report
from dpo.tracking.history import read_history
from dpo.tracking.hub import push
from dpo.tracking.run_folder import RunFolder

AGAIN = "during evaluate: nothing was changed; run the same command again"


def evaluate(config: Config) -> dict[str, float]:
    """Held-out metrics, samples of reference and policy side by side, and the report.

    Returns:
        What summary.json holds; empty on ranks other than the main one.
    """
    quieten_libraries()
    folder, stuck = RunFolder(Path(config.run_dir)), config.train.stuck_after_seconds
    with Guard(folder, "evaluate", stuck, at_once=AGAIN, exclusive=False):
        return _evaluate(config)


def _evaluate(config: Config) -> dict[str, float]:
    policy = finished_model(config)
    train_data, test_data, tokenizer = open_held_out(config.data, config.model, "evaluate", config.loss)
    reference = open_reference_model(config)
    values = open_reference(
        reference,
        config.reference,
        [test_data],
        needed=needs_reference(config.loss),
        per_token=config.loss.ld_alpha is not None,
        command="make precompute-ref CONFIG=... (the cache lacks rows of the held-out data)",
    )
    digests = {
        "training data": f"{config.data.train}, content {train_data.content_digest()[:16]}",
        "held-out data": f"content {test_data.content_digest()[:16]}",
        "reference cache": values.description,
    }
    data = with_reference(config.loss, [test_data], values)[0]
    sections = _data_sections(config, train_data, test_data, tokenizer)
    folder, what = RunFolder(Path(config.run_dir)), None
    if learned_preferences(folder):
        num_steps, done = preference_plan(train_data, config.train).num_steps, config.evaluate.snapshot
        what = ran(num_steps, config.train, counted(train_data), counted(test_data), done=done)
    summary = evaluate_run(config, policy, reference, data, tokenizer, digests, sections, what)
    if distributed.is_main() and learned_preferences(folder):
        assert what is not None
        card = policy_card(
            summary,
            title=folder.path.name,
            model=config.model,
            data=config.data,
            reference=config.reference,
            loss=config.loss,
            train=config.train,
            ran=what,
        )
        remove_abandoned(Path(policy.name_or_path))
        write_file(Path(policy.name_or_path) / "README.md", card)
        if config.train.push_to_hub is not None and config.evaluate.snapshot is None:
            push(Path(policy.name_or_path), config.train.push_to_hub, only="README.md")
    return summary


def evaluate_run(
    config: Config,
    policy: ModelConfig,
    reference: ModelConfig,
    data: PreferenceData,
    tokenizer: PreTrainedTokenizerBase,
    digests: dict[str, str],
    sections: Sequence[Section] = (),
    what: Ran | None = None,
) -> dict[str, float]:
    """Evaluates the trained policy and writes its report. All ranks must call it.

    Args:
        config: The experiment.
        policy: The trained model.
        reference: The model that the samples are compared with.
        data: Held-out groups with what the loss reads from the cache.
        tokenizer: The policy's.
        digests: Digests of data and cache, by name, for the report.
        sections: On the data, for the report.
        what: The training did; None for a run of `sft`.

    Returns:
        What summary.json holds; empty on ranks other than the main one.
    """
    distributed.on_main(lambda: check_scorer(config.evaluate))  # before what takes long
    judge = distributed.on_main(lambda: open_judge(config.evaluate))
    by_policy = _use_policy(config, policy, data, tokenizer)
    samples: ComparedSamples | None = None
    if by_policy.prompts:
        drawn = _use_reference(config, reference, data, by_policy)
        asked = asked_prompts(config.data, by_policy.prompts, tokenizer)
        samples = compare(drawn, asked, config.evaluate.scorer, tokenizer, judge)
        if samples.scorer_identity is not None:
            digests = {**digests, "scorer": f"{config.evaluate.scorer}, {samples.scorer_identity[:16]}"}
    if not distributed.is_main():
        return {}
    alive.loading("writing the report")
    report = _report(config, data, tokenizer, by_policy.scores, samples, digests, sections, what)
    folder = RunFolder(Path(config.run_dir)).report(config.evaluate.snapshot)
    write_report(report, folder, title=config.run_dir)
    if report.shown:
        terminal.note(terminal_table(report.shown, shutil.get_terminal_size((140, 24)).columns))
    terminal.event("evaluation", report.summary)
    terminal.summary(
        "evaluate",
        {
            "result": headline(report.summary),
            "report": f"{folder / 'report.html'}\nreport.md, figures and all samples are beside it",
        },
    )
    return report.summary


@dataclass(frozen=True, slots=True, kw_only=True)
class _ByPolicy:
    """Everything that needs the policy; without prompts, only the scores of the pairs."""

    scores: PairScores
    prompts: list[TokenIds]
    samples: list[Continuation]
    for_kl: list[PromptAndCompletion]
    logps: Float64s
    """(P,) of `for_kl` under the policy."""
    stop_ids: tuple[int, ...]
    """What ends a continuation, of both models."""


def _use_policy(
    config: Config, policy: ModelConfig, data: PreferenceData, tokenizer: PreTrainedTokenizerBase
) -> _ByPolicy:
    """Scores the held-out pairs and samples the policy; the model is freed on return."""
    options = config.evaluate
    prompts = []
    if options.num_prompts:
        positions = max_positions(policy)
        prompts = held_out_prompts(data.dataset, options.num_prompts, options.completion_tokens, positions)
    budget = token_budget(config.train.max_tokens_per_micro_batch)
    sharded = is_sharded(options.sharding, policy)
    with frozen_scorer(policy, sharded=sharded) as scorer:
        trees = probe_trees([data.dataset], at_least=_longest_sample(config, prompts))
        layout = settle_layout(scorer, trees, DTYPES[policy.dtype]).layout
        device = distributed.device()
        scores = score_pairs(
            scorer, data, config.loss, dtype=policy.dtype, layout=layout, budget=budget, device=device
        )
        if not prompts:
            return _ByPolicy(scores=scores, prompts=[], samples=[], for_kl=[], logps=np.zeros(0), stop_ids=())
        model = bare_scorer(scorer).model
        stop_ids = stop_ids_of(model, tokenizer)
        draw = partial(continue_prompts, model, prompts, options, stop_ids=stop_ids, sharded=sharded)
        samples = draw(progress="policy samples")
        others = draw(progress="samples for the KL", for_kl=True)
        for_kl = [(prompt, other.sampled_ids()) for prompt, other in zip(prompts, others, strict=True)]
        logps = log_probs(scorer, for_kl, layout, budget)
    return _ByPolicy(
        scores=scores, prompts=prompts, samples=samples, for_kl=for_kl, logps=logps, stop_ids=stop_ids
    )


def _longest_sample(config: Config, prompts: Sequence[TokenIds]) -> int:
    """Tokens of the longest sequence that sampling can make; 0 without prompts."""
    longest = max(map(len, prompts), default=0)
    return longest + config.evaluate.completion_tokens if prompts else 0


def _use_reference(
    config: Config,
    reference: ModelConfig,
    data: PreferenceData,
    by_policy: _ByPolicy,
) -> Samples:
    """Samples the reference, and scores the policy's samples for the KL with it."""
    gc.collect()  # the policy's modules refer to each other
    options, prompts = config.evaluate, by_policy.prompts
    budget = token_budget(config.train.max_tokens_per_micro_batch)
    sharded = is_sharded(options.sharding, reference)
    with frozen_scorer(reference, sharded=sharded) as scorer:
        trees = probe_trees([data.dataset], at_least=_longest_sample(config, prompts))
        layout = settle_layout(scorer, trees, DTYPES[reference.dtype]).layout
        by_reference = continue_prompts(
            bare_scorer(scorer).model,
            prompts,
            options,
            stop_ids=by_policy.stop_ids,
            sharded=sharded,
            progress="reference samples",
        )
        logps = log_probs(scorer, by_policy.for_kl, layout, budget)
    lengths = [len(completion) for _, completion in by_policy.for_kl]
    return Samples(
        prompts=prompts,
        reference=by_reference,
        policy=by_policy.samples,
        seed=options.seed,
        kl=kl_summary(by_policy.logps, logps, lengths, np.arange(len(prompts))),
    )


def _data_sections(
    config: Config,
    train_data: TokenizedDataset,
    test_data: TokenizedDataset,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Section]:
    """What the report says of the data; empty on ranks other than the main one. All ranks must call it."""
    datasets = {TRAINING: train_data, HELD_OUT: test_data}
    found: list[Section] = []

    def work() -> None:
        found.extend(data_sections(describe(datasets, cached_logps(config, datasets)), tokenizer))

    distributed.on_main(work)
    return found


def _report(
    config: Config,
    data: PreferenceData,
    tokenizer: PreTrainedTokenizerBase,
    scores: PairScores,
    samples: ComparedSamples | None,
    digests: dict[str, str],
    sections: Sequence[Section],
    what: Ran | None,
) -> Report:
    folder, last = RunFolder(Path(config.run_dir)), config.evaluate.snapshot
    history = read_history(folder) if learned_preferences(folder) else []
    provenance = provenance_of(
        folder,
        what,
        digests,
        held_out=counted(data.dataset),
        num_sampled=len(samples.prompts) if samples is not None else 0,
        model=config.model,
        reference=config.reference,
        loss=config.loss,
        train=config.train,
        evaluate=config.evaluate,
    )
    return compose(
        scores,
        samples,
        data=data.dataset,
        sections=sections,
        tokenizer=tokenizer,
        history=[line for line in history if last is None or line["step"] <= last],
        provenance=provenance,
        table_rows=config.evaluate.table_rows,
    )
