"""Tokenized groups on disk, memory-mapped: tokenized once by one rank, shared by all ranks and later runs.

A folder is named by a digest of everything that decides its content (source bytes, tokenizer, options), so it
can be deleted at any time and never be stale. It holds flat arrays; a group is a view into them.
"""

import hashlib
import json
import os
import shutil
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dpo import distributed
from dpo.config import DataConfig, DataSource
from dpo.data.load import PreferenceSource, has_split, open_source, read_groups
from dpo.data.plan import Sizes
from dpo.data.tokenize import TokenizeOptions, tokenize_groups, tokenizer_digest
from dpo.data.trees import Layout, Tree
from dpo.errors import UserError
from dpo.records import KEY_BYTES, Pair, PreferenceGroup, TokenIds, TokenizedGroup, sequence_key

FORMAT_VERSION = 1
DEFAULT_MAX_LENGTH = 1024
WEIGHT_SEED = 0  # the half of a source that weight 0.5 takes is the same in every run


@dataclass(frozen=True, kw_only=True)
class TokenizedDataset:
    """G groups in flat arrays. Segment 0 of a group is its prompt, the others are its completions.

    The sequences of all groups are numbered in order: sequence s is the prompt and one completion of its
    group.
    """

    path: Path
    digest: str
    """Names the content: source bytes, tokenizer and options."""
    counts: dict[str, int]
    """groups, pairs, tokens, and what was dropped or cut, by reason."""
    tokens: npt.NDArray[np.int32]
    segment_offsets: npt.NDArray[np.int64]
    """Segment i is tokens[segment_offsets[i] : segment_offsets[i + 1]]."""
    group_segments: npt.NDArray[np.int64]
    """(G + 1,) first segment of each group."""
    pairs: npt.NDArray[np.int32]
    """(P, 2) completion indices within the group."""
    group_pairs: npt.NDArray[np.int64]
    """(G + 1,) first pair of each group."""
    keys: npt.NDArray[np.void]
    """(S,) content key of each sequence, dtype V16."""

    def __len__(self) -> int:
        """Number of groups."""
        return len(self.group_segments) - 1

    def __getitem__(self, index: int) -> TokenizedGroup:
        """The group, as views into the mapped arrays."""
        first, end = int(self.group_segments[index]), int(self.group_segments[index + 1])
        cuts = self.segment_offsets[first : end + 1]
        segments = [self.tokens[start:stop] for start, stop in pairwise(cuts)]
        pairs = self.pairs[self.group_pairs[index] : self.group_pairs[index + 1]]
        return TokenizedGroup(
            prompt=segments[0],
            completions=tuple(segments[1:]),
            pairs=tuple(Pair(int(chosen), int(rejected)) for chosen, rejected in pairs),
        )

    def content_digest(self) -> str:
        """SHA-256 (hex) of sequences, groups and pairs in their order, whatever file they came from."""
        content = hashlib.sha256()
        for part in (self.keys, self.group_segments, self.pairs, self.group_pairs):
            content.update(np.ascontiguousarray(part).tobytes())
        return content.hexdigest()

    @cached_property
    def pairs_per_group(self) -> npt.NDArray[np.int64]:
        """(G,)."""
        return np.diff(self.group_pairs)

    @cached_property
    def sequences_per_group(self) -> npt.NDArray[np.int64]:
        """(G,)."""
        return np.diff(self.group_segments) - 1

    @cached_property
    def first_sequence(self) -> npt.NDArray[np.int64]:
        """(G,) number of each group's first sequence: every group before it has one segment that is a
        prompt.
        """
        return self.group_segments[:-1] - np.arange(len(self))

    @cached_property
    def completion_tokens(self) -> npt.NDArray[np.int64]:
        """(S,) tokens of each sequence's completion."""
        return np.delete(np.diff(self.segment_offsets), self.group_segments[:-1])

    @cached_property
    def sequence_tokens(self) -> npt.NDArray[np.int64]:
        """(S,) tokens of each sequence, prompt and completion."""
        prompts = np.diff(self.segment_offsets)[self.group_segments[:-1]]
        return np.asarray(
            self.completion_tokens + np.repeat(prompts, self.sequences_per_group), dtype=np.int64
        )

    def sequence(self, index: int) -> tuple[TokenIds, TokenIds]:
        """(prompt, completion) of one sequence."""
        group = int(np.searchsorted(self.first_sequence, index, side="right")) - 1
        tokenized = self[group]
        return tokenized.prompt, tokenized.completions[index - int(self.first_sequence[group])]

    @cached_property
    def tree_tokens(self) -> npt.NDArray[np.int64]:
        """(G,) tokens of each group when its prompt stands once."""
        return np.diff(self.segment_offsets[self.group_segments])

    def sizes(self, groups: npt.NDArray[np.int64], layout: Layout) -> Sizes:
        """What these groups take in a batch of this layout."""
        if layout == "rows":
            return Sizes(rows=self.sequences_per_group[groups], width=self.longest[groups], padded=True)
        return Sizes(rows=np.ones_like(groups), width=self.tree_tokens[groups], padded=layout == "trees")

    @cached_property
    def longest(self) -> npt.NDArray[np.int64]:
        """(G,) tokens of each group's longest sequence."""
        return np.maximum.reduceat(self.sequence_tokens, self.first_sequence)


