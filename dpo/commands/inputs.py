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
from dpo.data.build import open_datasets
from dpo.data.dataset import TokenizedDataset
from dpo.data.preference_data import PreferenceData, preference_data
from dpo.errors import UserError
from dpo.loss.catalog import averaged_over_groups
from dpo.model.files import check_token_ids, max_positions
from dpo.model.load import load_tokenizer
from dpo.reference.identity import reference_model
from dpo.reference.values import ReferenceUse
from dpo.reference.vocabulary import check_vocabulary
from dpo.train.resume import Settings


def quieten_libraries() -> None:
    """Silences what other libraries say that a user cannot act on."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
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
    data: DataConfig, model: ModelConfig
) -> tuple[TokenizedDataset, TokenizedDataset | None, PreTrainedTokenizerBase]:
    """Training and held-out data in token ids, and the policy's tokenizer."""
    alive.loading("opening the data")
    distributed.require_shared(Path(data.cache_dir), "data.cache_dir")
    tokenizer = load_tokenizer(model)
    train_data, test_data = open_datasets(data, tokenizer, max_positions(model))
    for data_set in (train_data, test_data):
        if data_set is not None:
            check_token_ids(model, data_set.largest_id, "model.name_or_path")
    return train_data, test_data, tokenizer


def open_reference_model(config: Config) -> ModelConfig:
    """The reference model, whose vocabulary is the policy's. All ranks must call it. Raises UserError."""
    terminal.warning(*distributed.on_main(lambda: check_vocabulary(config.model, config.reference)))
    return reference_model(config.model, config.reference)


def open_held_out(
    data: DataConfig, model: ModelConfig, command: str
) -> tuple[TokenizedDataset, TokenizedDataset, PreTrainedTokenizerBase]:
    """As `open_data`, for a command that needs held-out data."""
    train_data, test_data, tokenizer = open_data(data, model)
    if test_data is None:
        raise UserError(
            f"data.test: none given and none beside data.train; {command} needs held-out preferences"
        )
    return train_data, test_data, tokenizer


def with_reference(
    loss: LossConfig, datasets: Sequence[TokenizedDataset], reference: ReferenceUse
) -> list[PreferenceData]:
    """Each data set with what the loss reads of it."""
    by_margin, over_groups = loss.pair_weights == "score_margin", averaged_over_groups(loss)
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


def described(split: str, data: TokenizedDataset | None) -> str:
    """The split with `counted`, in one line."""
    return f"{split}: none" if data is None else f"{split}: {counted(data)}"


def counted(data: TokenizedDataset) -> str:
    """Pairs, prompts, and what was dropped or truncated."""
    counts = data.counts
    lost = [f"{n} {name}" for name, n in counts.items() if n and name.startswith(("dropped/", "truncated/"))]
    said = f"{counts['pairs']} pairs of {counts['groups']} prompts"
    return f"{said} ({', '.join(lost)})" if lost else said
