"""OpenAI's lm-human-preferences labels (arXiv 1909.08593): people's choice of the best of 4 continuations.

The published files hold GPT-2 token ids, which are decoded here; the hub's copies hold text. Best of 4
becomes one group of 4 completions and 3 pairs, best against rest. Continuations were sampled to a fixed
length, so they are fragments.
"""

import argparse
import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    UnknownHandler,
)

from tqdm import tqdm

from data_prep.files import PreferenceWriter, describe_arguments, describe_file
from data_prep.splits import Rows, open_inputs, prompt_key, split_groups
from dpo.data.records import Pair, PreferenceGroup
from dpo.data.rows import RowError, group_from_row
from dpo.data.sources import Split
from dpo.errors import UserError

SUMMARY = "OpenAI's lm-human-preferences labels: the best of 4 continuations, as groups of 3 pairs."

URL = "https://openaipublic.blob.core.windows.net/lm-human-preferences/labels/{file}"
FILES = {
    "sentiment": "sentiment/offline_5k.json",
    "descriptiveness": "descriptiveness/offline_5k.json",
    "tldr": "tldr/online_45k.json",
    "cnndm": "cnndm/online_45k.json",
}
"""The file that the paper's authors train on, for each task."""

SAMPLES = ("sample0", "sample1", "sample2", "sample3")
PADDING = 50259


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this source."""
    parser.add_argument(
        "--task",
        choices=tuple(FILES),
        default="sentiment",
        help="which labels to download (default: sentiment)",
    )
    parser.add_argument(
        "--input",
        metavar="INPUT",
        help="read this instead of downloading: a published .json file, .jsonl of the same rows as ids or "
        "text, or the hub's text version, such as trl-lib/lm-human-preferences-sentiment",
    )
    parser.add_argument(
        "--tokenizer", default="gpt2", help="GPT-2's tokenizer: a folder or a hub name (default: gpt2)"
    )


def run(args: argparse.Namespace) -> None:
    """Writes the preference files. Raises UserError."""
    with PreferenceWriter(
        args.output,
        overwrite=args.overwrite,
        completions_are_complete=False,
        source=describe_arguments(args),
    ) as writer:
        rows: dict[Split, Rows]
        if args.input is not None and not args.input.endswith(".json"):
            inputs = open_inputs([args.input], [])
            rows = inputs.rows()
            writer.sources.extend(inputs.describe())
        elif args.input is not None:
            path = Path(args.input).expanduser()
            rows = {"train": _published_rows(path)}
            writer.sources.append(describe_file(path))
        else:
            url = URL.format(file=FILES[args.task])
            path = writer.folder / Path(url).name
            download(url, path)
            rows = {"train": _published_rows(path)}
            writer.sources.append({**describe_file(path), "name": url})
            path.unlink()
        convert = partial(label_group, decode=Decoder(args.tokenizer), drops=writer.drops)
        writer.write_all(split_groups(rows, convert, prompt_key, args=args, drops=writer.drops))


def label_group(row: Any, *, decode: Callable[[list[int]], str], drops: Counter[str]) -> PreferenceGroup:
    """One row as a group: {query, sample0..sample3, best} in token ids or text, or a plain preference pair.

    Args:
        row: The raw row.
        decode: GPT-2 token ids -> text.
        drops: Counts the pairs that are not made since the loser has the same text as the best.

    Raises:
        RowError: A faulty row, or four times the same text.
    """
    if not isinstance(row, Mapping) or "query" not in row:
        return group_from_row(row)
    best = row.get("best")
    if type(best) is not int or not 0 <= best < len(SAMPLES):
        raise RowError(
            "bad_best", f"best is {best!r}; expected the index of a sample, 0 to {len(SAMPLES) - 1}"
        )
    prompt, *completions = (_text(row, name, decode) for name in ("query", *SAMPLES))
    if not all(completion.strip() for completion in completions):
        raise RowError("empty_completion", "a sample has no text")
    rest = [index for index in range(len(SAMPLES)) if index != best]
    pairs = tuple(Pair(best, index) for index in rest if completions[index] != completions[best])
    if not pairs:
        raise RowError("identical_completions", "all samples have the same text")
    if len(pairs) < len(rest):
        drops["pair_identical_to_best"] += len(rest) - len(pairs)
    return PreferenceGroup(prompt=prompt, completions=tuple(completions), pairs=pairs)


GPT2_PROBE, GPT2_PROBE_TEXT = (15496, 11, 995), "Hello, world"


class Decoder:
    """GPT-2 token ids -> text. The tokenizer is loaded at the first row that needs it; text rows never do."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._tokenizer: Any = None

    def __call__(self, ids: list[int]) -> str:
        """The text of the ids, byte for byte. Raises UserError when there is no such tokenizer."""
        if self._tokenizer is None:
            self._tokenizer = self._load()
        if any(token >= len(self._tokenizer) for token in ids):
            raise RowError("bad_token_ids", f"a token id is not below {len(self._tokenizer)}")
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def _load(self) -> Any:
        from transformers import AutoTokenizer  # takes seconds to import

        try:
            tokenizer = AutoTokenizer.from_pretrained(self._name)
        except (OSError, ValueError) as error:
            raise UserError(
                f"--tokenizer: {self._name} is no tokenizer here, nor could the hub deliver one "
                f"({type(error).__name__}); expected a folder with GPT-2's tokenizer, or gpt2"
            ) from error
        # Any large enough vocabulary would decode the labels, and another than theirs into nonsense.
        if len(tokenizer) <= max(GPT2_PROBE) or tokenizer.decode(list(GPT2_PROBE)) != GPT2_PROBE_TEXT:
            raise UserError(
                f"--tokenizer: {self._name} has another vocabulary than GPT-2, whose ids the labels are; "
                "expected a folder with GPT-2's tokenizer, or gpt2"
            )
        return tokenizer


