"""`dpo sft`: next-token training of an existing model, or of one made here."""

from functools import partial
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo import alive, distributed
from dpo.commands.amount import ran, warn_of_amount
from dpo.commands.settings import settings_of
from dpo.commands.training import run_training, settle_layout, summarize
from dpo.config import ModelConfig, SftConfig
from dpo.data.dataset import TokenizedDataset
from dpo.data.plan import BatchPlan
from dpo.data.records import NO_RIVAL
from dpo.data.text import is_text, open_text_or_preferences, read_lines
from dpo.engine.engine import Engine
from dpo.engine.scoring import token_budget
from dpo.engine.world import make_repeatable, start
from dpo.errors import UserError
from dpo.guards.guard import Guard
from dpo.model.files import check_token_ids, max_positions, num_parameters
from dpo.model.from_scratch import scratch_model, scratch_positions, scratch_tokenizer
from dpo.model.load import DTYPES
from dpo.model.lora import check_policy, load_policy
from dpo.model.quantized import num_elements
from dpo.model.tokenizer import load_tokenizer
from dpo.report.model_card import sft_card
from dpo.tracking.metrics import Evaluation
from dpo.tracking.run_folder import RunFolder
from dpo.train.next_token_objective import NextTokenObjective, held_out_loss
from dpo.train.session import Session
from dpo.train.setup import base_fingerprint, check_space, needs_resharding, start_of


def sft(config: SftConfig) -> None:
    """Trains a model on text or on chosen completions and exports it to RUN_DIR/model."""
    summarize("sft", run_training("sft", config, build_session), ["eval/loss"])


def build_session(config: SftConfig, guard: Guard) -> Session:
    """The run with everything loaded. All ranks must call it."""
    folder, settings = RunFolder(Path(config.run_dir)), settings_of(config)
    check_policy(config.model)
    accelerator = start(config.model)
    make_repeatable(config.train)
    checkpoint = start_of(folder, settings, config.train)
    distributed.on_main(lambda: folder.claim(dict(settings.values)))

    tokenizer, positions = open_tokenizer(config, folder)
    train_data, test_data = open_text_or_preferences(config.data, tokenizer, positions)
    for data in (train_data, test_data):
        if data is not None:
            refuse_undesirable(data)
        if data is not None and config.model.scratch is None:
            check_token_ids(config.model, data.largest_id, "model.name_or_path")
    fingerprints = {"data.train": train_data.content_digest()}
    if test_data is not None:
        fingerprints["data.test"] = test_data.content_digest()
    fingerprints |= base_fingerprint(config.model, Path(config.data.cache_dir))
    resharded = needs_resharding(checkpoint, fingerprints, config.train)

    plan = BatchPlan(
        train_data.pairs_per_group * 0 + 1,  # a sequence counts as one pair
        seed=config.train.seed,
        num_epochs=config.train.num_epochs,
        pairs_per_step=config.train.sequences_per_step,
        max_steps=config.train.max_steps,
    )
    warn_of_amount(plan.num_steps, config.model, config.train)
    alive.loading("loading the model")
    dtype, scratch = DTYPES[config.model.dtype], config.model.scratch
    model = None
    if scratch is not None:
        model = scratch_model(
            scratch, tokenizer, seed=config.train.seed, dtype=dtype, attention=config.model.attention
        )
        parameters = num_elements(model.parameters())
    else:
        parameters = num_parameters(config.model)
    check_space(
        folder,
        config.model,
        config.train,
        accelerator,
        num_parameters=parameters,
        num_steps=plan.num_steps,
    )
    model = model or load_policy(config.model, dtype=dtype, seed=config.train.seed)
    alive.loading("preparing the engine")
    policy = Engine(accelerator, model, config.model, config.train, universal=resharded)
    settle_layout(policy, [data for data in (train_data, test_data) if data is not None])
    described = f"{len(train_data)} sequences, {train_data.counts['tokens']} tokens"
    return Session(
        folder=folder,
        settings=settings,
        model=config.model,
        options=config.train,
        engine=policy,
        objective=NextTokenObjective(dataset=train_data),
        plan=plan,
        tokenizer=tokenizer,
        description=described,
        guard=guard,
        evaluate=partial(evaluate_policy, held_out=test_data) if test_data is not None else None,
        card=partial(
            sft_card,
            title=folder.path.name,
            model=config.model,
            data=config.data,
            train=config.train,
            ran=ran(
                plan.num_steps,
                config.train,
                described,
                f"{len(test_data)} sequences" if test_data is not None else "",
            ),
        ),
        fingerprints=fingerprints,
        checkpoint=checkpoint,
        resharded=resharded,
    )


def evaluate_policy(session: Session, *, held_out: TokenizedDataset) -> Evaluation:
    """The current policy's held-out loss. All ranks must call it.

    Raises:
        StopRequestedError: A rank has been asked to stop.
    """
    values = held_out_loss(
        session.score_only,
        held_out,
        layout=session.engine.layout,
        budget=token_budget(session.options.max_tokens_per_micro_batch),
        device=session.engine.device,
    )
    return Evaluation(values=values)


def open_tokenizer(config: SftConfig, folder: RunFolder) -> tuple[PreTrainedTokenizerBase, int | None]:
    """Tokenizer and positions of the model; a tokenizer that is trained is trained by rank 0, read by all."""
    scratch = config.model.scratch
    if scratch is None:
        return load_tokenizer(config.model), max_positions(config.model)

    def make() -> None:
        train = config.data.train
        if scratch.tokenizer is None and not is_text(train):
            raise UserError(
                "data.train: a tokenizer is trained on text files; give text, or model.scratch.tokenizer"
            )
        lines = read_lines(train, "data.train") if is_text(train) else ()
        scratch_tokenizer(scratch, lines).save_pretrained(folder.tokenizer)

    distributed.on_main(make)
    return load_tokenizer(ModelConfig(name_or_path=str(folder.tokenizer))), scratch_positions(scratch)


def refuse_undesirable(data: TokenizedDataset) -> None:
    """Raises UserError where a prompt has no completion to learn, since all are labelled undesirable."""
    groups = np.repeat(np.arange(len(data)), data.pairs_per_group)
    bad = np.setdiff1d(groups, groups[data.pairs[:, 0] != NO_RIVAL])
    if len(bad):
        raise UserError(
            f"data.train: {len(bad)} of {len(data)} prompts have completions with the label false alone; sft "
            "learns those with the label true: leave the other rows out"
        )
