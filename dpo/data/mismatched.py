"""A data set in which every prompt also has a completion of another prompt, for losses that estimate a KL.

KTO's reference point is the mean log-ratio of such mismatched completions. Here each is the last completion
of its group, in no pair, and fixed by the data alone: so its reference log-prob is cached like any other, and
a step's estimate does not depend on how the step is cut. Made of a tokenized data set, and kept beside it.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from dpo import distributed, terminal
from dpo.data.dataset import TokenizedDataset, is_written, map_dataset, new_dataset, write_arrays
from dpo.data.records import TokenizedGroup
from dpo.errors import UserError

VERSION = 1
"""Part of the digest of what is made here."""
WRITTEN = ("groups", "pairs", "tokens")
"""Counts that are counted again."""


def with_mismatched(dataset: TokenizedDataset, key: str) -> TokenizedDataset:
    """The data set with a mismatched completion in each group; made once. All ranks must call it.

    Args:
        dataset: G groups, on disk.
        key: The option that names the data, for messages.

    Raises:
        UserError: All groups have the same prompt, or there is no room to write.
    """
    digest = hashlib.sha256(f"mismatched {VERSION} {dataset.digest}".encode()).hexdigest()
    folder = dataset.path.with_name(digest[:16])

    def write() -> None:
        if not is_written(folder):
            _write(dataset, folder, key)

    distributed.on_main(write)
    return replace(map_dataset(folder, digest), sources=dataset.sources)


def _write(dataset: TokenizedDataset, folder: Path, key: str) -> None:
    counts = Counter({name: number for name, number in dataset.counts.items() if name not in WRITTEN})
    groups = terminal.progress(
        mismatched_groups(dataset, key), description="mismatched completions", unit="groups", leave=False
    )
    try:
        with new_dataset(folder) as building:
            write_arrays(groups, building, counts)
    except OSError as error:
        raise UserError(
            f"data.cache_dir: cannot write the token ids to {folder} ({error.strerror or error}); make room, "
            "or choose another folder"
        ) from error


def mismatched_groups(dataset: TokenizedDataset, key: str) -> Iterator[TokenizedGroup]:
    """The groups, each with a completion of the next group that has another prompt, cut to fit.

    The number of the completion goes around with the group's, so that chosen and rejected ones both occur.
    No sequence is longer than the longest of the data set.

    Raises:
        UserError: All groups have the same prompt.
    """
    longest = int(dataset.sequence_tokens.max())
    number = len(dataset)
    for index in range(number):
        group = dataset[index]
        for step in range(1, number):
            other = dataset[(index + step) % number]
            if len(other.prompt) != len(group.prompt) or (other.prompt != group.prompt).any():
                break
        else:
            raise UserError(
                f"{key}: all rows have the same prompt; the loss compares completions of different prompts"
            )
        completion = other.completions[index % len(other.completions)][: longest - len(group.prompt)]
        shares = group.quantiles and (*group.quantiles, math.nan)  # in no pair
        yield replace(group, completions=(*group.completions, completion), quantiles=shares)
