"""Command lines that are parsed or refused, for the tests of the command line."""

import pytest

from dpo.cli.parse import parse
from dpo.config import Config
from dpo.errors import UserError

REQUIRED = ["--model.name_or_path", "m", "--data.train", "d"]


def refusal(*arguments: str, command: str = "train") -> list[str]:
    """The lines of the message; the first one counts the problems."""
    with pytest.raises(UserError) as raised:
        parse(command, arguments)
    return str(raised.value).splitlines()


def parsed(*arguments: str) -> Config:
    config = parse("train", [*REQUIRED, *arguments])
    assert isinstance(config, Config)
    return config
