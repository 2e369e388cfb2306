"""dpo chat: the reference and the trained policy side by side, at a prompt in the terminal."""

import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo import alive, distributed, terminal
from dpo.commands.check import finished_model
from dpo.commands.inputs import open_reference_model, quieten_libraries
from dpo.config import Config, ModelConfig
from dpo.data.fields import RowError
from dpo.data.records import Message
from dpo.data.tokenize import encode_prompt
from dpo.errors import UserError
from dpo.evaluate.samples import texts_of
from dpo.evaluate.sampling import sample, stop_ids_of
from dpo.model.load import load_model
from dpo.model.tokenizer import load_tokenizer
from dpo.report.terminal_table import side_by_side

NAMES = ("reference", "policy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """What is talked to, and how it answers."""

    config: Config
    """Of the run, whose folder holds the policy."""
    tokens: int
    """Of the longest answer."""
    temperature: float
    seed: int
    """Of the first answer."""
    as_text: bool
    """Continue what is typed, also where there is a chat template."""


@dataclass(slots=True)
class _Speaker:
    """One of the two models, and what was said to it and by it."""

    model: PreTrainedModel
    stop_ids: tuple[int, ...]
    turns: list[Message] = field(default_factory=list)


def chat(options: Chat) -> None:
    """Asks for lines until there are no more, and shows what both models answer.

    Raises:
        UserError: The run has no finished model, or a model cannot be loaded.
    """
    quieten_libraries()
    policy, reference = finished_model(options.config), open_reference_model(options.config)
    tokenizer = load_tokenizer(options.config.model)
    speakers = [_speaker(model, tokenizer) for model in (reference, policy)]
    converses = tokenizer.chat_template is not None and not options.as_text
    does = "answer, and remember the conversation" if converses else "continue the text that you type"
    terminal.note(
        f"reference: {reference.name_or_path}\npolicy: {policy.name_or_path}\nBoth {does}; "
        "/reset, /seed N, Ctrl-D to end."
    )
    seed = options.seed
    for line in _lines():
        if line.strip() == "/reset":
            for speaker in speakers:
                speaker.turns.clear()
        elif line.startswith("/seed"):
            number = line.removeprefix("/seed").strip()
            seed = int(number) if number.isdecimal() else seed
            terminal.note(
                f"seed {seed}" if number.isdecimal() else "/seed N: expected a number of at least 0"
            )
        elif line.startswith("/"):
            terminal.note(f"{line.split()[0]}: expected /reset or /seed N")
        elif line.strip():
            try:
                answers = [_answer(one, line, tokenizer, options, seed, converses) for one in speakers]
            except (UserError, RowError) as error:
                terminal.warning(f"{error}; /reset starts a new conversation" if converses else str(error))
                continue
            for speaker, answer in zip(speakers, answers, strict=True):
                if converses:
                    speaker.turns += [_said("user", line), _said("assistant", answer)]
            _show(line, answers)
            seed += 1


def _speaker(model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> _Speaker:
    alive.loading(f"loading {model.name_or_path}")
    loaded = load_model(model)
    loaded.to(distributed.device())  # type: ignore[arg-type]
    return _Speaker(loaded, stop_ids_of(loaded, tokenizer))


def _answer(
    speaker: _Speaker,
    line: str,
    tokenizer: PreTrainedTokenizerBase,
    options: Chat,
    seed: int,
    converses: bool,
) -> str:
    prompt = [*speaker.turns, _said("user", line)] if converses else line
    ids = np.asarray(encode_prompt(prompt, tokenizer, key="model.name_or_path"), dtype=np.int32)
    [[continuation]] = sample(
        speaker.model,
        [ids],
        num_samples=1,
        max_new_tokens=options.tokens,
        temperature=options.temperature,
        seed=seed,
        batch_size=1,
        stop_ids=speaker.stop_ids,
        progress=None,
    )
    return texts_of([continuation.ids], tokenizer)[0]


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _lines() -> Iterator[str]:
    """What is typed, or lines of standard input where it is no terminal."""
    with suppress(ImportError):
        import readline  # noqa: F401  # input() then edits the line and remembers earlier ones
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return


def _show(line: str, answers: list[str]) -> None:
    if terminal.mode() == "json":
        terminal.event("chat", {"prompt": line, **dict(zip(NAMES, answers, strict=True))})
    else:
        width = shutil.get_terminal_size((terminal.WIDEST, 24)).columns
        print(side_by_side(NAMES, [(None, answers)], width), flush=True)
