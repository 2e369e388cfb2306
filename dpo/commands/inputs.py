"""What several commands open before they work: data sets, the reference cache."""

import json
import logging
import sys
import warnings
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from dpo import alive, distributed, terminal
from dpo.config import Config, DataConfig, LossConfig, ModelConfig, SftConfig, flat, resolved
from dpo.data.build import open_datasets, test_sources_of
from dpo.data.dataset import TokenizedDataset
from dpo.data.notes import RowNotes
from dpo.data.parts import groups_of
from dpo.data.preference_data import PreferenceData, preference_data
from dpo.data.records import NO_RIVAL, TokenIds
from dpo.data.sources import blocks
from dpo.errors import UserError
from dpo.evaluate.asked import Asked, asked_of
from dpo.evaluate.samples import texts_of
from dpo.loss.catalog import (
    LOSSES,
    averaged_over_groups,
    names_of,
    needs_mismatched,
    needs_quantiles,
    takes_labels,
)
from dpo.model.files import check_token_ids, max_positions
from dpo.model.load import load_tokenizer
from dpo.reference.identity import reference_model
from dpo.reference.values import ReferenceUse
from dpo.reference.vocabulary import check_vocabulary
from dpo.train.resume import Settings


def quieten_libraries() -> None:
    """Silences what other libraries say that a user cannot act on."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it names kernels that we do not use
    if terminal.mode() != "plain" or not sys.stderr.isatty():
        disable_progress_bar()  # of loading and writing weights
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def settings_of(config: Config | SftConfig) -> Settings:
    """The resolved configuration with the defaults of its keys, as resuming compares it."""
    return Settings(resolved(config), flat(_defaults(type(config))))


def _defaults(kind: type) -> dict[str, Any]:
    """Name -> default of a configuration class, nested; without keys that have none."""
    found: dict[str, Any] = {}
    hints = get_type_hints(kind)
    for option in fields(kind):
        if is_dataclass(hints[option.name]):
            found[option.name] = _defaults(hints[option.name])
        elif option.default is not MISSING:
            found[option.name] = option.default
        elif option.default_factory is not MISSING:
            found[option.name] = option.default_factory()
    return dict(json.loads(json.dumps(found)))


def open_data(
    data: DataConfig, model: ModelConfig, loss: LossConfig | None = None
) -> tuple[TokenizedDataset, TokenizedDataset | None, PreTrainedTokenizerBase]:
    """Training and held-out data in token ids, and the policy's tokenizer.

    Args:
        data: Where the data is.
        model: The policy.
        loss: What the data is for: refused if it lacks what the loss needs. Default: nothing in particular.
    """
    alive.loading("opening the data")
    distributed.require_shared(Path(data.cache_dir), "data.cache_dir")
    tokenizer = load_tokenizer(model)
    mismatched = loss is not None and needs_mismatched(loss)
    train_data, test_data = open_datasets(data, tokenizer, max_positions(model), mismatched=mismatched)
    if loss is not None:
        check_labels(loss, train_data, test_data)
    for data_set in (train_data, test_data):
        if data_set is not None:
            check_token_ids(model, data_set.largest_id, "model.name_or_path")
    return train_data, test_data, tokenizer


def open_reference_model(config: Config) -> ModelConfig:
    """The reference model, whose vocabulary is the policy's. All ranks must call it. Raises UserError."""
    terminal.warning(*distributed.on_main(lambda: check_vocabulary(config.model, config.reference)))
    return reference_model(config.model, config.reference)


def open_held_out(
    data: DataConfig, model: ModelConfig, command: str, loss: LossConfig | None = None
) -> tuple[TokenizedDataset, TokenizedDataset, PreTrainedTokenizerBase]:
    """As `open_data`, for a command that needs held-out data."""
    train_data, test_data, tokenizer = open_data(data, model, loss)
    if test_data is None:
        raise UserError(
            f"data.test: none given and none beside data.train; {command} needs held-out preferences"
        )
    return train_data, test_data, tokenizer


def asked_prompts(
    data: DataConfig, prompts: Sequence[TokenIds], tokenizer: PreTrainedTokenizerBase
) -> list[Asked]:
    """Held-out prompts with the turns that they were made of. All ranks must call it."""

    def read() -> list[Asked]:
        groups = (
            group
            for source in test_sources_of(data)
            for block in blocks(source)
            for group in groups_of(source, block, data, RowNotes())
        )
        return asked_of(prompts, texts_of(prompts, tokenizer), groups, tokenizer)

    return distributed.on_main(read)


def with_reference(
    loss: LossConfig, datasets: Sequence[TokenizedDataset], reference: ReferenceUse
) -> list[PreferenceData]:
    """Each data set with what the loss reads of it."""
    by_margin, over_groups = loss.pair_weights == "score_margin", averaged_over_groups(loss)
    try:
        return [
            preference_data(
                data,
                values,
                by_margin=by_margin,
                over_groups=over_groups,
                mismatched=needs_mismatched(loss),
                with_quantiles=needs_quantiles(loss),
            )
            for data, values in zip(datasets, reference.values, strict=True)
        ]
    except ValueError as error:
        wanted, instead = (
            ("loss.pair_weights: score_margin", "set equal")
            if by_margin
            else ("loss.type: qrpo", "another loss")
        )
        raise UserError(
            f"{wanted}; the data has {error}: give data with prompt, completions and scores, or {instead}"
        ) from error


def check_labels(loss: LossConfig, train: TokenizedDataset, test: TokenizedDataset | None) -> None:
    """Raises UserError where data has labels and the loss needs pairs, or all labels are the same."""
    for key, data in (("data.train", train), ("data.test", test)):
        if data is None or data.has_rivals.all():
            continue
        refuse_labels(loss, key, data.contents)
        for place, label in ((1, "true"), (0, "false")):
            if (data.pairs[:, place] == NO_RIVAL).all():
                raise UserError(
                    f"{key}: all {len(data.pairs)} labels are {label}; expected desirable and undesirable "
                    "completions: add rows of the other label"
                )


def refuse_labels(loss: LossConfig, key: str, contents: str) -> None:
    """Raises UserError where the loss, or an option of it, needs pairs.

    Args:
        loss: With its options.
        key: The option that names the data.
        contents: What the data has, for the message.
    """
    if not takes_labels(loss):
        fitting = ", ".join(name for name, kind in LOSSES.items() if kind.takes_labels)
        raise UserError(
            f"loss.type: {', '.join(names_of(loss))}; it needs pairs, and {key} has {contents}: use one of "
            f"{fitting}, or rows of chosen and rejected"
        )
    for name in ("ld_alpha", "pair_weights"):
        if (value := getattr(loss, name)) != getattr(LossConfig(), name):
            raise UserError(f"loss.{name}: {value}; it needs pairs, and {key} has {contents}: leave it out")


def described(split: str, data: TokenizedDataset | None) -> str:
    """The split with `counted`, in one line."""
    return f"{split}: none" if data is None else f"{split}: {counted(data)}"


def counted(data: TokenizedDataset) -> str:
    """Pairs, prompts, and what was dropped or truncated."""
    counts = data.counts
    lost = [f"{n} {name}" for name, n in counts.items() if n and name.startswith(("dropped/", "truncated/"))]
    said = data.contents
    return f"{said} ({', '.join(lost)})" if lost else said