def longest_tree(datasets: Sequence[TokenizedDataset]) -> Tree:
    """The prompt and completions of the group with the most tokens."""
    dataset = max(datasets, key=lambda dataset: int(dataset.tree_tokens.max()))
    group = dataset[int(dataset.tree_tokens.argmax())]
    return group.prompt, group.completions


def open_datasets(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, positions: int | None
) -> tuple[TokenizedDataset, TokenizedDataset | None]:
    """Training and held-out data in token ids; tokenized by rank 0 where that has not been done yet.

    Args:
        data: Where the data is and how it becomes ids.
        tokenizer: The policy's.
        positions: The model's longest sequence, or None without a limit.

    Raises:
        UserError: Missing or malformed data, nothing left, or lengths beyond the model's.
    """
    max_length = resolve_max_length(data.max_length, positions)
    if data.max_prompt_length is not None and data.max_prompt_length >= max_length:
        raise UserError(
            f"data.max_prompt_length: {data.max_prompt_length}; expected less than {max_length}, the longest "
            "prompt + completion: lower it, or set data.max_length"
        )
    train = _open(train_sources_of(data), data, max_length, tokenizer, "train")
    test_sources = test_sources_of(data)
    test = _open(test_sources, data, max_length, tokenizer, "test") if test_sources else None
    return train, test


def resolve_max_length(max_length: int | None, positions: int | None) -> int:
    """The option, or its default; UserError beyond the model's positions."""
    if max_length is None:
        return min(DEFAULT_MAX_LENGTH, positions or DEFAULT_MAX_LENGTH)
    if positions is not None and max_length > positions:
        raise UserError(f"data.max_length: {max_length}; the model has {positions} positions: lower it")
    return max_length


def check_sources(data: DataConfig) -> None:
    """Opens every source and reads its first group, without a tokenizer. Raises UserError."""
    for weighted in [*train_sources_of(data), *test_sources_of(data)]:
        drops: Counter[str] = Counter()
        if next(_read(weighted[0], data, drops), None) is None:
            raise UserError(f"{weighted[0].path}: nothing left after filtering: {_listed(drops)}")


Weighted = tuple[PreferenceSource, float]


def train_sources_of(data: DataConfig) -> list[Weighted]:
    """The training sources, with their weights."""
    return _sources(data.train, "train", "data.train")


def test_sources_of(data: DataConfig) -> list[Weighted]:
    """The held-out sources: data.test, or the test splits that stand beside data.train."""
    if data.test is not None:
        return _sources(data.test, "test", "data.test")
    paths = [data.train] if isinstance(data.train, str) else [source.path for source in data.train]
    return [(open_source(path, "test", key="data.train"), 1.0) for path in paths if has_split(path, "test")]


def _sources(named: str | list[DataSource], split: Literal["train", "test"], key: str) -> list[Weighted]:
    listed = [DataSource(path=named)] if isinstance(named, str) else named
    return [(open_source(source.path, split, key=key), source.weight) for source in listed]


