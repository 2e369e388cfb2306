"""What several commands open before they work: data sets, the reference cache."""

import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from dpo import alive, distributed, terminal
from dpo.commands.labels import check_labels
from dpo.config import Config, DataConfig, LossConfig, ModelConfig
from dpo.data.build import open_datasets, test_sources_of
from dpo.data.dataset import TokenizedDataset
from dpo.data.notes import RowNotes
from dpo.data.parts import groups_of
from dpo.data.preference_data import PreferenceData, preference_data
from dpo.data.records import TokenIds
from dpo.data.sources import blocks
from dpo.errors import UserError
from dpo.evaluate.asked import Asked, asked_of
from dpo.evaluate.samples import texts_of
from dpo.loss.catalog import (
    averaged_over_groups,
    needs_mismatched,
    needs_quantiles,
)
from dpo.model.files import check_token_ids, max_positions
from dpo.model.tokenizer import load_tokenizer
from dpo.reference.identity import reference_model
from dpo.reference.values import ReferenceUse
from dpo.reference.vocabulary import check_vocabulary


def quieten_libraries() -> None:
    """Silences what other libraries say that a user cannot act on."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it names kernels that we do not use
    if terminal.mode() != "plain" or not sys.stderr.isatty():
        disable_progress_bar()  # of loading and writing weights
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


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


def described(split: str, data: TokenizedDataset | None) -> str:
    """The split with `counted`, in one line."""
    return f"{split}: none" if data is None else f"{split}: {counted(data)}"


def counted(data: TokenizedDataset) -> str:
    """Pairs, prompts, and what was dropped or truncated."""
    counts = data.counts
    lost = [f"{n} {name}" for name, n in counts.items() if n and name.startswith(("dropped/", "truncated/"))]
    said = data.contents
    return f"{said} ({', '.join(lost)})" if lost else said
