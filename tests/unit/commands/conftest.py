"""What tests of several commands start from."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from unit.data.test_conversations import TEMPLATE


@pytest.fixture
def make_chat_model(tiny_model: Path) -> Callable[[Path], Path]:
    """Writes the tiny model with a chat template to a folder."""

    def make(folder: Path) -> Path:
        shutil.copytree(tiny_model, folder)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(folder)
        return folder

    return make