def _place(
    sources: list[Weighted], data: DataConfig, max_length: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[Path, str]:
    """Folder of the tokenized data, and the digest that names it."""
    decisive = {
        "format": FORMAT_VERSION,
        "sources": [(source.fingerprint, weight) for source, weight in sources],
        "tokenizer": tokenizer_digest(tokenizer),
        "max_length": max_length,
        "options": {
            key: value
            for key, value in asdict(data).items()
            if key not in ("train", "test", "strict", "cache_dir")
        },
    }
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
    return Path(data.cache_dir) / digest[:16], digest


def _open(
    sources: list[Weighted],
    data: DataConfig,
    max_length: int,
    tokenizer: PreTrainedTokenizerBase,
    split: str,
) -> TokenizedDataset:
    folder, digest = _place(sources, data, max_length, tokenizer)

    def write_once() -> None:
        if data.strict or not (folder / "counts.json").is_file():
            counts: Counter[str] = Counter()
            groups = _tokenized(sources, data, max_length, tokenizer, counts, split)
            write_dataset(groups, folder, counts)

    distributed.on_main(write_once)
    dataset = map_dataset(folder, digest)
    if len(dataset) == 0:
        named = ", ".join(str(source.path) for source, _ in sources)
        raise UserError(f"data.{split}: {named}: nothing left after filtering: {_listed(dataset.counts)}")
    return dataset


def _tokenized(
    sources: list[Weighted],
    data: DataConfig,
    max_length: int,
    tokenizer: PreTrainedTokenizerBase,
    counts: Counter[str],
    split: str,
) -> Iterator[TokenizedGroup]:
    for source, weight in sources:
        drops: Counter[str] = Counter()
        groups = tqdm(
            read_weighted(source, weight, data, drops),
            desc=f"tokenize {split}",
            unit=" groups",
            leave=False,
            disable=None,
        )
        yield from tokenize_source(groups, source, data, max_length, tokenizer, counts)
        counts.update({f"dropped/{reason}": number for reason, number in drops.items()})


def tokenize_source(
    groups: Iterable[PreferenceGroup],
    source: PreferenceSource,
    data: DataConfig,
    max_length: int,
    tokenizer: PreTrainedTokenizerBase,
    counts: Counter[str],
) -> Iterator[TokenizedGroup]:
    """Token ids of groups of one source, by the options of the data; drops and cuts are added to `counts`."""
    complete = source.completions_are_complete
    options = TokenizeOptions(
        max_length=max_length,
        max_prompt_length=data.max_prompt_length,
        drop_too_long=data.too_long == "drop",
        append_eos=data.append_eos if data.append_eos is not None else complete is not False,
    )
    for group in tokenize_groups(groups, tokenizer, options, counts):
        yield from [group] if data.group_pairs else _split(group)


def read_weighted(
    source: PreferenceSource, weight: float, data: DataConfig, drops: Counter[str]
) -> Iterator[PreferenceGroup]:
    """The source's groups in their order, as often as its weight says."""
    return _weighted(_read(source, data, drops), weight)


def _read(source: PreferenceSource, data: DataConfig, drops: Counter[str]) -> Iterator[PreferenceGroup]:
    return read_groups(
        source, pairing=data.pairing, min_margin=data.min_margin, strict=data.strict, drops=drops
    )


def _weighted(groups: Iterable[PreferenceGroup], weight: float) -> Iterator[PreferenceGroup]:
    """Each group floor(weight) times, and once more with the probability that is left."""
    generator = np.random.default_rng(WEIGHT_SEED)
    for group in groups:
        for _ in range(int(weight + generator.random())):
            yield group


def _split(group: TokenizedGroup) -> Iterator[TokenizedGroup]:
    """Every pair a group of its own."""
    for chosen, rejected in group.pairs:
        yield TokenizedGroup(
            prompt=group.prompt,
            completions=(group.completions[chosen], group.completions[rejected]),
            pairs=(Pair(0, 1),),
        )


def write_dataset(groups: Iterable[TokenizedGroup], folder: Path, counts: Counter[str]) -> None:
    """Writes the arrays beside `folder` and renames them into place, so that a reader never sees half of
    them.

    Args:
        groups: A stream; only offsets are held in memory.
        folder: The final place.
        counts: What was dropped and cut; groups, pairs and tokens are added.
    """
    building = folder.with_name(f"{folder.name}.building-{os.getpid()}")
    shutil.rmtree(building, ignore_errors=True)  # of a process that died under this number
    building.mkdir(parents=True)
    try:
        _write_arrays(groups, building, counts)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    building.rename(folder)


def _write_arrays(groups: Iterable[TokenizedGroup], building: Path, counts: Counter[str]) -> None:
    segment_offsets, group_segments = array("q", [0]), array("q", [0])
    pairs, group_pairs, keys = array("i"), array("q", [0]), bytearray()
    with (building / "tokens.bin").open("wb") as file:
        for group in groups:
            for segment in (group.prompt, *group.completions):
                file.write(np.ascontiguousarray(segment, dtype="<i4").tobytes())
                segment_offsets.append(segment_offsets[-1] + len(segment))
            for completion in group.completions:
                keys += sequence_key(group.prompt, completion)
            for pair in group.pairs:
                pairs.extend(pair)
            group_segments.append(len(segment_offsets) - 1)
            group_pairs.append(len(pairs) // 2)
    np.save(building / "segment_offsets.npy", np.frombuffer(segment_offsets, dtype=np.int64))
    np.save(building / "group_segments.npy", np.frombuffer(group_segments, dtype=np.int64))
    np.save(building / "pairs.npy", np.asarray(pairs, dtype=np.int32).reshape(-1, 2))
    np.save(building / "group_pairs.npy", np.frombuffer(group_pairs, dtype=np.int64))
    np.save(building / "keys.npy", np.frombuffer(bytes(keys), dtype=f"V{KEY_BYTES}"))
    counts.update(groups=len(group_segments) - 1, pairs=len(pairs) // 2, tokens=segment_offsets[-1])
    (building / "counts.json").write_text(json.dumps(dict(sorted(counts.items())), indent=2))


def map_dataset(folder: Path, digest: str) -> TokenizedDataset:
    """Maps the arrays of a folder that `write_dataset` made."""
    tokens = folder / "tokens.bin"
    names = ("segment_offsets", "group_segments", "pairs", "group_pairs", "keys")
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}
    return TokenizedDataset(
        path=folder,
        digest=digest,
        counts=json.loads((folder / "counts.json").read_text()),
        tokens=np.memmap(tokens, dtype="<i4", mode="r")
        if tokens.stat().st_size
        else np.zeros(0, dtype=np.int32),
        **arrays,
    )


def _listed(counts: dict[str, int]) -> str:
    dropped = [f"{number} {reason.removeprefix('dropped/')}" for reason, number in counts.items() if number]
    return ", ".join(dropped) or "the source is empty"
