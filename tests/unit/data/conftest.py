"""A configuration's data, opened as a command does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from dpo.config import DataConfig
from dpo.data.build import open_datasets
from dpo.data.dataset import TokenizedDataset

Open = Callable[..., tuple[TokenizedDataset, TokenizedDataset | None]]


@pytest.fixture
def open_with(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Open:
    def open_it(train: Any, **options: Any) -> tuple[TokenizedDataset, TokenizedDataset | None]:
        data = DataConfig(train=train, cache_dir=str(tmp_path / "cache"), **options)
        return open_datasets(data, tokenizer, 64)

    return open_it
