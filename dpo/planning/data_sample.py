"""The size of a data set, estimated from a sample: every row is read, some groups are tokenized.

The first stage of `dpo plan`. A data set of at most `SAMPLE_GROUPS` groups is exact.
"""

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from dpo import terminal
from dpo.config import DataConfig
from dpo.data.build import open_datasets, resolve_max_length, test_sources_of, train_sources_of
from dpo.data.dataset import TokenizedDataset, map_dataset, write_dataset
from dpo.data.mismatched import with_mismatched
from dpo.data.notes import RowNotes
from dpo.data.parts import options_for, weighted_groups
from dpo.data.records import PreferenceGroup
from dpo.data.sources import PreferenceSource, blocks
from dpo.data.tokenize import tokenize_groups
from dpo.data.trees import Tree
from dpo.errors import UserError
from dpo.evaluate.statistics import Interval, mean_interval

SAMPLE_GROUPS = 2000
"""Most groups of a split that are tokenized."""
SEED = 0


@dataclass(frozen=True, kw_only=True)
class SampledData:
    """A split: a sample of it in token ids, and which group of the sample represents each of its groups."""

    sample: TokenizedDataset
    stand_in: npt.NDArray[np.int64]
    """(G,) for each of the (estimated) G groups of the split, the number of a group of the sample."""
    tokens: Interval
    """Tree tokens of the whole split."""
    changed: dict[str, float]
    """Groups that are dropped or cut in the whole split, by reason; estimates, except rows that cannot be
    read."""
    exact: bool
    """Whether the sample is the whole split."""

    @property
    def scale(self) -> float:
        """Groups of the split per group of the sample."""
        return len(self.stand_in) / len(self.sample)

    @property
    def groups(self) -> int:
        """Number of groups: prompts with their completions."""
        return len(self.stand_in)

    @property
    def pairs_per_group(self) -> npt.NDArray[np.int64]:
        """(G,) pairs of each group."""
        return np.asarray(self.sample.pairs_per_group[self.stand_in])

    @property
    def pairs(self) -> int:
        """Pairs of all groups."""
        return int(self.pairs_per_group.sum())

    @property
    def sequences(self) -> int:
        """Completions of all groups; equal ones count separately."""
        return int(self.sample.sequences_per_group[self.stand_in].sum())

    @property
    def longest(self) -> int:
        """Tokens of the longest tree."""
        return int(self.sample.tree_tokens.max())

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest prompt with one of its completions: the smallest piece of its group."""
        return int(self.sample.longest.max())

    def trees(self, tokens: int) -> list[Tree]:
        """Groups of the sample in random order, repeated to fill `tokens`; always with the longest."""
        longest = self._tree(int(self.sample.tree_tokens.argmax()))
        return [longest, *self._filling(tokens - self.longest)]

    def piece(self, tokens: int) -> list[Tree]:
        """As `trees`, where groups are cut between completions: always with the longest sequence."""
        prompt, completions = self._tree(int(self.sample.longest.argmax()))
        longest, *others = sorted(completions, key=len, reverse=True)
        kept, room = [longest], tokens - len(prompt) - len(longest)
        for other in others:
            if len(other) <= room:
                kept.append(other)
                room -= len(other)
        return [(prompt, kept), *self._filling(room)]

    def _filling(self, room: int) -> list[Tree]:
        """Whole groups in random order, repeated until none fits any more."""
        chosen, order = list[int](), np.random.default_rng(SEED).permutation(len(self.sample))
        while fitting := [int(group) for group in order if self.sample.tree_tokens[group] <= room]:
            for group in fitting:
                if self.sample.tree_tokens[group] <= room:
                    chosen.append(group)
                    room -= int(self.sample.tree_tokens[group])
        return [self._tree(group) for group in chosen]

    def _tree(self, group: int) -> Tree:
        return self.sample[group].prompt, self.sample[group].completions


def sample_data(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    positions: int | None,
    *,
    exact: bool,
    mismatched: bool = False,
) -> dict[str, SampledData]:
    """Training and, where there is any, held-out data.

    Args:
        data: Its sources and how it becomes token ids.
        tokenizer: The policy's.
        positions: The model's longest sequence, or None if it has no limit.
        exact: Tokenize all of it, as training does.
        mismatched: Give each prompt a completion of another one too; see `dpo.data.mismatched`.

    Raises:
        UserError: Missing or malformed data, or no group is left.
    """
    if exact:
        train, test = open_datasets(data, tokenizer, positions, mismatched=mismatched)
        return {"train": _whole(train)} | ({"test": _whole(test)} if test is not None else {})
    max_length = resolve_max_length(data.max_length, positions)
    splits = {"train": train_sources_of(data), "test": test_sources_of(data)}
    return {
        name: _sampled(sources, data, tokenizer, max_length, name, mismatched=mismatched)
        for name, sources in splits.items()
        if sources
    }


def _whole(dataset: TokenizedDataset) -> SampledData:
    """A split as training has it."""
    counts = {
        name: float(number)
        for name, number in dataset.counts.items()
        if number and name.startswith(("dropped/", "truncated/"))
    }
    return _exact(dataset, counts)


def _sampled(
    sources: Sequence[PreferenceSource],
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    split: str,
    *,
    mismatched: bool,
) -> SampledData:
    """Tokenizes at most `SAMPLE_GROUPS` random groups of a split."""
    generator = np.random.default_rng(SEED)
    drawn = _draw(sources, data, generator)
    cut = Counter[str]()
    with tempfile.TemporaryDirectory() as folder:  # mapped files outlive their names
        sample = _tokenize(drawn.by_source, sources, data, tokenizer, max_length, cut, Path(folder))
        if mismatched and len(sample):
            sample = with_mismatched(sample, f"data.{split}")
    if len(sample) == 0:
        named = ", ".join(source.path for source in sources)
        raise UserError(
            f"data.{split}: {named}: no group of {drawn.num_read} is left after tokenization; expected at "
            "least one: raise data.max_length, or see data.too_long"
        )
    changed = {f"dropped/{reason}": float(number) for reason, number in drawn.dropped.items() if number}
    changed |= {reason: number * drawn.scale for reason, number in cut.items() if number}
    if drawn.is_whole:
        return _exact(sample, changed)
    groups = round(len(sample) * drawn.scale)
    tokens = mean_interval(sample.tree_tokens, np.arange(len(sample)))
    return SampledData(
        sample=sample,
        stand_in=generator.integers(len(sample), size=groups),
        tokens=Interval(*(value * groups for value in tokens)),
        changed=changed,
        exact=False,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Drawn:
    """Groups of a split, drawn at random while all of it was read."""

    by_source: list[list[PreferenceGroup]]
    """For each source, its groups in the sample."""
    num_read: int
    """Groups of the whole split."""
    dropped: Counter[str]
    """Rows of the whole split that cannot be read, by reason."""

    @property
    def is_whole(self) -> bool:
        """Whether the sample is the whole split."""
        return self.num_read == sum(map(len, self.by_source))

    @property
    def scale(self) -> float:
        """Groups of the split per group of the sample."""
        return self.num_read / sum(map(len, self.by_source))


def _draw(sources: Sequence[PreferenceSource], data: DataConfig, generator: np.random.Generator) -> _Drawn:
    """Reads every row and keeps a uniform sample (reservoir sampling)."""
    dropped, num_read = Counter[str](), 0
    reservoir: list[tuple[int, PreferenceGroup]] = []
    for number, source in enumerate(sources):
        notes = RowNotes()
        parts = enumerate(blocks(source))
        for group in chain.from_iterable(
            weighted_groups(source, place, block, data, notes) for place, block in parts
        ):
            num_read += 1
            if len(reservoir) < SAMPLE_GROUPS:
                reservoir.append((number, group))
            elif (place := int(generator.integers(num_read))) < SAMPLE_GROUPS:
                reservoir[place] = (number, group)
        dropped.update(notes.drops)
        terminal.note(*notes.lines(source.path))
        terminal.warning(*notes.warnings(source.path))
    by_source = [[group for origin, group in reservoir if origin == number] for number in range(len(sources))]
    return _Drawn(by_source=by_source, num_read=num_read, dropped=dropped)


def _tokenize(
    by_source: list[list[PreferenceGroup]],
    sources: Sequence[PreferenceSource],
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    cut: Counter[str],
    folder: Path,
) -> TokenizedDataset:
    """The groups in token ids, as training would have them, written to `folder`.

    Counts what is cut or dropped in `cut`.
    """
    notes = RowNotes()
    groups = chain.from_iterable(
        tokenize_groups(mine, tokenizer, options_for(source, data, max_length), cut, notes)
        for source, mine in zip(sources, by_source, strict=True)
    )
    write_dataset(groups, folder / "sample", Counter())
    cut.update({f"dropped/{reason}": number for reason, number in notes.drops.items()})
    return map_dataset(folder / "sample", "sample")


def _exact(dataset: TokenizedDataset, changed: dict[str, float]) -> SampledData:
    """A split that is tokenized as a whole."""
    total = float(dataset.tree_tokens.sum())
    return SampledData(
        sample=dataset,
        stand_in=np.arange(len(dataset)),
        tokens=Interval(total, total, total),
        changed=changed,
        exact=True,
    )
