"""The commands, each a script that reads top-down: check, load data, load one model, work, say what was
made.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo import distributed, engine, terminal
from dpo.cards import policy_card, sft_card
from dpo.checking import finished_model
from dpo.config import Config, ModelConfig, SftConfig
from dpo.data.dataset import TokenizedDataset, longest_tree
from dpo.data.opening import open_datasets
from dpo.data.plan import BatchPlan
from dpo.data.preference import PreferenceData, preference_data
from dpo.engine import Engine
from dpo.errors import UserError
from dpo.evaluate.baseline import best_of_reference, check_baseline
from dpo.evaluate.compose import learned_preferences
from dpo.evaluate.rewards import score_pairs
from dpo.evaluate.run import evaluate_run, held_out_prompts
from dpo.evaluate.watch import watched_samples
from dpo.frozen import token_budget
from dpo.loss.options import averaged_over_groups, needs_reference, title_of
from dpo.model.load import (
    load_tokenizer,
    max_positions,
    num_parameters,
)
from dpo.model.lora import check_policy, load_policy
from dpo.model.scratch import scratch_model, scratch_positions, scratch_tokenizer
from dpo.monitor import Evaluation
from dpo.planning.fit import Machine
from dpo.planning.report import page
from dpo.planning.run import as_json, make_plan
from dpo.reference.identity import reference_model
from dpo.reference.precompute import precompute
from dpo.reference.use import ReferenceUse, open_reference, reference_store
from dpo.running import (
    Guard,
    Work,
    base_fingerprint,
    check_space,
    check_start,
    guarded,
    optimize,
    quiet,
    start_of,
)
from dpo.train.preference import PreferenceObjective
from dpo.train.run_folder import claim_run
from dpo.train.sft import NextTokenObjective, held_out_loss, is_text, open_text_or_preferences, read_lines


def precompute_ref(config: Config) -> None:
    """Fills the reference cache with every sequence of the training and held-out data."""
    quiet()
    distributed.start()
    if not needs_reference(config.loss):
        used = title_of(config.loss)
        terminal.summary("precompute-ref", {"reference": f"not needed: {used}", "next": "dpo train"})
        return
    distributed.require_shared(Path(config.reference.cache_dir), "reference.cache_dir")
    train_data, test_data, _ = open_data(config)
    store = reference_store(config)
    result = precompute(config, [data for data in (train_data, test_data) if data is not None], store)
    rate = f", {result.misses / result.seconds:.1f} sequences/s" if result.misses else ""
    if result.misses and distributed.device().type == "cpu":
        rate += f" ({distributed.world_size()} rank(s) of one thread each: NPROC=N takes more cores)"
    nearest = store.nearest_other() if result.hits == 0 and distributed.is_main() else None
    terminal.summary(
        "precompute-ref",
        {
            "reference": f"{result.hits} sequences were there, {result.misses} computed{rate}",
            "cold": f"nothing was there before: {nearest}" if nearest else "",
            "cache": str(store.path),
            "data": f"{_counts('train', train_data)}\n{_counts('test', test_data)}",
            "next": "dpo train with the same configuration",
        },
    )


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
    reference = _open_reference(config, datasets, command)
    parts = _preference_data(config, datasets, reference)
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
    _settle_layout(policy, datasets)
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
        data=_counts("train", train_data),
        card=partial(policy_card, config),
    )
    optimize(config, work, guard)


def evaluate(config: Config) -> None:
    """Held-out metrics, samples of reference and policy side by side, and the report."""
    quiet()
    distributed.start()
    policy = finished_model(config)
    train_data, test_data, tokenizer = _open_held_out(config, "evaluate")
    command = "make precompute-ref CONFIG=... (the cache lacks rows of the held-out data)"
    reference = _open_reference(config, [test_data], command)
    found = evaluate_run(
        config,
        policy,
        reference_model(config),
        _preference_data(config, [test_data], reference)[0],
        tokenizer,
        {
            "training data": f"{config.data.train}, content {train_data.content_digest()[:16]}",
            "held-out data": f"content {test_data.content_digest()[:16]}",
            "reference cache": reference.description,
        },
    )
    if distributed.is_main() and learned_preferences(Path(config.run_dir)):
        (Path(policy.name_or_path) / "README.md").write_text(policy_card(config, found))


def best_of(config: Config) -> None:
    """Many continuations by the reference alone: best of n, and what no policy can exceed."""
    quiet()
    check_baseline(config.evaluate)
    distributed.start()
    _, test_data, tokenizer = _open_held_out(config, "best-of")
    best_of_reference(config, reference_model(config), test_data, tokenizer)


def plan(
    config: Config,
    *,
    num_gpus: int,
    gpu_memory: int,
    gpu_flops: float,
    mfu: float,
    exact: bool,
    as_numbers: bool,
) -> None:
    """Prints what training will need: for people, or with `as_numbers` as JSON."""
    quiet()
    machine = Machine(num_gpus=num_gpus, gpu_memory=gpu_memory, gpu_flops=gpu_flops, mfu=mfu)
    made = make_plan(config, machine, exact=exact)
    print(json.dumps(as_json(made), indent=2) if as_numbers else page(made))


def sft(config: SftConfig) -> None:
    """Next-token training of an existing model, or of one made here."""
    with guarded("sft", config) as guard:
        _sft(config, guard)


def _sft(config: SftConfig, guard: Guard) -> None:
    check_policy(config.model)
    accelerator = engine.start(config.model)
    engine.make_repeatable(config.train)
    start = start_of(config)
    claim_run(config)
    tokenizer, positions = _sft_tokenizer(config)
    train_data, test_data = open_text_or_preferences(config.data, tokenizer, positions)
    fingerprints = {"data.train": train_data.content_digest()}
    if test_data is not None:
        fingerprints["data.test"] = test_data.content_digest()
    fingerprints |= base_fingerprint(config, Path(config.data.cache_dir))
    universal = check_start(config, start, fingerprints)
    plan = BatchPlan(
        (train_data.pairs_per_group * 0) + 1,
        seed=config.train.seed,
        num_epochs=config.train.num_epochs,
        pairs_per_step=config.train.sequences_per_step,
        max_steps=config.train.max_steps,
    )
    dtype = engine.weight_dtype(accelerator, config.model)
    if config.model.scratch is not None:
        model: PreTrainedModel = scratch_model(
            config.model.scratch,
            tokenizer,
            seed=config.train.seed,
            dtype=dtype,
            attention=config.model.attention,
        )
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
        check_space(config, parameters, accelerator, plan.num_steps)
    else:
        check_space(config, num_parameters(config.model), accelerator, plan.num_steps)
        model = load_policy(config.model, dtype=dtype, seed=config.train.seed)
    policy = Engine(accelerator, model, config.model, config.train, universal=universal)
    _settle_layout(policy, [train_data])

    def evaluate_policy() -> Evaluation:
        assert test_data is not None
        values = held_out_loss(
            guard.score_only(policy),
            test_data,
            layout=policy.layout,
            budget=token_budget(config.train.max_tokens_per_micro_batch),
            device=policy.device,
        )
        return Evaluation(values=values)

    work = Work(
        policy=policy,
        objective=NextTokenObjective(dataset=train_data),
        plan=plan,
        tokenizer=tokenizer,
        start=start,
        universal=universal,
        fingerprints=fingerprints,
        evaluate=evaluate_policy if test_data is not None else None,
        data=f"{len(train_data)} sequences, {train_data.counts['tokens']} tokens",
        card=partial(sft_card, config),
    )
    optimize(config, work, guard)


def open_data(config: Config) -> tuple[TokenizedDataset, TokenizedDataset | None, PreTrainedTokenizerBase]:
    """Training and held-out data in token ids, and the policy's tokenizer."""
    distributed.require_shared(Path(config.data.cache_dir), "data.cache_dir")
    tokenizer = load_tokenizer(config.model)
    train_data, test_data = open_datasets(config.data, tokenizer, max_positions(config.model))
    return train_data, test_data, tokenizer


