"""`dpo train`: optimizes the policy on preferences, with reference log-probs from the cache.

One set of weights is loaded. It reads top-down: open data and cache, decide where to start, load the model,
audit the cache, run the loop, export.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dpo import alive, distributed, terminal
from dpo.commands.amount import preference_plan, ran, warn_of_amount
from dpo.commands.inputs import counted, described, open_data, open_reference_model, with_reference
from dpo.commands.settings import settings_of
from dpo.commands.training import run_training, settle_layout, summarize
from dpo.config import Config, EvaluateConfig, LossConfig
from dpo.data.dataset import TokenizedDataset
from dpo.data.preference_data import PreferenceData
from dpo.data.records import NO_RIVAL
from dpo.data.tokenize import ENOUGH_REFERENCE_SCORES, FEW_REFERENCE_SCORES
from dpo.engine.engine import Engine
from dpo.engine.scoring import token_budget
from dpo.engine.world import make_repeatable, start
from dpo.evaluate.rewards import score_pairs
from dpo.evaluate.samples import held_out_prompts
from dpo.guards.guard import Guard
from dpo.loss.catalog import names_of, needs_quantiles, needs_reference, needs_whole_step
from dpo.model.files import max_positions, num_parameters
from dpo.model.load import DTYPES
from dpo.model.lora import check_policy, load_policy
from dpo.reference.values import open_reference
from dpo.report.model_card import policy_card
from dpo.report.watch import watched_samples
from dpo.tracking.metrics import Evaluation
from dpo.tracking.run_folder import RunFolder
from dpo.train.moving_reference import MovingReference, note_of_updates
from dpo.train.preference_objective import PreferenceObjective
from dpo.train.session import Session
from dpo.train.setup import base_fingerprint, check_space, needs_resharding, start_of

FEW_PAIRS = 16
"""Pairs of a step below which a loss that compares them is warned of."""
SHOWN = ("eval/loss", "eval/rewards/accuracies", "eval/rewards/margins")


def train(config: Config) -> dict[str, float]:
    """Optimizes the policy and exports it to RUN_DIR/model.

    Returns:
        The last held-out metrics by name; empty without held-out data, or if the run had finished before.
    """
    session = run_training("train", config, build_session)
    following = f"dpo evaluate --config {session.folder.config}" if session.evaluate is not None else ""
    summarize("train", session, SHOWN, following)
    return dict(session.evaluated)


def build_session(config: Config, guard: Guard) -> Session:
    """The run with everything loaded. All ranks must call it."""
    folder, settings = RunFolder(Path(config.run_dir)), settings_of(config)
    check_policy(config.model)
    accelerator = start(config.model)
    make_repeatable(config.train)
    checkpoint = start_of(folder, settings, config.train)

    train_data, test_data, tokenizer = open_data(config.data, config.model, config.loss)
    datasets = [train_data] if test_data is None else [train_data, test_data]
    names = ("data.train", "data.test")
    fingerprints = {name: data.content_digest() for name, data in zip(names, datasets, strict=False)}
    fingerprints |= base_fingerprint(config.model, Path(config.reference.cache_dir))
    if config.loss.pair_weights == "score_margin":
        fingerprints["scores of data.train"] = train_data.margins_digest()
    if needs_quantiles(config.loss):
        fingerprints["quantiles of data.train"] = train_data.quantiles_digest()
    resharded = needs_resharding(checkpoint, fingerprints, config.train)

    reference = open_reference(
        open_reference_model(config),
        config.reference,
        datasets,
        needed=needs_reference(config.loss),
        per_token=config.loss.ld_alpha is not None,
        command="make precompute-ref CONFIG=... (or: dpo precompute-ref with the same keys as "
        f"{config.run_dir})",
    )
    parts = with_reference(config.loss, datasets, reference)
    plan = preference_plan(train_data, config.train)
    warn_of_amount(plan.num_steps, config.model, config.train)
    terminal.warning(*cautions(config.loss, config.train.pairs_per_step, train_data))
    check_space(
        folder,
        config.model,
        config.train,
        accelerator,
        num_parameters=num_parameters(config.model),
        num_steps=plan.num_steps,
        num_references=int(config.reference.update_every > 0),
    )
    audited_with_policy = checkpoint is None and reference.audit_apart(config.model)
    dtype = DTYPES[config.model.dtype]
    alive.loading("loading the policy")
    model = load_policy(config.model, dtype=dtype, seed=config.train.seed)
    alive.loading("preparing the engine")
    policy = Engine(accelerator, model, config.model, config.train, universal=resharded)
    settle_layout(policy, datasets)
    if audited_with_policy:
        reference.audit_with(policy.score_only)
    distributed.on_main(lambda: folder.claim(dict(settings.values)))
    reference.record(folder.path, checkpoint)

    objective = PreferenceObjective(data=parts[0], loss_config=config.loss, dtype=config.model.dtype)
    moving = None
    if config.reference.update_every:
        moving = MovingReference(
            objective=objective,
            plan=plan,
            model=config.model,
            options=config.reference,
            folder=folder.moved_reference,
        )
        terminal.note(note_of_updates(config.reference.update_every, plan.num_steps))
    evaluate = partial(
        evaluate_policy,
        held_out=parts[-1],
        loss=config.loss,
        options=config.evaluate,
        positions=max_positions(config.model),
    )
    return Session(
        folder=folder,
        settings=settings,
        model=config.model,
        options=config.train,
        engine=policy,
        objective=objective,
        moving_reference=moving,
        plan=plan,
        tokenizer=tokenizer,
        description=described("train", train_data),
        guard=guard,
        evaluate=evaluate if test_data is not None else None,
        card=partial(
            policy_card,
            title=folder.path.name,
            model=config.model,
            data=config.data,
            reference=config.reference,
            loss=config.loss,
            train=config.train,
            ran=ran(
                plan.num_steps,
                config.train,
                counted(train_data),
                counted(test_data) if test_data is not None else "",
            ),
        ),
        fingerprints=fingerprints,
        checkpoint=checkpoint,
        resharded=resharded,
    )


def cautions(loss: LossConfig, pairs_per_step: int, data: TokenizedDataset) -> list[str]:
    """What a loss of the whole step, or of labels, will hardly learn from.

    Args:
        loss: The training loss.
        pairs_per_step: Pairs, or labelled completions, of a step.
        data: Of training.
    """
    found, names = [], names_of(loss)
    if needs_whole_step(loss) and pairs_per_step < FEW_PAIRS:
        found.append(
            f"train.pairs_per_step: {pairs_per_step}; {', '.join(names)} compares the pairs of a step, and "
            f"so few say little about all: take {FEW_PAIRS} or more"
        )
    if needs_quantiles(loss) and (few := data.counts.get(FEW_REFERENCE_SCORES)):
        found.append(
            f"data.train: {few} prompts have fewer than {ENOUGH_REFERENCE_SCORES} scores of the reference; "
            "qrpo learns where a completion lies among them: give more samples of each prompt"
        )
    if "kto" in names:
        desirable, undesirable = (int((data.pairs[:, place] != NO_RIVAL).sum()) for place in (0, 1))
        ratio = loss.desirable_weight * desirable / (loss.undesirable_weight * undesirable)
        if not 0.99 < ratio < 1.35:
            found.append(
                f"loss.desirable_weight: {loss.desirable_weight:g} x {desirable} desirable completions is "
                f"{ratio:.2f} times {loss.undesirable_weight:g} x {undesirable} undesirable ones; the paper "
                "of kto advises 1 to 1.33: set one of the two weights"
            )
    return found


def evaluate_policy(
    session: Session,
    *,
    held_out: PreferenceData,
    loss: LossConfig,
    options: EvaluateConfig,
    positions: int | None,
) -> Evaluation:
    """The current policy on all held-out pairs, and a few samples to watch. All ranks must call it.

    Raises:
        StopRequestedError: A rank has been asked to stop.
    """
    policy = session.engine
    samples = watch(policy, held_out.dataset, session.tokenizer, options, positions)
    scores = score_pairs(
        session.score_only,
        held_out,
        loss,
        dtype=session.model.dtype,
        layout=policy.layout,
        budget=token_budget(session.options.max_tokens_per_micro_batch),
        device=policy.device,
    )
    return Evaluation(values=scores.means(), counts=scores.counts(), margins=scores.margins, samples=samples)


def watch(
    policy: Engine,
    held_out: TokenizedDataset,
    tokenizer: PreTrainedTokenizerBase,
    options: EvaluateConfig,
    positions: int | None,
) -> str | None:
    """How the policy continues a few held-out prompts right now, as a table; None if none are asked for."""
    if not options.watched_prompts:
        return None
    if positions is not None:  # training does not fail for lack of room to watch it
        options = replace(options, completion_tokens=min(options.completion_tokens, positions // 2))
    prompts = held_out_prompts(held_out, options.watched_prompts, options.completion_tokens, positions)
    with policy.sampling_model() as model:
        return watched_samples(model, prompts, tokenizer, options, sharded=policy.is_sharded)
