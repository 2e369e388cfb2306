"""What a data set holds, from a sample of it: every row is read, some are tokenized."""

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from dpo.config import DataConfig
from dpo.data.build import (
    Weighted,
    open_datasets,
    read_weighted,
    resolve_max_length,
    test_sources_of,
    tokenize_source,
    train_sources_of,
)
from dpo.data.dataset import TokenizedDataset, map_dataset, write_dataset
from dpo.data.records import PreferenceGroup, TokenizedGroup
from dpo.data.trees import Tree
from dpo.errors import UserError
from dpo.evaluate.statistics import Interval, mean_interval

SAMPLE_GROUPS = 2000
SEED = 0


@dataclass(frozen=True, kw_only=True)
class SampledData:
    """A split: its sample in token ids, and which of the sample's groups stands for each of its own."""

    sample: TokenizedDataset
    stand_in: npt.NDArray[np.int64]
    """(G,) for every group of the split, as far as it is known: a group of the sample."""
    tokens: Interval
    """Tree tokens of the split."""
    changed: dict[str, float]
    """What is dropped or cut, by reason, in the whole split; estimates but for rows that cannot be read."""
    exact: bool
    """The sample is the whole split."""

    @property
    def scale(self) -> float:
        """Groups of the split for each group of the sample."""
        return len(self.stand_in) / len(self.sample)

    @property
    def groups(self) -> int:
        """Prompts with their completions."""
        return len(self.stand_in)

    @property
    def pairs_per_group(self) -> npt.NDArray[np.int64]:
        """(G,)."""
        return np.asarray(self.sample.pairs_per_group[self.stand_in])

    @property
    def pairs(self) -> int:
        """Of all groups."""
        return int(self.pairs_per_group.sum())

    @property
    def sequences(self) -> int:
        """Of all groups; equal ones are not joined."""
        return int(self.sample.sequences_per_group[self.stand_in].sum())

    @property
    def longest(self) -> int:
        """Tokens of the longest tree."""
        return int(self.sample.tree_tokens.max())

    def trees(self, tokens: int) -> list[Tree]:
        """Groups of the sample, over and over in random order, as many as `tokens` hold; at least the
        longest.
        """
        longest = int(self.sample.tree_tokens.argmax())
        chosen, room = [longest], tokens - self.longest
        order = np.random.default_rng(SEED).permutation(len(self.sample))
        while fitting := [int(group) for group in order if self.sample.tree_tokens[group] <= room]:
            for group in fitting:
                if self.sample.tree_tokens[group] <= room:
                    chosen.append(group)
                    room -= int(self.sample.tree_tokens[group])
        return [(self.sample[group].prompt, self.sample[group].completions) for group in chosen]


def sample_data(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, positions: int | None, *, exact: bool
) -> dict[str, SampledData]:
    """Training and, where there is any, held-out data.

    Args:
        data: Where it is and how it becomes ids.
        tokenizer: The policy's.
        positions: The model's longest sequence.
        exact: Tokenize all of it, as training does.

    Raises:
        UserError: Missing or malformed data, or nothing left of it.
    """
    if exact:
        train, test = open_datasets(data, tokenizer, positions)
        return {"train": _whole(train)} | ({"test": _whole(test)} if test is not None else {})
    max_length = resolve_max_length(data.max_length, positions)
    splits = {"train": train_sources_of(data), "test": test_sources_of(data)}
    return {
        name: _sampled(sources, data, tokenizer, max_length, name)
        for name, sources in splits.items()
        if sources
    }


def _whole(dataset: TokenizedDataset) -> SampledData:
    total = float(dataset.tree_tokens.sum())
    counts = {
        name: float(n)
        for name, n in dataset.counts.items()
        if n and name.startswith(("dropped/", "truncated/"))
    }
    return SampledData(
        sample=dataset,
        stand_in=np.arange(len(dataset)),
        tokens=Interval(total, total, total),
        changed=counts,
        exact=True,
    )


def _sampled(
    sources: Sequence[Weighted],
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    split: str,
) -> SampledData:
    drops, cuts, read = Counter[str](), Counter[str](), 0
    chosen: list[list[PreferenceGroup]] = []
    generator = np.random.default_rng(SEED)
    reservoir: list[tuple[int, PreferenceGroup]] = []
    for number, (source, weight) in enumerate(sources):
        for group in read_weighted(source, weight, data, drops):
            read += 1
            if len(reservoir) < SAMPLE_GROUPS:
                reservoir.append((number, group))
            elif (place := int(generator.integers(read))) < SAMPLE_GROUPS:
                reservoir[place] = (number, group)
    chosen = [[group for origin, group in reservoir if origin == number] for number in range(len(sources))]

    def tokenized() -> Iterator[TokenizedGroup]:
        for (source, _), groups in zip(sources, chosen, strict=True):
            yield from tokenize_source(groups, source, data, max_length, tokenizer, cuts)

    with tempfile.TemporaryDirectory() as folder:
        write_dataset(tokenized(), Path(folder) / "sample", Counter())
        sample = map_dataset(Path(folder) / "sample", "sample")  # mapped files stay until they are let go
    if len(sample) == 0:
        named = ", ".join(str(source.path) for source, _ in sources)
        raise UserError(f"data.{split}: {named}: nothing left of {read} groups after tokenization")
    scale = read / len(reservoir)
    whole = read == len(reservoir)
    groups = len(sample) if whole else round(len(sample) * scale)
    stand_in = np.arange(groups) if whole else generator.integers(len(sample), size=groups)
    tokens = mean_interval(sample.tree_tokens, np.arange(len(sample)))
    total = float(sample.tree_tokens.sum())
    changed = {f"dropped/{reason}": float(number) for reason, number in drops.items() if number}
    changed |= {reason: number * scale for reason, number in cuts.items() if number}
    return SampledData(
        sample=sample,
        stand_in=stand_in,
        tokens=Interval(total, total, total) if whole else Interval(*(value * groups for value in tokens)),
        changed=changed,
        exact=whole,
    )