def https_only() -> OpenerDirector:
    """Opens https addresses and nothing else, wherever a server redirects to."""
    opener = OpenerDirector()
    handlers = (ProxyHandler, HTTPSHandler, HTTPRedirectHandler, HTTPErrorProcessor, HTTPDefaultErrorHandler)
    for handler in (*handlers, UnknownHandler):
        opener.add_handler(handler())
    return opener


def download(url: str, path: Path) -> None:
    """Fetches a file under a progress bar.

    Raises:
        UserError: No network, not all of it, or an address that is not https; with what to do.
    """
    try:
        with https_only().open(url, timeout=30) as response, path.open("wb") as file:
            total = int(response.headers.get("Content-Length", 0)) or None
            with tqdm.wrapattr(response, "read", total=total, desc="download") as stream:
                shutil.copyfileobj(stream, file)
            received = file.tell()
    except OSError as error:
        raise UserError(
            f"--task: {url} could not be fetched ({error}); fetch it elsewhere and give the file as --input"
        ) from error
    if total is not None and received != total:
        raise UserError(f"--task: {url} ended after {received:,} of {total:,} bytes; try again")


def _published_rows(path: Path) -> Rows:
    """The rows of a published file: one JSON list of objects, tens of megabytes."""
    try:
        rows = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"--input: {path} does not exist; leave it out to download the labels") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); expected the published list of labels") from error
    if not isinstance(rows, list):
        raise UserError(f"{path}: a JSON {type(rows).__name__}; expected the published list of labels")
    return ((f"{path}: row {number}", row) for number, row in enumerate(rows, start=1))


def _text(row: Mapping[str, Any], name: str, decode: Callable[[list[int]], str]) -> str:
    value = row.get(name)
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(type(token) is int and token >= 0 for token in value):
        raise RowError(
            "bad_token_ids", f"{name} is a {type(value).__name__}; expected text or a list of token ids"
        )
    return decode([token for token in value if token != PADDING])
