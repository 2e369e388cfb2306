"""dpo sft."""

from functools import partial
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo import distributed
from dpo.commands.train import settle_layout
from dpo.config import ModelConfig, SftConfig
from dpo.data.plan import BatchPlan
from dpo.data.text import is_text, open_text_or_preferences, read_lines
from dpo.engine import engine
from dpo.engine.engine import Engine
from dpo.engine.scoring import token_budget
from dpo.errors import UserError
from dpo.guards.guard import Guard, guarded
from dpo.model.files import max_positions, num_parameters
from dpo.model.from_scratch import scratch_model, scratch_positions, scratch_tokenizer
from dpo.model.load import load_tokenizer
from dpo.model.lora import check_policy, load_policy
from dpo.report.model_card import sft_card
from dpo.tracking.metrics import Evaluation
from dpo.tracking.run_folder import claim_run
from dpo.train.next_token_objective import NextTokenObjective, held_out_loss
from dpo.train.session import Work, optimize
from dpo.train.setup import base_fingerprint, check_space, check_start, start_of


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
    settle_layout(policy, [train_data])

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
        card=partial(
            sft_card,
            title=Path(config.run_dir).name,
            model=config.model,
            data=config.data,
            train=config.train,
        ),
    )
    optimize(config, work, guard)


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