def _open_held_out(
    config: Config, command: str
) -> tuple[TokenizedDataset, TokenizedDataset, PreTrainedTokenizerBase]:
    """As `open_data`, for a command that needs held-out data."""
    train_data, test_data, tokenizer = open_data(config)
    if test_data is None:
        raise UserError(
            f"data.test: none given and none beside data.train; {command} needs held-out preferences"
        )
    return train_data, test_data, tokenizer


def _open_reference(config: Config, datasets: Sequence[TokenizedDataset], command: str) -> ReferenceUse:
    needed, per_token = needs_reference(config.loss), config.loss.ld_alpha is not None
    return open_reference(config, datasets, needed=needed, per_token=per_token, command=command)


def _preference_data(
    config: Config, datasets: Sequence[TokenizedDataset], reference: ReferenceUse
) -> list[PreferenceData]:
    """Each data set with what the loss reads of it."""
    by_margin, over_groups = config.loss.pair_weights == "score_margin", averaged_over_groups(config.loss)
    try:
        return [
            preference_data(data, values, by_margin=by_margin, over_groups=over_groups)
            for data, values in zip(datasets, reference.values, strict=True)
        ]
    except ValueError as error:
        raise UserError(
            f"loss.pair_weights: score_margin; the data has {error}: give data with prompt, completions and "
            "scores, or set equal"
        ) from error


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


def _settle_layout(policy: Engine, datasets: Sequence[TokenizedDataset]) -> None:
    if notes := policy.settle_layout(longest_tree(datasets)).notes:
        terminal.warning(*notes)


def _sft_tokenizer(config: SftConfig) -> tuple[PreTrainedTokenizerBase, int | None]:
    """Tokenizer and positions; a tokenizer that is trained is trained by rank 0 and read by all."""
    scratch = config.model.scratch
    if scratch is None:
        return load_tokenizer(config.model), max_positions(config.model)
    folder = Path(config.run_dir) / "tokenizer"

    def make() -> None:
        if scratch.tokenizer is None and not is_text(config.data.train):
            raise UserError(
                "data.train: a tokenizer is trained on text files; give text, or model.scratch.tokenizer"
            )
        scratch_tokenizer(scratch, read_lines(config.data.train, "data.train")).save_pretrained(folder)

    distributed.on_main(make)
    return load_tokenizer(ModelConfig(name_or_path=str(folder))), scratch_positions(scratch)


def _counts(split: str, data: TokenizedDataset | None) -> str:
    if data is None:
        return f"{split}: none"
    counts = data.counts
    lost = [f"{n} {name}" for name, n in counts.items() if n and name.startswith(("dropped/", "truncated/"))]
    said = f"{split}: {counts['pairs']} pairs of {counts['groups']} prompts"
    return f"{said} ({', '.join(lost)})" if lost else said
