"""The options of `dpo chat`."""

import argparse
import os
from pathlib import Path
from typing import cast

from dpo.cli.parse import parse
from dpo.config import Config
from dpo.errors import UserError

USAGE = """usage: dpo chat RUN [--tokens 128] [--temperature 0.7] [--seed 0] [--text]

Talk to the reference and to the policy that RUN trained, side by side, with the same random numbers. Holds
both models in memory, in one process. A model with a chat template answers, and remembers the conversation;
another one continues what you type.

RUN            the folder of a finished run
--tokens       longest answer
--temperature  0 takes the likeliest token
--seed         of the first answer; each further one adds 1
--text         continue the text as it is, though there is a chat template

While it asks: /reset forgets the conversation, /seed N sets the seed, Ctrl-D ends.
"""


def run_chat(arguments: list[str]) -> int:
    """`dpo chat`."""
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", action="store_true")
    options, rest = parser.parse_known_args(arguments)
    wrong = [
        *([f"--tokens: {options.tokens}; expected at least 1"] if options.tokens < 1 else []),
        *([f"--temperature: {options.temperature}; expected at least 0"] if options.temperature < 0 else []),
        *([f"--seed: {options.seed}; expected at least 0"] if options.seed < 0 else []),
    ]
    if len(rest) != 1 or rest[0].startswith("-"):
        wrong.append(f"expected one run folder, got {' '.join(rest) or 'none'}")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        wrong.append("it runs in one process: start it without a launcher")
    if wrong:
        raise UserError("; ".join(wrong) + ": see dpo chat --help")
    written = Path(rest[0]) / "config.yaml"
    if not written.is_file():
        raise UserError(f"{rest[0]}: no config.yaml; expected the folder of a run, such as runs/default")
    config = cast(Config, parse("train", ["--config", str(written), f"--run_dir={rest[0]}"]))
    from dpo.commands.chat import Chat, chat

    chat(
        Chat(
            config=config,
            tokens=options.tokens,
            temperature=options.temperature,
            seed=options.seed,
            as_text=options.text,
        )
    )
    return 0
