"""The commands, each a script that reads top-down: check, load data, load one model, work, say what was
made.
"""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dpo import distributed
from dpo.config import Config
from dpo.data.build import open_datasets
from dpo.data.dataset import TokenizedDataset
from dpo.data.preference_data import PreferenceData, preference_data
from dpo.errors import UserError
from dpo.loss.catalog import averaged_over_groups, needs_reference
from dpo.model.files import max_positions
from dpo.model.load import load_tokenizer
from dpo.reference.identity import reference_model
from dpo.reference.values import ReferenceUse, open_reference


def open_data(config: Config) -> tuple[TokenizedDataset, TokenizedDataset | None, PreTrainedTokenizerBase]:
    """Training and held-out data in token ids, and the policy's tokenizer."""
    distributed.require_shared(Path(config.data.cache_dir), "data.cache_dir")
    tokenizer = load_tokenizer(config.model)
    train_data, test_data = open_datasets(config.data, tokenizer, max_positions(config.model))
    return train_data, test_data, tokenizer


def open_held_out(
    config: Config, command: str
) -> tuple[TokenizedDataset, TokenizedDataset, PreTrainedTokenizerBase]:
    """As `open_data`, for a command that needs held-out data."""
    train_data, test_data, tokenizer = open_data(config)
    if test_data is None:
        raise UserError(
            f"data.test: none given and none beside data.train; {command} needs held-out preferences"
        )
    return train_data, test_data, tokenizer


def open_reference_for(config: Config, datasets: Sequence[TokenizedDataset], command: str) -> ReferenceUse:
    """The cache as the configured loss uses it; UserError names `command` where rows are missing."""
    needed, per_token = needs_reference(config.loss), config.loss.ld_alpha is not None
    model = reference_model(config.model, config.reference)
    return open_reference(
        model, config.reference, datasets, needed=needed, per_token=per_token, command=command
    )


def with_reference(
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


def described(split: str, data: TokenizedDataset | None) -> str:
    """Pairs, prompts and what was dropped or cut, in one line."""
    if data is None:
        return f"{split}: none"
    counts = data.counts
    lost = [f"{n} {name}" for name, n in counts.items() if n and name.startswith(("dropped/", "truncated/"))]
    said = f"{split}: {counts['pairs']} pairs of {counts['groups']} prompts"
    return f"{said} ({', '.join(lost)})" if lost else said
