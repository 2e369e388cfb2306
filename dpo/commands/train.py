"""dpo train."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dpo import terminal
from dpo.commands.inputs import described, open_data, open_reference_for, with_reference
from dpo.config import Config
from dpo.data.dataset import TokenizedDataset, longest_tree
from dpo.data.plan import BatchPlan
from dpo.engine import engine
from dpo.engine.engine import Engine
from dpo.engine.scoring import token_budget
from dpo.evaluate.rewards import score_pairs
from dpo.evaluate.samples import held_out_prompts
from dpo.guards.guard import Guard, guarded
from dpo.model.files import max_positions, num_parameters
from dpo.model.lora import check_policy, load_policy
from dpo.report.model_card import policy_card
from dpo.report.watch import watched_samples
from dpo.tracking.metrics import Evaluation
from dpo.tracking.run_folder import claim_run
from dpo.train.preference_objective import PreferenceObjective
from dpo.train.session import Work, optimize
from dpo.train.setup import base_fingerprint, check_space, check_start, start_of


def train(config: Config) -> None:
    """Optimizes the policy; the reference comes from the cache, and one set of weights is loaded."""
    with guarded("train", config) as guard:
        _train(config, guard)


def _train(config: Config, guard: Guard) -> None:
    check_policy(config.model)
    accelerator = engine.start(config.model)
    engine.make_repeatable(config.train)
    start = start_of(config)
    train_data, test_data, tokenizer = open_data(config)
    datasets = [data for data in (train_data, test_data) if data is not None]
    names = ["data.train", "data.test"][: len(datasets)]
    fingerprints = {name: data.content_digest() for name, data in zip(names, datasets, strict=True)}
    fingerprints |= base_fingerprint(config, Path(config.reference.cache_dir))
    if config.loss.pair_weights == "score_margin":
        fingerprints["scores of data.train"] = train_data.margins_digest()
    universal = check_start(config, start, fingerprints)
    command = (
        f"make precompute-ref CONFIG=... (or: dpo precompute-ref with the same keys as {config.run_dir})"
    )
    reference = open_reference_for(config, datasets, command)
    parts = with_reference(config, datasets, reference)
    objective = PreferenceObjective(data=parts[0], loss_config=config.loss)
    plan = BatchPlan(
        train_data.pairs_per_group,
        seed=config.train.seed,
        num_epochs=config.train.num_epochs,
        pairs_per_step=config.train.pairs_per_step,
        max_steps=config.train.max_steps,
    )
    check_space(config, num_parameters(config.model), accelerator, plan.num_steps)
    audited_with_policy = start is None and reference.audit_apart(config)
    dtype = engine.weight_dtype(accelerator, config.model)
    model = load_policy(config.model, dtype=dtype, seed=config.train.seed)
    policy = Engine(accelerator, model, config.model, config.train, universal=universal)
    settle_layout(policy, datasets)
    if audited_with_policy:
        reference.audit_with(policy.score_only, config)
    if start is None:
        claim_run(config)
    reference.record(config, start)

    def evaluate_policy() -> Evaluation:
        assert test_data is not None
        samples = _watched_samples(policy, config, test_data, tokenizer)
        scores = score_pairs(
            guard.score_only(policy),
            parts[-1],
            config.loss,
            layout=policy.layout,
            budget=token_budget(config.train.max_tokens_per_micro_batch),
            device=policy.device,
        )
        return Evaluation(values=scores.means(), margins=scores.margins, samples=samples)

    work = Work(
        policy=policy,
        objective=objective,
        plan=plan,
        tokenizer=tokenizer,
        start=start,
        universal=universal,
        fingerprints=fingerprints,
        evaluate=evaluate_policy if test_data is not None else None,
        data=described("train", train_data),
        card=partial(
            policy_card,
            title=Path(config.run_dir).name,
            model=config.model,
            data=config.data,
            reference=config.reference,
            loss=config.loss,
            train=config.train,
        ),
    )
    optimize(config, work, guard)


def _watched_samples(
    policy: Engine, config: Config, test_data: TokenizedDataset, tokenizer: PreTrainedTokenizerBase
) -> str | None:
    """What the policy makes of a few held-out prompts right now, as a table."""
    options = config.evaluate
    if not options.watched_prompts:
        return None
    positions = max_positions(config.model)
    if positions is not None:  # a training does not fail for lack of room to watch it
        options = replace(options, completion_tokens=min(options.completion_tokens, positions // 2))
    prompts = held_out_prompts(test_data, options.watched_prompts, options.completion_tokens, positions)
    with policy.sampling_model() as model:
        return watched_samples(model, prompts, tokenizer, options, sharded=policy.is_sharded)


def settle_layout(policy: Engine, datasets: Sequence[TokenizedDataset]) -> None:
    """Settles the policy's layout on the longest group of these data sets; warns of what was turned down."""
    if notes := policy.settle_layout(longest_tree(datasets)).notes:
        terminal.warning(*notes)
