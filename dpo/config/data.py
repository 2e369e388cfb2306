"""The section `data`: which preferences, and how they become token ids."""

from dataclasses import dataclass
from typing import Literal

from dpo.config.ranges import Count, NotNegative, Positive, Tokens

FIELDS = (
    "prompt",
    "chosen",
    "rejected",
    "completions",
    "pairs",
    "scores",
    "completion",
    "score",
    "label",
    "labels",
    "score_chosen",
    "score_rejected",
    "reference_scores",
    "system",
    "tools",
    "chat_template_kwargs",
    "id",
)
"""Our names of the columns that a row may have."""


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """One data set, or one part of a mixture."""

    path: str
    """A file, a folder, a pattern such as data/*.parquet, a URL such as s3://bucket/file, or a hub name."""
    name: str | None = None
    """Configuration of a hub data set. Default: its only one."""
    split: str | None = None
    """Split of a folder or hub data set. Default: train for data.train, test for data.test."""
    revision: str | None = None
    """Hub revision: a branch, tag or commit. Default: the hub's main branch."""
    columns: dict[str, str] | None = None
    """Our names of fields -> the data's own, where they differ: {prompt: question, rejected: worse}."""
    rows: Count | None = None
    """Read only the first rows, this many."""
    weight: Positive = 1.0
    """Share of the source's groups that is used: 0.5 is a fixed random half, 2 takes each group twice."""


Sources = str | DataSource | list[str | DataSource]
"""A path or hub name, one source with its options, or a mixture of such."""


def sources_of(named: Sources) -> list[DataSource]:
    """What `data.train` or `data.test` names, as a list."""
    listed = named if isinstance(named, list) else [named]
    return [DataSource(path=source) if isinstance(source, str) else source for source in listed]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training data and how it becomes token ids."""

    train: Sources
    """Preferences: a path, a hub name, {path, split, columns, ...}, or a list of such. `sft` learns their
    chosen completions, or text: a .txt, .txt.gz or .txt.xz file (one document per line), or a folder of such.
    """
    test: Sources | None = None
    """Held-out data of the same kind. Default: the test split beside `train`, if there is one."""
    max_length: Tokens | None = None
    """Longest prompt + completion, or block of text. Default: 1024 tokens, or all the model's positions."""
    max_prompt_length: Count | None = None
    """Longest prompt; its end is kept. Default: what completions leave, at least max_length / 2."""
    too_long: Literal["truncate", "drop"] = "truncate"
    """Truncate a group that does not fit, keeping the prompt's end and the completion's start, or drop it."""
    group_pairs: bool = True
    """Train all pairs of one prompt in the same step; false makes every pair a group of its own."""
    pairing: Literal["best-vs-rest", "best-vs-worst", "mu-2sigma", "all"] = "best-vs-rest"
    """How scored completions become pairs, where the data has scores and no pairs."""
    min_margin: NotNegative = 0.0
    """Pairs whose scores differ by no more than this are left out."""
    append_eos: bool | None = None
    """End completions with EOS. Default: what the data's manifest says of them, else true."""
    strict: bool = False
    """Stop at the first faulty row, instead of dropping and counting it."""
    cache_dir: str = "cache/tokenized"
    """Where token ids are kept, memory-mapped by all ranks. Safe to delete."""
    num_workers: Count | None = None
    """Processes that tokenize, per node; changes no result. Default: one per core."""
